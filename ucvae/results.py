"""``result.json``: what a finished run or evaluation reports."""

from __future__ import annotations

import csv
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ucvae
from ucvae.errors import RunError

if TYPE_CHECKING:  # what only reads results starts without it
    import torch
    from torch import Tensor


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean over images ``[N]`` and its standard error, ``std / sqrt(N)``."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def environment(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Versions, code revision and device: what a result must be told with."""
    import torch

    packages = {name: metadata.version(name) for name in ("torch", "numpy", "hydra-core")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "git_revision": _git_revision(),
        "versions": {"ucvae": ucvae.__version__, "python": platform.python_version(), **packages},
        "device": {
            "type": device.type,
            "name": name,
            "threads": torch.get_num_threads(),
            "processes": processes,
        },
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor() or platform.machine()


def _git_revision() -> str | None:
    """The commit of the source tree, ``+changes`` if it is not clean; None for an installed one."""
    root = Path(ucvae.__file__).parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        return revision + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result atomically.

    Raises:
        RunError: the file cannot be written.
    """
    write_text(path, json.dumps(result, indent=2, allow_nan=False) + "\n", "result")


def write_text(path: Path, text: str, kind: str) -> None:
    """Write a text atomically; ``kind`` says what it is if that fails.

    Raises:
        RunError: the file cannot be written.
    """
    with _replacing(path, kind) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table as CSV, atomically; the keys of the first row are the columns.

    Raises:
        RunError: the file cannot be written.
    """
    with (
        _replacing(path, "table") as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def log_likelihoods_file(split: str) -> str:
    """The name of the table with the log-likelihood of each image, beside the result."""
    return f"{split}_log_likelihoods.csv"


def write_log_likelihoods(folder: Path, split: str, values: Tensor) -> None:
    """Write ``log p(x)`` of each image ``[N]``, in the order of the split, as CSV, atomically.

    Raises:
        RunError: the file cannot be written.
    """
    rows = [{"image": i, "log_likelihood": value} for i, value in enumerate(values.tolist())]
    write_rows(folder / log_likelihoods_file(split), rows)


@contextmanager
def _replacing(path: Path, kind: str) -> Iterator[Path]:
    """A file to write that takes the place of another once it is whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{kind}: cannot write {path}: {error.strerror}") from error


def table(rows: dict[str, str]) -> str:
    """A small table of two columns, for the terminal."""
    width = max(len(name) for name in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows.items()]
    rule = "-" * max(len(line) for line in lines)
    return "\n".join([rule, *lines, rule])


def columns(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    """A table of several columns below a title, for the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    lines = ["  " + "  ".join(row).rstrip() for row in padded]
    rule = "-" * max(map(len, [title, *lines]))
    return "\n".join([title, rule, *lines, rule])


def headline(result: dict[str, Any]) -> str:
    """A result in a few words, for a table of many: its log-likelihood, or its study."""
    for split in ("test", "valid", "train"):
        values = result.get(split)
        if isinstance(values, dict) and "evaluator" in values:
            return f"{split} {values['log_likelihood']:.2f} +- {values['standard_error']:.2f}"
    return f"study {result['study']['name']}"


def objective(result: dict[str, Any]) -> float:
    """What a search of hyperparameters raises: the best validation of a run, never its test.

    Of an evaluation, the log-likelihood of its split.
    """
    splits = (result.get(split) for split in ("valid", "test", "train"))
    return next(values["log_likelihood"] for values in splits if values)


def read(path: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        RunError: it cannot be read, or is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"result: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"result: {path} is damaged or cut short, no JSON") from error
    if not isinstance(content, dict):
        raise RunError(f"result: {path} is no result of ucvae: not an object")
    return content


def summary(result: dict[str, Any], folder: Path, study: Any = None) -> str:
    """What the terminal shows at the end of a run; ``study`` is the one that was done, if any."""
    valid, coupling = result["valid"], result["coupling"]
    rows = {
        "data": f"{result['dataset']} ({binarized(result['binarization'])})",
        "estimator": (
            f"{result['estimator']}{_warm_start(result)}, model {result['model']}, "
            f"seed {result['seed']}"
        ),
        **_started(result),
        "test log-likelihood": _log_likelihood(result["test"]),
        "tested by": _tested_by(result["test"]),
        "best validation": f"{valid['log_likelihood']:.2f} after epoch {valid['epoch']}",
        "training": (
            f"{_epochs(result['epochs'])}, {result['train_images_per_s']:,.0f} images/s, "
            f"{result['wall_clock_s']:,.0f} s in all"
        ),
    }
    if coupling:
        times = coupling["meeting_time"]
        rows["meeting time"] = (
            f"mean {times['mean']:.1f}, p50 {times['p50']}, p90 {times['p90']}, "
            f"p99 {times['p99']}, max {times['max']}"
        )
        rows["estimates"] = (
            f"truncated {100 * coupling['truncated_fraction']:.2g}%; "
            f"{coupling['decoder_evaluations_per_image']:.0f} decoder evaluations per image"
        )
    if study is not None:
        rows |= _study_rows(result["study"], study)
    rows["folder"] = shorten(folder)
    # No rows of the table: they would be wider than the terminal, and copied with their margin.
    return "\n".join([table(rows), "where to look next:", *_next(result, shorten(folder))])


def _started(result: dict[str, Any]) -> dict[str, str]:
    start = result.get("start")  # unknown to earlier versions
    if start is None:
        return {}
    estimator = start["config"]["estimator"]["_target_"].rpartition(".")[2].lower()
    text = f"a model of {estimator} after {_epochs(start['epochs'])}"
    kept = start.get("proposals") == "kept"  # unknown to earlier versions
    return {"started from": f"{text}, with its proposals" if kept else text}


def _next(result: dict[str, Any], folder: str) -> list[str]:
    """Commands that tell more of a run: tighter bounds, the report with curves, TensorBoard."""
    done = result["test"]["evaluator"]
    run = shlex.quote(f"run={folder}")
    quoted = shlex.quote(folder)
    return [
        *(
            f"ucvae-eval {run} evaluator={evaluator}"
            for evaluator in ("importance_refined", "ais")
            if not done.startswith(evaluator)
        ),
        f"ucvae-report {quoted}",
        f"tensorboard --host 127.0.0.1 --logdir {quoted}",
    ]


def evaluation_summary(result: dict[str, Any], split: str, folder: Path, study: Any = None) -> str:
    """What the terminal shows at the end of an evaluation of a split, or of a study."""
    rows = {
        "run": shorten(Path(result["run"])),
        "checkpoint": f"{result['checkpoint']}, epoch {result['epoch']}",
        "data": f"{result['dataset']} ({binarized(result['binarization'])})",
    }
    if study is None:
        rows[f"{split} log-likelihood"] = _log_likelihood(result[split])
        rows["evaluated by"] = _tested_by(result[split])
    else:
        rows |= _study_rows(result["study"], study)
    lines = [table(rows)]
    if study is None:  # which reports leave out
        run = shlex.quote(shorten(Path(result["run"])))
        lines.append(f"beside the run's own result: ucvae-report {run}")
    # Below the table, which its length would make wider than the terminal.
    return "\n".join([*lines, shorten(folder)])


def _warm_start(result: dict[str, Any]) -> str:
    epochs = result["config"]["trainer"].get("switch", {}).get("epochs", 0)
    if not epochs:
        return ""
    before = " (tested before the switch)" if result["valid"]["epoch"] <= epochs else ""
    return f" after {_epochs(epochs)} of iwae{before}"


def _epochs(count: float) -> str:
    return f"{count} epoch{'s' * (count != 1)}"


def _study_rows(found: dict[str, Any], study: Any) -> dict[str, str]:
    files = ", ".join(found["files"])
    return {"study": f"{found['name']}: {files}"} | study.rows(found)


def shorten(folder: Path) -> str:
    """The folder from where the user is, if it lies below; else as it is."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def _log_likelihood(values: dict[str, Any]) -> str:
    return f"{values['log_likelihood']:.2f} +- {values['standard_error']:.2f} nats per image"


def _tested_by(values: dict[str, Any]) -> str:
    return (
        f"{values['evaluator']}, {values['num_samples']:,} samples, {values['num_images']:,} images"
    )


def binarized(binarization: str) -> str:
    """A data set's binarisation in words."""
    return "8 bit" if binarization == "none" else f"{binarization} binarisation"
