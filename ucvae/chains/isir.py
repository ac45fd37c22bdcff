r"""Lagged coupled chains of ISIR alone, many steps at a time.

ISIR's proposals do not depend on its state. So the samples of many steps are drawn and evaluated in
one batch, and only the choice between them goes step by step, on a few numbers an image. That
choice takes two decisions. With ``w`` the weight of the incumbent and ``W`` the sum of those of the
K - 1 fresh samples, a chain

1. moves with probability ``W / (W + w)``, that is where ``log w < bar = log W + log((1 - u) / u)``
   for a uniform u,
2. to one of the fresh samples in proportion to their weights, whatever the state was.

Two chains that share both decisions are maximally coupled as Alg 5 wants: where both move, they
meet, with probability ``W / (W + max(w, v))``, which is all that their laws have in common beside
the incumbents; otherwise the lighter one may move alone.

Two chains that have met are one: from there on X and Y are at the same sample, and every term of
the correction is an exact zero. A sample that is drawn once stays in its place, and coefficients
are added up there, over the steps in which it is the incumbent and over both chains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ucvae.chains.hmc import Hmc
from ucvae.chains.horizon import Horizon
from ucvae.chains.measure import (
    LaggedChains,
    LogWeight,
    SignedParticles,
    evaluate,
    refuse_invalid,
)
from ucvae.chains.selection import normalize, select

# Samples in an evaluation of a few images that are left: enough to be worth the call.
ROWS = 512


class Chains(NamedTuple):
    """Where c chains (X, or X and Y) of n images stand.

    Log weight of the selected sample ``[c, n]`` (float64), and its place among all samples of the
    call ``[c, n]``.
    """

    log_weight: Tensor
    place: Tensor

    def at(self, index: slice | tuple[slice, Tensor]) -> Chains:
        """Both fields, indexed."""
        return Chains(self.log_weight[index], self.place[index])


class Fresh(NamedTuple):
    """The fresh samples of S steps of n images, and the decisions between them.

    Attributes:
        log_weights: ``[S, n, K-1]``, float64.
        place: of each among all samples of the call, ``[S, n, K-1]``.
        log_total: log of the sum of the weights, ``[S, n]``.
        bar: a chain whose log weight is below it moves, ``[S, n]``.
        chosen: where to, ``[S, n]`` in the form of :class:`Chains`.
    """

    log_weights: Tensor
    place: Tensor
    log_total: Tensor
    bar: Tensor
    chosen: Chains

    @classmethod
    def of(cls, log_weights: Tensor, place: Tensor, uniforms: Tensor) -> Fresh:
        """From log weights and places ``[S, n, K-1]``, and uniforms ``[S, n, 2]`` in [0, 1)."""
        move, which = uniforms.unbind(-1)
        log_total = log_weights.logsumexp(-1)
        index = select(normalize(log_weights), which)[..., None]
        chosen = Chains(
            log_weights.gather(-1, index).squeeze(-1), place.gather(-1, index).squeeze(-1)
        )
        bar = log_total + torch.log1p(-move) - move.log()
        return cls(log_weights, place, log_total, bar, chosen)

    def steps(self, steps: slice) -> Fresh:
        """Some of the steps."""
        return Fresh(
            self.log_weights[steps],
            self.place[steps],
            self.log_total[steps],
            self.bar[steps],
            self.chosen.at(steps),
        )


class Walk(NamedTuple):
    """S steps of c chains of n images.

    Attributes:
        time: t of the first step.
        fresh: what the chains chose from.
        incumbents: of each step, ``[S, c, n]`` in the form of :class:`Chains`.
        log_sum: log of the sum of a step's K weights, ``[S, c, n]``.
        end: where the last step has led, ``[c, n]``.
    """

    time: int
    fresh: Fresh
    incumbents: Chains
    log_sum: Tensor
    end: Chains

    def during(self, first: int, last: int) -> Walk:
        """The steps from t = ``first`` to ``last``, as many as there are; the end is as it was."""
        steps = slice(max(0, first - self.time), max(0, last + 1 - self.time))
        return self._replace(
            time=max(first, self.time),
            fresh=self.fresh.steps(steps),
            incumbents=self.incumbents.at(steps),
            log_sum=self.log_sum[steps],
        )

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Normalised weights of the incumbents ``[S, c, n]`` and of the others, ``[..., K-1]``."""
        fresh = self.fresh.log_weights[:, None] - self.log_sum[..., None]
        return (self.incumbents.log_weight - self.log_sum).exp(), fresh.exp()

    @property
    def apart(self) -> Tensor:
        """Where X and Y begin a step with different samples, ``[S, n]``."""
        return self.incumbents.place[:, 0] != self.incumbents.place[:, 1]

    @property
    def possible(self) -> Tensor:
        """Where every step has a sample of a positive and finite weight, ``[n]``."""
        return self.log_sum.isfinite().flatten(0, 1).all(0)

    @property
    def end_apart(self) -> Tensor:
        """Where they end the last one so, ``[n]``."""
        return self.end.place[0] != self.end.place[1]


