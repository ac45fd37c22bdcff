"""Running statistics of a training run, kept on the device and saved in checkpoints."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ucvae.chains import LaggedChains
from ucvae.errors import NonFiniteError

TINY = torch.finfo(torch.float64).tiny


class Means:
    """Means of named quantities since the last flush. Adding never waits for the device."""

    def __init__(self) -> None:
        # Names that come together are added up together: launches are what a small model's step is
        # made of.
        self.sums: dict[tuple[str, ...], Tensor] = {}
        self.counts: dict[tuple[str, ...], int] = {}
        self.first_step: int | None = None

    def add(self, step: int, values: dict[str, Tensor]) -> None:
        """Add the 0-dim tensors of one step."""
        if values:
            self.add_row(step, tuple(values), stacked(values))

    def add_row(self, step: int, names: tuple[str, ...], values: Tensor) -> None:
        """Add one step's values ``[len(names)]``, float64, which stay the caller's."""
        if self.first_step is None:
            self.first_step = step
        if names in self.sums:
            self.sums[names] += values
        else:
            self.sums[names] = values.clone()
        self.counts[names] = self.counts.get(names, 0) + 1

    def check(self, step: int) -> dict[str, float]:
        """The means so far.

        Raises:
            NonFiniteError: one of them is NaN or infinite; it names the quantity and the steps.
        """
        if not self.sums:
            return {}
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        values = iter(torch.cat(list(self.sums.values())).tolist())
        for names, count in self.counts.items():
            for name in names:
                totals[name] = totals.get(name, 0.0) + next(values)
                counts[name] = counts.get(name, 0) + count
        means = {name: total / counts[name] for name, total in totals.items()}
        for name, value in means.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{name} became {value} between steps {self.first_step} and {step}; "
                    "no checkpoint has taken it in"
                )
        return means

    def flush(self, step: int) -> dict[str, float]:
        """The means since the last flush, and a fresh start; raises as :meth:`check` does."""
        means = self.check(step)
        self.sums, self.counts, self.first_step = {}, {}, None
        return means

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        sums = {names: values.cpu() for names, values in self.sums.items()}
        return {"sums": sums, "counts": dict(self.counts), "first_step": self.first_step}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from :meth:`state_dict`."""
        # Checkpoints once held each name by itself, with a 0-dim sum.
        rows = {names: (names,) if isinstance(names, str) else names for names in state["counts"]}
        self.sums = {rows[key]: sums.to(device).reshape(-1) for key, sums in state["sums"].items()}
        self.counts = {rows[key]: count for key, count in state["counts"].items()}
        self.first_step = state["first_step"]


def stacked(values: dict[str, Tensor]) -> Tensor:
    """0-dim tensors as one of float64, ``[len(values)]``."""
    return torch.stack([value.detach().double() for value in values.values()])


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all numbers in tensors of one device, 0-dim.

    As ``torch.nn.utils.get_total_norm``, which first groups them by device and type: on a CPU, for
    a decoder's gradients, three times as long.
    """
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


class GradientNoise:
    """How much of a batch gradient is noise, for each parameter, from pairs of consecutive steps.

    The two steps of a pair have independent batches and all but the same parameters, so that half
    the mean square of their difference is the trace of a batch gradient's covariance. Divided by
    the mean square of the gradient, it is 0 where batches agree and 1 where there is noise only.
    """

    every = 10  # steps from one pair to the next: their cost is spread over as many

    def __init__(self) -> None:
        self.previous: list[Tensor] | None = None
        self.sums = Means()

    def add(self, step: int, parameters: dict[str, nn.Parameter]) -> None:
        """Take up the gradients of a step; one without gradients has no part."""
        kept = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        gradients = list(kept.values())
        if step % self.every == 0 and gradients:
            # Of their own: a replayed step puts its gradients where those of the last one were.
            self.previous = [gradient.clone() for gradient in gradients]
        elif self.previous is not None:
            half_square = _squares(torch._foreach_sub(gradients, self.previous)) / 2
            square = (_squares(gradients) + _squares(self.previous)) / 2
            names = tuple(f"{what}/{name}" for what in ("noise", "size") for name in kept)
            self.sums.add_row(step, names, torch.cat([half_square, square]))
            self.previous = None

    def part(self) -> None:
        """Make no pair of the last step and the next, whose gradients are of two estimators."""
        self.previous = None

    def flush(self, step: int) -> dict[str, float]:
        """The share of noise by parameter since the last flush; nothing where no pair was seen."""
        sums = self.sums.flush(step)
        noise = {key[6:]: value for key, value in sums.items() if key.startswith("noise/")}
        return {name: value / max(sums[f"size/{name}"], TINY) for name, value in noise.items()}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        previous = None if self.previous is None else [g.cpu() for g in self.previous]
        return {"previous": previous, "sums": self.sums.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from :meth:`state_dict`."""
        previous = state["previous"]
        self.previous = None if previous is None else [g.to(device) for g in previous]
        self.sums.load_state_dict(state["sums"], device)


