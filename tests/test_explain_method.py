"""The figure of docs/how.md and the numbers beside it."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from references import is_unbiased

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    path = REPOSITORY / "scripts" / "explain_method.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed_on_the_page():
    (block,) = re.findall(
        r"^```text\n(.*?)^```$", (REPOSITORY / "docs/how.md").read_text(), re.S | re.M
    )
    return block


def numbers(text):
    return torch.tensor([float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)])


def words(text):
    return re.sub(r"\d+(?:\.\d+)?", "#", re.sub(r" +", " ", text))


def test_the_figure_is_drawn_and_the_table_printed(script, tmp_path, capsys):
    script.main([str(tmp_path / "method.png"), "--replicates", "200"])
    assert (tmp_path / "method.png").read_bytes().startswith(b"\x89PNG")
    assert words(capsys.readouterr().out) == words(printed_on_the_page())


def test_the_pair_is_what_the_page_says(script):
    pair = script.pair(4)
    assert pair.meeting_time == 10 and len(pair.x) == 10 and len(pair.y) == 7
    assert pair.x[9] == pair.y[6] and pair.x[8] != pair.y[5]
    assert pair.x[2] == pytest.approx(1.8, abs=0.05) and pair.y[1] == pytest.approx(1.2, abs=0.05)
    assert pair.coefficient.sum() == pytest.approx(1, abs=1e-12)
    assert 2.02 < (pair.coefficient * pair.z).sum() < 2.4  # a little too high


def test_chains_are_unbiased_and_iwae_is_not(script):
    exact = torch.tensor([script.posterior()[2]], dtype=torch.float64)
    assert is_unbiased(script.coupled(10, 4000).estimates[:, None], exact)
    assert not is_unbiased(script.iwae(50, 4000).estimates[:, None], exact)


@pytest.mark.slow
def test_the_page_has_the_numbers_of_the_script(script, tmp_path, capsys):
    script.main([str(tmp_path / "method.png")])
    # The last digits are those of one machine.
    found, expected = numbers(capsys.readouterr().out), numbers(printed_on_the_page())
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
