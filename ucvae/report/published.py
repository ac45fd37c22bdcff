"""Published test log-likelihoods, each with its source, its evaluator and what it was made with.

A value stands beside a group of runs only if data set, binarisation, estimator, model and all of
``settings`` are the same. Where the rest of the protocol differs (how long, by which optimizer, by
which evaluator), it is shown with a note that says so.

Left out is Table 1b of Ruiz et al (Fashion-MNIST, CIFAR-10): it does not say the unit of its
values, so that no difference from them means anything; only its own gaps do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ucvae.report.runs import Evaluator, Run

# What a setting was in the versions, or is in the estimators, that do not have its key.
BEFORE = {
    "estimator.proposals": "encoder",
    "estimator.dreg": False,
    "estimator.survival": 0.0,
    "model.encoder.hidden": None,
    "model.encoder.blocks": 0,
    "model.encoder.covariance": "diagonal",
    "trainer.switch.epochs": 0,
    "optimizer.schedule": "constant",
}


@dataclass(frozen=True)
class Published:
    """A published value, in nats per image.

    Attributes:
        source: paper and table.
        value: the test log-likelihood.
        error: as published, or None.
        evaluator: how it was obtained, in words.
        alike: the evaluator of ours that does the same.
        datasets: ours that are the same images, by name and binarisation.
        estimators: the names of ours that do the same.
        model: the name of ours.
        settings: by dotted key, which must be the same.
        protocol: by dotted key, which should be.
        epochs: of training.
    """

    source: str
    value: float
    error: float | None
    evaluator: str
    alike: Evaluator
    datasets: tuple[tuple[str, str], ...]
    estimators: tuple[str, ...]
    model: str
    settings: Mapping[str, Any]
    protocol: Mapping[str, Any]
    epochs: int

    def matches(self, run: Run) -> bool:
        """Whether the run does what the value was published for."""
        return (
            run.start is None
            and (run.dataset, run.binarization) in self.datasets
            and run.estimator in self.estimators
            and _choice(run, "model") == self.model
            and all(_value(run, key) == value for key, value in self.settings.items())
        )

    def differences(self, runs: list[Run], evaluator: Evaluator) -> list[str]:
        """How else the value was obtained than by runs that it matches, in words."""
        alike = evaluator._replace(checkpoint=self.alike.checkpoint) == self.alike
        found = [] if alike else [f"by {self.evaluator}"]
        if evaluator.checkpoint != self.alike.checkpoint:
            found.append(f"of the {self.alike.checkpoint} checkpoint, here {evaluator.checkpoint}")
        for key, published in self.protocol.items():
            group, _, setting = key.partition(".")
            choice = setting == "_target_"
            ours = {_choice(run, group) if choice else str(_value(run, key)) for run in runs}
            if ours != {str(published)}:
                name = group if choice else key
                found.append(f"{name} {published}, here {' or '.join(sorted(ours))}")
        epochs = sorted({run.epochs for run in runs if run.epochs is not None})
        if epochs and epochs != [self.epochs]:
            done = f"{epochs[0]:,}" + (f" to {epochs[-1]:,}" if len(epochs) > 1 else "")
            found.append(f"after {self.epochs:,} epochs, here {done}")
        return found


def _choice(run: Run, group: str) -> str:
    """The class of a component, in lower case."""
    return str(run.config.get(f"{group}._target_", "")).rpartition(".")[2].lower()


def _value(run: Run, key: str) -> Any:
    return run.settings.get(key, BEFORE.get(key))


def look_up(run: Run, evaluator: Evaluator) -> Published | None:
    """The published value for what a run does, if there is one; test splits only."""
    if evaluator.split != "test":
        return None
    return next((entry for entry in PUBLISHED if entry.matches(run)), None)


# Thinning is not among them: it is ours, and changes no expectation.
_CHAINS = {
    "estimator.max_steps": 1000,
    "estimator.survival": 0.0,
    "estimator.adapt_beta": True,
}

_PLAIN = {
    "model.encoder.hidden": None,
    "model.encoder.blocks": 0,
    "model.encoder.covariance": "diagonal",
    "trainer.switch.epochs": 0,
}


def _table_1a(
    latent_dim: int, value: float, error: float, estimator: str, **settings: Any
) -> Published:
    return Published(
        source="Ruiz et al 2021, Table 1a",
        value=value,
        error=error,
        evaluator="AIS of 16 chains, 10,000 temperatures, all images",
        alike=Evaluator("test", "ais_paper", 16, 10_000),
        # The same law; whose draw of the bits the paper used makes a difference of noise only.
        datasets=(("mnist", "static"), ("mnist_larochelle", "static")),
        estimators=(estimator,),
        model="mlp",
        settings=_PLAIN
        | {"model.latent_dim": latent_dim, "model.hidden": [200, 200], "model.activation": "relu"}
        | {f"estimator.{key}": setting for key, setting in settings.items()},
        protocol={
            "optimizer._target_": "rmsprop",
            "optimizer.lr": 5e-4,
            "optimizer.schedule": "constant",
            "trainer.batch_size": 100,
        }
        | (_CHAINS if estimator == "coupled" else {}),
        epochs=300,
    )


_COUPLED = {"num_samples": 10, "lag": 10, "burn_in": 1, "proposals": "encoder"}

# Static MNIST, a 200-200 ReLU network on either side, K = 10, 300 epochs.
TABLE_1A = (
    # The evidence lower bound is the same for any number of samples.
    _table_1a(20, -90.05, 0.21, "elbo"),
    _table_1a(100, -89.96, 0.14, "elbo"),
    _table_1a(300, -90.63, 0.12, "elbo"),
    _table_1a(20, -88.06, 0.08, "iwae", num_samples=10),
    _table_1a(100, -88.07, 0.06, "iwae", num_samples=10),
    _table_1a(300, -89.05, 0.08, "iwae", num_samples=10),
    _table_1a(20, -87.29, 0.08, "coupled", kernel="isir_disir", **_COUPLED),
    _table_1a(100, -86.75, 0.10, "coupled", kernel="isir_disir", **_COUPLED),
    _table_1a(300, -88.10, 0.08, "coupled", kernel="isir_disir", **_COUPLED),
    # At D = 100 and 300 the paper says of it that it is worse, with no value here.
    _table_1a(20, -90.70, 0.08, "coupled", kernel="isir", **_COUPLED),
)


def _burda(
    dataset: tuple[tuple[str, str], ...], images: int, num_samples: int, value: float
) -> Published:
    return Published(
        source="Burda et al 2016, one stochastic layer",
        value=value,
        error=None,
        evaluator="importance sampling with 5,000 samples, all images",
        alike=Evaluator("test", "importance", 5_000, images),
        datasets=dataset,
        # With one sample the two are the same bound.
        estimators=("elbo", "iwae") if num_samples == 1 else ("iwae",),
        model="mlp",
        settings=_PLAIN
        | {"model.latent_dim": 50, "model.hidden": [200, 200], "model.activation": "tanh"}
        | {"estimator.num_samples": num_samples},
        protocol={
            "optimizer._target_": "adam",
            "optimizer.lr": 1e-3,
            "optimizer.eps": 1e-4,
            "optimizer.schedule": "burda",
            "trainer.batch_size": 20,
            "estimator.dreg": False,
            "model.initialization": "glorot",
        },
        epochs=3_280,
    )


_STATIC = (("mnist", "static"), ("mnist_larochelle", "static"))
_DYNAMIC = (("mnist_dynamic", "dynamic"),)
_OMNIGLOT = (("omniglot", "dynamic"),)

# A 200-200 tanh network on either side, D = 50.
BURDA = (
    _burda(_STATIC, 10_000, 1, -88.71),
    _burda(_STATIC, 10_000, 5, -87.63),
    _burda(_STATIC, 10_000, 50, -87.10),
    _burda(_DYNAMIC, 10_000, 1, -86.76),
    _burda(_DYNAMIC, 10_000, 5, -85.54),
    _burda(_DYNAMIC, 10_000, 50, -84.78),
    _burda(_OMNIGLOT, 8_070, 1, -108.11),
    _burda(_OMNIGLOT, 8_070, 5, -106.12),
    _burda(_OMNIGLOT, 8_070, 50, -104.67),
)

PUBLISHED = TABLE_1A + BURDA
