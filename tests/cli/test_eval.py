"""``ucvae-eval``: what it hands on, and what it refuses."""

import pytest

USAGE = "run: missing; usage: ucvae-eval run=RUN_DIR"


@pytest.fixture
def evaluations(monkeypatch):
    """The evaluation replaced by a list of what it was asked to do."""
    from ucvae.evaluation import rerun

    made = []
    monkeypatch.setattr(rerun, "run", lambda *arguments: made.append(arguments))
    return made


def test_evaluation_gets_settings_run_data_and_folder(command, train, calls, evaluations, tmp_path):
    assert train("estimator=elbo", "data_dir=d", "hydra.run.dir=a=1").code == 0
    finished = command("ucvae-eval", "run=a=1", "split=valid", "evaluator.num_samples=7")
    assert finished.code == 0, finished.err
    ((settings, trained, state, data, device, folder),) = evaluations
    assert (settings.split, settings.evaluator.num_samples, settings.data_dir) == ("valid", 7, "d")
    assert trained.estimator.num_samples == 1 and state["config"] == trained.raw
    assert data.name == "digits" and device.type == "cpu"
    assert folder.parent == tmp_path / "a=1" / "evaluations"
    assert folder.name.startswith("valid-importance_")


REFUSED = {
    "no run": ([], USAGE),
    "null run": (["run=null"], USAGE),
    "missing run": (["run=nowhere"], "run=nowhere: no such folder"),
    "no name": (["run="], "run must name the folder of a run"),
    "long name": ([f"run={'x' * 300}"], "run=xxx"),
    "taken": (
        ["run=a", "hydra.run.dir=a"],
        "hydra.run.dir: a already holds a run; choose another folder\n",
    ),
    "data in a file": (["run=a", "data_dir=file"], "data_dir: file is not a folder"),
    "no data": (["run=a", "data_dir="], "data_dir must name a folder"),
    "not a run": (["run=."], "run=.: no checkpoints/best.pt"),
    "split": (["run=a", "split=foo"], "split must be one of train, valid, test"),
    "evaluator": (["run=a", "evaluator=foo"], "evaluator=foo: no such choice; allowed: ais"),
    "range": (["run=a", "evaluator.num_samples=0"], "evaluator.num_samples must be"),
    "chains": (
        ["run=a", "evaluator=ais", "evaluator.chains=0"],
        "evaluator.chains must be at least 1, got 0\n",
    ),
    "schedule": (
        ["run=a", "evaluator=ais", "evaluator.schedule=cubic"],
        "evaluator.schedule: cubic is not one of sigmoidal, linear\n",
    ),
    "another's key": (
        ["run=a", "evaluator=ais", "evaluator.num_samples=5"],
        "evaluator.num_samples: no such key; allowed: chains",
    ),
    "key": (["run=a", "estimator.lag=3"], "estimator: no such key"),
    "device": (["run=a", "device=gpu"], "device=gpu: no such device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_request_is_one_line_and_leaves_nothing(case, command, train, calls, tmp_path):
    assert train("hydra.run.dir=a").code == 0
    arguments, part = REFUSED[case]
    (tmp_path / "file").touch()
    finished = command("ucvae-eval", *arguments)
    assert finished.code == 2
    assert finished.err.startswith(f"ucvae-eval: error: {part}") and finished.err.count("\n") == 1
    assert not (tmp_path / "a" / "evaluations").exists()
