"""Groups over seeds, their arithmetic, and what does not share a column."""

import random
import re

import pytest

from ucvae.report.compare import compare, label
from ucvae.report.runs import Evaluator, find
from ucvae.report.text import csv_rows, markdown

from .folders import (
    COUPLED,
    ELBO,
    LOG_LIKELIHOOD,
    RUN,
    SPLITS,
    changed,
    write_evaluation,
    write_images,
    write_run,
    write_seeds,
)


def report_of(folder):
    return compare(find([folder]))


def only_table(report):
    (section,) = report.sections
    (table,) = section.tables
    return table


def test_mean_and_standard_error_over_seeds(tmp_path):
    write_seeds(tmp_path, [-90.0, -91.0, -95.0])
    (row,) = only_table(report_of(tmp_path)).rows
    # Deviations 2, 1, -3 from -92: 14 / (3 - 1) = 7 is the variance, sqrt(7 / 3) the error.
    assert row.log_likelihood == pytest.approx(-92.0)
    assert row.error_over_seeds == pytest.approx(1.5275252316519468)
    assert row.error_over_images == pytest.approx(0.2)
    assert [run.seed for run in row.runs] == [0, 1, 2]
    assert "-92.00 +- 1.53" in markdown(report_of(tmp_path))


def test_error_over_images_is_that_of_one_evaluation(tmp_path):
    for seed, error in enumerate((0.1, 0.2, 0.6)):
        write_run(tmp_path / str(seed), {"seed": seed, "test.standard_error": error})
    (row,) = only_table(report_of(tmp_path)).rows
    assert row.error_over_images == pytest.approx(0.3)


def test_a_row_is_behind_the_best_by_seeds_and_images_in_pairs(tmp_path):
    write_images(tmp_path / "a0", [-80.0, -90.0, -100.0])
    write_images(tmp_path / "a1", [-81.0, -91.0, -104.0], {"seed": 1})
    write_images(tmp_path / "b0", [-82.0, -91.0, -103.0], ELBO)
    write_images(tmp_path / "b1", [-86.0, -92.0, -107.0], ELBO | {"seed": 1})
    report = report_of(tmp_path)
    table = only_table(report)
    elbo, iwae = table.rows
    assert table.best is iwae and table.lag(iwae) is None
    lag = table.lag(elbo)
    # By seed the means differ by 2 and 3: 2.5 on average, std sqrt(1/2), over sqrt(2).
    assert lag.value == pytest.approx(2.5)
    assert lag.error_over_seeds == pytest.approx(0.5)
    # By image, means over seeds: -80.5, -90.5, -102 and -84, -91.5, -105. They differ by 3.5, 1, 3;
    # deviations 1, -1.5, 0.5 from 2.5, whose squares sum to 3.5; sqrt(3.5 / 2 / 3).
    assert lag.error_over_images == pytest.approx(0.7637626158259734)
    behind, best = (
        [cell.strip() for cell in line.split("|")]
        for line in markdown(report).splitlines()
        if line.startswith(("| elbo", "| iwae"))
    )
    assert behind[5:7] == ["2.500 +- 0.500", "0.764"] and best[5:7] == ["best", ""]
    (section,) = report.sections
    first, second = csv_rows(section, table)
    columns = [f"behind_best{name}" for name in ("", "_error_over_seeds", "_error_over_images")]
    assert [first[name] for name in columns] == pytest.approx([2.5, 0.5, 0.7637626158259734])
    assert [second[name] for name in columns] == [None, None, None]


