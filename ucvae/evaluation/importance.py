"""Test log-likelihood by importance sampling, ``log (1/S) sum_s w_s`` for each image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ucvae.config import require
from ucvae.evaluation.base import Evaluator, Progress, require_finite
from ucvae.models.gaussians import DefensiveMixture, FullGaussian, Proposal
from ucvae.models.refinement import refine
from ucvae.models.vae import VAE

# Samples of a step of refinement; and how its result is widened and mixed with the encoder's, as
# the coupled estimator does with what it remembers.
REFINEMENT_SAMPLES = 10
WIDENING = 0.2
ENCODER_SHARE = 0.1


@torch.no_grad()
def log_likelihood(
    model: VAE,
    images: Tensor,
    num_samples: int,
    generator: torch.Generator,
    progress: Progress | None = None,
    refinements: int = 0,
) -> Tensor:
    """Estimate ``log p(x)`` of each image with samples from a proposal (Burda et al 2016, Eq 8).

    The estimate is a lower bound in expectation, tighter with more samples and with a proposal
    that is closer to the posterior.

    Args:
        model: in the dtype and on the device that the work is done in.
        images: ``[N, P]``, floats in [0, 1].
        num_samples: S.
        generator: on the images' device.
        progress: called with the number of images finished since its last call.
        refinements: see :func:`proposals_of`.

    Returns:
        ``[N]`` float64, nats.

    Raises:
        NonFiniteError: an image's estimate is NaN or infinite.
    """
    values = torch.empty(len(images), dtype=torch.float64, device=images.device)
    rows = model.rows_at_a_time(images)
    slice_samples = min(num_samples, rows)
    slice_images = rows // slice_samples
    together = max(slice_images, rows // REFINEMENT_SAMPLES) if refinements else slice_images
    for batch, of_batch in zip(images.split(together), values.split(together), strict=True):
        proposals = proposals_of(model, batch, refinements, generator)
        everyone = torch.arange(len(batch), device=batch.device)
        for index, into in zip(
            everyone.split(slice_images), of_batch.split(slice_images), strict=True
        ):
            some, proposal = batch[index], proposals.rows(index)
            log_sum = torch.full_like(into, -torch.inf)
            for start in range(0, num_samples, slice_samples):
                shape = (len(some), min(slice_samples, num_samples - start), proposal.noise_dim)
                noise = torch.randn(
                    shape, generator=generator, device=batch.device, dtype=batch.dtype
                )
                log_weights = model.log_weight(some, proposal, noise).double()
                log_sum = torch.logaddexp(log_sum, log_weights.logsumexp(-1))
            into.copy_(log_sum - math.log(num_samples))
            if progress is not None:
                progress(len(some))
    return require_finite(values)


def proposals_of(
    model: VAE, images: Tensor, refinements: int, generator: torch.Generator
) -> Proposal:
    """The encoder's proposals; or Gaussians of full covariance fitted to each image, beside them.

    The fit starts from the encoder's and takes so many steps, on samples that are not used again:
    the estimates stay lower bounds. A share of the encoder's samples guards against a part of the
    posterior that the fit has left out.
    """
    encoded = model.encode(images).detach()
    if not refinements:
        return encoded
    refined = refine(
        model,
        images,
        FullGaussian.of(encoded),
        generator,
        num_samples=REFINEMENT_SAMPLES,
        rate=0.5,
        most=refinements,
        gap=None,
    )
    return DefensiveMixture(refined.proposal.widened(WIDENING), encoded, ENCODER_SHARE)


@dataclass
class ImportanceSampling(Evaluator):
    """Importance sampling from the encoder, or from proposals that are fitted to each image.

    Attributes:
        num_samples: S, for each image.
        num_images: evaluate only so many images, the first of the split; null for all.
        refinements: steps of the fit; 0 for the encoder's proposals as they are.
    """

    num_samples: int = 5000
    num_images: int | None = None
    refinements: int = 0

    @property
    def name(self) -> str:  # type: ignore[override]  # read only: the refinements decide
        """In results: values of different names are not to be compared."""
        return f"importance_refined_{self.refinements}" if self.refinements else "importance"

    def __post_init__(self) -> None:
        require(self.refinements >= 0, f"refinements must be at least 0, got {self.refinements}")
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
        progress: Progress | None = None,
    ) -> Tensor:
        """``log p(x)`` of each image, ``[N]`` nats; see :func:`log_likelihood`."""
        return log_likelihood(
            model,
            images[: self.num_images],
            self.num_samples,
            generator,
            progress,
            self.refinements,
        )
