"""Reading what lies in folders: what cannot be used is named, and the rest is there."""

import json

import pytest

from ucvae.errors import RunError
from ucvae.report.runs import find

from .folders import RUN, SPLITS, changed, write_evaluation, write_images, write_run


def test_runs_are_found_below_and_once(tmp_path):
    run = write_run(tmp_path / "sweep" / "deep" / "a")
    found = find([tmp_path, run, tmp_path / "sweep" / ".." / "sweep"])
    assert [m.run.folder for m in found.measurements] == [run]
    assert not found.problems and not found.unfinished


def test_unfinished_runs_and_evaluations_are_named(tmp_path):
    run = write_run(tmp_path / "a")
    for name in ("b/.hydra", "c/checkpoints", "a/evaluations/test-ais/.hydra", "notes/pictures"):
        (tmp_path / name).mkdir(parents=True)
    found = find([tmp_path])
    assert len(found.measurements) == 1
    assert found.unfinished == [run / "evaluations" / "test-ais", tmp_path / "b", tmp_path / "c"]


DAMAGED = {
    "empty": ("", "damaged or cut short"),
    "cut short": (json.dumps(RUN)[:-40], "damaged or cut short"),
    "bytes": (b"\xff\xfe\x00", "damaged or cut short"),
    "deep": ("[" * 100_000, "damaged or cut short"),
    "list": ("[1]", "no result of ucvae: not an object"),
    "foreign": ('{"accuracy": 0.9}', "it has no "),
    "no config": (changed(RUN, {"config": ...}), "it has no config"),
    "no test": (changed(RUN, {"test": ...}), "it has no test.evaluator"),
    "infinite": (changed(RUN, {"test.log_likelihood": float("-inf")}), "not a finite number"),
    "huge": (changed(RUN, {"test.log_likelihood": 10**400}), "not a finite number"),
    "text": (changed(RUN, {"test.log_likelihood": "-90"}), "log_likelihood is not a finite"),
    "truth": (changed(RUN, {"seed": True}), "seed is not a whole number"),
    "line break": (changed(RUN, {"dataset": "a\nb"}), "dataset is not a text"),
    "surrogate": (changed(RUN, {"dataset": "\ud800"}), "dataset is not a text"),
    "hash": (changed(RUN, {"split_sha256": {"test": 1}}), "split_sha256.test is not a text"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_and_foreign_results_are_named(case, tmp_path):
    good = write_run(tmp_path / "good")
    bad = write_run(tmp_path / "bad")
    content, reason = DAMAGED[case]
    if isinstance(content, bytes):
        (bad / "result.json").write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        (bad / "result.json").write_text(text)
    found = find([tmp_path])
    assert [m.run.folder for m in found.measurements] == [good]
    (line,) = found.problems
    assert line.startswith(f"{bad / 'result.json'}: ") and reason in line


def test_what_cannot_be_read_is_named(tmp_path):
    write_run(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").symlink_to(tmp_path / "nowhere")
    found = find([tmp_path])
    assert len(found.measurements) == 1
    (line,) = found.problems
    assert line.startswith(f"{tmp_path / 'bad' / 'result.json'}: cannot be read")


def test_results_of_a_version_with_fewer_fields_are_read(tmp_path):
    fewer = ("device", "git_revision", "coupling", "study", "status", "train_images_per_s")
    write_run(tmp_path / "a", {name: ... for name in fewer})
    found = find([tmp_path])
    (measurement,) = found.measurements
    assert not found.problems and measurement.run.status == "finished"
    assert measurement.run.images_per_s is None


@pytest.mark.parametrize(
    "devices, told",
    [
        ([("cpu", "EPYC", 1, 1)], "cpu EPYC (1 thread)"),
        ([("cpu", "EPYC", 2, 3)], "cpu EPYC (2 threads, 3 processes)"),
        ([("cuda", "H100", 2, 1)], "cuda H100"),
        ([("cuda", "H100", 2, 4)], "cuda H100 (4 processes)"),
        (
            [("cpu", "EPYC", 1, 1), ("cpu", "EPYC", 1, 1), ("cuda", "H100", 2, 1)],
            "cpu EPYC (1 thread), then cuda H100",
        ),
    ],
)
def test_where_a_run_was_made(devices, told, tmp_path):
    names = ("type", "name", "threads", "processes")
    sessions = [
        {"git_revision": f"{i}", "device": dict(zip(names, device, strict=True))}
        for i, device in enumerate(devices)
    ]
    changes = {**sessions[-1], "sessions": sessions}
    if len(sessions) == 1:  # as earlier versions have it
        del changes["sessions"]
    write_run(tmp_path / "a", changes)
    (measurement,) = find([tmp_path]).measurements
    assert measurement.run.device == told
    assert measurement.run.revisions == tuple(str(i) for i in range(len(devices)))


@pytest.mark.parametrize("case", ["none", "cut short", "foreign", "bytes"])
def test_damaged_metrics_cost_the_curves_alone(case, tmp_path):
    run = write_run(tmp_path / "a", metrics=None)
    if case != "none":
        lines = {"cut short": b'{"epoch": 1}\n{"epo', "foreign": b"1\n", "bytes": b"\xff\n"}
        (run / "metrics.jsonl").write_bytes(lines[case])
    found = find([tmp_path])
    (measurement,) = found.measurements
    assert measurement.run.metrics == [] and measurement.run.train_s is None
    (line,) = found.problems
    assert line.startswith(f"{run / 'metrics.jsonl'}: ") and line.endswith("no curves of this run")


def test_log_likelihoods_of_images_are_read(tmp_path):
    write_images(tmp_path / "a", [-80.5, -90.25])
    found = find([tmp_path])
    (measurement,) = found.measurements
    assert measurement.values.tolist() == [-80.5, -90.25] and found.problems == []


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"image,log_likelihood\n0,-80.5\n1,", "damaged or cut short"),
        (b"image,log_likelihood\n0,-80.5\n1", "damaged or cut short"),
        (b"image,value\n0,-80.5\n1,-90.25\n", "damaged or cut short"),
        (b"image,log_likelihood\n0,-80.5\n1,\xff\n", "damaged or cut short"),
        (b"image,log_likelihood\n0,-85.375\n", "is not of the result beside it"),
        (b"", "is not of the result beside it"),
        (b"image,log_likelihood\n0,-80.5\n1,-90.26\n", "is not of the result beside it"),
        (b"image,log_likelihood\n0,-80.5\n1,nan\n", "is not of the result beside it"),
        (b"image,log_likelihood\n0,inf\n1,-inf\n", "is not of the result beside it"),
        (b"image,log_likelihood\n0,1e308\n1,1e308\n", "is not of the result beside it"),
        (b"image,log_likelihood\n1,-80.5\n0,-90.25\n", "is not of the result beside it"),
        (b"image,log_likelihood\n0.0,-80.5\n1.0,-90.25\n", "damaged or cut short"),
    ],
)
def test_damaged_log_likelihoods_of_images_cost_the_pairs_alone(content, why, tmp_path):
    path = write_images(tmp_path / "a", [-80.5, -90.25]) / "test_log_likelihoods.csv"
    path.write_bytes(content)
    found = find([tmp_path])
    (measurement,) = found.measurements
    assert measurement.values is None and measurement.log_likelihood == -85.375
    assert found.problems == [f"{path}: {why}: no differences by images in pairs"]


