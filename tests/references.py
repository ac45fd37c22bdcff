"""A model whose every quantity is known in closed form, and the tests that decide "unbiased".

The rule of those tests: an estimate repeated many times gives batch means, whose distance from the
truth in standard errors is a t statistic of B - 1 degrees of freedom. The worst of the m components
is compared with the quantile that a correct estimator exceeds with probability ``FALSE_ALARM`` in
all (Bonferroni). Means of batches, not medians nor trimmed means: a signed estimator has heavy
tails, and its mean is what is claimed. A test of this kind is worth something only with a control
beside it, a wrong estimator that the same function rejects.
"""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from ucvae.chains import SignedParticles
from ucvae.models.vae import VAE, Gaussian

FALSE_ALARM = 1e-6


def is_unbiased(estimates: Tensor, truth: Tensor, batches: int = 50) -> bool:
    """Whether the mean of independent ``estimates [R, m]`` agrees with ``truth [m]``."""
    parts = estimates.tensor_split(min(batches, len(estimates)))
    means = torch.stack([part.mean(0) for part in parts])
    error = means.mean(0) - truth
    standard_error = means.std(0) / len(means) ** 0.5
    # A component that never varies must be exact, to rounding.
    floor = 1e-9 * (1 + truth.abs())
    worst = (error.abs() / (standard_error + floor)).max()
    limit = stats.t.isf(FALSE_ALARM / (2 * estimates.shape[1]), len(means) - 1)
    return bool(worst < limit)


def has_frequencies(counts: Tensor, probabilities: Tensor) -> bool:
    """Pearson's chi-square test of counts against exact probabilities, at ``FALSE_ALARM``."""
    possible = probabilities > 0
    if counts[~possible].any():
        return False
    expected = counts.sum() * probabilities[possible]
    assert expected.min() > 5, "too few draws for the test's distribution to hold"
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    return bool(statistic < stats.chi2.isf(FALSE_ALARM, int(possible.sum()) - 1))


def integrate(particles: SignedParticles, num_images: int, values: Tensor) -> Tensor:
    """``sum_i c_i values_i`` of each image, ``[n, m]``; values ``[G, K, m]`` at the particles."""
    terms = (particles.coefficient[:, :, None] * values).sum(1)
    total = torch.zeros(num_images, values.shape[-1], dtype=values.dtype)
    return total.index_add(0, particles.image_index, terms)


class GaussianLikelihood:
    """``x|z ~ N(decoder(z), scale^2 I)``."""

    parameters_per_pixel = 1

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def log_prob(self, images: Tensor, parameters: Tensor) -> Tensor:
        return Normal(parameters, self.scale).log_prob(images[:, None]).sum(-1)


class AffineEncoder(nn.Module):
    """An affine mean and one standard deviation for all images."""

    def __init__(self, pixels: int, dim: int) -> None:
        super().__init__()
        self.mean = nn.Linear(pixels, dim)
        self.log_std = nn.Parameter(torch.zeros(dim))

    def forward(self, images: Tensor) -> Gaussian:
        mean = self.mean(images)
        return Gaussian(mean, self.log_std.exp().expand_as(mean))


class LinearGaussian:
    """``z ~ N(0, I_D)``, ``x|z ~ N(theta_0 + Theta_1 z, s^2 I_P)``, as a VAE and in closed form.

    The encoder is the posterior made worse on purpose: its mean is moved by ``shift`` posterior
    standard deviations and its standard deviations are ``spread`` times the posterior's. A spread
    above 1 bounds the weights, so estimates have moments enough for a t statistic.
    """

    def __init__(
        self,
        dim: int = 2,
        pixels: int = 4,
        scale: float = 0.8,
        shift: float = 0.8,
        spread: float = 1.3,
    ) -> None:
        generator = torch.Generator().manual_seed(7)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.scale = scale
        decoder = nn.Linear(dim, pixels, dtype=torch.float64)
        encoder = AffineEncoder(pixels, dim).double()
        with torch.no_grad():
            decoder.weight.copy_(randn(pixels, dim) * 0.7)
            decoder.bias.copy_(randn(pixels) * 0.3)
            covariance = self._posterior_covariance(decoder.weight)
            gain = covariance @ decoder.weight.T / scale**2
            std = covariance.diagonal().sqrt()
            encoder.mean.weight.copy_(gain)
            encoder.mean.bias.copy_(-gain @ decoder.bias + shift * std)
            encoder.log_std.copy_((spread * std).log())
        self.model = VAE(encoder, decoder, GaussianLikelihood(scale), dim)
        self.images = randn(3, pixels)

    def _posterior_covariance(self, weight: Tensor) -> Tensor:
        precision = torch.eye(weight.shape[1]).to(weight) + weight.T @ weight / self.scale**2
        return torch.linalg.inv(precision)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> MultivariateNormal:
        """``p(z|x)`` of images ``[n, P]``."""
        weight, bias = self.model.decoder.weight, self.model.decoder.bias
        covariance = self._posterior_covariance(weight)
        return MultivariateNormal((images - bias) @ weight @ covariance / self.scale**2, covariance)

    def log_likelihood(self, images: Tensor) -> Tensor:
        """``log p(x)``, ``[n]``, differentiable in the decoder."""
        weight, bias = self.model.decoder.weight, self.model.decoder.bias
        covariance = weight @ weight.T + self.scale**2 * torch.eye(len(bias)).to(weight)
        return MultivariateNormal(bias, covariance).log_prob(images)

    def gradient(self, image: Tensor) -> Tensor:
        """The exact gradient of ``log p(x)`` of one image in (weight, bias), flat."""
        parameters = [self.model.decoder.weight, self.model.decoder.bias]
        value = self.log_likelihood(image[None]).sum()
        return flat(torch.autograd.grad(value, parameters))

    @torch.no_grad()
    def joint_gradient(self, image: Tensor, z: Tensor) -> Tensor:
        """``grad log p(x, z)`` in (weight, bias), written out: ``[..., P * D + P]``."""
        pull = (image - self.model.decoder(z)) / self.scale**2
        return torch.cat([(pull[..., :, None] * z[..., None, :]).flatten(-2), pull], dim=-1)

    def log_weight(self, image: Tensor):
        """The log weights of one image for the chains, whatever the number of its replicates."""
        proposal = self.model.encode(image[None]).detach()

        def of_noise(noise: Tensor, image_index: Tensor) -> Tensor:
            rows = proposal.rows(torch.zeros_like(image_index))
            return self.model.log_weight(image.expand(len(noise), -1), rows, noise)

        return of_noise

    @torch.no_grad()
    def transform(self, image: Tensor, noise: Tensor) -> Tensor:
        """``z`` of noise ``[..., D]`` for one image."""
        proposal = self.model.encode(image[None])
        return proposal.mean[0] + proposal.std[0] * noise

    @torch.no_grad()
    def to_noise(self, image: Tensor, z: Tensor) -> Tensor:
        """The inverse of :meth:`transform`."""
        proposal = self.model.encode(image[None])
        return (z - proposal.mean[0]) / proposal.std[0]


def flat(tensors) -> Tensor:
    """All entries of some tensors in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradients(scalar: Tensor, module: nn.Module) -> Tensor:
    """The gradient of a scalar in a module's parameters, flat; 0 where it has none."""
    parameters = list(module.parameters())
    parts = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
    return flat(
        torch.zeros_like(p) if part is None else part
        for p, part in zip(parameters, parts, strict=True)
    )
