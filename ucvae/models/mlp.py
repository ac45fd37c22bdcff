"""Fully connected networks: the paper's (ReLU) and Burda's (tanh), one class for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ucvae.config import require
from ucvae.models.gaussians import Encoded, FullGaussian, Gaussian
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


class Initialization(Enum):
    """Of the weights of fully connected layers.

    ``torch`` is that of ``torch.nn.Linear``: weights and biases uniform within 1 / sqrt(inputs),
    a variance of 1 / (3 inputs). With the others biases start at 0: ``glorot`` is uniform with
    variance 2 / (inputs + outputs) (Glorot and Bengio 2010), ``lecun`` normal with variance
    1 / inputs (LeCun et al 1998), ``he`` normal with variance 2 / inputs (He et al 2015).
    """

    torch = "torch"
    glorot = "glorot"
    lecun = "lecun"
    he = "he"

    def start(self, model: nn.Module) -> None:
        """Draw the weights of the linear layers in ``model`` anew, from torch's generator.

        A layer whose weights are 0 stays as it is.
        """
        if self is Initialization.torch:  # as they are
            return
        draw: dict[Initialization, Callable[[Tensor], Tensor]] = {
            Initialization.glorot: nn.init.xavier_uniform_,
            Initialization.lecun: partial(nn.init.kaiming_normal_, nonlinearity="linear"),
            Initialization.he: partial(nn.init.kaiming_normal_, nonlinearity="relu"),
        }
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.weight.any():
                draw[self](layer.weight)
                nn.init.zeros_(layer.bias)


class Covariance(Enum):
    """Of the encoder's Gaussians."""

    diagonal = "diagonal"
    full = "full"


@dataclass
class Encoder:
    """Settings of an encoder that is more than the decoder's mirror image.

    Attributes:
        hidden: widths of the hidden layers; None for the decoder's in reverse.
        blocks: residual blocks after them, each of two layers of the last width.
        covariance: of ``q(z|x)``; a full one takes D (D - 1) / 2 outputs more.
    """

    hidden: list[int] | None = None
    blocks: int = 0
    covariance: Covariance = Covariance.diagonal

    def __post_init__(self) -> None:
        if self.hidden is not None:
            _require_widths(self.hidden)
        require(self.blocks >= 0, f"blocks must be at least 0, got {self.blocks}")


@dataclass
class Mlp:
    """Settings of a VAE whose encoder and decoder are, by default, mirror images of each other.

    Attributes:
        latent_dim: D.
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
        activation: of the hidden layers.
        encoder: where it differs. It runs once for an image where the decoder runs many times.
        initialization: of the weights. The decoder's last bias starts from the mean image anyway,
            and a full covariance from a diagonal one.
    """

    latent_dim: int = 20
    hidden: list[int] = field(default_factory=lambda: [200, 200])
    activation: Activation = Activation.relu
    encoder: Encoder = field(default_factory=Encoder)
    initialization: Initialization = Initialization.torch

    def __post_init__(self) -> None:
        require(self.latent_dim >= 1, f"latent_dim must be at least 1, got {self.latent_dim}")
        _require_widths(self.hidden)

    def build(self, train_mean: Tensor, levels: int) -> VAE:
        """A freshly initialised VAE; draws from torch's global generator, as torch.nn does.

        Args:
            train_mean: mean training image in [0, 1], any shape of P pixels; starts the
                decoder's bias.
            levels: grey levels of the images, which decide the likelihood.
        """
        likelihood = for_levels(levels)
        pixels = train_mean.numel()
        encoder = self._encoder(pixels)
        output = nn.Linear(self.hidden[0], pixels * likelihood.parameters_per_pixel)
        widths = [self.latent_dim, *reversed(self.hidden)]
        decoder = Layers(*_hidden(widths, self.activation), output)
        for network in (encoder, decoder):
            self.initialization.start(network)
        with torch.no_grad():
            output.bias.copy_(likelihood.initial_bias(train_mean.flatten()))
        return VAE(encoder, decoder, likelihood, self.latent_dim)

    def _encoder(self, pixels: int) -> GaussianEncoder:
        widths = self.encoder.hidden or self.hidden
        features: nn.Module = Layers(*_hidden([pixels, *widths], self.activation))
        if self.encoder.blocks:
            blocks = (Residual(widths[-1], self.activation) for _ in range(self.encoder.blocks))
            features = nn.Sequential(features, *blocks)
        return gaussian_encoder(features, widths[-1], self.latent_dim, self.encoder.covariance)


class GaussianEncoder(nn.Module):
    """Features, then a linear mean and a softplus standard deviation."""

    # Keeps log sigma finite where the softplus underflows; far below any width that training finds.
    min_std = 1e-6

    def __init__(self, features: nn.Module, width: int, latent_dim: int) -> None:
        super().__init__()
        self.features = features
        self.mean = nn.Linear(width, latent_dim)
        self.std = nn.Linear(width, latent_dim)

    def forward(self, images: Tensor) -> Encoded:
        """``q(z|x)`` of images ``[n, P]``."""
        return self.gaussian(self.features(images))

    def gaussian(self, features: Tensor) -> Encoded:
        """``q(z|x)`` by the features ``[n, width]`` of images."""
        return Gaussian(self.mean(features), F.softplus(self.std(features)) + self.min_std)


class FullGaussianEncoder(GaussianEncoder):
    """Correlations too: ``S = diag(sigma) (I + B)``, B strictly lower triangular and linear.

    B is 0 at the start, where the proposals are those of the diagonal encoder.
    """

    places: Tensor

    def __init__(self, features: nn.Module, width: int, latent_dim: int) -> None:
        super().__init__(features, width, latent_dim)
        rows, columns = torch.tril_indices(latent_dim, latent_dim, offset=-1)
        # Without draws, so that the rest of the model starts as it does beside a diagonal encoder.
        self.below = nn.utils.skip_init(nn.Linear, width, len(rows))
        nn.init.zeros_(self.below.weight)
        nn.init.zeros_(self.below.bias)
        # Places in a flat [D, D] matrix; known from D, and so not in checkpoints.
        self.register_buffer("places", rows * latent_dim + columns, persistent=False)

    def gaussian(self, features: Tensor) -> FullGaussian:
        """``q(z|x)`` by the features ``[n, width]`` of images."""
        mean, std = super().gaussian(features)
        flat = mean.new_zeros(len(mean), mean.shape[1] ** 2)
        below = flat.index_copy(1, self.places, self.below(features))
        scale = torch.diag_embed(std) + std[:, :, None] * below.unflatten(1, (mean.shape[1], -1))
        return FullGaussian(mean, scale)


def gaussian_encoder(
    features: nn.Module, width: int, latent_dim: int, covariance: Covariance
) -> GaussianEncoder:
    """An encoder by features ``[n, width]``, with the covariance that is asked for."""
    # In one dimension there is nothing to correlate.
    full = covariance is Covariance.full and latent_dim > 1
    return (FullGaussianEncoder if full else GaussianEncoder)(features, width, latent_dim)


class Residual(nn.Module):
    """``h + W_2 f(W_1 f(h) + b_1) + b_2``, f the activation (He et al 2016: pre-activation)."""

    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation.layer()
        self.layers = Layers(*_hidden([width, width], activation), nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """``[n, width]`` to the same."""
        return features + self.layers(self.activation(features))


def _hidden(widths: list[int], activation: Activation) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), activation.layer()]
    return layers


def _require_widths(widths: list[int]) -> None:
    require(
        len(widths) >= 1 and all(width >= 1 for width in widths),
        f"hidden must be a list of widths of at least 1, got {list(widths)}",
    )
