"""Published values stand beside what they were published for, and beside nothing else."""

import pytest

from ucvae.report.compare import compare
from ucvae.report.published import BURDA, PUBLISHED, TABLE_1A
from ucvae.report.runs import find
from ucvae.report.text import markdown

from .folders import COUPLED, ELBO, LOG_LIKELIHOOD, RUN, write_evaluation, write_run

AIS = {"test.evaluator": "ais_paper", "test.num_samples": 16}
SMALL = {"config.model.activation": "tanh", "config.model.latent_dim": 50}
DYNAMIC = {
    "dataset": "mnist_dynamic",
    "binarization": "dynamic",
    "config.dataset.binarization": "dynamic",
}


def only_row(folder, changes):
    write_run(folder / "a", changes)
    report = compare(find([folder]))
    return report.sections[0].tables[0].rows[0], report


def test_the_tables_are_those_of_the_papers():
    ruiz = [
        (
            entry.estimators[0],
            entry.settings.get("estimator.kernel"),
            entry.settings["model.latent_dim"],
            entry.value,
            entry.error,
        )
        for entry in TABLE_1A
    ]
    assert sorted(ruiz, key=str) == sorted(
        [
            *(("elbo", None, *cell) for cell in _cells("-90.05 0.21 -89.96 0.14 -90.63 0.12")),
            *(("iwae", None, *cell) for cell in _cells("-88.06 0.08 -88.07 0.06 -89.05 0.08")),
            *(
                ("coupled", "isir_disir", *cell)
                for cell in _cells("-87.29 0.08 -86.75 0.10 -88.10 0.08")
            ),
            ("coupled", "isir", 20, -90.70, 0.08),
        ],
        key=str,
    )
    burda = [
        (entry.datasets[0], entry.settings["estimator.num_samples"], entry.value) for entry in BURDA
    ]
    values = {
        ("mnist", "static"): (-88.71, -87.63, -87.10),
        ("mnist_dynamic", "dynamic"): (-86.76, -85.54, -84.78),
        ("omniglot", "dynamic"): (-108.11, -106.12, -104.67),
    }
    assert burda == [
        (data, count, value)
        for data, row in values.items()
        for count, value in zip((1, 5, 50), row, strict=True)
    ]
    assert PUBLISHED == TABLE_1A + BURDA


def _cells(row):
    """D, value and error, for each of three D."""
    numbers = list(map(float, row.split()))
    return zip((20, 100, 300), numbers[::2], numbers[1::2], strict=True)


