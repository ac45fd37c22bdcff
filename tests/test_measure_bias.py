"""``scripts/measure_bias.py``: ELBO's bias in closed form, and none of the chains."""

import importlib
import math
from pathlib import Path

import hydra
import pytest
import torch
from references import LinearGaussian

import ucvae.cli._hydra  # noqa: F401  (registers the resolvers of the configs)
from ucvae import checkpoint, training
from ucvae.config import config_dir, train_settings
from ucvae.estimators.iwae import Iwae

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
QUICK = (
    "model.hidden=[8]",
    "model.latent_dim=2",
    "trainer.valid_samples=5",
    "evaluator.num_samples=5",
    "device=cpu",
)


def compose(overrides):
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return train_settings(hydra.compose("train", overrides))


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("measure_bias")


def gradients(toy, images, mean, covariance):
    """``E grad log p(x, z)`` for ``z ~ N(mean, covariance)``, ``[n, parameters]``."""
    weight, bias = toy.model.decoder.weight.detach(), toy.model.decoder.bias.detach()
    second = covariance + mean[:, :, None] * mean[:, None]
    by_weight = (images - bias)[:, :, None] * mean[:, None] - weight @ second
    by_bias = images - bias - mean @ weight.T
    return torch.cat([by_weight.flatten(1), by_bias], 1) / toy.scale**2


@pytest.fixture
def known(double):
    """A linear-Gaussian model, 100 images, and both gradients of each in closed form."""
    toy = LinearGaussian()
    images = torch.randn(100, 4, generator=torch.Generator().manual_seed(3))
    posterior = toy.posterior(images)
    exact = gradients(toy, images, posterior.mean, posterior.covariance_matrix)
    with torch.no_grad():
        encoded = toy.model.encode(images)
    elbo = gradients(toy, images, encoded.mean, torch.diag_embed(encoded.std**2))
    return toy.model, images, exact, elbo


class TestSquaredMean:
    def test_of_pairs_of_different_rows(self, script):
        rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()

        def by_pairs(rows):
            products = rows @ rows.T
            return products[~torch.eye(len(rows), dtype=torch.bool)].mean()

        without = torch.stack([by_pairs(torch.cat([rows[:i], rows[i + 1 :]])) for i in range(6)])
        value, error = script.squared_mean(rows)
        assert value == pytest.approx(by_pairs(rows).item())
        assert error == pytest.approx((5 / 6 * (without - without.mean()).square().sum()).sqrt())

    def test_is_unbiased_and_its_error_is_right(self, script):
        """Over 2,000 draws; the squared mean itself is 1/8 of the variance, 3, too large."""
        generator = torch.Generator().manual_seed(2)
        mean = torch.tensor([1.0, 0.5, 0.0]).double()
        drawn = [mean + torch.randn(8, 3, generator=generator).double() for _ in range(2000)]
        values, errors = map(torch.tensor, zip(*map(script.squared_mean, drawn), strict=True))
        standard_error = (values.std() / 2000**0.5).item()
        assert values.mean().item() == pytest.approx(1.25, abs=4 * standard_error)
        naive = torch.stack([rows.mean(0).square().sum() for rows in drawn]).mean().item()
        assert abs(naive - 1.25) > 10 * standard_error
        # The variance is 4 |mean|^2 / 8 + 2 * 3 / (8 * 7) = 0.732; by the jackknife it is 7/8 of
        # 4 |mean|^2 / 7 + 2 * 3 * 2 / (7 * 6) = 1, 1.195 times as much. Standard errors over 2,000:
        # some 4% of each.
        assert values.var().item() == pytest.approx(0.732, rel=0.15)
        assert (errors.square().mean() / values.var()).item() == pytest.approx(1.195, rel=0.15)

    def test_its_error_is_too_large_where_there_is_no_mean(self, script):
        """By the factor ``7/8 * (2 * 3 * 2 / 42) / (2 * 3 / 56) = 7/3`` in the variance."""
        generator = torch.Generator().manual_seed(6)
        drawn = [torch.randn(8, 3, generator=generator).double() for _ in range(2000)]
        values, errors = map(torch.tensor, zip(*map(script.squared_mean, drawn), strict=True))
        assert values.mean().item() == pytest.approx(0, abs=4 * values.std().item() / 2000**0.5)
        assert (errors.square().mean() / values.var()).item() == pytest.approx(7 / 3, rel=0.2)


