"""Fully connected networks: the paper's (ReLU) and Burda's (tanh), one class for both."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ucvae.config import require
from ucvae.models.gaussians import Gaussian
from ucvae.models.layers import Layers
from ucvae.models.likelihoods import for_levels
from ucvae.models.vae import VAE


class Activation(Enum):
    """Non-linearity of the hidden layers."""

    relu = "relu"
    tanh = "tanh"

    def layer(self) -> nn.Module:
        """A module of this non-linearity."""
        return {"relu": nn.ReLU, "tanh": nn.Tanh}[self.value]()


@dataclass
class Mlp:
    """Settings of a VAE whose encoder and decoder are mirror images of each other.

    Attributes:
        latent_dim: D.
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
        activation: of the hidden layers.
    """

    latent_dim: int = 20
    hidden: list[int] = field(default_factory=lambda: [200, 200])
    activation: Activation = Activation.relu

    def __post_init__(self) -> None:
        require(self.latent_dim >= 1, f"latent_dim must be at least 1, got {self.latent_dim}")
        require(
            len(self.hidden) >= 1 and all(width >= 1 for width in self.hidden),
            f"hidden must be a list of widths of at least 1, got {list(self.hidden)}",
        )

    def build(self, train_mean: Tensor, levels: int) -> VAE:
        """A freshly initialised VAE; draws from torch's global generator, as torch.nn does.

        Args:
            train_mean: mean training image in [0, 1], any shape of P pixels; starts the
                decoder's bias.
            levels: grey levels of the images, which decide the likelihood.
        """
        likelihood = for_levels(levels)
        pixels = train_mean.numel()
        encoder = GaussianEncoder(
            Layers(*_hidden([pixels, *self.hidden], self.activation)),
            self.hidden[-1],
            self.latent_dim,
        )
        output = nn.Linear(self.hidden[0], pixels * likelihood.parameters_per_pixel)
        with torch.no_grad():
            output.bias.copy_(likelihood.initial_bias(train_mean.flatten()))
        widths = [self.latent_dim, *reversed(self.hidden)]
        decoder = Layers(*_hidden(widths, self.activation), output)
        return VAE(encoder, decoder, likelihood, self.latent_dim)


class GaussianEncoder(nn.Module):
    """Features, then a linear mean and a softplus standard deviation."""

    # Keeps log sigma finite where the softplus underflows; far below any width that training finds.
    min_std = 1e-6

    def __init__(self, features: nn.Module, width: int, latent_dim: int) -> None:
        super().__init__()
        self.features = features
        self.mean = nn.Linear(width, latent_dim)
        self.std = nn.Linear(width, latent_dim)

    def forward(self, images: Tensor) -> Gaussian:
        """``q(z|x)`` of images ``[n, P]``."""
        features = self.features(images)
        return Gaussian(self.mean(features), F.softplus(self.std(features)) + self.min_std)


def _hidden(widths: list[int], activation: Activation) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), activation.layer()]
    return layers
