"""What the shell hands to the training, and where each run lives."""

import dataclasses
import datetime
import json
import shutil

import pytest
import torch
import yaml

from ucvae import checkpoint
from ucvae.chains import ComposedKernel
from ucvae.chains.moves import Disir, Isir
from ucvae.cli._hydra import folder_name
from ucvae.cli.train import _changes


@dataclasses.dataclass
class IsirThenDisir(ComposedKernel):
    beta: float

    def moves(self):
        return Isir(), Disir(self.beta)


@dataclasses.dataclass
class DisirThenIsir(ComposedKernel):
    beta: float

    def moves(self):
        return Disir(self.beta), Isir()


def test_training_gets_settings_data_device_and_folder(train, calls, tmp_path):
    finished = train("estimator=iwae", "estimator.num_samples=7", "seed=3", "device=cpu")
    assert finished.code == 0, finished.err
    (call,) = calls
    assert call.settings.seed == 3 and call.settings.estimator.num_samples == 7
    assert call.settings.raw["estimator"]["num_samples"] == 7
    assert set(call.settings.raw) == {
        *("seed", "device", "data_dir", "resume", "start_from"),
        *("dataset", "estimator", "model", "optimizer", "trainer", "evaluator"),
    }
    assert call.data.name == "digits" and call.device == torch.device("cpu")
    assert call.resume is False
    assert call.folder.parent == tmp_path / "outputs" / "digits-iwae"
    assert (call.folder / "train.log").is_file()
    saved = yaml.safe_load((call.folder / ".hydra" / "overrides.yaml").read_text())
    assert saved == ["estimator=iwae", "estimator.num_samples=7", "seed=3", "device=cpu"]


def test_a_batch_of_more_images_than_there_are_is_told(train, calls):
    told = "trainer.batch_size=1198: a step takes all 1197 training images"
    assert told in train("trainer.batch_size=1198").out
    assert "trainer.batch_size" not in train("trainer.batch_size=1197").out


@pytest.mark.parametrize(
    "idle, reason, used",
    [
        ("estimator.beta=0.3", "kernel=isir", ["estimator.kernel=isir_disir"]),
        ("estimator.widening=0.3", "proposals=encoder", ["estimator.proposals=remembered"]),
        (
            "optimizer.gamma=0.3",
            "schedule=constant",
            ["optimizer.schedule=steps", "optimizer.milestones=[3]"],
        ),
        ("trainer.switch.num_samples=5", "switch.epochs=0", ["trainer.switch.epochs=1"]),
    ],
)
def test_a_setting_that_is_given_and_changes_nothing_is_told(train, calls, idle, reason, used):
    usual = "estimator=coupled_paper_isir"
    assert f"{idle.partition('=')[0]} has no effect: {reason}" in train(usual, idle).out
    assert "has no effect" not in train(usual).out
    assert "has no effect" not in train(usual, idle, *used).out
    assert len(calls) == 3


def test_data_are_loaded_once(train, calls, monkeypatch):
    from ucvae.data.digits import Digits

    loads = []
    load = Digits.load
    monkeypatch.setattr(Digits, "load", lambda self, path: loads.append(path) or load(self, path))
    assert train().code == 0
    assert len(loads) == 1


def test_runs_of_the_same_second_get_folders_of_their_own(train, calls, monkeypatch):
    class Now(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 31, 12, 0, 0)

    monkeypatch.setattr("hydra.core.utils.datetime", Now)
    for _ in range(3):
        assert train().code == 0
    names = ["2026-01-31_12-00-00", "2026-01-31_12-00-00-2", "2026-01-31_12-00-00-3"]
    assert [call.folder.name for call in calls] == names


@pytest.mark.parametrize("name", ["a=1,b=2", "a b", "it's", "x(1)[2]{3}", "é"])
def test_paths_need_no_quotes(train, calls, tmp_path, name):
    assert train(f"hydra.run.dir={name}").code == 0
    assert (tmp_path / name / ".hydra").is_dir()
    assert train(f"resume={name}").code == 0
    assert calls[1].folder == tmp_path / name and calls[1].resume is True


