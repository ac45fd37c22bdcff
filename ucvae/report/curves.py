"""Curves of training over the seeds of each group, and the figures of a section."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ucvae import figures, results
from ucvae.figures import Curve, Panel
from ucvae.report.compare import Section
from ucvae.report.runs import QUANTILES, SECONDS, VALIDATION, Run

BANDS = f"bands: {figures.WIDTH} standard errors over seeds"


def draw(section: Section, folder: Path, suffix: str) -> list[str]:
    """Draw what the section's runs have recorded, and return the names of the files.

    Args:
        section: its groups are the curves.
        folder: that the PNGs go to.
        suffix: of their names.

    Raises:
        RunError: a file cannot be written.
    """
    title = f"{section.dataset}, {results.binarized(section.binarization)}"
    if any(len(_recorded(runs)) > 1 for runs in section.groups.values()):
        title += f"; {BANDS}"
    names = [_name(section, *group) for group in section.groups.items()]
    written = []
    by_epoch = _named(section, lambda runs: over_epochs(runs, VALIDATION))
    by_second = _named(section, over_seconds)
    # Some may be in the one only: of seeds that were not validated after the same epochs.
    values = [*by_epoch.values(), *by_second.values()]
    if values:
        panels = [Panel("", "epochs", by_epoch)] if by_epoch else []
        if by_second:
            untimed = len(by_epoch.keys() - by_second.keys())
            lasts = [curve.x[-1] for curve in by_second.values()]
            panels.append(
                Panel(
                    f"{untimed} without recorded times" if untimed else "",
                    "seconds of training",
                    by_second,
                    points=False,
                    logarithmic=bool(max(lasts) > 4 * min(lasts)),
                )
            )
        written.append(f"log_likelihood{suffix}.png")
        figures.curves(
            folder / written[-1],
            title,
            f"validation log-likelihood, nats\n({_validated(section)})",
            panels,
            names,
            _bottom(values),
        )
    quantiles = {
        name: _named(section, partial(over_epochs, tag=_meeting(name), during=True))
        for name in QUANTILES
    }
    if any(quantiles.values()):
        means = np.concatenate([c.mean for found in quantiles.values() for c in found.values()])
        written.append(f"meeting_times{suffix}.png")
        figures.curves(
            folder / written[-1],
            title,
            "meeting time, steps\n(quantile over images, mean of an epoch)",
            [
                Panel(f"{float(name[1:]):.0f}% met by", "epochs", found)
                for name, found in quantiles.items()
            ],
            names,
            logarithmic=bool(means.max() > 10 * max(means.min(), 1)),
        )
    return written


def _meeting(quantile: str) -> str:
    return f"coupling/meeting_time_{quantile}"


def _named(section: Section, curve_of: Callable[[list[Run]], Curve | None]) -> Mapping[str, Curve]:
    """The curves of those groups that have one, by name."""
    found = {}
    for label, runs in section.groups.items():
        recorded = _recorded(runs)
        curve = curve_of(recorded) if recorded else None
        if curve is not None:
            found[_name(section, label, runs)] = curve
    return found


def _name(section: Section, label: str, runs: list[Run]) -> str:
    """A curve's: the group's, as in tables, with the number of seeds that it is the mean of."""
    seeds = len(_recorded(runs))
    return f"{section.full_name(label)} ({seeds} seed{'s' * (seeds != 1)})"


def _recorded(runs: list[Run]) -> list[Run]:
    return [run for run in runs if run.metrics]


def _validated(section: Section) -> str:
    runs = [run for runs in section.groups.values() for run in runs]
    counts = {run.config.get("trainer.valid_samples") for run in runs}
    steps = {run.config.get("trainer.valid_refinements") or 0 for run in runs}
    if len(counts) > 1:
        return "importance sampling, not with as many samples everywhere: levels differ by that"
    if len(steps) > 1:
        return "importance sampling, not by the same proposals everywhere: levels differ by that"
    refined = f", proposals refined in {steps.pop()} steps" if any(steps) else ""
    return f"importance sampling, {counts.pop()} samples{refined}"


def _bottom(curves: list[Curve]) -> float | None:
    """Where the axis begins so that a steep start does not flatten all that comes after it."""
    later = [curve.mean[len(curve.mean) // 4 :] for curve in curves]
    low = min(values.min() for values in later)
    high = max(values.max() for values in later)
    everything = min(curve.mean.min() for curve in curves)
    margin = 0.05 * (high - low)
    return None if everything >= low - margin else float(low - margin)


def over_epochs(runs: list[Run], tag: str, during: bool = False) -> Curve | None:
    """The mean over seeds of a scalar, at the epochs after which all of them have it.

    Args:
        runs: of one group, at least one.
        tag: of the scalar, of which an epoch's is the mean over its lines.
        during: it is written during an epoch, under the number of finished ones.
    """
    seeds = []
    for run in runs:
        lines: dict[float, list[float]] = {}
        for line in run.metrics:
            if tag in line and "epoch" in line:
                lines.setdefault(line["epoch"] + during, []).append(line[tag])
        seeds.append({epoch: float(np.mean(values)) for epoch, values in lines.items()})
    epochs = sorted(set.intersection(*map(set, seeds)))
    if not epochs:
        return None
    values = np.array([[seed[epoch] for epoch in epochs] for seed in seeds])
    return _curve(np.array(epochs, dtype=float), values)


def over_seconds(runs: list[Run]) -> Curve | None:
    """The mean over seeds of the validation against the seconds of training.

    Each seed's validations are joined by straight lines, and the mean is taken where all seeds have
    one. Seeds that have no time in common give a single point, of their last validations.

    Args:
        runs: of one group, at least one.
    """
    seeds = []
    for run in runs:
        points = sorted(
            (line[SECONDS], line[VALIDATION])
            for line in run.metrics
            if SECONDS in line and VALIDATION in line
        )
        if not points:
            return None
        seeds.append(np.array(points).T)
    first = max(times[0] for times, _ in seeds)
    last = min(times[-1] for times, _ in seeds)
    if first >= last:
        times = np.array([np.mean([times[-1] for times, _ in seeds])])
        return _curve(times, np.array([[values[-1]] for _, values in seeds]))
    times = np.unique(np.concatenate([times for times, _ in seeds]))
    times = times[(times >= first) & (times <= last)]
    return _curve(times, np.stack([np.interp(times, *points) for points in seeds]))


def _curve(x: np.ndarray, values: np.ndarray) -> Curve:
    """The mean of the seeds' values ``[S, n]``."""
    seeds = len(values)
    error = values.std(0, ddof=1) / seeds**0.5 if seeds > 1 else None
    return Curve(x, values.mean(0), error)
