"""A report as Markdown, for the terminal and ``table.md``, and as CSV."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from typing import Any

from ucvae import results
from ucvae.report.compare import Report, Row, Section, Table, describe

WIDTH = 100


def markdown(report: Report, figures: dict[str, list[str]] | None = None) -> str:
    """The whole report.

    Args:
        report: what to tell.
        figures: names of pictures to show, by :func:`name_of` their section. None is for the
            terminal, which shows neither them nor, a second time, what was left out.
    """
    parts = [
        _paragraph(
            "Log-likelihoods in nats per image: mean +- standard error over seeds. s.e. images: of "
            "one evaluation, over images. behind: the best row, +- standard error over seeds in "
            "pairs; s.e. pairs: over images in pairs. wall s, train s: seconds in all, and of "
            "training alone. evaluations: of the decoder, for each image and gradient. truncated: "
            "pairs of chains that were cut short."
        )
    ]
    for section in report.sections:
        parts += _section(section)
        for name in (figures or {}).get(name_of(section), []):
            parts.append(f"![{name}]({name})")
    if figures is not None and report.left_out:
        parts.append("## Left out")
        parts.append("\n".join(f"- {line}" for line in report.left_out))
    return "\n\n".join(parts) + "\n"


def name_of(section: Section) -> str:
    """A section's name in file names."""
    return _for_files(f"{section.dataset}-{section.binarization}")


def name_of_table(section: Section, table: Table) -> str:
    """A table's name in file names."""
    e = table.evaluator
    split = "" if e.split == "test" else f"_{e.split}"
    last = "" if e.checkpoint == "best" else f"_{e.checkpoint}"
    return _for_files(f"{name_of(section)}{split}{last}_{e.name}-{e.num_samples}x{e.num_images}")


def _for_files(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)


