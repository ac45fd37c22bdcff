r"""Self-normalised importance sampling from remembered proposals: biased, and hardly.

The decoder's gradient is IWAE's, ``sum_k W_k grad_theta log p(x, z_k)`` with normalised weights
``W_k``, but with samples from the proposals that the coupled estimator remembers
(:mod:`ucvae.estimators.remembered`) in the place of the encoder's. So what coupled chains add to it
is that they are unbiased, and their price: it is the opponent that tells how much of their gain is
the proposals'.

Weights that add up to 1 bear a proposal of an epoch ago, where chains would not. So only an image
that is new is refined before its samples are drawn, or one whose bits are. From then on the samples
of each call, and the gradients with respect to z at them, refine its proposal for the next call:
they cost a pass back to z, and no further samples. They do so after they were drawn, so that the
proposal of a call depends on none of its samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ucvae.chains.measure import SignedParticles
from ucvae.chains.selection import effective_sample_size
from ucvae.chains.thinning import padded, thin
from ucvae.config import require
from ucvae.estimators.base import Estimate, require_batch
from ucvae.estimators.iwae import Bound
from ucvae.estimators.remembered import Lesson, Remembering
from ucvae.models.refinement import improve, log_joint_gradient
from ucvae.models.vae import VAE


class Draws(NamedTuple):
    """What a call is made of; constant to autograd, but for the encoder's bound.

    Attributes:
        bound: the encoder's; its surrogate trains the encoder alone.
        z: samples, ``[n, K, D]``.
        log_weights: theirs, ``[n, K]``, nats.
        lesson: for the memory.
    """

    bound: Bound
    z: Tensor
    log_weights: Tensor
    lesson: Lesson

    @property
    def particles(self) -> SignedParticles:
        """The samples, z in the place of noise, with their normalised weights."""
        everyone = torch.arange(len(self.z), device=self.z.device)
        return SignedParticles(everyone, self.z, torch.softmax(self.log_weights, dim=-1))


@dataclass
class Snis(Remembering):
    """The importance-weighted bound, for the decoder with remembered proposals.

    The encoder, which the proposals of new images start from, is trained beside it on its own
    bound by DReG.

    Attributes:
        num_samples: K.
        min_weight: samples with a smaller normalised weight are thinned before the backward pass,
            which leaves the gradient's expectation as it is; 0 keeps them all, and evaluates the
            decoder twice for each.
        refine_known: the proposals of all images are refined before their samples are drawn, not
            those of new ones alone: for images that change between two visits.
        proposal_samples, memory_rate, refinements, refinement_gap, encoder_share: see
            :class:`~ucvae.estimators.remembered.Remembering`.
        widening, follow_encoder: of the same.
    """

    # As in runs of before these could be chosen.
    min_weight: float = 0.0
    refine_known: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.min_weight < 1, f"min_weight must be in [0, 1), got {self.min_weight}")

    def __call__(
        self, model: VAE, images: Tensor, generator: torch.Generator, index: Tensor | None = None
    ) -> Estimate:
        """The estimate for images ``[n, P]``.

        Raises:
            ValueError: ``images`` has no image, or ``index`` is missing.
        """
        require_batch(images)
        draws = self.draw(model, images, generator, index)
        particles = draws.particles
        rows, z, weight = padded(thin(particles, self.min_weight, generator))
        log_joint = model.log_joint(images.index_select(0, rows), z)
        value = draws.log_weights.logsumexp(-1) - math.log(self.num_samples)
        return Estimate(
            surrogate=draws.bound.surrogate - (weight * log_joint).sum() / len(images),
            objective=value.mean(),
            diagnostics={
                "train/iwae_bound": draws.bound.value.mean(),
                "proposal/ess": effective_sample_size(particles.coefficient).mean(),
                "proposal/refinements": draws.lesson.evaluations.to(images.dtype).mean(),
            },
            lesson=draws.lesson,
        )

    def learn(
        self, model: VAE, images: Tensor, generator: torch.Generator, index: Tensor
    ) -> Lesson:
        """What a call has to remember."""
        return self.draw(model, images, generator, index).lesson

    def draw(
        self, model: VAE, images: Tensor, generator: torch.Generator, index: Tensor | None
    ) -> Draws:
        """The encoder's bound, K samples of each image, and what they teach.

        Raises:
            ValueError: there is no memory yet, or ``index`` is missing.
        """
        memory, index = self.require_memory(index)
        encoded, bound = self.encode(model, images, generator)
        new = memory.unknown(index)
        remembered = memory.of(index, encoded, new)
        evaluations = torch.zeros(len(images), dtype=torch.long, device=images.device)
        rows = torch.arange(len(images), device=images.device) if self.refine_known else new
        if len(rows):
            refined = self.refine(model, images[rows], remembered.rows(rows), generator)
            for whole, part in zip(remembered, refined.proposal, strict=True):
                whole.index_copy_(0, rows, part)
            evaluations.index_copy_(0, rows, refined.evaluations)
        proposal = self.mixture(remembered, encoded)
        noise = torch.randn(
            (len(images), self.num_samples, proposal.noise_dim),
            generator=generator,
            device=images.device,
            dtype=images.dtype,
        )
        z = proposal.transform(noise)
        log_joint, gradient = log_joint_gradient(model, images, z)
        own = proposal.of_main(noise)
        of_own = log_joint - proposal.main.noise_log_prob(noise[..., :-1], z)
        elbo, rate = self._fit(of_own, own)
        improved = improve(remembered, remembered.to_noise(z), gradient, rate, own)
        better = (elbo >= bound.log_weights.mean(1)) | (rate == 0)
        lesson = Lesson(index, improved, encoded.mean, better, evaluations)
        return Draws(bound, z, log_joint - proposal.log_prob(z), lesson)

    def _fit(self, log_weights: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """The ELBO of proposals ``[n]``, and the length of the step that they are to take.

        Args:
            log_weights: of samples, ``[n, K]``.
            own: which of them the proposals have drawn, ``[n, K]``; fewer than two of an image say
                nothing of its own, and its step is of no length.
        """
        count = own.sum(1)
        elbo = log_weights.masked_fill(~own, 0).sum(1) / count.clamp(min=1)
        mean_weight = log_weights.masked_fill(~own, -torch.inf).logsumexp(1)
        gap = mean_weight - count.clamp(min=1).log() - elbo
        # As in a step of refinement: half of it where the proposal fits.
        rate = torch.where(gap <= self.refinement_gap, self.memory_rate / 2, self.memory_rate)
        return elbo, torch.where(count >= 2, rate, 0)
