"""Looking at the latent space: active units, prior samples, reconstructions."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.utils import make_grid

from ucvae.models.vae import VAE


@torch.no_grad()
def active_units(model: VAE, images: Tensor, threshold: float = 0.01) -> Tensor:
    """How many latent units vary with the image: ``Var_x E_q[z_d] > 0.01`` (Burda et al 2016).

    Args:
        model: the VAE.
        images: ``[n, P]`` in [0, 1].
        threshold: on the variance of the posterior mean.

    Returns:
        0-dim count.
    """
    means = torch.cat([model.encode(batch).mean for batch in images.split(1024)])
    return (means.var(0) > threshold).sum()


@torch.no_grad()
def sample_grid(
    model: VAE, shape: tuple[int, int, int], generator: torch.Generator, count: int = 64
) -> Tensor:
    """Mean images of ``count`` draws from the prior, as one picture ``[C, H, W]``."""
    z = torch.randn(
        count, model.latent_dim, generator=generator, device=generator.device, dtype=model.dtype
    )
    return _grid(model.likelihood.mean(model.decoder(z)), shape)


@torch.no_grad()
def reconstruction_grid(model: VAE, images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images ``[n, P]``, each with its reconstruction from the posterior mean on its right."""
    means = model.likelihood.mean(model.decoder(model.encode(images).mean))
    return _grid(torch.stack([images, means], dim=1).flatten(0, 1), shape)


def _grid(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    pictures = images.float().clamp(0, 1).reshape(-1, *shape)
    return make_grid(pictures, nrow=8, padding=1, pad_value=0.5).cpu()
