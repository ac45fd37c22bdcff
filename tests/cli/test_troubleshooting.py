"""Every message of docs/troubleshooting.md comes from the command above it, word for word."""

import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from ucvae import checkpoint
from ucvae.cli import _runs
from ucvae.stopping import Stopped

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
# A command and what it says.
ENTRIES = dict(re.findall(r"^```console\n(.*)\n```\n\n```text\n(.*\n)```$", PAGE, re.MULTILINE))
# Where the page's user works.
HOME = "/home/me"
# Short ways through the training that a message needs.
QUICK = ("estimator=elbo", "trainer.max_epochs=1", "evaluator.num_samples=10", "device=cpu")
RUN = "outputs/run"


class Place:
    """Where a command runs, and what is there before it does."""

    def __init__(self, train, monkeypatch, folder):
        self.train, self.monkeypatch, self.folder = train, monkeypatch, folder

    def run(self, *overrides):
        """A finished run, of which a training in name only leaves what a folder has."""

        def trained(settings, data, device, folder, resume):
            (folder / "checkpoints").mkdir()
            for name in ("last.pt", "best.pt"):
                state = {"config": settings.raw, "model": {}, "epoch": 1}
                checkpoint.save(
                    folder / "checkpoints" / name, state | {"split_sha256": data.split_sha256}
                )

        with self.monkeypatch.context() as patch:
            patch.setattr("ucvae.training.run", trained)
            assert self.train(f"hydra.run.dir={RUN}", *overrides).code == 0

    def real_run(self):
        assert self.train(f"hydra.run.dir={RUN}", *QUICK).code == 0

    def run_without_checkpoints(self):
        self.run()
        for path in (self.folder / RUN / "checkpoints").iterdir():
            path.unlink()

    def damaged_run(self):
        self.run()
        for path in (self.folder / RUN / "checkpoints").iterdir():
            path.write_bytes(path.read_bytes()[:100])

    def run_of_other_data(self):
        self.real_run()
        last = self.folder / RUN / "checkpoints" / "last.pt"
        state = torch.load(last, weights_only=True)
        state["split_sha256"]["train"] = "0" * 64
        torch.save(state, last)

    def run_at_work(self):
        self.run()
        self.held = _runs.held(self.folder / RUN, "key")
        self.held.__enter__()

    def no_network(self):
        def no_network(*arguments, **keywords):
            raise URLError(socket.gaierror(-3, "Temporary failure in name resolution"))

        self.monkeypatch.setattr("urllib.request.urlopen", no_network)

    def damaged_mnist(self):
        folder = self.folder / "data" / "MNIST" / "raw"
        folder.mkdir(parents=True)
        for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
            # As long as the file should be, but for all the images black.
            count = 60_000 if name.startswith("train") else 10_000
            header = b"".join(n.to_bytes(4, "big") for n in (2051, count, 28, 28))
            with open(folder / name, "wb") as file:
                file.write(header)
                file.truncate(16 + count * 784)

    def data_that_is_a_file(self):
        (self.folder / "data").touch()

    def full_disk(self):
        def fail(config, filename, folder):
            raise OSError(28, os.strerror(28))

        self.monkeypatch.setattr("hydra.core.utils._save_config", fail)

    def no_gpu(self):
        if torch.cuda.is_available():
            pytest.skip("the machine has a GPU")

    def stopped(self):
        def run(settings, data, device, folder, resume):
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.pt").touch()
            raise Stopped(2)

        self.monkeypatch.setattr("ucvae.training.run", run)

    def empty_outputs(self):
        (self.folder / "outputs").mkdir()


# What is to be there before a command; nothing for the others.
BEFORE = {
    "ucvae-train dataset=omniglot": Place.no_network,
    "ucvae-train dataset=mnist": Place.damaged_mnist,
    "ucvae-train dataset=mnist_dynamic": Place.data_that_is_a_file,
    f"ucvae-train hydra.run.dir={RUN}": Place.run,
    f"ucvae-train resume={RUN}": Place.run_at_work,
    f"ucvae-train resume={RUN} estimator.lag=5": Place.run,
    f"ucvae-train resume={RUN} trainer.max_epochs=2": Place.run_of_other_data,
    f"ucvae-train resume={RUN} trainer.max_epochs=60": Place.damaged_run,
    f"ucvae-eval run={RUN}": Place.run_without_checkpoints,
    f"ucvae-eval run={RUN} study=gradient_bias": Place.run,
    f"ucvae-eval run={RUN} study=meeting_times split=valid": Place.run,
    "ucvae-train resume=outputs": Place.run,
    f"ucvae-train start_from={RUN} model.latent_dim=50": Place.run,
    "ucvae-train hydra.run.dir=outputs/other": Place.full_disk,
    "ucvae-train device=cuda": Place.no_gpu,
    f"ucvae-train hydra.run.dir={RUN} seed=1": Place.stopped,
    "ucvae-report outputs": Place.empty_outputs,
}
# What makes a command that trains short; its message is the same.
SHORT = {"ucvae-train estimator=iwae optimizer.lr=1e6": QUICK[1:]}


@pytest.mark.parametrize("line", ENTRIES)
def test_message(line, command, train, monkeypatch, tmp_path):
    name, *arguments = shlex.split(line)
    if name.startswith("PYTHON="):
        found = of_the_shell(line, tmp_path)
    else:
        place = Place(train, monkeypatch, tmp_path)
        BEFORE.get(line, lambda place: None)(place)
        found = said(command(name, *arguments, *SHORT.get(line, ())))
    expected = re.escape(ENTRIES[line]).replace(re.escape("..."), ".+")
    assert re.fullmatch(expected, found.replace(str(tmp_path), HOME)), found


def said(finished):
    assert finished.code != 0
    return finished.err


def of_the_shell(line, checkout):
    """In a checkout that has no environment yet."""
    shutil.copytree(REPOSITORY / "scripts", checkout / "scripts")
    done = subprocess.run(
        ["bash", "-c", line], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    return done.stderr


def test_the_page_has_an_entry_for_all_that_is_prepared_here():
    assert set(BEFORE) | set(SHORT) <= set(ENTRIES)
    assert PAGE.count("```console") == len(ENTRIES) > 30
