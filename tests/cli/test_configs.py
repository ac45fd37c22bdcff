"""Every shipped YAML composes, and its component is built from what it says."""

import dataclasses
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from ucvae.config import GROUPS, choices, config_dir, eval_settings, train_settings

CHOICES = [f"{group}={choice}" for group in (*GROUPS, "experiment") for choice in choices(group)]


@pytest.fixture
def compose():
    import ucvae.cli._hydra  # noqa: F401  (registers the resolvers)

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
