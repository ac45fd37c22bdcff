"""Evaluating a finished run again, on another split or with more samples."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ucvae import checkpoint, results
from ucvae.config import Checkpoint, EvalSettings, TrainSettings
from ucvae.data.base import ImageData
from ucvae.evaluation.split import evaluate
from ucvae.evaluation.unfinished import Unfinished
from ucvae.models.vae import VAE
from ucvae.randomness import stream

log = logging.getLogger(__name__)


def run(
    settings: EvalSettings,
    trained: TrainSettings,
    state: dict[str, Any],
    data: ImageData,
    device: torch.device,
    folder: Path,
) -> dict[str, Any]:
    """Evaluate a checkpoint, or study it, and write ``result.json``.

    Beside the result is the log-likelihood of each image, in ``SPLIT_log_likelihoods.csv``.

    Data that differ from those the run was trained on are named in a warning and in the result,
    and evaluated all the same.

    Args:
        settings: the split and the evaluator, or the study in its place; the seed.
        trained: what the run was asked to do.
        state: the run's best or last checkpoint, as the settings say.
        data: the run's data set as it is found now, on the CPU.
        device: where everything runs.
        folder: where the result goes; it exists.

    Raises:
        RunError: the checkpoint's weights do not fit the data or the model.
        ConfigError: the study cannot work on the model or the data.
    """
    differing = [
        split
        for split, digest in state["split_sha256"].items()
        if data.split_sha256[split] != digest
    ]
    if differing:
        log.warning(
            "the data differ from those the run was trained on: %s of %s",
            ", ".join(differing),
            data.name,
        )
    model = restore_model(trained, data, state, settings.checkpoint).to(device)
    data = data.to(device)
    # In the run's own folder, whatever the result's: the same command finds it again.
    unfinished = Unfinished(Path(settings.run) / "evaluations")
    if settings.study is None:
        generator = stream(settings.seed, f"evaluation of {settings.split}", device)
        evaluated = evaluate(
            settings.evaluator, model, data, settings.split, generator, unfinished=unfinished
        )
        results.write_log_likelihoods(folder, settings.split, evaluated.values)
        found = {settings.split: evaluated.summary}
    else:
        found = {"study": settings.study(model, data, settings.seed, folder)}
    result = {
        "run": str(settings.run),
        "checkpoint": settings.checkpoint.value,
        # A last checkpoint's "epoch" is what training goes on from: the whole ones.
        "epoch": state.get("epochs", state["epoch"]),
        "dataset": data.name,
        "binarization": data.binarization,
        "split_sha256": data.split_sha256,
        "differing_splits": differing,
        "seed": settings.seed,
        **results.environment(device),
        **found,
        "config": settings.raw,
    }
    results.write(folder / "result.json", result)
    unfinished.remove()
    log.info("%s", results.evaluation_summary(result, settings.split, folder, settings.study))
    return result


def restore_model(
    settings: TrainSettings, data: ImageData, state: dict[str, Any], which: Checkpoint
) -> VAE:
    """The model of a checkpoint, on the CPU.

    Raises:
        RunError: the weights do not fit the model that the settings describe.
    """
    model = settings.model.build(data.train_mean, data.levels)
    with checkpoint.fitting(Path("checkpoints") / f"{which.value}.pt"):
        model.load_state_dict(state["model"])
    return model
