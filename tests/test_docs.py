"""The documentation's code runs as printed."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_chains(capsys):
    text = (DOCS / "chains.md").read_text()
    names = {}
    for block in blocks(text, "python"):
        exec(compile(block, "chains.md", "exec"), names)
    # What the text says of the numbers: within 4 standard errors of the truth for the chains (of
    # three means one is farther once in 5,000 seeds), and far away for importance sampling.
    score = (names["mean"] - names["truth"]) / names["error"]
    assert score.abs().max() < 4
    biased = names["normalised"].mean(0)[2]
    assert (biased - names["truth"][2]).abs() > 10 * names["error"][2]
    # The last digits are those of one machine; the words and the number of lines are not.
    printed = "".join(blocks(text, "text"))
    number = re.compile(r"\d+\.\d+")
    found = capsys.readouterr().out
    assert number.sub("#", found) == number.sub("#", printed)
    # After 50 steps of one kernel its mean is within 4 standard errors, 0.04 each, of the truth.
    means = [float(line.split()[5]) for line in found.splitlines() if " at t = 1, 5, 50" in line]
    assert len(means) == 3
    assert means == pytest.approx([names["truth"][2].item()] * 3, abs=4 * 0.04)
    torch.testing.assert_close(
        torch.tensor([float(x) for x in number.findall(found)]),
        torch.tensor([float(x) for x in number.findall(printed)]),
        rtol=0.02,
        atol=0.02,
    )


QUICKSTART = (DOCS / "quickstart.md").read_text()


@pytest.mark.slow
def test_quickstart(tmp_path):
    """Its commands in their order, with fewer epochs and samples."""
    for line in "".join(blocks(QUICKSTART, "console")).splitlines():
        arguments = command(line.replace("max_epochs=40", "max_epochs=3"))
        if "ucvae-train " in line:
            arguments += ["evaluator.num_samples=20", "device=cpu"] * ("resume" not in line)
            arguments += ["trainer.max_epochs=2"] * ("max_epochs" not in line)
        shown = call(*arguments, cwd=tmp_path, path=REPOSITORY)
    rows = [row.split("|")[1:3] for row in blocks(QUICKSTART, "text")[2].splitlines()[2:]]
    assert len(rows) == 3
    for name, seeds in rows:
        assert re.search(rf"\|{re.escape(name)} *\|{re.escape(seeds)}\|", shown)


PAGES = [*DOCS.rglob("*.md"), *REPOSITORY.glob("*.md")]


def anchors(page):
    """Those of a page's headings, as code hosts and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere_in_the_checkout(page):
    """As on a code host; that they do in the site is for ``mkdocs build --strict``."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def defined(tree):
    """The names of a module's functions and classes, those in a class as ``Class::name``."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}::{name}" for name in defined(node))


def test_the_tests_that_hold_the_traps_are_there():
    section = (DOCS / "method.md").read_text().partition("## Traps and the tests")[2]
    *_, rows = section.partition("|---|---|---|\n")
    rows = rows.strip().splitlines()
    assert len(rows) == 10  # as many as there are traps
    for row in rows:
        _, trap, wrong, tests, _ = row.split("|")
        found = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", tests)
        assert trap.strip() and wrong.strip() and found
        assert len(found) == tests.count("`") // 2
        for file, name in found:
            assert name in defined(ast.parse((REPOSITORY / file).read_text())), (file, name)
            assert name.rpartition("::")[2].startswith("test_")


def call(*arguments, cwd, path):
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(line):
    """A console command of the docs, from the environment that runs the tests."""
    name, *arguments = shlex.split(line)
    return [Path(sys.executable).with_name(name), *arguments]


EXTENDING = (DOCS / "extending.md").read_text()
# A file's path stands in a line of its own above its content.
FILES = dict(
    re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", EXTENDING, re.DOTALL | re.MULTILINE)
)


# A row for a table: the lines with a plus, each behind the line before it.
ROWS = re.findall(r"^`([\w/.]+)`:\n\n```diff\n(.*?)^```$", EXTENDING, re.DOTALL | re.MULTILINE)
FILES = {name: content for name, content in FILES.items() if name not in dict(ROWS)}
COMMANDS = "".join(blocks(EXTENDING, "console")).splitlines()
PYTEST = "python -m pytest "


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of package, configs and tests, with the files and rows of extending.md in it."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("ucvae", "configs", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, root / name, ignore=ignore)
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    for name, content in FILES.items():
        assert not (root / name).exists()
        (root / name).write_text(content)
    for name, lines in ROWS:
        content = (root / name).read_text()
        before = None
        for line in lines.splitlines():
            if line.startswith("+"):
                assert content.count(f"{before}\n") == 1
                content = content.replace(f"{before}\n", f"{before}\n{line[1:]}\n")
            before = line[1:]
        (root / name).write_text(content)
    return root


@pytest.mark.slow
class TestExtending:
    @pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith(PYTEST)])
    def test_commands(self, line, checkout, tmp_path):
        shown = call(*command(line), "device=cpu", cwd=tmp_path, path=checkout)
        assert "test log-likelihood  -" in shown

    @pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith(PYTEST)])
    def test_rows_of_tables(self, line, checkout):
        shown = call(sys.executable, *shlex.split(line)[1:], cwd=checkout, path=checkout)
        assert re.search(r"\d\d passed, \d+ deselected", shown)

    @pytest.mark.parametrize(
        "right, wrong",
        [
            ("clamp(max=1)", "clamp(max=1).sqrt()"),
            ("- 2 * along * direction", "+ 0 * along * direction"),
            ("< -distance * (along + distance / 2)", "< -distance * distance / 8"),
            ("[1 - ratio, ratio]", "[ratio, 1 - ratio]"),
            ("met = same[:, 0] & x_goes & y_goes", "met = x_goes & y_goes"),
        ],
    )
    def test_the_table_rejects_kernels_that_are_almost_right(
        self, right, wrong, checkout, tmp_path
    ):
        root = tmp_path / "wrong"
        shutil.copytree(checkout, root)
        kernel = root / "ucvae" / "chains" / "pcn.py"
        assert kernel.read_text().count(right) == 1
        kernel.write_text(kernel.read_text().replace(right, wrong))
        (line,) = (line for line in COMMANDS if line.startswith(PYTEST))
        with pytest.raises(AssertionError, match=r"\d+ failed"):
            call(sys.executable, *shlex.split(line)[1:], cwd=root, path=root)

    def test_unnamed_code(self, checkout, tmp_path):
        (code,) = set(blocks(EXTENDING, "python")) - set(FILES.values())
        call(sys.executable, "-c", code, cwd=tmp_path, path=checkout)

    def test_outside_the_package(self, tmp_path):
        mine = tmp_path / "mine"
        (mine / "configs" / "dataset").mkdir(parents=True)
        (mine / "stripes.py").write_text(FILES["ucvae/data/stripes.py"])
        settings = FILES["configs/dataset/stripes.yaml"].replace("ucvae.data.", "")
        (mine / "configs" / "dataset" / "stripes.yaml").write_text(settings)
        (line,) = re.findall(r"^PYTHONPATH=mine (.*)$", EXTENDING, re.MULTILINE)
        quick = ["estimator=elbo", "trainer.max_epochs=1", "evaluator.num_samples=10", "device=cpu"]
        shown = call(*command(line), *quick, cwd=tmp_path, path=mine)
        assert "stripes (static binarisation)" in shown
