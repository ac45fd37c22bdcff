"""The typed schema behind the YAML files.

Each component (data set, model, estimator, ...) is an annotated dataclass in its own room, and its
YAML file names it by ``_target_``. The annotations are the schema: :func:`build` checks names and
types against them, and the dataclass checks ranges in ``__post_init__`` by raising a
``ValueError`` whose message begins with the field's name. So a new component needs one file and
one YAML, and no second list of its keys. A field of type ``Any`` with an enumeration as
``metadata["named"]`` takes one of its names, or a component of one's own in their place. The few
keys outside any component are checked in the same way, by :func:`train_settings` and
:func:`eval_settings`.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from ucvae.errors import ConfigError

GROUPS = ("dataset", "estimator", "model", "optimizer", "trainer", "evaluator", "study")
# Those that may be null: nothing of the kind is done.
OPTIONAL = ("study",)


class Checkpoint(enum.Enum):
    """Which of a run's models is evaluated."""

    best = "best"  # by validation
    last = "last"


@dataclass(frozen=True)
class TrainSettings:
    """What a training run is asked to do: checked values and the components built from them.

    Attributes:
        seed: the root of every random draw, from 0 to 2**32 - 1.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, not yet resolved.
        data_dir: where data sets are looked for.
        resume: the run folder to go on with, or None for a new run.
        start_from: the run folder, or the checkpoint, whose model a new run starts with; None for
            random weights.
        dataset, estimator, model, optimizer, trainer, evaluator: one component of each group.
        raw: the whole configuration, interpolations resolved, in plain dicts, lists and scalars.
        study: what is done with the trained model after its test, or None.
    """

    seed: int
    device: str
    data_dir: str
    resume: str | None
    start_from: str | None
    dataset: Any
    estimator: Any
    model: Any
    optimizer: Any
    trainer: Any
    evaluator: Any
    raw: dict[str, Any]
    study: Any = None


@dataclass(frozen=True)
class EvalSettings:
    """What an evaluation of a finished run is asked to do.

    Attributes:
        run: the folder of the run.
        split: ``train``, ``valid`` or ``test``.
        checkpoint: the run's best model, or its last.
        data_dir: where data sets are looked for, or None for where the run looked.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, not yet resolved.
        seed: the root of the evaluator's draws, from 0 to 2**32 - 1.
        evaluator: the component that estimates the log-likelihood.
        raw: the whole configuration in plain dicts, lists and scalars.
        study: what is done in the evaluator's place, or None.
    """

    run: str
    split: str
    checkpoint: Checkpoint
    data_dir: str | None
    device: str
    seed: int
    evaluator: Any
    raw: dict[str, Any]
    study: Any = None


@dataclass
class _TrainKeys:
    seed: int = 0
    device: str = "auto"
    data_dir: str = "data"
    resume: str | None = None
    start_from: str | None = None

    def __post_init__(self) -> None:
        _require_seed(self.seed)
        require(self.data_dir != "", "data_dir must name a folder, got nothing")
        require(
            self.start_from != "",
            "start_from must name the folder of a run of ucvae-train, or a checkpoint, got nothing",
        )


@dataclass
class _EvalKeys:
    run: str | None = None
    split: str = "test"
    checkpoint: Checkpoint = Checkpoint.best
    data_dir: str | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _require_seed(self.seed)
        splits = ("train", "valid", "test")
        require(
            self.split in splits, f"split must be one of {', '.join(splits)}, got {self.split!r}"
        )
        require(self.run is not None, "run: missing; usage: ucvae-eval run=RUN_DIR [KEY=VALUE ...]")


def train_settings(config: DictConfig | Mapping[str, Any]) -> TrainSettings:
    """Check a training configuration and build its components.

    Args:
        config: the composed configuration, or the plain one that a checkpoint keeps.

    Raises:
        ConfigError: one line that names the full key and what is allowed.
    """
    raw, keys, components = _settings(config, _TrainKeys, GROUPS)
    return TrainSettings(**vars(keys), **components, raw=raw)


def eval_settings(config: DictConfig | Mapping[str, Any]) -> EvalSettings:
    """Check an evaluation's configuration and build its evaluator and its study.

    Raises:
        ConfigError: one line that names the full key and what is allowed.
    """
    raw, keys, components = _settings(config, _EvalKeys, ("evaluator", "study"))
    return EvalSettings(**vars(keys), **components, raw=raw)


