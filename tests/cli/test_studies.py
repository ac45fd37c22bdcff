"""Studies: composed by both commands, done in their place, and refused before anything is done."""

import json
import subprocess
import sys

import pytest
import yaml

TINY = (
    "estimator=iwae",
    "model.hidden=[8]",
    "model.latent_dim=2",
    "trainer.max_epochs=1",
    "trainer.valid_samples=2",
    "evaluator.num_samples=2",
    "device=cpu",
)
STUDY = ("study=meeting_times", "study.num_images=5", "study.beta=0.5")
FILES = {"meeting_times.csv", "meeting_times.png"}
STUDIES = "ais_gap, gradient_bias, meeting_times"


@pytest.fixture
def evaluations(monkeypatch):
    """The evaluation replaced by a list of what it was asked to do."""
    from ucvae.evaluation import rerun

    made = []
    monkeypatch.setattr(rerun, "run", lambda *arguments: made.append(arguments))
    return made


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], None),
        (["study=null"], None),
        (["experiment=null"], None),
        (["study=meeting_times"], "meeting_times"),
        (["experiment=meeting_times"], "meeting_times"),
        (["experiment=meeting_times", "study=null"], None),
        (["experiment=meeting_times", "study.num_images=7"], "meeting_times"),
        (["study=meeting_times", "experiment=null"], "meeting_times"),
    ],
)
def test_both_commands_compose(arguments, name, command, train, calls, evaluations):
    assert train(*arguments, "hydra.run.dir=a").code == 0
    finished = command("ucvae-eval", "run=a", *arguments)
    assert finished.code == 0, finished.err
    ((settings, *_, folder),) = evaluations
    for study in (calls[0].settings.study, settings.study):
        assert getattr(study, "name", None) == name
        if "study.num_images=7" in arguments:
            assert study.num_images == 7
    assert folder.name.startswith(f"{name or 'test-importance'}_")


def test_the_bias_experiment_is_the_papers(train, calls):
    finished = train("experiment=ppca_bias", "dataset=digits")
    assert finished.code == 0, finished.err
    settings = calls[0].settings
    assert (settings.model.latent_dim, settings.model.train_decoder) == (100, False)
    assert settings.estimator.num_samples == 100
    study = settings.study
    assert (study.num_estimates, study.num_images) == (50_000, 100)
    assert (study.num_samples, study.burn_in, study.lag) == (10, 1, 10)


REFUSED = {
    "choice": (["study=foo"], f"study=foo: no such choice; allowed: {STUDIES}"),
    "no text": (["study=3"], f"study=3: no such choice; allowed: {STUDIES}"),
    "list": (["study=[meeting_times]"], "study=[meeting_times]: no such choice"),
    "none chosen": (
        ["study.lag=3"],
        f"study.lag: no study is chosen; add study=CHOICE; allowed: {STUDIES}",
    ),
    "dict without a choice": (["study={lag:3}"], "study: no study is chosen"),
    "key": (["study=meeting_times", "study.lagg=3"], "study.lagg: no such key"),
    "type": (["study=meeting_times", "study.lag=x"], "study.lag: x is not a whole number"),
    "range": (["study=meeting_times", "study.lag=0"], "study.lag must be at least 1, got 0"),
    "images": (
        ["study=meeting_times", "study.num_images=1198"],
        "study.num_images must be at most 1197, the images of the train split, got 1198",
    ),
    "model": (
        ["study=gradient_bias"],
        "study=gradient_bias: needs a model whose gradient is known exactly; allowed: model=ppca",
    ),
}


