"""Sweeps: many jobs, each in a folder of its own, that can be stopped and gone on with.

A job's folder is named by its overrides. So a sweep that is started again in the same folder finds
what each job has left there: one that is done is left out, one that was begun goes on, the others
run. At the end a table tells how each job stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import os
import re
import shlex
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ucvae import results
from ucvae.cli import _hydra, _runs, _workers
from ucvae.cli._command import Command, Interrupted, traceback_of
from ucvae.device import place
from ucvae.errors import ConfigError, LostProcessError, RunError, UcvaeError
from ucvae.progress import quiet

log = logging.getLogger(__name__)

KEY = "hydra.sweep.dir"
# Where the last table stays, for those who come back to a closed terminal.
STATUS = "status.txt"
# Keys that no folder's name holds, so that a sweep may go on with other values of them.
NAMELESS = ("data_dir",)
# Characters of what sets a job apart, in the table.
MOST = 80


@dataclass(frozen=True)
class Failure:
    """What a job returns when it failed: text, which any launcher can send back."""

    message: str


@dataclass
class Job:
    """How a job stands.

    Attributes:
        overrides: what sets it apart from a single run.
        name: of its folder.
        settings: what it computes; None if they are refused.
        result: what it has found, if it is done.
        earlier: whether it was done before this sweep began.
        failure: why it is not done, if it failed.
    """

    overrides: list[str]
    name: str = ""
    settings: Any = None
    result: dict[str, Any] | None = None
    earlier: bool = False
    failure: str | None = None


def asked_for(command: Command, given: list[str]) -> list[str] | None:
    """Return the overrides of the sweep that is to be gone on with, None if that is not asked.

    Raises:
        ConfigError: with it, something is given that would name other folders.
        RunError: what the sweep was asked for cannot be read.
    """
    key = command.resume_key
    asked = [text for text in given if _hydra.override_key(text) == key]
    if key is None or not asked:
        return None
    folder = _hydra.override_value(_hydra.quote_path(asked[-1], (key,)))
    if not folder or not os.path.isfile(os.path.join(str(folder), _runs.ASKED)):
        return None
    changes = [_hydra.quote_path(text, NAMELESS) for text in given if text not in asked]
    changed = {_hydra.override_key(text) for text in changes}
    for name in changed:
        if name == KEY or not (name in NAMELESS or name.startswith(("hydra.", "hydra/"))):
            raise ConfigError(
                f"{name}: a sweep goes on with what it was started with; only these may change: "
                f"{', '.join(NAMELESS)}, and how its jobs are launched (hydra/launcher, "
                "hydra.launcher)"
            )
    kept = [
        text
        for text in _saved(Path(str(folder)), key)
        if _hydra.override_key(text) not in {*changed, KEY}
    ]
    return [*kept, *changes, f"{KEY}={_hydra.quote(str(folder))}"]


def _saved(folder: Path, key: str) -> list[str]:
    try:
        asked = _hydra.as_written(OmegaConf.load(folder / _runs.ASKED))["hydra"]["overrides"]
        saved = [*asked["task"], *asked["hydra"]]
        if not all(isinstance(text, str) for text in saved):
            raise ValueError("it lists other than texts")
    except Exception as error:  # what a damaged file makes the parser raise can be anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"{key}={folder}: {_runs.ASKED} is damaged ({reason}); start the sweep as before, "
            f"with {KEY}={folder}"
        ) from error
    return saved


def sweep(command: Command, session: _hydra.Session, overrides: list[str]) -> int:
    """Run all jobs, in whatever launcher; a job that fails keeps none of the others from running.

    What is wrong in the configuration of any job is found before the first one starts.

    Raises:
        ConfigError: it is asked of one of several processes.
    """
    if not place().alone:
        raise ConfigError(
            f"-m: {place().size} processes train one run together; start the sweep without torchrun"
        )
    config = session.compose(overrides, RunMode.MULTIRUN)
    for part in ("launcher", "sweeper"):
        _require_plugin(part, config.hydra)
    if _all_at_once(config):
        overrides = [*overrides, f"hydra.sweeper.max_batch_size={_workers.count()}"]
    folder, timed = _hydra.output_folder(config, KEY)
    if not timed and not os.path.isfile(folder / _runs.ASKED):  # with it, it is the sweep's own
        _runs.refuse_run(folder, KEY)
    jobs = _Jobs(command, session, config, folder)
    grid = config.hydra.sweeper._target_.endswith(".BasicSweeper")
    if grid:
        jobs.check(others=not timed)
    claimed = _runs.claim(folder, timed, KEY)
    jobs.folder = claimed.folder
    overrides = [*overrides, f"{KEY}={_hydra.quote(str(claimed.folder))}"]
    try:
        with _runs.tidy(claimed, KEY), _Signals() as signals:
            watched = partial(_Launcher, jobs=jobs, signals=signals, optimised=not grid)
            session.multirun(partial(run_job, command), overrides, watched)
    except KeyboardInterrupt as error:
        jobs.look_again()
        jobs.tell()
        number = getattr(error, "signal", signal.SIGINT)
        stopped = f"stopped by {signal.Signals(number).name}"
        raise Interrupted(f"{stopped}; go on with: {jobs.how_to_go_on()}", number) from None
    except ValueError:
        if not jobs.all or any(job.failure is None for job in jobs.all.values()):
            raise
        # An optimiser has nothing to choose from.
    jobs.tell()
    return 1 if any(job.failure is not None for job in jobs.all.values()) else 0


class _Signals:
    """Has SIGINT and SIGTERM end a sweep at once, so that no worker is left behind.

    Attributes:
        number: of the one that came; a launcher may make another error of it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def _stop(self, number: int, frame: FrameType | None) -> NoReturn:
        self.number = number
        raise Interrupted("", number)

    def __enter__(self) -> _Signals:
        with contextlib.suppress(ValueError):  # not the main thread, which alone gets signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _all_at_once(config: DictConfig) -> bool:
    """Say whether all jobs of the sweep would run at the same time on this machine."""
    local = config.hydra.launcher._target_.endswith(".submitit_launcher.LocalLauncher")
    return local and config.hydra.sweeper.get("max_batch_size", 0) is None


