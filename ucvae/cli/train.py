"""``ucvae-train``: data, training, and the test log-likelihood of the best checkpoint."""

from __future__ import annotations

import dataclasses
import enum
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from ucvae import results
from ucvae.cli import _command, _hydra, _runs, _team
from ucvae.config import GROUPS, TrainSettings, flatten, train_settings
from ucvae.device import place, resolve
from ucvae.errors import ConfigError, RunError
from ucvae.stopping import Stopped

if TYPE_CHECKING:
    from ucvae.data.base import ImageData
    from ucvae.models.vae import VAE

log = logging.getLogger(__name__)

# What a resumed run may change: how far it goes and where it runs, not what it computes.
FREE_KEYS = (
    "data_dir",
    "device",
    "resume",
    "study",
    "trainer.checkpoint_every",
    "trainer.cuda_graphs",
    "trainer.log_every",
    "trainer.max_epochs",
    "trainer.max_seconds",
    "trainer.patience",
)


def main() -> int:
    """Run the command on ``sys.argv`` and return its exit code."""
    return _team.main(COMMAND, together=True)


def rewrite(given: list[str], sweep: bool) -> list[str]:
    """Put the overrides of the run to resume before those given, and send the job to its folder.

    Raises:
        ConfigError: ``resume`` is given together with a sweep or another folder.
        RunError: the folder is no run that can be resumed.
    """
    asked = [text for text in given if _hydra.override_key(text) == "resume"]
    if asked and sweep:
        raise ConfigError("resume: goes on with one run; leave out -m")
    folder = _hydra.override_value(asked[-1]) if asked else None
    if folder is None:
        return given
    if any(_hydra.override_key(text) == "hydra.run.dir" for text in given):
        raise ConfigError("resume: goes on in the run's own folder; leave out hydra.run.dir")
    if folder == "":
        raise ConfigError("resume must name the folder of a run of ucvae-train, got nothing")
    folder = str(folder)
    replaced = {_hydra.override_key(text) for text in given}
    kept = [text for text in _saved(Path(folder)) if not _replaces(replaced, text)]
    kept = [_located(text, Path(folder)) for text in kept]
    return [*kept, *given, f"hydra.run.dir={_hydra.quote(folder)}"]


def _replaces(keys: set[str], saved: str) -> bool:
    """Whether a saved override is to go: its key, or the study that it is a setting of, is new."""
    key = _hydra.override_key(saved)
    return key in keys or ("study" in keys and key.startswith("study."))


def _saved(folder: Path) -> list[str]:
    if not os.path.isdir(folder):
        raise RunError(f"resume={folder}: no such folder; give the folder of a run of ucvae-train")
    overrides = folder / ".hydra" / "overrides.yaml"
    found = {
        ".hydra/overrides.yaml": os.path.isfile(overrides),
        "checkpoints/last.pt": _runs.begun(folder),
    }
    for needed, there in found.items():
        if not there:
            raise RunError(f"resume={folder}: no {needed} there, so there is no run to go on with")
    try:
        saved = OmegaConf.to_container(OmegaConf.load(overrides), resolve=False)
        if not isinstance(saved, list) or not all(isinstance(text, str) for text in saved):
            raise ValueError("it is no list of texts")
        for text in saved:
            _hydra.override_value(text)
    except Exception as error:  # what a damaged file makes the parser raise can be anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        name = overrides.relative_to(folder)
        raise RunError(f"resume={folder}: {name} is damaged ({reason})") from error
    return saved


def _located(saved: str, folder: Path) -> str:
    """Make a saved ``start_from`` absolute, which counts from where the run was asked for."""
    start = _hydra.override_value(saved) if _hydra.override_key(saved) == "start_from" else None
    if start is None or os.path.isabs(str(start)):
        return saved
    try:
        hydra = OmegaConf.load(folder / ".hydra" / "hydra.yaml")
        given = os.path.join(OmegaConf.select(hydra, "hydra.runtime.cwd"), str(start))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"resume={folder}: .hydra/hydra.yaml does not tell what start_from={start} counts from "
            f"({reason}); give start_from=PATH too"
        ) from error
    return f"start_from={_hydra.quote(given)}"


