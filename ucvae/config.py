"""The typed schema behind the YAML files.

Each component (data set, model, estimator, ...) is an annotated dataclass in its own room, and its
YAML file names it by ``_target_``. The annotations are the schema: :func:`build` checks names and
types against them, and the dataclass checks ranges in ``__post_init__`` by raising a
``ValueError`` whose message begins with the field's name. So a new component needs one file and
one YAML, and no second list of its keys.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ucvae.errors import ConfigError


def build(node: DictConfig, key: str) -> Any:
    """Make the component that ``node._target_`` names, checked against its annotations.

    Args:
        node: a component's configuration; ``_target_`` is the dotted name of a dataclass, the
            other entries are its fields.
        key: where the node stands in the whole configuration, for messages.

    Raises:
        ConfigError: one line that names the full key and what is allowed.
    """
    values = OmegaConf.to_container(node, resolve=True)
    target = values.pop("_target_", None)
    component = _locate(target, key)
    fields = [field.name for field in dataclasses.fields(component) if field.init]
    for name in values:
        if name not in fields:
            raise ConfigError(f"{key}.{name}: no such key; allowed: {', '.join(sorted(fields))}")
    hints = get_type_hints(component)
    schema = OmegaConf.structured(component)
    for name, value in values.items():
        try:
            schema[name] = value
        except OmegaConfBaseException:
            raise ConfigError(
                f"{key}.{name}: {value!r} is not {describe_type(hints[name])}"
            ) from None
    try:
        return OmegaConf.to_object(schema)
    except ValueError as error:
        raise ConfigError(f"{key}.{error}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None


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
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(member.name for member in hint)}"
    arguments = getattr(hint, "__args__", ())
    if type(None) in arguments:
        inner = [argument for argument in arguments if argument is not type(None)]
        return " or ".join(describe_type(argument) for argument in inner) + " or null"
    if getattr(hint, "__origin__", None) is list:
        return f"a list, each entry {describe_type(arguments[0])}"
    return names.get(hint, str(hint))


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds; for range checks of settings."""
    if not condition:
        raise ValueError(message)
