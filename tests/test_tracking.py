"""What the hparams tab shows of a run; the rest of tracking is tested with the runs."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

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
