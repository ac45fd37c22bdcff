"""Probabilistic PCA's closed forms against scipy, written-out formulas and sampling."""

import copy

import numpy as np
import pytest
import torch
from references import LinearGaussian, flat, gradients, is_unbiased
from scipy.stats import multivariate_normal

from ucvae.config import build
from ucvae.errors import ConfigError
from ucvae.estimators.elbo import Elbo
from ucvae.estimators.iwae import Iwae
from ucvae.evaluation.importance import log_likelihood
from ucvae.models.ppca import LinearGaussianVAE, Ppca

pytestmark = pytest.mark.usefixtures("double")

SIZES = [(1, 1), (2, 5), (5, 3), (4, 40)]  # D below, above and far below P
sizes = pytest.mark.parametrize("dim, pixels", SIZES)


def small(dim=3, pixels=6, **settings):
    """A model whose bias is the mean image, and images a few standard deviations about it."""
    mean = torch.rand(pixels)
    return Ppca(dim, **settings).build(mean, levels=2), mean + 1.5 * torch.randn(7, pixels)


def numbers(model):
    """W, b, v and the marginal's covariance in numpy."""
    weight, bias = (p.detach().numpy() for p in (model.decoder.weight, model.decoder.bias))
    variance = model.likelihood.variance
    return weight, bias, variance, weight @ weight.T + variance * np.eye(len(bias))


class TestLogLikelihood:
    @sizes
    @pytest.mark.parametrize("variance", [1e-3, 0.1, 4.0])
    def test_is_that_of_the_marginal_gaussian(self, dim, pixels, variance):
        model, images = small(dim, pixels, variance=variance)
        _, bias, _, covariance = numbers(model)
        expected = multivariate_normal.logpdf(images.numpy().reshape(7, pixels), bias, covariance)
        torch.testing.assert_close(
            model.exact_log_likelihood(images).detach(), torch.as_tensor(expected)
        )

    @sizes
    def test_gradient(self, dim, pixels):
        # With C the marginal's covariance and u = C^-1 (x - b): du = u for b, (u u^T - C^-1) W.
        model, images = small(dim, pixels)
        weight, bias, _, covariance = numbers(model)
        inverse = np.linalg.inv(covariance)
        pull = (images.numpy() - bias) @ inverse
        expected = np.concatenate([((pull.T @ pull - 7 * inverse) @ weight).ravel(), pull.sum(0)])
        found = gradients(model.exact_log_likelihood(images).sum(), model.decoder)
        torch.testing.assert_close(found, torch.as_tensor(expected))

    def test_importance_sampling_converges_to_it(self):
        # Weights relative to p(x) have the mean 1; a standard deviation widened by 1.5 keeps
        # their variance finite. Control: the likelihood of a slightly larger variance.
        model, images = small(2, 5)
        with torch.no_grad():
            model.encoder.log_std += np.log(1.5)
            proposal = model.encode(images)
            weights = model.log_weight(images, proposal, torch.randn(7, 20_000, 2))
            exact = model.exact_log_likelihood(images)
            other = copy.deepcopy(model)
            other.likelihood.variance *= 1.1
            wrong = other.exact_log_likelihood(images)
        assert is_unbiased((weights - exact[:, None]).exp().T, torch.ones(7))
        assert not is_unbiased((weights - wrong[:, None]).exp().T, torch.ones(7))
        estimate = log_likelihood(model, images, 20_000, torch.Generator().manual_seed(0))
        # Standard errors of a log mean: the weights' relative deviation over sqrt(20,000).
        error = (weights - exact[:, None]).exp().std(1) / 20_000**0.5
        assert ((estimate - exact).abs() < 6 * error).all()

    def test_single_precision_is_good_to_its_rounding(self):
        # 784 squares of size 1 to 10 add up to some 1,000 nats: a few float32 roundings of that.
        model, images = small(100, 784)
        exact = model.exact_log_likelihood(images)
        single = copy.deepcopy(model).float().exact_log_likelihood(images.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=0)


@sizes
def test_posterior_is_the_joint_gaussian_s_conditional(dim, pixels):
    model, images = small(dim, pixels)
    weight, bias, _, covariance = numbers(model)
    gain = weight.T @ np.linalg.inv(covariance)  # Cov(z, x) Cov(x)^-1
    mean, found = model.posterior(images)
    torch.testing.assert_close(mean.detach(), torch.as_tensor((images.numpy() - bias) @ gain.T))
    torch.testing.assert_close(found.detach(), torch.as_tensor(np.eye(dim) - gain @ weight))


