r"""Hamiltonian Monte Carlo between steps of ISIR, for chains that sit where their proposal is thin.

From a state of weight w ISIR needs some ``w / (K - 1)`` steps, in units of the mean weight, to move
on, and while a pair of chains has not met, every L further steps add another difference of the two
to the estimate. Where a proposal is too narrow in one direction such weights are rare and without
bound, and few images carry nearly all the noise. A trajectory along the gradient of the posterior
asks no proposal: a few leapfrog steps lead from there to where the weights are ordinary.

So each L-th step of a chain, L being the lag, begins with a trajectory. The chains' kernel is then
one of period L, and lagged chains, of which one is L steps ahead, are at the same place of it all
the while: Y has the law of X of L steps ago, and chains that have met stay together, which is all
that Eq 14 asks for. Most pairs meet before Y's first trajectory, so that X's is what it costs them.

A trajectory is one of Neal 2011 (Alg 1 of his Fig 2): momenta from ``N(0, I)`` in the coordinates
in which the proposal is ``N(0, I)``, leapfrog steps, and a Metropolis decision. The steps of an
image have a length of their own, between half and one and a half of ``step_size``, so that no orbit
closes on itself. Two chains have momentum, length and uniform in common.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Posterior(Protocol):
    """What a trajectory has to know of n images. Coordinates ``[n, c, D]``: c chains of each."""

    def rows(self, image_index: Tensor) -> Posterior:
        """That of the images at ``image_index``."""

    def coordinates(self, noise: Tensor) -> Tensor:
        """``[n, c, D]`` of states ``[n, c, D']`` in the noise of the chains."""

    def log_density(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """``[n, c]``, nats, up to a constant of each image; and its gradient ``[n, c, D]``."""

    def states(self, coordinates: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
        """The noise ``[n, c, D']`` of states there, and their log weights ``[n, c]``."""


class Randomness(NamedTuple):
    """All that is random in a trajectory; one for all chains of an image.

    Momentum ``[n, 1, D]``; ``length`` of the steps in units of the step size, ``[n, 1, 1]``; and
    ``uniform`` in [0, 1), ``[n, 1]``.
    """

    momentum: Tensor
    length: Tensor
    uniform: Tensor


class Moved(NamedTuple):
    """Where a trajectory has led ``[n, c, D']``, log weights ``[n, c]``, and whether it has."""

    noise: Tensor
    log_weight: Tensor
    accepted: Tensor


class Hmc(NamedTuple):
    """The trajectories of the kernel ``isir_hmc``.

    Attributes:
        posterior: of the images of the call.
        step_size: in units of the proposals' widths.
        leapfrog_steps: of a trajectory, at least 1.
    """

    posterior: Posterior
    step_size: float | Tensor
    leapfrog_steps: int

    @property
    def evaluations(self) -> int:
        """Of the density and its gradient, in a trajectory of one chain."""
        return self.leapfrog_steps + 1

    def move(
        self, noise: Tensor, log_weight: Tensor, image_index: Tensor, generator: torch.Generator
    ) -> Moved:
        """A trajectory of c chains of each image, from ``noise [n, c, D']`` and their weights."""
        posterior = self.posterior.rows(image_index)
        start = posterior.coordinates(noise)
        drawn = draw(len(start), start.shape[-1], generator, start.dtype)
        end, density, accepted = trajectory(
            posterior, start, drawn, self.step_size, self.leapfrog_steps
        )
        led, weights = posterior.states(end, density)
        return Moved(
            torch.where(accepted[..., None], led, noise),
            torch.where(accepted, weights.to(log_weight), log_weight),
            accepted,
        )


def draw(num_images: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> Randomness:
    """The randomness of a trajectory, from the generator and on its device."""
    device = generator.device
    momentum = torch.randn(num_images, 1, dim, generator=generator, device=device, dtype=dtype)
    uniforms = torch.rand(2, num_images, 1, generator=generator, device=device, dtype=torch.float64)
    return Randomness(momentum, (0.5 + uniforms[0, :, :, None]).to(dtype), uniforms[1])


def trajectory(
    posterior: Posterior,
    start: Tensor,
    drawn: Randomness,
    step_size: float | Tensor,
    leapfrog_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where leapfrog steps from ``start [n, c, D]`` lead, accepted or not.

    Returns:
        The end ``[n, c, D]``, its log density ``[n, c]``, and whether it is accepted ``[n, c]``;
        never where its energy is not a number.
    """
    size = step_size * drawn.length
    size = size.to(start.dtype)
    before, gradient = posterior.log_density(start)
    end, after, momentum = start, before, drawn.momentum
    for _ in range(leapfrog_steps):
        momentum = momentum + size / 2 * gradient
        end = end + size * momentum
        after, gradient = posterior.log_density(end)
        momentum = momentum + size / 2 * gradient
    gain = after.double() - before.double()
    kinetic = (drawn.momentum.double().square().sum(-1) - momentum.double().square().sum(-1)) / 2
    accepted = drawn.uniform.log() < gain + kinetic
    return end, after, accepted
