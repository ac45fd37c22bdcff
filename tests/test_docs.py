"""The documentation's code runs as printed."""

import re
from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"


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
    (printed,) = blocks(text, "text")
    number = re.compile(r"\d+\.\d+")
    found = capsys.readouterr().out
    assert number.sub("#", found) == number.sub("#", printed)
    torch.testing.assert_close(
        torch.tensor([float(x) for x in number.findall(found)]),
        torch.tensor([float(x) for x in number.findall(printed)]),
        rtol=0.02,
        atol=0.02,
    )