def prepare(settings: TrainSettings) -> Callable[[Path], Any]:
    """Find the device and the data, and return the training as a function of the run's folder."""
    device = resolve(settings.device, place())
    if settings.resume is not None:
        trained_on = _refuse_changes(settings, Path(settings.resume))
    data = settings.dataset.load(_runs.data_folder(settings.data_dir))
    if settings.resume is not None:
        # While the folder has the settings that the run was made with, not yet those asked for.
        _refuse_other_data(trained_on, data, Path(settings.resume))
    model = _runs.unfitted(settings.model, data)
    if settings.start_from is not None:
        if settings.resume is None:
            _refuse_another_model(settings, data, model)
        start = _absolute(settings.start_from)
        raw = settings.raw | {"start_from": start}  # a later command may be given elsewhere
        settings = dataclasses.replace(settings, start_from=start, raw=raw)
    settings.estimator.check(model)
    if settings.study is not None:
        settings.study.check(model, data)

    def work(folder: Path) -> Any:
        from ucvae import training

        done = _done_before(settings, data, folder)
        if done is not None:
            return done
        if settings.trainer.batch_size > len(data.train):
            log.warning(
                "trainer.batch_size=%d: a step takes all %d training images, as there are no more",
                settings.trainer.batch_size,
                len(data.train),
            )
        _tell_of_idle_settings(settings)
        _team.start(settings, data, device, folder)
        try:
            return training.run(settings, data, device, folder, continues(settings))
        except Stopped as stop:
            saved = _runs.begun(folder)
            size = place().size
            again = ":" if size == 1 else f" {size} processes again by"
            command = _hydra.how_to_go_on("ucvae-train", "resume", str(folder), HydraConfig.get())
            hint = f"; go on with{again} {command}" if saved else ""
            raise _command.Interrupted(f"{stop}{hint}", stop.signal) from None

    return work


def _tell_of_idle_settings(settings: TrainSettings) -> None:
    """Warn of what was given and changes nothing: a sweep over it would be in vain."""
    given = {_hydra.override_key(text) for text in HydraConfig.get().overrides.task}
    for group in ("estimator", "optimizer", "trainer"):
        # One's own optimizer need not inherit anything.
        idle: dict[str, str] = getattr(getattr(settings, group), "without_effect", dict)()
        for name, reason in idle.items():
            if f"{group}.{name}" in given:
                log.warning("%s.%s has no effect: %s", group, name, reason)


def _refuse_changes(settings: TrainSettings, folder: Path) -> dict[str, str]:
    """Refuse to go on otherwise than a run was made; return the hashes of its data."""
    from ucvae import checkpoint

    path, state, _ = checkpoint.load_last(folder, config=dict, split_sha256=dict)
    before, here = 1 + len(state.get("noise_of_others", [])), place()
    if before != here.size:
        raise RunError(
            f"resume={settings.resume}: the run was made by {before} "
            f"process{'es' * (before > 1)}, each with random numbers of its own, and cannot go on "
            f"with {here.size}"
        )
    changed = _changes(_runs.trained_settings(state["config"], path), settings)
    if changed:
        raise RunError(
            f"resume={settings.resume}: the run was made with other values of "
            f"{', '.join(changed)}; only these may change: {', '.join(FREE_KEYS)}"
        )
    done, most = state.get("epoch", 0), settings.trainer.max_epochs
    if done > most:
        raise RunError(
            f"resume={settings.resume}: trainer.max_epochs={most}, but the run has done {done:,} "
            f"epochs already; give {done} to end it there, or more"
        )
    return state["split_sha256"]


def _refuse_other_data(trained_on: dict[str, str], data: ImageData, folder: Path) -> None:
    from ucvae import checkpoint

    checkpoint.require_same_data(trained_on, data.name, data.split_sha256, folder)


def _refuse_another_model(settings: TrainSettings, data: ImageData, model: VAE) -> None:
    from ucvae import checkpoint

    start_from = _hydra.from_here(str(settings.start_from))
    path, state, _ = checkpoint.load_start(start_from)
    trained = _runs.trained_settings(state["config"], path)
    changed = [
        text
        for text in _changes(trained, settings)
        if text.startswith("model.")
        and not text.startswith("model.initialization ")  # its weights are replaced
    ]
    if changed:
        raise RunError(
            f"start_from={start_from}: the run has another model, by {', '.join(changed)}; give "
            "the new run the same"
        )
    with checkpoint.fitting(path):
        try:
            model.load_state_dict(state["model"])
        except RuntimeError as error:
            if state.get("dataset", data.name) == data.name:
                raise
            raise RunError(
                f"start_from={start_from}: its model is one of {state['dataset']}, whose images "
                f"are of another size or kind than those of {data.name}"
            ) from error


