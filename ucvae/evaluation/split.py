"""The log-likelihood of a whole split, as results report it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ucvae import results
from ucvae.data.base import ImageData, as_input
from ucvae.evaluation.base import Evaluator
from ucvae.evaluation.unfinished import Unfinished
from ucvae.models.vae import VAE
from ucvae.progress import Fact, Progress, Stand

log = logging.getLogger(__name__)


def evaluate(
    evaluator: Evaluator,
    model: VAE,
    data: ImageData,
    split: str,
    generator: torch.Generator,
    between: Callable[[], object] = lambda: None,
    unfinished: Unfinished | None = None,
) -> dict[str, Any]:
    """The log-likelihood of a split with its standard error over images; shows its progress.

    Args:
        evaluator: an evaluator's settings.
        model: on the data's device.
        data: on the device.
        split: ``train`` (one epoch's draw of it, if it is drawn anew), ``valid`` or ``test``.
        generator: on the device.
        between: called between slices, for what may interrupt the evaluation.
        unfinished: where a long evaluation is kept on the way; None keeps nothing. What is there
            is to be removed once the result is written.
    """
    images = data.epoch_images(generator) if split == "train" else getattr(data, split)
    if evaluator.num_images is not None and evaluator.num_images > len(images):
        log.warning(
            "evaluator.num_images=%d: all %d images of the %s split are evaluated, as there are no "
            "more",
            evaluator.num_images,
            len(images),
            split,
        )
    images = as_input(images[: evaluator.num_images], data.levels)
    done, share = 0, 0.0

    def progress(count: int, note: str = "", under_way: float = 0.0) -> None:
        nonlocal done, share
        done += count
        share = (done + under_way) / len(images)
        finished = f"{done:,} of {len(images):,} images"
        text = f"{finished}; {note}" if note else finished
        bar.facts["images"] = Fact(text, note or finished)
        bar.tick()
        between()

    with Progress(lambda: Stand(f"{split} log-likelihood", share)) as bar:
        values, details = evaluator.evaluate(
            model, images, generator, progress, unfinished or Unfinished()
        )
    mean, error = results.mean_and_error(values)
    return {
        "log_likelihood": mean,
        "standard_error": error,
        "evaluator": evaluator.name,
        "num_samples": evaluator.num_samples,
        "num_images": len(values),
        **details,
    }