def test_experiment_needs_no_plus(train, calls):
    finished = train("experiment=paper_mnist", "dataset=digits", "trainer.max_epochs=2")
    assert finished.code == 0, finished.err
    settings = calls[0].settings
    assert (settings.estimator.num_samples, settings.estimator.lag) == (10, 10)
    assert settings.trainer.max_epochs == 2


def test_console_shows_messages_and_the_log_file_times(train, monkeypatch, tmp_path):
    import logging

    def run(*arguments):
        logging.getLogger("ucvae").info("a message")
        logging.getLogger("ucvae").warning("a caution")

    monkeypatch.setattr("ucvae.training.run", run)
    assert train("hydra.run.dir=a").out == "a message\nWARNING: a caution\n"
    lines = (tmp_path / "a" / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO ucvae: a message",
        "WARNING ucvae: a caution",
    ]


# Sweeps


def test_every_job_has_a_folder_named_by_its_overrides(train, calls, tmp_path):
    assert train("-m", "estimator=elbo,iwae", "seed=0,1", "trainer.max_epochs=1").code == 0
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    expected = {
        f"estimator={estimator},seed={seed},trainer.max_epochs=1"
        for estimator in ("elbo", "iwae")
        for seed in (0, 1)
    }
    assert {path.name for path in sweep.iterdir() if path.is_dir()} == expected
    assert [call.folder.parent for call in calls] == [sweep] * 4
    assert {call.folder.name for call in calls} == expected


def test_folder_names_are_one_component_and_differ():
    assert folder_name("") == "default"
    assert folder_name("estimator=elbo,seed=0") == "estimator=elbo,seed=0"
    long = [folder_name("x" * 500 + end) for end in "ab"]
    awkward = ["a/b", "a_b", "a%2Fb", "..", "%2E%2E", "é" * 60, *long]
    names = [folder_name(text) for text in awkward]
    assert len(set(names)) == len(names)
    for name in names:
        assert "/" not in name and name not in ("", ".", "..") and len(name) <= 200


# Going on with a run


def test_resume_keeps_the_overrides_and_the_folder(train, calls, tmp_path):
    assert train("estimator=iwae", "seed=4", "trainer.max_epochs=1", "hydra.run.dir=a").code == 0
    for epochs in (2, 3):
        finished = train("resume=a", f"trainer.max_epochs={epochs}", "device=cpu")
        assert finished.code == 0, finished.err
        call = calls[-1]
        assert call.resume is True and call.folder == tmp_path / "a"
        assert (call.settings.seed, call.settings.trainer.max_epochs) == (4, epochs)
        assert call.settings.estimator.num_samples == 10 and call.settings.resume == "a"
    saved = yaml.safe_load((tmp_path / "a" / ".hydra" / "overrides.yaml").read_text())
    assert sorted(saved) == [
        *("device=cpu", "estimator=iwae", "resume='a'", "seed=4", "trainer.max_epochs=3")
    ]


def test_resume_of_a_job_of_a_sweep(train, calls, tmp_path):
    assert train("-m", "seed=0,1", "estimator=elbo", "hydra.sweep.dir=s").code == 0
    assert train("resume=s/estimator=elbo,seed=1").code == 0
    assert calls[-1].settings.seed == 1
    assert calls[-1].folder == tmp_path / "s" / "estimator=elbo,seed=1"


