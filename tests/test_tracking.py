"""What the hparams tab shows of a run; the rest of tracking is tested with the runs."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.metadata import (
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from ucvae.tracking import Tracker


def test_hyperparameters_are_columns_by_key_and_components_by_group(tmp_path):
    settings = {
        "seed": 3,
        "device": "auto",
        "data_dir": "data",
        "resume": None,
        "estimator._target_": "ucvae.estimators.coupled.Coupled",
        "estimator.adapt_beta": True,
        "trainer._target_": "ucvae.training.Trainer",
        "trainer.patience": None,
        "evaluator._target_": "ucvae.evaluation.importance.ImportanceSampling",
        "evaluator.num_samples": 5000,
        "model.hidden": [200, 100],
        "optimizer.lr": 5e-4,
    }
    with Tracker(tmp_path, 0) as tracker:
        tracker.hyperparameters(settings, "test/log_likelihood")
    metadata = EventAccumulator(str(tmp_path)).Reload().summary_metadata
    content = metadata["_hparams_/session_start_info"].plugin_data.content
    columns = parse_session_start_info_plugin_data(content).hparams
    found = {
        key: value.string_value if value.HasField("string_value") else value.number_value
        for key, value in columns.items()
    }
    assert found == {
        "seed": 3,
        "estimator": "coupled",
        "estimator.adapt_beta": "true",
        "model.hidden": "[200, 100]",
        "optimizer.lr": 5e-4,
    }


def columns_of(folder, settings):
    with Tracker(folder, 0) as tracker:
        tracker.hyperparameters(settings, "test/log_likelihood")
    metadata = EventAccumulator(str(folder)).Reload().summary_metadata
    content = metadata["_hparams_/experiment"].plugin_data.content
    return parse_experiment_plugin_data(content)


def test_runs_of_all_estimators_have_the_same_columns(tmp_path):
    coupled = {"seed": 0, "estimator._target_": "Coupled", "estimator.lag": 3}
    elbo = {"seed": 0, "estimator._target_": "Elbo", "estimator.analytic_kl": True}
    found = []
    for name, settings in (("coupled", coupled), ("elbo", elbo)):
        (tmp_path / name).mkdir()
        experiment = columns_of(tmp_path / name, settings)
        found.append({(info.name, info.type) for info in experiment.hparam_infos})
        assert [info.name.tag for info in experiment.metric_infos] == ["test/log_likelihood"]
    assert found[0] == found[1]
    assert {"estimator.lag", "estimator.analytic_kl"} <= {name for name, _ in found[0]}


def test_what_the_command_line_set_comes_first(tmp_path):
    (tmp_path / ".hydra").mkdir()
    given = "- estimator=coupled\n- estimator.lag=5\n- +experiment=x\n- data_dir=${absent}\n"
    (tmp_path / ".hydra" / "overrides.yaml").write_text(given)
    settings = {"seed": 0, "estimator._target_": "Coupled", "estimator.lag": 5}
    infos = columns_of(tmp_path, settings).hparam_infos
    first = {info.name for info in infos if info.differs}
    assert first == {"estimator", "estimator.lag", "seed", "model", "dataset"}


def test_layout_shows_the_facts_of_a_run_side_by_side(tmp_path):
    with Tracker(tmp_path, 0):
        pass
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {
        category.title: [tag for chart in category.chart for tag in chart.multiline.tag]
        for category in layout.category
    }
    assert charts["log-likelihood, nats per image"] == [
        "train/objective",
        "train/iwae_bound",
        "valid/log_likelihood",
        "test/log_likelihood",
    ]
    assert "coupling/meeting_time_p90" in charts["coupling"]
    assert "proposal/ess" in charts["proposals"]
    assert "time/images_per_s" in charts["speed and gradients"]
