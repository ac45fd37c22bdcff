"""The log-likelihood of a whole split, as results report it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from ucvae import results
from ucvae.data.base import ImageData, as_input
from ucvae.models.vae import VAE


def evaluate(
    evaluator: Any,
    model: VAE,
    data: ImageData,
    split: str,
    generator: torch.Generator,
    between: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """The log-likelihood of a split with its standard error over images, with a progress bar.

    Args:
        evaluator: an evaluator's settings, called as ``importance.ImportanceSampling`` is.
        model: on the data's device.
        data: on the device.
        split: ``train`` (one epoch's draw of it, if it is drawn anew), ``valid`` or ``test``.
        generator: on the device.
        between: called between slices, for what may interrupt the evaluation.
    """
    images = data.epoch_images(generator) if split == "train" else getattr(data, split)
    images = as_input(images[: evaluator.num_images], data.levels)
    with tqdm(
        total=len(images),
        desc=f"{split} log-likelihood",
        unit=" images",
        dynamic_ncols=True,
        disable=not sys.stderr.isatty(),
        leave=False,
    ) as bar:

        def progress(count: int) -> None:
            bar.update(count)
            between()

        values = evaluator(model, images, generator, progress)
    mean, error = results.mean_and_error(values)
    return {
        "log_likelihood": mean,
        "standard_error": error,
        "evaluator": evaluator.name,
        "num_samples": evaluator.num_samples,
        "num_images": len(values),
    }
