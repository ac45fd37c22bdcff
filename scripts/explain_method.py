r"""Draw the figure of docs/how.md: two coupled chains, their signed particles, and what they give.

The problem has one number z with prior N(m, 1) and one count y = 10 from a Poisson distribution
with rate e^z. Wanted is the gradient of ``log p(y)`` in m at m = 0, which is the posterior mean of
z (Eq 2 of the paper); its exact value comes from a grid. The proposal is the prior, in the place of
an encoder. The pair of chains that is drawn runs by the literal algorithms of
ucvae.chains.reference; means are over many independent estimates of ``run_lagged_chains``.

    python scripts/explain_method.py docs/images/method.png

It prints the table of docs/how.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ucvae.chains import reference, run_lagged_chains
from ucvae.chains.kernels import StepNoise
from ucvae.figures import COLOURS, DPI

COUNT = 10.0
LAG, BURN_IN = 3, 1
CHAIN_SAMPLES = 4  # K of the pair that is drawn
IWAE_SAMPLES = (5, 10, 20, 50, 100, 200, 500)
COUPLED_SAMPLES = (3, 5, 10, 20, 50, 100)
ORANGE, RED, BLUE, GREEN = COLOURS[:4]
GREY = COLOURS[6]


class Row(NamedTuple):
    """An estimator, its mean evaluations for an estimate, and independent estimates ``[R]``."""

    name: str
    num_samples: int
    evaluations: float
    estimates: Tensor

    @property
    def mean(self) -> float:
        """Of the estimates."""
        return float(self.estimates.mean())

    @property
    def spread(self) -> float:
        """Their standard deviation."""
        return float(self.estimates.std())

    def error_of_averages(self, count: int, exact: float) -> float:
        """Root mean square error of averages of so many estimates."""
        averages = self.estimates.unfold(0, count, count).mean(1)
        return float((averages - exact).square().mean().sqrt())


class Pair(NamedTuple):
    """One pair of chains: z of X_0, X_1, ..., and of Y_0, Y_1, ...; tau; the measure of Eq 15."""

    x: list[float]
    y: list[float]
    meeting_time: int
    z: np.ndarray
    coefficient: np.ndarray


def log_weight(z: Tensor) -> Tensor:
    """Of the prior as proposal: the log-likelihood, without the constant -log y!."""
    return COUNT * z - z.exp()


def posterior() -> tuple[np.ndarray, np.ndarray, float]:
    """A grid, the density on it, and the exact gradient, which is the posterior mean."""
    z = torch.linspace(-6, 6, 24_001, dtype=torch.float64)
    mass = torch.softmax(log_weight(z) - z**2 / 2, dim=0)
    return z.numpy(), (mass / (z[1] - z[0])).numpy(), float((mass * z).sum())


def iwae(num_samples: int, replicates: int) -> Row:
    """Self-normalised importance sampling, which is IWAE's decoder gradient."""
    generator = torch.Generator().manual_seed(num_samples)
    z = torch.randn(replicates, num_samples, generator=generator, dtype=torch.float64)
    estimates = (torch.softmax(log_weight(z), 1) * z).sum(1)
    return Row("IWAE", num_samples, num_samples, estimates)


def coupled(num_samples: int, replicates: int) -> Row:
    """The signed particles of coupled chains."""
    chains = run_lagged_chains(
        lambda noise, _: log_weight(noise[..., 0]),
        replicates,
        1,
        generator=torch.Generator().manual_seed(num_samples),
        num_samples=num_samples,
        lag=LAG,
        burn_in=BURN_IN,
        kernel="isir",
        survival=0.4,
        dtype=torch.float64,
    )
    particles = chains.particles
    estimates = torch.zeros(replicates, dtype=torch.float64)
    terms = (particles.coefficient * particles.noise[..., 0]).sum(1)
    estimates.index_add_(0, particles.image_index, terms)
    return Row("coupled", num_samples, float(chains.evaluations.double().mean()), estimates)


def pair(seed: int) -> Pair:
    """Alg 4 for one image, with all that it passes through."""
    generator = torch.Generator().manual_seed(seed)
    starts, steps = [], []

    def start() -> list[Tensor]:
        starts.append(list(torch.randn(CHAIN_SAMPLES, 1, generator=generator)))
        return starts[-1]

    def step() -> StepNoise:
        slot = torch.randint(CHAIN_SAMPLES, (), generator=generator)
        fresh = torch.randn(CHAIN_SAMPLES - 1, 1, generator=generator)
        steps.append(StepNoise(slot, fresh, torch.rand(2, generator=generator)))
        return steps[-1]

    def run(
        burn_in: int, start: Callable[[], list[Tensor]], step: Callable[[], StepNoise]
    ) -> reference.Measure:
        return reference.signed_measure(
            lambda noise: float(log_weight(noise[0])),
            start,
            step,
            lag=LAG,
            burn_in=burn_in,
            kernel="isir",
            beta=0.0,
            max_steps=1000,
        )

    # At t0 = 0 the terms are all states: X_0 to X_{L-1}, then X_t and Y_{t-L} by turns.
    states = [term.state for term in run(0, start, step).terms]
    again = iter(starts), iter(steps)
    measure = run(BURN_IN, lambda: next(again[0]), lambda: next(again[1]))
    mass: dict[float, float] = {}
    for factor, state in measure.terms:
        for noise, weight in zip(state.samples, state.weights, strict=True):
            mass[float(noise[0])] = mass.get(float(noise[0]), 0.0) + factor * weight
    return Pair(
        [float(state.selected[0]) for state in states[:LAG] + states[LAG::2]],
        [float(state.selected[0]) for state in states[LAG + 1 :: 2]],
        measure.meeting_time,
        np.array(list(mass)),
        np.array(list(mass.values())),
    )


