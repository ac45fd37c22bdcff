r"""The lagged coupled estimator as a signed empirical measure (Eq 14, Eq 15, Alg 4).

For each image a chain X runs L steps alone, a second chain Y starts, and ``(X_t, Y_{t-L})`` then
move together until they meet. With ``tau = inf{t >= L : X_t = Y_{t-L}}``,

    H = (1/L) [ sum_{t=t0}^{t0+L-1} h(X_t) + sum_{t=t0+L}^{tau-1} (h(X_t) - h(Y_{t-L})) ]

is an unbiased estimate of the posterior expectation of ``h(z)``, where ``h(X_t)`` averages over
the K samples of the step that led to ``X_t`` by their normalised weights (Prop 2). Written out it
is a sum over particles ``(image, noise, coefficient)`` whose coefficients add up to 1 for every
image: a signed measure, which this module returns. It knows a log-weight function and no model,
and builds no autograd graph.

**When two states are equal.** ``X_t = Y_{t-L}`` means the whole state, its K samples included.
Chains meet in a ``beta = 0`` step by selecting the same fresh sample, but in that step slot ``a``
still holds two different incumbents. In the composed kernel the DISIR move that follows makes
the samples equal too, and ``tau = t``. With ISIR alone (:mod:`ucvae.chains.isir`), and wherever
chains meet in the last move of a kernel, the correction at this t is kept and ``tau = t + 1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any, NoReturn

import torch
from torch import Tensor

from ucvae.chains.hmc import Hmc
from ucvae.chains.horizon import Horizon
from ucvae.chains.isir import run_isir
from ucvae.chains.kernels import Evaluate, Samples, State
from ucvae.chains.measure import (
    LaggedChains,
    LogWeight,
    SignedParticles,
    evaluate,
    refuse_invalid,
)
from ucvae.chains.moves import ComposedKernel, Disir, Isir, Move, moves_of
from ucvae.chains.selection import effective_sample_size


class Kernel(Enum):
    """ISIR alone (Alg 1), with a trajectory of HMC before each L-th step, or with DISIR after each.

    Raises:
        ValueError: the name of no kernel.
    """

    isir = "isir"
    isir_disir = "isir_disir"
    isir_hmc = "isir_hmc"

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        names = ", ".join(kernel.value for kernel in cls)
        if value == "disir":
            value = "disir, whose chains never meet (for a single one see ucvae.chains.kernels)"
        elif not isinstance(value, str):
            value = f"{value}, which is no ComposedKernel"
        raise ValueError(f"kernel must be one of {names}, got {value}")


@torch.no_grad()
def run_lagged_chains(
    log_weight: LogWeight,
    num_images: int,
    dim: int,
    *,
    generator: torch.Generator,
    num_samples: int = 10,
    lag: int = 10,
    burn_in: int = 1,
    kernel: Kernel | str | ComposedKernel = Kernel.isir_disir,
    beta: float | Tensor = 0.5,
    max_steps: int = 1000,
    survival: float = 0.0,
    dtype: torch.dtype = torch.float32,
    first: tuple[Tensor, Tensor] | None = None,
    hmc: Hmc | None = None,
) -> LaggedChains:
    """Run the coupled chains of a batch of images and return their signed particles.

    Images that have met leave the batch, so the cost is the sum of the meeting times. After the
    lag each step waits for the device once, to learn which images are left (of ISIR each block
    of steps, of a composed kernel each move in which chains may meet), and so do each game of
    roulette and the cap. The call waits once more at its end, to learn of invalid weights; nothing
    else does.

    Args:
        log_weight: ``(noise [n, k, D], image_index [n]) -> [n, k]``, the log importance weights
            ``log p(x, z) - log q(z|x)`` in nats, with noise ``N(0, I)`` under q. Of any dtype:
            they are normalised in float64. The images are in their order, and none is there twice.
        num_images: n, at least 1.
        dim: D, the dimension of the noise.
        generator: the only source of randomness; the chains live on its device.
        num_samples: K, at least 2.
        lag: L, at least 1.
        burn_in: t0, at least 0.
        kernel: ``isir`` (Alg 1), ``isir_disir`` (one ISIR step, then one DISIR step), ``isir_hmc``
            (ISIR, and :mod:`ucvae.chains.hmc` before each L-th step), or one made of other moves
            (:class:`ComposedKernel`).
        beta: the correlation of DISIR in ``[0, 1)``, the same throughout the call. A tensor on
            another device than the CPU is taken as it is, for a check would wait for the device.
        max_steps: how far a pair may go on before it has met, at least t0 + L.
        survival: with 0 ``max_steps`` is a cap on t; else the probability q, below 1/2, with which
            a pair goes on there, and again at twice, four times ... as many steps: Russian roulette
            (:mod:`ucvae.chains.horizon`), by which nothing is biased.
        dtype: of the noise.
        first: noise ``[n, K, D]`` drawn by the caller from N(0, I) for the first samples of X,
            and its log weights ``[n, K]``, which count as evaluations: X_0, and the K - 1 others of
            its first step (at ``burn_in=0`` the K samples of X_0 itself). A kernel whose first
            move is not ISIR's has no use for these others.

        hmc: of the kernel ``isir_hmc``, and of no other.

    Raises:
        ValueError: an argument is outside its range, or the log weights are no tensor of the shape
            ``[n, k]``.
        NonFiniteError: an image's log weights hold a NaN or +inf, or all K of a step are -inf.
    """
    _check(num_images, dim, num_samples, lag, burn_in, beta, max_steps, survival)
    if first is not None:
        _check_first(first, (num_images, num_samples, dim))
    settings: dict[str, Any] = {
        "generator": generator,
        "num_samples": num_samples,
        "lag": lag,
        "burn_in": burn_in,
        "max_steps": max_steps,
        "survival": survival,
        "dtype": dtype,
        "first": first,
    }
    named = None if isinstance(kernel, ComposedKernel) else Kernel(kernel)
    if (hmc is None) == (named is Kernel.isir_hmc):
        raise ValueError("hmc must be given with the kernel isir_hmc and with no other")
    if isinstance(kernel, ComposedKernel):
        moves = moves_of(kernel)
    elif named in (Kernel.isir, Kernel.isir_hmc):
        return run_isir(log_weight, num_images, dim, hmc=hmc, **settings)
    else:
        moves = Isir(), Disir(beta)
    return _run_moves(log_weight, num_images, dim, moves, **settings)


def _run_moves(
    log_weight: LogWeight,
    num_images: int,
    dim: int,
    moves: tuple[Move, ...],
    *,
    generator: torch.Generator,
    num_samples: int,
    lag: int,
    burn_in: int,
    max_steps: int,
    survival: float,
    dtype: torch.dtype,
    first: tuple[Tensor, Tensor] | None,
) -> LaggedChains:
    device = generator.device
    # A step's samples, which the sums are over, are those of its last move.
    in_order = [(move, place == len(moves)) for place, move in enumerate(moves, start=1)]
    log = _Ledger(num_images, lag, device)

    def draw(move: Move, count: int) -> Any:
        return move.draw(count, num_samples, dim, generator=generator, device=device, dtype=dtype)

    def evaluator(image_index: Tensor) -> Evaluate:
        def of_noise(noise: Tensor) -> Tensor:
            values = evaluate(log_weight, noise, image_index)
            log.evaluate(image_index, values)
            return values

        return of_noise

    def evaluated(log_weights: Tensor) -> Evaluate:
        return lambda _: log_weights

    def known(noise: Tensor, log_weights: Tensor) -> tuple[State, Samples]:
        samples = Samples.of(noise, log_weights)
        if burn_in == 0:
            log.note(everyone, samples)
        return State(noise[:, 0], log_weights[:, 0]), samples

    def start() -> tuple[State, Samples]:
        # pi_0: K independent draws of which l, uniform, selects one. They are exchangeable, so
        # the first stands for it; the others matter only to h(X_0), that is at burn-in 0.
        count = num_samples if burn_in == 0 else 1
        noise = torch.randn(num_images, count, dim, generator=generator, device=device, dtype=dtype)
        return known(noise, evaluator(everyone)(noise))

    everyone = torch.arange(num_images, device=device)
    main_end = burn_in + lag - 1

    # X alone for L steps.
    given = None
    if first is None:
        x, x_samples = start()
    else:
        reused = num_samples if burn_in == 0 or isinstance(moves[0], Isir) else 1
        noise, log_weights = (part[:, :reused] for part in first)
        log.evaluate(everyone, log_weights)
        if reused < num_samples:
            log.independent(first[1][:, reused:])
        x, x_samples = known(noise, log_weights)
        if burn_in > 0:
            x_samples = Samples.of(noise[:, :1], log_weights[:, :1])
            given = (noise[:, 1:], log_weights[:, 1:]) if reused > 1 else None
    log.independent(x_samples.log_weights)
    if burn_in == 0:
        log.average(everyone, x_samples)
    for t in range(1, lag + 1):
        for move in moves:
            drawn, of_noise = draw(move, num_images), evaluator(everyone)
            if given is not None:
                fresh, log_weights = given
                drawn, of_noise = drawn._replace(fresh=fresh), evaluated(log_weights)
                given = None
            x, x_samples = move.step(x, drawn, of_noise)
            log.note(everyone, x_samples, move)
            if isinstance(move, Isir):
                log.independent(x_samples.log_weights[:, 1:])
        if burn_in <= t <= main_end:
            log.average(everyone, x_samples)

    # (X_t, Y_{t-L}) together. `pair` are the images that have not met; `solo` those that have,
    # of which X alone goes on, and only as far as the main sum (t <= t0 + L - 1) still needs it.
    y, y_samples = start()
    if burn_in == 0:
        log.correct(everyone, x_samples, y_samples, 1)
    pair, solo, solo_x = everyone, everyone[:0], x.rows(everyone[:0])
    t, horizon = lag, Horizon(max_steps, survival)
    while len(pair) or t < main_end:
        if t == horizon.end:
            survives = horizon.survivors(pair, generator)
            log.stop(pair[~survives], t)
            pair, x, y = pair[survives], x.rows(survives), y.rows(survives)
            continue
        t += 1
        for move, last in in_order:
            if len(solo):
                solo_x, samples = move.step(solo_x, draw(move, len(solo)), evaluator(solo))
                log.note(solo, samples, move)
                if last and burn_in <= t:
                    log.average(solo, samples)
            if not len(pair):
                continue
            moved = move.coupled_step(x, y, draw(move, len(pair)), evaluator(pair))
            x, y = moved.first, moved.second
            log.note(pair, moved.first_samples, move)
            log.note(pair, moved.second_samples, move)
            if last and t > main_end:
                log.correct(pair, moved.first_samples, moved.second_samples, horizon.weight)
            elif last and t >= burn_in:
                log.average(pair, moved.first_samples)
            if move.meets:
                # One wait for the device: how many are still apart. In most steps, all of them.
                gone = moved.met | moved.first_samples.invalid | moved.second_samples.invalid
                num_apart = int((~gone).sum())
                if num_apart == len(pair):
                    continue
                # Samples of the last move may still differ where chains have met in it.
                log.meet(pair, moved.met, t + 1 if last else t)
                apart, together = gone.byte().argsort(stable=True).tensor_split([num_apart])
                if t <= main_end:
                    solo, order = torch.cat([solo, pair[together]]).sort()
                    solo_x = solo_x.append(x.rows(together)).rows(order)
                pair, x, y = pair[apart], x.rows(apart), y.rows(apart)
        if t == main_end:
            solo = solo[:0]
    return log.result(biased=not survival)


class _Ledger:
    """What the chains of one call leave behind: kept as it comes, and added up once at the end."""

    def __init__(self, num_images: int, lag: int, device: torch.device) -> None:
        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_images, dtype=dtype, device=device)

        self.lag = lag
        self.evaluated: list[tuple[Tensor, Tensor, int]] = []
        self.noted: list[tuple[Tensor, Tensor]] = []
        self.disir_weights: list[Tensor] = []
        self.main: list[tuple[float, Tensor, Samples]] = []
        self.correction: list[tuple[float, Tensor, Samples]] = []
        self.meeting_time = zeros(torch.long)
        self.stopped = zeros(torch.bool)
        self.evaluations = zeros(torch.long)
        self.not_below_infinity = zeros(torch.bool)
        self.invalid = zeros(torch.bool)
        self.mean_log_weight = zeros(torch.float64)
        self.log_sum_weight = zeros(torch.float64) - torch.inf
        self.num_independent = 0

    def evaluate(self, image_index: Tensor, log_weights: Tensor) -> None:
        """Count evaluations, and watch for a NaN or +inf, which the largest shows."""
        self.evaluated.append((image_index, log_weights.amax(-1), log_weights.shape[1]))

    def independent(self, log_weights: Tensor) -> None:
        """Log weights of every image at independent draws from its proposal."""
        log_sum = log_weights.double().logsumexp(-1)
        self.log_sum_weight = torch.logaddexp(self.log_sum_weight, log_sum)
        self.num_independent += log_weights.shape[1]

    def average(self, image_index: Tensor, samples: Samples) -> None:
        """A term of the first sum of Eq 14."""
        self.main.append((1, image_index, samples))

    def correct(self, image_index: Tensor, first: Samples, second: Samples, weight: float) -> None:
        """A term of the second sum of Eq 14, ``weight`` times."""
        self.correction += (weight, image_index, first), (-weight, image_index, second)

    def note(self, image_index: Tensor, samples: Samples, move: Move | None = None) -> None:
        """Watch for invalid weights, and keep DISIR's for their effective sample size."""
        self.noted.append((image_index, samples.invalid))
        if isinstance(move, Disir):
            self.disir_weights.append(samples.weights)

    def meet(self, image_index: Tensor, met: Tensor, time: int) -> None:
        self.meeting_time[image_index] = torch.where(met, time, self.meeting_time[image_index])

    def stop(self, image_index: Tensor, time: int) -> None:
        """Note images whose pair goes no further, though it has not met."""
        self.stopped[image_index] = True
        self.meeting_time[image_index] = time

    def result(self, biased: bool) -> LaggedChains:
        """All that has been noted; ``biased``: whether an image that was stopped is."""
        self._add_up_evaluations()
        refuse_invalid(self.not_below_infinity, self.invalid)
        if len({samples.noise.shape[1] for _, _, samples in self.main + self.correction}) > 1:
            # A start has K samples, a move as many as it likes; groups are of one size.
            self.main, self.correction = _one_by_one(self.main), _one_by_one(self.correction)
        main = self._measure(self.main)
        if self.correction:
            correction = self._measure(self.correction)
        else:
            correction = SignedParticles(*(part[:0] for part in main))
        return LaggedChains(
            main=main,
            correction=correction,
            particles=SignedParticles.join([main, correction]),
            meeting_time=self.meeting_time,
            truncated=self.stopped & biased,
            evaluations=self.evaluations,
            ess=self._ess(),
            acceptance=torch.full_like(self.mean_log_weight[0], torch.nan),
            mean_log_weight=self.mean_log_weight,
            log_mean_weight=self.log_sum_weight - math.log(self.num_independent),
        )

    def _add_up_evaluations(self) -> None:
        indices, largest, counts = zip(*self.evaluated, strict=True)
        index = torch.cat(indices)
        self.evaluations.index_add_(0, index, self._spread(counts, indices, torch.long))
        above = ~(torch.cat(largest) < torch.inf)
        self.not_below_infinity.index_put_((index,), above, accumulate=True)
        indices, invalid = zip(*self.noted, strict=True)
        self.invalid.index_put_((torch.cat(indices),), torch.cat(invalid), accumulate=True)

    def _measure(self, terms: list[tuple[float, Tensor, Samples]]) -> SignedParticles:
        """The particles of these terms, in their order; adds what they say of the log weight."""
        factors, indices, samples = zip(*terms, strict=True)
        noise, log_weights, weights = (torch.cat(parts) for parts in zip(*samples, strict=True))
        image_index = torch.cat(indices)
        factor = self._spread(factors, indices, torch.float64)
        coefficient = factor[:, None] * weights / self.lag
        # A sample of weight 0 has no part, though its log weight is -inf.
        part = torch.where(weights > 0, coefficient * log_weights, 0.0)
        self.mean_log_weight.index_add_(0, image_index, part.sum(-1))
        return SignedParticles(image_index, noise, coefficient.to(noise.dtype))

    def _spread(
        self, values: Sequence[float], indices: Sequence[Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Each value once for each entry of its index, on their device."""
        lengths = torch.tensor([len(index) for index in indices])
        return torch.tensor(values, dtype=dtype).repeat_interleave(lengths).to(indices[0].device)

    def _ess(self) -> Tensor:
        if not self.disir_weights:
            return torch.full_like(self.mean_log_weight[0], torch.nan)
        return effective_sample_size(torch.cat(self.disir_weights)).mean()


def _one_by_one(
    terms: list[tuple[float, Tensor, Samples]],
) -> list[tuple[float, Tensor, Samples]]:
    """The same terms, each sample in a group of its own."""
    return [
        (
            factor,
            image_index.repeat_interleave(samples.noise.shape[1]),
            Samples(*(part.flatten(0, 1)[:, None] for part in samples)),
        )
        for factor, image_index, samples in terms
    ]


def _check_first(first: tuple[Tensor, Tensor], shape: tuple[int, int, int]) -> None:
    shapes = tuple(part.shape for part in first)
    if shapes != (shape, shape[:2]):
        raise ValueError(
            f"first must be noise {list(shape)} and its log weights {list(shape[:2])}, got "
            + " and ".join(str(list(found)) for found in shapes)
        )


def _check(
    num_images: int,
    dim: int,
    num_samples: int,
    lag: int,
    burn_in: int,
    beta: float | Tensor,
    max_steps: int,
    survival: float,
) -> None:
    for name, value, least in (
        ("num_images", num_images, 1),
        ("dim", dim, 1),
        ("num_samples", num_samples, 2),
        ("lag", lag, 1),
        ("burn_in", burn_in, 0),
        ("max_steps", max_steps, burn_in + lag),
    ):
        if value < least:
            rule = f"burn_in + lag = {least}" if name == "max_steps" else str(least)
            raise ValueError(f"{name} must be at least {rule}, got {value}")
    if not 0 <= survival < 0.5:
        raise ValueError(f"survival must be in [0, 0.5), got {survival}")
    if isinstance(beta, Tensor) and beta.ndim:
        raise ValueError(f"beta must be one number, got a tensor {list(beta.shape)}")
    on_host = not isinstance(beta, Tensor) or beta.device.type == "cpu"
    if on_host and not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {float(beta)}")
