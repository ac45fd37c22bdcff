r"""Test log-likelihood by annealed importance sampling (Neal 2001; Wu et al 2017).

Between prior and posterior lie the densities ``f_b(z) = p(z) p(x|z)^b`` for temperatures

    0 = b_0 < b_1 < ... < b_T = 1.

A chain starts with ``z_0 ~ p(z)``, and ``z_t`` follows from ``z_{t-1}`` by a transition that leaves
f at b_t invariant, t = 1, ..., T - 1. Its weight

    log w = sum_{t=1}^T (b_t - b_{t-1}) log p(x|z_{t-1})

has the mean ``E[w] = p(x)``, whatever the temperatures and however badly the chain mixes. So the
log of a mean of weights is a lower bound of ``log p(x)`` in expectation. It needs no encoder.

The same transitions in the opposite order, started from ``z_{T-1} ~ p(z|x)``, have the mean
``E[1/w] = 1/p(x)``, since each is reversible: minus the log of a mean of ``1/w`` is an upper bound
(bidirectional Monte Carlo, Grosse, Ghahramani and Adams 2015). An exact draw from the posterior is
at hand where the image was drawn from the model itself.

A transition is one trajectory of Hamiltonian Monte Carlo (Neal 2011): with momentum ``r ~ N(0, I)``
and energy ``-log f_b(z) + |r|^2 / 2``, some leapfrog steps of size e, accepted with probability
``min(1, exp(-change in energy))``. The step size of each temperature is found by a pilot, on chains
of its own, which are then thrown away: one that depended on the weighted chains themselves would
break ``E[w] = p(x)``.

Shapes: images ``[n, P]``, z ``[n, k, D]``, one row of k chains for each image; nats.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ucvae
from ucvae.config import require
from ucvae.evaluation.base import Evaluated, Evaluator, Progress, require_finite
from ucvae.evaluation.unfinished import Unfinished, digest
from ucvae.models.vae import VAE, draw_noise
from ucvae.randomness import stream

TARGET_ACCEPTANCE = 0.65
# Of the pilot: trajectories at the first temperature before it moves on, and how far the logarithm
# of a step size moves for an acceptance that is off by 1.
PILOT_START = 30
PILOT_RATE = 0.5
# Half-width of the part of the logistic function that the sigmoidal schedule follows.
SIGMOID_REACH = 4.0
# Temperatures from one sign of life to the next.
BEAT = 10

PAPER = (16, 10_000, 10)


class Schedule(enum.Enum):
    """How the temperatures lie between 0 and 1."""

    sigmoidal = "sigmoidal"
    linear = "linear"

    def temperatures(self, count: int) -> list[float]:
        """``b_0 = 0`` to ``b_T = 1``; T is the ``count``.

        The sigmoidal schedule (Wu et al 2017) is dense at both ends: ``b_t`` is proportional to
        ``s(4 (2 t / T - 1)) - s(-4)``, s the logistic function.
        """
        even = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        if self is Schedule.linear:
            return even.tolist()
        bent = torch.sigmoid(SIGMOID_REACH * (2 * even - 1))
        return ((bent - bent[0]) / (bent[-1] - bent[0])).tolist()


class State(NamedTuple):
    """Where chains are, ``z [n, k, D]``, with ``log p(x|z)`` ``[n, k]`` and its gradient there."""

    z: Tensor
    log_likelihood: Tensor
    gradient: Tensor


class Noise(NamedTuple):
    """The random numbers of a transition: momentum ``[n, k, D]``, a uniform's log ``[n, k]``."""

    momentum: Tensor
    log_uniform: Tensor

    @classmethod
    def draw(cls, z: Tensor, generator: torch.Generator) -> Noise:
        """Fresh ones for chains at ``z``."""

        def like(draw: Callable[..., Tensor], shape: torch.Size) -> Tensor:
            return draw(shape, generator=generator, device=z.device, dtype=z.dtype)

        return cls(like(torch.randn, z.shape), like(torch.rand, z.shape[:-1]).log())


