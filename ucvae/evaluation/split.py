"""The log-likelihood of a whole split, as results report it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ucvae import results
from ucvae.data.base import ImageData, as_input
from ucvae.evaluation.base import Evaluator
from ucvae.evaluation.unfinished import Unfinished
from ucvae.models.vae import VAE
from ucvae.progress import hidden

log = logging.getLogger(__name__)

# Without a progress bar, a line this often (seconds).
PLAIN_LINE_INTERVAL = 60.0


def evaluate(
    evaluator: Evaluator,
    model: VAE,
    data: ImageData,
    split: str,
    generator: torch.Generator,
    between: Callable[[], object] = lambda: None,
    unfinished: Unfinished | None = None,
) -> dict[str, Any]:
    """The log-likelihood of a split with its standard error over images, with a progress bar.

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
    images = as_input(images[: evaluator.num_images], data.levels)
    task = f"{split} log-likelihood"
    done, last_line = 0, time.monotonic()

    def progress(count: int, note: str = "") -> None:
        nonlocal done, last_line
        done += count
        bar.set_postfix_str(note, refresh=False)
        bar.update(count)
        if bar.disable and time.monotonic() - last_line > PLAIN_LINE_INTERVAL:
            last_line = time.monotonic()
            finished = f"{done:,} of {len(images):,} images"
            log.info("%s: %s", task, f"{finished}; {note}" if note else finished)
        between()

    with (
        tqdm(
            total=len(images),
            desc=task,
            unit=" images",
            dynamic_ncols=True,
            disable=hidden(),
            leave=False,
        ) as bar,
        logging_redirect_tqdm(),
    ):
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
