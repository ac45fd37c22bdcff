"""What a run writes while it goes: TensorBoard events and ``metrics.jsonl``.

The only module that imports TensorBoard.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ucvae.config import show
from ucvae.errors import RunError

# Settings that say where a run happens or how it is tested, not what it learns: no columns of the
# hparams tab, which shows the first few alone.
NO_COLUMNS = ("data_dir", "device", "resume", "evaluator", "study", "trainer._target_")


class Tracker:
    """Writes scalars to both places, histograms and images to TensorBoard alone.

    Args:
        folder: the run's folder.
        step: the last step that counts. A run that goes on from a checkpoint drops what was
            written after it, since those steps will be written again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._lines = folder / "metrics.jsonl"
        _keep_until(self._lines, step)
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def scalars(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """One line of metrics, by TensorBoard tag."""
        line = json.dumps({"step": step, "epoch": epoch, **values})
        try:
            with self._lines.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise RunError(f"metrics: cannot write {self._lines}: {error.strerror}") from error
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, step: int, counts: Tensor) -> None:
        """A histogram of whole numbers, ``counts[i]`` of the number i."""
        occupied = counts.nonzero()[:, 0].numpy()
        weights = counts[occupied].double().numpy()
        self._writer.add_histogram_raw(
            tag,
            min=float(occupied.min()),
            max=float(occupied.max()),
            num=float(weights.sum()),
            sum=float((occupied * weights).sum()),
            sum_squares=float((np.square(occupied, dtype=np.float64) * weights).sum()),
            bucket_limits=(occupied + 0.5).tolist(),
            bucket_counts=weights.tolist(),
            global_step=step,
        )

    def images(self, tag: str, step: int, grid: Tensor) -> None:
        """One picture, ``[C, H, W]`` in [0, 1]."""
        self._writer.add_image(tag, grid, step)

    def hyperparameters(self, settings: dict[str, Any], metric: str) -> None:
        """The run's row in the hparams tab, with the scalar ``metric`` as its column.

        Args:
            settings: by dotted key; a component's ``_target_`` becomes a column ``group`` with
                its class, in lower case.
            metric: a tag.
        """
        for summary in hparams(_columns(settings), {metric: 0.0}):
            # Torch's types know of the writer only that it begins as None.
            self._writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: object) -> None:
        """Write out what is buffered."""
        self._writer.close()


def _columns(settings: dict[str, Any]) -> dict[str, int | float | str]:
    columns = {}
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        if value is None or {key, group} & set(NO_COLUMNS):
            continue
        if name == "_target_":
            columns[group] = value.rpartition(".")[2].lower()
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            columns[key] = value if number else show(value)
    return columns


def _keep_until(lines: Path, step: int) -> None:
    """Drop the lines after ``step``, test results, and a last line that was cut short.

    Raises:
        RunError: the file is damaged, or cannot be written.
    """
    kept = []
    try:
        if not lines.exists():
            return
        for line in lines.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            values = json.loads(line)
            # The test comes once, after the last step, and will come again.
            if values["step"] <= step and "test/log_likelihood" not in values:
                kept.append(line)
        partial = lines.with_name(lines.name + ".partial")
        partial.write_text("".join(kept))
        partial.replace(lines)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"metrics: {lines} is damaged in line {len(kept) + 1}") from error
    except OSError as error:
        raise RunError(f"metrics: cannot write {lines}: {error.strerror}") from error