def test_what_images_do_to_both_rows_is_not_in_the_error_of_their_difference(tmp_path):
    # Images differ by a standard deviation of 50 nats, which both rows share, and rows by 0.5 +- 1:
    # of 400 images the error is 1 / 20 = 0.05, to a tenth of it, three of its own standard errors
    # (1 / sqrt(2 * 399) = 3.5%). A mean of other images has one of 50 / 20 = 2.5.
    noise = random.Random(0)
    images = [noise.gauss(-90, 50) for _ in range(400)]
    better = [value + noise.gauss(0.5, 1.0) for value in images]
    write_images(tmp_path / "a", better)
    write_images(tmp_path / "b", images, ELBO)
    write_images(tmp_path / "c", noise.sample(images, 400), COUPLED)
    table = only_table(report_of(tmp_path))
    elbo, iwae, shuffled = table.rows
    assert table.best is iwae
    lag = table.lag(elbo)
    assert lag.error_over_images == pytest.approx(0.05, rel=0.11)
    assert abs(lag.value - 0.5) < 3 * 0.05
    assert table.lag(shuffled).error_over_images > 2.5  # sqrt(2) * 2.5, if it is in no pairs


def test_rows_of_other_seeds_are_in_pairs_by_images_alone(tmp_path):
    for seed in (0, 1):
        write_images(tmp_path / f"a{seed}", [-80.0, -90.0], {"seed": seed})
        write_images(tmp_path / f"b{seed}", [-82.0, -91.0], ELBO | {"seed": seed + 1})
    table = only_table(report_of(tmp_path))
    lag = table.lag(table.rows[0])
    assert lag.value == pytest.approx(1.5) and lag.error_over_seeds is None
    assert lag.error_over_images == pytest.approx(0.5)


def test_without_the_images_of_all_runs_there_is_no_error_over_them(tmp_path):
    write_images(tmp_path / "a", [-80.0, -90.0])
    write_images(tmp_path / "b0", [-82.0, -91.0], ELBO)
    write_run(tmp_path / "b1", ELBO | {"seed": 1, LOG_LIKELIHOOD: -87.0, "test.num_images": 2})
    report = report_of(tmp_path)
    table = only_table(report)
    lag = table.lag(table.rows[0])
    assert lag.value == pytest.approx(1.75) and lag.error_over_images is None
    text = markdown(report)
    assert "| behind |" in text and "s.e. pairs |" not in text and not report.left_out


def test_a_row_by_itself_is_behind_none(tmp_path):
    write_images(tmp_path / "a", [-80.0, -90.0])
    report = report_of(tmp_path)
    table = only_table(report)
    assert table.lag(table.best) is None and "| behind |" not in markdown(report)


def test_one_seed_has_no_error_and_says_so(tmp_path):
    write_run(tmp_path / "a")
    report = report_of(tmp_path)
    (row,) = only_table(report).rows
    assert row.error_over_seeds is None
    text = markdown(report)
    assert "-90.00 (1 seed)" in text and "One seed has no standard error over seeds." in text


SAME = {
    "seed": {"seed": 1},
    "device": {"config.device": "cuda:0"},
    "data folder": {"config.data_dir": "/elsewhere"},
    "resumed": {"config.resume": "runs/a"},
    "no start": {"start": None, "config.start_from": None},
    "lines of metrics": {"config.trainer.log_every": 1},
    "study": {"config.study": {"_target_": "ucvae.studies.meeting_times.MeetingTimes"}},
    "test": {"config.evaluator": {"_target_": "ucvae.evaluation.ais.Ais", "chains": 4}},
}
OTHER = {
    "learning rate": {"config.optimizer.lr": 1e-3},
    "epochs": {"config.trainer.max_epochs": 200},
    "samples": {"config.estimator.num_samples": 50},
    "a new setting": {"config.estimator.dreg": False},
    "encoder": {"config.model.encoder.covariance": "full"},
    "validation": {"config.trainer.valid_samples": 10},
    "start": {"start": {"checkpoint": "a/last.pt", "config": RUN["config"] | {"seed": 1}}},
}


