"""Every shipped YAML composes, and its component is built from what it says."""

import dataclasses
from argparse import Namespace
from pathlib import Path

import hydra
import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from ucvae.cli import _hydra
from ucvae.config import GROUPS, choices, config_dir, eval_settings, train_settings

CHOICES = [f"{group}={choice}" for group in (*GROUPS, "experiment") for choice in choices(group)]


@pytest.fixture
def compose():
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield lambda name, *overrides: hydra.compose(name, list(overrides))


def test_the_checkout_has_its_configs():
    assert config_dir() == Path(__file__).resolve().parents[2] / "configs"
    assert set(GROUPS) < {path.name for path in config_dir().iterdir()}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_is_built(choice, compose):
    config = compose("train", choice)
    settings = train_settings(config)
    group = choice.partition("=")[0]
    if group == "experiment":
        return
    node = OmegaConf.to_container(config[group], resolve=True)
    component = getattr(settings, group)
    kind = type(component)
    assert node.pop("_target_") == f"{kind.__module__}.{kind.__qualname__}"
    # A field that the YAML leaves out could not be set from the command line.
    assert set(node) == {field.name for field in dataclasses.fields(kind)}
    assert same(component, node)


def same(component, node):
    """Whether the fields of a component, and of its parts, are what a node says."""
    if not dataclasses.is_dataclass(component):
        return getattr(component, "name", component) == node
    return all(same(getattr(component, name), value) for name, value in node.items())


def test_plain_settings_are_rebuilt_from_what_a_checkpoint_keeps(compose):
    settings = train_settings(compose("train"))
    assert train_settings(settings.raw) == settings


def test_defaults_of_evaluation(compose):
    settings = eval_settings(compose("eval", "run=a"))
    assert (settings.run, settings.split, settings.data_dir) == ("a", "test", None)
    assert settings.evaluator.num_samples == 5000


def jobs(*overrides):
    """The settings of each job of a sweep."""
    here = Namespace(config_path=None, config_dir=None, config_name=None)
    with _hydra.session("train", here) as session:
        overrides = session.over_the_experiment(list(overrides))
        config = session.compose(overrides, RunMode.MULTIRUN)
        return [
            train_settings(_hydra.without_hydra(session.compose_job(config, job, number)))
            for number, job in enumerate(session.jobs(config))
        ]


def described(settings):
    estimator = settings.estimator
    kernel = getattr(estimator, "kernel", None)
    name = type(estimator).__name__.lower() + (f" {kernel.value}" if kernel else "")
    return name, settings.model.latent_dim, settings.seed


@pytest.mark.slow
def test_table_1a_is_a_sweep():
    found = jobs("experiment=paper_table1a")
    names = ("elbo", "iwae", "coupled isir_disir", "coupled isir")
    assert sorted(map(described, found)) == sorted(
        (name, dim, seed) for name in names for dim in (20, 100, 300) for seed in (0, 1, 2)
    )
    for settings in found:
        assert settings.dataset.binarization == "static" and settings.trainer.max_epochs == 300
        assert settings.evaluator.temperatures == 10_000
        if described(settings)[0].startswith("coupled"):
            coupled = settings.estimator
            assert (coupled.num_samples, coupled.lag, coupled.burn_in) == (10, 10, 1)
            assert (coupled.max_steps, coupled.survival) == (1000, 0)
            assert coupled.proposals.name == "encoder"
        else:
            assert settings.estimator.num_samples == (10 if "iwae" in described(settings) else 1)
        assert settings.model.hidden == [200, 200] and settings.model.activation.name == "relu"
        assert settings.optimizer.lr == 5e-4 and settings.trainer.batch_size == 100
        assert type(settings.optimizer).__name__ == "RMSProp"
        assert settings.trainer.valid_refinements > 0


@pytest.mark.parametrize(
    "name, data, model, batch_size",
    [
        ("paper_table1b", "FashionMnist", "Mlp", 100),
        ("paper_table1b_cifar10", "Cifar10", "Conv", 50),
        ("paper_fig3", "FashionMnist", "Mlp", 100),
    ],
)
def test_the_protocol_of_table_1b(name, data, model, batch_size):
    for settings in jobs(f"experiment={name}", "seed=0"):
        assert type(settings.dataset).__name__ == data
        assert type(settings.model).__name__ == model and settings.model.latent_dim == 100
        assert type(settings.optimizer).__name__ == "RMSProp" and settings.optimizer.lr == 1e-4
        trainer = settings.trainer
        assert (trainer.batch_size, trainer.max_epochs) == (batch_size, 300)
        # The encoder's samples would have a coupled run tested as IWAE left it at the switch.
        assert trainer.valid_refinements > 0
        assert settings.evaluator.temperatures == 10_000


