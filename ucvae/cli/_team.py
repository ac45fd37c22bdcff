"""A command in several processes: the first runs it, the others do what it asks for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ucvae.cli import _main, _runs
from ucvae.cli._command import Command
from ucvae.config import TrainSettings, train_settings
from ucvae.device import Place, place, resolve
from ucvae.errors import RunError, UcvaeError
from ucvae.stopping import Stopped

if TYPE_CHECKING:
    import torch

    from ucvae.data.base import ImageData
    from ucvae.distributed import Team


class Order(NamedTuple):
    """What the leader asks the other processes to do.

    Attributes:
        config: the whole configuration.
        device: its type.
        folder: of the run.
        resume: go on with what it holds.
        split_sha256: of the data.
    """

    config: dict[str, Any]
    device: str
    folder: Path
    resume: bool
    split_sha256: dict[str, str]


# What stands where the leader's order will be.
_WAITING: Any = None


def main(command: Command, together: bool) -> int:
    """Run the command on ``sys.argv`` and return its exit code.

    Args:
        command: what to run.
        together: several processes, where there are, work together; else the first works alone.
    """
    try:
        here = place()
    except UcvaeError as error:
        return _main.end_with(command, error)
    if not together and here.rank:
        return 0
    if not together or here.alone:
        return _main.main(command)
    from ucvae import distributed

    try:
        with distributed.joined(here, command.tell) as team:
            return _lead(command, team) if team.leads else _follow(team, here)
    except UcvaeError as error:
        return _main.end_with(command, error)


def start(settings: TrainSettings, data: ImageData, device: torch.device, folder: Path) -> None:
    """Have the other processes, if there are any, train with this one."""
    from ucvae import distributed

    resume = settings.resume is not None
    order = Order(settings.raw, device.type, folder, resume, data.split_sha256)
    distributed.team().order(order)


def _lead(command: Command, team: Team) -> int:
    code = 1
    try:
        code = _main.main(command)
        return code
    except SystemExit as end:  # Hydra's, after a flag that only shows something
        code = int(end.code or 0)
        raise
    finally:
        if code:
            team.fall_silent()
        if not team.ordered:
            team.order(code)


def _follow(team: Team, here: Place) -> int:
    logging.disable(logging.WARNING)  # the leader logs
    with team.watched():
        order: Order | int = team.first(_WAITING)
    if isinstance(order, int):
        return order
    try:
        with team.watched(order.folder):
            settings = train_settings(order.config)
            device = resolve(order.device, here)
            data = settings.dataset.load(_runs.data_folder(settings.data_dir))
            if data.split_sha256 != order.split_sha256:
                raise RunError(
                    f"data_dir={settings.data_dir}: other data here than those of rank 0 "
                    f"({data.name}: another SHA-256)"
                )
            from ucvae import training

            training.run(settings, data, device, order.folder, order.resume)
    except Stopped as stop:
        return 128 + stop.signal
    return 0
