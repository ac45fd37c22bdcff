"""The evidence lower bound, ``E_q[log w]`` (Kingma and Welling 2014)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ucvae.config import require
from ucvae.estimators.base import Estimate, Estimator, draw_noise
from ucvae.models.vae import VAE


@dataclass
class Elbo(Estimator):
    """Reparameterised gradient of the ELBO, the mean of ``log w`` over K samples.

    Attributes:
        num_samples: K.
    """

    num_samples: int = 1

    def __post_init__(self) -> None:
        require(self.num_samples >= 1, f"num_samples must be at least 1, got {self.num_samples}")

    def __call__(self, model: VAE, images: Tensor, generator: torch.Generator) -> Estimate:
        """The estimate for images ``[n, P]``."""
        noise = draw_noise(model, images, self.num_samples, generator)
        bound = model.log_weight(images, model.encode(images), noise).mean()
        return Estimate(surrogate=-bound, objective=bound.detach())
