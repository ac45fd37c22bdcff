"""State on disk: written atomically, read without executing anything."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import IO, Any, cast

import torch

from ucvae.errors import RunError

FORMAT = 1

# A checkpoint is a zip archive, as torch.save writes it, with the SHA-256 of all that stands before
# in the archive's comment: torch.load compares no checksums. What ends as an archive without
# comment is of a version, or of somebody, that wrote none.
COMMENT_BYTES = 64
NO_COMMENT = b"PK\x05\x06", 22


class DamagedError(RunError):
    """A checkpoint that is missing, cut short, or not as it was written."""


def save(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Write ``state`` so that ``path`` holds either the old or the whole new content, never a part.

    Args:
        path: in a folder that exists.
        state: tensors and plain Python values, nested in dicts and lists.
        previous: what becomes of the old content; for a moment ``path`` is then missing.

    Raises:
        RunError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    hashed = None
    try:
        with partial.open("w+b") as file:
            hashed = _Hashed(file)
            torch.save({"format": FORMAT, **state}, cast(IO[bytes], hashed))
            file.seek(-2, os.SEEK_END)  # the length of the comment, 0 until here
            file.write(COMMENT_BYTES.to_bytes(2, "little"))
            file.write(hashed.sha256.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of what the disk said
        partial.unlink(missing_ok=True)
        said = (hashed and hashed.error) or error
        reason = getattr(said, "strerror", None) or str(said).splitlines()[0]
        raise RunError(f"checkpoint: cannot write {path}: {reason}") from error


class _Hashed:
    """A file that is written from its beginning to its end, and hashed on the way.

    Attributes:
        error: the first that the system raised.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def load(path: Path, **kinds: type | UnionType) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file is executed (``weights_only=True``).

    Args:
        path: the file.
        **kinds: entries that the checkpoint must have, with their types.

    Raises:
        DamagedError: the file is missing, or not as it was written.
        RunError: it is of another format, or no checkpoint of ours.
    """
    try:
        _compare_hash(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DamagedError(f"checkpoint: no file {path}") from None
    except Exception as error:  # what a damaged file makes the unpickler raise can be anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DamagedError(
            f"checkpoint: {path} is damaged or no checkpoint ({reason[0]})"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise RunError(f"checkpoint: {path} has the format {found}, this version reads {FORMAT}")
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise RunError(f"checkpoint: {path} is damaged ({name} is missing or of another type)")
    return state


def _compare_hash(path: Path) -> None:
    """Refuse a file that is not as it was written.

    Raises:
        ValueError: its SHA-256 is not the one that it names, or it names none and is no archive
            without comment either.
    """
    signature, length = NO_COMMENT
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - length, 0))
        tail = file.read()
        if tail[:4] == signature and tail[-2:] == bytes(2):
            return
        hashed = size - 2 - COMMENT_BYTES
        if hashed < 0:
            raise ValueError("it was cut short")
        file.seek(0)
        sha256 = hashlib.sha256()
        while hashed and (chunk := file.read(min(hashed, 1 << 20))):
            sha256.update(chunk)
            hashed -= len(chunk)
        sha256.update(bytes(2))
        named = file.read()
    if named != COMMENT_BYTES.to_bytes(2, "little") + sha256.hexdigest().encode():
        raise ValueError("its SHA-256 is not the one that it names")


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


def last(folder: Path) -> Path:
    """Where a run keeps its latest state."""
    return folder / "checkpoints" / "last.pt"


def previous(folder: Path) -> Path:
    """Where a run keeps the state before the latest, for when that is damaged."""
    return folder / "checkpoints" / "last.previous.pt"


def load_last(folder: Path, **kinds: type | UnionType) -> tuple[Path, dict[str, Any], str | None]:
    """Read the latest state of a run that is whole.

    Args:
        folder: of the run.
        **kinds: as for :func:`load`.

    Returns:
        The file that was read, what it holds, and what is wrong with ``last.pt`` if it was not
        that one.

    Raises:
        DamagedError: neither the latest nor the one before is whole.
        RunError: as for :func:`load`.
    """
    try:
        return last(folder), load(last(folder), **kinds), None
    except DamagedError as error:
        if not previous(folder).is_file():
            raise
        try:
            return previous(folder), load(previous(folder), **kinds), str(error)
        except DamagedError:
            raise DamagedError(f"{error}, and {previous(folder).name} is damaged too") from error


def require_same_data(
    trained_on: dict[str, str], name: str, split_sha256: dict[str, str], folder: Path
) -> None:
    """Refuse to go on with other images than those that a run was trained on.

    Raises:
        RunError: a split has another hash.
    """
    if split_sha256 != trained_on:
        raise RunError(
            f"resume={folder}: the data differ from those the run was trained on "
            f"({name}: another SHA-256)"
        )


def load_start(name: str) -> tuple[Path, dict[str, Any], str | None]:
    """Read what a new run starts from.

    Args:
        name: the folder of a run, for its latest state that is whole, or a checkpoint.

    Returns:
        As :func:`load_last`; the state has a model, its configuration, the data's hashes and the
        epoch.

    Raises:
        RunError: there is no such thing, or it is damaged or no checkpoint.
    """
    path = Path(name)
    kinds = {"config": dict, "model": dict, "split_sha256": dict, "epoch": int | float}
    if os.path.isfile(path):
        return path, load(path, **kinds), None
    if not os.path.isdir(path):
        raise RunError(
            f"start_from={name}: no such folder or file; give the folder of a run of ucvae-train, "
            "or one of its checkpoints"
        )
    if not any(map(os.path.isfile, (last(path), previous(path)))):
        raise RunError(
            f"start_from={name}: no {last(path).relative_to(path)} there, so there is no model to "
            "start with; give the folder of one run"
        )
    return load_last(path, **kinds)
