"""Runs side by side: groups of seeds, their labels, and what must not share a column.

Runs whose settings differ in nothing but the seed are a group. Groups on the same images (data set,
binarisation, hashes of all splits) share a section; within it there is a table for each evaluator
with its size. So no two numbers of a column differ in anything but what the row's label says.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucvae.config import show
from ucvae.report.published import Published, look_up
from ucvae.report.runs import Evaluator, Found, Measurement, Run, checksum

# The order of rows; others follow in alphabetical order.
ESTIMATORS = ("elbo", "iwae", "snis", "coupled")
# Longer labels stand in a list, and letters for them in the tables.
LONGEST_LABEL = 48


@dataclass(frozen=True)
class Row:
    """A group by one evaluator: one run for each seed.

    Attributes:
        label: of the group.
        measurements: in the order of their seeds.
        published: what a paper has for it, or None.
        differences: how it was obtained otherwise than published.
    """

    label: str
    measurements: list[Measurement]
    published: Published | None
    differences: list[str]

    @property
    def runs(self) -> list[Run]:
        """The runs, by seed."""
        return [measurement.run for measurement in self.measurements]

    @property
    def log_likelihood(self) -> float:
        """Mean over seeds, nats per image."""
        return statistics.fmean(m.log_likelihood for m in self.measurements)

    @property
    def error_over_seeds(self) -> float | None:
        """Standard error of the mean over n seeds, ``std / sqrt(n)`` (n - 1); None for one."""
        return _standard_error([m.log_likelihood for m in self.measurements])

    @property
    def error_over_images(self) -> float:
        """Of a run's evaluation, mean over seeds.

        More seeds do not make it smaller: they are evaluated on the same images.
        """
        return statistics.fmean(m.standard_error for m in self.measurements)

    @property
    def values(self) -> NDArray[np.float64] | None:
        """Mean over seeds of each image ``[N]``; None if a run's are not there."""
        values = [m.values for m in self.measurements if m.values is not None]
        return np.mean(values, axis=0) if len(values) == len(self.measurements) else None

    @property
    def difference(self) -> float | None:
        """Of the mean from the published value; above 0 is better than published."""
        return None if self.published is None else self.log_likelihood - self.published.value

    def mean(self, value: Callable[[Run], float | None]) -> float | None:
        """Mean over the runs of what all of them tell; None if one does not."""
        values = [told for run in self.runs if (told := value(run)) is not None]
        return statistics.fmean(values) if len(values) == len(self.runs) else None

    @property
    def status(self) -> str:
        """How many are not what they seem, and why; empty for none.

        They did not end as ``finished``, or a warm start's tested checkpoint is of before its
        switch.
        """
        counts = Counter(run.status for run in self.runs if run.status != "finished")
        counts.update("tested before the switch" for m in self.measurements if m.before_switch)
        return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))


@dataclass(frozen=True)
class Lag:
    """How far the mean of a row is behind that of the best one, nats per image.

    What an image does to both rows alike is not in the error over images, nor what a seed does in
    that over seeds.

    Attributes:
        value: at least 0.
        error_over_seeds: ``std / sqrt(n)`` of the differences between runs of the same seed, n - 1
            in the standard deviation; None unless the rows have the same seeds, and several.
        error_over_images: the same of the differences between values of the same image, each a
            mean over seeds; None where they are not known.
    """

    value: float
    error_over_seeds: float | None
    error_over_images: float | None


@dataclass(frozen=True)
class Table:
    """All groups by one evaluator."""

    evaluator: Evaluator
    rows: list[Row]

    @cached_property
    def best(self) -> Row:
        """The row with the highest log-likelihood."""
        return max(self.rows, key=lambda row: row.log_likelihood)

    def lag(self, row: Row) -> Lag | None:
        """How far a row is behind the best one; None for that one."""
        if row is self.best:
            return None
        seeds = None
        if [run.seed for run in row.runs] == [run.seed for run in self.best.runs]:
            pairs = zip(self.best.measurements, row.measurements, strict=True)
            seeds = _standard_error([a.log_likelihood - b.log_likelihood for a, b in pairs])
        best, own = self.best.values, row.values
        images = None if best is None or own is None else _standard_error(best - own)
        return Lag(self.best.log_likelihood - row.log_likelihood, seeds, images)


