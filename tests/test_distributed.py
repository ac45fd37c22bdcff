"""One run in several processes: two or three on this machine's CPU, with gloo."""

import copy
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from ucvae import distributed, training
from ucvae.cli import _sweeps
from ucvae.cli import train as command
from ucvae.config import train_settings
from ucvae.data.digits import Digits
from ucvae.device import Place, place, resolve
from ucvae.distributed import shares
from ucvae.errors import ConfigError, LostProcessError, NonFiniteError, RunError
from ucvae.estimators.coupled import Coupled
from ucvae.estimators.elbo import Elbo
from ucvae.estimators.iwae import Iwae
from ucvae.estimators.snis import Snis
from ucvae.models.mlp import Mlp
from ucvae.randomness import stream
from ucvae.statistics import ChainCounts
from ucvae.stopping import Stopped, StopRequest

CPU = torch.device("cpu")
PIXELS = 9
TRAINING_IMAGES = 20
ESTIMATORS = {
    "elbo": Elbo(num_samples=2),
    "elbo_by_samples": Elbo(analytic_kl=False),
    "iwae": Iwae(num_samples=4),
    "iwae_plain": Iwae(num_samples=4, dreg=False),
    "snis": Snis(num_samples=4, proposal_samples=4, min_weight=0.2, refine_known=False),
    "snis, following": Snis(num_samples=4, follow_encoder=True),
    "coupled": Coupled(num_samples=4, lag=2),
    "remembered": Coupled(num_samples=4, lag=2, proposals="remembered", proposal_samples=4),
}
# Of 2 processes: even, ragged, and too small for both.
BATCHES = (6, 7, 1)
RUN = {
    "seed": 3,
    "dataset": {"_target_": "ucvae.data.digits.Digits"},
    "model": {"_target_": "ucvae.models.mlp.Mlp", "hidden": [8], "latent_dim": 2},
    "optimizer": {"_target_": "ucvae.optimizers.Adam", "lr": 1e-3},
    "estimator": {
        "_target_": "ucvae.estimators.coupled.Coupled",
        "num_samples": 4,
        "lag": 2,
        "proposals": "remembered",
    },
    "trainer": {
        "_target_": "ucvae.training.Trainer",
        "max_epochs": 3,
        "batch_size": 19,  # the last batch of 58 images is one image: fewer than processes
        "valid_every": 2,
        "valid_samples": 5,
        "log_every": 2,
        "checkpoint_every": 2,
        "switch": {"epochs": 1, "num_samples": 3},
    },
    "evaluator": {"_target_": "ucvae.evaluation.importance.ImportanceSampling", "num_samples": 10},
}


def settings(**trainer):
    return train_settings({**RUN, "trainer": {**RUN["trainer"], **trainer}})


def few_digits():
    data = Digits().load(Path())
    return dataclasses.replace(data, train=data.train[:58], valid=data.valid[:20])


# Several processes


def together(work, folder, size=2):
    """What ``work(folder)`` returns in each of several processes."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_process, (size, port, work, folder), size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _process(rank, size, port, work, folder):
    torch.set_num_threads(1)
    here = Place(rank, size, rank)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    os.environ |= {name: str(value) for name, value in zip(names, (*here, port), strict=True)}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    told = []
    with distributed.joined(here, told.append):
        found = work(folder)
    torch.save({"found": found, "told": told}, folder / f"{rank}.pt")


# The gradient of a batch


def small_model():
    torch.manual_seed(5)
    model = Mlp(hidden=[6], latent_dim=2).build(torch.full((1, 3, 3), 0.4), 2)
    return model.double()


def batch(count):
    generator = torch.Generator().manual_seed(count)
    images = torch.rand(count, PIXELS, generator=generator, dtype=torch.float64).round()
    return images, torch.randperm(TRAINING_IMAGES, generator=generator)[:count]


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def lessons(estimator):
    """What an estimator has learnt, as tensors."""
    state = estimator.state_dict()
    return {**{k: v for k, v in state.items() if k != "memory"}, **state.get("memory", {})}


def all_gradients(folder):
    """For each estimator three estimates, learning in between, by the team's processes."""
    found = {}
    team = distributed.team()
    for name in ESTIMATORS:
        model, estimator = small_model(), copy.deepcopy(ESTIMATORS[name])
        estimator.begin(model, TRAINING_IMAGES)
        team.begin(model)
        noise = stream(0, team.purpose("noise"))
        for count in BATCHES:
            images, index = batch(count)
            estimate = team.estimate(estimator, model, images, noise, index)
            model.zero_grad()
            estimate.surrogate.backward()
            estimator.adapt(estimate)
            values = dict(estimate.diagnostics)
            if estimate.objective is not None:
                values["objective"] = estimate.objective
            if estimate.chains is not None:
                counts = ChainCounts(estimator.max_steps, CPU)
                counts.add(estimate.chains)
                team.add_up(counts.parts)
                values["chains"] = torch.cat([part.flatten() for part in counts.parts])
            learnt = {k: v.clone() for k, v in lessons(estimator).items()}
            found[name, count] = gradient_of(model), values, learnt
    return found


