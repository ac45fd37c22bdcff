"""Who trains in the section ``training`` of ``scripts/bench.py``.

Every contender has a ``name`` and ``images_per_s()``, which trains for about the seconds of a
measurement. All train the same network on the same images.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import hydra
import numpy as np
import torch
from rivals.eager import PlainTraining
from rivals.worker import CLOCKS
from torch import Tensor

import ucvae.cli._hydra  # noqa: F401  (registers the resolvers of the configs)
from ucvae.config import TrainSettings, config_dir, train_settings
from ucvae.data.base import ImageData
from ucvae.errors import RunError
from ucvae.stopping import StopRequest
from ucvae.tracking import Tracker
from ucvae.training import Training

BATCH_SIZE = 100
# The hidden layers of Burda's network for MNIST, model=mlp_burda.
HIDDEN = [200, 200]
RIVALS = ("pythae", "eager", "jax")
NAMES = ("ucvae", *RIVALS, "products", "oneDNN")


class Objective(NamedTuple):
    """A way to train: the overrides of ucvae, and the bound by its name among rivals, if any."""

    overrides: list[str]
    bound: str | None
    num_samples: int


TRAINED = {
    "ELBO": Objective(["estimator=elbo"], "elbo", 1),
    "IWAE, K 10": Objective(["estimator=iwae", "estimator.num_samples=10"], "iwae", 10),
    "IWAE, K 50": Objective(["estimator=iwae", "estimator.num_samples=50"], "iwae", 50),
    "IWAE, K 10, thinned": Objective(
        ["estimator=iwae", "estimator.num_samples=10", "estimator.min_weight=0.1"], "iwae", 10
    ),
    "IWAE, K 50, thinned": Objective(
        ["estimator=iwae", "estimator.num_samples=50", "estimator.min_weight=0.1"], "iwae", 50
    ),
    "coupled": Objective(["estimator=coupled"], None, 10),
}


class Clock:
    """Seconds, by a clock that waits for the device."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.here = CLOCKS[name]

    def __call__(self) -> float:
        """The time at which all work so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.here()

    def rate(self, work: Callable[[], int], seconds: float) -> float:
        """How much is done in a second by calling ``work``, once at least, which says how much."""
        start = self()
        done = work()
        while self.here() - start < seconds:
            done += work()
        return done / (self() - start)


def compose(overrides: Sequence[str]) -> TrainSettings:
    """The settings of a training run with these overrides."""
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return train_settings(hydra.compose("train", list(overrides)))


def network(latent_dim: int) -> list[str]:
    """The overrides of the network that everybody trains."""
    return ["dataset=mnist", "model=mlp_burda", f"model.latent_dim={latent_dim}"]


class Task(NamedTuple):
    """What every contender trains, and how long a measurement is.

    Attributes:
        data: on the CPU.
        images: its training images ``[N, P]``, uint8 bits on the device.
        latent_dim: D.
        clock: of the measurement, with the device.
        seconds: of a measurement, about.
    """

    data: ImageData
    images: Tensor
    latent_dim: int
    clock: Clock
    seconds: float

    def rate(self, step: Callable[[], int]) -> float:
        """Images a second of steps that say how many they have taken."""
        return self.clock.rate(step, self.seconds)


class Contender(Protocol):
    """Somebody who trains the same network on the same images."""

    name: str

    def images_per_s(self) -> float:
        """Train for about ``--seconds``."""


class TimeIsUp(Exception):
    """A measurement is over."""


class Deadline(StopRequest):
    """Asks the training loop to stop when a measurement's time is over, after a batch at least.

    The loop may take longer before its first batch than a measurement lasts: it saves what the
    estimator remembers.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def begin(self, seconds: float) -> None:
        """Start a measurement."""
        self.looked = False
        self.start = self.clock()
        self.end = self.start + seconds

    @property
    def asked(self) -> bool:
        """Whether the time is over; if so, ``taken`` are the seconds until all work was done."""
        looked_before, self.looked = self.looked, True
        if not looked_before or self.clock.here() < self.end:
            return False
        self.taken = self.clock() - self.start
        return True

    def obey(self) -> None:
        """Leave the loop, which has saved its state after the time was taken."""
        raise TimeIsUp


class Ours:
    """The training loop of ``ucvae-train`` with all it does but validation.

    The loop is stopped when the time is over and taken up again in the next round.
    """

    name = "ucvae"

    def __init__(self, objective: Objective, task: Task, folder: Path) -> None:
        settings = compose(
            [
                *network(task.latent_dim),
                *objective.overrides,
                "optimizer=adam",
                f"trainer.batch_size={BATCH_SIZE}",
                "trainer.max_epochs=1000000000",
                "trainer.valid_every=1000000000",
            ]
        )
        self.seconds = task.seconds
        self.deadline = Deadline(task.clock)
        self.training = Training(settings, task.data, task.clock.device, folder, self.deadline)
        self.training.tracker = Tracker(folder, step=0)

    def images_per_s(self) -> float:
        """Train for about ``seconds``."""
        first = self.training.step
        self.deadline.begin(self.seconds)
        # Without a terminal the loop draws no progress bar.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(TimeIsUp):
            self.training.train()
        return (self.training.step - first) * BATCH_SIZE / self.deadline.taken


