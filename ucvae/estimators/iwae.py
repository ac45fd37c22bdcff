r"""The importance-weighted bound ``E log (1/K) sum_k w_k`` (Burda et al 2016).

With normalised weights ``W_k``, the decoder's gradient is ``sum_k W_k grad_theta log p(x, z_k)``.
The encoder's is by default the doubly reparameterised one (DReG, Tucker et al 2019),

    sum_k W_k^2  (d log w_k / d z_k)  (d z_k / d phi),

where q's own parameters are constants in ``log w_k``: the same expectation as the plain
reparameterised gradient, without the part whose signal-to-noise ratio falls as K grows.

Of K samples a few have nearly all the weight, and a differentiable pass costs three evaluations. So
the others can be thinned first (:func:`thinned_bound`): the same gradient in expectation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ucvae.chains.measure import SignedParticles
from ucvae.chains.selection import effective_sample_size
from ucvae.chains.thinning import padded, thin
from ucvae.config import require
from ucvae.estimators.base import Estimate, Estimator, require_batch
from ucvae.models.gaussians import Encoded, Proposal
from ucvae.models.vae import VAE, draw_noise


class Bound(NamedTuple):
    """The bound per image ``[n]`` (nats), its surrogate (0-dim), and the weights behind it.

    Attributes:
        value: ``[n]``.
        surrogate: 0-dim.
        log_weights: ``[n, K]``.
        weights: normalised, ``[n, K]``.
    """

    value: Tensor
    surrogate: Tensor
    log_weights: Tensor
    weights: Tensor


def dreg_bound(model: VAE, images: Tensor, proposal: Encoded, noise: Tensor) -> Bound:
    """The bound with DReG for the encoder and ``sum_k W_k grad log p`` for the decoder.

    One backward pass gives both: the surrogate is ``sum_k W_k log w_k`` with constant ``W_k``, and
    a hook multiplies what arrives at ``z_k`` by ``W_k`` once more.
    """
    z = proposal.transform(noise)
    log_weights = model.log_joint(images, z) - proposal.detach().log_prob(z)
    fixed = log_weights.detach()
    weights = torch.softmax(fixed, dim=-1)
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * weights[:, :, None])
    surrogate = -(weights * log_weights).sum(-1).mean()
    return Bound(_log_mean_exp(fixed), surrogate, fixed, weights)


def reparameterized_bound(model: VAE, images: Tensor, proposal: Proposal, noise: Tensor) -> Bound:
    """The bound with its plain gradient for the decoder, and for what the proposal was made by."""
    log_weights = model.log_weight(images, proposal, noise)
    bound = _log_mean_exp(log_weights)
    fixed = log_weights.detach()
    return Bound(bound.detach(), -bound.mean(), fixed, torch.softmax(fixed, dim=-1))


def thinned_bound(
    model: VAE,
    images: Tensor,
    proposal: Encoded,
    noise: Tensor,
    *,
    dreg: bool,
    min_weight: float,
    generator: torch.Generator,
) -> Bound:
    """The bound, with a few of its samples in the surrogate.

    A sample with ``W_k < m`` is in it with probability ``W_k / m`` and has the weight m there (see
    :func:`~ucvae.chains.thinning.thin`), so that the surrogate's gradient is in expectation over
    these decisions that of :func:`dreg_bound` or :func:`reparameterized_bound` on the same noise.
    At most ``1 / m`` samples of an image are left, or one more. The value and the weights are those
    of all K.

    Args:
        model: the VAE.
        images: ``[n, P]``.
        proposal: of each image.
        noise: ``[n, K, D]``.
        dreg: as of :class:`Iwae`.
        min_weight: m, above 0.
        generator: of the decisions.
    """
    fixed = proposal.detach()
    with torch.no_grad():
        log_weights = model.log_weight(images, fixed, noise)
    weights = torch.softmax(log_weights, dim=-1)
    everyone = torch.arange(len(images), device=images.device)
    thinned = thin(SignedParticles(everyone, noise, weights), min_weight, generator)
    index, noise, coefficient = padded(thinned)
    images, own = images.index_select(0, index), proposal.rows(index)
    if dreg:
        z = own.transform(noise)
        left = model.log_joint(images, z) - fixed.rows(index).log_prob(z)
        if z.requires_grad:
            weight = (left.detach() - log_weights.logsumexp(-1)[index, None]).exp()
            z.register_hook(lambda gradient: gradient * weight[:, :, None])
    else:
        left = model.log_weight(images, own, noise)
    surrogate = -(coefficient * left).sum() / len(log_weights)
    return Bound(_log_mean_exp(log_weights), surrogate, log_weights, weights)


def _log_mean_exp(log_weights: Tensor) -> Tensor:
    """``log (1/K) sum_k w_k`` of log weights ``[n, K]``; ``[n]``."""
    return log_weights.logsumexp(-1) - math.log(log_weights.shape[-1])


@dataclass
class Iwae(Estimator):
    """The importance-weighted bound.

    Attributes:
        num_samples: K.
        dreg: the encoder's gradient is doubly reparameterised; else plain.
        min_weight: samples with a smaller normalised weight are thinned before the backward pass,
            which leaves the gradient's expectation as it is; 0 keeps them all.
    """

    same_work: ClassVar[bool] = True

    num_samples: int = 10
    dreg: bool = True
    min_weight: float = 0.0

    def __post_init__(self) -> None:
        require(self.num_samples >= 1, f"num_samples must be at least 1, got {self.num_samples}")
        require(0 <= self.min_weight < 1, f"min_weight must be in [0, 1), got {self.min_weight}")

    def __call__(
        self, model: VAE, images: Tensor, generator: torch.Generator, index: Tensor | None = None
    ) -> Estimate:
        """The estimate for images ``[n, P]``."""
        require_batch(images)
        noise = draw_noise(model, images, self.num_samples, generator)
        bound = self._bound(model, images, model.encode(images), noise, generator)
        return Estimate(
            surrogate=bound.surrogate,
            objective=bound.value.mean(),
            diagnostics={"proposal/ess": effective_sample_size(bound.weights).mean()},
        )

    def _bound(
        self,
        model: VAE,
        images: Tensor,
        proposal: Encoded,
        noise: Tensor,
        generator: torch.Generator,
    ) -> Bound:
        if self.min_weight == 0:
            bound_of = dreg_bound if self.dreg else reparameterized_bound
            return bound_of(model, images, proposal, noise)
        return thinned_bound(
            model,
            images,
            proposal,
            noise,
            dreg=self.dreg,
            min_weight=self.min_weight,
            generator=generator,
        )

    def may_be_replayed(self) -> bool:
        """Not where samples are thinned, whose number differs from call to call."""
        return super().may_be_replayed() and self.min_weight == 0
