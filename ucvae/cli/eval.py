"""``ucvae-eval``: evaluates a finished run again, or studies it.

The computation is :func:`ucvae.evaluation.rerun.run`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ucvae import results
from ucvae.cli import _command, _hydra, _runs, _team
from ucvae.config import EvalSettings, eval_settings
from ucvae.device import resolve, within_memory
from ucvae.errors import ConfigError, RunError


def main() -> int:
    """Run the command on ``sys.argv`` and return its exit code."""
    return _team.main(COMMAND, together=False)


def rewrite(given: list[str], sweep: bool) -> list[str]:
    """Return the overrides as they are.

    Raises:
        ConfigError: a study is asked for, and with it something of an evaluator, whose place it
            takes.
    """
    keys = [_hydra.override_key(text) for text in given]
    if any(text.startswith(("study=", "+study=", "experiment=")) for text in given):
        for key in keys:
            if key == "split" or key.partition(".")[0] == "evaluator":
                raise ConfigError(f"{key}: has no part in a study, whose own keys are study.KEY")
    return given


def continues(settings: EvalSettings) -> bool:
    """Say no: every evaluation gets a folder of its own."""
    return False


def check(config: DictConfig) -> EvalSettings:
    """Check the configuration, and that its run has a checkpoint to evaluate."""
    settings = eval_settings(config)
    if not settings.run:
        raise ConfigError("run must name the folder of a run of ucvae-train, got nothing")
    folder = Path(settings.run)
    if not os.path.isdir(folder):
        raise RunError(f"run={folder}: no such folder; give the folder of a run of ucvae-train")
    path = checkpoint_file(settings)
    if not os.path.isfile(path):
        name = path.relative_to(folder)
        raise RunError(f"run={folder}: no {name} there, so there is nothing to evaluate")
    return settings


def checkpoint_file(settings: EvalSettings) -> Path:
    """Return where the run keeps the state that is asked for."""
    return Path(settings.run) / "checkpoints" / f"{settings.checkpoint.value}.pt"


def prepare(settings: EvalSettings) -> Callable[[Path], Any]:
    """Find the device, the run and its data; return the evaluation as a function of its folder."""
    from ucvae import checkpoint

    device = resolve(settings.device)
    path = checkpoint_file(settings)
    state = checkpoint.load(path, config=dict, model=dict, split_sha256=dict, epoch=int | float)
    trained = _runs.trained_settings(state["config"], path)
    data_dir = trained.data_dir if settings.data_dir is None else settings.data_dir
    settings = dataclasses.replace(settings, data_dir=data_dir)
    data = trained.dataset.load(_runs.data_folder(data_dir))
    if settings.study is not None:
        settings.study.check(_runs.unfitted(trained.model, data), data)

    def work(folder: Path) -> Any:
        from ucvae.evaluation import rerun

        with within_memory():
            return rerun.run(settings, trained, state, data, device, folder)

    return work


def finished(settings: EvalSettings, folder: Path) -> dict[str, Any] | None:
    """Return the result of the same evaluation.

    Raises:
        RunError: the folder holds another one, or a damaged result.
    """
    path = folder / "result.json"
    if not os.path.exists(path):
        return None
    result = results.read(path)
    try:
        then = eval_settings(result.get("config") or {})
    except ConfigError as error:
        raise RunError(f"{path}: is of another version ({error}); choose another folder") from error
    if _asked(then) != _asked(settings):
        raise RunError(f"{folder} holds another evaluation; choose another folder")
    return result


def _asked(settings: EvalSettings) -> tuple[Any, ...]:
    """Return what decides the result, and not where it is computed."""
    run = Path(settings.run).resolve()
    asked = settings.split, settings.checkpoint, settings.seed, settings.evaluator, settings.study
    return run, *asked


def take_up(settings: EvalSettings, folder: Path) -> EvalSettings:
    """Return the settings as they are: what goes on is kept in the folder of the run."""
    return settings


COMMAND = _command.Command(
    name="ucvae-eval",
    config_name="eval",
    path_keys=("run", "data_dir", "hydra.run.dir"),
    rewrite=rewrite,
    check=check,
    prepare=prepare,
    continues=continues,
    finished=finished,
    take_up=take_up,
    resume_key=None,
)