class Eager:
    """Plain eager PyTorch."""

    name = "eager"

    def __init__(self, bound: str, num_samples: int, task: Task) -> None:
        self.task = task
        self.training = PlainTraining(
            task.images, HIDDEN, task.latent_dim, BATCH_SIZE, bound, num_samples
        )

    def images_per_s(self) -> float:
        """Train for about ``seconds``."""

        def step() -> int:
            self.training.step()
            return BATCH_SIZE

        return self.task.rate(step)


class Products:
    """The decoder's matrix products of a step and nothing else: ``z W``, ``g W'`` and ``z' g``."""

    def __init__(self, name: str, objective: Objective, task: Task) -> None:
        self.name, self.task = name, task
        self.multiply = PRODUCTS[name]
        rows = BATCH_SIZE * objective.num_samples
        widths = [task.latent_dim, *reversed(HIDDEN), task.images.shape[1]]
        new = functools.partial(torch.randn, device=task.clock.device)
        self.layers = [
            (new(rows, inputs), new(inputs, outputs), new(rows, outputs))
            for inputs, outputs in zip(widths[:-1], widths[1:], strict=True)
        ]

    def images_per_s(self) -> float:
        """Multiply for about ``seconds``."""
        return self.task.rate(self.step)

    def step(self) -> int:
        """Forward, then backward."""
        for z, weight, _ in self.layers:
            self.multiply(z, weight)
        for z, weight, gradient in reversed(self.layers):
            self.multiply(gradient, weight.T)
            self.multiply(z.T, gradient)
        return BATCH_SIZE


def onednn(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` by oneDNN: torch's own choice, MKL, runs at half its speed on AMD's processors."""
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"products": torch.mm, "oneDNN": onednn}


def products_on(device: torch.device) -> list[str]:
    """The names in :data:`PRODUCTS` that this machine has; the operator of oneDNN is internal."""
    has_onednn = device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return list(PRODUCTS) if has_onednn else ["products"]


class Worker:
    """A rival's process; ``scripts/rivals/worker.py`` is its other side.

    Raises:
        RunError: it cannot be started, or ends before it has answered.
    """

    def __init__(self, name: str, python: str, settings: dict[str, Any], threads: int) -> None:
        self.name, self.python = name, python
        script = Path(__file__).with_name(f"bench_{name}.py")
        self.errors = tempfile.TemporaryFile("w+")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "JAX_PLATFORMS": settings["device"],
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        try:
            with on_cores(threads):
                self.process = subprocess.Popen(
                    [python, script],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.errors,
                    env=environment,
                    text=True,
                )
        except OSError as error:
            raise RunError(f"{name}: cannot start {python}: {error.strerror}") from error
        assert self.process.stdin and self.process.stdout  # pipes, as asked for
        self.requests, self.answers = self.process.stdin, self.process.stdout
        self.versions: dict[str, str] = self.ask(settings)["versions"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.requests, flush=True)
        line = self.answers.readline()
        try:
            return json.loads(line)
        except ValueError:
            self.process.wait(10)
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["it said nothing"])[-1]
            self.close()
            raise RunError(f"{self.name}: {self.python} ended without an answer: {last}") from None

    def close(self) -> None:
        """End the process, which ends with its input."""
        self.answers.close()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


class Rival:
    """One bound trained by a rival's process."""

    def __init__(self, objective: Objective, worker: Worker, seconds: float) -> None:
        self.name, self.worker = worker.name, worker
        self.request = {
            "bound": objective.bound,
            "num_samples": objective.num_samples,
            "seconds": seconds,
        }

    def images_per_s(self) -> float:
        """Let it train for about ``seconds``."""
        answer = self.worker.ask(self.request)
        return answer["images"] / answer["seconds"]


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """What is started in here has so many cores: JAX makes a thread for each that it may use."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def contenders(
    task: Task, pythons: dict[str, str | None], threads: int, stack: contextlib.ExitStack
) -> tuple[dict[tuple[str, str], Contender], dict[str, dict[str, str]]]:
    """Everybody, by objective and name, and the versions of those with processes of their own.

    Args:
        task: what they train.
        pythons: interpreters of the rivals; one that has none is left out.
        threads: of the rivals' processes.
        stack: at its end the processes end and the files go.

    Raises:
        RunError: a rival cannot be started.
    """
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    np.save(folder / "images.npy", task.images.cpu().numpy())
    settings = {
        "images": str(folder / "images.npy"),
        "batch_size": BATCH_SIZE,
        "hidden": HIDDEN,
        "latent_dim": task.latent_dim,
        "device": task.clock.device.type,
        "clock": task.clock.name,
    }
    workers = []
    for name, python in pythons.items():
        if python is None:
            print(f"{name}: left out, as --{name}-python does not say where it is")
        else:
            workers.append(Worker(name, python, settings, threads))
            stack.callback(workers[-1].close)
    everybody: dict[tuple[str, str], Contender] = {}
    for index, (title, objective) in enumerate(TRAINED.items()):
        own = folder / str(index)
        own.mkdir()
        ours = Ours(objective, task, own)
        stack.enter_context(ours.training.tracker)
        others: list[Contender] = []
        if objective.bound:
            others.append(Eager(objective.bound, objective.num_samples, task))
            others += [Products(name, objective, task) for name in products_on(task.clock.device)]
            others += [Rival(objective, worker, task.seconds) for worker in workers]
        everybody |= {(title, contender.name): contender for contender in (ours, *others)}
    return everybody, {worker.name: worker.versions for worker in workers}