def _require_plugin(part: str, config: DictConfig) -> None:
    """Refuse a launcher or a sweeper that is not installed."""
    found = re.match(rf"hydra_plugins\.(hydra_(\w+)_{part})\.", config[part]._target_)
    if found and importlib.util.find_spec(f"hydra_plugins.{found[1]}") is None:
        choice = config.runtime.choices[f"hydra/{part}"]
        raise ConfigError(
            f"hydra/{part}={choice}: a package is missing; pip install 'ucvae[{found[2]}]'"
        )


class _Jobs:
    """The jobs of a sweep, by their overrides, in the order in which they run."""

    def __init__(
        self, command: Command, session: _hydra.Session, config: DictConfig, folder: Path
    ) -> None:
        self.command = command
        self.session = session
        self.config = config
        self.folder = folder
        self.all: dict[tuple[str, ...], Job] = {}
        pattern = str(_hydra.as_written(config.hydra.sweep)["subdir"])
        # Then the names hold only as long as no job is left out.
        self.numbered = "job.num" in pattern or "job.id" in pattern

    def check(self, others: bool) -> None:
        """Refuse the sweep if a job is misconfigured, or its folder is another's.

        Args:
            others: whether there may be something in the folders.
        """
        names = set()
        for number, overrides in enumerate(self.session.jobs(self.config)):
            try:
                job = self._add(overrides, number, others)
                if job.name in names:
                    raise ConfigError(f"hydra.sweep.subdir: two jobs would write into {job.name}")
                if others and job.result is None:
                    _runs.refuse_used(self.folder / job.name, KEY)
            except UcvaeError as error:
                raise type(error)(f"{error} (in the job {' '.join(overrides)})") from None
            names.add(job.name)

    def find(self, overrides: list[str], number: int) -> Job:
        """Return a job that is about to be launched, whether it was checked or not."""
        if tuple(overrides) not in self.all:
            with contextlib.suppress(UcvaeError):  # which the job itself will meet, and tell
                self._add(overrides, number, others=True)
        return self.all[tuple(overrides)]

    def _add(self, overrides: list[str], number: int, others: bool) -> Job:
        job = self.all[tuple(overrides)] = Job(overrides)
        config = self.session.compose_job(self.config, overrides, number)
        HydraConfig.instance().set_config(config)
        job.name = _hydra.select(config, "hydra.sweep.subdir")
        job.settings = self.command.check(_hydra.without_hydra(config))
        if others:
            job.result = self.command.finished(job.settings, self.folder / job.name)
            job.earlier = job.result is not None
        return job

    def started(self, job: Job) -> int:
        """Return a number that changes when the job is started: Hydra then writes its overrides."""
        with contextlib.suppress(OSError):
            return (self.folder / job.name / ".hydra" / "overrides.yaml").stat().st_mtime_ns
        return 0

    def look_again(self) -> None:
        """Take note of what was done by jobs whose launcher has not returned."""
        for job in self.all.values():
            if job.settings is not None and job.result is None and job.failure is None:
                job.result = self.command.finished(job.settings, self.folder / job.name)

    def how_to_go_on(self) -> str:
        """Return the command that runs what is not done."""
        folder, key = results.shorten(self.folder), self.command.resume_key
        if key is None:
            return f"the same command with {KEY}={shlex.quote(folder)}"
        return _hydra.how_to_go_on(self.command.name, key, folder, self.config.hydra)

    def tell(self) -> None:
        """Print how all jobs stand, and keep it in the folder; name those that failed."""
        jobs = list(self.all.values())
        failed = [
            f"{results.shorten(self.folder / job.name)}: {job.failure}"
            for job in jobs
            if job.failure is not None
        ]
        hints = []
        done = [job for job in jobs if job.result is not None]
        if done:
            # Evaluations are reported beside the runs that they are of, which lie elsewhere.
            runs = [getattr(job.settings, "run", None) for job in done]
            folders = dict.fromkeys([*map(Path, filter(None, runs)), self.folder])
            named = (shlex.quote(results.shorten(folder)) for folder in folders)
            hints.append(f"ucvae-report {' '.join(named)}")
        if any(job.result is None for job in jobs):
            hints.append(self.how_to_go_on())
        shown = "\n".join([self._table(jobs), *hints])
        print(shown, flush=True)
        for line in failed:
            self.command.tell(line)
        results.write_text(self.folder / STATUS, "\n".join([shown, *failed, ""]), "status")

    def _table(self, jobs: list[Job]) -> str:
        states = [self._state(job) for job in jobs]
        counts = ", ".join(f"{count} {state}" for state, count in Counter(states).items())
        common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
        names = [
            " ".join(text for text in job.overrides if text not in common) or "all as given"
            for job in jobs
        ]
        if len(set(map(_middle, names))) == len(jobs):
            names = list(map(_middle, names))
        rows = [
            (name, state, results.headline(job.result) if job.result else "")
            for name, state, job in zip(names, states, jobs, strict=True)
        ]
        number = "1 job" if len(jobs) == 1 else f"{len(jobs)} jobs"
        return results.columns(f"sweep: {number}, {counts}", rows)

    def _state(self, job: Job) -> str:
        if job.failure is not None:
            return "failed"
        if job.result is not None:
            return "done before" if job.earlier else "finished"
        begun = job.name and _runs.begun(self.folder / job.name)
        return "stopped" if begun else "not run"


