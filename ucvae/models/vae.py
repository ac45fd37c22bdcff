r"""The variational auto-encoder: densities and importance weights, no objective.

Prior ``p(z) = N(0, I)``; decoder ``p_theta(x|z)``; encoder ``q_phi(z|x) = N(mu, S S^T)``, by
default with a diagonal S. In noise space ``z = mu + S xi`` with ``xi ~ N(0, I)``, and the
importance weight is ``w = p_theta(x, z) / q_phi(z|x)`` (method of Ruiz et al 2021, Section 2).

Shapes: images ``[n, P]``, floats in [0, 1]; z and noise ``[n, k, D]``; densities ``[n, k]``, nats.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ucvae.models.gaussians import Encoded, Proposal, standard_normal_log_prob
from ucvae.models.layers import Layers
from ucvae.models.likelihoods import Likelihood

# Of the decoder's output at a time. On a CPU, 1,024 binary MNIST images, where more fall out of
# the cache (8,192 took 1.5 times as long for each); on a GPU, 64 MiB of float32.
CPU_NUMBERS = 1024 * 784
GPU_NUMBERS = 2**24


class VAE(nn.Module):
    """Encoder, decoder and likelihood joined.

    Args:
        encoder: images ``[n, P]`` to a Gaussian of each.
        decoder: ``z [..., D]`` to the likelihood's parameters ``[..., P * parameters_per_pixel]``.
        likelihood: of an image given the decoder's output.
        latent_dim: D.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        latent_dim: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood
        self.latent_dim = latent_dim

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and so of images, noise and densities."""
        return next(self.parameters()).dtype

    def encode(self, images: Tensor) -> Encoded:
        """The proposal ``q(z|x)`` of each image."""
        return self.encoder(images)

    def log_likelihood(self, images: Tensor, z: Tensor) -> Tensor:
        """``log p(x|z)``; a last linear layer is left to a likelihood that can do both at once."""
        if torch.is_grad_enabled():
            return self._log_likelihood(images, z)
        # Nothing is kept for a backward pass, so memory need not grow with the number of z.
        count = max(1, self.rows_at_a_time(images) // z.shape[1])
        slices = zip(images.split(count), z.split(count), strict=True)
        return torch.cat([self._log_likelihood(x, part) for x, part in slices])

    def _log_likelihood(self, images: Tensor, z: Tensor) -> Tensor:
        if (
            isinstance(self.decoder, Layers)
            and isinstance(self.decoder[-1], nn.Linear)
            and hasattr(self.likelihood, "log_prob_linear")
        ):
            features = self.decoder.all_but_last(z)
            return self.likelihood.log_prob_linear(images, features, self.decoder[-1])
        return self.likelihood.log_prob(images, self.decoder(z))

    def log_joint(self, images: Tensor, z: Tensor) -> Tensor:
        """``log p(x, z)``."""
        return self.log_likelihood(images, z) + standard_normal_log_prob(z)

    def log_weight(self, images: Tensor, proposal: Proposal, noise: Tensor) -> Tensor:
        """``log w`` of ``z = g(xi, x)``."""
        z = proposal.transform(noise)
        return self.log_joint(images, z) - proposal.noise_log_prob(noise, z)

    def rows_at_a_time(self, images: Tensor) -> int:
        """How many z a long pass through the decoder should take together, at least 1.

        As many as keep the output for images ``[n, P]``, or a decoder's ``widest`` layer, within a
        CPU's cache, or fill a GPU.
        """
        numbers = CPU_NUMBERS if images.device.type == "cpu" else GPU_NUMBERS
        output = images.shape[-1] * self.likelihood.parameters_per_pixel
        return max(1, numbers // max(output, getattr(self.decoder, "widest", 0)))

    @contextlib.contextmanager
    def frozen_decoder(self) -> Iterator[None]:
        """A graph built in here leads through the decoder to z, but not to its parameters."""
        parameters = [p for p in self.decoder.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)


def draw_noise(model: VAE, images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``xi ~ N(0, I)``, ``[n, count, D]``, from the generator and on its device."""
    return torch.randn(
        len(images),
        count,
        model.latent_dim,
        generator=generator,
        device=images.device,
        dtype=images.dtype,
    )