def reference(name, weighted=True):
    """The same in this process, share by share, with the processes' random numbers."""
    model, estimator = small_model(), copy.deepcopy(ESTIMATORS[name])
    estimator.begin(model, TRAINING_IMAGES)
    noises = [stream(0, "noise"), stream(0, "noise of rank 1")]
    for count in BATCHES:
        images, index = batch(count)
        gradient, values, ess, learnt = 0, {}, 0, []
        counts = ChainCounts(getattr(estimator, "max_steps", 0), CPU)
        parts = zip(images.split(-(-count // 2)), index.split(-(-count // 2)), noises, strict=False)
        for part, places, noise in parts:
            weight = len(part) / count if weighted else 1 / 2
            estimate = estimator(model, part, noise, places)
            model.zero_grad()
            estimate.surrogate.backward()
            gradient = gradient + weight * gradient_of(model)
            shown = dict(estimate.diagnostics)
            if estimate.objective is not None:
                shown["objective"] = estimate.objective
            for key, value in shown.items():
                values[key] = values.get(key, 0) + weight * value
            if estimate.chains is not None:
                counts.add(estimate.chains)
                ess = ess + weight * estimate.chains.ess
            learnt.append(estimate)
        for estimate in learnt:
            if estimate.lesson is not None:
                estimator.memory.keep(estimate.lesson)
        if counts.histogram.sum():
            values["chains"] = torch.cat([part.flatten() for part in counts.parts])
            before, estimator.memory = estimator.memory, None
            estimator.adapt(dataclasses.replace(estimate, chains=estimate.chains._replace(ess=ess)))
            estimator.memory = before
        yield count, gradient, values, {k: v.clone() for k, v in lessons(estimator).items()}
        if count == 1:
            return


def two_processes(folder):
    """All that the quick tests look at, in one start of two processes."""
    outcome = {"gradients": all_gradients(folder)}
    outcome["whole"] = trained(folder / "whole")
    outcome["limited"] = trained(folder / "limited", max_seconds=1e6)
    with pytest.raises(Stopped):
        trained(folder / "stopped", stop_at=4)
    outcome["stopped"] = trained(folder / "stopped", resume=True)
    return outcome


def trained(folder, resume=False, stop_at=None, **trainer):
    """The state of a run at its end; its last process is told to stop where ``stop_at`` says.

    After a step the leader's clock is far ahead of the others'.
    """
    team = distributed.team()
    if team.leads:
        folder.mkdir(exist_ok=True)
    at_end = {}
    real, step = training.Training.train, training.Training._train_step

    def train(self):
        real(self)
        at_end["run"] = self

    def train_step(self, *batch):
        step(self, *batch)
        self.train_seconds += 1e6 if team.leads else 0
        if self.step == stop_at and team.rank == team.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    training.Training.train, training.Training._train_step = train, train_step
    try:
        training.run(settings(**trainer), few_digits(), CPU, folder, resume)
    finally:
        training.Training.train, training.Training._train_step = real, step
    run = at_end["run"]
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "learnt": lessons(run.estimator),
        "noise": run.noise.get_state(),
        "steps": run.step,
        "best": run.best,
        "coupling": run.last_coupling,
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What both of two processes found, and their folder."""
    folder = tmp_path_factory.mktemp("pair")
    return [each["found"] for each in together(two_processes, folder)], folder


def equal(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_gradient_of_a_batch_is_that_of_one_process(name, pair):
    found = pair[0][0]["gradients"]
    for count, gradient, values, learnt in reference(name):
        team_gradient, team_values, team_learnt = found[name, count]
        torch.testing.assert_close(team_gradient, gradient, rtol=1e-10, atol=1e-12)
        assert team_values.keys() == values.keys()
        for key in values:
            torch.testing.assert_close(
                team_values[key], values[key], rtol=1e-10, atol=1e-12, equal_nan=True
            )
        assert team_learnt.keys() == learnt.keys()
        for key in learnt:
            torch.testing.assert_close(team_learnt[key], learnt[key], rtol=1e-10, atol=1e-12)


def test_shares_of_different_sizes_need_weights(pair):
    """What the test above would say of a plain mean over the processes."""
    references = {count: gradient for count, gradient, *_ in reference("iwae", weighted=False)}
    found = pair[0][0]["gradients"]
    torch.testing.assert_close(found["iwae", 6][0], references[6], rtol=1e-10, atol=1e-12)
    for count in (7, 1):
        assert (found["iwae", count][0] - references[count]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["elbo", "iwae"])
def test_given_the_noise_it_is_the_gradient_of_the_whole_batch(name, pair, monkeypatch):
    noises = [stream(0, "noise"), stream(0, "noise of rank 1")]

    def draw(model, images, count, generator):
        """Of each share from its own stream, as the processes draw."""
        parts = (images.new_empty(own, count, 2) for own in shares(len(images), 2))
        drawn = [p.normal_(generator=g) for p, g in zip(parts, noises, strict=True)]
        return torch.cat(drawn)

    monkeypatch.setattr(f"ucvae.estimators.{name}.draw_noise", draw)
    model = small_model()
    for count in BATCHES:
        images, index = batch(count)
        model.zero_grad()
        ESTIMATORS[name](model, images, None, index).surrogate.backward()
        found = pair[0][0]["gradients"][name, count][0]
        torch.testing.assert_close(found, gradient_of(model), rtol=1e-10, atol=1e-12)


def test_every_process_holds_the_same_numbers(pair):
    first, second = pair[0]
    equal(first["gradients"], second["gradients"])
    for name in ("whole", "limited", "stopped"):
        for part in ("model", "optimizer", "learnt", "steps", "best"):
            equal(first[name][part], second[name][part])
        assert not torch.equal(first[name]["noise"], second[name]["noise"])


def test_a_run_taken_up_again_is_the_run_never_stopped(pair):
    for found in pair[0]:
        equal(found["stopped"], found["whole"])
    results = [
        json.loads((pair[1] / run / "result.json").read_text()) for run in ("stopped", "whole")
    ]
    assert results[0]["test"] == results[1]["test"]
    assert results[0]["device"]["processes"] == 2
    lines = [
        (pair[1] / run / "metrics.jsonl").read_text().splitlines() for run in ("stopped", "whole")
    ]
    timeless = [
        [{k: v for k, v in json.loads(line).items() if "time/" not in k} for line in run]
        for run in lines
    ]
    assert timeless[0] == timeless[1]


def test_the_clock_of_the_leader_ends_the_run_for_all(pair):
    assert [found["limited"]["steps"] for found in pair[0]] == [1, 1]


def test_one_process_writes(pair):
    alone = pair[1] / "alone"
    alone.mkdir()
    training.run(settings(), few_digits(), CPU, alone, False)
    kinds = [
        sorted(path.name.split(".")[0] for path in f.rglob("*")) for f in (alone, pair[1] / "whole")
    ]
    assert kinds[0] == kinds[1]


def test_the_number_of_processes_is_a_part_of_the_run(pair, monkeypatch):
    resumed = dataclasses.replace(settings(), resume=str(pair[1] / "whole"))
    with pytest.raises(RunError, match=r"by 2 processes.* cannot go on with 1$"):
        command._refuse_changes(resumed, pair[1] / "whole")
    in_processes(monkeypatch, 3)
    with pytest.raises(RunError, match=r"by 2 processes.* cannot go on with 3$"):
        command._refuse_changes(resumed, pair[1] / "whole")
    in_processes(monkeypatch, 2)
    command._refuse_changes(resumed, pair[1] / "whole")


# Where a process is


def in_processes(monkeypatch, size, rank=0, **others):
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": 1}
    for name, value in (values | {"MASTER_ADDR": "localhost"} | others).items():
        monkeypatch.setenv(name, str(value))


def test_places(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert place().alone
    in_processes(monkeypatch, 1)
    assert place().alone
    in_processes(monkeypatch, 3, rank=2)
    assert place() == (2, 3, 2) and not place().alone


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_place_is_refused(name, monkeypatch):
    in_processes(monkeypatch, 2)
    monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=f"^{name}= in the environment.*WORLD_SIZE=2"):
        place()


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda"):
        assert resolve(name, Place(5, 6, 1)) == torch.device("cuda", 1)
        with pytest.raises(ConfigError, match=f"^device={name}: .* no device for process 3"):
            resolve(name, Place(2, 6, 2))
    with pytest.raises(ConfigError, match="^device=cuda:0: each of 6 processes"):
        resolve("cuda:0", Place(0, 6, 0))
    assert resolve("cpu", Place(5, 6, 1)) == CPU


def test_a_sweep_is_refused(monkeypatch):
    in_processes(monkeypatch, 2)
    with pytest.raises(ConfigError, match="^-m: 2 processes train one run"):
        _sweeps.sweep(command.COMMAND, None, ["seed=0,1"])


def test_shares():
    for count in range(1, 20):
        for size in range(1, 5):
            found = shares(count, size)
            assert len(found) == size and sum(found) == count
            assert max(found) - min(found) <= 1


def test_a_signal_after_another_process_has_had_one_is_no_second_one():
    with StopRequest() as stop:
        stop.number = signal.SIGTERM  # of the other
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_comes_while_the_processes_agree_is_for_the_next_time(monkeypatch):
    def agree(number, operation):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("torch.distributed.all_reduce", agree)
    team = object.__new__(distributed._Processes)
    with StopRequest() as stop:
        assert not team.asked(stop)
        assert stop.number == signal.SIGTERM


# The command


TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
QUICK = (
    "device=cpu",
    "model.hidden=[16]",
    "model.latent_dim=3",
    "trainer.valid_samples=5",
    "evaluator.num_samples=20",
)


def torchrun(*arguments, processes=2, cwd, options=()):
    environment = {**os.environ, "PYTHONPATH": str(Path(distributed.__file__).parents[1])}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    train = Path(sys.executable).with_name("ucvae-train")
    line = [TORCHRUN, "--nproc-per-node", processes, *(options or ["--standalone"])]
    return subprocess.Popen(
        [str(part) for part in (*line, "--no-python", train, *QUICK, *arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    """The exit code, what was printed, and the errors that the command told."""
    out, err = process.communicate(timeout=300)
    told = [line for line in err.splitlines() if line.startswith("ucvae-train: error: ")]
    return process.returncode, out, [line.removeprefix("ucvae-train: error: ") for line in told]


@pytest.mark.slow
def test_torchrun(tmp_path):
    process = torchrun("estimator=iwae", "trainer.max_epochs=1", cwd=tmp_path)
    code, out, told = finished(process)
    assert (code, told) == (0, [])
    assert out.count("test log-likelihood") == 1
    (folder,) = (tmp_path / "outputs" / "digits-iwae").iterdir()
    assert sorted(path.name.split(".tfevents")[0] for path in folder.iterdir()) == [
        ".hydra",
        ".lock",
        "checkpoints",
        "events.out",
        "metrics.jsonl",
        "result.json",
        "test_log_likelihoods.csv",
        "train.log",
    ]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "best.pt",
        "last.previous.pt",
        "last.pt",
    ]
    result = json.loads((folder / "result.json").read_text())
    assert result["device"]["processes"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


@pytest.mark.slow
class TestTorchrun:
    def test_a_refusal_is_told_once(self, tmp_path):
        code, _, told = finished(torchrun("estimator=iwea", cwd=tmp_path))
        assert code != 0 and len(told) == 1
        assert told[0].startswith("estimator=iwea: no such choice")
        assert not list(tmp_path.iterdir())

    def test_help(self, tmp_path):
        code, out, told = finished(torchrun("--help", cwd=tmp_path))
        assert (code, told) == (0, [])
        assert out.count("ucvae-train resume=") == 1

    def test_what_becomes_infinite_is_told_once(self, tmp_path):
        code, _, told = finished(torchrun("optimizer.lr=1e6", cwd=tmp_path))
        assert code != 0 and len(told) == 1
        assert "NaN" in told[0] or "became" in told[0]

    @pytest.mark.parametrize(
        ("number", "rank", "message"),
        [
            (signal.SIGKILL, 0, "rank 1: another process of the run has died"),
            (signal.SIGKILL, 1, "another process of the run has died"),
            (signal.SIGTERM, 1, "stopped by SIGTERM; go on with 2 processes"),
            (signal.SIGTERM, None, "stopped by SIGTERM; go on with 2 processes"),
            (signal.SIGINT, None, "stopped by SIGINT; go on with 2 processes"),
        ],
        ids=["killed leader", "killed follower", "stopped follower", "stopped", "interrupted"],
    )
    def test_an_early_end_can_be_gone_on_with(self, number, rank, message, tmp_path):
        limits = ["trainer.max_epochs=500", "trainer.checkpoint_every=2", "trainer.valid_every=500"]
        process = torchrun(*limits, "hydra.run.dir=run", cwd=tmp_path)
        last = tmp_path / "run" / "checkpoints" / "last.pt"
        while not last.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.kill(process.pid if rank is None else worker(process, rank), number)
        code, _, told = finished(process)
        assert code != 0 and len(told) == 1, told
        assert told[0].startswith(message)
        assert told[0].endswith(f"ucvae-train resume={tmp_path / 'run'}")
        before = torch.load(last)
        enough = f"trainer.max_seconds={before['train_seconds'] + 0.5}"
        code, _, told = finished(torchrun("resume=run", enough, cwd=tmp_path))
        assert (code, told) == (0, [])
        assert torch.load(last)["step"] > before["step"]

    def test_two_machines(self, tmp_path):
        """Two agents on the loopback, as on two machines."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meeting = ["--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-id", "test"]
        meeting += ["--rdzv-endpoint", f"127.0.0.1:{port}"]
        agents = [
            torchrun("trainer.max_epochs=2", processes=1, cwd=tmp_path, options=meeting)
            for _ in range(2)
        ]
        ends = [finished(agent) for agent in agents]
        assert [(code, told) for code, _, told in ends] == [(0, [])] * 2
        assert sum(out.count("test log-likelihood") for _, out, _ in ends) == 1
        (folder,) = (tmp_path / "outputs" / "digits-coupled").iterdir()
        result = json.loads((folder / "result.json").read_text())
        assert result["device"]["processes"] == 2


def worker(process, rank):
    """The process id of a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (path / "environ").read_bytes().split(b"\0")
        except (OSError, PermissionError):
            continue
        if parent == process.pid and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


# Failures and three processes


def fails_alone(folder):
    """An error of the last process's own."""
    team = distributed.team()
    if team.leads:
        (folder / "run").mkdir()
    call = Iwae.__call__

    def wrong(self, model, images, generator, index=None):
        if team.rank == 1:
            raise NonFiniteError("log weights: wrong")
        return call(self, model, images, generator, index)

    Iwae.__call__ = wrong
    try:
        training.run(settings(), few_digits(), CPU, folder / "run", False)
    except (NonFiniteError, LostProcessError) as error:
        return type(error).__name__, str(error), error.told
    return None


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_and_is_told_once(tmp_path):
    leader, other = together(fails_alone, tmp_path)
    assert other["told"] == ["rank 1: log weights: wrong"]
    assert other["found"] == ("NonFiniteError", "log weights: wrong", True)
    assert leader["told"] == []
    assert leader["found"] == ("LostProcessError", "rank 1: log weights: wrong", True)


def three_processes(folder):
    trained(folder / "parted", max_epochs=2)
    return trained(folder / "whole"), trained(folder / "parted", resume=True)


@pytest.mark.slow
def test_three_processes(tmp_path):
    first, *others = (each["found"] for each in together(three_processes, tmp_path, 3))
    equal(*first)
    for other in others:
        for run, of_first in zip(other, first, strict=True):
            for part in ("model", "optimizer", "learnt", "steps", "best"):
                equal(run[part], of_first[part])
