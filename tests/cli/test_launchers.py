"""Sweeps by Hydra's plugins, for real: several processes, a queue, an optimiser."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml

from tests.slurm.cluster import cluster, missing
from ucvae.cli import _workers

QUICK = ("estimator=elbo", "trainer.max_epochs=1", "evaluator.num_samples=5", "device=cpu")


def needs(plugin):
    reason = f"hydra-{plugin.replace('_', '-')} is not installed"
    try:
        __import__(f"hydra_plugins.hydra_{plugin}")
    except ImportError:
        return pytest.mark.skip(reason=reason)
    return pytest.mark.skipif(False, reason=reason)


def environment(**others):
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path), **others}


def start(*arguments, cwd, **others):
    code = "import sys; from ucvae.cli.train import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment(**others),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(*arguments, cwd, **others):
    process = start(*arguments, cwd=cwd, **others)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def results(folder):
    found = [json.loads(path.read_text()) for path in folder.glob("*/result.json")]
    return {result["seed"]: result for result in found}


# A package that is not there


@pytest.mark.parametrize(
    ("choice", "missing_package", "extra"),
    [
        ("hydra/launcher=joblib", "hydra_joblib_launcher", "joblib"),
        ("hydra/launcher=submitit_local", "hydra_submitit_launcher", "submitit"),
        ("hydra/launcher=submitit_slurm", "hydra_submitit_launcher", "submitit"),
        ("hydra/launcher=ray", "hydra_ray_launcher", "ray"),
        ("hydra/sweeper=optuna", "hydra_optuna_sweeper", "optuna"),
    ],
)
def test_missing_plugin_is_named(choice, missing_package, extra, train, monkeypatch, tmp_path):
    def find_spec(name):
        assert name == f"hydra_plugins.{missing_package}"

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    finished = train("-m", choice, "seed=0,1")
    assert finished.code == 2
    assert finished.err == (
        f"ucvae-train: error: {choice}: a package is missing; pip install 'ucvae[{extra}]'\n"
    )
    assert list(tmp_path.iterdir()) == []


# What jobs share


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(_workers, "gpus", lambda: 4)


class TestGpus:
    def test_every_job_gets_one_of_its_own(self, four_gpus, tmp_path):
        with ExitStack() as jobs:
            dealt = [jobs.enter_context(_workers.device("auto", tmp_path, 0)) for _ in range(4)]
            assert dealt == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]

    def test_one_that_is_free_again_is_dealt_out_again(self, four_gpus, tmp_path):
        with ExitStack() as jobs:
            jobs.enter_context(_workers.device("cuda", tmp_path, 0))
            with _workers.device("cuda", tmp_path, 0) as second:
                assert second == "cuda:1"
            jobs.enter_context(_workers.device("cuda", tmp_path, 0))
            assert jobs.enter_context(_workers.device("cuda", tmp_path, 0)) == "cuda:2"

    def test_more_jobs_than_gpus_are_spread(self, four_gpus, tmp_path):
        with ExitStack() as jobs:
            dealt = [jobs.enter_context(_workers.device("auto", tmp_path, 0)) for _ in range(9)]
            assert [dealt.count(f"cuda:{gpu}") for gpu in range(4)] == [3, 2, 2, 2]

    @pytest.mark.parametrize("device", ["cpu", "cuda:3"])
    def test_what_was_asked_for_is_used(self, device, four_gpus, tmp_path):
        with _workers.device(device, tmp_path, 0) as dealt:
            assert dealt == device
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("number", [0, 1])
    def test_nothing_to_deal(self, number, monkeypatch, tmp_path):
        monkeypatch.setattr(_workers, "gpus", lambda: number)
        with _workers.device("auto", tmp_path, 0) as dealt:
            assert dealt == "auto"
        assert list(tmp_path.iterdir()) == []

    def test_machines_share_a_folder_and_no_gpus(self, four_gpus, monkeypatch, tmp_path):
        with _workers.device("auto", tmp_path, 0) as first:
            monkeypatch.setattr("platform.node", lambda: "another")
            with _workers.device("auto", tmp_path, 1) as second:
                assert first == second == "cuda:0"

    def test_without_locks_they_are_dealt_out_by_number(self, four_gpus, monkeypatch, tmp_path):
        def fail(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr("fcntl.flock", fail)
        with _workers.device("auto", tmp_path, 6) as dealt:
            assert dealt == "cuda:2"

    @pytest.mark.parametrize("subdir", [(), ("hydra.sweep.subdir=${device}/${seed}",)])
    def test_jobs_of_a_sweep_get_them(self, subdir, four_gpus, train, calls, monkeypatch, tmp_path):
        monkeypatch.setattr("ucvae.cli.train.resolve", lambda name, _: torch.device(name))
        assert train("-m", "seed=0,1", "device=auto,cpu", "hydra.sweep.dir=s", *subdir).code == 0
        assert [str(call.device) for call in calls] == ["cuda:0", "cpu", "cuda:0", "cpu"]
        assert [path.parent.name for path in tmp_path.rglob(".gpus")] == ["s"]


@pytest.mark.parametrize(
    ("gpus", "cores", "threads", "expected"),
    [(0, 8, None, 8), (0, 8, "2", 4), (0, 2, "4", 1), (0, 3, "", 3), (3, 8, None, 3)],
)
def test_as_many_jobs_at_a_time_as_run_at_full_speed(gpus, cores, threads, expected, monkeypatch):
    monkeypatch.setattr(_workers, "gpus", lambda: gpus)
    monkeypatch.setattr(_workers, "cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert _workers.count() == expected


# For real


@pytest.mark.slow
@needs("joblib_launcher")
def test_joblib(tmp_path):
    asked = ("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=s")
    code, out, err = run(*asked, *QUICK, "seed=0,1,2", "dataset=digits", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "sweep: 3 jobs, 3 finished" in out
    # Of two jobs side by side each has its share of the cores.
    share = max(1, _workers.cores() // 2)
    found = results(tmp_path / "s")
    assert [found[seed]["device"]["threads"] for seed in range(3)] == [share] * 3
    # What the jobs tell is in their own files; here is a line for each.
    assert ": validation " not in out
    assert sum(": test -" in line for line in out.splitlines()) == 3
    log = (tmp_path / "s").glob("*seed=1*/train.log")
    assert ": validation " in next(log).read_text()


@pytest.mark.slow
@needs("joblib_launcher")
def test_joblib_reports_failures_and_goes_on(tmp_path):
    asked = ("-m", "hydra/launcher=joblib", "dataset=digits,mnist_larochelle", "hydra.sweep.dir=s")
    code, out, err = run(*asked, *QUICK, "data_dir=none", cwd=tmp_path)
    assert code == 1
    assert "sweep: 2 jobs, 1 finished, 1 failed" in out
    (line,) = [line for line in err.splitlines() if line.startswith("ucvae-train: error: ")]
    assert "dataset=mnist_larochelle" in line and "binarized_mnist_train.amat" in line
    code, out, _ = run("resume=s", cwd=tmp_path)
    assert code == 1 and "sweep: 2 jobs, 1 done before, 1 failed" in out


@pytest.mark.slow
@needs("joblib_launcher")
@pytest.mark.parametrize(("number", "group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_stopping_joblib_leaves_no_worker_behind(number, group, tmp_path):
    asked = ("-m", "hydra/launcher=joblib", "seed=0,1", "estimator=elbo", "hydra.sweep.dir=s")
    process = start(*asked, "trainer.max_epochs=100000", "device=cpu", cwd=tmp_path)
    end = time.monotonic() + 120
    while len(list(tmp_path.glob("s/*/checkpoints/best.pt"))) < 2:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.2)
    (os.killpg if group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "sweep: 2 jobs, 2 stopped" in out
    assert f"stopped by {number.name}; go on with: ucvae-train resume=s\n" in err
    # The workers belong to the process's session; none of it is left.
    end = time.monotonic() + 30
    while subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).stdout:
        assert time.monotonic() < end
        time.sleep(0.2)


# Python runs a module of this name in every process that it starts. Whoever comes to the metrics of
# the job dies there and then, as when the kernel runs out of memory, and leaves a line behind.
DIES = """
import os, signal, sys

