r"""The unbiased estimator: coupled Markov chains for the decoder, DReG for the encoder.

The decoder's gradient is ``grad_theta log p(x) = E_{p(z|x)}[grad_theta log p(x, z)]`` (Eq 2), which
the signed particles of :mod:`ucvae.chains` estimate without bias: ``sum_i c_i grad_theta log p(x,
z_i)``, one differentiable pass over the particles. The encoder has no part in the generative model
and is trained on the importance-weighted bound beside it.

Most particles have next to no weight, and a differentiable pass costs three evaluations. So they
are thinned first, without bias: see :func:`thin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ucvae.chains import Kernel, LaggedChains, SignedParticles, run_lagged_chains
from ucvae.chains.selection import effective_sample_size
from ucvae.config import require
from ucvae.errors import ConfigError
from ucvae.estimators.base import Estimate, Estimator, require_batch
from ucvae.estimators.iwae import dreg_bound
from ucvae.models.vae import VAE, Gaussian, draw_noise


@dataclass
class Coupled(Estimator):
    """Unbiased gradients of the log-likelihood for the decoder (Alg 4).

    Attributes:
        num_samples: K, of the kernels and of the encoder's bound.
        lag: L.
        burn_in: t0.
        kernel: of the chains.
        max_steps: cap on a chain's steps. An image that reaches it is counted as truncated, and
            its estimate is biased.
        beta: DISIR's correlation at the start of training.
        adapt_beta: steer beta between calls, towards an effective sample size of 0.3 K.
        min_coefficient: particles with a smaller ``|c|`` are thinned; 0 keeps them all.
    """

    num_samples: int = 10
    lag: int = 10
    burn_in: int = 1
    kernel: Kernel = Kernel.isir_disir
    max_steps: int = 1000
    beta: float = 0.5
    adapt_beta: bool = True
    min_coefficient: float = 1e-3

    def __post_init__(self) -> None:
        self.kernel = Kernel(self.kernel)
        require(self.num_samples >= 2, f"num_samples must be at least 2, got {self.num_samples}")
        require(self.lag >= 1, f"lag must be at least 1, got {self.lag}")
        require(self.burn_in >= 0, f"burn_in must be at least 0, got {self.burn_in}")
        require(
            self.max_steps >= self.burn_in + self.lag,
            f"max_steps must be at least burn_in + lag = {self.burn_in + self.lag}, "
            f"got {self.max_steps}",
        )
        require(0 <= self.beta < 1, f"beta must be in [0, 1), got {self.beta}")
        require(
            0 <= self.min_coefficient < 1,
            f"min_coefficient must be in [0, 1), got {self.min_coefficient}",
        )
        self.current_beta = torch.tensor(self.beta, dtype=torch.float64)

    def __call__(self, model: VAE, images: Tensor, generator: torch.Generator) -> Estimate:
        """The estimate for images ``[n, P]``.

        Raises:
            ConfigError: the model's decoder is not trained.
            NonFiniteError: log weights that no chain can use.
            ValueError: ``images`` has no image.
        """
        require_batch(images)
        parameters = decoder_parameters(model)
        proposal = model.encode(images)
        noise = draw_noise(model, images, self.num_samples, generator)
        with model.frozen_decoder():
            bound = dreg_bound(model, images, proposal, noise)

        fixed = proposal.detach()
        chains = self.run_chains(model, images, fixed, generator)
        main, correction = (
            decoder_gradient(model, images, fixed, thin(part, self.min_coefficient, generator))
            for part in (chains.main, chains.correction)
        )
        diagnostics = {
            "train/iwae_bound": bound.value.mean(),
            "proposal/ess": effective_sample_size(bound.weights).mean(),
            "proposal/mismatch": chains.mismatch.mean(),
            "coupling/correction_norm": get_total_norm(correction) / get_total_norm(main),
        }
        if self.kernel is Kernel.isir_disir:
            diagnostics["coupling/beta"] = self.current_beta.to(images.device)
            diagnostics["coupling/disir_ess"] = chains.ess
        parts = zip(parameters, main, correction, strict=True)
        climb = sum((p * (first + second)).sum() for p, first, second in parts)
        return Estimate(
            surrogate=bound.surrogate - climb / len(images),
            objective=None,
            diagnostics=diagnostics,
            chains=chains,
        )

    def check(self, model: VAE) -> None:
        """Refuse a model whose decoder is not trained."""
        decoder_parameters(model)

    def run_chains(
        self, model: VAE, images: Tensor, proposal: Gaussian, generator: torch.Generator
    ) -> LaggedChains:
        """The chains of images ``[n, P]`` with these proposals; no autograd graph."""

        def log_weight(noise: Tensor, image_index: Tensor) -> Tensor:
            rows = images.index_select(0, image_index)
            return model.log_weight(rows, proposal.rows(image_index), noise)

        return run_lagged_chains(
            log_weight,
            len(images),
            model.latent_dim,
            generator=generator,
            num_samples=self.num_samples,
            lag=self.lag,
            burn_in=self.burn_in,
            kernel=self.kernel,
            # Learnt on the images' device; only a start or a resume brings it from the CPU.
            beta=self.current_beta.to(images.device),
            max_steps=self.max_steps,
            dtype=images.dtype,
        )

    def adapt(self, estimate: Estimate) -> None:
        """``beta <- clip(beta - 0.01 (ESS - 0.3 K))``, ESS of the DISIR steps of the last call."""
        if self.adapt_beta and self.kernel is Kernel.isir_disir:
            ess = estimate.chains.ess
            beta = self.current_beta.to(ess.device) - 0.01 * (ess - 0.3 * self.num_samples)
            self.current_beta = beta.clamp(1e-6, 1 - 1e-6)

    def state_dict(self) -> dict[str, Any]:
        """Beta as it stands."""
        return {"beta": self.current_beta.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Beta as it stood."""
        self.current_beta = state["beta"].clone()


