"""Training by pythae's own trainer. Started by ``scripts/bench.py``.

    python -m venv pythae-env
    pythae-env/bin/pip install torch cloudpickle imageio pydantic scikit-learn scipy tqdm
    pythae-env/bin/pip install --no-deps pythae

(``--no-deps``, as pythae asks for a package that modern Pythons do not need.) The trainer has its
defaults but for batch size, optimizer and device; it neither validates nor saves here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
import torch
from pythae.data.datasets import BaseDataset
from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback
from torch import Tensor, nn
from worker import CLOCKS, Measure, serve


def tanh_layers(widths: list[int]) -> nn.Sequential:
    """Fully connected tanh layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers)


class Encoder(BaseEncoder):
    """Tanh layers, then mean and log-variance."""

    def __init__(self, pixels: int, hidden: list[int], latent_dim: int) -> None:
        super().__init__()
        self.layers = tanh_layers([pixels, *hidden])
        self.mean = nn.Linear(hidden[-1], latent_dim)
        self.log_variance = nn.Linear(hidden[-1], latent_dim)

    def forward(self, x: Tensor) -> ModelOutput:
        """What pythae's models expect of an encoder."""
        features = self.layers(x)
        return ModelOutput(
            embedding=self.mean(features), log_covariance=self.log_variance(features)
        )


class Decoder(BaseDecoder):
    """Tanh layers, then probabilities, from which pythae takes the cross-entropy."""

    def __init__(self, pixels: int, hidden: list[int], latent_dim: int) -> None:
        super().__init__()
        layers = tanh_layers([latent_dim, *reversed(hidden)])
        self.layers = nn.Sequential(*layers, nn.Linear(hidden[0], pixels), nn.Sigmoid())

    def forward(self, z: Tensor) -> ModelOutput:
        """What pythae's models expect of a decoder."""
        return ModelOutput(reconstruction=self.layers(z))


class TimeIsUp(Exception):
    """A measurement is over."""


class Timer(TrainingCallback):
    """Counts the steps and ends an epoch when the time is up."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock

    def begin(self, seconds: float) -> None:
        """Start a measurement."""
        self.steps = 0
        self.start = self.clock()
        self.end = self.start + seconds

    def on_train_step_end(self, training_config: BaseTrainerConfig, **rest: Any) -> None:
        """Called by the trainer after each batch, whose loss it has read from the device."""
        self.steps += 1
        if self.clock() >= self.end:
            raise TimeIsUp


def prepare(settings: dict[str, Any]) -> Callable[[str, int], Measure]:
    """Read the images."""
    images = torch.from_numpy(np.load(settings["images"])).float()
    batch_size = settings["batch_size"]
    shape = images.shape[1], settings["hidden"], settings["latent_dim"]
    common = dict(input_dim=(images.shape[1],), latent_dim=shape[2], reconstruction_loss="bce")

    def training_of(bound: str, num_samples: int) -> Measure:
        networks = dict(encoder=Encoder(*shape), decoder=Decoder(*shape))
        if bound == "elbo":
            model = VAE(VAEConfig(**common), **networks)
        else:
            model = IWAE(IWAEConfig(number_samples=num_samples, **common), **networks)
        timer = Timer(CLOCKS[settings["clock"]])
        trainer = BaseTrainer(
            model,
            BaseDataset(images, torch.zeros(len(images))),
            training_config=BaseTrainerConfig(
                output_dir=tempfile.mkdtemp(),
                per_device_train_batch_size=batch_size,
                optimizer_cls="Adam",
                learning_rate=1e-3,
                no_cuda=settings["device"] == "cpu",
            ),
            callbacks=[timer],
        )
        trainer.prepare_training()
        epoch = 0

        def measure(seconds: float) -> tuple[int, float]:
            nonlocal epoch
            timer.begin(seconds)
            try:
                while True:
                    epoch += 1
                    trainer.train_step(epoch)
            except TimeIsUp:
                return timer.steps * batch_size, timer.clock() - timer.start

        return measure

    return training_of


if __name__ == "__main__":
    serve({name: metadata.version(name) for name in ("pythae", "torch")}, prepare)
