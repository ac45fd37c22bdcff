"""Sweeps: one folder a job, failures that cost no other job, and going on with what is there."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.plugins import Plugins

from ucvae import checkpoint
from ucvae.cli import _runs, _sweeps
from ucvae.errors import DataError
from ucvae.stopping import Stopped

SWEEP = ("-m", "seed=0,1,2", "hydra.sweep.dir=s")
FOUND = {"log_likelihood": -25.0, "standard_error": 0.2, "evaluator": "importance"}


@pytest.fixture
def training(monkeypatch):
    """Training replaced by what ``training.does[seed]`` says: end, stop, or raise an error."""

    class Training:
        def __init__(self):
            self.does = {}
            self.seeds = []
            self.resumed = []

        def run(self, settings, data, device, folder, resume):
            self.seeds.append(settings.seed)
            if resume:
                assert settings.resume == str(folder)
                self.resumed.append(settings.seed)
            end = self.does.get(settings.seed)
            if isinstance(end, BaseException) and not isinstance(end, Stopped):
                raise end
            (folder / "checkpoints").mkdir(exist_ok=True)
            state = {"config": settings.raw, "model": {}, "epoch": 1}
            state["split_sha256"] = data.split_sha256
            for name in ("last.pt", "best.pt"):
                checkpoint.save(folder / "checkpoints" / name, state)
            if isinstance(end, Stopped):
                raise end
            result = {"seed": settings.seed, "test": FOUND, "config": settings.raw}
            (folder / "result.json").write_text(json.dumps(result))
            return result

    made = Training()
    monkeypatch.setattr("ucvae.training.run", made.run)
    return made


def rows(text):
    """How each job stands, by the last table in ``text``."""
    lines = text[text.rindex("sweep: ") :].splitlines()
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line[:2] == "  "}


def basic_launcher():
    Plugins.instance()  # which loads the modules of plugins anew
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    return BasicLauncher


# Failures


def test_failed_jobs_keep_no_other_from_running(train, training, tmp_path):
    training.does = {0: DataError("the file is short"), 1: ZeroDivisionError("a defect")}
    finished = train(*SWEEP)
    assert training.seeds == [0, 1, 2]
    assert finished.code == 1
    errors = ["s/seed=0: the file is short", "s/seed=1: ZeroDivisionError: a defect"]
    assert finished.err.splitlines() == [f"ucvae-train: error: {error}" for error in errors]
    assert "sweep: 3 jobs, 2 failed, 1 finished\n" in finished.out
    assert rows(finished.out) == {
        "seed=0": "failed",
        "seed=1": "failed",
        "seed=2": "finished test -25.00 +- 0.20",
    }
    assert finished.out.endswith("ucvae-report s\nucvae-train resume=s\n")
    kept = (tmp_path / "s" / "status.txt").read_text()
    assert kept.splitlines()[-2:] == errors and kept.startswith("sweep: 3 jobs")
    assert "Traceback" not in (tmp_path / "s" / "seed=0" / "train.log").read_text()
    assert "Traceback" in (tmp_path / "s" / "seed=1" / "train.log").read_text()


def test_names_in_the_table_are_what_differs(train, training):
    out = train("-m", "estimator=elbo,iwae", "trainer.max_epochs=1", "hydra.sweep.dir=s").out
    assert list(rows(out)) == ["estimator=elbo", "estimator=iwae"]
    assert rows(train("-m", "seed=3", "hydra.sweep.dir=t").out) == {
        "seed=3": "finished test -25.00 +- 0.20"
    }


def test_long_overrides_leave_the_table_readable(train, training):
    out = train("-m", f"model.hidden=[{','.join(['16'] * 99)}],[8]", "hydra.sweep.dir=s").out
    (line,) = [line for line in out.splitlines() if " ... " in line]
    assert line.startswith("  model.hidden=[16,16,") and "16,16]  finished" in line
    assert len(line) < 130
    alike = ",".join(f"[{','.join(['16'] * 50)},{last},{','.join(['16'] * 50)}]" for last in (1, 2))
    out = train("-m", f"model.hidden={alike}", "hydra.sweep.dir=t").out
    assert len(rows(out)) == 2 and " ... " not in out


def test_launcher_that_dies_is_told_with_what_is_done(train, training, monkeypatch):
    launcher = basic_launcher()
    launch = launcher.launch

    def lose(self, overrides, number):
        launch(self, overrides[:1], number)
        raise RuntimeError("a worker was killed\nby whom?")

    monkeypatch.setattr(launcher, "launch", lose)
    finished = train(*SWEEP)
    assert finished.code == 1
    assert finished.err == (
        "ucvae-train: error: BasicLauncher: RuntimeError: a worker was killed\n"
    )
    assert list(rows(finished.out).values()) == [
        "finished test -25.00 +- 0.20",
        "not run",
        "not run",
    ]


@pytest.fixture
def mine(tmp_path):
    """An experiment in a folder ``own``, which ``--config-dir`` names."""
    path = tmp_path / "own" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\ntrainer:\n  max_epochs: 2\n")
    return path


def test_a_configuration_that_goes_missing_between_two_jobs_is_told(
    train, training, monkeypatch, mine
):
    def remove(*arguments):
        mine.unlink(missing_ok=True)
        return training.run(*arguments)

    monkeypatch.setattr("ucvae.training.run", remove)
    finished = train("--config-dir=own", *SWEEP, "experiment=mine")
    assert finished.code == 1
    (line,) = finished.err.splitlines()
    assert "MissingConfigException" in line and "'experiment/mine'" in line, line
    assert "cannot write" not in line
    assert list(rows(finished.out).values()) == [
        "finished test -25.00 +- 0.20",
        "not run",
        "not run",
    ]
    assert "resume=s" in finished.out


@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
def test_a_configuration_that_goes_missing_before_the_work_is_one_line(
    sweep, train, training, monkeypatch, tmp_path, mine
):
    claim = _runs.claim

    def remove(*arguments):
        mine.unlink()
        return claim(*arguments)

    monkeypatch.setattr(_runs, "claim", remove)
    asked = SWEEP if sweep else ("hydra.run.dir=s",)
    finished = train("--config-dir=own", *asked, "experiment=mine")
    assert finished.code == 2
    (line,) = finished.err.splitlines()
    assert line == "ucvae-train: error: In 'train': Could not find 'experiment/mine'", line
    assert not (tmp_path / "s").exists() and training.seeds == []


class Died(BaseException):
    """What ends a process, as far as a test in one process can have it."""


class TerminatedWorkerError(Exception):
    """As joblib's."""