def test_resume_of_a_job_of_an_experiment_that_is_a_sweep(train, calls, tmp_path):
    asked = ("experiment=paper_fig3_short", "dataset=digits", "hydra.sweep.dir=s")
    assert train(*asked, "hydra.sweep.subdir=${hydra:job.num}").code == 0
    finished = train("resume=s/1", "trainer.max_epochs=9")
    assert finished.code == 0, finished.err
    assert calls[-1].folder == tmp_path / "s" / "1" and calls[-1].settings.trainer.max_epochs == 9
    assert calls[-1].settings.estimator == calls[1].settings.estimator
    assert calls[-1].settings.seed == calls[1].settings.seed == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("seed=5", ["seed (was 0, now 5)"]),
        ("start_from=a", ["start_from (was None, now /"]),
        ("estimator.lag=2", ["estimator.lag (was 3, now 2)"]),
        ("model.encoder.blocks=1", ["model.encoder.blocks (was 0, now 1)"]),
        ("estimator=elbo", ["estimator._target_", "estimator.lag (was 3, now absent)"]),
    ],
)
def test_resume_refuses_what_would_change_the_result(train, calls, change, named):
    assert train("hydra.run.dir=a").code == 0
    finished = train("resume=a", change)
    assert finished.code == 2 and finished.err.count("\n") == 1
    for part in [*named, "only these may change: data_dir"]:
        assert part in finished.err
    assert len(calls) == 1


def test_resume_to_fewer_epochs_than_are_done_is_refused(train, calls, tmp_path):
    assert train("hydra.run.dir=a", "trainer.max_epochs=7").code == 0
    path = tmp_path / "a" / "checkpoints" / "last.pt"
    checkpoint.save(path, checkpoint.load(path) | {"epoch": 6})
    finished = train("resume=a", "trainer.max_epochs=5")
    assert finished.code == 2 and len(calls) == 1
    assert finished.err == (
        "ucvae-train: error: resume=a: trainer.max_epochs=5, but the run has done 6 epochs "
        "already; give 6 to end it there, or more\n"
    )
    assert train("resume=a", "trainer.max_epochs=6").code == 0 and len(calls) == 2


def test_of_a_finished_run_nothing_is_done_again(command, tmp_path):
    quick = ("trainer.max_epochs=1", "evaluator.num_samples=5", "device=cpu", "estimator=elbo")
    assert command("ucvae-train", *quick, "hydra.run.dir=a").code == 0
    result = (tmp_path / "a" / "result.json").read_bytes()
    again = command("ucvae-train", "resume=a")
    assert again.code == 0 and "nothing was left to do" in again.out + again.err
    assert (tmp_path / "a" / "result.json").read_bytes() == result
    whole = json.loads(result)
    older = {name: value for name, value in whole.items() if name != "start"}
    for content, told in (
        (json.dumps(older), "nothing was left"),
        ("{", "no JSON; the test is made anew"),
        (json.dumps(whole | {"config": 3}), "the test is made anew"),
        (json.dumps(whole | {"test": None}), "is damaged (TypeError"),
        (json.dumps(whole | {"epochs": 0.5}), "testing the checkpoint of epoch 1"),
    ):
        (tmp_path / "a" / "result.json").write_text(content)
        again = command("ucvae-train", "resume=a")
        assert again.code == 0 and told in again.out + again.err
    further = command("ucvae-train", "resume=a", "trainer.max_epochs=2")
    assert further.code == 0 and "nothing was left to do" not in further.out + further.err
    assert (tmp_path / "a" / "result.json").read_bytes() != result


@pytest.mark.parametrize(("name", "key"), [("ucvae-train", "resume"), ("ucvae-eval", "run")])
def test_a_folder_alone_is_answered_with_the_key(name, key, command, tmp_path):
    (tmp_path / "a").mkdir()
    finished = command(name, "a")
    assert finished.code == 2
    assert finished.err == f"{name}: error: a: no key there; did you mean {key}=a?\n"


# Starting from another run


def test_start_from_is_given_to_the_training(train, calls, tmp_path):
    assert train("hydra.run.dir=a", "estimator=iwae", "seed=3").code == 0
    for start in ("a", "a/checkpoints/best.pt"):
        # How weights would start that are replaced makes no difference.
        finished = train(f"start_from={start}", "model.initialization=he")
        assert finished.code == 0, finished.err
        call = calls[-1]
        assert call.settings.start_from == str(tmp_path / start)
        assert (call.settings.seed, call.resume) == (0, False)