class TestMeasure:
    def test_elbo_has_the_bias_and_the_noise_of_closed_form(self, script, known):
        """Means over 12 seeds, of 5 replicates each, against their own standard errors."""
        model, images, exact, elbo = known
        estimator = Iwae(1)
        rows = [script.measure(estimator, model, images, exact, 5, seed) for seed in range(12)]
        between = exact.var(0).sum()
        expected = script.squared_mean(elbo - exact)[0] / between
        found = torch.tensor([row.bias for row in rows])
        error = (found.std() / 12**0.5).item()
        assert error < 0.1 * expected
        assert found.mean().item() == pytest.approx(expected.item(), abs=4 * error)
        # Negative control: with another gradient for the truth the same test fails.
        wrong = script.squared_mean(elbo - 0.5 * exact)[0] / between
        assert abs(found.mean().item() - wrong.item()) > 4 * error

        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(2000, 100, 2, generator=generator)
        with torch.no_grad():
            z = model.encode(images).transform(noise.movedim(0, 1)).movedim(1, 0)
        drawn = torch.stack([gradients_at(model, images, part[:, None]) for part in z])
        noises = torch.tensor([row.noise.mean for row in rows])
        error = (noises.std() / 12**0.5).item()
        by_hand = (drawn.var(0).sum(1).mean() / between).item()
        assert noises.mean().item() == pytest.approx(by_hand, abs=4 * error)
        assert rows[0].images == pytest.approx((1 + rows[0].noise.mean) / rows[0].bias)

    def test_gradient_and_cosine_are_elbo_s_own(self, script, known):
        model, images, exact, elbo = known
        rows = [script.measure(Iwae(1), model, images, exact, 5, seed) for seed in range(12)]
        between = exact.var(0).sum()
        own, wanted = (script.squared_mean(rows)[0] for rows in (elbo, exact))
        for found, expected in (
            (torch.tensor([row.gradient for row in rows]), own / between),
            (
                torch.tensor([row.cosine for row in rows]),
                (own + wanted - script.squared_mean(elbo - exact)[0]) / (2 * (own * wanted) ** 0.5),
            ),
        ):
            error = (found.std() / 12**0.5).item()
            assert found.mean().item() == pytest.approx(float(expected), abs=4 * error)
            assert error < 0.1 * abs(float(expected))

    def test_there_is_no_cosine_where_no_gradient_is_seen(self, script, known, monkeypatch):
        """Both squared lengths are estimates, and negative ones may have a positive product."""
        model, images, exact, _ = known
        monkeypatch.setattr(script, "squared_mean", lambda rows: (torch.tensor(-1e-5), 1e-5))
        assert math.isnan(script.measure(Iwae(1), model, images, exact, 2, 0).cosine)

    def test_bias_falls_with_samples_and_with_better_proposals_and_is_none_of_the_chains(
        self, script, known
    ):
        model, images, exact, _ = known
        rows = {
            name: script.measure(estimator, model, images, exact, 20, seed=0)
            for name, estimator in script.estimators(model, images, visits=3, seed=0).items()
        }
        elbo, ten, fifty, snis, coupled = rows.values()
        # A squared bias goes as 1 / K^2 where it is small: 25 lies between 10 and 50 samples.
        assert elbo.bias > 20 * ten.bias > 100 * fifty.bias > 0
        for biased in (elbo, ten):
            assert biased.bias > 4 * biased.error and biased.images > 0
        assert abs(snis.bias) < ten.bias / 10
        # One of 50 would be above 2 errors, if that were normal; the error is too large besides.
        assert abs(coupled.bias) < 2 * coupled.error and coupled.images is None
        assert coupled.error < ten.bias / 4  # so a bias like IWAE's is seen


def gradients_at(model, images, z):
    """Of ``log p(x, z)`` at ``z [n, 1, D]``, ``[n, parameters]``."""
    variance = model.likelihood.variance
    weight, bias = model.decoder.weight.detach(), model.decoder.bias.detach()
    pull = (images - z[:, 0] @ weight.T - bias) / variance
    return torch.cat([(pull[:, :, None] * z).flatten(1), pull], 1)