@pytest.fixture
def fragile(monkeypatch):
    """A launcher that ends all that is at work when one dies, as joblib does."""
    launcher = basic_launcher()
    launch = launcher.launch

    def lose(self, overrides, number):
        try:
            return launch(self, overrides, number)
        except Died as error:
            raise TerminatedWorkerError("a worker died") from error

    monkeypatch.setattr(launcher, "launch", lose)


class TestDeath:
    def test_it_takes_no_other_job_with_it(self, train, training, fragile):
        training.does = {1: Died()}
        finished = train(*SWEEP)
        assert training.seeds == [0, 1, 2, 1]
        assert finished.code == 1
        assert list(rows(finished.out).values()) == [
            "finished test -25.00 +- 0.20",
            "failed",
            "finished test -25.00 +- 0.20",
        ]
        died = "its process died: TerminatedWorkerError: a worker died"
        assert finished.err.splitlines()[-1] == f"ucvae-train: error: s/seed=1: {died}"

    def test_who_was_only_beside_it_goes_on(self, train, training, fragile):
        training.does = {0: Died()}
        run = training.run

        def once(*arguments):
            try:
                return run(*arguments)
            finally:
                training.does = {}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ucvae.training.run", once)
            finished = train(*SWEEP)
        assert training.seeds == [0, 1, 2, 0]
        assert finished.code == 0 and "sweep: 3 jobs, 3 finished" in finished.out

    def test_numbered_folders_would_get_other_names(self, train, training, fragile):
        training.does = {1: Died()}
        finished = train(*SWEEP, "hydra.sweep.subdir=${hydra.job.num}")
        assert training.seeds == [0, 1]
        assert finished.code == 1
        line = "ucvae-train: error: BasicLauncher: TerminatedWorkerError: a worker died\n"
        assert finished.err.endswith(line)


def test_a_signal_counts_whatever_a_launcher_makes_of_it(train, training, monkeypatch):
    """Joblib may notice that its workers were stopped before it has taken in that itself was."""
    launcher = basic_launcher()

    def lose(self, overrides, number):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as stop:
            raise RuntimeError("a worker was killed") from stop

    monkeypatch.setattr(launcher, "launch", lose)
    finished = train(*SWEEP)
    assert finished.code == 128 + signal.SIGINT
    assert finished.err == (
        "ucvae-train: error: stopped by SIGINT; go on with: ucvae-train resume=s\n"
    )


# Going on