def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith("{folder}/metrics.jsonl"):
        os.write(deaths, b"killed\\n")
        os.kill(os.getpid(), signal.SIGKILL)

deaths = os.open("{deaths}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
sys.addaudithook(hook)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "kills", "reason"),
    [
        pytest.param("joblib", 2, "TerminatedWorkerError", marks=needs("joblib_launcher")),
        pytest.param("submitit_local", 1, "UncompletedJobError", marks=needs("submitit_launcher")),
        pytest.param("ray", 4, "WorkerCrashedError", marks=needs("ray_launcher")),  # tries again
    ],
)
def test_a_job_whose_process_dies_takes_no_other_with_it(launcher, kills, reason, tmp_path):
    asked = ("-m", f"hydra/launcher={launcher}", "seed=0,1,2,3,4", "hydra.sweep.dir=s", *QUICK)
    common = "dataset=digits,device=cpu,estimator=elbo,evaluator.num_samples=5"
    folder = f"{common},seed=1,trainer.max_epochs=1"
    deaths, path = tmp_path / "deaths", tmp_path / "path"
    path.mkdir()
    (path / "sitecustomize.py").write_text(DIES.format(folder=folder, deaths=deaths))
    paths = os.pathsep.join([str(path), *sys.path])
    code, out, err = run(*asked, "dataset=digits", cwd=tmp_path, PYTHONPATH=paths)
    assert code == 1
    assert len(deaths.read_text().splitlines()) == kills
    assert "sweep: 5 jobs, 4 finished, 1 failed" in out
    line = f"ucvae-train: error: s/{folder}: its process died: {reason}: "
    assert [text for text in err.splitlines() if text.startswith(line)]
    assert sorted(results(tmp_path / "s")) == [0, 2, 3, 4]
    code, out, _ = run("resume=s", cwd=tmp_path)
    assert code == 0 and "sweep: 5 jobs, 4 done before, 1 finished" in out


