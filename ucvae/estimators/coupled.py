r"""The unbiased estimator: coupled Markov chains for the decoder, DReG for the encoder.

The decoder's gradient is ``grad_theta log p(x) = E_{p(z|x)}[grad_theta log p(x, z)]`` (Eq 2), which
the signed particles of :mod:`ucvae.chains` estimate without bias: ``sum_i c_i grad_theta log p(x,
z_i)``, one differentiable pass over the particles. The encoder has no part in the generative model
and is trained on the importance-weighted bound beside it.

Most particles have next to no weight, and a differentiable pass costs three evaluations. So they
are thinned first, without bias: see :func:`~ucvae.chains.thinning.thin`.

The chains draw from the encoder's proposals, whose first samples are then those of the encoder's
bound, or from better ones that are remembered for each training image
(:mod:`ucvae.estimators.remembered`), mixed with a share of the encoder's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ucvae.chains import ComposedKernel, Kernel, LaggedChains, SignedParticles, run_lagged_chains
from ucvae.chains.hmc import Hmc
from ucvae.chains.moves import moves_of
from ucvae.chains.selection import effective_sample_size
from ucvae.chains.thinning import padded, thin
from ucvae.config import require
from ucvae.errors import ConfigError
from ucvae.estimators.base import Estimate, require_batch
from ucvae.estimators.iwae import Bound, dreg_bound
from ucvae.estimators.remembered import Lesson, Remembering
from ucvae.models.gaussians import Proposal, transform_runs
from ucvae.models.posterior import Posterior
from ucvae.models.vae import VAE, draw_noise


class Proposals(Enum):
    """Where the chains' proposals come from: the encoder, or a memory of each training image."""

    encoder = "encoder"
    remembered = "remembered"

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise ValueError(f"proposals must be one of encoder, remembered, got {value}")


class Start(NamedTuple):
    """What a call begins with.

    Attributes:
        proposal: what the chains propose from, constant to autograd.
        bound: the encoder's.
        first: the first samples of the chains and their log weights, where these samples are the
            bound's.
        lesson: for the memory, where there is one.
    """

    proposal: Proposal
    bound: Bound
    first: tuple[Tensor, Tensor] | None = None
    lesson: Lesson | None = None