def _settings(
    config: DictConfig | Mapping[str, Any], keys: type, groups: tuple[str, ...]
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Split a configuration into its plain copy, its root keys and its components."""
    raw = _plain(config, "configuration")
    outside = {name: value for name, value in raw.items() if name not in groups}
    root = _check(keys, outside, "", groups)
    nodes = {group: raw.get(group) for group in groups}
    components = {
        group: None if node is None and group in OPTIONAL else build(node, group)
        for group, node in nodes.items()
    }
    return raw, root, components


def build(node: DictConfig | Mapping[str, Any] | None, key: str) -> Any:
    """Make the component that ``node._target_`` names, checked against its annotations.

    Args:
        node: a component's configuration; ``_target_`` is the dotted name of a dataclass, the
            other entries are its fields.
        key: where the node stands in the whole configuration, for messages.

    Raises:
        ConfigError: one line that names the full key and what is allowed.
    """
    if not isinstance(node, Mapping):
        found = ", ".join(choices(key)) or "none found"
        raise ConfigError(f"{key}={show(node)}: no such choice; allowed: {found}")
    values = _plain(node, key)
    return _check(_locate(values.pop("_target_", None), key), values, key)


def _check(component: type, values: dict[str, Any], key: str, others: Iterable[str] = ()) -> Any:
    """Make a ``component`` of ``values``; ``others`` are further names allowed at this place."""
    prefix = f"{key}." if key else ""
    fields = dataclasses.fields(component)
    names = [field.name for field in fields if field.init]
    for name in values:
        if name not in names:
            raise ConfigError(unknown_key(f"{prefix}{name}", [*names, *others]))
    named = {field.name: field.metadata["named"] for field in fields if "named" in field.metadata}
    hints = get_type_hints(component) | named
    schema = OmegaConf.structured(component)
    for name, value in values.items():
        wrong = isinstance(value, float) and not math.isfinite(value)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(hints[name]):
            value = _check(hints[name], dict(value), f"{prefix}{name}")
        elif isinstance(value, Mapping) and name in named:
            value = build(value, f"{prefix}{name}")
        elif name in named:
            wrong = str(value) not in named[name].__members__
        try:
            schema[name] = value
        except (OmegaConfBaseException, OverflowError):  # a whole number beyond any float
            wrong = True
        if wrong:
            raise ConfigError(f"{prefix}{name}: {show(value)} is not {describe_type(hints[name])}")
    try:
        return OmegaConf.to_object(schema)
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None


def _plain(config: DictConfig | Mapping[str, Any], key: str) -> dict[str, Any]:
    node = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    try:
        plain: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        return plain
    except InterpolationResolutionError as error:
        message = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key or key}: {message}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or key}: a value is missing") from None


def _locate(target: Any, key: str) -> type:
    if not isinstance(target, str) or "." not in target:
        raise ConfigError(f"{key}._target_: {target!r} does not name a class")
    module_name, _, class_name = target.rpartition(".")
    try:
        component = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}._target_: cannot import {target}: {error}") from None
    if not (isinstance(component, type) and dataclasses.is_dataclass(component)):
        raise ConfigError(f"{key}._target_: {target} is not a dataclass")
    return component


def describe_type(hint: Any) -> str:
    """Say in words what values an annotation allows."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if dataclasses.is_dataclass(hint):
        return f"a group of keys: {', '.join(field.name for field in dataclasses.fields(hint))}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(member.name for member in hint)}"
    arguments: tuple[Any, ...] = getattr(hint, "__args__", ())
    if type(None) in arguments:
        inner = [argument for argument in arguments if argument is not type(None)]
        return " or ".join(describe_type(argument) for argument in inner) + " or null"
    if getattr(hint, "__origin__", None) is list:
        return f"a list, each entry {describe_type(arguments[0])}"
    return names.get(hint, str(hint))


def show(value: Any) -> str:
    """Write a value as it would stand in YAML or on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or "nothing"


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings under dotted keys, each after ``prefix``.

    >>> flatten({"seed": 0, "estimator": {"lag": 10}})
    {'seed': 0, 'estimator.lag': 10}
    """
    leaves: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        leaves |= flatten(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return leaves


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds; for range checks of settings."""
    if not condition:
        raise ValueError(message)


def _require_seed(seed: int) -> None:
    require(0 <= seed < 2**32, f"seed must be a whole number from 0 to {2**32 - 1}, got {seed}")


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """Say that ``key`` (dotted) does not exist, and which names stand in its place."""
    return f"{key}: no such key; {_allowed(key.rpartition('.')[2], allowed)}"


def unknown_choice(group: str, choice: str, allowed: Iterable[str]) -> str:
    """Say that a group has no such choice, and which it has."""
    return f"{group}={choice}: no such choice; {_allowed(choice, allowed)}"


def _allowed(name: str, allowed: Iterable[str]) -> str:
    names = sorted(allowed)
    if not names:
        return "there are none"
    close = difflib.get_close_matches(name, names, n=1)
    return f"allowed: {', '.join(names)}" + (f"; did you mean {close[0]}?" if close else "")


def config_dir() -> Path:
    """Return the folder of the YAML files: inside an installed package, or atop a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def choices(group: str) -> list[str]:
    """List what a configuration group offers, in alphabetical order."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