def test_what_is_given_narrows_the_sweep():
    given = ("experiment=paper_table1a", "estimator=iwae", "model.latent_dim=20", "seed=3,4")
    assert list(map(described, jobs(*given))) == [("iwae", 20, 3), ("iwae", 20, 4)]


@pytest.mark.parametrize(
    "name, epochs",
    [
        ("paper_table1b", 200),
        ("paper_table1b_cifar10", 200),
        ("paper_table1b_short", 1),
        ("paper_fig3", 200),
    ],
)
def test_the_warm_start_is_for_coupled_alone(name, epochs):
    for settings in jobs(f"experiment={name}", "seed=0"):
        coupled = described(settings)[0].startswith("coupled")
        assert settings.trainer.switch.epochs == (epochs if coupled else 0)


@pytest.mark.parametrize("name", ["burda_mnist", "burda_omniglot"])
def test_burdas_protocol(name):
    found = jobs(f"experiment={name}")
    assert sorted((s.estimator.num_samples, s.seed) for s in found) == sorted(
        (count, seed) for count in (1, 5, 50) for seed in (0, 1, 2)
    )
    for settings in found:
        assert not settings.estimator.dreg and settings.dataset.binarization == "dynamic"
        assert (settings.model.latent_dim, settings.model.activation.name) == (50, "tanh")
        assert (settings.optimizer.lr, settings.optimizer.eps) == (1e-3, 1e-4)
        assert settings.optimizer.schedule.name == "burda"
        assert (settings.trainer.batch_size, settings.trainer.max_epochs) == (20, 3280)
        assert settings.evaluator.num_samples == 5000


@pytest.mark.parametrize(
    ("dataset", "dynamic"),
    [
        ("digits", False),
        ("mnist", False),
        ("mnist_larochelle", False),
        ("mnist_dynamic", True),
        ("omniglot", True),
    ],
)
def test_what_is_remembered_of_bits_that_change_is_refined_first_and_follows_the_encoder(
    dataset, dynamic, compose
):
    snis, coupled = (
        train_settings(compose("train", f"estimator={name}", f"dataset={dataset}")).estimator
        for name in ("snis", "coupled")
    )
    assert (snis.refine_known, snis.refinements) == ((True, 2) if dynamic else (False, 16))
    assert snis.follow_encoder is coupled.follow_encoder is dynamic
    assert coupled.refinements == 16
    paper = train_settings(compose("train", "estimator=coupled_paper_isir", f"dataset={dataset}"))
    assert not paper.estimator.follow_encoder  # it remembers nothing


@pytest.mark.parametrize(("dataset", "given"), [("omniglot", "false"), ("mnist", "true")])
def test_the_settings_for_bits_that_change_can_be_overridden(dataset, given, compose):
    names = ("refine_known", "follow_encoder")
    chosen = ["estimator.refinements=5", *(f"estimator.{name}={given}" for name in names)]
    settings = train_settings(compose("train", "estimator=snis", f"dataset={dataset}", *chosen))
    assert all(getattr(settings.estimator, name) is (given == "true") for name in names)
    assert settings.estimator.refinements == 5


def test_the_arms_at_equal_time():
    found = jobs("experiment=glob(equal_time_*)", "trainer.max_seconds=7")
    arms = {(described(s)[0], s.estimator.num_samples, s.trainer.switch.epochs > 0) for s in found}
    assert len(found) == len(arms) == 7
    assert {(name, warm) for name, _, warm in arms if name.startswith("coupled")} == {
        ("coupled isir", False), ("coupled isir", True), ("coupled isir_disir", False)
    }  # fmt: skip
    assert all(s.trainer.max_seconds == 7 and s.trainer.max_epochs == 1_000_000 for s in found)
    assert all(s.trainer.valid_refinements > 0 and s.evaluator.refinements > 0 for s in found)
    # IWAE is thinned alike wherever it is: alone, with more samples, and before a switch.
    iwaes = [s.estimator for s in found if described(s)[0].startswith("iwae")]
    iwaes += [s.trainer.switch for s in found if s.trainer.switch.epochs > 0]
    assert [iwae.min_weight for iwae in iwaes] == [0.1] * 3
