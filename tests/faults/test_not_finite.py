"""NaN in weights, data or gradient, and log weights of -inf: quantity, step and image are named."""

import dataclasses
import math
import re
from pathlib import Path

import hydra
import pytest
import torch

from ucvae import checkpoint, training
from ucvae.config import config_dir, train_settings
from ucvae.data.base import ImageData
from ucvae.data.digits import Digits
from ucvae.errors import ConfigError, NonFiniteError
from ucvae.models.vae import VAE

QUICK = (
    "model.hidden=[16]",
    "model.latent_dim=3",
    "trainer.max_epochs=3",
    "trainer.batch_size=50",
    "trainer.valid_samples=5",
    "trainer.log_every=5",
    "trainer.checkpoint_every=4",
    "evaluator.num_samples=20",
)
ESTIMATORS = {
    "elbo": ("estimator=elbo",),
    "iwae": ("estimator=iwae",),
    "coupled": ("estimator=coupled", "estimator.num_samples=4", "estimator.lag=2"),
}
IMAGE = 123
EVERY = "with every image of the batch"


@pytest.fixture(scope="module")
def settings_of():
    import ucvae.cli._hydra  # noqa: F401  (registers the resolvers)

    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield lambda *overrides: train_settings(hydra.compose("train", list(overrides)))


@pytest.fixture(scope="module")
def digits():
    data = Digits().load(Path())
    return dataclasses.replace(data, train=data.train[:520])


def failed(settings, data, folder):
    """The error of a run, after a look at the checkpoint that it keeps; and at which step."""
    with pytest.raises(NonFiniteError) as error:
        training.run(settings, data, torch.device("cpu"), folder, False)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    state = checkpoint.load(folder / "checkpoints" / "last.pt")
    assert all(value.isfinite().all() for value in state["model"].values())
    return message, state["step"]


def step_of(image, settings, data):
    """The first step that sees an image: of the first epoch."""
    order = torch.randperm(
        len(data.train), generator=training.stream(settings.seed, "order of epoch 0", "cpu")
    )
    return order.tolist().index(image) // 50 + 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_weight(estimator, settings_of, digits, tmp_path, monkeypatch):
    gradient = training.Training._gradient

    def planted(self, *batch):
        if self.step == 6:
            with torch.no_grad():
                list(self.model.decoder.parameters())[1][3] = math.nan
        return gradient(self, *batch)

    monkeypatch.setattr(training.Training, "_gradient", planted)
    message, saved = failed(settings_of(*QUICK, *ESTIMATORS[estimator]), digits, tmp_path)
    assert "it began in step 7 (decoder." in message and EVERY in message
    assert saved == 4


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_gradient(estimator, settings_of, digits, tmp_path, monkeypatch):
    backward = torch.Tensor.backward
    now = {}
    step = training.Training._gradient

    def planted(self, *batch):
        now["step"], now["model"] = self.step + 1, self.model
        return step(self, *batch)

    def poisoned(tensor, *arguments, **named):
        backward(tensor, *arguments, **named)
        if now["step"] == 6:
            next(now["model"].encoder.parameters()).grad[0, 0] = math.nan

    monkeypatch.setattr(training.Training, "_gradient", planted)
    monkeypatch.setattr(torch.Tensor, "backward", poisoned)
    message, saved = failed(settings_of(*QUICK, *ESTIMATORS[estimator]), digits, tmp_path)
    assert "it began in step 6 (train/gradient_norm_encoder" in message and EVERY in message
    assert saved == 4


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_pixel(estimator, settings_of, digits, tmp_path, monkeypatch):
    """Data are whole numbers, unless a user's own data set makes others."""
    monkeypatch.setattr(ImageData, "train_mean", digits.train_mean)
    train = digits.train.float()
    train[IMAGE, 0, 3, 3] = math.nan
    data = dataclasses.replace(digits, train=train)
    settings = settings_of(*QUICK, *ESTIMATORS[estimator])
    step = step_of(IMAGE, settings, data)
    message, saved = failed(settings, data, tmp_path)
    assert f"it began in step {step} (pixels" in message
    assert message.endswith(f"with image {IMAGE} of the training images")
    assert saved < step


@pytest.mark.parametrize("fault", [ConfigError("no room for 9 GB"), MemoryError()])
def test_where_there_is_no_room_to_look_for_it(fault, settings_of, digits, tmp_path, monkeypatch):
    """The error is the NaN, not that the run's memory is not there twice."""

    def poisoned(self, *batch):
        if self.step == 6:
            monkeypatch.setattr(training.Training, "__init__", no_room)
            raise NonFiniteError("a quantity is NaN")
        return gradient(self, *batch)

    def no_room(self, *arguments):
        raise fault

    gradient = training.Training._gradient
    monkeypatch.setattr(training.Training, "_gradient", poisoned)
    message, _ = failed(settings_of(*QUICK, "estimator=iwae"), digits, tmp_path)
    assert message.startswith("a quantity is NaN; where it began is not known (")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_image_without_any_weight(estimator, settings_of, digits, tmp_path, monkeypatch):
    """One image, unlike all others, has p(x | z) = 0 for every z."""
    train = digits.train.clone()
    train[IMAGE] = 1
    data = dataclasses.replace(digits, train=train)
    settings = settings_of(*QUICK, *ESTIMATORS[estimator])
    log_likelihood = VAE.log_likelihood

    def impossible(self, images, z):
        white = (images == 1).all(-1, keepdim=True)
        return log_likelihood(self, images, z).masked_fill(white, -math.inf)

    monkeypatch.setattr(VAE, "log_likelihood", impossible)
    step = step_of(IMAGE, settings, data)
    message, saved = failed(settings, data, tmp_path)
    assert re.search(rf"; it began in step {step}( \(.+\))?, with image {IMAGE} of the ", message)
    assert message.endswith(" of the training images")
    assert saved < step