def _section(section: Section) -> Iterable[str]:
    data = f"{section.dataset} ({results.binarized(section.binarization)})"
    yield f"## {data}"
    lines = [f"{place}: {', '.join(words)}" for place, words in section.common.items()]
    if lines:
        yield _paragraph(f"In common: {'; '.join(lines)}.")
    made = []
    if section.devices:
        made.append(f"Made on {' and '.join(section.devices)}")
        if len(section.devices) > 1:
            made[0] += ", whose times are not comparable"
    if section.revisions:
        revisions = [_revision(name) for name in section.revisions]
        made.append(f"revision{'s' * (len(revisions) > 1)} {', '.join(revisions)}")
    if made:
        yield _paragraph("; ".join(made) + ".")
    if any(name != label for label, name in section.names.items()):
        yield "\n".join(
            textwrap.fill(
                f"- {section.full_name(label)}",
                WIDTH,
                subsequent_indent="  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            for label in section.names
        )
    for table in section.tables:
        yield f"### {data}: {describe(table.evaluator)}"
        yield from _table(table, section.names)


def _revision(name: str) -> str:
    commit, plus, changes = name.partition("+")
    return commit[:7] + plus + changes


def _table(table: Table, names: dict[str, str]) -> Iterable[str]:
    notes: dict[str, int] = {}
    columns = {
        "estimator": [names[row.label] for row in table.rows],
        "seeds": [str(len(row.measurements)) for row in table.rows],
        "log-likelihood": [_with_error(row) for row in table.rows],
        "s.e. images": [f"{row.error_over_images:.2f}" for row in table.rows],
        "behind": [_behind(table, row) for row in table.rows],
        "s.e. pairs": [_error_by_pairs(table, row) for row in table.rows],
        "published": [_published(row) for row in table.rows],
        "difference": [_difference(row, notes) for row in table.rows],
        "epochs": _epochs(table),
        "wall s": [_count(row.mean(lambda run: run.wall_clock_s)) for row in table.rows],
        "train s": [_count(row.mean(lambda run: run.train_s)) for row in table.rows],
        "images/s": [_count(row.mean(lambda run: run.images_per_s)) for row in table.rows],
        "evaluations": [
            _count(row.mean(lambda run: run.decoder_evaluations)) for row in table.rows
        ],
        "truncated": [_share(row.mean(lambda run: run.truncated_fraction)) for row in table.rows],
        "status": [row.status for row in table.rows],
    }
    yield _aligned({name: cells for name, cells in columns.items() if any(cells)})
    if any(row.error_over_seeds is None for row in table.rows):
        yield "One seed has no standard error over seeds."
    if notes:
        yield "\n".join(
            textwrap.fill(f"- [{number}] {note}", WIDTH, subsequent_indent="  ")
            for note, number in notes.items()
        )


def _with_error(row: Row) -> str:
    error = row.error_over_seeds
    value = f"{row.log_likelihood:.2f}"
    if error is None:
        return f"{value} (1 seed)"
    return f"{value} +- {error:.2f}" if error >= 0.005 else f"{value} +- {error:.1g}"


def _behind(table: Table, row: Row) -> str:
    lag = table.lag(row)
    if lag is None:
        return "best" if len(table.rows) > 1 else ""
    error = lag.error_over_seeds
    return f"{lag.value:.3f}" + ("" if error is None else f" +- {error:.3f}")


def _error_by_pairs(table: Table, row: Row) -> str:
    lag = table.lag(row)
    return "" if lag is None or lag.error_over_images is None else f"{lag.error_over_images:.3f}"


def _published(row: Row) -> str:
    if row.published is None:
        return ""
    error = row.published.error
    return f"{row.published.value:.2f}" + (f" +- {error:.2f}" if error is not None else "")


def _difference(row: Row, notes: dict[str, int]) -> str:
    if row.published is None:
        return ""
    ways = f"obtained {'; '.join(row.differences)}" if row.differences else "obtained alike"
    how = f"{row.published.source}: {ways}"
    number = notes.setdefault(how, len(notes) + 1)
    return f"{row.difference:+.2f} [{number}]"


def _epochs(table: Table) -> list[str]:
    """Of each row, where they are not the same everywhere."""
    done = [
        sorted({run.epochs for run in row.runs if run.epochs is not None}) for row in table.rows
    ]
    if len({epoch for epochs in done for epoch in epochs}) < 2:
        return [""] * len(done)
    return [
        "-".join(f"{epoch:.4g}" for epoch in dict.fromkeys((*epochs[:1], *epochs[-1:])))
        for epochs in done
    ]


def _count(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2g}%"


def _aligned(columns: dict[str, list[str]]) -> str:
    """A Markdown table whose source is aligned too; the first column stands on the left."""
    columns = {
        name: [cell.replace("|", "\\|") for cell in cells] for name, cells in columns.items()
    }
    widths = [max(len(text) for text in (name, *cells)) for name, cells in columns.items()]
    first, *_ = columns

    def line(cells: Iterable[str]) -> str:
        padded = [
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width if i == 0 else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    rows = zip(*columns.values(), strict=True)
    return "\n".join([line(columns), line(rule), *map(line, rows)])


def _paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def csv_rows(section: Section, table: Table) -> list[dict[str, Any]]:
    """The rows of a table with all digits; an empty cell is unknown, or does not exist."""
    evaluator = table.evaluator
    rows = []
    for row in table.rows:
        published, lag = row.published, table.lag(row)
        rows.append(
            {
                "dataset": section.dataset,
                "binarization": section.binarization,
                "split": evaluator.split,
                "evaluator": evaluator.name,
                "num_samples": evaluator.num_samples,
                "num_images": evaluator.num_images,
                "checkpoint": evaluator.checkpoint,
                "estimator": row.label,
                "seeds": " ".join(str(run.seed) for run in row.runs),
                "num_seeds": len(row.measurements),
                "log_likelihood": row.log_likelihood,
                "standard_error_over_seeds": row.error_over_seeds,
                "standard_error_over_images": row.error_over_images,
                "behind_best": lag and lag.value,
                "behind_best_error_over_seeds": lag and lag.error_over_seeds,
                "behind_best_error_over_images": lag and lag.error_over_images,
                "published": published and published.value,
                "published_error": published and published.error,
                "published_in": published and published.source,
                "difference": row.difference,
                "otherwise_than_published": "; ".join(row.differences),
                "epochs": row.mean(lambda run: run.epochs),
                "wall_clock_s": row.mean(lambda run: run.wall_clock_s),
                "train_s": row.mean(lambda run: run.train_s),
                "train_images_per_s": row.mean(lambda run: run.images_per_s),
                "decoder_evaluations_per_image": row.mean(lambda run: run.decoder_evaluations),
                "truncated_fraction": row.mean(lambda run: run.truncated_fraction),
                "status": row.status,
                "folders": " ".join(str(m.folder) for m in row.measurements),
            }
        )
    return rows