def thin(
    particles: SignedParticles, min_coefficient: float, generator: torch.Generator
) -> SignedParticles:
    """Drop most particles of little weight so that every expectation stays the same.

    A particle with ``|c| < m`` survives with probability ``|c| / m`` and then has the coefficient
    ``sign(c) m`` (Russian roulette). It adds at most ``m |c| g^2`` to the variance of a sum of
    ``c g``. The coefficients of an image add up to 1 in expectation only.

    Args:
        particles: G groups of K.
        min_coefficient: m; at 0 the particles are returned as they are.
        generator: on the particles' device.

    Returns:
        The survivors, in groups of one.
    """
    if min_coefficient == 0:
        return particles
    size = particles.coefficient.abs()
    uniform = torch.rand(size.shape, generator=generator, device=size.device, dtype=size.dtype)
    group, slot = (uniform * min_coefficient < size).nonzero(as_tuple=True)
    coefficient = particles.coefficient[group, slot]
    return SignedParticles(
        particles.image_index[group],
        particles.noise[group, slot][:, None],
        (coefficient.sign() * coefficient.abs().clamp(min=min_coefficient))[:, None],
    )


def decoder_parameters(model: VAE) -> list[nn.Parameter]:
    """What the chains' gradient is for.

    Raises:
        ConfigError: the decoder is not trained, so that there is nothing to estimate.
    """
    parameters = [p for p in model.decoder.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError(
            "estimator=coupled: estimates the gradient of the decoder, and this model's decoder is "
            "not trained; use estimator=elbo or estimator=iwae"
        )
    return parameters


def decoder_gradient(
    model: VAE, images: Tensor, proposal: Gaussian, particles: SignedParticles
) -> list[Tensor]:
    """``sum_i c_i grad_theta log p(x_i, z_i)``, a tensor for each of the decoder's parameters.

    It is accumulated in slices: memory does not grow with the length of the chains. The prior has
    no parameters, so ``log p(x|z)`` stands for ``log p(x, z)``.
    """
    parameters = decoder_parameters(model)
    gradient = [torch.zeros_like(p) for p in parameters]
    groups = max(1, model.rows_at_a_time(images) // particles.noise.shape[1])
    slices = zip(*(part.split(groups) for part in particles), strict=True)
    for image_index, noise, coefficient in slices:
        with torch.enable_grad():
            z = proposal.rows(image_index).transform(noise)
            weighted = (
                coefficient * model.log_likelihood(images.index_select(0, image_index), z)
            ).sum()
        for total, part in zip(gradient, torch.autograd.grad(weighted, parameters), strict=True):
            total += part
    return gradient
