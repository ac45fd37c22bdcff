"""ELBO and IWAE against autograd of their bounds, written out here with torch.distributions."""

import copy
from functools import partial

import pytest
import torch
from references import Correlated, LinearGaussian, gradients, is_unbiased
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ucvae.chains.thinning import thin
from ucvae.estimators import iwae
from ucvae.estimators.elbo import Elbo
from ucvae.estimators.iwae import Iwae, dreg_bound, reparameterized_bound, thinned_bound

pytestmark = pytest.mark.usefixtures("double")

TOY = LinearGaussian()
MODEL = TOY.model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def log_weights(images, num_samples):
    """``log p(x, z) - log q(z|x)`` on the noise that an estimator draws first, ``[n, K]``."""
    proposal = MODEL.encode(images)
    q = Normal(proposal.mean[:, None], proposal.std[:, None])
    noise = torch.randn(len(images), num_samples, 2, generator=generator())
    z = proposal.mean[:, None] + proposal.std[:, None] * noise
    log_likelihood = Normal(MODEL.decoder(z), TOY.scale).log_prob(images[:, None]).sum(-1)
    return log_likelihood + Normal(0.0, 1.0).log_prob(z).sum(-1) - q.log_prob(z).sum(-1)


def evidence_lower_bound(images, num_samples, analytic_kl):
    """The mean of the log weights, or with ``KL(q || p)`` by torch in place of its samples."""
    if not analytic_kl:
        return log_weights(images, num_samples).mean()
    proposal = MODEL.encode(images)
    q = Normal(proposal.mean, proposal.std)
    noise = torch.randn(len(images), num_samples, 2, generator=generator())
    z = proposal.mean[:, None] + proposal.std[:, None] * noise
    log_likelihood = Normal(MODEL.decoder(z), TOY.scale).log_prob(images[:, None]).sum(-1)
    return (log_likelihood.mean(-1) - kl_divergence(q, Normal(0.0, 1.0)).sum(-1)).mean()


def importance_weighted(images, num_samples):
    return (log_weights(images, num_samples).exp().mean(-1).log()).mean()


@pytest.mark.parametrize("analytic_kl", [True, False])
@pytest.mark.parametrize("num_samples", [1, 6])
def test_elbo(num_samples, analytic_kl):
    estimate = Elbo(num_samples, analytic_kl)(MODEL, TOY.images, generator())
    bound = evidence_lower_bound(TOY.images, num_samples, analytic_kl)
    torch.testing.assert_close(estimate.objective, bound.detach())
    assert not estimate.objective.requires_grad
    torch.testing.assert_close(gradients(-estimate.surrogate, MODEL), gradients(bound, MODEL))


@pytest.mark.parametrize("num_samples", [1, 6])
def test_iwae_with_plain_gradients(num_samples):
    estimate = Iwae(num_samples, dreg=False)(MODEL, TOY.images, generator())
    bound = importance_weighted(TOY.images, num_samples)
    torch.testing.assert_close(estimate.objective, bound.detach())
    assert not estimate.objective.requires_grad
    torch.testing.assert_close(gradients(-estimate.surrogate, MODEL), gradients(bound, MODEL))


@pytest.mark.parametrize("num_samples", [1, 6])
def test_iwae_with_dreg_has_the_bound_and_its_decoder_gradient(num_samples):
    estimate = Iwae(num_samples)(MODEL, TOY.images, generator())
    bound = importance_weighted(TOY.images, num_samples)
    torch.testing.assert_close(estimate.objective, bound.detach())
    assert not estimate.objective.requires_grad
    torch.testing.assert_close(
        gradients(-estimate.surrogate, MODEL.decoder), gradients(bound, MODEL.decoder)
    )


def test_a_single_dreg_sample_is_the_path_derivative():
    # K = 1: W = 1, and d log w / d z with q's own parameters held.
    proposal = MODEL.encode(TOY.images)
    noise = torch.randn(3, 1, 2, generator=generator())
    held = proposal.detach()
    z = proposal.transform(noise)
    expected = (MODEL.log_joint(TOY.images, z) - held.log_prob(z)).mean()
    estimate = Iwae(1)(MODEL, TOY.images, generator())
    torch.testing.assert_close(
        gradients(-estimate.surrogate, MODEL.encoder), gradients(expected, MODEL.encoder)
    )