def test_agrees_with_the_reference_s_closed_form():
    for toy in (LinearGaussian(), LinearGaussian(dim=5, pixels=10, scale=0.6)):
        dim = toy.model.latent_dim
        model = Ppca(dim, variance=toy.scale**2).build(torch.zeros(toy.images.shape[1]), levels=2)
        model.decoder.load_state_dict(toy.model.decoder.state_dict())
        exact = model.exact_log_likelihood(toy.images)
        torch.testing.assert_close(exact, toy.log_likelihood(toy.images))
        for image, value in zip(toy.images, exact, strict=True):
            torch.testing.assert_close(gradients(value, model.decoder), toy.gradient(image))
        mean, covariance = model.posterior(toy.images)
        posterior = toy.posterior(toy.images)
        torch.testing.assert_close(mean, posterior.mean)
        torch.testing.assert_close(covariance.expand(3, dim, dim), posterior.covariance_matrix)


class TestStart:
    def test_weights_and_bias(self):
        mean = torch.rand(1, 28, 28)
        model = Ppca(latent_dim=100).build(mean, levels=2)
        weight = model.decoder.weight
        assert isinstance(model, LinearGaussianVAE) and weight.shape == (784, 100)
        assert model.decoder.bias.equal(mean.flatten())
        # 78,400 numbers of variance 1/100: standard errors 1/2,800 of the mean's unit 1/10, and
        # sqrt(2 / 78,400) = 1/198 of the variance.
        assert abs(weight.mean()) < 5 / 2800
        assert abs(weight.var() * 100 - 1) < 5 / 198

    def test_the_encoder_has_the_posterior_s_moments(self):
        model, images = small(4, 12)
        proposal = model.encode(images)
        mean, covariance = model.posterior(images)
        torch.testing.assert_close(proposal.mean, mean)
        torch.testing.assert_close(proposal.std, covariance.diagonal().sqrt().expand(7, 4))
        assert all(p.requires_grad for p in model.parameters())

    def test_from_the_command_line_s_choice(self):
        node = {
            "_target_": "ucvae.models.ppca.Ppca",
            "latent_dim": 3,
            "variance": 0.5,
            "train_decoder": False,
        }
        settings = build(node, "model")
        assert settings == Ppca(3, 0.5, False)
        model = settings.build(torch.rand(3, 4, 4), levels=256)
        assert model.likelihood.variance == 0.5
        assert model.decoder.weight.shape == (48, 3)
        assert build({"_target_": node["_target_"]}, "model") == Ppca(20, 0.1, True)

    @pytest.mark.parametrize(
        "key, value, message",
        [
            ("latent_dim", 0, "model.latent_dim must be at least 1, got 0"),
            ("variance", 0.0, "model.variance must be positive and finite, got 0.0"),
            ("variance", -1.0, "model.variance must be positive and finite, got -1.0"),
            ("variance", float("inf"), "model.variance: inf is not a number"),
            ("train_decoder", "maybe", "model.train_decoder: maybe is not true or false"),
        ],
    )
    def test_settings_outside_their_range_are_refused(self, key, value, message):
        with pytest.raises(ConfigError) as error:
            build({"_target_": "ucvae.models.ppca.Ppca", key: value}, "model")
        assert str(error.value) == message


@pytest.mark.parametrize("estimator", [Elbo(2), Iwae(4), Iwae(4, dreg=False)])
@pytest.mark.parametrize("train_decoder", [True, False])
def test_a_fixed_decoder_stays_while_the_encoder_learns(estimator, train_decoder):
    model, images = small(train_decoder=train_decoder)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        estimator(model, images, torch.Generator().manual_seed(0)).surrogate.backward()
        optimizer.step()
    for part, moves in (("encoder", True), ("decoder", train_decoder)):
        module = getattr(model, part)
        after = flat(module.state_dict().values())
        start = flat(before[f"{part}.{name}"] for name in module.state_dict())
        assert after.equal(start) != moves
        assert all(p.requires_grad == moves for p in module.parameters())
