"""Plain eager PyTorch: the loop that one writes in an afternoon, and no slower than it need be."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainVae(nn.Module):
    """Tanh layers on either side, Bernoulli pixels."""

    def __init__(self, pixels: int, hidden: list[int], latent_dim: int) -> None:
        super().__init__()
        self.encoder = _network([pixels, *hidden, 2 * latent_dim])
        self.decoder = _network([latent_dim, *reversed(hidden), pixels])

    def loss(self, images: Tensor, bound: str, num_samples: int) -> Tensor:
        """Minus the ELBO with its KL in closed form, or minus the importance-weighted bound."""
        mean, raw = self.encoder(images).chunk(2, dim=-1)
        std = F.softplus(raw) + 1e-6
        noise = torch.randn(num_samples, *mean.shape, device=mean.device)
        z = mean + std * noise
        logits = self.decoder(z)
        log_likelihood = (images * logits - F.softplus(logits)).sum(-1)
        if bound == "elbo":
            kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum(-1)
            return (kl - log_likelihood.mean(0)).mean()
        log_prior = -0.5 * z.square().sum(-1)
        log_q = -0.5 * noise.square().sum(-1) - std.log().sum(-1)
        log_weights = log_likelihood + log_prior - log_q
        return -(log_weights.logsumexp(0) - math.log(num_samples)).mean()


class PlainTraining:
    """Steps on shuffled batches of images ``[N, P]``, uint8 bits on the device."""

    def __init__(
        self,
        images: Tensor,
        hidden: list[int],
        latent_dim: int,
        batch_size: int,
        bound: str,
        num_samples: int,
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.objective = bound, num_samples
        self.model = PlainVae(images.shape[1], hidden, latent_dim).to(images.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)
        self.batches: list[Tensor] = []

    def step(self) -> None:
        """One step; shuffles where an epoch begins."""
        if not self.batches:
            order = torch.randperm(len(self.images), device=self.images.device)
            self.batches = list(order.split(self.batch_size))
        loss = self.model.loss(self.images[self.batches.pop()].float(), *self.objective)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def _network(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])
