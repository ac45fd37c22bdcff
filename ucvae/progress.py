"""What tells how far some work is: a bar on a terminal, elsewhere a line from time to time.

The caller keeps where it stands and a few facts; they are put in words only when they are shown,
so that a step costs no more than a look at the clock. Nothing here waits for the device.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)

# Without a terminal: seconds until the first line, which tells that the work is alive, and from
# one line to the next.
FIRST_LINE = 5.0
LINE_INTERVAL = 60.0

NARROW_BAR, WIDE_BAR = 5, 40  # characters
MARGIN = 3  # columns where a terminal may show the ^C of an interruption without a new line
PACE_MARKS, PACE_SECONDS = 100, 1.0  # how far back, and how finely, the pace is measured


class Stand(NamedTuple):
    """How far the work is.

    Attributes:
        place: such as ``epoch 3/30``.
        share: of all the work, in [0, 1].
        detail: what a line says besides, after the place.
    """

    place: str
    share: float
    detail: str = ""


class Fact(NamedTuple):
    """Something to know on the way, and how it is told where there is little room."""

    text: str
    short: str


class Progress:
    """A bar on the error output, if that is a terminal; else lines in the log, at intervals.

    Args:
        stand: says where the work stands; called when something is shown.
        silent: show nothing, as where another process does.

    Attributes:
        facts: what is shown beside it, by name, the most important first. Where there is no room
            they are shortened, then left out from the end.
    """

    def __init__(self, stand: Callable[[], Stand], silent: bool = False) -> None:
        self.facts: dict[str, Fact] = {}
        self._stand = stand
        self._silent = silent
        self.restart()
        self._hidden = silent or hidden()
        self._bar: _Bar | None = None
        self._opened = ExitStack()

    def restart(self) -> None:
        """Measure the pace from here on, after what is no part of it."""
        now = time.monotonic()
        self._marks = deque([(now, self._stand().share)], maxlen=PACE_MARKS)
        self._next_line = math.inf if self._silent else now + FIRST_LINE

    def __enter__(self) -> Progress:
        if not self._hidden:
            self._bar = self._opened.enter_context(_Bar(self))
            self._opened.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the terminal as it was."""
        self._opened.close()

    def tick(self) -> None:
        """Show what there is, if it is time to; called at every step."""
        if self._bar is not None:
            self._bar.update(0)
            return
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + LINE_INTERVAL
            log.info("%s", self.line())

    def line(self) -> str:
        """Everything in one line of plain text."""
        stand = self._stand()
        facts = [fact.text for fact in self.facts.values()] + self._time_left(stand)
        return f"{stand.place}{stand.detail}: {', '.join(facts)}".removesuffix(": ")

    def words(self, width: int) -> tuple[Stand, str]:
        """Where the work stands, and what the bar tells of it in a terminal so wide."""
        stand = self._stand()
        left = self._time_left(stand)
        room = width - len(f"{stand.place} || ") - NARROW_BAR
        versions = [[fact.text for fact in self.facts.values()]]
        short = [fact.short for fact in self.facts.values()]
        versions += [short[:count] for count in range(len(short), -1, -1)]
        texts = (", ".join(left + facts) for facts in versions)
        return stand, next((text for text in texts if len(text) <= room), "")

    def _time_left(self, stand: Stand) -> list[str]:
        """What the pace of late leads to expect, in a list; an empty one where there is no pace."""
        now = time.monotonic()
        if now - self._marks[-1][0] >= PACE_SECONDS:
            self._marks.append((now, stand.share))
        since, share = self._marks[0]
        if not share < stand.share < 1:
            return []
        seconds = (now - since) * (1 - stand.share) / (stand.share - share)
        return [f"{tqdm.format_interval(seconds)} left"]


class _Bar(tqdm):  # type: ignore[type-arg]  # which tqdm takes in its types alone
    """A bar whose words are those of a :class:`Progress`, made when it is drawn."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        super().__init__(
            total=1.0,
            bar_format="{place} |{bar}| {words}",
            dynamic_ncols=True,
            miniters=0,
            leave=False,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        known = dict(super().format_dict)
        columns = self._columns() - MARGIN
        stand, words = self.progress.words(columns)
        known["n"] = min(stand.share, 1.0)
        known["ncols"] = min(columns, len(f"{stand.place} || {words}") + WIDE_BAR)
        return {**known, "place": stand.place, "words": words}

    def close(self) -> None:
        """Wipe the whole line: with the bar, what was typed beside it."""
        shown = not self.disable
        super().close()
        if shown:
            self.fp.write(f"\r{' ' * (self._columns() - 1)}\r")
            self.fp.flush()

    def _columns(self) -> int:
        return super().format_dict["ncols"] or 80


def quiet() -> bool:
    """Say whether only warnings are shown: where ``UCVAE_QUIET`` is set, and not to 0."""
    return os.environ.get("UCVAE_QUIET", "0") not in ("", "0")


def hidden() -> bool:
    """Say whether there are no bars: as above, or there is no terminal that can redraw a line."""
    return quiet() or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