@pytest.mark.parametrize(
    "again",
    [
        SWEEP,
        pytest.param(("resume=s",), marks=pytest.mark.slow),
        pytest.param(("resume=s/",), marks=pytest.mark.slow),
        pytest.param(("-m", "resume=s"), marks=pytest.mark.slow),
    ],
)
def test_second_start_runs_what_is_not_done(train, training, again):
    training.does = {1: DataError("no file"), 2: Stopped(15)}
    assert train(*SWEEP).code == 128 + 15
    assert training.seeds == [0, 1, 2]

    training.does = {}
    finished = train(*again)
    assert finished.code == 0, finished.err
    assert training.seeds[3:] == [1, 2] and training.resumed == [2]
    assert "1 of 3 jobs are done\n" in finished.out
    assert rows(finished.out) == {
        "seed=0": "done before test -25.00 +- 0.20",
        "seed=1": "finished test -25.00 +- 0.20",
        "seed=2": "finished test -25.00 +- 0.20",
    }
    finished = train(*again)
    assert finished.code == 0 and len(training.seeds) == 5
    assert finished.out.startswith("3 of 3 jobs are done\nsweep: 3 jobs, 3 done before\n")


def test_stopped_sweep_tells_what_is_done_and_how_to_go_on(train, training):
    training.does = {1: Stopped(2)}
    finished = train(*SWEEP)
    assert finished.code == 128 + 2
    assert finished.err == (
        "ucvae-train: error: stopped by SIGINT; go on with: ucvae-train resume=s\n"
    )
    assert list(rows(finished.out).values()) == [
        "finished test -25.00 +- 0.20",
        "stopped",
        "not run",
    ]


def test_sweep_can_grow(train, training):
    assert train("-m", "seed=0,1", "hydra.sweep.dir=s").code == 0
    assert train("-m", "seed=1,2", "hydra.sweep.dir=s").code == 0
    assert training.seeds == [0, 1, 2]


def test_job_that_may_go_further_does(train, training, monkeypatch):
    """An experiment's file may have changed meanwhile; what is free to change is gone on with."""
    assert train("-m", "seed=0", "hydra.sweep.dir=s").code == 0
    path = Path("s/seed=0/result.json")
    result = json.loads(path.read_text())
    result["config"]["trainer"]["max_epochs"] = 10
    path.write_text(json.dumps(result))
    assert train("-m", "seed=0", "hydra.sweep.dir=s").code == 0
    assert training.resumed == [0]


def test_other_runs_in_the_folders_are_refused_before_any_work(train, training):
    assert train(*SWEEP, "hydra.sweep.subdir=${hydra:job.num}").code == 0
    asked = ("-m", "seed=0,2,1", "hydra.sweep.dir=s", "hydra.sweep.subdir=${hydra:job.num}")
    finished = train(*asked)
    assert finished.code == 2 and finished.err.count("\n") == 1
    assert "s/1 holds a run that was made with other values of seed (was 1, now 2)" in finished.err
    assert len(training.seeds) == 3


def test_numbered_folders_are_found_again(train, training):
    training.does = {1: DataError("no file")}
    numbered = "hydra.sweep.subdir=${hydra:job.num}"
    assert train(*SWEEP, numbered).code == 1
    training.does = {}
    assert train(*SWEEP, numbered).code == 0
    assert training.seeds == [0, 1, 2, 1]
    assert sorted(os.listdir("s")) == ["0", "1", "2", "multirun.yaml", "status.txt"]


def test_damaged_result_is_refused_by_name(train, training):
    assert train(*SWEEP).code == 0
    Path("s/seed=1/result.json").write_text('{"seed": ')
    finished = train(*SWEEP)
    assert finished.code == 2 and finished.err.count("\n") == 1
    assert "s/seed=1/result.json is damaged" in finished.err


def test_job_done_by_another_sweep_meanwhile_is_left_alone(train, training, monkeypatch):
    assert train(*SWEEP).code == 0
    monkeypatch.setattr(_sweeps._Jobs, "check", lambda self, others: None)
    monkeypatch.setattr(
        _sweeps._Jobs, "find", lambda self, overrides, number: _sweeps.Job(overrides, "x")
    )
    assert train(*SWEEP).code == 0
    assert len(training.seeds) == 3


