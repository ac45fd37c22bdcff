"""Test log-likelihood by importance sampling, ``log (1/S) sum_s w_s`` for each image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ucvae.config import require
from ucvae.errors import NonFiniteError
from ucvae.models.vae import VAE, draw_noise


@torch.no_grad()
def log_likelihood(
    model: VAE,
    images: Tensor,
    num_samples: int,
    generator: torch.Generator,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Estimate ``log p(x)`` of each image with samples from the encoder (Burda et al 2016, Eq 8).

    The estimate is a lower bound in expectation, tighter with more samples.

    Args:
        model: in the dtype and on the device that the work is done in.
        images: ``[N, P]``, floats in [0, 1].
        num_samples: S.
        generator: on the images' device.
        progress: called with the number of images finished since its last call.

    Returns:
        ``[N]`` float64, nats.

    Raises:
        NonFiniteError: an image's estimate is NaN or infinite.
    """
    values = torch.empty(len(images), dtype=torch.float64, device=images.device)
    rows = model.rows_at_a_time(images)
    slice_samples = min(num_samples, rows)
    slice_images = rows // slice_samples
    for batch, into in zip(images.split(slice_images), values.split(slice_images), strict=True):
        proposal = model.encode(batch)
        log_sum = torch.full_like(into, -torch.inf)
        for start in range(0, num_samples, slice_samples):
            count = min(slice_samples, num_samples - start)
            noise = draw_noise(model, batch, count, generator)
            log_weights = model.log_weight(batch, proposal, noise).double()
            log_sum = torch.logaddexp(log_sum, log_weights.logsumexp(-1))
        into.copy_(log_sum - math.log(num_samples))
        if progress is not None:
            progress(len(batch))
    invalid = (~values.isfinite()).nonzero()[:, 0]
    if len(invalid):
        raise NonFiniteError(
            f"log-likelihood: image {int(invalid[0])} ({len(invalid)} of {len(values)} in all) has "
            f"the value {float(values[invalid[0]])}"
        )
    return values


@dataclass
class ImportanceSampling:
    """Importance sampling from the encoder.

    Attributes:
        num_samples: S, for each image.
        num_images: evaluate only so many images, the first of the split; null for all.
    """

    num_samples: int = 5000
    num_images: int | None = None

    name = "importance"

    def __post_init__(self) -> None:
        require(self.num_samples >= 1, f"num_samples must be at least 1, got {self.num_samples}")
        require(
            self.num_images is None or self.num_images >= 2,
            f"num_images must be at least 2 or null, got {self.num_images}",
        )

    def __call__(
        self,
        model: VAE,
        images: Tensor,
        generator: torch.Generator,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """``log p(x)`` of each image, ``[N]`` nats; see :func:`log_likelihood`."""
        return log_likelihood(
            model, images[: self.num_images], self.num_samples, generator, progress
        )
