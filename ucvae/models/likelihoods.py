r"""Pixel likelihoods ``p(x|z)``: what a decoder's output parameters mean.

Each likelihood says how many parameters a pixel has, how to start the decoder's bias from the mean
of the training images, the log-probability, and the mean image. Images are floats in ``[0, 1]``.
Log-probabilities are in nats, summed over all pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ucvae.models.layers import outer, product

# Of outputs that a CPU goes through at a time: 1 MiB of float32, which a core's own cache holds.
CACHE_NUMBERS = 2**18
# Scales of a logistic from its mean, beyond which nothing of it is left in float32 or float64.
FAR = 1e30


class Bernoulli:
    """Independent bits; the one parameter of a pixel is its logit."""

    parameters_per_pixel = 1

    def initial_bias(self, train_mean: Tensor) -> Tensor:
        """Logits of the mean image ``[P]``; pixels that never vary are kept off infinity."""
        return train_mean.clamp(1e-3, 1 - 1e-3).logit()

    def log_prob(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Log-probability of bits ``[n, P]`` under logits ``[n, k, P]``; shape ``[n, k]``.

        It differentiates once.
        """
        return _of_outputs(_bits_log_prob_, images, parameters)

    def log_prob_linear(self, images: Tensor, features: Tensor, linear: nn.Linear) -> Tensor:
        """``log_prob(images, linear(features))``, but for rounding, at a fraction of the cost.

        Args:
            images: bits ``[n, P]``.
            features: ``[n, k, H]``.
            linear: H to P.

        Returns:
            ``[n, k]``, nats; it differentiates once.
        """
        return _of_a_layer(_bits_log_prob_, images, features, linear)

    def mean(self, parameters: Tensor) -> Tensor:
        """Mean image ``[..., P]`` of logits ``[..., P]``."""
        return parameters.sigmoid()

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Bits ``[..., P]`` drawn with logits ``[..., P]``."""
        return torch.bernoulli(parameters.sigmoid(), generator=generator)


# From images ``[n, P]`` and what a decoder puts out for them, ``[n, k, ...]``, to log-probabilities
# ``[n, k]``. May overwrite the outputs; if their gradient is asked for, it takes their place.
LogProb = Callable[[Tensor, Tensor, bool], Tensor]


def _of_outputs(log_prob_: LogProb, images: Tensor, outputs: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return _OfOutputs.apply(log_prob_, images, outputs)
    return _in_parts(log_prob_, images, _copy(outputs), False)


class _OfOutputs(torch.autograd.Function):
    """The log-probability under given outputs; of their size, their gradient alone is kept."""

    @staticmethod
    def forward(ctx: Any, log_prob_: LogProb, images: Tensor, outputs: Tensor) -> Tensor:
        gradient = _copy(outputs)
        ctx.save_for_backward(gradient)
        return _in_parts(log_prob_, images, gradient, True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, None, gradient * grad[:, :, None]


def _copy(outputs: Tensor) -> Tensor:
    return outputs.clone(memory_format=torch.contiguous_format)


def _of_a_layer(log_prob_: LogProb, images: Tensor, features: Tensor, linear: nn.Linear) -> Tensor:
    weight, bias = linear.weight, linear.bias
    if torch.is_grad_enabled():
        return _OfALayer.apply(log_prob_, images, features, weight, bias)
    count = len(images)
    if images.device.type == "cpu":
        # A product of fewer rows than the layer has inputs takes as long as to read the weights.
        numbers = max(CACHE_NUMBERS, weight.numel())
        count = max(1, numbers // (features.shape[1] * len(weight)))
    parts = zip(images.split(count), features.split(count), strict=True)
    return torch.cat([_in_parts(log_prob_, x, _outputs(h, weight, bias), False) for x, h in parts])


class _OfALayer(torch.autograd.Function):
    r"""The log-probability under a linear layer's outputs ``l = W h + b``, as one operation.

    With ``r`` the gradient with respect to ``l`` (for bits the residual ``x - sigmoid(l)``) and
    ``g`` the gradient that arrives,

        dh = g (r W),    dW = r^T (g h),    db = g r,

    so that of all that is as wide as the outputs ``r`` alone is kept, in their place, and ``g``
    scales what is H wide.
    """

    @staticmethod
    def forward(
        ctx: Any,
        log_prob_: LogProb,
        images: Tensor,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        outputs = _outputs(features, weight, bias)
        ctx.save_for_backward(features, weight, outputs)
        return _in_parts(log_prob_, images, outputs, True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, residual = ctx.saved_tensors
        _, _, wants_features, wants_weight, wants_bias = ctx.needs_input_grad
        scale, residual = grad[:, :, None], residual.flatten(0, 1)
        return (
            None,
            None,
            product(residual, weight).view_as(features) * scale if wants_features else None,
            outer(residual, (features * scale).flatten(0, 1)) if wants_weight else None,
            grad.flatten() @ residual if wants_bias else None,
        )


def _outputs(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return product(features.flatten(0, 1), weight.T, bias).unflatten(0, features.shape[:2])


def _bits_log_prob_(images: Tensor, logits: Tensor, gradient: bool) -> Tensor:
    """Of bits under logits: ``softplus(l) = relu(l) - log max(sigma, 1 - sigma)``.

    The logarithm's argument is in ``[1/2, 1]``: one logarithm will do for the product of several,
    off by one rounding of each.
    """
    scratch = logits.relu()  # the one temporary of its size: fresh memory is slow
    linear = scratch.addcmul_(images[:, None], logits, value=-1).sum(-1)
    sigma = logits.sigmoid_()
    likelier = torch.sub(sigma.new_ones(()), sigma, out=scratch)
    torch.maximum(likelier, sigma, out=likelier)
    if gradient:
        torch.sub(images[:, None], sigma, out=logits)
    together = max(d for d in range(1, 9) if logits.shape[-1] % d == 0)
    return likelier.unflatten(-1, (together, -1)).prod(-2).log_().sum(-1) - linear


def _in_parts(log_prob_: LogProb, images: Tensor, outputs: Tensor, gradient: bool) -> Tensor:
    """The log-probability ``[n, k]``, in parts that stay in a CPU's cache; on a GPU in one."""
    if images.device.type != "cpu":
        return log_prob_(images, outputs, gradient)
    rows = max(1, CACHE_NUMBERS // outputs.shape[-1])
    count = max(1, rows // outputs.shape[1])
    return torch.cat(
        [
            torch.cat([log_prob_(x, some, gradient) for some in part.split(rows, dim=1)], dim=1)
            for x, part in zip(images.split(count), outputs.split(count), strict=True)
        ]
    )


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
    max_log_scale = 50.0  # from 84 on the gradient is infinite in float32

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

        It differentiates once.

        Args:
            images: pixels in [0, 1].
            parameters: ``[n, k, P * 3 * M]``.
        """
        return _of_outputs(self._log_prob_, images, parameters)

    def log_prob_linear(self, images: Tensor, features: Tensor, linear: nn.Linear) -> Tensor:
        """``log_prob(images, linear(features))``, but for rounding, in less memory.

        Args:
            images: pixels in [0, 1], ``[n, P]``.
            features: ``[n, k, H]``.
            linear: H to P * 3 * M.

        Returns:
            ``[n, k]``, nats; it differentiates once.
        """
        return _of_a_layer(self._log_prob_, images, features, linear)

    def _log_prob_(self, images: Tensor, parameters: Tensor, gradient: bool) -> Tensor:
        """See ``LogProb``; with ``softplus(t) = max(t, 0) - log S(|t|)`` a component has one log.

        Inside, components come first: torch is fastest along what lies side by side.
        """
        rows = parameters.view(-1, self.parameters_per_pixel)
        planes = rows.t().contiguous()
        shape = (3, self.num_components, *parameters.shape[:2], images.shape[-1])
        logits, means, log_scales = planes.view(shape)
        x = images[:, None]
        # The end levels own a tail: an end so far away takes no part in what follows.
        at_top, at_bottom = (x > 1 - 1e-3).to(x), (x < 1e-3).to(x)
        clamped = log_scales.clamp(self.min_log_scale, self.max_log_scale)
        inverse_scale = clamped.neg().exp_()
        half_width = inverse_scale / 255
        middle = (2 * x - 1 - means).mul_(inverse_scale)
        upper = (middle + half_width).add_(FAR * at_top)
        lower = middle.sub_(half_width).sub_(FAR * at_bottom)
        gap = torch.mul(half_width, -2).expm1_().neg_()
        torch.maximum(gap, at_top + at_bottom, out=gap)
        joint = upper.abs().sigmoid_().mul_(lower.abs().sigmoid_()).mul_(gap).log_()
        joint.add_(upper.clamp(max=0)).sub_(lower.clamp(min=0))
        joint.add_(logits - logits.amax(0))  # their size would cost digits
        # logsumexp = max - log(max softmax), and the gradients need the softmax.
        share, prior = joint.softmax(0), logits.softmax(0)
        value = joint.amax(0) + (prior.amax(0) / share.amax(0)).log_()
        if gradient:
            torch.sub(share, prior, out=logits)
            below, above = upper.neg().sigmoid_(), lower.sigmoid()
            torch.sub(above, below, out=means).mul_(inverse_scale).mul_(share)
            by_width = half_width.mul_(2).mul_(1 - gap).div_(gap)
            by_log_scale = above.mul_(lower).sub_(below.mul_(upper)).sub_(by_width).mul_(share)
            torch.mul(by_log_scale, log_scales == clamped, out=log_scales)
            rows.copy_(planes.t())
        return value.sum(-1)

    def mean(self, parameters: Tensor) -> Tensor:
        """Mean image ``[..., P]``, leaving out what discretisation does at the ends."""
        logits, means, _ = self._split(parameters)
        mean = (torch.softmax(logits, -1) * means.clamp(-1, 1)).sum(-1)
        return (mean + 1) / 2

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Images ``[..., P]``, multiples of 1/255, of ``parameters [..., P * 3 * M]``."""
        logits, means, log_scales = self._split(parameters)
        weights = torch.softmax(logits, -1).flatten(0, -2)
        chosen = torch.multinomial(weights, 1, generator=generator).view(*logits.shape[:-1], 1)
        mean, log_scale = (part.gather(-1, chosen)[..., 0] for part in (means, log_scales))
        uniform = torch.empty_like(mean).uniform_(generator=generator)
        x = mean + log_scale.exp() * uniform.logit(1e-7)
        # A level owns the values that are nearest to it, and the end levels what lies beyond.
        return ((x.clamp(-1, 1) + 1) / 2 * 255).round() / 255

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shaped = parameters.unflatten(-1, (-1, 3, self.num_components))
        logits, means, log_scales = shaped.unbind(-2)
        return logits, means, log_scales.clamp(self.min_log_scale, self.max_log_scale)


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

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Images ``[..., P]`` about means ``[..., P]``."""
        noise = torch.empty_like(parameters).normal_(generator=generator)
        return parameters + self.variance**0.5 * noise


Likelihood = Bernoulli | LogisticMixture | GaussianLikelihood


def for_levels(levels: int) -> Bernoulli | LogisticMixture:
    """The likelihood of images with so many grey levels: Bernoulli for bits, else the mixture."""
    return Bernoulli() if levels == 2 else LogisticMixture()
