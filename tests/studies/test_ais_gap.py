"""The gap of annealed importance sampling: bounds on either side of an exact value."""

import csv

import pytest
import torch

from ucvae.data.base import SPLITS, ImageData
from ucvae.errors import ConfigError
from ucvae.evaluation.ais import Schedule
from ucvae.models.mlp import Mlp
from ucvae.models.ppca import Ppca
from ucvae.randomness import stream
from ucvae.studies.ais_gap import AisGap, simulate

pytestmark = pytest.mark.usefixtures("double")

SMALL = {"chains": 16, "leapfrog_steps": 3, "pilot_images": 6, "pilot_chains": 4}


@pytest.fixture
def data():
    """Two images of 12 pixels, which the study does not look at."""
    images = torch.zeros(2, 1, 3, 4, dtype=torch.uint8)
    return ImageData.from_splits("none", "static", 2, {split: images for split in SPLITS})


def test_bounds_hold_the_exact_value_between_them(data, tmp_path, read_csv):
    """Mean over 60 simulated images; 3 standard errors. Fewer temperatures, a wider gap."""
    model = Ppca(5, variance=0.5).build(torch.rand(12), levels=2)
    images, _ = simulate(model, 60, stream(3, "images of ais_gap"))
    exact = model.exact_log_likelihood(images).detach()
    gaps = {}
    for temperatures in (6, 60):
        study = AisGap(temperatures=temperatures, num_images=60, **SMALL)
        found = study(model, data, 3, tmp_path)
        assert found["name"] == "ais_gap" and found["files"] == ["ais_gap.csv"]
        assert found["evaluator"] == f"ais_16x{temperatures}x3"
        table = read_csv(tmp_path / "ais_gap.csv")
        assert [int(row["image"]) for row in table] == list(range(60))
        lower, upper = (
            torch.tensor([float(row[name]) for row in table]) for name in ("lower", "upper")
        )
        for below in (lower - exact, exact - upper):
            assert below.mean() < 3 * below.std() / 60**0.5
        assert found["gap"]["mean"] == pytest.approx((upper - lower).mean().item())
        assert found["gap"]["standard_error"] == pytest.approx(
            (upper - lower).std().item() / 60**0.5
        )
        assert (
            f"{found['gap']['mean']:.3f} +- " in study.rows(found)[f"gap of {found['evaluator']}"]
        )
        gaps[temperatures] = found["gap"]["mean"]
    assert gaps[60] < 0.4 < 1 < gaps[6]


def test_batches_have_images_and_posterior_draws_of_their_own(data, tmp_path, monkeypatch):
    model = Mlp(latent_dim=2, hidden=[4]).build(data.train_mean, 2)
    monkeypatch.setattr(type(model), "rows_at_a_time", lambda self, images: 40)
    seen = []
    study = AisGap(temperatures=5, num_images=5, **SMALL)
    forward, backward = type(study._ais()).forward, type(study._ais()).backward
    monkeypatch.setattr(type(study._ais()), "forward", lambda *a: seen.append(a[2]) or forward(*a))
    monkeypatch.setattr(
        type(study._ais()), "backward", lambda *a: seen.append((a[2], a[3])) or backward(*a)
    )
    study(model, data, 0, tmp_path)
    images, z = simulate(model, 5, stream(0, "images of ais_gap"))
    assert torch.equal(torch.cat(seen[:3]), images)
    assert torch.equal(torch.cat([pair[0] for pair in seen[3:]]), images)
    assert torch.equal(torch.cat([pair[1] for pair in seen[3:]]), z)
    with (tmp_path / "ais_gap.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5


def test_a_likelihood_that_cannot_be_drawn_from_is_refused(data):
    model = Mlp(latent_dim=2, hidden=[4]).build(data.train_mean, 2)

    class Plain:
        pass

    model.likelihood = Plain()
    with pytest.raises(ConfigError, match="study=ais_gap: needs a likelihood with a method draw"):
        AisGap().check(model, data)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_images=1), "num_images must be at least 2, got 1"),
        (dict(chains=0), "chains must be at least 1, got 0"),
        (dict(temperatures=1), "temperatures must be at least 2, got 1"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AisGap(**settings)


def test_the_settings_are_those_of_the_evaluator():
    ais = AisGap(chains=3, schedule=Schedule.linear, num_images=7)._ais()
    assert (ais.chains, ais.schedule, ais.num_images) == (3, Schedule.linear, 7)