def _squares(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).double().square()


class ChainCounts:
    """Meeting times as counts of each time, with what else the chains of many batches report.

    Times beyond ``max_time + 1``, of pairs that have gone on by roulette, are counted there, and
    those beyond :attr:`longest` at it.
    """

    longest = 10_000  # what a step costs must not depend on how far chains are allowed to go

    def __init__(self, max_time: int, device: torch.device) -> None:
        bins = min(max_time + 1, self.longest) + 1
        self.histogram = torch.zeros(bins, dtype=torch.long, device=device)
        self.truncated = torch.zeros((), dtype=torch.long, device=device)
        self.evaluations = torch.zeros((), dtype=torch.long, device=device)
        self.particles = torch.zeros((), dtype=torch.long, device=device)

    def add(self, chains: LaggedChains) -> None:
        """Count the chains of a batch; does not wait for the device."""
        time = chains.meeting_time.clamp(max=len(self.histogram) - 1)
        self.histogram.index_add_(0, time, torch.ones_like(time))
        self.truncated += chains.truncated.sum()
        self.evaluations += chains.evaluations.sum()
        self.particles += (chains.particles.coefficient != 0).sum()

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All the counts; what is done to them in place is done here."""
        return self.histogram, self.truncated, self.evaluations, self.particles

    def take(self, others: ChainCounts) -> None:
        """Count what ``others`` have counted."""
        for part, more in zip(self.parts, others.parts, strict=True):
            part += more

    def summary(self) -> dict[str, Any] | None:
        """Quantiles of the meeting time and averages per image; None where nothing was counted.

        Where a pair has reached ``max_time`` and was ended there, or has gone on, that is a lower
        bound of its meeting time.
        """
        histogram = self.histogram.cpu().double()
        images = histogram.sum().item()
        if not images:
            return None
        times = torch.arange(len(histogram), dtype=torch.float64)
        cumulative = histogram.cumsum(0)

        def quantile(level: float) -> int:
            return int((cumulative < level * images).sum())

        return {
            "meeting_time": {
                "mean": float((times * histogram).sum() / images),
                "p50": quantile(0.5),
                "p90": quantile(0.9),
                "p99": quantile(0.99),
                "max": int(histogram.nonzero()[-1]),
            },
            "truncated_fraction": self.truncated.item() / images,
            "decoder_evaluations_per_image": self.evaluations.item() / images,
            "particles_per_image": self.particles.item() / images,
        }

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "histogram": self.histogram.cpu(),
            "truncated": self.truncated.cpu(),
            "evaluations": self.evaluations.cpu(),
            "particles": self.particles.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        histogram = state["histogram"].to(self.histogram.device)
        # Checkpoints once held a count of each time up to max_time, however large that was.
        own, beyond = histogram.tensor_split([len(self.histogram)])
        self.histogram = own.clone()
        self.histogram[-1] += beyond.sum()
        self.truncated = state["truncated"].to(self.histogram.device)
        self.evaluations = state["evaluations"].to(self.histogram.device)
        self.particles = torch.as_tensor(state["particles"]).to(self.histogram.device)
