"""``study=meeting_times``: the chains' own numbers, in a table, a summary and a picture."""

import json

import numpy as np
import pytest
import torch

from ucvae.data.base import ImageData, as_input
from ucvae.errors import ConfigError
from ucvae.estimators.coupled import Coupled
from ucvae.models.mlp import Mlp
from ucvae.randomness import stream
from ucvae.studies import meeting_times
from ucvae.studies.meeting_times import KERNELS, MeetingTimes, Times

SETTINGS = {"num_samples": 4, "lag": 3, "beta": 0.6, "num_images": 40, "replicates": 3}


@pytest.fixture(scope="module")
def model(bits):
    """An encoder that knows nothing of a decoder with large weights: some chains take long."""
    torch.manual_seed(1)
    model = Mlp(latent_dim=3, hidden=[8]).build(bits.train_mean, bits.levels)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter *= 2.5
    return model


@pytest.fixture(scope="module")
def found(model, bits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study = MeetingTimes(**SETTINGS, max_steps=8)
    return folder, study, study(model, bits, 3, folder)


@pytest.fixture(scope="module")
def table(found, read_csv):
    rows = read_csv(found[0] / "meeting_times.csv")
    return {
        name: {
            field: np.array([float(row[field]) for row in rows if row["kernel"] == name])
            for field in rows[0]
            if field != "kernel"
        }
        for name in KERNELS.values()
    }


@pytest.mark.parametrize("kernel", KERNELS)
def test_numbers_are_those_of_the_chains(kernel, found, table, model, bits):
    name, columns = KERNELS[kernel], table[KERNELS[kernel]]
    coupled = Coupled(num_samples=4, lag=3, kernel=kernel, max_steps=8, beta=0.6)
    generator = stream(3, f"meeting_times of {name}")
    images = as_input(bits.train, 2)
    for replicate in range(3):
        chains = coupled.run_chains(model, images, model.encode(images).detach(), generator)
        here = columns["replicate"] == replicate
        assert columns["image"][here].tolist() == list(range(40))
        for field in ("meeting_time", "truncated", "evaluations"):
            assert columns[field][here].tolist() == getattr(chains, field).tolist()
        np.testing.assert_allclose(columns["mismatch"][here], chains.mismatch.numpy())


@pytest.mark.parametrize("name", KERNELS.values())
def test_summary_is_that_of_the_table(name, found, table):
    numbers, columns = found[2]["kernels"][name], table[name]
    times = columns["meeting_time"]
    quantiles = np.quantile(times, (0.5, 0.9, 0.99), method="inverted_cdf")
    assert list(numbers["meeting_time"].values()) == [
        *(pytest.approx(times.mean()), *quantiles, times.max())
    ]
    truncated = columns["truncated"] == 1
    assert numbers["truncated_fraction"] == pytest.approx(truncated.mean())
    assert 0 < truncated.mean() < 1 and set(times[truncated]) == {8}
    # C-ISIR that meets in the last step does so as of the step after it.
    assert times.min() > 3 and times.max() <= (9 if name == "C-ISIR" else 8)
    evaluations = columns["evaluations"].mean()
    assert numbers["evaluations_per_image"] == pytest.approx(evaluations)
    # The three replicates of an image are no three images.
    mismatch = [columns["mismatch"][columns["image"] == image].mean() for image in range(40)]
    assert numbers["mismatch"] == {
        "mean": pytest.approx(np.mean(mismatch)),
        "standard_error": pytest.approx(np.std(mismatch, ddof=1) / 40**0.5),
    }


def test_quantiles_are_the_least_times_that_so_many_chains_have_met_by():
    times = torch.randperm(200) + 1
    same = torch.zeros(200, dtype=torch.float64)
    found = Times(times, same, same, same).summary()["meeting_time"]
    assert found == {"mean": 100.5, "p50": 100, "p90": 180, "p99": 198, "max": 200}


def test_what_it_leaves(found, is_picture):
    folder, study, numbers = found
    names = ["meeting_times.csv", "meeting_times.png"]
    assert sorted(path.name for path in folder.iterdir()) == numbers["files"] == names
    assert is_picture(folder / "meeting_times.png")
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert numbers["name"] == "meeting_times" and numbers["settings"] == vars(study)
    assert numbers["kernels"]["C-ISIR"]["beta"] is None
    assert numbers["kernels"]["C-ISIR-DISIR"]["beta"] == 0.6
    rows = study.rows(numbers)
    assert list(rows) == ["C-ISIR", "C-ISIR-DISIR"]
    for name, row in rows.items():
        times = numbers["kernels"][name]["meeting_time"]
        assert row.startswith(f"meeting time mean {times['mean']:.1f}, p50 {times['p50']}, ")


def test_picture_of_few_times(model, bits, tmp_path, is_picture):
    settings = SETTINGS | {"num_images": 2, "replicates": 1}
    MeetingTimes(**settings, max_steps=4)(model, bits, 0, tmp_path)
    assert is_picture(tmp_path / "meeting_times.png")


def test_images_go_in_batches(model, bits, tmp_path, monkeypatch, read_csv):
    sizes, run = [], Coupled.run_chains

    def watch(self, model, images, *arguments):
        sizes.append(len(images))
        return run(self, model, images, *arguments)

    monkeypatch.setattr(meeting_times, "BATCH", 15)
    monkeypatch.setattr(Coupled, "run_chains", watch)
    calls = []
    MeetingTimes(**SETTINGS).measure(model, bits, 0, tmp_path, lambda: calls.append(1))
    assert sizes == 6 * [15, 15, 10] and len(calls) == len(sizes)
    assert len(read_csv(tmp_path / "meeting_times.csv")) == 2 * 3 * 40


def test_beta_is_adapted_if_none_is_given(model, bits, tmp_path):
    settings = SETTINGS | {"beta": None, "num_images": 10, "replicates": 1}
    numbers = MeetingTimes(**settings)(model, bits, 0, tmp_path)
    beta = numbers["kernels"]["C-ISIR-DISIR"]["beta"]
    assert 0 < beta < 1 and beta != 0.5


def test_bits_of_a_dynamic_set_are_drawn(tmp_path):
    generator = torch.Generator().manual_seed(5)
    grey = torch.randint(256, (10, 1, 2, 3), generator=generator, dtype=torch.uint8)
    data = ImageData.from_grey("grey", "dynamic", {s: grey for s in ("train", "valid", "test")})
    seen = []

    class Model(type(Mlp(latent_dim=3, hidden=[4]).build(data.train_mean, 2))):
        def encode(self, images):
            seen.append(images)
            return super().encode(images)

    model = Mlp(latent_dim=3, hidden=[4]).build(data.train_mean, 2)
    model.__class__ = Model
    MeetingTimes(beta=0.5, num_images=10)(model, data, 0, tmp_path)
    assert seen and all(set(images.unique().tolist()) == {0, 1} for images in seen)


REFUSED = {
    "num_samples": (1, "num_samples must be at least 2"),
    "lag": (0, "lag must be at least 1"),
    "burn_in": (-1, "burn_in must be at least 0"),
    "beta": (1.0, r"beta must be in \[0, 1\)"),
    "max_steps": (10, r"max_steps must be at least burn_in \+ lag = 11"),
    "split": ("all", "split must be one of train, valid, test, got 'all'"),
    "num_images": (1, "num_images must be at least 2"),
    "replicates": (0, "replicates must be at least 1"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_bad_settings(field):
    value, message = REFUSED[field]
    with pytest.raises(ValueError, match=f"^{message}"):
        MeetingTimes(**{field: value})


def test_more_images_than_there_are_is_refused(model, bits, tmp_path):
    with pytest.raises(ConfigError, match="at most 40, the images of the test split, got 1000"):
        MeetingTimes(split="test")(model, bits, 0, tmp_path)