def walk(chains: Chains, fresh: Fresh, time: int) -> Walk:
    """Let chains take the steps of ``fresh``, with decisions in common, from t = ``time`` on."""
    incumbents = []
    for bar, to_weight, to_place in zip(fresh.bar, *fresh.chosen, strict=True):
        incumbents.append(chains)
        moves = chains.log_weight < bar
        chains = Chains(
            torch.where(moves, to_weight, chains.log_weight),
            torch.where(moves, to_place, chains.place),
        )
    before = Chains(*(torch.stack(parts) for parts in zip(*incumbents, strict=True)))
    log_sum = torch.logaddexp(fresh.log_total[:, None], before.log_weight)
    return Walk(time, fresh, before, log_sum, chains)


def run_isir(
    log_weight: LogWeight,
    num_images: int,
    dim: int,
    *,
    generator: torch.Generator,
    num_samples: int,
    lag: int,
    burn_in: int,
    max_steps: int,
    survival: float,
    dtype: torch.dtype,
    first: tuple[Tensor, Tensor] | None,
    hmc: Hmc | None = None,
) -> LaggedChains:
    """:func:`~ucvae.chains.run_lagged_chains` for ``isir`` and ``isir_hmc``, with its arguments.

    The first evaluation is of all that every image needs: both starts, X's steps alone, and those
    of the pair that the main sum needs X for, at least one. Then those images that have not met go
    on, in blocks of steps that grow as few images are left, but never beyond the steps that the
    pair has made before: so at least half of a pair's evaluations are of steps before the meeting.
    With ``hmc`` a block ends where its moves are due, which only pairs that are left then make.
    """
    fresh = num_samples - 1
    started = num_samples if burn_in == 0 else 1  # h(X_0) and h(Y_0) are of all K of a start
    main_end = burn_in + lag - 1
    ledger = _Ledger(log_weight, num_images, dim, generator, dtype)

    def walks(chains: Chains, offer: Fresh, t: int, image_index: Tensor) -> Iterator[Walk]:
        """The steps of ``offer`` after t, cut where HMC's moves come between two of them."""
        while len(offer.bar):
            ahead = len(offer.bar)
            if hmc is not None:
                if (t + 1) % lag == 0:
                    chains = ledger.move(hmc, image_index, chains, t + 1)
                ahead = steps_before_hmc(t + 1, lag)
            walked = walk(chains, offer.steps(slice(ahead)), t + 1)
            yield walked
            chains, offer, t = walked.end, offer.steps(slice(ahead, None)), t + ahead

    image_index = torch.arange(num_images, device=generator.device)
    steps = min(max(lag + 1, main_end), max_steps)
    sizes = [started, steps * fresh, started]  # X's start, the fresh samples, Y's start
    samples = ledger.draw(image_index, sum(sizes), first)
    (x_log, fresh_log, y_log), (x_place, fresh_place, y_place) = (
        part.split(sizes, 1) for part in samples
    )
    offer = ledger.offer(fresh_log, fresh_place, steps)
    # pi_0: K independent draws of which one, uniform, is selected. They are exchangeable, so the
    # first stands for it; the others matter only to h(X_0) and h(Y_0).
    x, y = (
        Chains(log[None, :, 0], place[None, :, 0])
        for log, place in ((x_log, x_place), (y_log, y_place))
    )
    for alone in walks(x, offer.steps(slice(lag)), 0, image_index):
        ledger.watch(image_index, alone)
        ledger.average(ledger.main, alone.during(burn_in, main_end))
    if burn_in == 0:
        for start in (x_log, y_log):
            ledger.impossible |= (start == -torch.inf).all(1)
        ledger.main.append((x_place, normalize(x_log)))
        ledger.average(ledger.correction, alone.during(lag, lag))
        ledger.correction.append((y_place, -normalize(y_log)))

    pair = Chains(*(torch.cat(both) for both in zip(alone.end, y, strict=True)))
    offer, t, horizon = offer.steps(slice(lag, None)), lag, Horizon(max_steps, survival)
    while len(image_index):
        if t == horizon.end:
            survives = horizon.survivors(image_index, generator)
            ledger.stop(image_index[~survives], t)
            image_index, pair = image_index[survives], pair.at((slice(None), survives))
            continue
        if t >= steps:
            worthwhile = max(1, ROWS // (fresh * len(image_index)))
            ahead = min(worthwhile, max(1, t - lag), horizon.end - t)
            if hmc is not None:
                ahead = min(ahead, steps_before_hmc(t + 1, lag))
            offer = ledger.offer(*ledger.draw(image_index, ahead * fresh), ahead)
        possible = torch.ones_like(image_index, dtype=torch.bool)
        for together in walks(pair, offer, t, image_index):
            ledger.watch(image_index, together)
            if t < main_end:
                ledger.average(ledger.main, together.during(burn_in, main_end))
            ledger.correct(together.during(burn_in + lag, horizon.end), horizon.weight)
            ledger.meet(image_index, together)
            possible &= together.possible
        t += len(offer.bar)
        # One wait for the device: which images are left.
        rows = (together.end_apart & possible).nonzero()[:, 0]
        image_index, pair = image_index[rows], together.end.at((slice(None), rows))
    independent = torch.cat([x_log, fresh_log[:, : lag * fresh]], 1)
    return ledger.result(lag, independent, biased=not survival)


def steps_before_hmc(t: int, lag: int) -> int:
    """How many steps there are from t on before HMC's next moves, those at t left out."""
    return lag - t % lag


class _Ledger:
    """Every sample of a call in its place, and the coefficients that it gets."""

    def __init__(
        self,
        log_weight: LogWeight,
        num_images: int,
        dim: int,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> None:
        device = generator.device
        self.log_weight = log_weight
        self.dim = dim
        self.generator = generator
        self.dtype = dtype
        self.samples: list[tuple[Tensor, Tensor, Tensor]] = []  # noise, log weights, images
        self.num_places = 0
        self.main: list[tuple[Tensor, Tensor]] = []  # places, coefficients
        self.correction: list[tuple[Tensor, Tensor]] = []
        self.evaluations = torch.zeros(num_images, dtype=torch.long, device=device)
        self.meeting_time = torch.zeros_like(self.evaluations)
        self.trajectories = torch.zeros((), dtype=torch.float64, device=device)
        self.accepted = torch.zeros_like(self.trajectories)
        # Room for the noise by places, and how many blocks and samples are there: for HMC alone.
        self.joined = torch.empty(0, dim, dtype=dtype, device=device), 0, 0
        self.stopped = torch.zeros(num_images, dtype=torch.bool, device=device)
        self.not_below_infinity = torch.zeros(num_images, dtype=torch.bool, device=device)
        self.impossible = torch.zeros_like(self.not_below_infinity)

    def draw(
        self, image_index: Tensor, count: int, first: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """So many samples for each image: their log weights and places, ``[n, count]`` each.

        ``first`` are those that the caller has drawn and evaluated already.
        """
        n, device = len(image_index), image_index.device
        missing = count if first is None else count - first[0].shape[1]
        noise = torch.randn(
            (n, missing, self.dim), generator=self.generator, device=device, dtype=self.dtype
        )
        log_weights = evaluate(self.log_weight, noise, image_index).double()
        if first is not None:
            noise = torch.cat([first[0], noise], 1)
            log_weights = torch.cat([first[1].double(), log_weights], 1)
        return log_weights, self._keep(noise, log_weights, image_index, count)

    def move(self, hmc: Hmc, image_index: Tensor, chains: Chains, time: int) -> Chains:
        """The same chains after HMC's moves, before the step ``time``.

        Where these lead is a sample, in a place of its own.
        """
        before = Chains(chains.log_weight.mT, chains.place.mT)
        noise = self._noise_at(before.place)
        moved = hmc.move(noise, before.log_weight, image_index, self.generator)
        spent = before.place.shape[1] * hmc.evaluations
        places = self._keep(moved.noise, moved.log_weight, image_index, spent)
        log_weight = moved.log_weight.mT
        place = torch.where(moved.moved, places, before.place).mT
        # Chains that have met are one, whatever rounding makes of two rows.
        apart = chains.place[0] != chains.place[-1]
        self.meeting_time[image_index] += time * (apart & moved.met)
        one = ~apart | moved.met
        counts = torch.ones_like(moved.acceptance)
        counts[:, 1:] = apart[:, None]  # two that have met are one
        self.trajectories += counts.sum()
        self.accepted += (moved.acceptance & counts).sum()
        return Chains(
            torch.where(one, log_weight[:1], log_weight), torch.where(one, place[:1], place)
        )

    def _noise_at(self, places: Tensor) -> Tensor:
        """Of samples, by their places; what has come since the last call is put behind the rest."""
        noise, blocks, start = self.joined
        if len(noise) < self.num_places:  # twice as much each time, so that copies do not add up
            room = noise.new_empty(max(2 * len(noise), self.num_places), self.dim)
            room[:start] = noise[:start]
            noise = room
        for block, _, _ in self.samples[blocks:]:
            end = start + block.shape[0] * block.shape[1]
            noise[start:end] = block.flatten(0, 1)
            start = end
        self.joined = noise, len(self.samples), start
        return noise[places]

    def _keep(
        self, noise: Tensor, log_weights: Tensor, image_index: Tensor, evaluations: int
    ) -> Tensor:
        """Samples ``[n, k]``, for which each image has paid so much; returns their places."""
        self.samples.append((noise, log_weights, image_index))
        self.evaluations[image_index] += evaluations
        self.not_below_infinity[image_index] |= ~(log_weights.amax(1) < torch.inf)
        places = torch.arange(log_weights.numel(), device=noise.device) + self.num_places
        self.num_places += len(places)
        return places.view(log_weights.shape)

    def offer(self, log_weights: Tensor, places: Tensor, steps: int) -> Fresh:
        """These samples ``[n, S (K - 1)]`` dealt out to S steps, and the decisions in each."""
        n = len(places)
        uniforms = torch.rand(
            (steps, n, 2), generator=self.generator, device=places.device, dtype=torch.float64
        )
        log_weights, places = (
            part.view(n, steps, -1).transpose(0, 1) for part in (log_weights, places)
        )
        return Fresh.of(log_weights, places, uniforms)

    def watch(self, image_index: Tensor, walked: Walk) -> None:
        """Notice images none of whose K samples is possible in a step."""
        self.impossible[image_index] |= (walked.log_sum == -torch.inf).flatten(0, 1).any(0)

    def average(self, part: list[tuple[Tensor, Tensor]], walked: Walk) -> None:
        """Add X's states of these steps."""
        own, fresh = walked.weights
        part.append((walked.incumbents.place[:, 0], own[:, 0]))
        part.append((walked.fresh.place, fresh[:, 0]))

    def correct(self, walked: Walk, weight: float) -> None:
        """Add X's states of these steps to the correction, and take away Y's: ``weight`` times."""
        own, fresh = walked.weights
        # Once they have met, both chains' weights are at one place: what would be added there and
        # taken away again is left out, so that rounding leaves nothing behind.
        own = weight * own * walked.apart[:, None]
        self.correction.append((walked.incumbents.place[:, 0], own[:, 0]))
        self.correction.append((walked.incumbents.place[:, 1], -own[:, 1]))
        self.correction.append((walked.fresh.place, weight * (fresh[:, 0] - fresh[:, 1])))

    def meet(self, image_index: Tensor, walked: Walk) -> None:
        """Note tau where chains have met: the step after that in which both chose one sample."""
        after = torch.cat([walked.apart[1:], walked.end_apart[None]])
        met = walked.apart & ~after
        tau = walked.time + 1 + torch.arange(len(met), device=met.device)
        self.meeting_time[image_index] += (met * tau[:, None]).sum(0)

    def stop(self, image_index: Tensor, time: int) -> None:
        """Note images whose pair goes no further, though it has not met."""
        self.stopped[image_index] = True
        self.meeting_time[image_index] = time

    def result(self, lag: int, independent: Tensor, biased: bool) -> LaggedChains:
        """All that has been noted.

        Args:
            lag: L, by which coefficients are divided.
            independent: log weights ``[n, m]`` of draws that do not depend on the chains' course.
            biased: whether an image that was stopped is.
        """
        refuse_invalid(self.not_below_infinity, self.impossible)
        noise = torch.cat([noise.flatten(0, 1) for noise, _, _ in self.samples])[:, None]
        log_weights = torch.cat([values.flatten() for _, values, _ in self.samples])
        image_index = torch.cat(
            [index.repeat_interleave(values.shape[1]) for _, values, index in self.samples]
        )

        def added_up(part: list[tuple[Tensor, Tensor]]) -> Tensor:
            coefficient = torch.zeros_like(log_weights)
            for place, value in part:
                coefficient.index_add_(0, place.flatten(), value.flatten())
            return coefficient / lag

        main, correction = added_up(self.main), added_up(self.correction)
        whole = main + correction
        # A sample of weight 0 has no part, though its log weight is -inf.
        terms = torch.where(whole != 0, whole * log_weights, 0.0)
        mean_log_weight = torch.zeros_like(independent[:, 0]).index_add_(0, image_index, terms)

        def measure(coefficient: Tensor) -> SignedParticles:
            return SignedParticles(image_index, noise, coefficient[:, None].to(self.dtype))

        return LaggedChains(
            main=measure(main),
            correction=measure(correction),
            particles=measure(whole),
            meeting_time=self.meeting_time,
            truncated=self.stopped & biased,
            evaluations=self.evaluations,
            ess=torch.full_like(mean_log_weight[0], torch.nan),
            acceptance=self.accepted / self.trajectories,
            mean_log_weight=mean_log_weight,
            log_mean_weight=independent.logsumexp(1) - math.log(independent.shape[1]),
        )
