"""State on disk: written atomically, read without executing anything."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

import torch

from ucvae.errors import RunError

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that ``path`` holds either the old or the whole new content, never a part.

    Args:
        path: in a folder that exists.
        state: tensors and plain Python values, nested in dicts and lists.

    Raises:
        RunError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(f"checkpoint: cannot write {path}: {reason}") from error


def load(path: Path, **kinds: type | UnionType) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file is executed (``weights_only=True``).

    Args:
        path: the file.
        **kinds: entries that the checkpoint must have, with their types.

    Raises:
        RunError: the file is missing, damaged, of another format, or no checkpoint of ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"checkpoint: no file {path}") from None
    except Exception as error:  # what a damaged file makes the unpickler raise can be anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(f"checkpoint: {path} is damaged or no checkpoint ({reason[0]})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise RunError(f"checkpoint: {path} has the format {found}, this version reads {FORMAT}")
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise RunError(f"checkpoint: {path} is damaged ({name} is missing or of another type)")
    return state


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Take up what a checkpoint holds; what does not fit is an error that names the file.

    Raises:
        RunError: an entry is missing, or its content does not fit the run.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise RunError(f"checkpoint: {path} does not fit the run ({reason})") from error