@dataclass(frozen=True)
class Section:
    """All that was learned from the same images.

    Attributes:
        dataset, binarization: as in ``result.json``.
        common: settings that all groups have in common, by component.
        devices, revisions: of all runs.
        groups: the runs of each group, of which each seed is there once, by label.
        tables: one for each evaluator, those of the test split first, and of them the longest.
    """

    dataset: str
    binarization: str
    common: dict[str, list[str]]
    devices: list[str]
    revisions: list[str]
    groups: dict[str, list[Run]]
    tables: list[Table]

    @cached_property
    def names(self) -> dict[str, str]:
        """What each group is called in tables, by label: the label, or a letter in its place."""
        if max(map(len, self.groups)) <= LONGEST_LABEL:
            return {label: label for label in self.groups}
        return {
            label: f"{runs[0].estimator} ({_letters(i)})"
            for i, (label, runs) in enumerate(self.groups.items())
        }

    def full_name(self, label: str) -> str:
        """A group's name followed by the rest of its label, where it is not in the name."""
        name = self.names[label]
        return f"{name}{label.removeprefix(name.partition(' ')[0])}" if name != label else label


def _letters(place: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    before, last = divmod(place, 26)
    return (_letters(before - 1) if before else "") + chr(ord("a") + last)


@dataclass(frozen=True)
class Report:
    """Sections, and a line for each thing that was left out of them."""

    sections: list[Section]
    left_out: list[str]


def compare(found: Found) -> Report:
    """Sort measurements into sections, tables and groups.

    Of runs on the same data set that differ in a split's hash, those on the split that most have
    are reported; of several measurements of one seed of a group, the newest. What is left out is
    named.
    """
    left_out = list(found.problems)
    if found.unfinished:
        names = ", ".join(str(folder) for folder in found.unfinished)
        left_out.append(f"unfinished, {len(found.unfinished)} in all: {names}")
    by_data: dict[tuple[str, str], list[Measurement]] = {}
    for measurement in _with_starts_apart(found.measurements):
        run = measurement.run
        by_data.setdefault((run.dataset, run.binarization), []).append(measurement)
    sections = [_section(by_data[data], left_out) for data in sorted(by_data)]
    return Report(sections, left_out)


def _section(measurements: list[Measurement], left_out: list[str]) -> Section:
    kept = _same_splits(measurements, left_out)
    kept.sort(key=lambda m: (m.written, str(m.folder)))  # of what is there twice the last counts
    groups: dict[str, list[Run]] = {}
    for run in dict.fromkeys(m.run for m in kept):
        groups.setdefault(_key(run), []).append(run)
    ordered = _order(groups)
    labels = dict(zip(ordered, label([groups[key][0] for key in ordered]), strict=True))
    cells: dict[Evaluator, dict[str, list[Measurement]]] = {}
    for m in kept:
        cells.setdefault(m.evaluator, {}).setdefault(_key(m.run), []).append(m)
    tables = []
    for evaluator in sorted(cells, key=lambda e: (e.split != "test", -len(cells[e]), e)):
        of_group = cells[evaluator]
        rows = [
            _row(labels[key], evaluator, _newest(of_group[key], labels[key], left_out))
            for key in ordered
            if key in of_group
        ]
        tables.append(Table(evaluator, rows))
    counted = {m.run for table in tables for row in table.rows for m in row.measurements}
    first = kept[0].run
    return Section(
        dataset=first.dataset,
        binarization=first.binarization,
        common=common([groups[key][0] for key in ordered]),
        devices=sorted({run.device for run in counted if run.device}),
        revisions=sorted({revision for run in counted for revision in run.revisions}),
        groups={labels[key]: _newest_runs(groups[key], counted) for key in ordered},
        tables=tables,
    )


def _with_starts_apart(measurements: list[Measurement]) -> list[Measurement]:
    """The same, with starts that tell runs from one run and runs each from its own seed's apart.

    The former's seeds differ in less, so they are no group together. A run with the seed of its
    start can be either; it is one of the former where another seed started from that run too.
    """
    groups: dict[str, list[Run]] = {}
    for run in dict.fromkeys(m.run for m in measurements):
        if run.start is not None:
            groups.setdefault(_key(run), []).append(run)
    renamed = {}
    for runs in groups.values():
        for run in runs:
            start = f"{run.start} {_shared_seeds(run, runs)}"
            estimator = start.partition(" ")[0]
            renamed[run] = replace(run, start=f"{estimator} {checksum(start)}")
    return [replace(m, run=renamed.get(m.run, m.run)) for m in measurements]


def _shared_seeds(run: Run, runs: list[Run]) -> list[int | None]:
    """The seed of each start in the chain; None for one that has the seed of what started there."""
    chains = [(other.seed, *other.start_seeds) for other in runs]
    found: list[int | None] = []
    for depth, (seed, of_start) in enumerate(pairwise((run.seed, *run.start_seeds))):
        started = {chain[depth] for chain in chains if chain[depth + 1] == of_start}
        found.append(None if started == {of_start} == {seed} else of_start)
    return found


def _same_splits(measurements: list[Measurement], left_out: list[str]) -> list[Measurement]:
    """Those on the splits that most runs have; ties go to the splits that come first."""
    runs = list(dict.fromkeys(m.run for m in measurements))
    counts = Counter(json.dumps(run.split_sha256) for run in runs)
    usual = json.loads(counts.most_common(1)[0][0])
    for run in runs:
        if run.split_sha256 != usual:
            splits = sorted(run.split_sha256.keys() | usual.keys())
            differing = [
                f"{split} ({_short(run.split_sha256, split)} instead of {_short(usual, split)})"
                for split in splits
                if run.split_sha256.get(split) != usual.get(split)
            ]
            left_out.append(
                f"{run.folder}: other {run.dataset} than the other runs, by SHA-256 of "
                f"{', '.join(differing)}"
            )
    return [m for m in measurements if m.run.split_sha256 == usual]


def _short(hashes: dict[str, str], split: str) -> str:
    return hashes.get(split, "none")[:8]


def _newest(measurements: list[Measurement], name: str, left_out: list[str]) -> list[Measurement]:
    """One for each seed, by seed; of those in the order of their age."""
    newest: dict[int, Measurement] = {}
    for m in measurements:
        older = newest.get(m.run.seed)
        if older is not None:
            left_out.append(
                f"{older.folder}: seed {m.run.seed} of {name} by {describe(m.evaluator)} is also "
                f"in {m.folder}, which is newer and counts"
            )
        newest[m.run.seed] = m
    return [newest[seed] for seed in sorted(newest)]


def _newest_runs(runs: list[Run], counted: set[Run]) -> list[Run]:
    """One for each seed, by seed, of those that a table counts; in the order of their age."""
    newest = {run.seed: run for run in runs if run in counted}
    return [newest[seed] for seed in sorted(newest)]


def _standard_error(values: Sequence[float] | NDArray[np.float64]) -> float | None:
    """Of the mean, ``std / sqrt(n)``, n - 1 in the standard deviation; None for one value."""
    return float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None


def _row(name: str, evaluator: Evaluator, measurements: list[Measurement]) -> Row:
    runs = [m.run for m in measurements]
    published = look_up(runs[0], evaluator)
    differences = published.differences(runs, evaluator) if published else []
    return Row(name, measurements, published, differences)


def describe(evaluator: Evaluator) -> str:
    """An evaluator with its size, in words."""
    samples = "chains" if evaluator.name.startswith("ais") else "samples"
    checkpoint = "" if evaluator.checkpoint == "best" else f", {evaluator.checkpoint} checkpoint"
    return (
        f"{evaluator.name}, {evaluator.num_samples:,} {samples}, {evaluator.num_images:,} "
        f"{evaluator.split} images{checkpoint}"
    )


# Groups and their labels


def _key(run: Run) -> str:
    return json.dumps([run.estimator, run.settings], sort_keys=True)


def _order(groups: dict[str, list[Run]]) -> list[str]:
    def rank(key: str) -> tuple[Any, ...]:
        run = groups[key][0]
        known = run.estimator in ESTIMATORS
        place = ESTIMATORS.index(run.estimator) if known else len(ESTIMATORS)
        values = [(name, _rank(value)) for name, value in sorted(run.settings.items())]
        return place, run.estimator, values

    return sorted(groups, key=rank)


def _rank(value: Any) -> tuple[int, float, str]:
    """Numbers before words, and by size."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, value, "") if number else (1, 0.0, _say(value))


def label(runs: list[Run]) -> list[str]:
    """Name groups by their estimator and by what not all of them have in common.

    Args:
        runs: one of each group.

    Returns:
        For each, the estimator, the settings that differ from one group to another, and those that
        it lacks though another group with the same component has them, as of a later version.
    """
    differing = [key for key in _keys(runs) if len(_values(runs, key)) > 1]
    lacking = {key: _lacking(runs, key) for key in _keys(runs)}
    names = _shorten(differing + [key for key in lacking if lacking[key] and key not in differing])
    labels = []
    for run in runs:
        words = [run.estimator]
        for key in differing:
            if key not in run.settings or key == "estimator._target_":
                continue
            component, _, setting = key.partition(".")
            if setting == "_target_":
                words.append(f"{component} {_component(run, component)}")
            else:
                words.append(f"{names[key]} {_say(run.settings[key])}")
        lacks = [names[key] for key, without in lacking.items() if run in without]
        if lacks:
            few = " or ".join(lacks) if len(lacks) < 3 else f"{len(lacks)} later settings"
            words.append(f"without {few}")
        labels.append(", ".join(words))
    # Two groups may lack as many, but not the same.
    repeated = Counter(labels)
    seen: Counter[str] = Counter()
    for i, name in enumerate(labels):
        seen[name] += 1
        if repeated[name] > 1:
            labels[i] = f"{name} ({seen[name]})"
    return labels


def common(runs: list[Run]) -> dict[str, list[str]]:
    """What groups have in common: by component, its settings in words.

    Args:
        runs: one of each group.

    Returns:
        Under ``model``, for example, ``mlp`` and its settings. Settings of some estimators alone
        are under their names.
    """
    found: dict[str, list[str]] = {}
    for key in _keys(runs):
        having = [run for run in runs if key in run.settings]
        if len(_values(runs, key)) > 1 or (key == "start_from" and having[0].start is None):
            continue
        component, _, setting = key.partition(".")
        if setting == "_target_":
            if component not in ("estimator", "trainer"):  # rows name the one; of the other is one
                found.setdefault(component, []).insert(0, _component(having[0], component))
            continue
        everywhere = component != "estimator" or len(having) == len(runs)
        own = " and ".join(dict.fromkeys(run.estimator for run in having))
        value = _say(having[0].settings[key])
        place = component if everywhere else own
        found.setdefault(place, []).append(f"{setting or component} {value}")
    return found


def _keys(runs: list[Run]) -> list[str]:
    """All settings, in the order of the configurations."""
    return list(dict.fromkeys(key for run in runs for key in run.settings))


def _values(runs: list[Run], key: str) -> set[str]:
    return {_say(run.settings[key]) for run in runs if key in run.settings}


def _lacking(runs: list[Run], key: str) -> list[Run]:
    """Runs without a setting that others have whose component is of the same class."""
    component = key.partition(".")[0]
    classes = {_component(run, component) for run in runs if key in run.settings}
    return [
        run for run in runs if key not in run.settings and _component(run, component) in classes
    ]


def _component(run: Run, component: str) -> str:
    return _say(run.settings.get(f"{component}._target_", "")).rpartition(".")[2].lower()


def _shorten(keys: list[str]) -> dict[str, str]:
    """Each key without its component, where that tells it from the other keys."""
    settings = {key: key.partition(".")[2] or key for key in keys}
    count = Counter(settings.values())
    return {key: setting if count[setting] == 1 else key for key, setting in settings.items()}


def _say(value: Any) -> str:
    """A setting as it is typed, on one line."""
    text = json.dumps(value) if isinstance(value, list) else show(value)
    return text if text.isprintable() else ascii(text)