@pytest.mark.slow
@needs("submitit_launcher")
def test_submitit_on_this_machine(tmp_path):
    asked = ("-m", "hydra/launcher=submitit_local", "hydra.sweep.dir=s", *QUICK)
    code, out, err = run(*asked, "dataset=digits,mnist_larochelle", "data_dir=none", cwd=tmp_path)
    assert code == 1
    assert "sweep: 2 jobs, 1 finished, 1 failed" in out
    assert err.count("\n") == 1 and "binarized_mnist_train.amat" in err
    (found,) = results(tmp_path / "s").values()
    assert found["device"]["threads"] == 1  # cpus_per_task


@pytest.mark.slow
@needs("submitit_launcher")
def test_submitit_on_slurm(tmp_path):
    if reason := missing():
        pytest.skip(reason)
    (tmp_path / "slurm").mkdir()
    asked = ("-m", "hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=1")
    with cluster(tmp_path / "slurm") as slurm:
        code, out, err = run(*asked, *QUICK, "seed=0,1", "hydra.sweep.dir=s", cwd=tmp_path, **slurm)
        assert code == 0, err
        assert "sweep: 2 jobs, 2 finished" in out
        found = results(tmp_path / "s")
        assert [found[seed]["device"]["threads"] for seed in (0, 1)] == [1, 1]
        code, out, err = run("resume=s", cwd=tmp_path, **slurm)
        assert code == 0 and "sweep: 2 jobs, 2 done before" in out, err
    assert list((tmp_path / "s" / ".submitit").rglob("*_log.out"))


@pytest.mark.slow
@needs("ray_launcher")
def test_ray(tmp_path):
    asked = ("-m", "hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2", *QUICK)
    failing = ("dataset=digits,mnist_larochelle", "data_dir=none", "hydra.sweep.dir=s")
    code, out, err = run(*asked, *failing, cwd=tmp_path)
    assert code == 1
    assert "sweep: 2 jobs, 1 finished, 1 failed" in out
    (line,) = [line for line in err.splitlines() if line.startswith("ucvae-train: error: ")]
    assert "binarized_mnist_train.amat" in line


@pytest.mark.slow
@needs("optuna_sweeper")
def test_optuna_raises_the_validation_and_can_be_gone_on_with(tmp_path):
    asked = (
        *("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweep.dir=s"),
        *("optimizer.lr=tag(log,interval(1e-4,1e-2))", *QUICK),
    )
    code, out, err = run(*asked, cwd=tmp_path)
    assert code == 0, err
    assert "sweep: 3 jobs, 3 finished" in out
    paths = list(tmp_path.glob("s/*/result.json"))
    found = [json.loads(path.read_text()) for path in paths]
    best = max(found, key=lambda result: result["valid"]["log_likelihood"])
    told = yaml.safe_load((tmp_path / "s" / "optimization_results.yaml").read_text())
    assert told["best_value"] == best["valid"]["log_likelihood"]
    assert told["best_params"] == {"optimizer.lr": best["config"]["optimizer"]["lr"]}

    paths[0].unlink()
    code, out, err = run("resume=s", cwd=tmp_path)
    assert code == 0 and "sweep: 3 jobs, " in out and "2 done before" in out, err
    assert sorted(tmp_path.glob("s/*/result.json")) == sorted(paths)


@pytest.mark.slow
@needs("optuna_sweeper")
def test_optuna_with_failed_trials(tmp_path):
    asked = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=s", *QUICK)
    code, out, err = run(*asked, "optimizer.lr=interval(-2,-1)", cwd=tmp_path)
    assert code == 1 and "sweep: 2 jobs, 2 failed" in out
    lines = [line for line in err.splitlines() if line.startswith("ucvae-train: error: ")]
    assert len(lines) == 2 and all("optimizer.lr must be positive" in line for line in lines)
    assert "Traceback" not in out + err
