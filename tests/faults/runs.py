"""A short coupled run, and what two runs of it must have in common, bit for bit."""

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

# A checkpoint at each step, so that many moments fall into writes.
SHORT = (
    "estimator=coupled",
    "estimator.num_samples=4",
    "estimator.lag=2",
    "model.hidden=[16]",
    "model.latent_dim=3",
    "trainer.max_epochs=3",
    "trainer.batch_size=200",
    "trainer.valid_every=1",
    "trainer.valid_samples=5",
    "trainer.log_every=2",
    "trainer.checkpoint_every=1",
    "evaluator.num_samples=20",
    "device=cpu",
)
TIMED = ("wall_clock_s", "train_s", "train_images_per_s", "train_seconds", "wall_seconds")


def environment():
    """One thread, as the tests have it, and errors as a user sees them."""
    hidden = ("HYDRA_FULL_ERROR", "UCVAE_QUIET")
    return {key: value for key, value in os.environ.items() if key not in hidden} | {
        "OMP_NUM_THREADS": "1"
    }


class Server:
    """Runs ``ucvae-train`` in forks of a process that has imported everything.

    Args:
        memory: bytes of address space that a run can have.
    """

    def __init__(self, memory=resource.RLIM_INFINITY):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            env=environment(),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, folder, *arguments):
        """Start a run with ``folder`` as its working directory; its process id."""
        self.output = folder / "output"
        print(json.dumps([str(folder), str(self.output), arguments]), file=self.process.stdin)
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self):
        """Wait for the run; its exit code and what it has written."""
        return int(self.process.stdout.readline()), self.output.read_text()

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def differences(one, two, where=""):
    """Where two nested states differ, times aside."""
    if type(one) is not type(two):
        return [where]
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return [where]
        keys = [key for key in one if key not in TIMED]
        return [
            found for key in keys for found in differences(one[key], two[key], f"{where}/{key}")
        ]
    if isinstance(one, list):
        if len(one) != len(two):
            return [where]
        pairs = enumerate(zip(one, two, strict=True))
        return [found for row, pair in pairs for found in differences(*pair, f"{where}/{row}")]
    same = torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
    return [] if same else [where]


def read(folder):
    """All that a run leaves and that does not depend on the time of day."""
    result = json.loads((folder / "result.json").read_text())
    result.pop("git_revision")  # of the checkout, in which somebody may be at work
    for key in ("resume", "device"):  # not what it computes
        result["config"].pop(key)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left = {
        "result": result,
        "metrics": [{key: line[key] for key in line if "time/" not in key} for line in lines],
    }
    for name in ("last.pt", "best.pt"):
        left[name] = torch.load(folder / "checkpoints" / name, weights_only=True)
        left[name]["config"].pop("resume")
    return left


def written_twice(folder):
    """Steps of TensorBoard's scalars that show twice after its own purge of what is redone."""
    shown = Counter()
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("session_log") and event.session_log.status == 1:
                shown = Counter({key: n for key, n in shown.items() if key[1] < event.step})
            shown.update((value.tag, event.step) for value in event.summary.value)
    plugins = ("_hparams_", "custom_scalars__config__")  # each start tells them again: no steps
    return [key for key, n in shown.items() if n > 1 and not key[0].startswith(plugins)]
