import math

import pytest
import torch
from references import LinearGaussian, is_unbiased

from ucvae.errors import NonFiniteError
from ucvae.evaluation import importance
from ucvae.evaluation.importance import ImportanceSampling, log_likelihood, proposals_of
from ucvae.models.gaussians import Gaussian
from ucvae.models.refinement import refine
from ucvae.models.vae import VAE

pytestmark = pytest.mark.usefixtures("double")

TOY = LinearGaussian()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Given:
    """A model whose log weights are handed out one after the other, the same for every image."""

    latent_dim = 1

    def __init__(self, log_weights, rows=8192):
        self.left = log_weights
        self.rows = rows

    def rows_at_a_time(self, images):
        return self.rows

    def encode(self, images):
        return Gaussian(images, images)

    def log_weight(self, images, proposal, noise):
        count = noise.shape[1]
        given, self.left = self.left[:count], self.left[count:]
        return given.expand(len(images), -1)


@pytest.mark.parametrize("refinements", [0, 3])
@pytest.mark.parametrize("rows", [8192, 20])
def test_weights_average_to_the_evidence(monkeypatch, rows, refinements):
    """``E exp(estimate) = p(x)`` exactly, whatever S, the proposal, and the slices of S samples.

    2,000 replicates of an image; rule of :mod:`references`. Control: the plain mean of the log
    weights, the ELBO.
    """
    monkeypatch.setattr(VAE, "rows_at_a_time", lambda self, images: rows)
    image = TOY.images[0]
    exact = TOY.log_likelihood(image[None]).detach()
    estimate = log_likelihood(TOY.model, image.expand(2000, -1), 50, generator(), None, refinements)
    ratio = (estimate - exact).exp()[:, None]
    assert is_unbiased(ratio, torch.ones(1))

    proposal = TOY.model.encode(image[None])
    elbo = TOY.model.log_weight(image[None], proposal, torch.randn(1, 100_000, 2)).detach()
    assert not is_unbiased((elbo - exact).T, torch.zeros(1))


def test_approaches_the_closed_form():
    # The bias is -var(w / p(x)) / 2S and the standard error sqrt(var / S).
    estimate = log_likelihood(TOY.model, TOY.images, 100_000, generator())
    exact = TOY.log_likelihood(TOY.images).detach()
    proposal = TOY.model.encode(TOY.images)
    weights = TOY.model.log_weight(TOY.images, proposal, torch.randn(3, 100_000, 2)).detach()
    variance = (weights - exact[:, None]).exp().var(1)
    assert ((estimate - exact).abs() < 5 * (variance / 100_000).sqrt()).all()
    # Within 5 standard errors of each image's own value and far from the other images'.
    assert (estimate - exact.roll(1)).abs().min() > 0.1


def test_refined_proposals_tighten_the_bound():
    # The bias is -var(w / p(x)) / 2S. The posterior is Gaussian, and the fit finds it: what is left
    # is the widening's and the encoder's share, a variance of some 0.3 where the encoder's is far
    # above 5. 400 replicates of each image.
    toy = LinearGaussian(dim=5, pixels=10, scale=0.6)
    images, exact = toy.images.repeat(400, 1), toy.log_likelihood(toy.images).detach().repeat(400)
    refined = log_likelihood(toy.model, images, 20, generator(), None, 40) - exact
    encoded = log_likelihood(toy.model, images, 20, generator()) - exact
    assert refined.mean().abs() < 0.02 and refined.std() < 0.2
    assert encoded.mean() < -0.3


def test_refined_proposals_are_widened_and_mixed_with_the_encoder_s():
    toy = LinearGaussian(dim=5, pixels=10, scale=0.6)
    proposal = proposals_of(toy.model, toy.images, 60, generator())
    encoded = toy.model.encode(toy.images).detach()
    assert torch.equal(proposal.wide.mean, encoded.mean) and proposal.share == 0.1
    # The fit is the posterior, wider by 1 + sqrt(0.2 / 5) = 1.2.
    covariance = proposal.main.scale @ proposal.main.scale.mT
    expected = 1.2**2 * toy.posterior(toy.images).covariance_matrix
    torch.testing.assert_close(covariance, expected.expand_as(covariance), rtol=1e-3, atol=1e-4)
    assert torch.equal(proposals_of(toy.model, toy.images, 0, generator()).std, encoded.std)


def test_every_refinement_is_made(monkeypatch):
    """The fit does not end where its ELBO, by ten samples, happens not to rise."""
    made = []

    def spy(*arguments, **settings):
        made.append(refine(*arguments, **settings))
        return made[-1]

    monkeypatch.setattr(importance, "refine", spy)
    proposals_of(TOY.model, TOY.images, 30, generator())
    assert made[0].evaluations.tolist() == len(TOY.images) * [30 * importance.REFINEMENT_SAMPLES]


def test_results_name_the_kind():
    assert ImportanceSampling().name == "importance"
    assert ImportanceSampling(refinements=7).name == "importance_refined_7"


@pytest.mark.parametrize("rows", [1, 7, 20, 8192])
def test_slices_add_up(rows):
    values = 300 * torch.randn(20)
    estimate = log_likelihood(Given(values, rows), torch.zeros(1, 4), 20, generator())
    assert float(estimate) == pytest.approx(float(values.logsumexp(0)) - math.log(20), abs=1e-9)


@pytest.mark.parametrize("rows", [10, 25, 8192])
def test_every_image_is_evaluated_once_in_order(rows):
    class ByImage(Given):
        def log_weight(self, images, proposal, noise):
            return images[:, :1].expand(-1, noise.shape[1])

    done = []
    images = torch.arange(7.0)[:, None]
    estimate = log_likelihood(ByImage(None, rows), images, 10, generator(), done.append)
    torch.testing.assert_close(estimate, torch.arange(7.0))
    assert sum(done) == 7


def test_float32_weights_are_averaged_in_float64():
    values = torch.zeros(1000, dtype=torch.float32)
    estimate = log_likelihood(Given(values), torch.zeros(1, 4), 1000, generator())
    assert estimate.dtype == torch.float64
    assert float(estimate) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_invalid_weight_is_an_error_that_says_where(value):
    values = torch.zeros(20)
    values[13] = value
    with pytest.raises(NonFiniteError, match=r"log-likelihood: image 0 \(3 of 3 in all\)"):
        log_likelihood(Given(values), torch.zeros(3, 4), 20, generator())


def test_minus_infinity_is_a_weight_of_zero_unless_all_are():
    values = torch.full((20,), -math.inf)
    with pytest.raises(NonFiniteError, match="the value -inf"):
        log_likelihood(Given(values), torch.zeros(1, 4), 20, generator())
    values[3] = 2.0
    estimate = log_likelihood(Given(values), torch.zeros(1, 4), 20, generator())
    assert float(estimate) == pytest.approx(2 - math.log(20))


def test_only_the_first_images_on_request():
    estimate = ImportanceSampling(num_samples=5, num_images=2)(TOY.model, TOY.images, generator())
    expected = log_likelihood(TOY.model, TOY.images[:2], 5, generator())
    assert torch.equal(estimate, expected)
    every = ImportanceSampling(num_samples=5)(TOY.model, TOY.images, generator())
    assert len(every) == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_samples=0), "num_samples must be at least 1, got 0"),
        (dict(refinements=-1), "refinements must be at least 0, got -1"),
        (dict(num_images=1), "num_images must be at least 2 or null, got 1"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImportanceSampling(**settings)
