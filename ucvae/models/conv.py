r"""Convolutional networks for images in colour: those of Ruiz et al 2021 for CIFAR-10.

The paper's decoder is "fully connected to 16x16x1", then three transposed convolutions of 200, 50
and 30 channels, 4x4 with stride 2; its encoder has convolutions of 64, 128 and 512 channels and
128 units after them. Two things in it cannot be taken literally.

- Three strides of 2 lead from 16x16 to 128x128, not to the 32x32 of the images. Here the 256 units
  are 16 maps of 4x4, so that the strides and kernels are those of the text and the decoder goes
  through the encoder's sizes backwards, 4 - 8 - 16 - 32. To keep one map of 16x16 instead, only one
  of the strides can be 2: ``start_maps=1, strides=[1, 1, 2]``, at twice the cost.
- 30 channels are the mixture of 10 logistics, each with weight, mean and scale, of one value. A
  pixel has three, red, green and blue, and here a mixture for each: 90 channels. Given z its
  colours are independent; Salimans et al 2017 make green depend on red, and blue on both.

A kernel of 4 with a padding of 1 doubles a size exactly at stride 2, and exceeds it by one at
stride 1. What is too much, there and where a size is no multiple of the strides, is cut off at the
right and at the bottom. So images of other sizes fit too: 28x28 starts from maps of 4x4, which
become 7, 14 and 28 wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ucvae.config import require
from ucvae.errors import ConfigError
from ucvae.models.likelihoods import Likelihood, for_levels
from ucvae.models.mlp import Activation, Covariance, gaussian_encoder
from ucvae.models.vae import VAE

# Of all convolutions: 4x4, with so much padding.
KERNEL = 4
PADDING = 1


@dataclass
class ConvEncoder:
    """Settings of the encoder.

    Attributes:
        channels: of its convolutions, each of stride 2.
        hidden: units of the fully connected layer after them.
        covariance: of ``q(z|x)``; a full one takes D (D - 1) / 2 outputs more.
    """

    channels: list[int] = field(default_factory=lambda: [64, 128, 512])
    hidden: int = 128
    covariance: Covariance = Covariance.diagonal

    def __post_init__(self) -> None:
        _require_counts("channels", self.channels)
        require(self.hidden >= 1, f"hidden must be at least 1, got {self.hidden}")


@dataclass
class ConvDecoder:
    """Settings of the decoder.

    Attributes:
        start_maps: of the fully connected layer, the first that are convolved.
        channels: of its transposed convolutions, but for the last, whose channels are the
            likelihood's parameters.
        strides: of all of them, 1 or 2 each.
    """

    start_maps: int = 16
    channels: list[int] = field(default_factory=lambda: [200, 50])
    strides: list[int] = field(default_factory=lambda: [2, 2, 2])

    def __post_init__(self) -> None:
        require(self.start_maps >= 1, f"start_maps must be at least 1, got {self.start_maps}")
        _require_counts("channels", self.channels)
        require(
            len(self.strides) == len(self.channels) + 1
            and all(stride in (1, 2) for stride in self.strides),
            f"strides must be a list of {len(self.channels) + 1} numbers, 1 or 2, one more than "
            f"channels, got {list(self.strides)}",
        )


@dataclass
class Conv:
    """Settings of a VAE of convolutions.

    Attributes:
        latent_dim: D.
        activation: of all hidden layers.
        encoder: its own settings.
        decoder: its own settings.
    """

    latent_dim: int = 100
    activation: Activation = Activation.relu
    encoder: ConvEncoder = field(default_factory=ConvEncoder)
    decoder: ConvDecoder = field(default_factory=ConvDecoder)

    def __post_init__(self) -> None:
        require(self.latent_dim >= 1, f"latent_dim must be at least 1, got {self.latent_dim}")

    def build(self, train_mean: Tensor, levels: int) -> VAE:
        """A freshly initialised VAE; draws from torch's global generator, as torch.nn does.

        Args:
            train_mean: mean training image in [0, 1], ``[C, H, W]``; the mean of each colour
                starts the decoder's bias.
            levels: grey levels of the images, which decide the likelihood.

        Raises:
            ConfigError: the images are too small for the encoder's strides.
        """
        require(train_mean.ndim == 3, f"train_mean must be [C, H, W], got {list(train_mean.shape)}")
        side = 2 ** len(self.encoder.channels)
        if min(train_mean.shape[1:]) < side:
            height, width = train_mean.shape[1:]
            raise ConfigError(
                f"model=conv: {len(self.encoder.channels)} convolutions of stride 2 "
                f"(model.encoder.channels) need images of at least {side}x{side} pixels, got "
                f"{height}x{width}"
            )
        likelihood = for_levels(levels)
        encoder = gaussian_encoder(
            self._features(train_mean.shape),
            self.encoder.hidden,
            self.latent_dim,
            self.encoder.covariance,
        )
        decoder = ImageDecoder(
            self.latent_dim, train_mean, self.decoder, self.activation, likelihood
        )
        return VAE(encoder, decoder, likelihood, self.latent_dim)

    def _features(self, shape: torch.Size) -> nn.Sequential:
        colours, height, width = shape
        layers: list[nn.Module] = [nn.Unflatten(1, shape)]
        widths = [colours, *self.encoder.channels]
        for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(inputs, outputs, KERNEL, 2, PADDING), self.activation.layer()]
            height, width = height // 2, width // 2
        dense = nn.Linear(widths[-1] * height * width, self.encoder.hidden)
        return nn.Sequential(*layers, nn.Flatten(), dense, self.activation.layer())


class ImageDecoder(nn.Module):
    """A fully connected layer, then transposed convolutions up to the size of the image.

    Args:
        latent_dim: D.
        train_mean: ``[C, H, W]`` in [0, 1].
        settings: maps, channels and strides.
        activation: before each convolution.
        likelihood: whose parameters are the result.

    Attributes:
        widest: numbers that the largest layer gives for one z.
    """

    def __init__(
        self,
        latent_dim: int,
        train_mean: Tensor,
        settings: ConvDecoder,
        activation: Activation,
        likelihood: Likelihood,
    ) -> None:
        super().__init__()
        colours, *size = train_mean.shape
        sizes = [tuple(size)]
        for stride in reversed(settings.strides):
            sizes.insert(0, tuple(math.ceil(side / stride) for side in sizes[0]))
        widths = [settings.start_maps, *settings.channels]
        widths.append(colours * likelihood.parameters_per_pixel)
        self.colours = colours
        self.start, self.sizes = (*sizes[0], widths[0]), sizes[1:]
        self.widest = max(w * math.prod(s) for w, s in zip(widths, sizes, strict=True))
        self.dense = nn.Linear(latent_dim, math.prod(self.start))
        self.activation = activation.layer()
        self.convolutions = nn.ModuleList(
            nn.ConvTranspose2d(inputs, outputs, KERNEL, stride, PADDING)
            for inputs, outputs, stride in zip(
                widths[:-1], widths[1:], settings.strides, strict=True
            )
        )
        with torch.no_grad():
            _, bias = self.convolutions[-1].parameters()
            bias.copy_(likelihood.initial_bias(train_mean.flatten(1).mean(1)))

    def forward(self, z: Tensor) -> Tensor:
        """``z [..., D]`` to parameters ``[..., P * parameters_per_pixel]``.

        P counts colour by colour, as an image ``[C, H, W]`` is flattened.
        """
        # In memory the channels come last, as the result wants them: on a CPU the pass takes two
        # thirds of the time.
        maps = self.dense(z.reshape(-1, z.shape[-1])).unflatten(1, self.start).movedim(-1, 1)
        for convolution, (height, width) in zip(self.convolutions, self.sizes, strict=True):
            maps = convolution(self.activation(maps))[..., :height, :width]
        by_pixel = maps.unflatten(1, (self.colours, -1)).movedim(2, -1)
        return by_pixel.reshape(*z.shape[:-1], by_pixel.shape[1:].numel())


def _require_counts(name: str, counts: list[int]) -> None:
    require(
        len(counts) >= 1 and all(count >= 1 for count in counts),
        f"{name} must be a list of numbers of at least 1, got {list(counts)}",
    )