def test_seconds_of_training_are_the_results_or_the_last_validations(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", {"train_s": 50.0})
    write_run(tmp_path / "c", metrics=[])
    assert [m.run.train_s for m in find([tmp_path]).measurements] == [20, 50, None]


def test_an_evaluation_elsewhere_belongs_to_the_run_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs" / "a")
    write_evaluation(tmp_path / "evaluations" / "b", {"run": "runs/a"})
    own, further = find([tmp_path]).measurements
    assert further.run is own.run and own.run.folder == run
    assert further.evaluator.name == "ais_paper"
    # Alone, it does not tell what it evaluates.
    found = find([tmp_path / "evaluations"])
    assert not found.measurements
    assert "evaluates runs/a, of which no finished run is under" in found.problems[0]


def test_evaluations_of_remembered_proposals_count_without_chains_too(tmp_path):
    lines = [{"epoch": e, "proposal/refinements": v} for e, v in ((0, 90.0), (1, 20.0), (1, 30.0))]
    write_run(tmp_path / "a", {"estimator": "snis"}, lines)
    write_run(tmp_path / "b", {"estimator": "snis"}, [{"epoch": 0}])
    found = {m.run.folder.name: m.run.decoder_evaluations for m in find([tmp_path]).measurements}
    assert found == {"a": 10 + 25, "b": 10}


REFUSED = {
    "other data": ({"split_sha256": SPLITS | {"test": "d" * 64}}, "evaluates other data"),
    "differing": ({"differing_splits": ["train"]}, "evaluates other data"),
    "a former best": ({"epoch": 200}, "epoch 200, while the run's best is now of epoch 290"),
    "a former last": (
        {"epoch": 290, "checkpoint": "last"},
        "epoch 290, while the run's last is now of epoch 300",
    ),
    "nothing": ({"test": ...}, "it has no split's log-likelihood"),
}


@pytest.mark.parametrize("case", [*REFUSED, "control", "study"])
def test_evaluations_of_something_else_are_refused(case, tmp_path):
    run = write_run(tmp_path / "a")
    study = {"test": ..., "study": {"name": "meeting_times"}}
    changes, reason = REFUSED.get(case, (study if case == "study" else {}, None))
    evaluation = write_evaluation(run / "evaluations" / "b", changes)
    found = find([tmp_path])
    assert len(found.measurements) == (2 if case == "control" else 1)
    if reason is None:
        assert not found.problems
    else:
        (line,) = found.problems
        assert line.startswith(f"{evaluation / 'result.json'}: ") and reason in line


def test_paths(tmp_path):
    with pytest.raises(RunError, match="nowhere: no such folder"):
        find([tmp_path / "nowhere"])
    write_run(tmp_path / "a")
    file = tmp_path / "file"
    file.touch()
    found = find([tmp_path / "a", file])
    assert len(found.measurements) == 1
    assert found.problems == [f"no folder, not looked into: {file}"]
