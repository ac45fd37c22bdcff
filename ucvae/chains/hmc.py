r"""Hamiltonian Monte Carlo between steps of ISIR, for chains that sit where their proposal is thin.

From a state of weight w ISIR needs some ``w / (K - 1)`` steps, in units of the mean weight, to move
on, and while a pair of chains has not met, every L further steps add another difference of the two
to the estimate. Where a proposal is too narrow in one direction such weights are rare and without
bound, so that few visits to images carry nearly all the noise; where it is off altogether they are
the rule. What follows the gradient of the posterior asks no proposal.

So each L-th step of a chain, L being the lag, begins with two moves (Heng and Jacob 2019), both in
the coordinates in which the proposal's Gaussian is ``N(0, I)``:

1. *a trajectory* (Neal 2011, Fig 2): a momentum from ``N(0, I)``, leapfrog steps, and a Metropolis
   decision. The steps of an image have a length of their own, between half and one and a half of
   ``step_size``, so that no orbit closes on itself. Two chains share momentum, length and uniform:
   where the posterior is about as strongly log-concave as ``N(0, I)`` that mostly brings them
   closer together;
2. *a small step* of a random walk, in which chains that are close can meet: the two proposals are
   as likely to be equal as any coupling makes them, and else mirror each other (Bou-Rabee, Eberle
   and Zimmer 2020), and the uniform of the decision is shared.

The chains' kernel is then one of period L, and lagged chains, of which one is L steps ahead, are at
the same place of it all the while: Y has the law of X of L steps ago, and chains that have met stay
together, which is all that Eq 14 asks for. Most pairs meet before Y's first trajectory, so that X's
is what it costs them.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# The small step's standard deviation, times sqrt(D): where the posterior is N(0, I), four of five
# are accepted.
SMALL = 0.5


class Posterior(Protocol):
    """What the moves have to know of n images. Coordinates ``[n, c, D]``: c chains of each."""

    def rows(self, image_index: Tensor) -> Posterior:
        """That of the images at ``image_index``."""

    def coordinates(self, noise: Tensor) -> Tensor:
        """``[n, c, D]`` of states ``[n, c, D']`` in the noise of the chains."""

    def log_density(self, coordinates: Tensor) -> Tensor:
        """``[n, c]``, nats, up to a constant of each image."""

    def with_gradient(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """The log density, and its gradient ``[n, c, D]``."""

    def states(self, coordinates: Tensor, log_density: Tensor) -> tuple[Tensor, Tensor]:
        """The noise ``[n, c, D']`` of states there, and their log weights ``[n, c]``."""


class Randomness(NamedTuple):
    """All that is random in the two moves of an image's chains, whether one or two.

    Attributes:
        momentum: ``[n, 1, D]``.
        length: of the leapfrog steps, in units of the step size, ``[n, 1, 1]``.
        trajectory: uniform of its decision, ``[n, 1]``.
        step: standard normal, ``[n, 1, D]``.
        coupling: uniform that decides whether the small steps are to end at one point, ``[n, 1]``.
        small: uniform of their decision, ``[n, 1]``.
    """

    momentum: Tensor
    length: Tensor
    trajectory: Tensor
    step: Tensor
    coupling: Tensor
    small: Tensor


class Point(NamedTuple):
    """Coordinates ``[n, c, D]``, log density and whether the chains have moved ``[n, c]``."""

    coordinates: Tensor
    log_density: Tensor
    moved: Tensor

    def where(self, accepted: Tensor, end: Tensor, log_density: Tensor) -> Point:
        """With the chains that are ``accepted [n, c]`` at another point."""
        return Point(
            torch.where(accepted[..., None], end, self.coordinates),
            torch.where(accepted, log_density, self.log_density),
            self.moved | accepted,
        )


class Moved(NamedTuple):
    """Where both moves have led.

    Attributes:
        noise: ``[n, c, D']``.
        log_weight: ``[n, c]``.
        moved: whether a chain is elsewhere than before, ``[n, c]``.
        met: whether two chains have met in the small step, ``[n]``.
        acceptance: of the trajectory, ``[n, c]``.
    """

    noise: Tensor
    log_weight: Tensor
    moved: Tensor
    met: Tensor
    acceptance: Tensor


class Hmc(NamedTuple):
    """The moves that the kernel ``isir_hmc`` has beside ISIR's.

    Attributes:
        posterior: of the images of the call.
        step_size: of the leapfrog, in units of the proposals' widths.
        leapfrog_steps: of a trajectory, at least 1.
    """

    posterior: Posterior
    step_size: float
    leapfrog_steps: int

    @property
    def evaluations(self) -> int:
        """Of the density, all but one with its gradient, for one chain."""
        return self.leapfrog_steps + 2

    def move(
        self, noise: Tensor, log_weight: Tensor, image_index: Tensor, generator: torch.Generator
    ) -> Moved:
        """Both moves of c = 1 or 2 chains of each image, from ``noise [n, c, D']`` and weights."""
        posterior = self.posterior.rows(image_index)
        start = posterior.coordinates(noise)
        drawn = draw(len(start), start.shape[-1], generator, start.dtype)
        after, acceptance = trajectory(posterior, start, drawn, self.step_size, self.leapfrog_steps)
        point, met = small_step(posterior, after, drawn)
        led, weights = posterior.states(point.coordinates, point.log_density)
        return Moved(
            torch.where(point.moved[..., None], led, noise),
            torch.where(point.moved, weights.to(log_weight), log_weight),
            point.moved,
            met,
            acceptance,
        )


def draw(num_images: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> Randomness:
    """The randomness of both moves, from the generator and on its device."""
    device = generator.device
    normal = torch.randn((2, num_images, 1, dim), generator=generator, device=device, dtype=dtype)
    uniforms = torch.rand(
        (4, num_images, 1), generator=generator, device=device, dtype=torch.float64
    )
    length, of_trajectory, coupling, small = uniforms
    return Randomness(
        normal[0], (0.5 + length[..., None]).to(dtype), of_trajectory, normal[1], coupling, small
    )


def trajectory(
    posterior: Posterior,
    start: Tensor,
    drawn: Randomness,
    step_size: float,
    leapfrog_steps: int,
) -> tuple[Point, Tensor]:
    """Where leapfrog steps from ``start [n, c, D]`` lead, and which were accepted ``[n, c]``.

    None is whose energy is not a number.
    """
    size = step_size * drawn.length
    before, gradient = posterior.with_gradient(start)
    end, after, momentum = start, before, drawn.momentum
    for _ in range(leapfrog_steps):
        momentum = momentum + size / 2 * gradient
        end = end + size * momentum
        after, gradient = posterior.with_gradient(end)
        momentum = momentum + size / 2 * gradient
    gain = after.double() - before.double()
    kinetic = (drawn.momentum.double().square().sum(-1) - momentum.double().square().sum(-1)) / 2
    accepted = drawn.trajectory.log() < gain + kinetic
    still = Point(start, before, torch.zeros_like(accepted))
    return still.where(accepted, end, after), accepted


def small_step(posterior: Posterior, start: Point, drawn: Randomness) -> tuple[Point, Tensor]:
    """A step of a random walk of each chain, and which pairs have met in it ``[n]``."""
    here = start.coordinates
    size = SMALL / here.shape[-1] ** 0.5
    steps, equal = coupled_steps(here / size, drawn.step, drawn.coupling)
    end = here + size * steps
    end = torch.where(equal[:, None, None], end[:, :1], end)  # to the last digit
    value = posterior.log_density(end)
    accepted = drawn.small.log() < value.double() - start.log_density.double()
    return start.where(accepted, end, value), equal & accepted.all(1)


def coupled_steps(here: Tensor, step: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Standard normal steps from ``here [n, c, D]`` that lead to one point as often as can be.

    Args:
        here: one chain of each image, or two.
        step: the first chain's, ``[n, 1, D]``.
        uniform: ``[n, 1]``.

    Returns:
        Steps ``[n, c, D]``, and whether two chains' lead to one point ``[n]``.
    """
    if here.shape[1] == 1:
        return step, torch.zeros_like(uniform[:, 0], dtype=torch.bool)
    apart = here[:, :1] - here[:, 1:]
    other = step + apart  # leads to the same point
    ratio = (step.double().square().sum(-1) - other.double().square().sum(-1)) / 2
    equal = uniform.log() < ratio  # of the second chain's density there, to the first one's
    square = apart.square().sum(-1, keepdim=True)
    along = (apart * step).sum(-1, keepdim=True) / square.clamp(min=torch.finfo(here.dtype).tiny)
    mirrored = step - 2 * along * apart
    second = torch.where(equal[..., None], other, mirrored)
    return torch.cat([step, second], 1), equal[:, 0]
