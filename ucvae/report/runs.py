"""Finding runs and their evaluations on disk, and reading what they report."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import statistics
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ucvae.config import flatten
from ucvae.errors import RunError
from ucvae.results import log_likelihoods_file

RESULT = "result.json"
# A folder with one of these and no result is a run that has not finished.
BEGUN = (".hydra", "checkpoints")
SPLITS = ("test", "valid", "train")
# Scalars that the curves are made of.
VALIDATION, SECONDS = "valid/log_likelihood", "time/train_seconds"
REFINEMENTS = "proposal/refinements"
QUANTILES = ("p50", "p90", "p99")
TAGS = (
    "epoch",
    VALIDATION,
    SECONDS,
    REFINEMENTS,
    *(f"coupling/meeting_time_{q}" for q in QUANTILES),
)

# Settings that do not change what a run computes or that are told in another place: where it ran,
# how often it wrote, how it was tested (the table's heading), and its data (the same).
OTHER_KEYS = (
    *("seed", "device", "data_dir", "resume", "start_from"),
    *("trainer.log_every", "trainer.checkpoint_every", "trainer.cuda_graphs"),
    *("dataset._target_", "dataset.binarization"),
)
OTHER_GROUPS = ("evaluator", "study")
# Settings of one choice, with no part in a run by another.
PARTS_OF = {"optimizer.milestones": "steps", "optimizer.gamma": "steps"}
# What a setting was in the versions that do not have its key, by the component that has it today.
EARLIER: dict[str, dict[str, Any]] = {
    "ucvae.models.mlp.Mlp": {"model.initialization": "torch"},
    "ucvae.estimators.iwae.Iwae": {"estimator.min_weight": 0.0},
    "ucvae.estimators.snis.Snis": {"estimator.follow_encoder": False},
    "ucvae.estimators.coupled.Coupled": {"estimator.follow_encoder": False},
    "ucvae.training.Trainer": {"trainer.switch.min_weight": 0.0},
}
# Limits that end a run after a number of epochs that nobody knows beforehand.
OPEN_ENDS = ("max_seconds", "patience")


class Evaluator(NamedTuple):
    """What two log-likelihoods must have in common to be compared.

    Attributes:
        split: ``test``, ``valid`` or ``train``.
        name: the kind, for example ``importance`` or ``ais_paper``.
        num_samples: for each image.
        num_images: of the split.
        checkpoint: ``best`` by validation, or ``last``.
    """

    split: str
    name: str
    num_samples: int
    num_images: int
    checkpoint: str = "best"


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run of ``ucvae-train``; times in seconds, None for what it does not tell.

    Attributes:
        folder: of the run, as the user named it.
        dataset, binarization, split_sha256, estimator, seed, epochs, status: as in ``result.json``.
        config: all settings by dotted key.
        start: what this one's model started from (``start_from``): the other run's estimator and a
            checksum of all but the seeds there; None without.
        start_seeds: of the run that it started from, of the one which that started from, ...
        best_epoch: the epoch of the best checkpoint, by which the run was tested.
        wall_clock_s: in all.
        train_s: of training alone, without validations and the test.
        images_per_s: of training alone.
        decoder_evaluations: for each image and gradient.
        truncated_fraction: of the pairs of chains, in the last epoch.
        device, revisions: where and by what code it was made, in all its sessions.
        metrics: the lines of ``metrics.jsonl``, of which the numbers under :data:`TAGS`.
    """

    folder: Path
    dataset: str
    binarization: str
    split_sha256: dict[str, str]
    estimator: str
    seed: int
    config: dict[str, Any]
    start: str | None
    start_seeds: tuple[int, ...]
    epochs: float | None
    best_epoch: float | None
    status: str
    wall_clock_s: float | None
    train_s: float | None
    images_per_s: float | None
    decoder_evaluations: float | None
    truncated_fraction: float | None
    device: str | None
    revisions: tuple[str, ...]
    metrics: list[dict[str, float]]

    def epoch_of(self, checkpoint: str) -> float | None:
        """The epoch of the ``best`` or the ``last`` checkpoint."""
        return self.best_epoch if checkpoint == "best" else self.epochs

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the run computes, but for the seed and the data, by dotted key."""
        return {"start_from": self.start} | _computed(self.config)


@dataclass(frozen=True, eq=False)
class Measurement:
    """The log-likelihood of a run by one evaluator, nats per image.

    Attributes:
        run: whose checkpoint it is of.
        evaluator: and what of.
        log_likelihood: the mean over images.
        standard_error: over images.
        values: of each image ``[N]``; None where they are not there, as of an earlier version.
        folder: that has the result.
        written: when, in seconds of the file system.
    """

    run: Run
    evaluator: Evaluator
    log_likelihood: float
    standard_error: float
    values: NDArray[np.float64] | None
    folder: Path
    written: float

    @property
    def before_switch(self) -> bool:
        """Whether the checkpoint is of IWAE, which a warm start begins with."""
        switch = self.run.config.get("trainer.switch.epochs") or 0
        epoch = self.run.epoch_of(self.evaluator.checkpoint)
        return epoch is not None and epoch <= switch > 0


@dataclass
class Found:
    """What lies under some folders.

    Attributes:
        measurements: of the runs' own tests and of further evaluations.
        unfinished: folders of runs and evaluations without a result.
        problems: a line for each file that could not be used, which it names.
    """

    measurements: list[Measurement] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class _Unusable(Exception):
    """A result that cannot be used, and why."""


def find(paths: Iterable[Path]) -> Found:
    """Read every run and evaluation under some folders, hidden folders left out.

    An evaluation belongs to the run in whose ``evaluations`` it lies, else to the one it names.

    Raises:
        RunError: a path does not exist.
    """
    paths = list(paths)
    for path in paths:
        if not os.path.exists(path):
            raise RunError(f"{path}: no such folder; give folders of runs or sweeps")
    found = Found()
    files = [path for path in paths if not os.path.isdir(path)]
    if files:  # as in sweeps/*
        names = ", ".join(map(str, files))
        found.problems.append(f"no folder, not looked into: {names}")
    runs: dict[str, Run] = {}
    evaluations: list[tuple[Path, dict[str, Any]]] = []
    for folder in _folders([path for path in paths if path not in files], found):
        try:
            content = _load(folder / RESULT)
            if "run" in content:
                evaluations.append((folder, content))
                continue
            run = _run(folder, content, _metrics(folder, found))
            found.measurements.append(_measurement(run, "test", folder, content, found))
            runs[os.path.realpath(folder)] = run
        except _Unusable as error:
            found.problems.append(f"{folder / RESULT}: {error}")
    for folder, content in evaluations:
        splits = [split for split in SPLITS if split in content]
        if not splits and "study" in content:
            continue  # a study has figures and tables of its own
        try:
            run = _evaluated_run(folder, content, runs)
            if not splits:
                raise _Unusable("no result of ucvae: it has no split's log-likelihood")
            found.measurements.append(_measurement(run, splits[0], folder, content, found))
        except _Unusable as error:
            found.problems.append(f"{folder / RESULT}: {error}")
    return found


def _folders(paths: list[Path], found: Found) -> Iterator[Path]:
    """Folders with a result, each once; those of unfinished runs are noted in ``found``."""

    def unreadable(error: OSError) -> None:
        found.problems.append(f"{error.filename}: cannot be read ({error.strerror})")

    seen = set()
    for path in paths:
        for name, folders, files in os.walk(path, onerror=unreadable):
            begun = any(part in folders for part in BEGUN)
            folders[:] = sorted(
                part for part in folders if not part.startswith(".") and part not in BEGUN
            )
            real = os.path.realpath(name)
            if real in seen:
                continue
            seen.add(real)
            if RESULT in files:
                yield Path(name)
            elif begun:
                found.unfinished.append(Path(name))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _Unusable(f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _Unusable("damaged or cut short, no JSON") from error
    if not isinstance(content, dict):
        raise _Unusable("no result of ucvae: not an object")
    return content


def _metrics(folder: Path, found: Found) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{tag: _number(line[tag]) for tag in TAGS if tag in line} for line in lines]
    except OSError as error:
        found.problems.append(f"{path}: cannot be read ({error.strerror}): no curves of this run")
    except (ValueError, TypeError, RecursionError):
        found.problems.append(f"{path}: damaged or cut short: no curves of this run")
    return []


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    schedule = config.get("optimizer.schedule")
    earlier: dict[str, Any] = {}
    for group in ("model", "estimator", "trainer"):
        earlier |= EARLIER.get(str(config.get(f"{group}._target_")), {})
    return {
        key: value
        for key, value in (config | {k: v for k, v in earlier.items() if k not in config}).items()
        if key not in OTHER_KEYS
        and key.partition(".")[0] not in OTHER_GROUPS
        and PARTS_OF.get(key, schedule) == schedule
    }


def _start(content: dict[str, Any]) -> tuple[str | None, tuple[int, ...]]:
    """What a run started from: an estimator with a checksum of all but the seeds, and the seeds.

    How many epochs the run had done counts where that was decided beforehand. With a limit of time
    it differs from seed to seed, and so does the best checkpoint's epoch.
    """
    start = _maybe(content, "start", _mapping)
    if start is None:
        return None, ()
    config = flatten(_get(content, "start.config", _mapping))
    estimator = str(config.get("estimator._target_", "")).rpartition(".")[2].lower()
    best = Path(_get(content, "start.checkpoint", _text)).name == "best.pt"
    open_ended = any(config.get(f"trainer.{key}") is not None for key in OPEN_ENDS)
    epochs = None if best or open_ended else _maybe(content, "start.epochs", _epoch)
    averages = _maybe(content, "start.averages", _text)
    data = {key: value for key, value in config.items() if key.startswith("dataset.")}
    before, seeds = _start(start)
    common = [before, _computed(config), data, best, epochs, averages]
    return f"{estimator} {checksum(common)}", (_get(content, "start.config.seed", _whole), *seeds)


def checksum(value: Any) -> str:
    """Eight hexadecimal digits for what JSON can say."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def _run(folder: Path, content: dict[str, Any], metrics: list[dict[str, float]]) -> Run:
    config = _get(content, "config", _mapping)
    try:
        config, (start, start_seeds) = flatten(config), _start(content)
    except RecursionError as error:
        raise _Unusable("no result of ucvae: config is nested too deeply") from error
    estimator = _get(content, "estimator", _text)
    evaluations = _maybe(content, "coupling.decoder_evaluations_per_image", _number)
    samples = config.get("estimator.num_samples")
    seconds = [line[SECONDS] for line in metrics if SECONDS in line]
    if evaluations is None and estimator in ("elbo", "iwae", "snis") and isinstance(samples, int):
        evaluations = samples + _refinements(metrics)  # one for each sample of z
    # Earlier versions tell of the last session alone.
    sessions = _maybe(content, "sessions", _mappings) or [content]
    return Run(
        folder=folder,
        dataset=_get(content, "dataset", _text),
        binarization=_get(content, "binarization", _text),
        split_sha256=_hashes(content),
        estimator=estimator,
        seed=_get(content, "seed", _whole),
        config=config,
        start=start,
        start_seeds=start_seeds,
        epochs=_maybe(content, "epochs", _epoch),
        best_epoch=_maybe(content, "valid.epoch", _epoch),
        status=_maybe(content, "status", _text) or "finished",
        wall_clock_s=_maybe(content, "wall_clock_s", _number),
        train_s=_maybe(content, "train_s", _number) or (seconds[-1] if seconds else None),
        images_per_s=_maybe(content, "train_images_per_s", _number),
        decoder_evaluations=evaluations,
        truncated_fraction=_maybe(content, "coupling.truncated_fraction", _number),
        device=_devices(sessions),
        revisions=tuple(dict.fromkeys(filter(None, (_revision(s) for s in sessions)))),
        metrics=metrics,
    )


