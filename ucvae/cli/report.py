"""``ucvae-report``: tables and curves over seeds, of runs that are there.

What it tells is made in :mod:`ucvae.report`. No Hydra here: it takes folders, and no settings.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from ucvae import results
from ucvae.errors import RunError, UcvaeError
from ucvae.report import text
from ucvae.report.compare import Report, compare
from ucvae.report.runs import find

NAME = "ucvae-report"
DESCRIPTION = """\
Compares runs of ucvae-train: log-likelihoods over seeds, time and cost in a
table, beside what is published, and curves of training as PNG.

examples:
  ucvae-report outputs/sweeps/2026-01-31_12-00-00      a sweep; files go into it
  ucvae-report outputs                                 all runs there are
  ucvae-report RUN_DIR RUN_DIR SWEEP_DIR --output mine files go into mine
"""
DETAILS = """\
Runs that differ in the seed alone are a row; other data, binarisations and
evaluators are tables of their own. Runs that are not finished, and files that
cannot be used, are named and left out. Exit code 2: nothing was reported.
"""


class _Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        raise RunError(f"{message}; see {NAME} --help")


def main() -> int:
    """Run the command on ``sys.argv`` and return its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a folder's name may have any bytes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(sys.argv[1:])
    except UcvaeError as error:
        _tell(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        _tell("error: interrupted")
        return 130
    except BrokenPipeError:  # as in `ucvae-report outputs | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _path(text: str) -> Path:
    if not text:  # which Path takes for the folder one is in
        raise argparse.ArgumentTypeError("a folder must have a name, got nothing")
    return Path(text)


def _tell(line: str) -> None:
    print(f"{NAME}: {' '.join(line.split())}", file=sys.stderr, flush=True)


def _run(argv: list[str]) -> int:
    parser = _Parser(
        prog=NAME,
        description=DESCRIPTION,
        epilog=DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths", nargs="+", type=_path, metavar="RUN_OR_SWEEP_DIR", help="where runs are, or below"
    )
    parser.add_argument(
        "--output",
        type=_path,
        metavar="DIR",
        help="where the files go; by default into the folder given, or if there are several, into "
        "the folder report here",
    )
    arguments = parser.parse_args(argv)
    paths: list[Path] = arguments.paths
    output = arguments.output
    if output is None:
        output = paths[0] if len(paths) == 1 and os.path.isdir(paths[0]) else Path("report")
    # Told before the table, which takes time. Path.exists raises where a name is too long.
    if os.path.exists(output) and not os.path.isdir(output):
        raise RunError(f"--output: cannot make {output}: there is a file of this name")
    report = compare(find(paths))
    for line in report.left_out:
        _tell(f"left out: {line}")
    if not report.sections:
        raise RunError(f"no finished run under {', '.join(map(str, paths))}: nothing to report")
    print(text.markdown(report), flush=True)
    names = _write(report, output)
    print(f"{results.shorten(output)}: {', '.join(names)}")
    return 0


def _write(report: Report, folder: Path) -> list[str]:
    """Write all files, and return their names.

    Raises:
        RunError: one cannot be written.
    """
    from ucvae.report import curves

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--output: cannot make {folder}: {error.strerror}") from error
    figures = {}
    several = len(report.sections) > 1
    for section in report.sections:
        suffix = f"_{text.name_of(section)}" if several else ""
        figures[text.name_of(section)] = curves.draw(section, folder, suffix)
    results.write_text(folder / "table.md", text.markdown(report, figures), "table")
    names = ["table.md"]
    for section in report.sections:
        for i, table in enumerate(section.tables):
            first = i == 0 and not several
            suffix = "" if first else f"_{text.name_of_table(section, table)}"
            names.append(f"table{suffix}.csv")
            results.write_rows(folder / names[-1], text.csv_rows(section, table))
    return names + [name for of_section in figures.values() for name in of_section]
