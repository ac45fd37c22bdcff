"""Run folders: claimed, held by one run at a time, left clean, and read again."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ucvae.config import TrainSettings, train_settings
from ucvae.device import within_memory
from ucvae.errors import ConfigError, RunError

if TYPE_CHECKING:
    from ucvae.data.base import ImageData

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]  # a module, where there is one

# A folder with any of these holds the results of a run, which nothing may overwrite. What was
# killed before its first checkpoint has none of them, and can be started anew.
CHECKPOINTS = tuple(f"checkpoints/{name}.pt" for name in ("last", "last.previous", "best"))
RESULTS = (*CHECKPOINTS, "metrics.jsonl", "result.json")
# Where Hydra keeps the configuration, and where it writes it first in a folder that has one.
HYDRA, HYDRA_PARTIAL = ".hydra", ".hydra.partial"
# What a sweep was asked for, in the sweep's folder.
ASKED = "multirun.yaml"
LOCK = ".lock"
# About what Hydra writes before a job begins.
PROBE_BYTES = 16_384


@dataclass(frozen=True)
class Claim:
    """A folder to write into.

    Attributes:
        folder: it exists, and can be written to.
        made: the folders that were made for it, outermost first.
        empty: whether nothing was in it.
    """

    folder: Path
    made: tuple[Path, ...]
    empty: bool


class InUseError(RunError):
    """Another run writes into the folder now."""


def claim(folder: Path, timed: bool, key: str) -> Claim:
    """Make the output folder and be sure that it can be written to.

    Two runs may start in the same second: where the time is a part of the name, a folder that is
    there already belongs to another run, and the name gets a number.

    Args:
        folder: what was asked for.
        timed: whether the time is a part of its name.
        key: what asked for it, for messages.

    Raises:
        RunError: it cannot be made or written to; nothing that was made on the way is left.
    """
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    for candidate in itertools.chain([folder], numbered):
        made = []
        try:
            for path in reversed([candidate, *candidate.parents]):
                if not path.exists() or (timed and path == candidate):
                    path.mkdir(exist_ok=path != candidate or not timed)
                    made.append(path)
            empty = not any(candidate.iterdir())
            with tempfile.TemporaryFile(dir=candidate) as probe:
                probe.write(bytes(PROBE_BYTES))
                probe.flush()
            return Claim(candidate, tuple(made), empty)
        except OSError as error:
            for path in reversed(made):
                path.rmdir()
            if timed and isinstance(error, FileExistsError) and candidate.is_dir():
                continue
            raise _cannot_write(candidate, key, error) from None
    raise AssertionError("the numbers do not end")


def begun(folder: Path) -> bool:
    """Say whether a run has come to its first checkpoint, so that it can be resumed."""
    return any(os.path.isfile(folder / name) for name in CHECKPOINTS[:2])


def refuse_taken(folder: Path, key: str, resume_key: str | None) -> None:
    """Refuse a folder that holds results; ``resume_key`` goes on with them, if anything does."""
    hint = "choose another folder"
    if resume_key is not None:
        hint = f"go on with {resume_key}={folder} or choose another"
    refuse_run(folder, key, hint)
    if os.path.isfile(folder / ASKED):
        raise RunError(f"{key}: {folder} already holds a sweep; {hint}")


def refuse_run(folder: Path, key: str, hint: str = "choose another folder") -> None:
    """Refuse a folder that holds the results of a run."""
    # Not Path.exists, for which a name that is too long is an error.
    if any(os.path.exists(folder / name) for name in RESULTS):
        raise RunError(f"{key}: {folder} already holds a run; {hint}")


def refuse_used(folder: Path, key: str) -> None:
    """Refuse a folder that another run writes into now."""
    if os.path.exists(folder / LOCK):
        with held(folder, key):
            pass


@contextlib.contextmanager
def held(folder: Path, key: str) -> Iterator[str | None]:
    """Keep other runs out of a folder that exists; the end of the process lets go of it too.

    The lock file stays: to remove it would let a third run lock a new one beside a second's.

    Yields:
        What to log where folders cannot be held, or None.

    Raises:
        InUseError: another run holds it.
        RunError: the lock file cannot be written.
    """
    try:
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise _cannot_write(folder, key, error) from error
    with file:
        note = None
        try:
            if not lock(file):
                raise InUseError(f"{key}: {folder} is in use by another run")
        except OSError as error:
            note = f"nothing keeps a second run out of {folder}: {error.strerror or error}"
        yield note


def lock(file: IO[str]) -> bool:
    """Lock a file until it is closed; say whether that went well, or another has locked it.

    Raises:
        OSError: there are no locks here.
    """
    if fcntl is None:
        raise OSError("this system has no file locks")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def tidy(claimed: Claim, key: str) -> Iterator[None]:
    """Let Hydra write into a claimed folder.

    After an error, what was made is removed if Hydra's own files are all there is.

    Raises:
        RunError: Hydra could not write.
        ConfigError: Hydra cannot compose the configuration any more.
    """
    try:
        yield
    except (InUseError, BrokenPipeError):
        raise
    except Exception as error:
        _remove_unused(claimed)
        reason = not_written(error)
        if reason is not None:
            raise _cannot_write(claimed.folder, key, reason) from error
        if isinstance(error, HydraException):  # a file has changed since it was composed first
            raise ConfigError(str(error).splitlines()[0]) from error
        raise


def not_written(error: Exception) -> OSError | None:
    """The error by which Hydra could not write a file, if that is what ended it."""
    # A log file that cannot be opened is a ValueError, raised from the OSError. Of Hydra's own
    # errors, that of a configuration that is not there is an OSError too.
    for reason in (error, error.__cause__):
        if isinstance(reason, OSError) and not isinstance(reason, HydraException):
            return reason
    return None


def _remove_unused(claimed: Claim) -> None:
    if not claimed.empty:
        return
    files = [path for path in claimed.folder.rglob("*") if not path.is_dir()]
    if all(_is_hydras(path) for path in files):
        for path in claimed.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in reversed(claimed.made):
            path.rmdir()


def _is_hydras(path: Path) -> bool:
    """Say whether a file is there before its job begins."""
    if path.suffix == ".log":
        return path.stat().st_size == 0
    return path.name in (LOCK, ASKED) or path.parent.name in (HYDRA, HYDRA_PARTIAL)


def settle(folder: Path) -> None:
    """Put what Hydra wrote on the side in its place: each file is the old or the new one, whole.

    Raises:
        RunError: it cannot be moved.
    """
    try:
        for path in (folder / HYDRA_PARTIAL).iterdir():
            path.replace(folder / HYDRA / path.name)
        (folder / HYDRA_PARTIAL).rmdir()
    except OSError as error:
        raise _cannot_write(folder, "resume", error) from error


def _cannot_write(folder: Path, key: str, error: OSError) -> RunError:
    return RunError(f"{key}: cannot write to {folder}: {error.strerror or error}")


# What was trained, and on what


def trained_settings(config: dict[str, Any], path: Path) -> TrainSettings:
    """Check the configuration that the checkpoint ``path`` keeps, and build its components.

    Raises:
        RunError: it is damaged, or of a version with other components.
    """
    try:
        return train_settings(config)
    except (ConfigError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"checkpoint: the configuration in {path} is refused ({reason})") from error


def unfitted(model: Any, data: ImageData) -> Any:
    """A model as its settings start it, for the checks that come before any work.

    Args:
        model: the settings of the model.
        data: what it is, or was, trained on.

    Raises:
        OutOfMemoryError: it is too large for this machine.
    """
    import torch

    with torch.random.fork_rng(devices=[]), within_memory():
        return model.build(data.train_mean, data.levels)


def data_folder(data_dir: str) -> Path:
    """Return where data sets are looked for; it need not be there.

    Raises:
        ConfigError: it is, or lies in, something that is no folder.
    """
    if data_dir == "":
        raise ConfigError("data_dir must name a folder, got nothing")
    try:
        folder = Path(data_dir).expanduser()
    except RuntimeError as error:  # ~somebody
        raise ConfigError(f"data_dir={data_dir}: {error}") from None
    existing = next(filter(os.path.exists, (folder, *folder.parents)), None)
    if existing is not None and not os.path.isdir(existing):
        raise ConfigError(f"data_dir: {existing} is not a folder")
    return folder