class TestResume:
    def test_data_may_have_moved(self, train, training):
        assert train(*SWEEP, "data_dir=here").code == 0
        assert train("resume=s", "data_dir=there, or so").code == 0
        assert len(training.seeds) == 3

    def test_jobs_may_be_launched_in_another_way(self, train, training):
        batches = "hydra.sweeper.max_batch_size"
        assert train(*SWEEP, "hydra/launcher=basic", f"{batches}=2").code == 0
        for _ in range(2):
            assert train("resume=s", "hydra/launcher=basic", f"{batches}=1").code == 0
        asked = yaml.safe_load(Path("s/multirun.yaml").read_text())["hydra"]["overrides"]
        keys = [text.partition("=")[0] for text in asked["hydra"]]
        assert sorted(set(keys)) == ["hydra.sweep.dir", batches, "hydra/launcher"]
        assert keys.count(batches) == keys.count("hydra/launcher") == 1
        assert keys.count("hydra.sweep.dir") == 2  # as asked, and as it was claimed
        assert len(training.seeds) == 3

    def test_other_changes_are_refused(self, train, training):
        assert train(*SWEEP).code == 0
        for change in ("seed=4", "trainer.max_epochs=3", "hydra.sweep.dir=t"):
            finished = train("resume=s", change)
            assert finished.code == 2 and finished.err.count("\n") == 1
            assert f"{change.partition('=')[0]}: a sweep goes on with what it was" in finished.err
            assert not Path("t").exists()

    def test_damaged_request_is_refused(self, train, training):
        assert train(*SWEEP).code == 0
        for content in ("", "hydra: 3", "hydra: {overrides: {task: [1], hydra: []}}", "{"):
            Path("s/multirun.yaml").write_text(content)
            finished = train("resume=s")
            assert finished.code == 2 and finished.err.count("\n") == 1
            assert "resume=s: multirun.yaml is damaged" in finished.err

    def test_sweep_of_an_experiment(self, train, training):
        asked = ("experiment=paper_fig3_short", "dataset=digits", "hydra.sweep.dir=s")
        assert train(*asked, "seed=0,1").code == 0
        seeds = len(training.seeds)
        assert train("resume=s").code == 0
        assert len(training.seeds) == seeds > 2


def test_evaluations_that_are_done_are_left_out(train, training, command, monkeypatch):
    ran = []

    def run(settings, trained, state, data, device, folder):
        ran.append(settings.seed)
        result = {"test": FOUND, "config": settings.raw}
        (folder / "result.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr("ucvae.evaluation.rerun.run", run)
    assert train("hydra.run.dir=a").code == 0
    asked = ("ucvae-eval", "-m", "run=a", "seed=0,1", "hydra.sweep.dir=e")
    assert command(*asked).code == 0
    finished = command(*asked)
    assert finished.code == 0 and "2 done before" in finished.out
    assert ran == [0, 1]
    assert command("ucvae-eval", "-m", "run=a", "seed=1,2", "hydra.sweep.dir=e").code == 0
    assert ran == [0, 1, 2]


QUICK = (
    *("-m", "estimator=elbo,iwae", "trainer.max_epochs=4", "evaluator.num_samples=20"),
    *("trainer.valid_every=1", "device=cpu", "hydra.sweep.dir=s"),
)
# Of a result, what is not the same in a run that was stopped and gone on with.
TIMES = ("wall_clock_s", "train_s", "train_images_per_s")


def found(folder):
    results = {}
    for path in folder.glob("*/result.json"):
        result = json.loads(path.read_text())
        results[path.parent.name] = {name: result[name] for name in result if name not in TIMES}
        results[path.parent.name]["config"].pop("resume")
    return results


def test_a_real_sweep_that_was_stopped_ends_as_if_it_was_not(train, monkeypatch, tmp_path):
    from ucvae.training import Training

    assert train(*QUICK[:-1], "hydra.sweep.dir=whole").code == 0

    end_epoch = Training._end_epoch

    def stop(self, bar):
        end_epoch(self, bar)
        if self.epoch == 2:
            raise Stopped(15)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_end_epoch", stop)
        assert train(*QUICK).code == 128 + 15
    assert found(tmp_path / "s") == {}
    finished = train("resume=s")
    assert finished.code == 0, finished.err
    assert len(found(tmp_path / "s")) == 2
    assert found(tmp_path / "s") == found(tmp_path / "whole")


@pytest.mark.slow
def test_eight_runs_that_start_in_the_same_second_get_eight_folders(tmp_path):
    command = [
        sys.executable,
        "-c",
        "import sys; from ucvae.cli.train import main; sys.exit(main())",
    ]
    quick = ["estimator=elbo", "trainer.max_epochs=1", "evaluator.num_samples=5", "device=cpu"]
    same_time = ["hydra.run.dir=outputs/run-${now:%Y}"]
    started = [
        subprocess.Popen([*command, *quick, *same_time], cwd=tmp_path, stderr=subprocess.PIPE)
        for _ in range(8)
    ]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0] * 8, errors
    folders = sorted((tmp_path / "outputs").iterdir())
    assert len(folders) == 8
    assert all((folder / "result.json").is_file() for folder in folders)


def test_settings_of_a_job_that_is_taken_up_name_its_folder(train, training):
    from ucvae.cli import train as train_command

    assert train("hydra.run.dir=a").code == 0
    settings = dataclasses.make_dataclass("Settings", ["resume"])(None)
    assert train_command.take_up(settings, Path("a")).resume == "a"
    assert train_command.take_up(settings, Path("b")).resume is None
    assert _runs.begun(Path("a"))
