"""Run folders: full disks, two runs at once, and damage to what a resumed run reads."""

import dataclasses
import errno
import logging
import os
from pathlib import Path

import pytest
import torch
import yaml

from ucvae import checkpoint
from ucvae.cli import _runs
from ucvae.cli._hydra import LogFile

FULL = os.strerror(errno.ENOSPC)


def refused(finished, *parts):
    """Whether a command refused in one line that holds ``parts``."""
    one_line = finished.err.count("\n") == 1 and finished.err.startswith("ucvae-")
    return finished.code == 2 and one_line and all(part in finished.err for part in parts)


def change_checkpoint(path, **entries):
    state = torch.load(path, weights_only=True) | entries
    torch.save({name: entry for name, entry in state.items() if entry is not None}, path)


# Full disks


@pytest.fixture
def hydra_cannot_write(monkeypatch):
    """Hydra finds the disk full when it has begun to write."""

    def fail(config, filename, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / filename).touch()
        raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr("hydra.core.utils._save_config", fail)


def test_full_disk_is_found_before_anything_is_written(train, calls, monkeypatch, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: open("/dev/full", "wb"))
    assert refused(train("hydra.run.dir=a/b"), f"hydra.run.dir: cannot write to a/b: {FULL}")
    assert list(tmp_path.iterdir()) == [] and calls == []


def test_disk_that_hydra_fills_leaves_nothing(train, calls, hydra_cannot_write, tmp_path):
    assert refused(train("hydra.run.dir=a/b"), f"hydra.run.dir: cannot write to a/b: {FULL}")
    assert list(tmp_path.iterdir()) == [] and calls == []


def test_disk_that_a_sweep_fills_leaves_nothing(train, calls, hydra_cannot_write, tmp_path):
    finished = train("-m", "seed=0,1", "hydra.sweep.dir=s")
    assert refused(finished, f"hydra.sweep.dir: cannot write to s: {FULL}")
    assert list(tmp_path.iterdir()) == [] and calls == []


def test_log_file_that_hydra_cannot_open_leaves_nothing(train, calls, monkeypatch, tmp_path):
    def fail(self):
        raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr(LogFile, "_open", fail)
    assert refused(train("hydra.run.dir=a"), f"hydra.run.dir: cannot write to a: {FULL}")
    assert list(tmp_path.iterdir()) == [] and calls == []


def test_full_disk_removes_nothing_that_was_there(train, hydra_cannot_write, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes").touch()
    assert refused(train("hydra.run.dir=a"), FULL)
    assert (tmp_path / "a" / "notes").exists()


def test_full_disk_costs_a_resumed_run_nothing(train, calls, monkeypatch, tmp_path):
    assert train("seed=4", "hydra.run.dir=a").code == 0
    with monkeypatch.context() as patch:

        def fail(config, filename, folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / filename).write_text("")
            raise OSError(errno.ENOSPC, FULL)

        patch.setattr("hydra.core.utils._save_config", fail)
        assert refused(train("resume=a"), f"resume: cannot write to a: {FULL}")
    assert yaml.safe_load((tmp_path / "a" / ".hydra" / "overrides.yaml").read_text()) == ["seed=4"]
    assert train("resume=a").code == 0
    assert calls[-1].settings.seed == 4
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        *(".hydra", ".lock", "checkpoints", "train.log")
    ]


@pytest.mark.parametrize("case", ["not empty before", "more than Hydra's", "in use"])
def test_what_may_be_another_run_is_not_removed(tmp_path, case):
    claimed = _runs.claim(tmp_path / "a", timed=False, key="key")
    if case == "not empty before":
        (tmp_path / "a" / ".lock").touch()
        claimed = _runs.claim(tmp_path / "a", timed=False, key="key")
    (tmp_path / "a" / ("notes" if case == "more than Hydra's" else ".lock")).touch()
    error = _runs.InUseError("key") if case == "in use" else OSError(errno.ENOSPC, FULL)
    with pytest.raises(_runs.RunError), _runs.tidy(claimed, "key"):
        raise error
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_unwritable_log_is_told_once(capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    log = logging.Logger("full")
    handler = LogFile("/dev/full")
    log.addHandler(handler)
    log.info("one")
    log.info("two")
    assert capsys.readouterr().err == f"log: cannot write /dev/full: {FULL}\n"
    log.info("%d", "a defect of the caller's")
    assert "Traceback" in capsys.readouterr().err
    # The handler would try again to write what it still holds.
    handler.stream, stream = None, handler.stream
    with pytest.raises(OSError):
        stream.close()


# Two runs in one folder


def test_folder_is_held_while_a_run_is_at_work(train, monkeypatch, tmp_path):
    seen = []

    def run(settings, data, device, folder, resume):
        with pytest.raises(_runs.InUseError), _runs.held(folder, "key"):
            pass
        seen.append(folder.name)

    monkeypatch.setattr("ucvae.training.run", run)
    assert train("hydra.run.dir=a").code == 0
    assert train("-m", "seed=0,1", "hydra.sweep.dir=s").code == 0
    assert seen == ["a", "seed=0", "seed=1"]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["hydra.run.dir=new"], "hydra.run.dir: new"),
        (["resume=a"], "resume: a"),
        (["-m", "seed=0", "hydra.sweep.dir=s"], "hydra.sweep.dir: s/seed=0"),
    ],
)
def test_second_run_in_a_folder_is_refused(train, calls, tmp_path, arguments, key):
    assert train("hydra.run.dir=a").code == 0
    folder = tmp_path / key.split()[1]
    folder.mkdir(parents=True, exist_ok=True)
    with _runs.held(folder, "key"):
        before = sorted(tmp_path.rglob("*"))
        overrides = (tmp_path / "a" / ".hydra" / "overrides.yaml").stat().st_mtime_ns
        assert refused(train(*arguments), f"{key} is in use by another run")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "a" / ".hydra" / "overrides.yaml").stat().st_mtime_ns == overrides
    assert len(calls) == 1
    assert train(*arguments).code == 0  # the lock file that is left stops nobody