def _changes(then: TrainSettings, now: TrainSettings) -> list[str]:
    """Name what a run would compute in another way, with both values."""
    before, after = _computed(then), _computed(now)
    return [
        f"{key} (was {before.get(key, 'absent')}, now {after.get(key, 'absent')})"
        for key in sorted((before.keys() | after.keys()) - set(FREE_KEYS))
        if before.get(key, "absent") != after.get(key, "absent")
    ]


def _computed(settings: TrainSettings) -> dict[str, Any]:
    """Return what a run computes, by dotted key: its seed, start, components and all their fields.

    Not the configuration as it was written: a field that came with a later version has its
    default in the components of an older run.
    """
    start = settings.start_from
    found: dict[str, Any] = {"seed": settings.seed, "start_from": start and _absolute(start)}
    for group in GROUPS:
        if group in FREE_KEYS:
            continue
        found[group] = _fields(getattr(settings, group))
    leaves = flatten(found)
    return {key: leaf.name if isinstance(leaf, enum.Enum) else leaf for key, leaf in leaves.items()}


def _absolute(path: str) -> str:
    return os.path.abspath(_hydra.from_here(path))


def _fields(component: Any) -> dict[str, Any]:
    """Return the class and settings of a component, and those of its parts in mappings within."""
    kind = type(component)
    found: dict[str, Any] = {"_target_": f"{kind.__module__}.{kind.__qualname__}"}
    for field in dataclasses.fields(component):
        if field.init:
            value = getattr(component, field.name)
            found[field.name] = _fields(value) if dataclasses.is_dataclass(value) else value
    return found


def continues(settings: TrainSettings) -> bool:
    """Say whether the run goes on with one that its folder holds."""
    return settings.resume is not None


def finished(settings: TrainSettings, folder: Path) -> dict[str, Any] | None:
    """Return the result of a run that was asked for the same; None if it has more to do.

    Raises:
        RunError: the folder holds another run, or a damaged result.
    """
    path = folder / "result.json"
    if not os.path.exists(path):
        return None
    result = results.read(path)
    then = _runs.trained_settings(result.get("config") or {}, path)
    changed = _changes(then, settings)
    if changed:
        raise RunError(
            f"{folder} holds a run that was made with other values of {', '.join(changed)}; choose "
            "another folder"
        )
    return None if _further(then, settings) else result


def _further(then: TrainSettings, now: TrainSettings) -> bool:
    """Say whether other limits or another study are asked for than of a run before."""
    limits = ("max_epochs", "max_seconds", "patience")
    others = [getattr(then.trainer, name) != getattr(now.trainer, name) for name in limits]
    return any(others) or then.study != now.study


def _done_before(settings: TrainSettings, data: ImageData, folder: Path) -> dict[str, Any] | None:
    """Return the result of a run that is resumed and has no more to do, and tell of it."""
    from ucvae import checkpoint

    path = folder / "result.json"
    if not continues(settings) or place().size > 1 or not os.path.exists(path):
        return None
    _, state, _ = checkpoint.load_last(folder)
    try:
        result = results.read(path)
        then = _runs.trained_settings(result["config"], path)
        if (
            _changes(then, settings)
            or _further(then, settings)
            or result["split_sha256"] != data.split_sha256
            or result["epochs"] != state.get("epochs", state.get("epoch"))
        ):
            return None
        summary = results.summary(result, folder, settings.study)
    except (RunError, AttributeError, KeyError, TypeError, ValueError) as error:
        said = error if isinstance(error, RunError) else f"result: {path} is damaged ({error!r})"
        log.warning("%s; the test is made anew", said)
        return None
    log.info("nothing was left to do; the run had finished before:")
    log.info("%s", summary)
    return result


def take_up(settings: TrainSettings, folder: Path) -> TrainSettings:
    """Go on with the run in the folder, if it has come to its first checkpoint."""
    if _runs.begun(folder):
        return dataclasses.replace(settings, resume=str(folder))
    return settings


COMMAND = _command.Command(
    name="ucvae-train",
    config_name="train",
    path_keys=("resume", "start_from", "data_dir", "hydra.run.dir"),
    rewrite=rewrite,
    check=train_settings,
    prepare=prepare,
    continues=continues,
    finished=finished,
    take_up=take_up,
    resume_key="resume",
)