def test_start_from_runs_of_a_sweep_by_their_seeds(train, calls, tmp_path):
    assert train("-m", "seed=0,1", "estimator=iwae", "hydra.sweep.dir=s").code == 0
    starts = "start_from='s/estimator=iwae,seed=${seed}'"
    finished = train("-m", "seed=0,1", "estimator=iwae,coupled", starts)
    assert finished.code == 0, finished.err
    assert "sweep: 4 jobs, " in finished.out
    found = [(call.settings.seed, call.settings.start_from) for call in calls[2:]]
    wanted = [(seed, str(tmp_path / f"s/estimator=iwae,seed={seed}")) for seed in (0, 1)]
    assert found == [wanted[0], wanted[0], wanted[1], wanted[1]]


def test_what_an_experiment_sweeps_over_refers_to_each_job(train, calls, tmp_path):
    for seed in (0, 1):
        assert train(f"seed={seed}", "hydra.run.dir=a/${seed}").code == 0
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    swept = {"seed": "0,1", "start_from": "a/${seed}"}
    experiment = {"hydra": {"mode": "MULTIRUN", "sweeper": {"params": swept}}}
    text = f"# @package _global_\n{yaml.safe_dump(experiment)}"
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(text)
    finished = train("--config-dir=own", "experiment=mine")
    assert finished.code == 0, finished.err
    starts = [call.settings.start_from for call in calls[2:]]
    assert starts == [str(tmp_path / "a" / seed) for seed in ("0", "1")]