def _middle(text: str) -> str:
    """Leave out the middle of a long text."""
    return text if len(text) <= MOST else f"{text[: MOST // 2]} ... {text[-MOST // 2 :]}"


class _Launcher(Launcher):
    """Has a launcher run the jobs that are not done, and takes note of what becomes of all.

    Args:
        inner: the launcher, set up.
        jobs: of the sweep.
        signals: that came.
        optimised: whether the sweeper wants a number of each job, and not its result.
    """

    def __init__(self, inner: Launcher, jobs: _Jobs, signals: _Signals, optimised: bool) -> None:
        self.inner = inner
        self.jobs = jobs
        self.signals = signals
        self.optimised = optimised

    def setup(self, **_: Any) -> None:
        """Do nothing: the inner launcher is set up."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Return what each job returned, now or before."""
        batch = [
            self.jobs.find(list(overrides), initial_job_idx + place)
            for place, overrides in enumerate(job_overrides)
        ]
        done = [job.result is not None and not self.jobs.numbered for job in batch]
        if any(done):
            log.info("%d of %d jobs are done", sum(done), len(batch))
        self._run([job for job, out in zip(batch, done, strict=True) if not out], initial_job_idx)
        return [self._answer(job) for job in batch]

    def _run(self, jobs: list[Job], first: int) -> None:
        """Launch jobs; if a process among them dies, the others run all the same.

        Joblib then ends all its workers, and does not tell whose job it was. So what was at work is
        launched once more when the rest is done, each by itself: who falls alone has failed.
        """
        alone: list[Job] = []
        while jobs or alone:
            batch, jobs = (jobs, []) if jobs else ([alone.pop()], [])
            before = {job.name: self.jobs.started(job) for job in batch}
            try:
                self._launch(batch, first)
            except _LostWorkersError as error:
                self.jobs.look_again()
                left = [job for job in batch if job.result is None]
                fallen = [job for job in left if self.jobs.started(job) != before[job.name]]
                if not fallen or self.jobs.numbered:
                    raise self._gave_up(error.__cause__) from error
                if len(batch) == 1:
                    fallen[0].failure = f"its process died: {_in_a_line(error.__cause__)}"
                    continue
                log.warning(
                    "a worker died (%s); the %d jobs that were at work run again last, one by one",
                    _in_a_line(error.__cause__),
                    len(fallen),
                )
                alone += fallen
                jobs = [job for job in left if job not in fallen]

    def _answer(self, job: Job) -> JobReturn:
        answer = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
        answer.return_value = job.result
        if self.optimised:
            answer.return_value = results.objective(job.result) if job.result else None
        return answer

    def _launch(self, jobs: list[Job], first: int) -> None:
        """Launch jobs at once, and note what each returned.

        Raises:
            _LostWorkersError: the launcher has ended all its workers, since one of them died.
        """
        try:
            with _each_by_itself(self.inner):
                answers = self.inner.launch([job.overrides for job in jobs], first)
        except UcvaeError:
            raise
        except Exception as error:
            if self.signals.number is not None:  # the workers were stopped, as was asked
                raise Interrupted("", self.signals.number) from error
            if _runs.not_written(error) is not None:
                raise
            if type(error).__name__ == "TerminatedWorkerError":  # joblib's, which may not be here
                raise _LostWorkersError from error
            raise self._gave_up(error) from error
        for job, answer in zip(jobs, answers, strict=True):
            found = answer.return_value
            if isinstance(found, Failure):
                job.failure = found.message
            else:
                job.result = found

    def _gave_up(self, error: BaseException | None) -> LostProcessError:
        """Tell how the jobs stand, and return what ends the sweep: a queue that refuses, ..."""
        self.jobs.look_again()
        self.jobs.tell()
        return LostProcessError(f"{type(self.inner).__name__}: {_in_a_line(error)}")