@pytest.mark.parametrize("name", ["ucvae-train", "ucvae-eval"])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_request_is_one_line_and_leaves_nothing(case, name, command, train, calls, tmp_path):
    arguments, part = REFUSED[case]
    if name == "ucvae-eval":
        assert train("hydra.run.dir=a").code == 0
        arguments = ["run=a", *arguments]
    before = sorted(tmp_path.rglob("*"))
    finished = command(name, *arguments)
    assert finished.code == 2
    assert finished.err.startswith(f"{name}: error: {part}") and finished.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluation_refuses_an_experiment_that_trains(command, train, calls):
    assert train("hydra.run.dir=a").code == 0
    for experiment in ("paper_mnist", "paper_table1a", "ppca_bias"):
        assert command("ucvae-eval", "run=a", f"experiment={experiment}").err == (
            f"ucvae-eval: error: experiment={experiment}: sets dataset, which cannot be chosen "
            "here; allowed: meeting_times\n"
        )


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [
        ([], ["study=meeting_times"], "meeting_times"),
        (["study=meeting_times", "study.lag=3"], [], "meeting_times"),
        (["study=meeting_times", "study.lag=3"], ["study=null"], None),
        (["experiment=meeting_times"], ["study=null"], None),
        (["study=meeting_times", "study.replicates=3"], ["study=gradient_bias"], "gradient_bias"),
        (["study=meeting_times"], ["study.lag=3"], "meeting_times"),
    ],
)
def test_resumed_run_may_change_its_study(before, after, left, train, calls, tmp_path):
    assert train("model=ppca", *before, "hydra.run.dir=a").code == 0
    finished = train("resume=a", *after)
    assert finished.code == 0, finished.err
    assert getattr(calls[-1].settings.study, "name", None) == left
    assert train("resume=a").code == 0  # what was saved can be read again
    assert getattr(calls[-1].settings.study, "name", None) == left
    saved = yaml.safe_load((tmp_path / "a" / ".hydra" / "overrides.yaml").read_text())
    assert len([text for text in saved if text.startswith(("study=", "~study"))]) <= 1


def test_training_and_evaluation_do_the_study(command, train, tmp_path):
    finished = train(*TINY, *STUDY, "hydra.run.dir=a")
    assert finished.code == 0, finished.err
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["test"]["log_likelihood"] < 0
    assert result["study"]["name"] == "meeting_times"
    assert result["study"]["settings"]["num_images"] == 5
    assert FILES < {path.name for path in (tmp_path / "a").iterdir()}
    assert (
        "study                meeting_times: meeting_times.csv, meeting_times.png" in finished.out
    )
    assert "C-ISIR-DISIR         meeting time mean" in finished.out

    finished = command("ucvae-eval", "run=a", *STUDY, "device=cpu")
    assert finished.code == 0, finished.err
    (folder,) = (tmp_path / "a" / "evaluations").iterdir()
    assert folder.name.startswith("meeting_times_")
    again = json.loads((folder / "result.json").read_text())
    assert FILES < {path.name for path in folder.iterdir()}
    # The same checkpoint, seed and settings.
    assert again["study"] == result["study"]
    assert "test" not in again and "C-ISIR  " in finished.out


@pytest.mark.slow
def test_training_without_a_study_imports_no_matplotlib(tmp_path):
    arguments = ["ucvae-train", *TINY, f"hydra.run.dir={tmp_path / 'a'}"]
    code = (
        f"import sys; from ucvae.cli.train import main; sys.argv = {arguments!r};"
        "assert main() == 0; assert 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a" / "result.json").read_text())["study"] is None


def test_full_disk_is_told_in_one_line(train, monkeypatch, tmp_path):
    from ucvae.studies import meeting_times

    def fail(path, *arguments):
        open(tmp_path / "no folder" / path.name, "w")

    from ucvae import figures

    monkeypatch.setattr(meeting_times.figures.Figure, "savefig", lambda self, *a, **k: fail(a[0]))
    assert figures is meeting_times.figures
    finished = train(*TINY, *STUDY, "hydra.run.dir=a")
    assert finished.code == 2 and finished.err.count("\n") == 1
    assert "figure: cannot write" in finished.err and "meeting_times.png: No such" in finished.err


@pytest.mark.parametrize("key", ["split=valid", "evaluator=importance", "evaluator.num_samples=7"])
@pytest.mark.parametrize("study", ["study=meeting_times", "experiment=meeting_times"])
def test_keys_without_a_part_in_a_study_are_refused(study, key, command, train, calls, evaluations):
    assert train("hydra.run.dir=a").code == 0
    finished = command("ucvae-eval", "run=a", study, key)
    assert finished.code == 2
    name = key.partition("=")[0]
    assert f"{name}: has no part in a study, whose own keys are study.KEY" in finished.err
    assert not evaluations
    assert command("ucvae-eval", "run=a", "study=null", key).code == 0


def test_the_coupled_estimator_refuses_a_fixed_decoder_before_any_work(train, calls, tmp_path):
    finished = train("estimator=coupled", "model=ppca", "model.train_decoder=false")
    assert finished.code == 2
    assert "estimator=coupled: estimates the gradient of the decoder" in finished.err
    assert not calls and not (tmp_path / "outputs").exists()
