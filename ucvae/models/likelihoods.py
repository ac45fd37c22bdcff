r"""Pixel likelihoods ``p(x|z)``: what a decoder's output parameters mean.

Each likelihood says how many parameters a pixel has, how to start the decoder's bias from the mean
of the training images, the log-probability, and the mean image. Images are floats in ``[0, 1]``.
Log-probabilities are in nats, summed over all pixels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Bernoulli:
    """Independent bits; the one parameter of a pixel is its logit."""

    parameters_per_pixel = 1

    def initial_bias(self, train_mean: Tensor) -> Tensor:
        """Logits of the mean image ``[P]``; pixels that never vary are kept off infinity."""
        return train_mean.clamp(1e-3, 1 - 1e-3).logit()

    def log_prob(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Log-probability of bits ``[n, P]`` under logits ``[n, k, P]``; shape ``[n, k]``."""
        return _BernoulliLogProb.apply(images, parameters)

    def mean(self, parameters: Tensor) -> Tensor:
        """Mean image ``[..., P]`` of logits ``[..., P]``."""
        return parameters.sigmoid()


class _BernoulliLogProb(torch.autograd.Function):
    """``sum_p x_p l_p - softplus(l_p)``, with the gradient ``x - sigmoid(l)`` written out.

    ``log(1 + e)`` with ``e = exp(-|l|) <= 1`` is off by one rounding of a number below 2, an
    absolute error of 1e-7 a pixel, and six times faster on a CPU than ``log1p``.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(images, logits)
        softplus = logits.abs().neg_().exp_().add_(1).log_().sum(-1) + logits.relu().sum(-1)
        return torch.bmm(logits, images[:, :, None])[:, :, 0] - softplus

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        images, logits = ctx.saved_tensors
        return None, (images[:, None] - logits.sigmoid()).mul_(grad[:, :, None])


class LogisticMixture:
    r"""Mixture of discretised logistics on 256 levels (Salimans et al 2017, PixelCNN++).

    A pixel has, for each component, a mixture logit, a mean and a log scale, on the scale where
    levels 0 and 255 are -1 and 1. Level v owns the interval of half-width 1/255 about it, and the
    end levels own the tails, so the 256 probabilities add up to 1. With ``a < b`` the interval's
    standardised ends,

        log(S(b) - S(a)) = -softplus(-b) - softplus(a) + log(1 - exp(a - b)),

    S the logistic function: exact everywhere, where the usual difference of two sigmoids needs a
    fallback to the density.
    """

    min_log_scale = -7.0

    def __init__(self, num_components: int = 10) -> None:
        self.num_components = num_components

    @property
    def parameters_per_pixel(self) -> int:
        """Mixture logit, mean and log scale of each component."""
        return 3 * self.num_components

    def initial_bias(self, train_mean: Tensor) -> Tensor:
        """Equal weights, means spread about the mean image ``[P]``; shape ``[P * 3 * M]``."""
        spread = torch.linspace(-0.5, 0.5, self.num_components).to(train_mean)
        means = (2 * train_mean - 1)[:, None] + spread
        log_scales = torch.full_like(means, math.log(0.15))
        return torch.stack([torch.zeros_like(means), means, log_scales], dim=-2).flatten()

    def log_prob(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Log-probability of images ``[n, P]`` (multiples of 1/255); shape ``[n, k]``.

        Args:
            images: pixels in [0, 1].
            parameters: ``[n, k, P * 3 * M]``.
        """
        logits, means, log_scales = self._split(parameters)
        x = images[:, None, :, None]
        inverse_scale = torch.exp(-log_scales)
        middle = (2 * x - 1 - means) * inverse_scale
        half_width = inverse_scale / 255
        below_upper = torch.where(x < 1 - 1e-3, -F.softplus(-(middle + half_width)), 0.0)
        above_lower = torch.where(x > 1e-3, -F.softplus(middle - half_width), 0.0)
        inner = (x > 1e-3) & (x < 1 - 1e-3)
        gap = torch.where(inner, torch.log(-torch.expm1(-2 * half_width)), 0.0)
        component = below_upper + above_lower + gap
        return torch.logsumexp(component + torch.log_softmax(logits, -1), dim=-1).sum(-1)

    def mean(self, parameters: Tensor) -> Tensor:
        """Mean image ``[..., P]``, leaving out what discretisation does at the ends."""
        logits, means, _ = self._split(parameters)
        mean = (torch.softmax(logits, -1) * means.clamp(-1, 1)).sum(-1)
        return (mean + 1) / 2

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shaped = parameters.unflatten(-1, (-1, 3, self.num_components))
        logits, means, log_scales = shaped.unbind(-2)
        return logits, means, log_scales.clamp(min=self.min_log_scale)


class GaussianLikelihood:
    """Real-valued pixels with one variance for all; the one parameter of a pixel is its mean."""

    parameters_per_pixel = 1

    def __init__(self, variance: float) -> None:
        self.variance = variance

    def initial_bias(self, train_mean: Tensor) -> Tensor:
        """The mean image ``[P]`` itself."""
        return train_mean

    def log_prob(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Log-density of images ``[n, P]`` under means ``[n, k, P]``; shape ``[n, k]``."""
        distance = (images[:, None] - parameters).square().sum(-1) / self.variance
        return -0.5 * (distance + images.shape[-1] * math.log(2 * math.pi * self.variance))

    def mean(self, parameters: Tensor) -> Tensor:
        """Mean image ``[..., P]``; it may leave [0, 1]."""
        return parameters


Likelihood = Bernoulli | LogisticMixture | GaussianLikelihood


def for_levels(levels: int) -> Bernoulli | LogisticMixture:
    """The likelihood of images with so many grey levels: Bernoulli for bits, else the mixture."""
    return Bernoulli() if levels == 2 else LogisticMixture()
