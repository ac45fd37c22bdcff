"""Every bad request is one line that names the key and what is allowed, and leaves nothing."""

import re
import shlex
import signal
import sys

import pytest
import torch

from ucvae.config import choices
from ucvae.stopping import Stopped

ESTIMATORS = "coupled, coupled_paper, coupled_paper_isir, elbo, iwae, snis"
# The request, and what the line after "ucvae-train: error: " must hold.
REFUSED = {
    "key": (["estimator.lagg=3"], ["estimator.lagg: no such key", "max_steps", "mean lag?"]),
    "key of another choice": (
        ["estimator=elbo", "estimator.lag=3"],
        ["estimator.lag: no such key; allowed: analytic_kl, num_samples"],
    ),
    "verbosity": (["hydra.verbose=0"], ["hydra.verbose: 0 is not true, false, or the names"]),
    "key in a dict": (["estimator={lagg:3}"], ["estimator.lagg: no such key", "mean lag?"]),
    "key below a value": (["seed.x=3"], ["seed.x: no such key; seed is a value"]),
    "optional group": (["studdy=ais_gap"], ["studdy: no such key", "did you mean study?"]),
    "misspelt experiment": (
        ["experimnt=a"],
        ["experimnt: no such key", "did you mean experiment?"],
    ),
    "key of what has none": (
        ["dataset.binarization=dynamic"],
        ["dataset.binarization: no such key; there are none"],
    ),
    "root key": (["foo=1"], ["foo: no such key", "data_dir, dataset, device"]),
    "added root key": (["+foo=1"], ["foo: no such key", "data_dir, dataset, device"]),
    "added key": (["+model.depth=1"], ["model.depth: no such key", "activation"]),
    "group": (["estimatr=elbo"], ["estimatr: no such key", "did you mean estimator?"]),
    "hydra's key": (["hydra.rundir=x"], ["hydra.rundir: no such key", "run"]),
    "hydra's type": (["hydra.job.chdir=abc"], ["hydra.job.chdir=abc", "bool"]),
    "choice": (["estimator=foo"], [f"estimator=foo: no such choice; allowed: {ESTIMATORS}"]),
    "choice that is no text": (["estimator=3"], ["estimator=3: no such choice", ESTIMATORS]),
    "no choice": (["~estimator"], [f"estimator=null: no such choice; allowed: {ESTIMATORS}"]),
    "experiment": (["experiment=foo"], ["experiment=foo: no such choice", "paper_mnist"]),
    "type": (["estimator.lag=abc"], ["estimator.lag: abc is not a whole number"]),
    "fraction": (["seed=1.5"], ["seed: 1.5 is not a whole number"]),
    "null": (["estimator.lag=null"], ["estimator.lag: null is not a whole number"]),
    "empty": (["data_dir="], ["data_dir must name a folder"]),
    "not finite": (["optimizer.lr=nan"], ["optimizer.lr: nan is not a number"]),
    "enumeration": (["estimator.kernel=foo"], ["estimator.kernel: foo", "isir, isir_disir"]),
    "kernel that cannot meet": (
        ["estimator.kernel=disir"],
        ["estimator.kernel: disir", "isir_disir"],
    ),
    "kernel that is none": (
        ["estimator.kernel={_target_:ucvae.data.digits.Digits}"],
        ["estimator.kernel must be one of isir, isir_disir, isir_hmc, got Digits(), which is no"],
    ),
    "kernel of nowhere": (
        ["estimator.kernel={_target_:nowhere.Mine}"],
        ["estimator.kernel._target_: cannot import nowhere.Mine"],
    ),
    "kernel without a name": (
        ["estimator.kernel={step_size:1}"],
        ["estimator.kernel._target_: None does not name a class"],
    ),
    "range": (["estimator.lag=0"], ["estimator.lag must be at least 1, got 0"]),
    "range of K": (
        ["estimator.num_samples=1"],
        ["estimator.num_samples must be at least 2, got 1"],
    ),
    "range of t0": (["estimator.burn_in=-1"], ["estimator.burn_in must be at least 0, got -1"]),
    "range of beta": (["estimator.beta=1"], ["estimator.beta must be in [0, 1), got 1.0"]),
    "beta below 0": (["estimator.beta=-0.1"], ["estimator.beta must be in [0, 1), got -0.1"]),
    "beta not finite": (["estimator.beta=nan"], ["estimator.beta: nan is not a number"]),
    "beyond a float": (
        [f"estimator.widening={10**400}"],
        [f"estimator.widening: {10**400} is not a number"],
    ),
    "range of the cap": (
        ["estimator.burn_in=5", "estimator.max_steps=7"],
        ["estimator.max_steps must be at least burn_in + lag = 8, got 7"],
    ),
    "range of survival": (
        ["estimator.survival=0.5"],
        ["estimator.survival must be in [0, 0.5), got 0.5"],
    ),
    "range of batches": (
        ["trainer.batch_size=0"],
        ["trainer.batch_size must be at least 1, got 0"],
    ),
    "range of epochs": (["trainer.max_epochs=-1"], ["trainer.max_epochs must be", "got -1"]),
    "range of time": (["trainer.max_seconds=0"], ["trainer.max_seconds must be positive, got 0"]),
    "sweeps that are swept over": (
        ["-m", "experiment=equal_time_elbo,burda_mnist_short"],
        ["experiment=burda_mnist_short is a sweep of its own; start it by itself"],
    ),
    "switch past the end": (
        ["trainer.switch.epochs=30"],
        ["trainer.switch.epochs must be below max_epochs = 30, got 30"],
    ),
    "range of the switch": (["trainer.switch.epochs=-1"], ["trainer.switch.epochs must be", "-1"]),
    "factor of the switch": (
        ["trainer.switch.epochs=1", "trainer.switch.lr_factor=0"],
        ["trainer.switch.lr_factor must be positive and finite, got 0"],
    ),
    "too large a factor of the switch": (
        ["trainer.switch.epochs=1", "trainer.switch.lr_factor=1e7"],
        ["trainer.switch.lr_factor must be at most 1e+06, got 10000000.0"],
    ),
    "learning rate above float32": (
        ["optimizer.lr=1e39"],
        ["optimizer.lr must be at most 1e+06, got 1e+39"],
    ),
    "learning rate that grows": (
        ["optimizer.schedule=steps", "optimizer.milestones=[1,2]", "optimizer.gamma=1e200"],
        ["optimizer.gamma must leave lr at most 1e+06 after 2 milestones", "gamma=1e+200"],
    ),
    "factor without a switch": (
        ["trainer.switch.lr_factor=0.2"],
        ["trainer.switch.lr_factor must be 1 without a switch (epochs = 0), got 0.2"],
    ),
    "enumeration of the switch": (
        ["trainer.switch.optimizer=new"],
        ["trainer.switch.optimizer: new is not one of kept, fresh"],
    ),
    "enumeration of schedules": (
        ["optimizer.schedule=cosine"],
        ["optimizer.schedule: cosine is not one of constant, steps, burda"],
    ),
    "schedule of no steps": (
        ["optimizer.schedule=steps"],
        ["optimizer.milestones must be given with schedule=steps", "got [] with schedule=steps"],
    ),
    "milestones of another schedule": (
        ["optimizer=adam", "optimizer.milestones=[3]"],
        ["optimizer.milestones must be given with schedule=steps", "[3] with schedule=constant"],
    ),
    "milestones out of order": (
        ["optimizer.schedule=steps", "optimizer.milestones=[5,5]"],
        ["optimizer.milestones must be epochs from 1 on, in ascending order, got [5, 5]"],
    ),
    "milestones before the first epoch": (
        ["optimizer.schedule=steps", "optimizer.milestones=[0]"],
        ["optimizer.milestones must be epochs from 1 on, in ascending order, got [0]"],
    ),
    "gamma": (["optimizer.gamma=0"], ["optimizer.gamma must be positive and finite, got 0.0"]),
    "key of a part": (
        ["+model.encoder.depth=1"],
        ["model.encoder.depth: no such key; allowed: blocks, covariance, hidden"],
    ),
    "type of a part": (["model.encoder=full"], ["model.encoder: full is not a group of keys"]),
    "range of a part": (["model.encoder.blocks=-1"], ["model.encoder.blocks must be", "got -1"]),
    "enumeration of a part": (
        ["model.encoder.covariance=band"],
        ["model.encoder.covariance: band is not one of diagonal, full"],
    ),
    "range of seed": (["seed=-1"], ["seed must be", "got -1"]),
    "interpolation": (["estimator.lag=${foo}"], ["estimator.lag", "foo"]),
    "device": (["device=gpu"], ["device=gpu: no such device; here: auto, cpu"]),
    "missing device": (["device=cuda:99"], ["device=cuda:99: this machine has no such device"]),
    "no equal sign": (["+x"], ["+x: no = there; write KEY=VALUE"]),
    "bracket": (["seed=[1"], ["seed=[1: cannot be read", "write KEY=VALUE"]),
    "character": (["seed=é"], ["seed=é: cannot be read", "unexpected character"]),
    "no key": (["=3"], ["=3: no key there"]),
    "sweep without -m": (["seed=0,1"], ["seed=0,1: several values need -m"]),
    "sweep to show": (["-m", "seed=0,1", "--cfg", "job"], ["seed=0,1", "--cfg", "show one run"]),
    "flag": (["--foo"], ["--foo", "--help"]),
    "folder": (["hydra.run.dir=/proc/x"], ["hydra.run.dir: cannot write to /proc/x"]),
    "file as a folder": (["hydra.run.dir=file/x"], ["hydra.run.dir: cannot write to file/x"]),
    "folder's interpolation": (["hydra.run.dir=${foo}/x"], ["hydra.run.dir", "foo"]),
    "folder's long name": ([f"hydra.run.dir={'x' * 300}"], ["hydra.run.dir: cannot write to xxx"]),
    "list of choices": (
        ["estimator=[elbo,iwae]", "hydra.run.dir=x"],
        [f"estimator=[elbo,iwae]: no such choice; allowed: {ESTIMATORS}"],
    ),
    "a job's list of choices": (
        ["-m", "estimator=[elbo,iwae],coupled"],
        [f"estimator=[elbo,iwae]: no such choice; allowed: {ESTIMATORS}"],
    ),
    "data in a file": (["dataset=mnist", "data_dir=file"], ["data_dir: file is not a folder"]),
    "data below a file": (["dataset=mnist", "data_dir=file/x"], ["data_dir: file is not a folder"]),
    "nobody's data": (["data_dir=~no-such-user/x"], ["data_dir=~no-such-user/x: "]),
    "no name of a run": (["resume="], ["resume must name the folder of a run"]),
    "quoted no name of a run": (["resume=''"], ["resume must name the folder of a run"]),
    "long name of a run": ([f"resume={'x' * 300}"], [": no such folder"]),
    "no such run": (["resume=nowhere"], ["resume=nowhere: no such folder"]),
    "no run": (["resume=."], ["resume=.: no .hydra/overrides.yaml"]),
    "resume elsewhere": (["resume=.", "hydra.run.dir=x"], ["resume", "leave out hydra.run.dir"]),
    "resume in a sweep": (["-m", "resume=."], ["resume", "leave out -m"]),
    "a job's key": (
        ["-m", "estimator=elbo,coupled", "estimator.lag=3"],
        ["estimator.lag: no such key", "in the job estimator=elbo estimator.lag=3"],
    ),
    "a job's range": (["-m", "estimator.lag=2,0"], ["estimator.lag must", "job estimator.lag=0"]),
    "a job's choice": (["-m", "estimator=elbo,foo"], ["estimator=foo: no such choice"]),
    "sweep over nothing": (["-m", "seed=glob(*)"], ["seed=glob(*): there is no value to sweep"]),
    "sweep in a sweep": (["-m", "seed=7,range(0,3)"], ["seed=7,range(0,3): values, or one range"]),
    "two equal jobs": (["-m", "seed=0,0"], ["two jobs would write into seed=0"]),
    "a sweep's folder": (["-m", "hydra.sweep.dir=/proc/x"], ["hydra.sweep.dir: cannot write"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_request_is_one_line_and_leaves_nothing(case, train, calls, tmp_path):
    arguments, parts = REFUSED[case]
    (tmp_path / "file").touch()
    finished = train(*arguments)
    assert finished.code == 2
    assert finished.err.startswith("ucvae-train: error: ")
    assert finished.err.count("\n") == 1 and finished.err.endswith("\n")
    assert finished.out == ""
    for part in parts:
        assert part in finished.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert calls == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_cuda_without_a_gpu_says_what_the_machine_has(train):
    assert train("device=cuda").err == (
        "ucvae-train: error: device=cuda: this machine has no such device; here: auto, cpu\n"
    )


def test_missing_data_is_one_line_and_leaves_no_run(train, calls, tmp_path, monkeypatch):
    def no_network(*arguments, **keywords):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    finished = train("dataset=omniglot", "data_dir=d")
    assert finished.code == 2 and finished.err.count("\n") == 1
    assert "chardata.mat" in finished.err and "dataset=digits" in finished.err
    assert not (tmp_path / "outputs").exists() and calls == []


def test_folder_made_on_the_way_to_an_unwritable_one_is_removed(train, calls, tmp_path):
    name = "x" * 300  # longer than a file system takes
    finished = train(f"hydra.run.dir=a/b/{name}")
    assert finished.code == 2 and finished.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_folder_with_a_run_is_not_written_into(train, calls, tmp_path):
    assert train("hydra.run.dir=a").code == 0
    before = (tmp_path / "a" / ".hydra" / "overrides.yaml").read_text()
    finished = train("hydra.run.dir=a", "seed=1")
    assert finished.code == 2
    assert "hydra.run.dir: a already holds a run; go on with resume=a" in finished.err
    assert len(calls) == 1
    assert (tmp_path / "a" / ".hydra" / "overrides.yaml").read_text() == before


def test_full_error_shows_the_traceback(train, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="lagg"):
        train("estimator.lagg=3")


def test_defect_of_ours_keeps_its_traceback(train, monkeypatch, tmp_path):
    def run(*arguments):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("ucvae.training.run", run)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        train("hydra.run.dir=a")
    assert "ZeroDivisionError: a defect" in (tmp_path / "a" / "train.log").read_text()


def test_failed_computation_is_one_line_and_exit_code_1(train, monkeypatch, tmp_path):
    from ucvae.errors import NonFiniteError

    def run(*arguments):
        raise NonFiniteError("log-weights of step 3 are not finite")

    monkeypatch.setattr("ucvae.training.run", run)
    finished = train("hydra.run.dir=a")
    assert finished.code == 1 and finished.out == ""
    assert finished.err == "ucvae-train: error: log-weights of step 3 are not finite\n"
    assert "log-weights of step 3" in (tmp_path / "a" / "train.log").read_text()


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("sweep", [False, True])
def test_stop_is_one_line_that_tells_how_to_go_on(train, monkeypatch, tmp_path, saved, sweep):
    folders = []

    def run(settings, data, device, folder, resume):
        folders.append(folder)
        if saved:
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.pt").touch()
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("ucvae.training.run", run)
    finished = train(*(["-m", "seed=0,1", "hydra.sweep.dir=a"] if sweep else ["hydra.run.dir=a"]))
    (folder,) = folders  # the second job of a sweep does not start
    assert folder == (tmp_path / "a" / "seed=0" if sweep else tmp_path / "a")
    hint = f"; go on with: ucvae-train resume={shlex.quote(str(folder))}" if saved else ""
    if sweep:  # which goes on as a whole, with jobs that have nothing saved too
        hint = "; go on with: ucvae-train resume=a"
    assert finished.code == 128 + signal.SIGTERM
    assert finished.err == f"ucvae-train: error: stopped by SIGTERM{hint}\n"


@pytest.mark.parametrize("sweep", [False, True])
def test_how_to_go_on_repeats_the_folder_of_ones_own_configurations(
    train, monkeypatch, tmp_path, sweep
):
    own = tmp_path / "my own"
    (own / "experiment").mkdir(parents=True)
    (own / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 3\n")

    def run(settings, data, device, folder, resume):
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "last.pt").touch()
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("ucvae.training.run", run)
    asked = ["-m", "estimator=elbo,iwae", "hydra.sweep.dir=a"] if sweep else ["hydra.run.dir=a"]
    finished = train("--config-dir", "my own", *asked, "experiment=mine")
    folder = "a" if sweep else shlex.quote(str(tmp_path / "a"))
    command = f"ucvae-train --config-dir {shlex.quote(str(own))} resume={folder}"
    assert finished.err == f"ucvae-train: error: stopped by SIGTERM; go on with: {command}\n"
    if sweep:  # where no checkpoint is looked for before the jobs are made
        again = train(*shlex.split(command)[1:])
        assert "experiment" not in again.err and "stopped by SIGTERM" in again.err


def test_interrupt_before_training_is_one_line(train, monkeypatch, tmp_path):
    def load(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("ucvae.data.digits.Digits.load", load)
    finished = train()
    assert (finished.code, finished.err) == (130, "ucvae-train: error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_help_is_quick_and_tells_groups_and_examples(command):
    import subprocess

    for name, module in (("ucvae-train", "train"), ("ucvae-eval", "eval")):
        code = (
            f"import sys; from ucvae.cli.{module} import main; sys.argv = [{name!r}, '--help']\n"
            "try: main()\n"  # Hydra leaves by sys.exit
            "except SystemExit as end: assert not end.code\n"
            "assert 'torch' not in sys.modules"
        )
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr
        lines = shown.stdout.splitlines()
        # On a terminal of 24 lines nothing has gone off the top when the prompt is back.
        assert lines[0].startswith(name) and len(lines) <= 23
        assert max(map(len, lines)) <= 80
        assert sum(line.startswith(f"  {name} ") for line in lines) == 3
        groups = [line.split(":")[0] for line in lines if re.match(r"[a-z]+: ", line)]
        if name == "ucvae-train":
            assert f"estimator: {ESTIMATORS}" in lines
            expected = "dataset estimator evaluator model optimizer study experiment"
            assert groups == expected.split()
            text = re.sub(r"(\w+)\[_short\]", r"\1, \1_short", shown.stdout)
            listed = re.findall(r"^(\w+): ((?:\w+,\s+)*\w+)$", text, re.MULTILINE)
            assert [group for group, _ in listed] == groups
            for group, names in listed:
                assert sorted(re.split(r",\s+", names)) == sorted(choices(group))
        else:
            assert groups == ["evaluator", "study"]


def test_help_tells_the_choices_of_a_folder_of_one_s_own(train, tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 3\n")
    with pytest.raises(SystemExit) as end:
        train("--config-dir", str(tmp_path), "--help")
    assert end.value.code == 0 and re.search(r"\bmine\b", capsys.readouterr().out)
