"""CIFAR-10 and its networks from the command line, on small files in the real format."""

import io
import json

import numpy as np
import pytest
from data.small_files import small_cifar, write_all
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ucvae.data import files
from ucvae.data.cifar10 import Cifar10

SMALL = (
    "dataset=cifar10",
    "model=conv",
    "model.latent_dim=3",
    "model.encoder.channels=[4,4,4]",
    "model.encoder.hidden=8",
    "model.decoder.start_maps=2",
    "model.decoder.channels=[4,4]",
    "trainer.batch_size=3",
    "trainer.max_epochs=1",
    "trainer.valid_samples=2",
    "trainer.log_every=1",
    "evaluator.num_samples=2",
    "device=cpu",
    "hydra.run.dir=run",
)


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SYSTEM_FOLDERS", ())
    content = small_cifar(monkeypatch, (1, 1, 2, 2, 10, 3))
    write_all(tmp_path / "data" / "cifar-10-batches-py", content)
    return tmp_path / "data"


def pixels(event) -> np.ndarray:
    """A logged picture, ``[H, W, 3]`` in 0..255."""
    return (255 * imread(io.BytesIO(event.encoded_image_string), "png")).round().astype(np.uint8)


# Proposals of an untrained network for images of noise: chains would go on for long.
SHORT = ("estimator.refinements=2", "estimator.max_steps=5", "estimator.survival=0")


@pytest.mark.parametrize("estimator", ["elbo", "iwae", "coupled"])
def test_a_run_on_colour_images(estimator, train, command, data_dir, tmp_path):
    settings = SHORT if estimator == "coupled" else ()
    finished = train(*SMALL, *settings, f"estimator={estimator}", f"data_dir={data_dir}")
    assert finished.code == 0, finished.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["dataset"], result["binarization"]) == ("cifar10", "none")
    assert (result["model"], result["estimator"]) == ("conv", estimator)
    # An untrained model of 3,072 values in 256 levels: log 256 = 5.5 nats for each, not far off.
    assert -3072 * 7 < result["test"]["log_likelihood"] < -3072 * 4

    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for tag, pictures in (("samples", 64), ("reconstructions", 20)):
        for event in events.Images(tag):
            assert pixels(event).shape == (33 * -(-pictures // 8) + 1, 33 * 8 + 1, 3)
    # The first picture is the first validation image, in its own colours.
    first = pixels(events.Images("reconstructions")[0])[1:33, 1:33].astype(int)
    expected = Cifar10().load(data_dir).valid[0].movedim(0, -1).numpy()
    assert abs(first - expected).max() <= 1

    if estimator == "coupled":
        settings = [f"evaluator.{key}" for key in ("chains=2", "temperatures=3", "num_images=2")]
        settings += [f"evaluator.{key}=1" for key in ("leapfrog_steps", "pilot_chains")]
        finished = command("ucvae-eval", "run=run", "evaluator=ais", *settings)
        assert finished.code == 0, finished.err
        finished = train("resume=run", "trainer.max_epochs=2")
        assert finished.code == 0, finished.err


def test_other_networks_and_other_images(train, calls, data_dir, tmp_path):
    assert train("dataset=cifar10", f"data_dir={data_dir}", "hydra.run.dir=a").code == 0
    assert train("model=conv", "hydra.run.dir=b").code == 0
    assert calls[0].data.image_shape == (3, 32, 32) and calls[1].data.image_shape == (1, 8, 8)


def test_refusals_name_the_key(train, calls):
    refused = {
        "model.decoder.strides=[2,2]": "model.decoder.strides must be a list of 3 numbers",
        "model.decoder.kernel=3": "model.decoder.kernel: no such key",
        "model.encoder.channels=[8,8,8,8]": "model=conv: 4 convolutions of stride 2 (model.encoder",
        "model.encoder.covariance=some": "model.encoder.covariance: some is not one of diagonal",
    }
    for override, message in refused.items():
        finished = train("model=conv", override)
        assert finished.code == 2 and finished.err.startswith(f"ucvae-train: error: {message}")
        assert len(finished.err.splitlines()) == 1
    assert not calls


def test_wrong_file(train, calls, data_dir):
    (data_dir / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"cos\nsystem\n.")
    finished = train("dataset=cifar10", "model=conv", f"data_dir={data_dir}")
    assert finished.code == 2 and len(finished.err.splitlines()) == 1
    assert "data_batch_2: wrong content: MD5 " in finished.err and not calls
