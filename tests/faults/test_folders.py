"""``ucvae-eval`` and ``ucvae-report`` on folders cut short, of another version, of other data."""

import json
import shutil

import pytest
import torch
from report.folders import write_run


def change(path, **entries):
    state = torch.load(path, weights_only=True) | entries
    torch.save({key: value for key, value in state.items() if value is not None}, path)


EVALUATED = {
    "empty folder": (lambda run: shutil.rmtree(run) or run.mkdir(), "no checkpoints/best.pt there"),
    "killed before its first validation": (
        lambda run: (run / "checkpoints" / "best.pt").unlink(),
        "no checkpoints/best.pt there",
    ),
    "cut short": (
        lambda run: (run / "checkpoints" / "best.pt").write_bytes(b"PK\3\4"),
        "best.pt is damaged or no checkpoint (it was cut short)",
    ),
    "of a later format": (
        lambda run: change(run / "checkpoints" / "best.pt", format=99),
        "best.pt has the format 99, this version reads 1",
    ),
    "of a version with other components": (
        lambda run: change(run / "checkpoints" / "best.pt", config={"foo": 1}),
        "checkpoint: the configuration in a/checkpoints/best.pt is refused",
    ),
    "without its model": (
        lambda run: change(run / "checkpoints" / "best.pt", model=None),
        "best.pt is damaged (model is missing or of another type)",
    ),
}


@pytest.mark.parametrize("case", EVALUATED)
def test_evaluation_says_in_one_line_what_is_wrong(case, finished, command, tmp_path):
    shutil.copytree(finished, tmp_path / "a")
    damage, reason = EVALUATED[case]
    damage(tmp_path / "a")
    evaluated = command("ucvae-eval", "run=a")
    assert evaluated.code == 2 and evaluated.err.count("\n") == 1 and reason in evaluated.err
    assert not (tmp_path / "a" / "evaluations").exists() or not list(
        (tmp_path / "a" / "evaluations").glob("test*")
    )


def test_evaluation_on_other_data_says_so_and_goes_on(finished, command, tmp_path):
    shutil.copytree(finished, tmp_path / "a")
    path = tmp_path / "a" / "checkpoints" / "best.pt"
    state = torch.load(path, weights_only=True)
    change(path, split_sha256=state["split_sha256"] | {"test": "0" * 64})
    evaluated = command("ucvae-eval", "run=a", "evaluator.num_samples=5")
    assert evaluated.code == 0
    (result,) = (tmp_path / "a" / "evaluations").glob("*/result.json")
    assert json.loads(result.read_text())["differing_splits"] == ["test"]


def test_report_names_what_it_leaves_out_and_reports_the_rest(command, tmp_path):
    sweep = tmp_path / "sweep"
    write_run(sweep / "good", metrics=[])
    for name, content in {
        "cut": '{"dataset": "mni',
        "empty": "",
        "list": "[]",
        "another version": '{"dataset": "mnist", "results": {"nll": 86}}',
        "binary": "\0\1\2",
    }.items():
        (sweep / name).mkdir()
        (sweep / name / "result.json").write_text(content)
        (sweep / name / "metrics.jsonl").touch()
    (sweep / "unfinished" / ".hydra").mkdir(parents=True)
    write_run(sweep / "other data", {"dataset": "omniglot"}, metrics=[])
    reported = command("ucvae-report", "sweep")
    assert reported.code == 0 and "Traceback" not in reported.out + reported.err
    told = reported.err.splitlines()
    for name in ("cut", "empty", "list", "another version", "binary", "unfinished"):
        assert sum(f"sweep/{name}" in line for line in told) == 1, reported.err
    assert len(told) == 6
    tables = "".join(path.read_text() for path in sweep.glob("*.csv"))
    assert "mnist" in tables and "omniglot" in tables