MATCHING = {
    "iwae": ({}, -88.06),
    "iwae, 100": ({"config.model.latent_dim": 100}, -88.07),
    "elbo": (ELBO, -90.05),
    "elbo, 10 samples": (ELBO | {"config.estimator.num_samples": 10}, -90.05),
    "coupled": (COUPLED, -87.29),
    "coupled, 300": (COUPLED | {"config.model.latent_dim": 300}, -88.10),
    "isir": (COUPLED | {"config.estimator.kernel": "isir"}, -90.70),
    "an older version": (COUPLED | {"config.estimator.proposals": ...}, -87.29),
    "an encoder without a name": ({"config.model.encoder": ...}, -88.06),
    "Larochelle's bits": ({"dataset": "mnist_larochelle"}, -88.06),
    "Burda, static": (SMALL | {"config.estimator.num_samples": 50}, -87.10),
    "Burda, dynamic": (DYNAMIC | SMALL | {"config.estimator.num_samples": 5}, -85.54),
    "Burda, one sample": (DYNAMIC | SMALL | ELBO, -86.76),
    "Burda, Omniglot": (
        SMALL | {"dataset": "omniglot", "binarization": "dynamic"}
        | {"config.estimator.num_samples": 50},
        -104.67,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MATCHING)
def test_published(case, tmp_path):
    changes, value = MATCHING[case]
    row, _ = only_row(tmp_path, changes | {LOG_LIKELIHOOD: value - 1.5})
    assert row.published.value == value and row.difference == pytest.approx(-1.5)


NOT_PUBLISHED = {
    "dynamic bits": DYNAMIC,
    "static Omniglot": SMALL | {"dataset": "omniglot_static", "config.estimator.num_samples": 50},
    "other data": {"dataset": "fashion_mnist_binary"},
    "the name without its bits": {"binarization": "dynamic"},
    "samples": {"config.estimator.num_samples": 50},
    "latent dimensions": {"config.model.latent_dim": 50},
    "units": {"config.model.hidden": [300, 300]},
    "activation": {"config.model.activation": "tanh"},
    "encoder": {"config.model.encoder.covariance": "full"},
    "larger encoder": {"config.model.encoder.blocks": 2},
    "model": {"config.model._target_": "ucvae.models.ppca.Ppca"},
    "lag": COUPLED | {"config.estimator.lag": 3},
    "start": COUPLED | {"config.estimator.burn_in": 5},
    "K": COUPLED | {"config.estimator.num_samples": 5},
    "proposals": COUPLED | {"config.estimator.proposals": "remembered"},
    "isir at 100": COUPLED | {"config.estimator.kernel": "isir", "config.model.latent_dim": 100},
    "warm start": COUPLED | {"config.trainer.switch": {"epochs": 200}},
    "start from a run": {"start": {"checkpoint": "a/last.pt", "config": RUN["config"]}},
    "elbo by 5 samples": DYNAMIC | SMALL | ELBO | {"config.estimator.num_samples": 5},
}


@pytest.mark.parametrize("case", NOT_PUBLISHED)
def test_not_published(case, tmp_path):
    row, report = only_row(tmp_path, NOT_PUBLISHED[case])
    assert row.published is None and row.difference is None
    assert "published" not in markdown(report)


def test_other_splits_have_no_published_value(tmp_path):
    from .folders import RUN, write_evaluation

    run = write_run(tmp_path / "a")
    write_evaluation(run / "evaluations" / "b", {"valid": RUN["test"], "test": ...})
    (section,) = compare(find([tmp_path])).sections
    assert [table.rows[0].published is None for table in section.tables] == [False, True]


def test_the_papers_own_protocol_has_no_marks(tmp_path):
    row, report = only_row(tmp_path, AIS)
    assert row.differences == []
    assert "- [1] Ruiz et al 2021, Table 1a: obtained alike" in markdown(report)


MARKED = {
    "evaluator": ({"test.evaluator": "importance", "test.num_samples": 5000}, "by AIS of 16"),
    "size": ({"test.evaluator": "ais_16x1000x10"}, "by AIS of 16 chains"),
    "images": ({"test.num_images": 1000}, "by AIS of 16 chains, 10,000 temperatures, all images"),
    "epochs": ({"epochs": 10}, "after 300 epochs, here 10"),
    "optimizer": (
        {"config.optimizer._target_": "ucvae.optimizers.Adam"},
        "optimizer rmsprop, here adam",
    ),
    "rate": ({"config.optimizer.lr": 1e-3}, "optimizer.lr 0.0005, here 0.001"),
    "batches": ({"config.trainer.batch_size": 20}, "trainer.batch_size 100, here 20"),
    "cap": (
        COUPLED | {"config.estimator.max_steps": 20},
        "estimator.max_steps 1000, here 20",
    ),
    "roulette": (
        COUPLED | {"config.estimator.survival": 0.4},
        "estimator.survival 0.0, here 0.4",
    ),
}


@pytest.mark.parametrize("case", MARKED)
def test_what_was_done_otherwise_is_marked(case, tmp_path):
    changes, mark = MARKED[case]
    row, report = only_row(tmp_path, AIS | changes)
    (found,) = row.differences
    assert found.startswith(mark)
    assert " [1] |" in markdown(report)


def test_a_last_checkpoint_is_marked_as_one(tmp_path):
    run = write_run(tmp_path / "a", AIS)
    write_evaluation(run / "evaluations" / "b", {"checkpoint": "last", "epoch": 300})
    tables = compare(find([tmp_path])).sections[0].tables
    marks = {table.evaluator.checkpoint: table.rows[0].differences for table in tables}
    assert marks == {"best": [], "last": ["of the best checkpoint, here last"]}


@pytest.mark.parametrize("given", ["glorot", "he", None])
def test_weights_that_started_otherwise_than_burdas_are_marked(given, tmp_path):
    key = {"config.model.initialization": given} if given else {}  # older runs have none
    row, _ = only_row(tmp_path, SMALL | ELBO | key)
    marks = [text for text in row.differences if "initialization" in text]
    here = given or "torch"
    assert marks == ([] if given == "glorot" else [f"model.initialization glorot, here {here}"])
