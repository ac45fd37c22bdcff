"""``scripts/measure_bias.py``: ELBO's bias in closed form, and none of the chains."""

import importlib
from pathlib import Path

import pytest
import torch
from references import LinearGaussian

from ucvae.estimators.iwae import Iwae

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


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
        # The jackknife's variance is somewhat too large for a square, the more the fewer the rows.
        assert 1 < errors.square().mean() / values.var() < 1.3


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
        noises = torch.tensor([row.noise for row in rows])
        error = (noises.std() / 12**0.5).item()
        by_hand = (drawn.var(0).sum(1).mean() / between).item()
        assert noises.mean().item() == pytest.approx(by_hand, abs=4 * error)
        assert rows[0].images == pytest.approx((1 + rows[0].noise) / rows[0].bias)

    def test_bias_falls_with_samples_and_with_better_proposals_and_is_none_of_the_chains(
        self, script, known
    ):
        model, images, exact, _ = known
        rows = {
            name: script.measure(estimator, model, images, exact, 20, seed=0)
            for name, estimator in script.estimators(model, images, visits=3, seed=0).items()
        }
        assert list(rows) == ["elbo", "iwae, K 10", "iwae, K 50", "snis", "coupled"]
        assert rows["elbo"].bias > 10 * rows["iwae, K 10"].bias > 50 * rows["iwae, K 50"].bias
        for biased in ("elbo", "iwae, K 10"):
            assert rows[biased].bias > 4 * rows[biased].error and rows[biased].images > 0
        assert abs(rows["snis"].bias) < rows["iwae, K 10"].bias / 10
        assert abs(rows["coupled"].bias) < 3 * rows["coupled"].error
        assert rows["coupled"].error < rows["iwae, K 10"].bias / 4  # so a bias like it is seen
        assert rows["coupled"].images is None


def gradients_at(model, images, z):
    """Of ``log p(x, z)`` at ``z [n, 1, D]``, ``[n, parameters]``."""
    variance = model.likelihood.variance
    weight, bias = model.decoder.weight.detach(), model.decoder.bias.detach()
    pull = (images - z[:, 0] @ weight.T - bias) / variance
    return torch.cat([(pull[:, :, None] * z).flatten(1), pull], 1)


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