class _LostWorkersError(Exception):
    """A worker has died, and the launcher has ended the others; its error is the cause."""


def _in_a_line(error: BaseException | None) -> str:
    reason = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {reason}"


@contextlib.contextmanager
def _each_by_itself(launcher: Launcher) -> Iterator[None]:
    """Have launchers that ask one job after the other for its result take an error for an answer.

    With the error of the first job whose process died they would end the sweep, while others are at
    work or in the queue.
    """
    package = type(launcher).__module__.split(".")[1]
    owner: Any
    kind: tuple[type[Exception], ...]
    if package == "hydra_submitit_launcher":
        from submitit import Job
        from submitit.core.utils import UncompletedJobError

        owner, name, kind = Job, "results", (UncompletedJobError,)
    elif package == "hydra_ray_launcher":
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

        owner, name = ray, "get"
        kind = (NodeDiedError, OutOfMemoryError, WorkerCrashedError)
    else:
        yield
        return
    ask = getattr(owner, name)

    def told(job: Any) -> Any:
        try:
            return ask(job)
        except kind as error:
            answer = JobReturn(status=JobStatus.COMPLETED)
            answer.return_value = Failure(f"its process died: {_in_a_line(error)}")
            return [answer] if name == "results" else answer  # of a job's only task

    setattr(owner, name, told)
    try:
        yield
    finally:
        setattr(owner, name, ask)


def run_job(command: Command, config: DictConfig) -> Any:
    """Run one job of a sweep: check, prepare, work. Returns a :class:`Failure` rather than raise.

    It is a module-level function so that launchers can send it to other processes.
    """
    runtime = HydraConfig.get()
    folder = Path(runtime.runtime.output_dir)
    try:
        found = _work(command, config, runtime, folder)
    except Exception as error:
        known = isinstance(error, UcvaeError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        log.error("%s", message, exc_info=traceback_of(error))
        return Failure(message)
    if quiet():  # else it has told of itself
        print(f"{folder.name}: {results.headline(found)}", flush=True)
    return found


def _work(command: Command, config: DictConfig, runtime: HydraConf, folder: Path) -> Any:
    settings = command.check(config)
    with _runs.held(folder, KEY) as note:
        if note:
            log.warning("%s", note)
        found = command.finished(settings, folder)  # by another sweep, meanwhile
        if found is not None:
            return found
        settings = command.take_up(settings, folder)
        _workers.limit_threads(runtime.launcher)
        sweep_folder = Path(runtime.runtime.cwd, runtime.sweep.dir)
        with _workers.device(settings.device, sweep_folder, runtime.job.num) as device:
            return command.prepare(dataclasses.replace(settings, device=device))(folder)
