"""``ucvae-report``: its files and its refusals, on hand-made folders and on a sweep."""

import csv
import json
import shlex
import subprocess
import sys

import pytest
from report.folders import LOG_LIKELIHOOD, write_evaluation, write_run, write_seeds


@pytest.fixture
def report(command):
    """A function that runs ``ucvae-report`` in ``tmp_path``."""
    return lambda *arguments: command("ucvae-report", *arguments)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_gets_its_tables_and_pictures(report, tmp_path):
    write_seeds(tmp_path / "sweep", [-90.0, -91.0, -95.0])
    finished = report("sweep")
    assert (finished.code, finished.err) == (0, "")
    (row,) = rows(tmp_path / "sweep" / "table.csv")
    assert float(row["log_likelihood"]) == -92
    assert float(row["standard_error_over_seeds"]) == pytest.approx(1.5275252316519468)
    assert row["seeds"] == "0 1 2" and row["published"] == "-88.06"
    assert float(row["difference"]) == pytest.approx(-3.94)
    *shown, last = finished.out.splitlines()
    assert last == "sweep: table.md, table.csv, log_likelihood.png"
    written = (tmp_path / "sweep" / "table.md").read_text()
    assert "![log_likelihood.png](log_likelihood.png)" in written
    assert [line for line in written.splitlines() if line.startswith("|")] == [
        line for line in shown if line.startswith("|")
    ]
    table = [line for line in shown if line.startswith("|")]
    assert len(set(map(len, table))) == 1  # aligned
    # A report of a folder that has a report is the same.
    assert report("sweep").out == finished.out


def test_further_tables_are_files_of_their_own(report, tmp_path):
    run = write_run(tmp_path / "sweep" / "a")
    write_evaluation(run / "evaluations" / "b")
    assert report("sweep").code == 0
    tables = {path.name: rows(path) for path in (tmp_path / "sweep").glob("*.csv")}
    assert tables.keys() == {"table.csv", "table_mnist-static_importance-5000x10000.csv"}
    # The order of two tables of one row is that of their names.
    assert [row["evaluator"] for row in tables["table.csv"]] == ["ais_paper"]
    write_run(tmp_path / "other", {"dataset": "omniglot", "binarization": "dynamic"})
    assert report("sweep", "other", "--output", "made/here").code == 0
    names = {path.name for path in (tmp_path / "made" / "here").iterdir()}
    assert names == {
        "table.md",
        "table_mnist-static_ais_paper-16x10000.csv",
        "table_mnist-static_importance-5000x10000.csv",
        "table_omniglot-dynamic_importance-5000x10000.csv",
        "log_likelihood_mnist-static.png",
        "log_likelihood_omniglot-dynamic.png",
    }


def test_tables_of_best_and_last_checkpoints_are_two_files(report, tmp_path):
    run = write_run(tmp_path / "sweep" / "a")
    for checkpoint, epoch, value in (("best", 290, -85.0), ("last", 300, -84.0)):
        changes = {"checkpoint": checkpoint, "epoch": epoch, "test.log_likelihood": value}
        write_evaluation(run / "evaluations" / checkpoint, changes)
    finished = report("sweep", "--output", "made")
    assert finished.code == 0, finished.err
    found = {p.name: [row["evaluator"] for row in rows(p)] for p in tmp_path.glob("made/*.csv")}
    assert found == {
        "table.csv": ["ais_paper"],
        "table_mnist-static_importance-5000x10000.csv": ["importance"],
        "table_mnist-static_last_ais_paper-16x10000.csv": ["ais_paper"],
    }


def test_several_folders_report_into_one_of_its_own(report, tmp_path):
    write_run(tmp_path / "a", metrics=[])
    write_run(tmp_path / "b", {"seed": 1}, metrics=[])
    assert report("a", "b").code == 0
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"table.md", "table.csv"}
    assert not (tmp_path / "a" / "table.md").exists()


def test_what_is_left_out_is_told_in_lines_and_the_rest_is_reported(report, tmp_path):
    write_run(tmp_path / "sweep" / "a", metrics=[])
    (tmp_path / "sweep" / "b" / ".hydra").mkdir(parents=True)
    (tmp_path / "sweep" / "c").mkdir()
    (tmp_path / "sweep" / "c" / "result.json").write_text('{"dataset": "mni')
    finished = report("sweep")
    assert finished.code == 0
    lines = finished.err.splitlines()
    assert lines == [
        "ucvae-report: left out: sweep/c/result.json: damaged or cut short, no JSON",
        "ucvae-report: left out: unfinished, 1 in all: sweep/b",
    ]
    assert "- unfinished, 1 in all: sweep/b" in (tmp_path / "sweep" / "table.md").read_text()