def _refinements(metrics: list[dict[str, float]]) -> float:
    """Evaluations an image that remembered proposals took in the last epoch; 0 without them."""
    lines = [(line.get("epoch"), line[REFINEMENTS]) for line in metrics if REFINEMENTS in line]
    last = [value for epoch, value in lines if epoch == lines[-1][0]]
    return statistics.fmean(last) if last else 0.0


def _revision(session: dict[str, Any]) -> str | None:
    return _maybe(session, "git_revision", _text)


def _devices(sessions: list[dict[str, Any]]) -> str | None:
    """The devices that a run has been on, one after the other."""
    found = [device for session in sessions if (device := _device(session))]
    return ", then ".join(name for name, _ in itertools.groupby(found)) or None


def _device(content: dict[str, Any]) -> str | None:
    kind, name = (_maybe(content, f"device.{key}", _text) for key in ("type", "name"))
    threads = _maybe(content, "device.threads", _whole)
    if kind is None:
        return None
    words = " ".join(word for word in (kind, name) if word)
    processes = _maybe(content, "device.processes", _whole) or 1
    notes = []
    if threads and kind == "cpu":  # on a GPU the host's threads say little
        notes.append(f"{threads} thread{'s' * (threads > 1)}")
    if processes > 1:
        notes.append(f"{processes} processes")
    return f"{words} ({', '.join(notes)})" if notes else words


