r"""Probabilistic PCA (Tipping and Bishop 1999): a VAE whose log-likelihood is known exactly.

With a linear decoder ``x|z ~ N(b + W z, v I)`` everything is Gaussian. In terms of the posterior's
precision ``H = I + W^T W / v`` ``[D, D]`` and of ``r = x - b``,

    p(z|x) = N(m, H^-1),      m = H^-1 W^T r / v,
    log p(x) = -(P log(2 pi v) + log det H + |r - W m|^2 / v + |m|^2) / 2,

and the importance weight of ``z`` is ``p(x) p(z|x) / q(z|x)``. The experiments of Ruiz et al 2021,
Fig 2, 5 and 6, hold estimators against this model's exact gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ucvae.config import require
from ucvae.models.gaussians import LOG_2PI, Gaussian
from ucvae.models.likelihoods import GaussianLikelihood
from ucvae.models.vae import VAE


@dataclass
class Ppca:
    """Settings of probabilistic PCA with a linear Gaussian encoder.

    Its log-likelihood is a density of real-valued pixels: not to be compared with the
    probabilities that the other models give to bits or grey levels.

    Attributes:
        latent_dim: D.
        variance: of a pixel given z.
        train_decoder: false leaves W and b at their start, and trains the encoder alone.
    """

    latent_dim: int = 20
    variance: float = 0.1
    train_decoder: bool = True

    def __post_init__(self) -> None:
        require(self.latent_dim >= 1, f"latent_dim must be at least 1, got {self.latent_dim}")
        require(
            0 < self.variance < math.inf,
            f"variance must be positive and finite, got {self.variance}",
        )

    def build(self, train_mean: Tensor, levels: int) -> LinearGaussianVAE:
        """A random W, entries ``N(0, 1/D)``, with b the mean image and the encoder that fits them.

        The encoder starts at the posterior's own mean and standard deviations: what it lacks are
        the correlations. Draws from torch's global generator, as torch.nn does.

        Args:
            train_mean: mean training image in [0, 1], any shape of P pixels.
            levels: grey levels of the images; any will do.
        """
        likelihood = GaussianLikelihood(self.variance)
        decoder = nn.Linear(self.latent_dim, train_mean.numel())
        with torch.no_grad():
            decoder.weight.normal_(std=self.latent_dim**-0.5)
            decoder.bias.copy_(likelihood.initial_bias(train_mean.flatten()))
        decoder.requires_grad_(self.train_decoder)
        encoder = AffineEncoder(train_mean.numel(), self.latent_dim)
        model = LinearGaussianVAE(encoder, decoder, likelihood, self.latent_dim)
        model.fit_encoder()
        return model


class AffineEncoder(nn.Module):
    """An affine mean, and one standard deviation per latent dimension for all images."""

    def __init__(self, pixels: int, latent_dim: int) -> None:
        super().__init__()
        self.mean = nn.Linear(pixels, latent_dim)
        self.log_std = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, images: Tensor) -> Gaussian:
        """``q(z|x)`` of images ``[n, P]``."""
        mean = self.mean(images)
        return Gaussian(mean, self.log_std.exp().expand_as(mean))


class LinearGaussianVAE(VAE):
    """A VAE whose decoder is one linear layer and whose likelihood is Gaussian."""

    encoder: AffineEncoder
    decoder: nn.Linear
    likelihood: GaussianLikelihood

    def exact_log_likelihood(self, images: Tensor) -> Tensor:
        """``log p(x)`` of images ``[n, P]``; ``[n]``, nats, differentiable in the decoder."""
        variance = self.likelihood.variance
        factor = self._precision_factor()
        residual = images - self.decoder.bias
        mean = self._posterior_mean(images, factor)
        distance = (residual - mean @ self.decoder.weight.T).square().sum(-1) / variance
        log_det = 2 * factor.diagonal().log().sum() + images.shape[-1] * math.log(variance)
        constant = images.shape[-1] * LOG_2PI + log_det
        return -0.5 * (constant + distance + mean.square().sum(-1))

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[n, D]`` of ``p(z|x)``, and its covariance ``[D, D]``, the same for all images."""
        factor = self._precision_factor()
        return self._posterior_mean(images, factor), torch.cholesky_inverse(factor)

    @torch.no_grad()
    def fit_encoder(self) -> None:
        """Give the encoder the posterior's means and standard deviations."""
        weight, bias = self.decoder.weight, self.decoder.bias
        mean = self.encoder.mean
        covariance = torch.cholesky_inverse(self._precision_factor())
        mean.weight.copy_(covariance @ weight.T / self.likelihood.variance)
        mean.bias.copy_(-mean.weight @ bias)
        self.encoder.log_std.copy_(covariance.diagonal().log() / 2)

    def _precision_factor(self) -> Tensor:
        """The lower Cholesky factor of H, ``[D, D]``."""
        weight = self.decoder.weight
        identity = torch.eye(self.latent_dim, dtype=weight.dtype, device=weight.device)
        return torch.linalg.cholesky(identity + weight.T @ weight / self.likelihood.variance)

    def _posterior_mean(self, images: Tensor, factor: Tensor) -> Tensor:
        pull = (images - self.decoder.bias) @ self.decoder.weight / self.likelihood.variance
        return torch.cholesky_solve(pull.T, factor).T
