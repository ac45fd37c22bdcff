"""What the terminal shows of a result."""

import shlex
from pathlib import Path

from ucvae import results

RESULT = {
    "dataset": "fashion_mnist_binary",
    "binarization": "static",
    "estimator": "coupled",
    "model": "mlp",
    "seed": 0,
    "config": {"trainer": {"switch": {"epochs": 200}}},
    "epochs": 300,
    "start": None,
    "wall_clock_s": 123456.7,
    "train_images_per_s": 12345.6,
    "valid": {"log_likelihood": -123.45, "epoch": 300},
    "test": {
        "log_likelihood": -123.45,
        "standard_error": 0.67,
        "evaluator": "importance",
        "num_samples": 5000,
        "num_images": 10000,
    },
    "coupling": {
        "meeting_time": {"mean": 123.4, "p50": 100, "p90": 500, "p99": 1000, "max": 1000},
        "truncated_fraction": 0.0123,
        "decoder_evaluations_per_image": 1234.5,
    },
}


def test_summary_fits_a_terminal_and_its_last_line_is_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/fashion_mnist_binary-coupled/2026-01-31_12-00-00")
    lines = results.summary(RESULT, tmp_path / folder).splitlines()
    *table, _, _, _, _, _ = lines
    assert max(map(len, table)) <= 80 and max(map(len, lines)) <= 120
    assert "coupled after 200 epochs of iwae, model mlp, seed 0" in "\n".join(lines)
    assert "  test log-likelihood  -123.45 +- 0.67 nats per image" in "\n".join(lines)
    assert shlex.split(lines[-1])[-2:] == ["--logdir", str(folder)]


def test_summary_says_where_to_look_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *_, heading, refined, ais, report, _ = results.summary(RESULT, tmp_path / "a run").splitlines()
    assert heading == "where to look next:"
    assert shlex.split(refined) == ["ucvae-eval", "run=a run", "evaluator=importance_refined"]
    assert shlex.split(ais) == ["ucvae-eval", "run=a run", "evaluator=ais"]
    assert shlex.split(report) == ["ucvae-report", "a run"]


def test_summary_tells_of_a_start_from_another_run(tmp_path):
    assert "started from" not in results.summary(RESULT, tmp_path)
    config = {"estimator": {"_target_": "ucvae.estimators.iwae.Iwae"}}
    start = {"checkpoint": "last.pt", "epochs": 20.5, "config": config, "start": None}
    text = results.summary(RESULT | {"start": start}, tmp_path)
    assert "  started from         a model of iwae after 20.5 epochs\n" in text
    text = results.summary(RESULT | {"start": start | {"proposals": "kept"}}, tmp_path)
    assert "  started from         a model of iwae after 20.5 epochs, with its proposals\n" in text


def test_one_epoch_is_told_in_the_singular(tmp_path):
    assert "  training             1 epoch, " in results.summary(RESULT | {"epochs": 1}, tmp_path)
    assert "  training             300 epochs, " in results.summary(RESULT, tmp_path)


def test_summary_does_not_ask_for_the_evaluation_that_was_made(tmp_path):
    test = RESULT["test"] | {"evaluator": "importance_refined_40"}
    text = results.summary(RESULT | {"test": test}, tmp_path)
    assert "evaluator=importance_refined" not in text and "evaluator=ais" in text


def test_folder_elsewhere_is_told_whole_and_quoted(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = tmp_path / "a run"
    assert results.summary(RESULT, folder).splitlines()[-1].endswith(f"--logdir '{folder}'")


def test_evaluation_fits_a_terminal_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = "outputs/fashion_mnist_binary-coupled/2026-01-31_12-00-00"
    folder = f"{run}/evaluations/test-importance_2026-01-31_12-00-00"
    result = RESULT | {"run": run, "checkpoint": "best", "epoch": 300}
    summary = results.evaluation_summary(result, "test", tmp_path / folder)
    *table, report, last = summary.splitlines()
    assert max(map(len, table)) <= 100 and last == folder
    assert report.endswith(f": ucvae-report {run}")
