"""Runs the commands in this process, each test in a folder of its own."""

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ucvae import checkpoint
from ucvae.cli import eval as eval_command
from ucvae.cli import report as report_command
from ucvae.cli import train as train_command

COMMANDS = {
    "ucvae-train": train_command.main,
    "ucvae-eval": eval_command.main,
    "ucvae-report": report_command.main,
}


@dataclass
class Finished:
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """A function that runs one of the commands in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *arguments])
        with logging_kept():
            code = COMMANDS[name]()
        return Finished(code, *capsys.readouterr())

    return run


@contextmanager
def logging_kept():
    """Put logging back as it was: one command's ``hydra.verbose`` must not reach the next."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    loggers = [root, *map(logging.getLogger, list(root.manager.loggerDict))]
    levels = [logger.level for logger in loggers]
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@pytest.fixture
def train(command):
    """A function that runs ``ucvae-train`` in ``tmp_path``."""
    return lambda *arguments: command("ucvae-train", *arguments)


@dataclass
class Call:
    settings: object
    data: object
    device: object
    folder: Path
    resume: bool


@pytest.fixture
def calls(monkeypatch):
    """Training replaced by a list of what it was asked to do, and the checkpoints it leaves."""
    made = []

    def run(settings, data, device, folder, resume):
        made.append(Call(settings, data, device, folder, resume))
        (folder / "checkpoints").mkdir(exist_ok=True)
        model = settings.model.build(data.train_mean, data.levels).state_dict()
        for name in ("last.pt", "best.pt"):
            state = {"config": settings.raw, "model": model, "epoch": 1}
            state["split_sha256"] = data.split_sha256
            checkpoint.save(folder / "checkpoints" / name, state)

    monkeypatch.setattr("ucvae.training.run", run)
    return made
