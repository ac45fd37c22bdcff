"""Stopping cleanly on SIGINT and SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Stopped(Exception):
    """The run was asked to stop, and has saved its state.

    Attributes:
        signal: the signal's number; by convention the exit code is 128 more.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


class StopRequest:
    """Remembers a signal until the run is at a point where it can save; a second one acts at once.

    Outside the main thread, where Python allows no handlers, it never asks to stop.

    Attributes:
        number: of the signal, once one has come, here or to another process of the run.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._came = False
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> StopRequest:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        except ValueError:  # not the main thread
            self._previous.clear()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._came:
            raise Stopped(number)
        self._came = True
        self.number = number

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    def obey(self) -> None:
        """Raise :class:`Stopped` if a signal has come."""
        if self.number is not None:
            raise Stopped(self.number)