def _measurement(
    run: Run, split: str, folder: Path, content: dict[str, Any], found: Found
) -> Measurement:
    evaluator = Evaluator(
        split,
        _get(content, f"{split}.evaluator", _text),
        _get(content, f"{split}.num_samples", _whole),
        _get(content, f"{split}.num_images", _whole),
        _checkpoint(content),
    )
    mean = _get(content, f"{split}.log_likelihood", _number)
    try:
        values = _values(folder / log_likelihoods_file(split), evaluator.num_images, mean)
    except _Unusable as error:
        values = None
        found.problems.append(f"{error}: no differences by images in pairs")
    return Measurement(
        run,
        evaluator,
        mean,
        _get(content, f"{split}.standard_error", _number),
        values,
        folder,
        (folder / RESULT).stat().st_mtime,
    )


def _values(path: Path, count: int, mean: float) -> NDArray[np.float64] | None:
    """The log-likelihood of each image, if the file is there.

    A result is written after it, so that one of a run that was stopped in between is of another.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(int(r["image"]), float(r["log_likelihood"])) for r in csv.DictReader(file)]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _Unusable(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise _Unusable(f"{path}: damaged or cut short") from error
    whole = 0 < len(rows) == count and all(
        image == place and math.isfinite(value) for place, (image, value) in enumerate(rows)
    )
    if not whole or not np.isclose(math.fsum(value / count for _, value in rows), mean, rtol=1e-9):
        raise _Unusable(f"{path}: is not of the result beside it")
    return np.array([value for _, value in rows])


def _evaluated_run(folder: Path, content: dict[str, Any], runs: dict[str, Run]) -> Run:
    named = _get(content, "run", _text)
    within = Path(os.path.realpath(folder)).parent
    run = runs.get(str(within.parent)) if within.name == "evaluations" else None
    run = run or runs.get(os.path.realpath(named))
    if run is None:
        raise _Unusable(f"evaluates {named}, of which no finished run is under the folders given")
    if content.get("differing_splits") or _hashes(content) != run.split_sha256:
        raise _Unusable("evaluates other data than the run was trained on")
    epoch, which = _maybe(content, "epoch", _epoch), _checkpoint(content)
    now = run.epoch_of(which)
    if epoch is not None and now is not None and epoch != now:
        raise _Unusable(
            f"evaluates the checkpoint of epoch {epoch}, while the run's {which} is now of epoch "
            f"{now}"
        )
    return run


def _checkpoint(content: dict[str, Any]) -> str:
    """Which checkpoint a result is of; results of before it could be chosen do not say."""
    return _maybe(content, "checkpoint", _text) or "best"


def _hashes(content: dict[str, Any]) -> dict[str, str]:
    found = _get(content, "split_sha256", _mapping)
    return {split: _get(content, f"split_sha256.{split}", _text) for split in sorted(found)}


# Fields, each checked by a function that returns the value or raises ValueError with what it
# should have been.


def _maybe(content: Any, key: str, check: Callable[[Any], Any]) -> Any:
    """The checked field by its dotted key, or None where it is missing or null."""
    value = content
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        return None
    try:
        return check(value)
    except ValueError as error:
        raise _Unusable(f"no result of ucvae: {key} is {error}") from error


def _get(content: dict[str, Any], key: str, check: Callable[[Any], Any]) -> Any:
    value = _maybe(content, key, check)
    if value is None:
        raise _Unusable(f"no result of ucvae, or of another version: it has no {key}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("not a text")
    return value


def _number(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        # Beyond the largest float, a whole number has no float at all.
        if abs(value) <= sys.float_info.max:
            return float(value)
    raise ValueError("not a finite number")


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("not a whole number")


def _epoch(value: Any) -> float:
    """A fraction is of a run that its limit of time ended inside an epoch."""
    number = _number(value)
    return int(number) if number.is_integer() else number


def _mappings(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [_mapping(item) for item in value]
    raise ValueError("not a list")


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError("not an object")
