"""What a run writes while it goes: TensorBoard events and ``metrics.jsonl``.

The only module that imports TensorBoard.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ucvae.config import GROUPS, choices, config_dir, flatten, show
from ucvae.errors import RunError

# Settings that say where a run happens or how it is tested, not what it learns: no columns of the
# hparams tab, which shows the first few alone.
NO_COLUMNS = ("data_dir", "device", "resume", "evaluator", "study", "trainer._target_")

# The columns of most use, for the places that those set on the command line leave among the first.
USUAL_COLUMNS = ("estimator", "seed", "model", "dataset", "estimator.num_samples")

# The tab Custom Scalars: charts of tags, side by side in rows.
LAYOUT = {
    "log-likelihood, nats per image": {
        "training: objective, or the encoder's bound": ["train/objective", "train/iwae_bound"],
        "validation": ["valid/log_likelihood"],
        "test": ["test/log_likelihood"],
    },
    "coupling": {
        "meeting time: mean, p90, p99": [
            "coupling/meeting_time_mean",
            "coupling/meeting_time_p90",
            "coupling/meeting_time_p99",
        ],
        "truncated fraction": ["coupling/truncated_fraction"],
        "decoder evaluations per image": ["coupling/decoder_evaluations"],
    },
    "proposals": {
        "effective sample size": ["proposal/ess"],
        "mismatch, nats": ["proposal/mismatch"],
        "norm of the correction": ["coupling/correction_norm"],
    },
    "speed and gradients": {
        "training images per second": ["time/images_per_s"],
        "gradient norm: decoder": ["train/gradient_norm_decoder"],
        "gradient norm: encoder": ["train/gradient_norm_encoder"],
    },
}


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
        self._given = _given(folder)
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        charts = {
            row: {title: ["Multiline", tags] for title, tags in titles.items()}
            for row, titles in LAYOUT.items()
        }
        self._writer.add_custom_scalars(charts)

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
        own = _columns(settings)
        experiment, _, _ = hparams(_columns_of_all_choices() | own, {metric: 0.0})
        _put_first(experiment, self._given)
        _, start, end = hparams(own, {metric: 0.0})
        for summary in (experiment, start, end):
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


def _columns_of_all_choices() -> dict[str, int | float | str]:
    """The columns of every choice of every group.

    Of several runs TensorBoard takes the columns from any one, so all of them have the same.
    """
    columns: dict[str, int | float | str] = {}
    for group in GROUPS:
        for choice in choices(group):
            content = OmegaConf.load(config_dir() / group / f"{choice}.yaml")
            fields: Any = OmegaConf.to_container(content, resolve=False)
            fields.pop("defaults", None)  # other choices of the group
            columns |= _columns(flatten(fields, f"{group}."))
    return columns


def _given(folder: Path) -> set[str]:
    """The keys that the command line set, or a sweep: what its runs differ in is among them."""
    path = folder / ".hydra" / "overrides.yaml"
    if not path.is_file():
        return set()
    overrides: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return {text.partition("=")[0].lstrip("+~") for text in overrides}


def _put_first(experiment: Summary, keys: set[str]) -> None:
    """Have TensorBoard show the columns ``keys`` first, as it does with those known to differ.

    It shows five at first, so that there are to be five.
    """
    (value,) = experiment.value
    plugin = value.metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    infos = {info.name: info for info in data.experiment.hparam_infos}
    first = infos.keys() & keys
    for name in USUAL_COLUMNS:
        if len(first) < len(USUAL_COLUMNS):
            first.add(name)
    for name, info in infos.items():
        info.differs = name in first
    plugin.content = data.SerializeToString()


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
