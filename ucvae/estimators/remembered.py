r"""Proposals remembered for each training image and improved at each visit.

An encoder answers for all images at once and with a diagonal covariance, and the coupled chains pay
for what it misses: their time to meet grows like the exponential of the mismatch. Here each
training image has a Gaussian ``N(mu, S S^T)`` of its own, with a full covariance. It starts from
the encoder's and takes natural-gradient steps of the ELBO at each visit, the more the worse it
fits (:func:`refine`). With ``xi ~ N(0, I)`` and
``z = mu + S xi``,

    h = grad_xi log w = S^T grad_z log p(x, z) + xi

is the gradient along the sample's path alone (Roeder, Wu and Duvenaud 2017); it vanishes for every
xi where the proposal is the posterior. The natural gradients are ``m = E[h]`` of the mean and ``A =
E[h xi^T]`` (symmetric, by Stein's identity the mean Hessian of log p plus I) of the covariance, in
the coordinates of the proposal. Where the posterior is Gaussian, ``h = m + A xi`` exactly. So m and
A are fitted to a few samples by least squares, A with a ridge of one observation: it is found
exactly along the directions that the samples span, where an average of ``h xi^T`` would have the
sampling error of ``xi xi^T`` besides. A step of length r is

    mu <- mu + r S m,       S <- S (I + r L),

where L is A's lower triangle with half its diagonal, so that ``S S^T`` moves along ``S A S^T`` to
first order in r.

A proposal depends on samples that the chains do not use, so the chains that use it give gradients
as unbiased as with any other. It may have missed a part of the posterior; the estimator therefore
mixes it with the encoder's (:class:`~ucvae.models.gaussians.DefensiveMixture`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ucvae.config import require
from ucvae.errors import ConfigError
from ucvae.models.gaussians import FullGaussian, Gaussian
from ucvae.models.vae import VAE, draw_noise

# Of m and A in one step, in units of the proposal's own width: far from the posterior h is huge.
MAX_NORM = 3.0


class Lesson(NamedTuple):
    """What a visit leaves behind.

    Attributes:
        index: places of the images ``[n]`` in the memory.
        proposal: of each, as improved by the visit.
        better: ``[n]``; by the samples of the visit its ELBO was at least that of the encoder's.
        evaluations: of the decoder, ``[n]``, that the visit took.
    """

    index: Tensor
    proposal: FullGaussian
    better: Tensor
    evaluations: Tensor


class Refined(NamedTuple):
    """What some steps make of the proposals of n images.

    Attributes:
        proposal: after the last step.
        elbo: ``[n]``, nats; by the samples of the last step, so of the proposal before it.
        evaluations: of the decoder, ``[n]``.
    """

    proposal: FullGaussian
    elbo: Tensor
    evaluations: Tensor


class RememberedProposals:
    """A Gaussian with a full covariance for each of N images.

    The lower triangles are packed: ``4 N (D + D (D + 1) / 2)`` bytes in float32, 46 MB at D = 20
    and 1 GB at D = 100 for 50,000 images.

    Args:
        num_images: N.
        dim: D.
        device, dtype: of the memory.

    Raises:
        ConfigError: there is no room for it.
    """

    def __init__(self, num_images: int, dim: int, device: torch.device, dtype: torch.dtype) -> None:
        rows, columns = torch.tril_indices(dim, dim, device=device)
        self._triangle = rows * dim + columns  # places in a flat [D, D] matrix
        self.dim = dim
        self.known = torch.zeros(num_images, dtype=torch.bool, device=device)
        try:
            self.mean = torch.zeros(num_images, dim, device=device, dtype=dtype)
            self.scale = torch.zeros(num_images, len(rows), device=device, dtype=dtype)
        except RuntimeError as error:
            size = num_images * (dim + len(rows)) * dtype.itemsize / 1e9
            raise ConfigError(
                f"estimator.proposals=remembered: no room for {size:,.1f} GB on {device}, which "
                f"{num_images:,} images take at model.latent_dim={dim}; use a smaller one, or "
                "estimator.proposals=encoder"
            ) from error

    def of(self, index: Tensor, encoded: Gaussian) -> FullGaussian:
        """The proposals of the images at ``index [n]``; the encoder's where none is known."""
        start = FullGaussian.of(encoded)
        flat = start.mean.new_zeros(len(index), self.dim**2)
        scale = flat.index_copy_(1, self._triangle, self.scale[index]).view_as(start.scale)
        known = self.known[index][:, None]
        return FullGaussian(
            torch.where(known, self.mean[index], start.mean),
            torch.where(known[:, :, None], scale, start.scale),
        )

    def keep(self, lesson: Lesson) -> None:
        """Remember the proposals of a visit.

        One that was known before and has fallen behind the encoder's is forgotten: a young model
        may move further between two visits than a memory can follow.
        """
        index, proposal, better, _ = lesson
        self.known[index] = better | ~self.known[index]
        self.mean[index] = proposal.mean
        self.scale[index] = proposal.scale.flatten(1)[:, self._triangle]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"known": self.known, "mean": self.mean, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            RuntimeError: it is of other sizes.
        """
        for name, own in self.state_dict().items():
            value = state[name]
            if own.shape != value.shape:
                raise RuntimeError(
                    f"remembered proposals: {name} {list(value.shape)} in the place of "
                    f"{list(own.shape)}"
                )
            own.copy_(value)


def refine(
    model: VAE,
    images: Tensor,
    proposal: FullGaussian,
    generator: torch.Generator,
    *,
    num_samples: int,
    rate: float,
    most: int,
    gap: float,
) -> Refined:
    """Improve the proposals of images: all of them once, those that fit badly more often.

    How well one fits is told by the K samples of its step: the divergence of the proposal from the
    posterior is, on average, at least the gap between ``log (1/K) sum_k w_k`` and ``(1/K) sum_k log
    w_k``.

    Args:
        model: its decoder.
        images: ``[n, P]``.
        proposal: where to start from.
        generator: of the samples.
        num_samples: K, of a step.
        rate: r, see :func:`improve`; where a proposal fits already, half of it.
        most: steps, at least 1.
        gap: nats; a proposal goes on as long as its own gap is larger.
    """
    elbo = torch.empty_like(images[:, 0])
    evaluations = torch.zeros(len(images), dtype=torch.long, device=images.device)
    rows = torch.arange(len(images), device=images.device)
    for _ in range(most):
        before, chosen = proposal.rows(rows), images.index_select(0, rows)
        noise = draw_noise(model, chosen, num_samples, generator)
        z = before.transform(noise)
        log_joint, gradient = log_joint_gradient(model, chosen, z)
        log_weights = log_joint - before.noise_log_prob(noise, z)
        elbo[rows] = log_weights.mean(1)
        evaluations[rows] += num_samples
        log_mean_weight = log_weights.logsumexp(1) - math.log(num_samples)
        fits = log_mean_weight - elbo[rows] <= gap
        # What is left to learn where it fits is small beside the sampling error of a full step.
        after = improve(before, noise, gradient, torch.where(fits, rate / 2, rate))
        proposal = FullGaussian(
            *(whole.index_copy(0, rows, part) for whole, part in zip(proposal, after, strict=True))
        )
        rows = rows[~fits]
        if not len(rows):
            break
    return Refined(proposal, elbo, evaluations)


def log_joint_gradient(model: VAE, images: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """``log p(x, z)`` ``[n, K]``, and its gradient with respect to z ``[n, K, D]``."""
    z = z.detach().requires_grad_()
    with model.frozen_decoder(), torch.enable_grad():
        value = model.log_joint(images, z)
        (gradient,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), gradient


def improve(proposal: FullGaussian, noise: Tensor, gradient: Tensor, rate: Tensor) -> FullGaussian:
    """One step of the natural gradient of the ELBO, by least squares.

    Args:
        proposal: N(mu, S S^T), of n images.
        noise: xi, ``[n, K, D]`` with K >= 2, independent draws from N(0, I).
        gradient: of ``log p(x, z)`` at ``z = mu + S xi``, ``[n, K, D]``.
        rate: r of each image ``[n]``, in (0, 1/2]; the diagonal of S stays positive.
    """
    count = noise.shape[1]
    require(count >= 2, f"noise must have at least 2 samples, got {count}")
    h = gradient @ proposal.scale + noise
    mean_h, mean_noise = h.mean(1), noise.mean(1)
    centred = noise - mean_noise[:, None]
    ridge = centred @ centred.mT + torch.eye(count).to(noise)
    a = (h - mean_h[:, None]).mT @ torch.linalg.solve_ex(ridge, centred)[0]
    m = mean_h - (a @ mean_noise[:, :, None])[:, :, 0]
    a = (a + a.mT) / 2
    m = m * _cap(m.norm(dim=-1))[:, None]
    a = a * _cap(torch.linalg.matrix_norm(a))[:, None, None]
    lower = a.tril() - torch.diag_embed(a.diagonal(dim1=-2, dim2=-1)) / 2
    return FullGaussian(
        proposal.mean + (proposal.scale @ (rate[:, None] * m)[:, :, None])[:, :, 0],
        torch.baddbmm(proposal.scale, proposal.scale, rate[:, None, None] * lower),
    )


def _cap(norm: Tensor) -> Tensor:
    """The factor that brings a norm down to :data:`MAX_NORM` where it is larger."""
    return (MAX_NORM / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)
