"""The log-likelihood of a whole split, as results report it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ucvae import results
from ucvae.data.base import ImageData, as_input
from ucvae.evaluation.base import Evaluator
from ucvae.evaluation.unfinished import Unfinished
from ucvae.models.vae import VAE
from ucvae.progress import Fact, Progress, Stand
from ucvae.randomness import stream

log = logging.getLogger(__name__)


class SplitLogLikelihood(NamedTuple):
    """The log-likelihood of a split, in nats.

    Attributes:
        values: of each image, ``[N]`` float64 in the order of the split.
        summary: their mean and what it is to be told with, as ``result.json`` has it.
    """

    values: Tensor
    summary: dict[str, Any]


def evaluate(
    evaluator: Evaluator,
    model: VAE,
    data: ImageData,
    split: str,
    generator: torch.Generator,
    between: Callable[[], object] = lambda: None,
    unfinished: Unfinished | None = None,
) -> SplitLogLikelihood:
    """The log-likelihood of each image of a split and their mean; shows its progress.

    Args:
        evaluator: an evaluator's settings.
        model: on the data's device.
        data: on the device.
        split: ``train``, ``valid`` or ``test``; of a train split that is drawn anew, one draw, the
            same for every seed.
        generator: on the device.
        between: called between slices, for what may interrupt the evaluation.
        unfinished: where a long evaluation is kept on the way; None keeps nothing. What is there
            is to be removed once the result is written.
    """
    if split == "train":
        # The same bits whatever the seed, on one kind of device: evaluations pair image by image.
        images = data.epoch_images(stream(0, "bits of the train split", data.train.device))
    else:
        images = getattr(data, split)
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
    values = values.double()
    mean, error = results.mean_and_error(values)
    summary = {
        "log_likelihood": mean,
        "standard_error": error,
        "evaluator": evaluator.name,
        "num_samples": evaluator.num_samples,
        "num_images": len(values),
        **details,
    }
    return SplitLogLikelihood(values, summary)