class Path(NamedTuple):
    """The way of a chain: T increments of its weight, and a transition between each two of them.

    Attributes:
        increments: ``b_t - b_{t-1}``, in the order in which the chain meets them.
        temperatures: of the T - 1 transitions.
        steps: their leapfrog step sizes, ``[T - 1]``.
    """

    increments: list[float]
    temperatures: list[float]
    steps: Tensor

    @classmethod
    def of(cls, temperatures: list[float], steps: Tensor) -> Path:
        """From the prior to the posterior, along ``b_0`` to ``b_T``."""
        pairs = zip(temperatures[:-1], temperatures[1:], strict=True)
        return cls([after - before for before, after in pairs], temperatures[1:-1], steps)

    def back(self) -> Path:
        """From the posterior to the prior."""
        return Path(self.increments[::-1], self.temperatures[::-1], self.steps.flip(0))


class Annealed(NamedTuple):
    """What annealed chains leave.

    Attributes:
        log_weights: ``[n, k]`` float64.
        acceptance: mean acceptance probability of each image's transitions, ``[n]``.
    """

    log_weights: Tensor
    acceptance: Tensor

    def lower(self) -> Tensor:
        """``log (1/k) sum w``: below ``log p(x)`` in expectation, of chains from the prior."""
        return self.log_weights.logsumexp(1) - math.log(self.log_weights.shape[1])

    def upper(self) -> Tensor:
        """``-log (1/k) sum 1/w``: above it in expectation, of chains from the posterior."""
        return math.log(self.log_weights.shape[1]) - (-self.log_weights).logsumexp(1)

    def ess(self) -> Tensor:
        """Effective sample size of each image's weights, ``(sum w)^2 / sum w^2``; from 1 to k."""
        return self.log_weights.softmax(1).square().sum(1).reciprocal()


class Target:
    """``log p(x|z)`` of some images and its gradient, one pass through the decoder and back."""

    def __init__(self, model: VAE, images: Tensor) -> None:
        self.model = model
        self.images = images

    def at(self, z: Tensor) -> State:
        """The state of chains at ``z``."""
        z = z.detach().requires_grad_()
        with self.model.frozen_decoder(), torch.enable_grad():
            value = self.model.log_likelihood(self.images, z)
            (gradient,) = torch.autograd.grad(value.sum(), z)
        return State(z.detach(), value.detach(), gradient)

    def from_prior(self, count: int, generator: torch.Generator) -> State:
        """``count`` chains for each image, with ``z ~ N(0, I)``."""
        return self.at(draw_noise(self.model, self.images, count, generator))


def transition(
    target: Target, state: State, temperature: float, step: Tensor, leapfrogs: int, noise: Noise
) -> tuple[State, Tensor]:
    """One trajectory of Hamiltonian Monte Carlo, which leaves ``p(z) p(x|z)^b`` invariant.

    Args:
        target: gives ``log p(x|z)``.
        state: of the chains.
        temperature: b.
        step: size of a leapfrog step, 0-dim.
        leapfrogs: steps of the trajectory, each with one evaluation of the target.
        noise: see :class:`Noise`.

    Returns:
        The new state, and the probability with which each trajectory was to be accepted ``[n, k]``;
        0 for one that has left the numbers.
    """
    end = state
    momentum = noise.momentum + step / 2 * (temperature * state.gradient - state.z)
    for index in range(leapfrogs):
        end = target.at(end.z + step * momentum)
        kick = step if index + 1 < leapfrogs else step / 2
        momentum = momentum + kick * (temperature * end.gradient - end.z)
    change = _energy(end, momentum, temperature) - _energy(state, noise.momentum, temperature)
    accepted = noise.log_uniform < -change  # not where the change is NaN
    fields = (
        torch.where(accepted.reshape(accepted.shape + (1,) * (new.dim() - 2)), new, old)
        for new, old in zip(end, state, strict=True)
    )
    return State(*fields), (-change).clamp(max=0).exp().nan_to_num(0)


def _energy(state: State, momentum: Tensor, temperature: float) -> Tensor:
    squares = state.z.square().sum(-1) + momentum.square().sum(-1)
    return squares / 2 - temperature * state.log_likelihood