def test_a_run_and_a_sweep_do_not_share_a_folder(train, calls):
    assert train("hydra.run.dir=a").code == 0
    assert train("-m", "seed=0", "hydra.sweep.dir=s").code == 0
    told = "hydra.sweep.dir: a already holds a run; choose another folder"
    assert refused(train("-m", "seed=0", "hydra.sweep.dir=a"), told)
    told = "hydra.run.dir: s already holds a sweep; go on with resume=s or choose another"
    assert refused(train("hydra.run.dir=s"), told)
    assert len(calls) == 2
    assert train("-m", "seed=0,1", "hydra.sweep.dir=s").code == 0  # a sweep may grow
    inside = ("-m", "seed=0", "hydra.sweep.dir=t", "hydra.sweep.subdir=.")
    assert train(*inside).code == 0 and train(*inside).code == 0  # its job's folder is its own


def test_a_job_in_a_working_directory_of_its_own_writes_into_its_folder(train, calls, tmp_path):
    assert train("hydra.run.dir=a", "hydra.job.chdir=true").code == 0
    assert calls[0].folder == tmp_path / "a"
    assert train("resume=a", "hydra.job.chdir=true").code == 0
    assert calls[1].folder == tmp_path / "a"


def test_home_is_found_behind_a_key(train, calls, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert train("hydra.run.dir=~/a").code == 0
    assert train("resume=~/a").code == 0
    assert [call.folder for call in calls] == [tmp_path / "home" / "a"] * 2
    assert train("-m", "seed=0", "hydra.sweep.dir=~/s").code == 0
    assert calls[2].folder == tmp_path / "home" / "s" / "seed=0"


def test_a_refusal_of_other_data_leaves_the_run_as_it_was(train, calls, monkeypatch, tmp_path):
    from ucvae.data.digits import Digits

    assert train("hydra.run.dir=a").code == 0

    def files():
        return {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}

    before, load = files(), Digits.load

    def others(self, path):
        data = load(self, path)
        sha256 = data.split_sha256 | {"train": "0" * 64}
        return dataclasses.replace(data, split_sha256=sha256)

    with monkeypatch.context() as patched:
        patched.setattr(Digits, "load", others)
        assert refused(train("resume=a", "trainer.max_epochs=40"), "resume=a: the data differ")
    assert len(calls) == 1 and files() == before
    assert train("resume=a", "trainer.max_epochs=40").code == 0


def test_job_of_a_sweep_whose_folder_is_in_use_fails_alone(train, calls, monkeypatch, tmp_path):
    monkeypatch.setattr(_runs, "refuse_used", lambda folder, key: None)  # as if it came later
    (tmp_path / "s" / "seed=0").mkdir(parents=True)
    with _runs.held(tmp_path / "s" / "seed=0", "key"):
        finished = train("-m", "seed=0,1", "hydra.sweep.dir=s")
    assert finished.code == 1 and finished.err.count("\n") == 1
    assert "seed=0 is in use by another run" in finished.err
    assert [call.settings.seed for call in calls] == [1]


def test_run_that_came_and_went_during_preparation_is_not_written_over(
    train, calls, monkeypatch, tmp_path
):
    from ucvae.data.digits import Digits

    load = Digits.load

    def slow_load(self, path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "result.json").touch()
        return load(self, path)

    monkeypatch.setattr(Digits, "load", slow_load)
    assert refused(train("hydra.run.dir=a"), "a already holds a run")
    assert calls == [] and (tmp_path / "a" / "result.json").exists()


@pytest.mark.parametrize("system", ["without fcntl", "without locks"])
def test_without_locks_a_run_goes_on_and_says_so(train, calls, monkeypatch, tmp_path, system):
    def flock(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    if system == "without fcntl":
        monkeypatch.setattr(_runs, "fcntl", None)
    else:
        monkeypatch.setattr(_runs.fcntl, "flock", flock)
    assert train("hydra.run.dir=a").code == 0 and len(calls) == 1
    line = (tmp_path / "a" / "train.log").read_text()
    reason = "no file locks" if system == "without fcntl" else "No locks available"
    assert "WARNING" in line and "nothing keeps a second run out of a" in line and reason in line


# What a resumed run reads


DAMAGED = {
    "bracket": b"{",
    "number": b"5",
    "mapping": b"seed: 3\n",
    "bytes": b"\xff\xfe\x00",
    "nothing": b"",
    "list of numbers": b"- 3\n",
    "no override": b"- seed\n",
    "half an interpolation": b"- seed=${\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_overrides_are_refused(train, calls, tmp_path, damage):
    run_folder(train, tmp_path).rename(tmp_path / "r")
    (tmp_path / "r" / ".hydra" / "overrides.yaml").write_bytes(DAMAGED[damage])
    finished = train("resume=r")
    assert refused(finished, "resume=r: .hydra/overrides.yaml is damaged (")
    assert len(calls) == 1


def test_unreadable_overrides_are_refused(train, calls, monkeypatch, tmp_path):
    run_folder(train, tmp_path)

    def fail(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("ucvae.cli.train.OmegaConf.load", fail)
    assert refused(train("resume=a"), ".hydra/overrides.yaml is damaged", "Permission denied")


def test_overrides_with_an_interpolation_are_taken_up(train, calls):
    assert train("seed=4", "estimator.lag=${seed}", "hydra.run.dir=a").code == 0
    finished = train("resume=a")
    assert finished.code == 0, finished.err
    assert calls[-1].settings.estimator.lag == 4


def test_interrupted_write_leaves_the_overrides(train, calls, monkeypatch, tmp_path):
    assert train("seed=4", "hydra.run.dir=a").code == 0
    with monkeypatch.context() as patch:

        def interrupt(config, filename, folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / filename).write_text("")
            raise KeyboardInterrupt

        patch.setattr("hydra.core.utils._save_config", interrupt)
        assert train("resume=a").code == 130
    assert train("resume=a", "device=cpu").code == 0
    assert calls[-1].settings.seed == 4
    saved = yaml.safe_load((tmp_path / "a" / ".hydra" / "overrides.yaml").read_text())
    assert sorted(saved) == ["device=cpu", "resume='a'", "seed=4"]


def run_folder(train, tmp_path) -> Path:
    """A run in ``a``."""
    assert train("hydra.run.dir=a").code == 0
    return tmp_path / "a"


@pytest.mark.parametrize("config", [None, 5])
def test_resume_names_a_checkpoint_without_its_configuration(train, calls, tmp_path, config):
    path = run_folder(train, tmp_path) / "checkpoints" / "last.pt"
    change_checkpoint(path, config=config)
    assert refused(train("resume=a"), "a/checkpoints/last.pt", "config")


ENTRIES = [("config", 5), ("model", 5), ("split_sha256", 5), ("epoch", "x")]


@pytest.mark.parametrize(("name", "wrong"), [(n, w) for n, x in ENTRIES for w in (None, x)])
def test_evaluation_names_a_checkpoint_that_lacks_an_entry(
    train, command, calls, tmp_path, name, wrong
):
    path = run_folder(train, tmp_path) / "checkpoints" / "best.pt"
    change_checkpoint(path, **{name: wrong})
    assert refused(command("ucvae-eval", "run=a"), "a/checkpoints/best.pt", name)


@pytest.mark.parametrize(
    "change", [{"foo": 3}, {"seed": -1}, {"estimator": None}, {"seed": torch.zeros(2)}]
)
def test_configuration_that_is_refused_names_its_checkpoint(
    train, command, calls, tmp_path, change
):
    folder = run_folder(train, tmp_path) / "checkpoints"
    for name in ("last.pt", "best.pt"):
        state = checkpoint.load(folder / name)
        change_checkpoint(folder / name, config=state["config"] | change)
    (key,) = change
    for finished, name in (
        (train("resume=a"), "last.pt"),
        (command("ucvae-eval", "run=a"), "best.pt"),
    ):
        assert refused(finished, f"checkpoint: the configuration in a/checkpoints/{name}")
        assert key in finished.err or "Tensor" in finished.err


def test_key_of_a_later_version_has_its_default_in_an_older_run(train, calls, tmp_path):
    path = run_folder(train, tmp_path) / "checkpoints" / "last.pt"
    config = checkpoint.load(path)["config"]
    default = config["estimator"].pop("burn_in")
    change_checkpoint(path, config=config)
    assert default == calls[0].settings.estimator.burn_in
    finished = train("resume=a")
    assert finished.code == 0, finished.err
    assert refused(
        train("resume=a", "estimator.burn_in=4"), f"estimator.burn_in (was {default}, now 4)"
    )
