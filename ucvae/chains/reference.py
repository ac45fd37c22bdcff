r"""The paper's algorithms written out literally: the reference that tests hold the fast code to.

One image, plain Python, explicit lists, a loop over the slots 1..K in their natural order with the
incumbent in slot ``a``: slow, and easy to compare with Alg 1 to 5 line by line. Nothing else in the
package uses it. It is fed the same :class:`~ucvae.chains.kernels.StepNoise` as the fast code (that
of one image: no batch dimension), so that both must give the same numbers.

Conventions of the fast code decide which random number goes where, and are followed here:

* ``fresh`` holds the K - 1 draws in the order of the slots other than ``a``.
* An index is found by inverting a cumulative sum. The sum depends on the order in which slots are
  visited, and the fast code stores the incumbent first and the others behind it in the order of
  their slots. So the slots are visited in that order here too. Any order that does not depend on
  the samples gives the same law; only the same order turns the same uniform into the same sample.
* The kernel ``isir`` by itself takes two decisions in place of one index (:func:`select_in_two`),
  each with a uniform that is shared by a pair of chains; ``uniforms`` then holds these two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ucvae.chains.kernels import StepNoise

LogWeight = Callable[[Tensor], float]
"""Noise ``[D]`` to its log weight."""


class State(NamedTuple):
    """The K samples of a step, their normalised weights, the incumbent's slot and the selected one.

    ``samples[chosen]`` is the selected noise, which is all that the next step depends on. For a
    start ``slot`` is ``chosen``: no incumbent came before.
    """

    samples: list[Tensor]
    weights: list[float]
    slot: int
    chosen: int

    @property
    def selected(self) -> Tensor:
        """The noise that the next step starts from, ``[D]``."""
        return self.samples[self.chosen]

    def equals(self, other: State) -> bool:
        """Whether the whole states agree, every sample of them, not the selected ones alone."""
        same = all((a == b).all() for a, b in zip(self.samples, other.samples, strict=True))
        return bool(same) and self.chosen == other.chosen


class Term(NamedTuple):
    """A summand of Eq 14: ``factor * h(state)``, that is a particle ``factor * W_k`` at each k."""

    factor: float
    state: State


class HmcNoise(NamedTuple):
    """All that is random in the moves of ``isir_hmc``: of one image, for one chain or two.

    Momentum ``[D]``, length of the leapfrog steps, and uniform of the trajectory; step ``[D]``,
    uniform of its coupling, and uniform of the small step.
    """

    momentum: Tensor
    length: float
    trajectory: float
    step: Tensor
    coupling: float
    small: float


class Hmc(NamedTuple):
    """What the kernel ``isir_hmc`` needs beside the others.

    Attributes:
        gradient: of the log density that the chains are for, in noise ``[D]``: its value and the
            gradient ``[D]``.
        draw: gives the noise of the next moves.
        leapfrog_steps: of a trajectory.
        small: standard deviation of a small step.
    """

    gradient: Callable[[Tensor], tuple[float, Tensor]]
    draw: Callable[[], HmcNoise]
    leapfrog_steps: int
    small: float


class Measure(NamedTuple):
    """The summands of Eq 14 in the order of t, X before Y; ``tau``; whether the cap was reached."""

    terms: list[Term]
    meeting_time: int
    truncated: bool


def start(samples: list[Tensor], index: int, log_weight: LogWeight) -> State:
    """``pi_0``: independent draws ``xi_k ~ N(0, I)``, of which ``index``, uniform, is selected."""
    return State(samples, _normalize([log_weight(xi) for xi in samples]), index, index)


def propose(incumbent: Tensor, noise: StepNoise, beta: float) -> list[Tensor]:
    """Alg 2, lines 1 and 2: the incumbent into slot a, then outward in both directions.

    With ``beta = 0`` it is Alg 1.
    """
    count = len(noise.fresh) + 1
    a = int(noise.slot)
    others = [k for k in range(count) if k != a]
    fresh = {k: noise.fresh[position] for position, k in enumerate(others)}
    xi = {a: incumbent}
    for k in range(a + 1, count):
        xi[k] = beta * xi[k - 1] + math.sqrt(1 - beta**2) * fresh[k]
    for k in range(a - 1, -1, -1):
        xi[k] = beta * xi[k + 1] + math.sqrt(1 - beta**2) * fresh[k]
    return [xi[k] for k in range(count)]


def isir_step(state: State, noise: StepNoise, log_weight: LogWeight) -> State:
    """One step of Alg 1, its index found by two decisions."""
    a = int(noise.slot)
    samples = propose(state.selected, noise, 0.0)
    weights = _normalize([log_weight(xi) for xi in samples])
    index = select_in_two(weights, a, [float(u) for u in noise.uniforms])
    return State(samples, weights, a, index)


def coupled_isir_step(
    x: State, y: State, noise: StepNoise, log_weight: LogWeight
) -> tuple[State, State]:
    """One step of Alg 3 at ``beta = 0``: slot, fresh noise and both decisions are shared."""
    return isir_step(x, noise, log_weight), isir_step(y, noise, log_weight)


def select_in_two(weights: list[float], a: int, uniforms: list[float]) -> int:
    """An index in proportion to ``weights``: whether to leave slot ``a``, and where to.

    Chains that share the samples in all slots but ``a`` have the joint law of Alg 5 if they share
    both uniforms: the second decision is the same for both, as the weights of the other slots have
    the same proportions.

    Args:
        weights: normalised weights W.
        a: the incumbent's slot.
        uniforms: in [0, 1): one for each decision.
    """
    others = [0.0 if k == a else w for k, w in enumerate(weights)]
    if uniforms[0] >= sum(others):
        return a
    return invert(others, uniforms[1], list(range(len(weights))))


def step(state: State, noise: StepNoise, log_weight: LogWeight, beta: float) -> State:
    """One step of Alg 1 (``beta = 0``, ISIR) or Alg 2 (DISIR) in the composed kernel."""
    a = int(noise.slot)
    samples = propose(state.selected, noise, beta)
    weights = _normalize([log_weight(xi) for xi in samples])
    index = invert(weights, float(noise.uniforms[1]), visiting_order(a, len(samples)))
    return State(samples, weights, a, index)


def coupled_step(
    x: State, y: State, noise: StepNoise, log_weight: LogWeight, beta: float
) -> tuple[State, State]:
    """One step of Alg 3: the slot and the fresh noise are shared, the indices maximally coupled."""
    a = int(noise.slot)
    x_samples, y_samples = propose(x.selected, noise, beta), propose(y.selected, noise, beta)
    x_weights = _normalize([log_weight(xi) for xi in x_samples])
    y_weights = _normalize([log_weight(xi) for xi in y_samples])
    uniforms = [float(u) for u in noise.uniforms]
    order = visiting_order(a, len(x_samples))
    x_index, y_index = couple_indices(x_weights, y_weights, uniforms, order)
    return State(x_samples, x_weights, a, x_index), State(y_samples, y_weights, a, y_index)


def couple_indices(
    first: list[float], second: list[float], uniforms: list[float], order: list[int]
) -> tuple[int, int]:
    """Alg 5: a pair of indices, each with its own weights' law, equal as often as can be.

    Args:
        first: normalised weights W.
        second: normalised weights V.
        uniforms: in [0, 1): one decides between common and residual, one is for each index.
        order: in which slots are visited when a cumulative sum is inverted.
    """
    overlap = [min(w, v) for w, v in zip(first, second, strict=True)]
    if first == second or uniforms[0] < sum(overlap):
        index = invert(overlap, uniforms[1], order)
        return index, index
    first_residual = [w - common for w, common in zip(first, overlap, strict=True)]
    second_residual = [v - common for v, common in zip(second, overlap, strict=True)]
    return (
        invert(first_residual, uniforms[1], order),
        invert(second_residual, uniforms[2], order),
    )


def invert(masses: list[float], uniform: float, order: list[int]) -> int:
    """The slot at which the cumulative sum of ``masses`` passes ``uniform`` times their total."""
    threshold = uniform * sum(masses)
    cumulative = 0.0
    for slot in order:
        cumulative += masses[slot]
        if cumulative > threshold:
            return slot
    return max(slot for slot in order if masses[slot] > 0)


def visiting_order(a: int, count: int) -> list[int]:
    """The incumbent's slot, then the others in their order (see the module's docstring)."""
    return [a, *(slot for slot in range(count) if slot != a)]


def trajectory(start: Tensor, noise: HmcNoise, hmc: Hmc) -> Tensor:
    """Hamiltonian Monte Carlo (Neal 2011, Fig 2): where a trajectory from ``start`` leads.

    Momentum makes half a step, position and momentum take turns, and momentum makes the other half.
    """
    position, momentum = start.clone(), noise.momentum
    value, slope = hmc.gradient(position)
    energy = -value + float(momentum @ momentum) / 2
    momentum = momentum + noise.length * slope / 2
    for step in range(1, hmc.leapfrog_steps + 1):
        position = position + noise.length * momentum
        value, slope = hmc.gradient(position)
        if step < hmc.leapfrog_steps:
            momentum = momentum + noise.length * slope
    momentum = momentum + noise.length * slope / 2
    after = -value + float(momentum @ momentum) / 2
    return position if noise.trajectory < math.exp(min(0.0, energy - after)) else start


def small_steps(states: list[Tensor], noise: HmcNoise, hmc: Hmc) -> list[Tensor]:
    """A step of a random walk of one chain, or of two by the reflection-maximal coupling.

    Bou-Rabee, Eberle and Zimmer 2020, Section 2.3: the second chain goes where the first one does
    with probability ``N(other) / N(step)``, at most 1, and else in the mirrored direction.
    """
    x, y = states[0], states[-1]
    ends = [x + hmc.small * noise.step]
    if len(states) == 2:
        difference = (x - y) / hmc.small
        other = noise.step + difference
        ratio = math.exp(min(0.0, float(noise.step @ noise.step - other @ other) / 2))
        if noise.coupling < ratio:
            ends.append(ends[0])
        else:
            direction = difference / difference.norm()
            mirrored = noise.step - 2 * (direction @ noise.step) * direction
            ends.append(y + hmc.small * mirrored)
    after = []
    for state, end in zip(states, ends, strict=True):
        gain = hmc.gradient(end)[0] - hmc.gradient(state)[0]
        after.append(end if noise.small < math.exp(min(0.0, gain)) else state)
    return after


def signed_measure(
    log_weight: LogWeight,
    draw_start: Callable[[], list[Tensor]],
    draw: Callable[[], StepNoise],
    *,
    lag: int,
    burn_in: int,
    kernel: str,
    beta: float,
    max_steps: int,
    survival: float = 0.0,
    draw_uniform: Callable[[], float] | None = None,
    hmc: Hmc | None = None,
) -> Measure:
    """Alg 4 and Eq 14, for one image.

    The chains meet at ``tau = inf{t >= L : X_t = Y_{t-L}}``, the equality being that of the whole
    states: it is looked for, not inferred.

    Args:
        log_weight: of one noise vector.
        draw_start: gives the draws of a start; the first is the selected one, as they are
            exchangeable. Called for X, later for Y.
        draw: gives the noise of the next step of one kernel.
        lag: L.
        burn_in: t0.
        kernel: ``isir``, ``isir_disir``, or ``isir_hmc``: ``isir`` with a trajectory and a small
            step before each step at a multiple of L, by either chain's own count.
        beta: DISIR's correlation.
        max_steps: no step t beyond this one without roulette.
        survival: q; 0 without roulette.
        draw_uniform: gives the uniform of a game; needed for roulette.
        hmc: of ``isir_hmc``.

    Raises:
        ValueError: there is none, and q is not 0.
    """
    if survival > 0 and draw_uniform is None:
        raise ValueError("draw_uniform is missing, and survival is not 0")
    kernels: dict[str, list[tuple[Callable[..., State], Callable[..., tuple[State, State]]]]] = {
        "isir": [(isir_step, coupled_isir_step)],
        "isir_hmc": [(isir_step, coupled_isir_step)],
        "isir_disir": [(partial(step, beta=b), partial(coupled_step, beta=b)) for b in (0.0, beta)],
    }
    moves = kernels[kernel]

    def moved(t: int, *states: State) -> list[State]:
        """Before the step t: the same states, or where the moves of HMC lead them."""
        if kernel != "isir_hmc" or t % lag > 0 or hmc is None:
            return list(states)
        noise = hmc.draw()
        ends = [trajectory(state.selected, noise, hmc) for state in states]
        return [State([end], [1.0], 0, 0) for end in small_steps(ends, noise, hmc)]

    x = start(draw_start(), 0, log_weight)
    chain_x = [x]
    for s in range(1, lag + 1):
        (x,) = moved(s, x)
        for alone, _ in moves:
            x = alone(x, draw(), log_weight)
        chain_x.append(x)

    y = start(draw_start(), 0, log_weight)
    chain_y = [y]
    t, tau, horizon, weight = lag, None, max_steps, 1.0
    weights = {}  # of the terms, by t
    while tau is None:
        if t == horizon:
            if (x.selected == y.selected).all():
                tau = t + 1  # what the next step would show: equal from there on
                break
            if survival == 0 or draw_uniform is None or draw_uniform() >= survival:
                break
            horizon, weight = 2 * horizon, weight / survival
        t += 1
        weights[t] = weight
        x, y = moved(t, x, y)
        for _, together in moves:
            x, y = together(x, y, draw(), log_weight)
        chain_x.append(x)
        chain_y.append(y)
        if x.equals(y):
            tau = t
    last = t if tau is None else tau - 1

    while t < burn_in + lag - 1:
        t += 1
        (x,) = moved(t, x)
        for alone, _ in moves:
            x = alone(x, draw(), log_weight)
        chain_x.append(x)

    terms = [Term(1 / lag, chain_x[s]) for s in range(burn_in, burn_in + lag)]
    for s in range(burn_in + lag, last + 1):
        terms.append(Term(weights.get(s, 1.0) / lag, chain_x[s]))
        terms.append(Term(-weights.get(s, 1.0) / lag, chain_y[s - lag]))
    return Measure(terms, last if tau is None else tau, tau is None and survival == 0)


def _normalize(log_weights: list[float]) -> list[float]:
    top = max(log_weights)
    weights = [math.exp(value - top) for value in log_weights]
    return [weight / sum(weights) for weight in weights]