@dataclass
class Coupled(Remembering):
    """Unbiased gradients of the log-likelihood for the decoder (Alg 4).

    Attributes:
        num_samples: K, of the kernels, and of the encoder's bound where the chains start from it.
        lag: L.
        burn_in: t0.
        kernel: of the chains, a :class:`Kernel` or a :class:`ComposedKernel`.
        max_steps: how many steps a chain may make before it has met.
        survival: the probability of going on there, by Russian roulette, in [0, 0.5). At 0 there is
            a cap: an image that reaches it is counted as truncated, and its estimate is biased.
        beta: DISIR's correlation at the start of training.
        adapt_beta: steer beta between calls, towards an effective sample size of 0.3 K.
        leapfrog_steps: of a trajectory of ``isir_hmc``.
        step_size: theirs, in units of the proposals' widths.
        min_coefficient: particles with a smaller ``|c|`` are thinned; 0 keeps them all.
        proposals: of the chains: the encoder's, or remembered for each training image.
        proposal_samples, memory_rate, refinements, refinement_gap, encoder_share: of
            remembered proposals, see :class:`~ucvae.estimators.remembered.Remembering`.
        widening, follow_encoder: of the same.
    """

    num_samples: int = 10
    lag: int = 10
    burn_in: int = 1
    kernel: Any = field(default=Kernel.isir_disir, metadata={"named": Kernel})
    max_steps: int = 1000
    survival: float = 0.0
    beta: float = 0.5
    adapt_beta: bool = True
    leapfrog_steps: int = 5
    step_size: float = 0.3
    min_coefficient: float = 1e-3
    proposals: Proposals = Proposals.encoder

    def __post_init__(self) -> None:
        if isinstance(self.kernel, ComposedKernel):
            moves_of(self.kernel)
        else:
            self.kernel = Kernel(self.kernel)
        self.proposals = Proposals(self.proposals)
        require(self.lag >= 1, f"lag must be at least 1, got {self.lag}")
        require(self.burn_in >= 0, f"burn_in must be at least 0, got {self.burn_in}")
        require(
            self.max_steps >= self.burn_in + self.lag,
            f"max_steps must be at least burn_in + lag = {self.burn_in + self.lag}, "
            f"got {self.max_steps}",
        )
        require(0 <= self.survival < 0.5, f"survival must be in [0, 0.5), got {self.survival}")
        require(0 <= self.beta < 1, f"beta must be in [0, 1), got {self.beta}")
        require(
            self.leapfrog_steps >= 1,
            f"leapfrog_steps must be at least 1, got {self.leapfrog_steps}",
        )
        require(
            0 < self.step_size < math.inf,
            f"step_size must be positive and finite, got {self.step_size}",
        )
        require(
            0 <= self.min_coefficient < 1,
            f"min_coefficient must be in [0, 1), got {self.min_coefficient}",
        )
        super().__post_init__()
        self.current_beta = torch.tensor(self.beta, dtype=torch.float64)

    def without_effect(self) -> dict[str, str]:
        """DISIR's settings without DISIR, HMC's without HMC, the memory's without a memory."""
        named = isinstance(self.kernel, Kernel)
        made = f"kernel={self.kernel.value}" if named else "the kernel is made of moves"
        idle: dict[str, str] = {}
        if self.kernel is not Kernel.isir_disir:
            idle |= dict.fromkeys(("beta", "adapt_beta"), made)
        if self.kernel is not Kernel.isir_hmc:
            idle |= dict.fromkeys(("leapfrog_steps", "step_size"), made)
        if self.proposals is Proposals.encoder:
            idle |= dict.fromkeys(Remembering.OWN, "proposals=encoder")
        return idle

    def begin(self, model: VAE, num_images: int) -> None:
        """Make the memory of the proposals, where they are remembered."""
        if self.proposals is Proposals.remembered:
            super().begin(model, num_images)

    def __call__(
        self, model: VAE, images: Tensor, generator: torch.Generator, index: Tensor | None = None
    ) -> Estimate:
        """The estimate for images ``[n, P]``.

        Raises:
            ConfigError: the model's decoder is not trained.
            NonFiniteError: log weights that no chain can use.
            ValueError: ``images`` has no image, or ``index`` is missing where it is needed.
        """
        require_batch(images)
        parameters = decoder_parameters(model)
        start = self.start(model, images, generator, index)
        chains = self.run_chains(model, images, start.proposal, generator, start.first)
        if start.lesson is not None:
            spent = chains.evaluations + start.lesson.evaluations
            chains = chains._replace(evaluations=spent)
        particles = thin(chains.particles, self.min_coefficient, generator)
        gradient = decoder_gradient(model, images, start.proposal, particles)
        diagnostics = {
            "train/iwae_bound": start.bound.value.mean(),
            "proposal/ess": effective_sample_size(start.bound.weights).mean(),
            "proposal/mismatch": chains.mismatch.mean(),
            "coupling/correction_norm": chains.correction.coefficient.abs().sum() / len(images),
        }
        if start.lesson is not None:
            spent = start.lesson.evaluations.to(images.dtype)
            diagnostics["proposal/refinements"] = spent.mean()
        if self.kernel is Kernel.isir_disir:
            diagnostics["coupling/beta"] = self.current_beta.to(images.device)
            diagnostics["coupling/disir_ess"] = chains.ess
        if self.kernel is Kernel.isir_hmc:
            diagnostics["coupling/acceptance"] = chains.acceptance
        climb = sum((p * g).sum() for p, g in zip(parameters, gradient, strict=True))
        return Estimate(
            surrogate=start.bound.surrogate - climb / len(images),
            objective=None,
            diagnostics=diagnostics,
            chains=chains,
            lesson=start.lesson,
        )

    def start(
        self, model: VAE, images: Tensor, generator: torch.Generator, index: Tensor | None
    ) -> Start:
        """The encoder's bound, and the proposals of the chains, refined where remembered."""
        if self.proposals is Proposals.remembered:
            visit = self.visit(model, images, generator, index)
            return Start(visit.proposal, visit.bound, lesson=visit.lesson)
        encoded = model.encode(images)
        noise = draw_noise(model, images, self.num_samples, generator)
        with model.frozen_decoder():
            bound = dreg_bound(model, images, encoded, noise)
        return Start(encoded.detach(), bound, first=(noise, bound.log_weights))

    def check(self, model: VAE) -> None:
        """Refuse a model whose decoder is not trained."""
        decoder_parameters(model)

    def run_chains(
        self,
        model: VAE,
        images: Tensor,
        proposal: Proposal,
        generator: torch.Generator,
        first: tuple[Tensor, Tensor] | None = None,
    ) -> LaggedChains:
        """The chains of images ``[n, P]`` with these proposals; no autograd graph.

        ``first`` is as in :func:`~ucvae.chains.run_lagged_chains`.
        """
        posterior = Posterior(model, images, proposal)

        def log_weight(noise: Tensor, image_index: Tensor) -> Tensor:
            return posterior.rows(image_index).log_weight(noise)

        hmc = None
        if self.kernel is Kernel.isir_hmc:
            hmc = Hmc(posterior, self.step_size, self.leapfrog_steps)
        return run_lagged_chains(
            log_weight,
            len(images),
            proposal.noise_dim,
            generator=generator,
            num_samples=self.num_samples,
            lag=self.lag,
            burn_in=self.burn_in,
            kernel=self.kernel,
            # Learnt on the images' device; only a start or a resume brings it from the CPU.
            beta=self.current_beta.to(images.device),
            max_steps=self.max_steps,
            survival=self.survival,
            dtype=images.dtype,
            first=first,
            hmc=hmc,
        )

    def adapt(self, estimate: Estimate) -> None:
        """Steer beta, and remember the proposals of the images that were seen.

        ``beta <- clip(beta - 0.01 (ESS - 0.3 K))``, ESS of the DISIR steps of the last call.
        """
        super().adapt(estimate)
        chains = estimate.chains
        if self.adapt_beta and self.kernel is Kernel.isir_disir and chains is not None:
            ess = chains.ess
            beta = self.current_beta.to(ess.device) - 0.01 * (ess - 0.3 * self.num_samples)
            self.current_beta = beta.clamp(1e-6, 1 - 1e-6)

    def state_dict(self) -> dict[str, Any]:
        """Beta as it stands, and the memory."""
        return {"beta": self.current_beta.cpu(), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Beta as it stood, and the memory."""
        self.current_beta = state["beta"].clone()
        super().load_state_dict(state)


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
    model: VAE, images: Tensor, proposal: Proposal, particles: SignedParticles
) -> list[Tensor]:
    """``sum_i c_i grad_theta log p(x_i, z_i)``, a tensor for each of the decoder's parameters.

    It is accumulated in slices: memory does not grow with the length of the chains. The prior has
    no parameters, so ``log p(x|z)`` stands for ``log p(x, z)``.
    """
    parameters = decoder_parameters(model)
    gradient = [torch.zeros_like(p) for p in parameters]
    groups = max(1, model.rows_at_a_time(images) // particles.noise.shape[1])
    slices = zip(*(part.split(groups) for part in padded(particles)), strict=True)
    for image_index, noise, coefficient in slices:
        z = transform_runs(proposal, image_index, noise)
        with torch.enable_grad():
            weighted = (
                coefficient * model.log_likelihood(images.index_select(0, image_index), z)
            ).sum()
        for total, part in zip(gradient, torch.autograd.grad(weighted, parameters), strict=True):
            total += part
    return gradient