@pytest.mark.parametrize("name", ["a b", "a|b", "a\udcffb", "a\nb", "é"])
def test_folders_of_any_name(name, report, tmp_path):
    write_run(tmp_path / "sweep" / name, metrics=[])
    older = {LOG_LIKELIHOOD: -80.0}
    write_run(tmp_path / "sweep" / name / "again", older, metrics=[], age=5)
    finished = report("sweep")
    assert finished.code == 0 and finished.err.count("\n") == 1
    assert "-90.00" in finished.out
    (row,) = rows(tmp_path / "sweep" / "table.csv")
    assert row["folders"].startswith("sweep/a") or name == "é"


REFUSED = {
    "nothing": ([], "the following arguments are required: RUN_OR_SWEEP_DIR"),
    "missing": (["run", "nowhere"], "nowhere: no such folder"),
    "long name": (["x" * 300], "xxx"),
    "no name": ([""], "argument RUN_OR_SWEEP_DIR: a folder must have a name"),
    "flag": (["run", "--outputs", "x"], "unrecognized arguments: --outputs"),
    "no run": (["empty"], "no finished run under empty: nothing to report"),
    "output": (["run", "--output", "file"], "--output: cannot make file: there is a file"),
    "output's long name": (["run", "--output", "x" * 300], "--output: cannot make xxx"),
    "output below": (["run", "--output", "file/x"], "--output: cannot make file/x: "),
    "taken": (["run", "--output", "full"], "table: cannot write full/table.md: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_request_is_one_line(case, report, tmp_path):
    write_run(tmp_path / "run", metrics=[])
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "table.md").mkdir(parents=True)
    (tmp_path / "file").touch()
    arguments, part = REFUSED[case]
    finished = report(*arguments)
    assert finished.code == 2
    assert finished.err.startswith(f"ucvae-report: error: {part}"), finished.err
    assert finished.err.count("\n") == 1


def test_help_shows_what_it_does_and_examples(report, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        report("--help")
    assert stopped.value.code == 0
    screen = capsys.readouterr().out.splitlines()
    assert len(screen) <= 23  # and the prompt
    assert "Compares runs of ucvae-train" in screen[3]
    assert sum(line.startswith("  ucvae-report ") for line in screen) >= 3
    assert max(map(len, screen)) <= 80


def test_it_starts_without_torch_and_hydra():
    code = (
        "import sys; import ucvae.cli.report; "
        "print([name for name in ('torch', 'hydra', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_real_sweep(report, train, command, tmp_path):
    quick = ["trainer.max_epochs=1", "trainer.batch_size=600", "trainer.valid_samples=10"]
    quick += ["evaluator.num_samples=20", "device=cpu", "model.hidden=[20]", "model.latent_dim=2"]
    quick += ["hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}"]
    assert train("-m", "estimator=elbo,coupled", "seed=0,1", *quick).code == 0
    again = ["evaluator.num_samples=30", "device=cpu"]
    assert command("ucvae-eval", "run=sweep/0", *again).code == 0
    finished = report("sweep")
    assert (finished.code, finished.err) == (0, "")
    elbo, coupled = rows(tmp_path / "sweep" / "table.csv")
    values = [
        json.loads((tmp_path / "sweep" / job / "result.json").read_text())["test"]["log_likelihood"]
        for job in ("0", "1", "2", "3")
    ]
    for row, (one, two) in ((elbo, values[:2]), (coupled, values[2:])):
        assert float(row["log_likelihood"]) == pytest.approx((one + two) / 2)
        assert float(row["standard_error_over_seeds"]) == pytest.approx(abs(one - two) / 2)
        assert 0 < float(row["train_s"]) < float(row["wall_clock_s"])
    assert float(coupled["decoder_evaluations_per_image"]) > 10
    (again,) = rows(tmp_path / "sweep" / "table_digits-static_importance-30x300.csv")
    assert again["seeds"] == "0" and again["estimator"] == elbo["estimator"]
    for name in ("log_likelihood.png", "meeting_times.png"):
        assert (tmp_path / "sweep" / name).read_bytes().startswith(b"\x89PNG")


def test_what_a_sweep_of_evaluations_ends_with_reports_them(command, train, tmp_path):
    quick = ["trainer.max_epochs=1", "evaluator.num_samples=5", "device=cpu"]
    quick += ["model.hidden=[8]", "model.latent_dim=2", "estimator=elbo"]
    for seed, name in enumerate("ab"):
        assert train(*quick, f"seed={seed}", f"hydra.run.dir=my {name}").code == 0
    asked = ("-m", "run='my a','my b'", "evaluator=importance", "evaluator.num_samples=6,7")
    finished = command("ucvae-eval", *asked, "device=cpu", "hydra.sweep.dir=s")
    assert finished.code == 0, finished.err
    name, *folders = shlex.split(finished.out.splitlines()[-1])
    assert (name, folders) == ("ucvae-report", ["my a", "my b", "s"])
    reported = command(name, *folders)
    assert (reported.code, reported.err) == (0, "")
    for count in (5, 6, 7):
        assert f"importance, {count} samples" in reported.out