@pytest.mark.parametrize("case", [*SAME, *OTHER])
def test_groups_differ_by_what_runs_compute(case, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", {"seed": 1} | (SAME | OTHER)[case])
    assert len(only_table(report_of(tmp_path)).rows) == (1 if case in SAME else 2)


def start_of(seed, config=None, **start):
    """What a run says of the one that it started from."""
    config = changed(RUN, {"config.seed": seed} | (config or {}))["config"]
    usual = {"checkpoint": f"runs/{seed}/last.pt", "epochs": 20, "averages": "kept"}
    return {**usual, "config": config, **start}


def started(folder, seed, config=None, of_seed=None, changes=None, **start):
    """A run that began with the model of another, by default of one of its seed."""
    begin = start_of(seed if of_seed is None else of_seed, config, **start)
    return write_run(folder, {"seed": seed, "start": begin, **(changes or {})})


def groups_of(folder):
    """The folders' names by row."""
    rows = only_table(report_of(folder)).rows
    return sorted(" ".join(sorted(run.folder.name for run in row.runs)) for row in rows)


def test_runs_that_started_from_runs_of_their_seeds_are_a_group(tmp_path):
    for seed in range(3):
        started(tmp_path / str(seed), seed)
    (section,) = report_of(tmp_path).sections
    (row,) = section.tables[0].rows
    assert [run.seed for run in row.runs] == [0, 1, 2] and row.label == "iwae"
    (words,) = section.common["start_from"]
    assert re.fullmatch("start_from iwae [0-9a-f]{8}", words)


STARTS = {
    "settings": {"config": {"config.trainer.max_epochs": 50}},
    "data": {"config": {"config.dataset._target_": "ucvae.data.omniglot.Omniglot"}},
    "the best checkpoint": {"checkpoint": "runs/1/best.pt"},
    "fresh averages": {"averages": "fresh"},
    "epochs": {"epochs": 21},
    "one run for all seeds": {"of_seed": 0},
    "a start of its own": {"start": start_of(2)},
}


@pytest.mark.parametrize("case", STARTS)
def test_another_start_is_another_group_and_told(case, tmp_path):
    write_run(tmp_path / "a")
    started(tmp_path / "b", 1)
    started(tmp_path / "c", 2, **STARTS[case])
    labels = [row.label for row in only_table(report_of(tmp_path)).rows]
    assert len(set(labels)) == 3 and "iwae, start_from null" in labels
    for text in set(labels) - {"iwae, start_from null"}:
        assert re.fullmatch("iwae, start_from iwae [0-9a-f]{8}", text)


@pytest.mark.parametrize("limit", ["max_seconds", "patience"])
def test_starts_that_ended_when_they_liked_need_not_have_done_as_many_epochs(limit, tmp_path):
    for seed in range(2):
        config = {f"config.trainer.{limit}": 60}
        started(tmp_path / str(seed), seed, config, epochs=20 + seed)
    assert groups_of(tmp_path) == ["0 1"]


def test_the_best_checkpoints_of_starts_need_not_be_of_one_epoch(tmp_path):
    for seed in range(2):
        started(tmp_path / str(seed), seed, checkpoint="best.pt", epochs=20 + seed)
    assert groups_of(tmp_path) == ["0 1"]


@pytest.mark.parametrize("seeds", [(1, 2), (0, 1, 2)])  # with the start's own, and without
def test_runs_that_started_from_one_run_are_a_group(seeds, tmp_path):
    for seed in seeds:
        started(tmp_path / str(seed), seed, of_seed=0)
    assert groups_of(tmp_path) == [" ".join(map(str, seeds))]


def test_runs_from_one_run_are_not_put_together_with_runs_from_their_own_seeds(tmp_path):
    for seed in (1, 2, 3):
        started(tmp_path / f"own-{seed}", seed)
    for seed in (4, 5):
        started(tmp_path / f"from-0-{seed}", seed, of_seed=0)
    for seed in (6, 7):
        started(tmp_path / f"other-{seed}", seed, of_seed=seed + 10)
    expected = ["from-0-4 from-0-5", "other-6", "other-7", "own-1 own-2 own-3"]
    assert groups_of(tmp_path) == expected


def test_arms_that_started_from_the_same_runs_are_groups_of_all_their_seeds(tmp_path):
    for seed in (0, 1):
        started(tmp_path / f"a{seed}", seed)
        started(tmp_path / f"b{seed}", seed, changes={"config.estimator.num_samples": 50})
    assert groups_of(tmp_path) == ["a0 a1", "b0 b1"]


def test_seeds_are_told_apart_along_a_chain_of_starts(tmp_path):
    for seed in (1, 2):
        started(tmp_path / f"own-{seed}", seed, start=start_of(seed))
        started(tmp_path / f"from-3-{seed}", seed, start=start_of(3))
    assert groups_of(tmp_path) == ["from-3-1 from-3-2", "own-1 own-2"]


def test_labels_tell_what_differs_and_the_rest_is_said_once(tmp_path):
    write_run(tmp_path / "a", ELBO)
    write_run(tmp_path / "b")
    write_run(tmp_path / "c", {"config.estimator.num_samples": 50})
    write_run(tmp_path / "d", COUPLED)
    report = report_of(tmp_path)
    labels = [row.label for row in only_table(report).rows]
    assert labels == [
        "elbo, num_samples 1",
        "iwae, num_samples 10",
        "iwae, num_samples 50",
        "coupled, num_samples 10",
    ]
    common = report.sections[0].common
    assert common["model"][:2] == ["mlp", "latent_dim 20"] and "lr 0.0005" in common["optimizer"]
    assert "kernel isir_disir" in common["coupled"]
    assert markdown(report).count("latent_dim") == 1


@pytest.mark.parametrize(
    "one, other, labels",
    [
        (
            {"config.model.encoder.hidden": [600]},
            {"config.model.hidden": [600]},
            ["hidden [200, 200], encoder.hidden [600]", "hidden [600], encoder.hidden null"],
        ),
        (
            {"config.optimizer.decay": 0.5, "config.trainer.decay": 0.1},
            {"config.optimizer.decay": 0.9, "config.trainer.decay": 0.2},
            [
                "optimizer.decay 0.5, trainer.decay 0.1",
                "optimizer.decay 0.9, trainer.decay 0.2",
            ],
        ),
    ],
)
def test_labels_of_settings_with_the_same_name_tell_them_apart(tmp_path, one, other, labels):
    write_run(tmp_path / "a", one)
    write_run(tmp_path / "b", other)
    rows = only_table(report_of(tmp_path)).rows
    assert sorted(row.label for row in rows) == [f"iwae, {label}" for label in labels]


def test_runs_of_another_version_are_told_by_what_they_lack(tmp_path):
    write_run(tmp_path / "old")
    write_run(tmp_path / "new", {"config.estimator.dreg": True})
    labels = {row.label for row in only_table(report_of(tmp_path)).rows}
    assert labels == {"iwae", "iwae, without dreg"}
    many = {f"config.estimator.{name}": 1 for name in "abc"}
    other = {f"config.estimator.{name}": 1 for name in "def"}
    write_run(tmp_path / "newer", many)
    write_run(tmp_path / "newest", other)
    runs = [row.runs[0] for row in only_table(report_of(tmp_path)).rows]
    assert len(set(label(runs))) == 4


@pytest.mark.parametrize(
    "key, before, other, labels",
    [
        (
            "config.model.initialization",
            "torch",
            "he",
            ["iwae, initialization he", "iwae, initialization torch"],
        ),
        (
            "config.estimator.min_weight",
            0.0,
            0.1,
            ["iwae, min_weight 0.0", "iwae, min_weight 0.1"],
        ),
        (
            "config.trainer.switch",
            {"min_weight": 0.0},
            {"min_weight": 0.1},
            ["iwae, switch.min_weight 0.0", "iwae, switch.min_weight 0.1"],
        ),
    ],
)
def test_runs_of_before_a_setting_could_be_chosen(key, before, other, labels, tmp_path):
    write_run(tmp_path / "old")
    write_run(tmp_path / "new", {"seed": 1, key: before})
    (row,) = only_table(report_of(tmp_path)).rows
    assert len(row.runs) == 2
    write_run(tmp_path / "other", {key: other})
    assert [row.label for row in only_table(report_of(tmp_path)).rows] == labels


@pytest.mark.parametrize("kind", ["snis.Snis", "coupled.Coupled"])
def test_runs_of_before_remembered_means_could_follow_the_encoder_s(kind, tmp_path):
    estimator = {"config.estimator._target_": f"ucvae.estimators.{kind}"}
    write_run(tmp_path / "old", estimator)
    write_run(tmp_path / "new", estimator | {"seed": 1, "config.estimator.follow_encoder": False})
    (row,) = only_table(report_of(tmp_path)).rows
    assert len(row.runs) == 2
    write_run(tmp_path / "other", estimator | {"config.estimator.follow_encoder": True})
    assert len(only_table(report_of(tmp_path)).rows) == 2


def test_what_only_a_schedule_of_steps_has_tells_no_other_runs_apart(tmp_path):
    steps = {"config.optimizer.milestones": [], "config.optimizer.gamma": 0.1}
    constant = {"config.optimizer.schedule": "constant"}
    write_run(tmp_path / "old", constant)
    write_run(tmp_path / "new", {"seed": 1, **steps, **constant})
    (row,) = only_table(report_of(tmp_path)).rows
    assert len(row.runs) == 2
    for name, milestones in (("one", [5]), ("two", [6])):
        given = {"config.optimizer.schedule": "steps", "config.optimizer.milestones": milestones}
        write_run(tmp_path / name, {**steps, **given})
    labels = {row.label for row in only_table(report_of(tmp_path)).rows}
    assert len(labels) == 3 and any("milestones [5]" in label for label in labels)


def test_means_of_time_and_cost(tmp_path):
    for seed, seconds in enumerate((100.0, 300.0)):
        write_run(tmp_path / str(seed), COUPLED | {"seed": seed, "wall_clock_s": seconds})
    table = only_table(report_of(tmp_path))
    (row,) = csv_rows(report_of(tmp_path).sections[0], table)
    assert row["wall_clock_s"] == 200 and row["train_s"] == 20
    assert row["decoder_evaluations_per_image"] == 250 and row["truncated_fraction"] == 0.25
    # What one seed does not tell has no mean.
    write_run(tmp_path / "2", COUPLED | {"seed": 2, "wall_clock_s": ...})
    report = report_of(tmp_path)
    (row,) = csv_rows(report.sections[0], only_table(report))
    assert row["wall_clock_s"] is None and row["train_images_per_s"] == 5000


def test_decoder_evaluations_of_the_bounds_are_their_samples(tmp_path):
    write_run(tmp_path / "a", ELBO)
    write_run(tmp_path / "b")
    rows = only_table(report_of(tmp_path)).rows
    assert [row.runs[0].decoder_evaluations for row in rows] == [1, 10]


def test_what_did_not_finish_as_usual_is_shown(tmp_path):
    write_run(tmp_path / "a")
    assert "early_stopped" not in markdown(report_of(tmp_path))
    write_run(tmp_path / "b", {"seed": 1, "status": "early_stopped", "epochs": 250})
    text = markdown(report_of(tmp_path))
    assert "1 early_stopped" in text and "250-300" in text


APART = {
    "data": {"dataset": "omniglot"},
    "binarisation": {"binarization": "dynamic"},
    "evaluator": {"test.evaluator": "importance_refined_40"},
    "samples": {"test.num_samples": 500},
    "images": {"test.num_images": 1000},
}


@pytest.mark.parametrize("case", [*APART, "control"])
def test_other_data_or_evaluators_are_tables_of_their_own(case, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", {"seed": 1} | APART.get(case, {}))
    report = report_of(tmp_path)
    tables = [table for section in report.sections for table in section.tables]
    assert len(tables) == (1 if case == "control" else 2)
    headings = [line for line in markdown(report).splitlines() if line.startswith("##")]
    assert len(set(headings)) == len(headings)
    assert not report.left_out


def test_other_splits_are_refused_by_name(tmp_path):
    write_seeds(tmp_path, [-90.0, -91.0])
    assert not report_of(tmp_path).left_out  # the control
    write_run(tmp_path / "odd", {"seed": 2, "split_sha256": SPLITS | {"test": "d" * 64}})
    report = report_of(tmp_path)
    (row,) = only_table(report).rows
    assert [run.seed for run in row.runs] == [0, 1]
    assert report.left_out == [
        f"{tmp_path / 'odd'}: other mnist than the other runs, by SHA-256 of test "
        "(dddddddd instead of cccccccc)"
    ]


def test_of_a_repeated_run_the_newest_counts(tmp_path):
    write_run(tmp_path / "b", {LOG_LIKELIHOOD: -80.0}, age=1)
    write_run(tmp_path / "a", {LOG_LIKELIHOOD: -90.0}, age=2)
    report = report_of(tmp_path)
    (row,) = only_table(report).rows
    assert row.log_likelihood == -80
    (line,) = report.left_out
    assert line.startswith(f"{tmp_path / 'a'}: seed 0 of iwae by importance, 5,000 samples")
    assert line.endswith(f"is also in {tmp_path / 'b'}, which is newer and counts")
    assert report.sections[0].groups == {"iwae": row.runs}


def test_evaluations_stand_beside_the_runs_own_test(tmp_path):
    for seed in range(2):
        run = write_run(tmp_path / str(seed), {"seed": seed})
        changes = {LOG_LIKELIHOOD: -88.0 + seed, "run": "moved/since/then"}
        write_evaluation(run / "evaluations" / "test-ais", changes)
    (section,) = report_of(tmp_path).sections
    importance, ais = sorted(section.tables, key=lambda table: table.evaluator.num_samples)[::-1]
    assert importance.evaluator == Evaluator("test", "importance", 5000, 10000)
    assert ais.evaluator == Evaluator("test", "ais_paper", 16, 10000)
    assert importance.rows[0].log_likelihood == -90 and ais.rows[0].log_likelihood == -87.5
    assert importance.rows[0].label == ais.rows[0].label


def test_other_splits_of_the_images_are_tables_of_their_own(tmp_path):
    run = write_run(tmp_path / "a")
    write_evaluation(run / "evaluations" / "valid", {"valid": RUN["test"], "test": ...})
    (section,) = report_of(tmp_path).sections
    assert [table.evaluator.split for table in section.tables] == ["test", "valid"]
    assert "10,000 valid images" in markdown(report_of(tmp_path))


def test_the_last_checkpoint_has_a_table_of_its_own(tmp_path):
    """In which it is not of before the switch, though the best one is."""
    run = write_run(tmp_path / "a", {"config.trainer.switch": {"epochs": 295}})
    last = {"epoch": 300, "checkpoint": "last", "test": RUN["test"] | {"log_likelihood": -89.0}}
    write_evaluation(run / "evaluations" / "last", last)
    (section,) = report_of(tmp_path).sections
    best, last = sorted(section.tables, key=lambda table: table.evaluator.checkpoint)
    assert (best.rows[0].log_likelihood, last.rows[0].log_likelihood) == (-90, -89)
    assert best.rows[0].status == "1 tested before the switch" and last.rows[0].status == ""
    assert "10,000 test images, last checkpoint" in markdown(report_of(tmp_path))


def test_long_labels_stand_in_a_list(tmp_path):
    settings = {f"config.estimator.a_long_name_{i}": 1 for i in range(3)}
    write_run(tmp_path / "a", settings)
    write_run(tmp_path / "b", {key: 2 for key in settings})
    text = markdown(report_of(tmp_path))
    assert "- iwae (a), a_long_name_0 1, a_long_name_1 1, a_long_name_2 1" in text
    assert "| iwae (b) " in text