def anneal(
    target: Target,
    state: State,
    path: Path,
    leapfrogs: int,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Annealed:
    """Chains along a path, which never wait for the device.

    Args:
        target: of the images.
        state: where the chains start: draws from the prior, or for a way :meth:`~Path.back`, from
            the posterior.
        path: increments and transitions.
        leapfrogs: of each transition.
        generator: on the device.
        progress: told now and then how far the chains are.
    """
    total = len(path.increments)
    log_weights = torch.zeros_like(state.log_likelihood, dtype=torch.float64)
    acceptance = torch.zeros_like(log_weights)
    for index, increment in enumerate(path.increments):
        if progress is not None and index % BEAT == 0:
            under_way = len(log_weights) * index / total
            progress(0, f"temperature {index + 1:,} of {total:,}", under_way)
        log_weights += increment * state.log_likelihood.double()
        if index + 1 < total:
            noise = Noise.draw(state.z, generator)
            temperature, step = path.temperatures[index], path.steps[index]
            state, probability = transition(target, state, temperature, step, leapfrogs, noise)
            acceptance += probability
    return Annealed(log_weights, acceptance.mean(1) / (total - 1))


def pilot(
    target: Target,
    chains: int,
    temperatures: list[float],
    leapfrogs: int,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Tensor:
    """The leapfrog step size of each transition, ``[T - 1]``, for an acceptance of 0.65.

    Chains of the pilot's own go through the temperatures from the prior on. At each, the step size
    moves with the mean acceptance of a trajectory, and is then taken down.

    Args:
        target: of the images that the pilot looks at.
        chains: of each of these images.
        temperatures: ``b_0`` to ``b_T``.
        leapfrogs: of each transition.
        generator: on the device.
        progress: told now and then how far it is.
    """
    state = target.from_prior(chains, generator)
    between = temperatures[1:-1]
    log_step = torch.zeros((), dtype=torch.float64, device=state.z.device)
    steps = []
    for index, temperature in enumerate(between[:1] * PILOT_START + between):
        if progress is not None and index % BEAT == 0:
            progress(0, f"pilot, {index + 1:,} of {PILOT_START + len(between):,}")
        noise = Noise.draw(state.z, generator)
        step = log_step.exp().to(state.z)
        state, probability = transition(target, state, temperature, step, leapfrogs, noise)
        log_step = log_step + PILOT_RATE * (probability.double().mean() - TARGET_ACCEPTANCE)
        steps.append(log_step)
    return torch.stack(steps[PILOT_START:]).exp().to(state.z)


@dataclass
class Ais(Evaluator):
    """Annealed importance sampling, its step sizes found by a pilot and then frozen.

    Attributes:
        chains: for each image.
        temperatures: T, steps from the prior to the posterior.
        leapfrog_steps: of the trajectory at each temperature.
        schedule: how the temperatures lie between 0 and 1.
        pilot_images: images that the pilot looks at, at equal distances in the split.
        pilot_chains: the pilot's own chains, for each of them.
        num_images: evaluate only so many images, the first of the split; null for all.
    """

    chains: int = 16
    temperatures: int = 1000
    leapfrog_steps: int = 10
    schedule: Schedule = Schedule.sigmoidal
    pilot_images: int = 25
    pilot_chains: int = 8
    num_images: int | None = None

    def __post_init__(self) -> None:
        for field, least in (
            ("chains", 1),
            ("temperatures", 2),
            ("leapfrog_steps", 1),
            ("pilot_images", 1),
            ("pilot_chains", 1),
        ):
            value = getattr(self, field)
            require(value >= least, f"{field} must be at least {least}, got {value}")
        require(
            self.num_images is None or self.num_images >= 2,
            f"num_images must be at least 2 or null, got {self.num_images}",
        )

    @property
    def name(self) -> str:  # type: ignore[override]  # read only: the size decides
        """In results: the size, ``ais_CHAINSxTEMPERATURESxLEAPFROGS``, or ``ais_paper``."""
        size = (self.chains, self.temperatures, self.leapfrog_steps)
        schedule = "" if self.schedule is Schedule.sigmoidal else f"_{self.schedule.name}"
        return f"ais_{'paper' if size == PAPER else 'x'.join(map(str, size))}{schedule}"

    @property
    def num_samples(self) -> int:  # type: ignore[override]  # read only
        """In results: a chain is one weighted sample."""
        return self.chains

    def __call__(
        self,
        model: VAE,
        images: Tensor,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> Tensor:
        """``log p(x)`` of each image, ``[N]`` nats."""
        return self.evaluate(model, images, generator, progress, Unfinished()).values

    def evaluate(
        self,
        model: VAE,
        images: Tensor,
        generator: torch.Generator,
        progress: Progress | None,
        unfinished: Unfinished,
    ) -> Evaluated:
        """The estimates with acceptance, effective sample sizes and the settings.

        Each batch of images has a random stream of its own, below the generator's seed: what is
        found unfinished is gone on with as if it had never been stopped.

        Raises:
            NonFiniteError: an image's estimate is NaN or infinite.
            RunError: what was kept cannot be read or written.
        """
        images = images[: self.num_images]
        root = generator.initial_seed()
        batches = images.split(max(1, model.rows_at_a_time(images) // self.chains))
        settings = {
            field: value.name if isinstance(value, enum.Enum) else value
            for field, value in vars(self).items()
        }
        plain = (ucvae.__version__, settings, root, images.device.type, len(batches[0]))
        key = digest(plain, [*model.state_dict().values(), images])
        state = unfinished.find(self.name, key, steps=Tensor, batches=list)
        if state is None:
            steps = self.find_steps(model, images, stream(root, "pilot", images.device), progress)
            state = {"steps": steps.cpu(), "batches": []}
        path = self.path(state["steps"].to(images))
        for index, batch in enumerate(batches):
            if index >= len(state["batches"]):
                found = self.forward(
                    model, batch, path, stream(root, f"batch {index}", images.device), progress
                )
                state["batches"].append([field.cpu() for field in found])
                unfinished.keep(state)
            if progress is not None:
                progress(len(batch))
        annealed = Annealed(*map(torch.cat, zip(*state["batches"], strict=True)))
        return Evaluated(
            require_finite(annealed.lower()), {"settings": settings} | diagnostics(annealed)
        )

    def find_steps(
        self,
        model: VAE,
        images: Tensor,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> Tensor:
        """The pilot's step sizes for some of the images ``[N, P]``, ``[T - 1]``."""
        count = min(self.pilot_images, len(images))
        chosen = images[torch.arange(count, device=images.device) * len(images) // count]
        return pilot(
            Target(model, chosen),
            self.pilot_chains,
            self.schedule.temperatures(self.temperatures),
            self.leapfrog_steps,
            generator,
            progress,
        )

    def path(self, steps: Tensor) -> Path:
        """From prior to posterior, with the pilot's step sizes."""
        return Path.of(self.schedule.temperatures(self.temperatures), steps)

    def forward(
        self,
        model: VAE,
        images: Tensor,
        path: Path,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> Annealed:
        """Chains of a batch of images from the prior."""
        target = Target(model, images)
        start = target.from_prior(self.chains, generator)
        return anneal(target, start, path, self.leapfrog_steps, generator, progress)

    def backward(
        self,
        model: VAE,
        images: Tensor,
        posterior: Tensor,
        path: Path,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> Annealed:
        """Chains of a batch of images from one draw of each posterior, ``[n, D]``."""
        target = Target(model, images)
        start = target.at(posterior[:, None].expand(-1, self.chains, -1))
        return anneal(target, start, path.back(), self.leapfrog_steps, generator, progress)


def diagnostics(annealed: Annealed) -> dict[str, Any]:
    """Mean acceptance and effective sample size over images, and the least of each."""
    found = {}
    for name, values in (("acceptance", annealed.acceptance), ("ess", annealed.ess())):
        found[name] = {"mean": values.mean().item(), "min": values.min().item()}
    return found
