"""A command of ours, as the shell around it sees it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ucvae.errors import UcvaeError


@dataclass(frozen=True)
class Command:
    """What makes a command. All functions stand at module level: launchers pickle them.

    Attributes:
        name: the console script.
        config_name: its primary YAML file, without the ending.
        path_keys: keys whose values are paths, which need no quotes on the command line.
        rewrite: makes the effective overrides of those given; the flag says whether it is a sweep.
        check: turns a composed configuration into settings; reads nothing large.
        prepare: finds all that may be missing (device, data) and returns the work, a function of
            the output folder.
        continues: whether the settings go on with what lies in the output folder.
        finished: the result that a folder holds if it was made with the settings, else None. It
            raises a :class:`~ucvae.errors.RunError` if the folder holds that of other settings.
        take_up: the settings, changed so that they go on with what the folder holds, if anything.
        resume_key: the key that makes it go on with a folder; None if it never does.
    """

    name: str
    config_name: str
    path_keys: tuple[str, ...]
    rewrite: Callable[[list[str], bool], list[str]]
    check: Callable[[DictConfig], Any]
    prepare: Callable[[Any], Callable[[Path], Any]]
    continues: Callable[[Any], bool]
    finished: Callable[[Any, Path], dict[str, Any] | None]
    take_up: Callable[[Any, Path], Any]
    resume_key: str | None

    def tell(self, message: str) -> None:
        """Tell of an error, in one line."""
        print(f"{self.name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)


class Interrupted(KeyboardInterrupt):
    """The command was stopped by a signal; unlike an ``Exception``, it ends a whole sweep."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


def traceback_of(error: Exception) -> Exception | None:
    """Return what the log tells beside the message: the traceback of a defect of ours."""
    return None if isinstance(error, UcvaeError) else error
