"""Pictures of studies and reports, as PNG. The only module that imports matplotlib.

It is imported by what draws, never by training alone. Figures are made without pyplot, so no
window system and no global state are involved. The colours are Okabe and Ito's, which the
colour-blind can tell apart.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.typing import LineStyleType

from ucvae.errors import RunError

COLOURS = ("#E69F00", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#999999")
DPI = 120
# Standard errors on either side of a mean.
WIDTH = 2
# Characters along the vertical axis of curves, 4 inches high, before the next line begins.
ALONG_Y = 48


def error_boxes(path: Path, title: str, panels: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Boxes of the errors of estimates, and below them their means on a scale of their own.

    A box is the median between the quartiles, with whiskers to the last estimate within 1.5
    interquartile ranges; what lies beyond is counted, not drawn. Medians say nothing of the bias:
    it is the mean that should be 0.

    Args:
        path: of the PNG.
        title: of the figure.
        panels: by heading, the errors ``[R]`` of each estimator by its name; at least one.

    Raises:
        RunError: the file cannot be written.
    """
    columns = min(len(panels), 4)
    blocks = -(-len(panels) // columns)
    figure = Figure(figsize=(0.9 + 3.4 * columns, 0.9 + 4.6 * blocks), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(2 * blocks, columns, height_ratios=[3, 2] * blocks)
    for i, (heading, estimators) in enumerate(panels.items()):
        row, column = divmod(i, columns)
        above = figure.add_subplot(grid[2 * row, column])
        below = figure.add_subplot(grid[2 * row + 1, column], sharex=above)
        above.set_title(heading, fontsize=9)
        _boxes(above, estimators)
        _means(below, estimators)
        above.tick_params(labelbottom=False)
        if column == 0:
            above.set_ylabel("error of an estimate (nats)", fontsize=9)
            below.set_ylabel(f"mean error $\\pm$ {WIDTH} s.e. (nats)", fontsize=9)
    _save(figure, path)


def meeting_times(
    path: Path,
    title: str,
    kernels: Mapping[str, tuple[np.ndarray, np.ndarray]],
    lag: int,
    max_steps: int,
) -> None:
    """Histograms of meeting times, one below the other on the same axes.

    Args:
        path: of the PNG.
        title: of the figure.
        kernels: by name, meeting times ``[n]``, and which of them were cut short ``[n]``.
        lag: L, below which no time lies.
        max_steps: the cap.

    Raises:
        RunError: the file cannot be written.
    """
    figure = Figure(figsize=(7.5, 1.1 + 2.5 * len(kernels)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(len(kernels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    longest = max(times.max() for times, _ in kernels.values())
    # Bins of whole numbers, nearly equal on the logarithmic axis; those cut short stand alone.
    starts = [lag]
    while starts[-1] <= longest:
        starts.append(starts[-1] + max(1, starts[-1] // 10))
    edges = np.array(starts) - 0.5
    for axes, colour, (name, (times, cut)) in zip(
        panels, COLOURS[2:], kernels.items(), strict=False
    ):
        axes.hist(times[~cut], edges, color=colour, alpha=0.8)
        if cut.any():
            last = edges[-1] * np.array([1.06, 1.2])
            axes.hist(
                np.full(cut.sum(), last.mean()), last, color="white", edgecolor="black",
                hatch="////",
            )  # fmt: skip
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_title(_cut_short(cut, max_steps), fontsize=9, loc="right")
        for level, style in ((0.5, "-"), (0.9, "--"), (0.99, ":")):
            place = np.quantile(times, level, method="inverted_cdf")
            axes.axvline(
                place, color="black", linestyle=style, linewidth=1.2,
                label=f"p{100 * level:.0f} {'=' if place < max_steps else '≥'} {place:,.0f}",
            )  # fmt: skip
        axes.legend(fontsize=8, loc="upper right", framealpha=0.9, edgecolor="none")
        axes.set_ylabel("number of chains", fontsize=9)
        _tidy(axes)
    for axes in panels:
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:,.0f}")
            axis.set_minor_locator(NullLocator())
    panels[0].set_xlim(left=0.95 * edges[0])
    panels[0].set_ylim(bottom=0.7)
    panels[-1].set_xlabel(r"meeting time $\tau$ (steps of the kernel)", fontsize=9)
    _save(figure, path)


class Curve(NamedTuple):
    """A mean over seeds along an axis; its standard error ``[n]``, or None for a single seed."""

    x: np.ndarray
    mean: np.ndarray
    error: np.ndarray | None

    def of_positive_x(self) -> Curve:
        """The part that a logarithmic axis can show; from zero it would draw a line anyway."""
        positive = self.x > 0
        error = None if self.error is None else self.error[positive]
        return Curve(self.x[positive], self.mean[positive], error)


class Panel(NamedTuple):
    """One picture of several side by side.

    Attributes:
        title: above it.
        xlabel: of its axis.
        curves: by name, in which the panels of a figure agree.
        points: whether to mark the points of a curve that has few.
        logarithmic: the axis along which the curves go.
    """

    title: str
    xlabel: str
    curves: Mapping[str, Curve]
    points: bool = True
    logarithmic: bool = False


def curves(
    path: Path,
    title: str,
    ylabel: str,
    panels: Sequence[Panel],
    names: Sequence[str],
    bottom: float | None = None,
    logarithmic: bool = False,
) -> None:
    """Curves with bands of two standard errors, in panels that share their vertical axis.

    Args:
        path: of the PNG.
        title: of the figure.
        ylabel: of the shared axis.
        panels: side by side.
        names: each curve has its colour by its name's place here; some may have no curve.
        bottom: where the shared axis begins; None shows all of every curve.
        logarithmic: the shared axis.

    Raises:
        RunError: the file cannot be written.
    """
    styles = {
        name: _style(i)
        for i, name in enumerate(names)
        if any(name in panel.curves for panel in panels)
    }
    width = 1.0 + 4.4 * len(panels)
    wrapped = {name: textwrap.wrap(name, int(12 * width)) for name in styles}
    longest = max(len(line) for lines in wrapped.values() for line in lines)
    columns = max(1, min(len(styles), int(12 * width) // (longest + 8)))
    entries = sum(len(lines) for lines in wrapped.values())
    figure = Figure(figsize=(width, 4.0 + 0.2 * -(-entries // columns)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(row, panels, strict=True):
        for name, curve in panel.curves.items():
            shown = curve.of_positive_x() if panel.logarithmic else curve
            _curve(axes, shown, *styles[name], panel.points)
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlabel(panel.xlabel, fontsize=9)
        if panel.logarithmic:
            _logarithmic(axes, "x")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _tidy(axes)
    if logarithmic:
        _logarithmic(row[0], "y")
    if bottom is not None:
        row[0].set_ylim(bottom=bottom)
    row[0].set_ylabel(_wrapped(ylabel, ALONG_Y), fontsize=9)
    handles = [
        Line2D([], [], color=colour, linestyle=line, label="\n".join(wrapped[name]))
        for name, (colour, line) in styles.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
    _save(figure, path)


def _wrapped(text: str, width: int) -> str:
    """Each line of the text in as many as keep it within ``width`` characters."""
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, width))


def _style(place: int) -> tuple[str, LineStyleType]:
    """Colour and line of the curve at a place, those most unlike each other first."""
    order = (2, 1, 3, 4, 0, 5, 6)
    lines: tuple[LineStyleType, ...] = ("-", "--", ":", "-.")
    return COLOURS[order[place % 7]], lines[place // 7 % 4]


def _curve(axes: Axes, curve: Curve, colour: str, line: LineStyleType, points: bool) -> None:
    # One alone has no line.
    marker = "o" if len(curve.x) == 1 or (points and len(curve.x) <= 15) else None
    axes.plot(
        curve.x, curve.mean, color=colour, linestyle=line, linewidth=1.4, marker=marker,
        markersize=3,
    )  # fmt: skip
    if curve.error is None:
        return
    if len(curve.x) == 1:
        axes.errorbar(curve.x, curve.mean, WIDTH * curve.error, color=colour, capsize=3)
    low, high = curve.mean - WIDTH * curve.error, curve.mean + WIDTH * curve.error
    axes.fill_between(curve.x, low, high, color=colour, alpha=0.2, linewidth=0)


def _logarithmic(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_locator(NullLocator())


def _cut_short(cut: np.ndarray, max_steps: int) -> str:
    share = f"truncated at {max_steps:,} steps: {100 * cut.mean():.2g}%"
    return f"{share} (hatched)" if cut.any() else share


def _boxes(axes: Axes, estimators: Mapping[str, np.ndarray]) -> None:
    boxes = []
    for errors in estimators.values():
        low, median, high = np.quantile(errors, (0.25, 0.5, 0.75))
        reach = 1.5 * (high - low)
        inside = errors[(errors >= low - reach) & (errors <= high + reach)]
        beyond = 100 * (1 - len(inside) / len(errors))
        boxes.append(
            {"q1": low, "med": median, "q3": high, "whislo": inside.min(), "whishi": inside.max()}
            | {"label": f"{beyond:.1f}%"}
        )
    drawn = axes.bxp(
        boxes, showfliers=False, patch_artist=True, widths=0.6, medianprops={"color": "black"}
    )
    for patch, colour in zip(drawn["boxes"], COLOURS, strict=False):
        patch.set_facecolor(colour)
        patch.set_alpha(0.75)
    means = [errors.mean() for errors in estimators.values()]
    places = range(1, len(means) + 1)
    axes.plot(places, means, "D", color="white", markeredgecolor="black", markersize=5, zorder=5)
    axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
    axes.margins(y=0.12)
    axes.autoscale_view()
    top = axes.get_ylim()[1]
    for place, box in zip(places, boxes, strict=True):
        axes.annotate(
            f"beyond: {box['label']}", (place, top), (0, -9), textcoords="offset points",
            ha="center", fontsize=6, color="0.35",
        )  # fmt: skip
    _tidy(axes)


def _means(axes: Axes, estimators: Mapping[str, np.ndarray]) -> None:
    for place, (errors, colour) in enumerate(zip(estimators.values(), COLOURS, strict=False), 1):
        mean, error = errors.mean(), errors.std(ddof=1) / len(errors) ** 0.5
        axes.errorbar(
            place, mean, WIDTH * error, fmt="D", color=colour, markersize=5, capsize=6,
            markeredgecolor="black", elinewidth=2,
        )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(1, len(estimators) + 1), list(estimators), fontsize=7)
    axes.margins(y=0.15)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, format="png", dpi=DPI)
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"figure: cannot write {path}: {error.strerror}") from error