def draw(path: Path, shown: Pair, rows: list[Row], replicates: int) -> None:
    """The four panels."""
    grid, density, exact = posterior()
    figure = Figure(figsize=(9.6, 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    (chains, particles), (means, errors) = figure.subplots(2, 2)

    tau = shown.meeting_time
    shape = density / density.max()
    chains.fill_betweenx(grid, tau + 2, tau + 2 - 1.8 * shape, color=GREY, alpha=0.4, lw=0)
    # X_t at t; the pair has met when both have the same state: Y_{tau-L} = X_tau.
    chains.plot(range(len(shown.x)), shown.x, "o-", color=BLUE, label="$X_t$", ms=4)
    lagged = range(LAG, LAG + len(shown.y))
    chains.plot(lagged, shown.y, "s--", color=RED, label="$Y_{t-L}$", ms=4, lw=1)
    chains.axvline(tau, color=GREY, lw=1, ls=":")
    chains.annotate(r"$\tau$", (tau, -1.6), ha="right", xytext=(-4, 0), textcoords="offset points")
    chains.set(xlabel="step t", ylabel="selected z", ylim=(-2, 3.2), xlim=(-0.4, tau + 2))
    chains.set_title(f"a  A pair of chains, lag L = {LAG}; right: the posterior", loc="left")
    chains.legend(loc="lower center", frameon=False)

    particles.fill_between(grid, shape, color=GREY, alpha=0.4, lw=0)
    for colour, sign, label in ((BLUE, 1, "positive"), (RED, -1, "negative")):
        some = shown.coefficient * sign > 1e-3
        particles.vlines(shown.z[some], 0, shown.coefficient[some], color=colour, lw=2, label=label)
    particles.axhline(0, color="black", lw=0.8)
    particles.axvline(exact, color="black", lw=1, ls="--", label="exact mean")
    found = float((shown.coefficient * shown.z).sum())
    particles.axvline(found, color=GREEN, lw=1, ls="-.", label="this estimate of it")
    particles.set(xlabel="z", ylabel="coefficient", xlim=(-2, 3.2))
    particles.set_title("b  Its signed particles; grey: the posterior", loc="left")
    particles.legend(loc="upper left", frameon=False)

    styles = {"IWAE": (ORANGE, "o"), "coupled": (BLUE, "s")}
    for name, (colour, marker) in styles.items():
        own = [row for row in rows if row.name == name]
        error = [2 * row.spread / replicates**0.5 for row in own]
        at = [row.evaluations for row in own]
        values = [row.mean for row in own]
        means.errorbar(at, values, error, color=colour, marker=marker, ms=4, capsize=3, label=name)
    means.axhline(exact, color="black", lw=1, ls="--", label="exact")
    means.set(xscale="log", xlabel="evaluations for an estimate", ylabel="mean estimate")
    means.set_title(f"c  Mean of {replicates:,} estimates, $\\pm$ 2 s.e.", loc="left")
    means.legend(frameon=False)

    # Averages of so many estimates, of which there are at least 40.
    counts = [c for c in (1, 3, 10, 30, 100, 300, 1000) if replicates // c >= 40]
    for row, colour, style in (
        *((row, ORANGE, ls) for row, ls in zip(_chosen(rows, "IWAE", (10, 50)), "-:", strict=True)),
        *((row, BLUE, "-") for row in _chosen(rows, "coupled", (10,))),
    ):
        error = [row.error_of_averages(count, exact) for count in counts]
        label = f"{row.name}, K = {row.num_samples}"
        at = [row.evaluations * count for count in counts]
        errors.plot(at, error, color=colour, ls=style, marker=".", label=label)
    errors.set(xscale="log", yscale="log", xlabel="evaluations for all estimates of an average")
    errors.set_ylabel("root mean square error")
    errors.set_title("d  Error of an average of estimates", loc="left")
    errors.legend(frameon=False)

    for axes in (chains, particles, means, errors):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _chosen(rows: list[Row], name: str, counts: tuple[int, ...]) -> list[Row]:
    return [row for row in rows if row.name == name and row.num_samples in counts]


def table(rows: list[Row], replicates: int) -> str:
    """The rows as text."""
    lines = [f"exact gradient {posterior()[2]:.4f}"]
    for row in rows:
        error = row.spread / replicates**0.5
        lines.append(
            f"{row.name:<7} K = {row.num_samples:>3}: {row.evaluations:>5.0f} evaluations, mean "
            f"{row.mean:.4f} +- {error:.4f}, standard deviation {row.spread:.2f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Compute, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="of the PNG")
    parser.add_argument("--replicates", type=int, default=40_000, help="estimates of each kind")
    parser.add_argument("--seed", type=int, default=4, help="of the pair that is drawn")
    given = parser.parse_args(arguments)
    rows = [iwae(count, given.replicates) for count in IWAE_SAMPLES]
    rows += [coupled(count, given.replicates) for count in COUPLED_SAMPLES]
    draw(given.path, pair(given.seed), rows, given.replicates)
    print(table(rows, given.replicates))


if __name__ == "__main__":
    main()
