r"""Gaussians with full covariances, fitted to the posteriors of images by natural gradients.

An encoder answers for all images at once. Here one image's Gaussian
``N(mu, S S^T)`` takes natural-gradient steps of its ELBO, with the decoder as it is. With ``xi ~
N(0, I)`` and ``z = mu + S xi``,

    h = grad_xi log w = S^T grad_z log p(x, z) + xi

is the gradient along the sample's path alone (Roeder, Wu and Duvenaud 2017); it vanishes for every
xi where the Gaussian is the posterior. The natural gradients are ``m = E[h]`` of the mean and ``A =
E[h xi^T]`` (symmetric, by Stein's identity the mean Hessian of log p plus I) of the covariance, in
the coordinates of the Gaussian. Where the posterior is Gaussian, ``h = m + A xi`` exactly. So m and
A are fitted to a few samples by least squares, A with a ridge of one observation: it is found
exactly along the directions that the samples span, where an average of ``h xi^T`` would have the
sampling error of ``xi xi^T`` besides. Fewer samples than dimensions leave A open, and one ridge for
all would spread it over the columns alike. But A is symmetric: where h_j is small, so is column j.
So the ridge of a column is inverse to the root mean square of h_j over the samples, which are
centred, and where that is the mean over all columns it is one observation. A model of D = 100
leaves most dimensions unused, with the prior for their posterior: their columns then take no part.
A step of length r is

    mu <- mu + r S m,       S <- S (I + r L),

where L is A's lower triangle with half its diagonal, so that ``S S^T`` moves along ``S A S^T`` to
first order in r.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ucvae.config import require
from ucvae.models.gaussians import FullGaussian
from ucvae.models.layers import round_number
from ucvae.models.vae import VAE, draw_noise

# Of m and A in one step, in units of the proposal's own width: far from the posterior h is huge.
MAX_NORM = 3.0


class Refined(NamedTuple):
    """What some steps make of the proposals of n images.

    Attributes:
        proposal: after the last step.
        elbo: ``[n]``, nats; by the samples of the last step, so of the proposal before it. Where it
            fell short of the step before, which ended the visit, it is too low on average.
        evaluations: of the decoder, ``[n]``.
    """

    proposal: FullGaussian
    elbo: Tensor
    evaluations: Tensor


def refine(
    model: VAE,
    images: Tensor,
    proposal: FullGaussian,
    generator: torch.Generator,
    *,
    num_samples: int,
    rate: float,
    most: int,
    gap: float | None,
    first: int | None = None,
) -> Refined:
    """Improve the proposals of images: all of them once, those that fit badly more often.

    How well one fits is told by the samples of its step: the divergence of the proposal from the
    posterior is, on average, at least the gap between ``log (1/K) sum_k w_k`` and ``(1/K) sum_k log
    w_k``. Where the posterior is no Gaussian the gap stays open. So a proposal goes on only as long
    as its ELBO, by the samples of each step, rises: one that has nothing left to gain takes e - 1 =
    1.7 further steps on average, as many as independent values rise in a row.

    Args:
        model: its decoder.
        images: ``[n, P]``.
        proposal: where to start from.
        generator: of the samples.
        num_samples: K, of a step.
        rate: r, see :func:`improve`; half of it in a step that closes the gap or falls short.
        most: steps, at least 1.
        gap: nats; a proposal goes on only while its own gap is larger and its ELBO rises. None: all
            of them take all the steps.
        first: samples of the first step, where not K: for most proposals it is the only one.
    """
    elbo = torch.empty_like(images[:, 0])
    evaluations = torch.zeros(len(images), dtype=torch.long, device=images.device)
    rows = torch.arange(len(images), device=images.device)
    before, chosen = proposal, images
    for step in range(1, most + 1):
        count = first if first is not None and step == 1 else num_samples
        noise = draw_noise(model, chosen, count, generator)
        z = before.transform(noise)
        log_joint, gradient = log_joint_gradient(model, chosen, z)
        log_weights = log_joint - before.noise_log_prob(noise, z)
        bound = log_weights.mean(1)
        gaps = log_weights.logsumexp(1) - math.log(count) - bound
        settled = torch.zeros_like(gaps, dtype=torch.bool)
        if gap is not None:
            settled = gaps <= gap
            if step > 1:  # at the first there is nothing to fall short of, were it minus infinity
                settled |= bound <= elbo[rows]
        elbo[rows] = bound
        evaluations[rows] += count
        # What is left to learn where it ends is small beside the sampling error of a full step.
        after = improve(before, noise, gradient, torch.where(settled, rate / 2, rate))
        if step == 1:
            proposal = after
        else:
            for whole, part in zip(proposal, after, strict=True):
                whole.index_copy_(0, rows, part)
        if step == most:
            break
        # One wait for the device: how many proposals go on.
        left = int((~settled).sum())
        if not left:
            break
        # Others go on with them, to a round number: a step does them no harm.
        chances = gaps.masked_fill(settled, -1)
        rows = rows[chances.topk(min(round_number(left), len(rows))).indices]
        before, chosen = proposal.rows(rows), images.index_select(0, rows)
    return Refined(proposal, elbo, evaluations)


def log_joint_gradient(model: VAE, images: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """``log p(x, z)`` ``[n, K]``, and its gradient with respect to z ``[n, K, D]``."""
    z = z.detach().requires_grad_()
    with model.frozen_decoder(), torch.enable_grad():
        value = model.log_joint(images, z)
        (gradient,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), gradient


def improve(
    proposal: FullGaussian,
    noise: Tensor,
    gradient: Tensor,
    rate: Tensor,
    drawn: Tensor | None = None,
) -> FullGaussian:
    """One step of the natural gradient of the ELBO, by least squares.

    Args:
        proposal: N(mu, S S^T), of n images.
        noise: xi, ``[n, K, D]`` with K >= 2, independent draws from N(0, I), or from a wider one.
        gradient: of ``log p(x, z)`` at ``z = mu + S xi``, ``[n, K, D]``.
        rate: r of each image ``[n]``, in [0, 1/2]; the diagonal of S stays positive.
        drawn: which of the samples are such draws, ``[n, K]``; others are left out, and images
            without any need a rate of 0. None: all of them.
    """
    count = noise.shape[1]
    require(count >= 2, f"noise must have at least 2 samples, got {count}")
    h = proposal.pull_back(gradient) + noise
    if drawn is None:
        mean_h, mean_noise = h.mean(1, keepdim=True), noise.mean(1, keepdim=True)
        left, right = h - mean_h, noise - mean_noise
    else:
        others, number = ~drawn[:, :, None], drawn.sum(1).clamp(min=1)[:, None, None]
        mean_h = h.masked_fill(others, 0).sum(1, keepdim=True) / number
        mean_noise = noise.masked_fill(others, 0).sum(1, keepdim=True) / number
        left = (h - mean_h).masked_fill(others, 0)
        right = (noise - mean_noise).masked_fill(others, 0)
    # Of h in units of a power of 2 near its largest entry, which is exact: the square of a huge one
    # would be infinite in float32. And never below what rounding leaves where its terms cancel.
    info = torch.finfo(left.dtype)
    largest = left.abs().amax((1, 2)).clamp(min=info.tiny)
    unit = torch.ldexp(torch.ones_like(largest), largest.frexp().exponent - 1)
    left = left / unit[:, None, None]
    # The columns of A are taken to be as large as its rows are, of which h tells.
    size = left.square().mean(1, keepdim=True).sqrt()
    likely = right * (size / size.mean(2, keepdim=True).clamp(min=info.tiny))
    ridge = likely @ right.mT + torch.eye(count, dtype=noise.dtype, device=noise.device)
    right = torch.linalg.solve_ex(ridge, likely)[0]
    # A is the symmetric part of left^T right: of rank 2 K, so that its norm needs K x K products.
    m = (mean_h - (mean_noise @ right.mT) @ left * unit[:, None, None])[:, 0]
    cross = left @ right.mT
    whole = (left @ left.mT * (right @ right.mT)).sum((1, 2))
    square = torch.maximum(whole + (cross * cross.mT).sum((1, 2)), 32 * info.eps * whole) / 2
    m = m * (rate * _cap(m.norm(dim=-1)))[:, None]
    left = left * (unit * rate * _cap(unit * square.clamp(min=0).sqrt()) / 2)[:, None, None]
    # One pass over what is D x D: A's lower triangle, and half of its diagonal.
    dim = noise.shape[2]
    triangle = noise.new_ones(dim, dim).tril_().fill_diagonal_(0.5)
    lower = (torch.cat([left, right], 1).mT @ torch.cat([right, left], 1)).mul_(triangle)
    return FullGaussian(
        proposal.mean + (proposal.scale @ m[:, :, None])[:, :, 0],
        torch.baddbmm(proposal.scale, proposal.scale, lower),
    )


def _cap(norm: Tensor) -> Tensor:
    """The factor that brings a norm down to :data:`MAX_NORM` where it is larger."""
    return (MAX_NORM / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)