class TestWithAFullCovariance:
    """Bounds of the same noise by torch's densities; the encoder's S is written out here."""

    toy = Correlated()

    def bounds(self, num_samples):
        """``log p(x|z)``, the divergence from the prior, and the log weights."""
        model, images = self.toy.model, self.toy.images
        encoder = model.encoder
        std = torch.log1p(encoder.std(images).exp()) + 1e-6
        below = torch.zeros(3, 2, 2)
        below[:, 1, 0] = encoder.below(images)[:, 0]
        scale = torch.diag_embed(std) @ (torch.eye(2) + below)
        q = MultivariateNormal(encoder.mean(images), scale_tril=scale)
        noise = torch.randn(3, num_samples, 2, generator=generator())
        z = q.mean[:, None] + torch.einsum("nij,nkj->nki", scale, noise)
        prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
        likelihood = Normal(model.decoder(z), self.toy.scale).log_prob(images[:, None]).sum(-1)
        log_q = q.log_prob(z.transpose(0, 1)).T
        return likelihood, kl_divergence(q, prior), likelihood + prior.log_prob(z) - log_q

    @pytest.mark.parametrize(
        "estimator, bound_of",
        [
            (Elbo(5), lambda likelihood, divergence, _: (likelihood.mean(-1) - divergence).mean()),
            (Elbo(5, analytic_kl=False), lambda *terms: terms[2].mean()),
            (Iwae(5, dreg=False), lambda *terms: terms[2].exp().mean(-1).log().mean()),
        ],
        ids=["elbo", "elbo by samples", "iwae"],
    )
    def test_bound_and_gradient(self, estimator, bound_of):
        bound = bound_of(*self.bounds(5))
        estimate = estimator(self.toy.model, self.toy.images, generator())
        torch.testing.assert_close(estimate.objective, bound.detach())
        torch.testing.assert_close(
            gradients(-estimate.surrogate, self.toy.model), gradients(bound, self.toy.model)
        )


@pytest.mark.parametrize("model", [MODEL, Correlated().model], ids=["diagonal", "full"])
class TestDregInExpectation:
    """DReG minus the plain gradient, on the same noise, has mean 0.

    100 calls on 400 replicates of one image, K = 4, each call a batch mean; for the test's rule see
    :mod:`references`. The difference of the wrong weighting (``W_k``) is the control.
    """

    images = TOY.images[:1].expand(400, -1)

    def differences(self, model, encoder_gradient):
        plain = Iwae(4, dreg=False)
        return torch.stack(
            [
                encoder_gradient(generator(seed))
                - gradients(-plain(model, self.images, generator(seed)).surrogate, model.encoder)
                for seed in range(100)
            ]
        )

    def dreg(self, model, source):
        return gradients(-Iwae(4)(model, self.images, source).surrogate, model.encoder)

    def weighted_by(self, model, power, source):
        """``sum_k W_k^power (d log w_k / d z_k) (d z_k / d phi)``."""
        proposal = model.encode(self.images)
        z = proposal.transform(torch.randn(400, 4, 2, generator=source))
        values = model.log_joint(self.images, z) - proposal.detach().log_prob(z)
        weights = torch.softmax(values, -1).detach() ** power
        return gradients((weights * values).sum(-1).mean(), model.encoder)

    def test_is_the_plain_gradient(self, model):
        found = self.differences(model, partial(self.dreg, model))
        assert is_unbiased(found, torch.zeros(found.shape[1]), batches=100)

    def test_weights_are_squared(self, model):
        squared = self.weighted_by(model, 2, generator())
        torch.testing.assert_close(self.dreg(model, generator()), squared)
        wrong = self.differences(model, partial(self.weighted_by, model, 1))
        assert not is_unbiased(wrong, torch.zeros(wrong.shape[1]), batches=100)


