r"""Self-normalised importance sampling from remembered proposals: biased, and hardly.

The decoder's gradient is IWAE's, ``sum_k W_k grad_theta log p(x, z_k)`` with normalised weights
``W_k``, but with samples from the proposals that the coupled estimator remembers
(:mod:`ucvae.estimators.remembered`) in the place of the encoder's. So what coupled chains add to it
is that they are unbiased, and their price: it is the opponent that tells how much of their gain is
the proposals'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ucvae.chains.selection import effective_sample_size
from ucvae.estimators.base import Estimate, require_batch
from ucvae.estimators.iwae import reparameterized_bound
from ucvae.estimators.remembered import Remembering
from ucvae.models.vae import VAE


@dataclass
class Snis(Remembering):
    """The importance-weighted bound, for the decoder with remembered proposals.

    The encoder, which the proposals of new images start from, is trained beside it on its own
    bound by DReG.

    Attributes:
        num_samples: K.
        proposal_samples, memory_rate, refinements, refinement_gap, encoder_share, widening: see
            :class:`~ucvae.estimators.remembered.Remembering`.
    """

    def __call__(
        self, model: VAE, images: Tensor, generator: torch.Generator, index: Tensor | None = None
    ) -> Estimate:
        """The estimate for images ``[n, P]``.

        Raises:
            ValueError: ``images`` has no image, or ``index`` is missing.
        """
        require_batch(images)
        visit = self.visit(model, images, generator, index)
        shape = (len(images), self.num_samples, visit.proposal.noise_dim)
        noise = torch.randn(shape, generator=generator, device=images.device, dtype=images.dtype)
        bound = reparameterized_bound(model, images, visit.proposal, noise)
        return Estimate(
            surrogate=visit.bound.surrogate + bound.surrogate,
            objective=bound.value.mean(),
            diagnostics={
                "train/iwae_bound": visit.bound.value.mean(),
                "proposal/ess": effective_sample_size(bound.weights).mean(),
                "proposal/refinements": visit.lesson.evaluations.to(images.dtype).mean(),
            },
            lesson=visit.lesson,
        )