def test_the_reference_is_the_exact_gradient(double):
    """To the error of 2,000 draws: deviations of an image's gradient over sqrt(2,000), 4 errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        tables = importlib.import_module("explain_meeting_times")
    toy = LinearGaussian()
    toy.model.requires_grad_(False)
    posterior = tables.sample_posterior(toy.model, toy.images, seed=0)
    toy.model.decoder.requires_grad_(True)
    subject = tables.Subject(None, None, toy.model, toy.images, posterior, seed=0, max_steps=1)
    found = tables.posterior_gradients(subject, toy.model)
    assert not found.requires_grad
    exact = toy.posterior(toy.images)
    z = exact.sample((4000,))
    each = torch.stack([gradients_at(toy.model, toy.images, part[:, None]) for part in z])
    expected = gradients(toy, toy.images, exact.mean, exact.covariance_matrix)
    assert ((found - expected).abs() < 4 * each.std(0) / 2000**0.5).all()


def test_a_run_gets_a_table(script, tmp_path, capsys):
    settings = compose(["estimator=elbo", "trainer.max_epochs=1", *QUICK])
    data = settings.dataset.load(Path())
    training.run(settings, data, torch.device("cpu"), tmp_path, resume=False)
    script.main([str(tmp_path), "--images", "12", "--replicates", "2", "--visits", "1"])
    heading, _, *rows = capsys.readouterr().out.splitlines()
    assert heading.startswith(f"{tmp_path}: 12 training images, replicates 2, visits 1, seed 0;")
    names = [row[:15].strip() for row in rows]
    assert names == [
        "the gradient",
        "elbo",
        "iwae, K 10",
        "iwae, K 50",
        "snis, K 10",
        "coupled, K 10",
    ]
    assert all(len(row[15:].split()) == 8 for row in rows[1:]) and "nan" not in rows[0]


def test_in_training_the_last_model_and_what_the_run_remembers_are_measured(
    script, tmp_path, capsys
):
    """Its last checkpoint is put in the place of what the table is made of otherwise."""
    settings = compose(["estimator=snis", "trainer.max_epochs=1", *QUICK])
    data = settings.dataset.load(Path())
    training.run(settings, data, torch.device("cpu"), tmp_path, resume=False)
    state = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    small = ["--images", "12", "--replicates", "2"]
    given = script.parse([str(tmp_path), "--in-training", *small])[1]
    subject, memory = script.load_as_asked(given)
    index, images = script.choose(data, 12, 0)
    assert torch.equal(subject.images, images) and len(index.unique()) == 12
    assert torch.equal(images, data.train[index].flatten(1).float())
    for name, value in subject.model.state_dict().items():
        assert torch.equal(value, state["model"][name])
    remembered = state["estimator"]["memory"]
    found = script.estimators(subject.model, images, 5, 0, memory)
    for estimator in (found["snis, K 10"], found["coupled, K 10"]):
        for name, value in estimator.memory.state_dict().items():
            assert torch.equal(value, remembered[name][index])
    assert not found["snis, K 10"].refine_known
    # Where bits are drawn anew: as the run's memory has followed the encoder's means, or has not.
    means = {"encoder_mean": memory["mean"] + 1}
    for_data = ["dataset=mnist_dynamic"]
    for learnt in (memory, memory | means):
        anew = script.estimators(subject.model, images, 5, 0, learnt, for_data)
        assert anew["snis, K 10"].refine_known
        for name in ("snis, K 10", "coupled, K 10"):
            assert anew[name].follow_encoder == (learnt is not memory)
            state = anew[name].memory.state_dict()
            assert state.keys() == learnt.keys()
            assert all(torch.equal(value, learnt[key]) for key, value in state.items())
    learning = script.estimators(subject.model, images, 1, 0, None, for_data)
    assert learning["coupled, K 10"].follow_encoder
    capsys.readouterr()
    script.main([str(tmp_path), "--in-training", *small])
    heading, *rows = capsys.readouterr().out.splitlines()
    assert "replicates 2, in training, seed 0" in heading and len(rows) == 7


def test_weights_that_are_nan_are_told(script, tmp_path, capsys):
    settings = compose(["estimator=elbo", "trainer.max_epochs=1", *QUICK])
    data = settings.dataset.load(Path())
    training.run(settings, data, torch.device("cpu"), tmp_path, resume=False)
    path = tmp_path / "checkpoints" / "best.pt"
    state = checkpoint.load(path)
    state["model"]["decoder.0.weight"][0, 0] = math.nan
    checkpoint.save(path, state)
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        script.main([str(tmp_path), "--images", "12"])
    assert error.value.code == 2 and "a NaN or an infinity" in capsys.readouterr().err


def test_bad_arguments_are_told(script, capsys):
    for arguments, told in (
        (["nowhere"], "nowhere/checkpoints/best.pt"),
        (["run", "--images", "9"], "--images must be at least 10, got 9"),
        (["run", "--replicates", "1"], "--replicates must be at least 2, got 1"),
        (["run", "--visits", "-1"], "--visits must be at least 0, got -1"),
    ):
        with pytest.raises(SystemExit) as error:
            script.main(arguments)
        assert error.value.code == 2 and told in capsys.readouterr().err
