"""The evidence lower bound, ``E_q[log w]`` (Kingma and Welling 2014)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ucvae.config import require
from ucvae.estimators.base import Estimate, Estimator, require_batch
from ucvae.models.vae import VAE, draw_noise


@dataclass
class Elbo(Estimator):
    """Reparameterised gradient of the ELBO.

    Attributes:
        num_samples: K, averaged over.
        analytic_kl: KL in closed form; else by the same samples. The expectation is the same. By
            samples the gradient is noisier, and training stays longer where no unit is used.
    """

    same_work: ClassVar[bool] = True

    num_samples: int = 1
    analytic_kl: bool = True

    def __post_init__(self) -> None:
        require(self.num_samples >= 1, f"num_samples must be at least 1, got {self.num_samples}")

    def __call__(
        self, model: VAE, images: Tensor, generator: torch.Generator, index: Tensor | None = None
    ) -> Estimate:
        """The estimate for images ``[n, P]``."""
        require_batch(images)
        proposal = model.encode(images)
        noise = draw_noise(model, images, self.num_samples, generator)
        if self.analytic_kl:
            log_likelihood = model.log_likelihood(images, proposal.transform(noise)).mean(-1)
            bound = (log_likelihood - proposal.kl_from_prior()).mean()
        else:
            bound = model.log_weight(images, proposal, noise).mean()
        return Estimate(surrogate=-bound, objective=bound.detach())
