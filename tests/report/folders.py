"""Run folders written by hand, with as few fields as a report needs."""

import copy
import json
import os

SPLITS = {"train": "a" * 64, "valid": "b" * 64, "test": "c" * 64}

RUN = {
    "dataset": "mnist",
    "binarization": "static",
    "split_sha256": SPLITS,
    "estimator": "iwae",
    "model": "mlp",
    "seed": 0,
    "git_revision": "0123456789abcdef",
    "device": {"type": "cpu", "name": "a processor", "threads": 1},
    "epochs": 300,
    "wall_clock_s": 100.0,
    "train_images_per_s": 5000.0,
    "valid": {"log_likelihood": -90.0, "standard_error": 0.3, "epoch": 290, "num_samples": 100},
    "test": {
        "log_likelihood": -90.0,
        "standard_error": 0.2,
        "evaluator": "importance",
        "num_samples": 5000,
        "num_images": 10000,
    },
    "coupling": None,
    "study": None,
    "status": "finished",
    "config": {
        "seed": 0,
        "device": "auto",
        "data_dir": "data",
        "resume": None,
        "dataset": {"_target_": "ucvae.data.mnist.Mnist", "binarization": "static"},
        "estimator": {"_target_": "ucvae.estimators.iwae.Iwae", "num_samples": 10},
        "model": {
            "_target_": "ucvae.models.mlp.Mlp",
            "latent_dim": 20,
            "hidden": [200, 200],
            "activation": "relu",
            "encoder": {"hidden": None, "blocks": 0, "covariance": "diagonal"},
        },
        "optimizer": {"_target_": "ucvae.optimizers.RMSProp", "lr": 5e-4},
        "trainer": {
            "_target_": "ucvae.training.Trainer",
            "max_epochs": 300,
            "batch_size": 100,
            "valid_samples": 100,
            "log_every": 50,
        },
        "evaluator": {
            "_target_": "ucvae.evaluation.importance.ImportanceSampling",
            "num_samples": 5000,
        },
        "study": None,
    },
}

COUPLED = {
    "estimator": "coupled",
    "config.estimator": {
        "_target_": "ucvae.estimators.coupled.Coupled",
        "num_samples": 10,
        "lag": 10,
        "burn_in": 1,
        "kernel": "isir_disir",
        "proposals": "encoder",
        "max_steps": 1000,
        "adapt_beta": True,
    },
    "coupling": {
        "meeting_time": {"mean": 14.0, "p50": 12, "p90": 20, "p99": 40, "max": 1000},
        "truncated_fraction": 0.25,
        "decoder_evaluations_per_image": 250.0,
    },
}
ELBO = {
    "estimator": "elbo",
    "config.estimator": {"_target_": "ucvae.estimators.elbo.Elbo", "num_samples": 1},
}
# What ``ucvae-eval`` leaves.
EVALUATION = {
    "run": "elsewhere",
    "epoch": 290,
    "dataset": "mnist",
    "binarization": "static",
    "split_sha256": SPLITS,
    "differing_splits": [],
    "seed": 0,
    "test": RUN["test"] | {"evaluator": "ais_paper", "num_samples": 16},
}
# Validation at two epochs.
METRICS = [
    {"step": 250, "epoch": 0, "train/objective": -110.0},
    {"step": 500, "epoch": 1, "valid/log_likelihood": -100.0, "time/train_seconds": 10.0},
    {"step": 1000, "epoch": 2, "valid/log_likelihood": -95.0, "time/train_seconds": 20.0},
    {"step": 1000, "epoch": 2, "test/log_likelihood": -94.0},
]

LOG_LIKELIHOOD = "test.log_likelihood"


def changed(result, changes):
    """A copy with the values under dotted keys replaced, or removed where they are ``...``."""
    result = copy.deepcopy(result)
    for key, value in changes.items():
        *path, last = key.split(".")
        node = result
        for part in path:
            node = node[part]
        if value is ...:
            del node[last]
        else:
            node[last] = copy.deepcopy(value)
    return result


def write_run(folder, changes=None, /, metrics=METRICS, age=0, base=RUN):
    """Write a finished run, ``age`` seconds ago."""
    folder.mkdir(parents=True)
    (folder / ".hydra").mkdir()
    result = changed(base, changes or {})
    if "config" in result:
        result["config"]["seed"] = result["seed"]
    path = folder / "result.json"
    path.write_text(json.dumps(result))
    time = 1_800_000_000 - age
    os.utime(path, (time, time))
    if metrics is not None:
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        (folder / "metrics.jsonl").write_text(lines)
    return folder


def write_evaluation(folder, changes=None, /, age=0):
    """Write an evaluation of ``ucvae-eval``."""
    return write_run(folder, changes, metrics=None, age=age, base=EVALUATION)


def write_images(folder, values, changes=None, /):
    """Write a run with the log-likelihood of each test image, and their mean in its result."""
    mean = {LOG_LIKELIHOOD: sum(values) / len(values), "test.num_images": len(values)}
    write_run(folder, mean | (changes or {}))
    lines = "".join(f"{i},{value!r}\n" for i, value in enumerate(values))
    (folder / "test_log_likelihoods.csv").write_text(f"image,log_likelihood\n{lines}")
    return folder


def write_seeds(folder, values, changes=None, /):
    """Write a run for each test log-likelihood, with seeds from 0."""
    for seed, value in enumerate(values):
        write_run(folder / str(seed), {"seed": seed, LOG_LIKELIHOOD: value} | (changes or {}))