def test_a_resumed_sweep_starts_each_job_from_its_own(train, calls, tmp_path):
    for seed in (0, 1):
        assert train(f"seed={seed}", "hydra.run.dir=a/${seed}").code == 0
    asked = ("-m", "seed=0,1", "start_from='a/${seed}'", "hydra.sweep.dir=s")
    assert train(*asked, "hydra.sweep.subdir=${seed}").code == 0
    shutil.rmtree(tmp_path / "s" / "1")
    assert train("resume=s").code == 0
    starts = [call.settings.start_from for call in calls if call.folder == tmp_path / "s" / "1"]
    assert starts == [str(tmp_path / "a" / "1")] * 2
    asked = yaml.safe_load((tmp_path / "s" / "multirun.yaml").read_text())["hydra"]["overrides"]
    assert "start_from='a/${seed}'" in asked["task"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Go to another folder."""

    def go():
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")

    return go


@pytest.mark.parametrize("again", [(), ("start_from={}/a",), ("start_from=../a",)])
def test_a_run_with_a_relative_start_is_resumed_from_anywhere(
    again, train, calls, tmp_path, elsewhere
):
    assert train("hydra.run.dir=a").code == 0
    assert train("hydra.run.dir=b", "start_from=a").code == 0
    elsewhere()
    for _ in range(2):
        finished = train("resume=../b", *(text.format(tmp_path) for text in again))
        assert finished.code == 0, finished.err
        assert calls[-1].settings.start_from == str(tmp_path / "a") and calls[-1].resume


def test_where_a_start_counts_from_must_be_known(train, calls, tmp_path):
    assert train("hydra.run.dir=a").code == 0
    assert train("hydra.run.dir=b", "start_from=a").code == 0
    (tmp_path / "b" / ".hydra" / "hydra.yaml").write_text("hydra: {}\n")
    finished = train("resume=b")
    assert finished.code == 2
    assert ".hydra/hydra.yaml does not tell what start_from=a counts from" in finished.err
    assert train("resume=b", "start_from=a").code == 0


def test_a_start_counts_from_where_the_command_is_given(train, calls, tmp_path):
    assert train("hydra.run.dir=a").code == 0
    finished = train("-m", "seed=0,1", "start_from=a", "hydra.job.chdir=true")
    assert finished.code == 0, finished.err
    assert [call.settings.start_from for call in calls[1:]] == [str(tmp_path / "a")] * 2


def test_a_resumed_run_needs_its_start_no_more(train, calls, tmp_path):
    assert train("hydra.run.dir=a").code == 0
    assert train("hydra.run.dir=b", "start_from=a").code == 0
    (tmp_path / "a" / "checkpoints" / "last.pt").unlink()
    finished = train("resume=b")
    assert finished.code == 0 and calls[-1].resume is True, finished.err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("start_from=nowhere", "start_from=nowhere: no such folder or file; give the folder"),
        (f"start_from={'x' * 300}", ": no such folder or file; give the folder"),
        ("start_from=", "start_from must name the folder of a run of ucvae-train, or a checkpoint"),
        ("start_from=.", "start_from=.: no checkpoints/last.pt there"),
        ("start_from=a/text", "checkpoint: a/text is damaged or no checkpoint"),
        ("start_from=a/state.pt", "checkpoint: a/state.pt is damaged (model is missing"),
        ("model.latent_dim=7", "the run has another model, by model.latent_dim (was 20, now 7)"),
        ("model=mlp_burda", "model.activation (was relu, now tanh)"),
        ("model=ppca", "model._target_ (was ucvae.models.mlp.Mlp, now ucvae.models.ppca.Ppca)"),
        (
            "start_from=a/of-28x28.pt",
            "start_from=a/of-28x28.pt: its model is one of mnist, whose images are of another size",
        ),
        ("start_from=a/of-digits.pt", "of-digits.pt does not fit the run (size mismatch for dec"),
    ],
)
def test_what_is_no_start_is_refused_before_any_work(train, calls, tmp_path, override, said):
    assert train("hydra.run.dir=a").code == 0
    (tmp_path / "a" / "text").write_text("text")
    checkpoint.save(tmp_path / "a" / "state.pt", {"config": {}})
    state = checkpoint.load(tmp_path / "a" / "checkpoints" / "last.pt")
    larger = calls[0].settings.model.build(torch.zeros(784), 2).state_dict()
    other = state | {"model": larger, "dataset": "mnist"}
    checkpoint.save(tmp_path / "a" / "of-28x28.pt", other)
    checkpoint.save(tmp_path / "a" / "of-digits.pt", other | {"dataset": "digits"})
    finished = train("start_from=a", override, "hydra.run.dir=b")
    assert finished.code == 2 and finished.err.count("\n") == 1 and said in finished.err
    assert len(calls) == 1 and not (tmp_path / "b").exists()


def test_kernels_of_two_classes_are_told_apart(train, calls):
    assert train().code == 0
    settings = calls[-1].settings

    def with_kernel(kernel):
        estimator = dataclasses.replace(settings.estimator, kernel=kernel)
        return dataclasses.replace(settings, estimator=estimator)

    one, other = with_kernel(IsirThenDisir(0.5)), with_kernel(DisirThenIsir(0.5))
    assert _changes(one, with_kernel(IsirThenDisir(0.5))) == []
    changed = ", ".join(_changes(one, other))
    assert changed.startswith("estimator.kernel._target_ (was ") and "DisirThenIsir" in changed


def test_resume_without_a_checkpoint_is_refused(train, calls, tmp_path):
    assert train("hydra.run.dir=a").code == 0
    (tmp_path / "a" / "checkpoints" / "last.pt").unlink()
    assert "resume=a: no checkpoints/last.pt" in train("resume=a").err


def test_resume_of_a_damaged_checkpoint_is_refused(train, calls, tmp_path):
    assert train("hydra.run.dir=a").code == 0
    (tmp_path / "a" / "checkpoints" / "last.pt").write_bytes(b"short")
    finished = train("resume=a")
    assert finished.code == 2 and finished.err.count("\n") == 1 and "last.pt" in finished.err
