"""The bar on a terminal, and the lines elsewhere."""

import io
import logging
import sys

import pytest

from ucvae import progress
from ucvae.progress import Fact, Progress, Stand

FACTS = {
    "pace": Fact("12,345 images/s", "12,345 images/s"),
    "bound": Fact("encoder's iwae bound -123.45", "iwae bound -123.45"),
    "p90": Fact("meeting time p90 12", "p90 12"),
    "valid": Fact("validation -123.01", "valid -123.01"),
}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def halfway(clock):
    """Work that went from 0.2, where it was taken up, to 0.4 in 20 seconds."""
    stand = [Stand("epoch 7/30", 0.2, ", step 60")]
    shown = Progress(lambda: stand[0])
    shown.facts = FACTS
    clock[0] += 20.0
    stand[0] = Stand("epoch 13/30", 0.4, ", step 120")
    return shown


def test_a_line_has_all_facts_and_the_time_left_at_the_pace_of_this_process(clock):
    # 0.6 is left, at 0.2 in 20 s: what was done before the run was taken up has no part in it.
    assert halfway(clock).line() == (
        "epoch 13/30, step 120: 12,345 images/s, encoder's iwae bound -123.45, "
        "meeting time p90 12, validation -123.01, 01:00 left"
    )


@pytest.mark.parametrize(
    ("width", "words"),
    [
        (
            120,
            "01:00 left, 12,345 images/s, encoder's iwae bound -123.45, meeting time p90 12, "
            "validation -123.01",
        ),
        (100, "01:00 left, 12,345 images/s, iwae bound -123.45, p90 12, valid -123.01"),
        (77, "01:00 left, 12,345 images/s, iwae bound -123.45, p90 12"),
        (60, "01:00 left, 12,345 images/s"),
        (20, ""),
    ],
)
def test_facts_give_way_where_there_is_little_room(width, words, clock):
    assert halfway(clock).words(width)[1] == words


def test_what_came_before_a_restart_has_no_part_in_the_pace(clock, caplog):
    caplog.set_level("INFO")
    stand = [Stand("epoch 1/30", 0.2)]
    shown = Progress(lambda: stand[0])
    clock[0] += 500.0  # a validation of the start
    shown.restart()
    clock[0] += 4.0
    shown.tick()
    assert not caplog.messages  # the first line comes as long after it as at the start
    clock[0] += 16.0
    stand[0] = Stand("epoch 13/30", 0.4)
    assert shown.line() == "epoch 13/30: 01:00 left"


def test_nothing_is_known_of_the_time_left_before_the_first_step(clock):
    shown = Progress(lambda: Stand("epoch 1/30", 0.0))
    clock[0] += 5
    assert shown.line() == "epoch 1/30"


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_bar_fits_the_terminal_and_leaves_nothing_behind(columns, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    shown = Progress(lambda: Stand("epoch 13/30", 0.4))
    shown.facts = FACTS
    with shown as bar:
        # Its width is asked of the file descriptor, which this terminal does not have.
        bar._bar.dynamic_ncols = lambda file: (columns, 24)
        bar._bar.refresh()
    *_, drawn, _, _, wiped, last = terminal.getvalue().split("\r")
    assert drawn.startswith("epoch 13/30 |█")
    assert "12,345 images/s, " in drawn and "p90 12" in drawn
    assert columns // 2 < len(drawn) <= columns - len("^C")
    # Of the whole line, for a ^C that the terminal has put beside the bar.
    assert wiped == " " * (columns - 1) and not last
    assert "\x1b" not in terminal.getvalue()


def test_a_bar_is_drawn_again_as_the_work_goes_on(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    stand = [Stand("epoch 1/2", 0.1)]
    with Progress(lambda: stand[0]) as bar:
        bar._bar.mininterval = 0
        stand[0] = Stand("epoch 2/2", 0.9)
        bar.tick()
    assert "epoch 2/2 |" in terminal.getvalue()


@pytest.mark.parametrize("dumb", [False, True])
def test_without_a_terminal_lines_come_at_intervals(dumb, clock, monkeypatch, caplog):
    stream = Terminal() if dumb else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "dumb" if dumb else "xterm")
    told = []
    with caplog.at_level(logging.INFO), Progress(lambda: Stand("epoch 1/30", 0.0)) as bar:
        for second in range(0, 131):
            clock[0] = 1000.0 + second
            bar.tick()
            if len(caplog.records) > len(told):
                told.append(second)
    assert told == [5, 65, 125]
    assert caplog.records[0].getMessage() == "epoch 1/30"
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("value", "quiet"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)]
)
def test_quiet_is_what_the_environment_says(value, quiet, monkeypatch):
    monkeypatch.delenv("UCVAE_QUIET", raising=False)
    if value is not None:
        monkeypatch.setenv("UCVAE_QUIET", value)
    assert progress.quiet() is quiet
