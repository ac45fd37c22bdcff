"""From the command line to the work, with every bad request refused in one line.

Hydra's own entry point makes the output folder before the command can look at the configuration.
Here the request is checked first: :func:`main` composes the configuration, has the command check
and prepare it (components, device, data), claims the output folder, and only then lets Hydra run
the job on what was prepared. Sweeps are in :mod:`ucvae.cli._sweeps`. Flags that only show something
(``--help``, ``--cfg``, ...) go to ``hydra.main`` itself.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from functools import partial
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.types import RunMode
from omegaconf import DictConfig

from ucvae.cli import _hydra, _runs, _sweeps
from ucvae.cli._command import Command, traceback_of
from ucvae.config import config_dir
from ucvae.errors import ConfigError, LostProcessError, NonFiniteError, OutOfMemoryError, UcvaeError

log = logging.getLogger(__name__)


def main(command: Command) -> int:
    """Run a command on ``sys.argv`` and return its exit code.

    0: done. 1: a computation failed, or a job of a sweep did. 2: the request was refused, in one
    line. 128 and a signal's number: stopped by that signal. Errors that are no
    :class:`UcvaeError` are defects of ours and keep their traceback; with ``HYDRA_FULL_ERROR=1``
    every error does.
    """
    sys.argv[1:] = map(_hydra.choose_nothing, sys.argv[1:])
    try:
        return _dispatch(command, sys.argv[1:])
    except UcvaeError as error:
        return end_with(command, error)
    except KeyboardInterrupt as error:
        command.tell(str(error) or "interrupted")
        return 128 + getattr(error, "signal", signal.SIGINT)
    except BrokenPipeError:  # as in `ucvae-train --help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def end_with(command: Command, error: UcvaeError) -> int:
    """Tell of an error, where nothing has, and return the exit code."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    if not error.told:
        command.tell(str(error))
    failed = isinstance(error, NonFiniteError | LostProcessError | OutOfMemoryError)
    return 1 if failed else 2


def _dispatch(command: Command, argv: list[str]) -> int:
    parser = get_args_parser()
    # Instead of a usage text of many lines; argparse wants a subclass, and the parser is Hydra's.
    parser.error = _refuse_flags  # type: ignore[method-assign]
    args = parser.parse_args(argv)
    if args.shell_completion or args.hydra_help or args.experimental_rerun:
        return _show(command)
    with _hydra.session(command.config_name, args) as session:
        if args.help or args.cfg or args.info:
            session.compose(args.overrides, RunMode.RUN)
        else:
            earlier = _sweeps.asked_for(command, args.overrides)
            if earlier is not None:
                return _sweeps.sweep(command, session, earlier)
            sweep = args.multirun or session.mode(args.overrides) == RunMode.MULTIRUN
            _refuse_bare_paths(command, args.overrides)
            # In a sweep, a comma in any other path separates the values to sweep over.
            keys = ("hydra.sweep.dir",) if sweep else command.path_keys
            given = [_hydra.quote_path(text, keys) for text in args.overrides]
            if sweep:
                given = session.over_the_experiment(given)
            start = _sweeps.sweep if sweep else _run
            return start(command, session, command.rewrite(given, sweep))
    return _show(command)


def _refuse_flags(message: str) -> NoReturn:
    raise ConfigError(
        f"{message}; settings are KEY=VALUE, without dashes, and --help shows what is allowed"
    )


def _refuse_bare_paths(command: Command, overrides: list[str]) -> None:
    """Name the key that somebody means who gives a folder alone, as to ``ucvae-report``."""
    for text in overrides:
        if "=" not in text and os.path.exists(text):
            key = command.path_keys[0]
            raise ConfigError(f"{text}: no key there; did you mean {key}={text}?")


def _show(command: Command) -> int:
    decorate = hydra.main(str(config_dir()), command.config_name, _hydra.VERSION_BASE)
    decorate(command.check)()
    return 0


def _run(command: Command, session: _hydra.Session, overrides: list[str]) -> int:
    # The job of a sweep that is resumed was started by an experiment that asks for a sweep.
    overrides = [*overrides, "hydra.mode=RUN"]
    config = session.compose(overrides, RunMode.RUN)
    settings = command.check(_hydra.without_hydra(config))
    folder, timed = _hydra.output_folder(config, "hydra.run.dir")
    resumed = command.continues(settings)
    key = (resumed and command.resume_key) or "hydra.run.dir"
    refuse = partial(_runs.refuse_taken, key=key, resume_key=command.resume_key)
    if not timed and not resumed:
        refuse(folder)
    work = command.prepare(settings)
    claimed = _runs.claim(folder, timed, key)
    folder = claimed.folder
    absolute = folder.absolute()  # with hydra.job.chdir=true the job is elsewhere
    overrides = [*overrides, f"hydra.run.dir={_hydra.quote(str(folder))}"]
    if resumed:  # an interruption must not cost what the run was made with
        overrides.append(f"hydra.output_subdir={_runs.HYDRA_PARTIAL}")
    errors: list[Exception] = []

    # Hydra would print an error of its own before ours, so it gets to see none.
    def job(_: DictConfig) -> None:
        try:
            if resumed:
                _runs.settle(absolute)
            if note:
                log.warning("%s", note)
            work(absolute)
        except Exception as error:  # noqa: BLE001  (raised again below)
            _hydra.file_log.error("%s", error, exc_info=traceback_of(error))
            errors.append(error)

    with _runs.tidy(claimed, key), _runs.held(folder, key) as note:
        if not resumed:
            refuse(folder)  # another run may have begun and ended since
        session.hydra.run(session.config_name, job, overrides)
    if errors:
        raise errors[0]
    return 0