@pytest.mark.parametrize("model", [MODEL, Correlated().model], ids=["diagonal", "full"])
@pytest.mark.parametrize("dreg", [True, False])
class TestThinned:
    """A bound of six samples an image, thinned at 0.3, against all of them on the same noise.

    50 calls on 200 copies of three images, whose decisions are independent: each call's gradient
    is a batch mean. The rule is that of :mod:`references`.
    """

    images = TOY.images.repeat(200, 1)

    def noise(self):
        return torch.randn(3, 6, 2, generator=generator(7)).repeat(200, 1, 1)

    def exact(self, model, dreg):
        bound_of = dreg_bound if dreg else reparameterized_bound
        return bound_of(model, self.images, model.encode(self.images), self.noise())

    def thinned(self, model, dreg, seed=0, min_weight=0.3):
        proposal, source = model.encode(self.images), generator(seed)
        settings = dict(dreg=dreg, min_weight=min_weight, generator=source)
        return thinned_bound(model, self.images, proposal, self.noise(), **settings)

    def is_unbiased(self, model, dreg):
        calls = (self.thinned(model, dreg, seed) for seed in range(50))
        found = torch.stack([gradients(bound.surrogate, model) for bound in calls])
        exact = gradients(self.exact(model, dreg).surrogate, model)
        return is_unbiased(found, exact, batches=50)

    def test_has_the_same_gradient_in_expectation(self, model, dreg):
        assert self.is_unbiased(model, dreg)

    def test_must_make_up_for_what_it_drops(self, model, dreg, monkeypatch):
        def uncompensated(particles, min_weight, source):
            kept = thin(particles, min_weight, source)
            of_image = particles.coefficient[kept.image_index]
            same = (particles.noise[kept.image_index] == kept.noise).all(-1)
            return kept._replace(coefficient=(of_image * same).sum(-1, keepdim=True))

        monkeypatch.setattr(iwae, "thin", uncompensated)
        assert not self.is_unbiased(model, dreg)

    def test_with_nothing_to_thin_is_the_same(self, model, dreg):
        exact, thinned = self.exact(model, dreg), self.thinned(model, dreg, min_weight=1e-12)
        torch.testing.assert_close(
            gradients(thinned.surrogate, model), gradients(exact.surrogate, model)
        )

    def test_the_bound_and_its_weights_are_of_all_samples(self, model, dreg):
        exact, thinned = self.exact(model, dreg), self.thinned(model, dreg)
        for name in ("value", "log_weights", "weights"):
            torch.testing.assert_close(getattr(thinned, name), getattr(exact, name))
            assert not getattr(thinned, name).requires_grad

    def test_few_samples_are_differentiated(self, model, dreg, monkeypatch):
        counts, log_joint = [], type(model).log_joint

        def spy(self, images, z):
            if torch.is_grad_enabled():
                counts.append(z.shape[:2].numel())
            return log_joint(self, images, z)

        monkeypatch.setattr(type(model), "log_joint", spy)
        self.thinned(model, dreg)
        # Of 600 images 6 samples each; at most 1 / 0.3 + 1 are left, and a round number in all.
        (count,) = counts
        assert count <= 600 * 4 + 128


def test_a_thinned_dreg_sample_is_weighted_by_its_own_weight_once_more():
    """Not by the one that it has after thinning: ``m^2`` in the place of ``m W_k``."""

    class Twice(TestThinned):
        def thinned(self, model, dreg, seed=0, min_weight=0.3):
            proposal, noise = model.encode(self.images), self.noise()
            weights = torch.softmax(model.log_weight(self.images, proposal, noise).detach(), -1)
            everyone = torch.arange(len(self.images))
            particles = iwae.SignedParticles(everyone, noise, weights)
            index, noise, coefficient = thin(particles, min_weight, generator(seed))
            z = proposal.rows(index).transform(noise)
            z.register_hook(lambda gradient: gradient * coefficient[:, :, None])
            q = proposal.detach().rows(index)
            left = model.log_joint(self.images[index], z) - q.log_prob(z)
            surrogate = -(coefficient * left).sum() / len(self.images)
            return iwae.Bound(surrogate, surrogate, surrogate, surrogate)

    assert not Twice().is_unbiased(MODEL, True)


def test_thinning_hides_no_nan():
    model = copy.deepcopy(MODEL)
    with torch.no_grad():
        model.decoder.weight[0, 0] = torch.nan
    estimate = Iwae(4, min_weight=0.3)(model, TOY.images, generator())
    assert estimate.surrogate.isnan() and estimate.objective.isnan()


def test_a_min_weight_outside_its_range_is_refused():
    for value in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"min_weight must be in \[0, 1\), got {value}"):
            Iwae(min_weight=value)


def test_ess_is_that_of_the_weights():
    estimate = Iwae(6)(MODEL, TOY.images, generator())
    weights = torch.softmax(log_weights(TOY.images, 6), -1)
    expected = (1 / weights.square().sum(-1)).mean().detach()
    torch.testing.assert_close(estimate.diagnostics["proposal/ess"], expected)


@pytest.mark.parametrize("estimator", [Elbo, Iwae])
def test_settings_outside_their_range_are_refused(estimator):
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        estimator(num_samples=0)
