import copy

import pytest
import torch
from references import (
    Correlated,
    LinearGaussian,
    flat,
    gradients,
    integrate,
    is_unbiased,
)
from torch.distributions import MultivariateNormal, kl_divergence

from ucvae.chains import SignedParticles, run_lagged_chains
from ucvae.chains.thinning import padded, thin
from ucvae.errors import ConfigError
from ucvae.estimators import coupled
from ucvae.estimators.coupled import Coupled, Kernel, Proposals, decoder_gradient
from ucvae.estimators.iwae import Iwae
from ucvae.models import posterior
from ucvae.models.layers import round_number
from ucvae.models.mlp import Mlp
from ucvae.models.vae import VAE

pytestmark = pytest.mark.usefixtures("double")

TOY = LinearGaussian()
MODEL = TOY.model
SMALL = dict(num_samples=4, lag=2, burn_in=1)
# Where particles are followed one by one, all of them are kept.
EXACT = SMALL | dict(min_coefficient=0.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestUnbiased:
    """The decoder's gradient of whole calls against the exact one.

    50 calls, each on 400 replicates of an image: its gradient is their mean, a batch mean already.
    The rule is that of :mod:`references`; IWAE with the same K is the control.
    """

    image = TOY.images[2]
    images = image.expand(400, -1)

    def decoder_gradients(self, estimator, model=MODEL):
        estimator.begin(model, len(self.images))
        everyone = torch.arange(len(self.images))
        estimates = (estimator(model, self.images, generator(seed), everyone) for seed in range(50))
        return torch.stack([gradients(-e.surrogate, model.decoder) for e in estimates])

    @pytest.mark.parametrize(
        "kernel, num_samples, lag, burn_in",
        [
            (Kernel.isir, 4, 1, 1),
            (Kernel.isir, 3, 3, 0),
            (Kernel.isir_disir, 4, 2, 1),
            (Kernel.isir_disir, 3, 2, 4),
        ],
    )
    def test_where_iwae_is_not(self, kernel, num_samples, lag, burn_in):
        truth = TOY.gradient(self.image)
        estimator = Coupled(num_samples, lag, burn_in, kernel)
        assert is_unbiased(self.decoder_gradients(estimator), truth)
        assert not is_unbiased(self.decoder_gradients(Iwae(num_samples)), truth)

    @pytest.mark.parametrize("proposals", list(Proposals))
    @pytest.mark.parametrize("kernel", list(Kernel))
    def test_with_an_encoder_of_full_covariance(self, kernel, proposals):
        toy, truth = Correlated(), TOY.gradient(self.image)
        estimator = Coupled(3, 1, 1, kernel, proposals=proposals)
        assert is_unbiased(self.decoder_gradients(estimator, toy.model), truth)
        assert not is_unbiased(self.decoder_gradients(Iwae(3), toy.model), truth)

    def test_where_most_particles_are_thinned(self):
        # Coefficients are below 1/2 at L = 2, so 0.4 thins nearly all of them.
        estimator = Coupled(**SMALL, min_coefficient=0.4)
        assert is_unbiased(self.decoder_gradients(estimator), TOY.gradient(self.image))

    @pytest.mark.parametrize("proposals", list(Proposals))
    @pytest.mark.parametrize("kernel", list(Kernel))
    def test_of_a_batch_of_unlike_images(self, kernel, proposals):
        # An error in which image a particle belongs to would show here only.
        images, everyone = TOY.images.repeat(200, 1), torch.arange(200 * len(TOY.images))
        estimator = Coupled(**SMALL, kernel=kernel, proposals=proposals)
        estimator.begin(MODEL, len(images))
        estimates = (estimator(MODEL, images, generator(seed), everyone) for seed in range(50))
        means = torch.stack([gradients(-e.surrogate, MODEL.decoder) for e in estimates])
        truth = torch.stack([TOY.gradient(image) for image in TOY.images]).mean(0)
        assert is_unbiased(means, truth)
        assert not is_unbiased(means, TOY.gradient(TOY.images[0]))


def test_the_encoder_gets_dreg_s_gradient_on_the_same_noise():
    # Both draw the bound's noise first.
    estimate = Coupled(**SMALL)(MODEL, TOY.images, generator())
    dreg = Iwae(4)(MODEL, TOY.images, generator())
    torch.testing.assert_close(
        gradients(estimate.surrogate, MODEL.encoder), gradients(dreg.surrogate, MODEL.encoder)
    )
    torch.testing.assert_close(estimate.diagnostics["train/iwae_bound"], dreg.objective)
    torch.testing.assert_close(
        estimate.diagnostics["proposal/ess"], dreg.diagnostics["proposal/ess"]
    )


def in_one_pass(model, images, particles):
    """``sum_i c_i grad log p(x_i, z_i)`` by one differentiable pass; the flat gradient."""
    proposal = model.encode(images).detach().rows(particles.image_index)
    z = proposal.transform(particles.noise)
    terms = particles.coefficient * model.log_joint(images[particles.image_index], z)
    return gradients(terms.sum(), model.decoder)


@pytest.mark.parametrize("max_steps", [1000, 3])
@pytest.mark.parametrize("kernel", list(Kernel))
def test_the_decoder_gets_the_particles_gradient_and_nothing_of_the_bound(kernel, max_steps):
    # Those of every image, truncated or not: to leave out the truncated would bias the more.
    images = TOY.images.repeat(20, 1)
    estimate = Coupled(**EXACT, kernel=kernel, max_steps=max_steps)(MODEL, images, generator())
    assert estimate.chains.truncated.any() == (max_steps == 3)
    particles = estimate.chains.particles
    total = integrate(particles, 60, torch.ones(*particles.coefficient.shape, 1))
    torch.testing.assert_close(total, torch.ones_like(total))
    expected = in_one_pass(MODEL, images, particles) / 60
    torch.testing.assert_close(gradients(-estimate.surrogate, MODEL.decoder), expected)
    assert all(p.requires_grad for p in MODEL.parameters())


def test_the_chains_have_the_estimator_s_settings(monkeypatch):
    seen = {}

    def spy(*args, **kwargs):
        seen.update(kwargs)
        return run_lagged_chains(*args, **kwargs)

    monkeypatch.setattr(coupled, "run_lagged_chains", spy)
    settings = dict(max_steps=77, survival=0.125, beta=0.25)
    Coupled(5, 3, 2, Kernel.isir, **settings)(MODEL, TOY.images, generator())
    expected = settings | dict(num_samples=5, lag=3, burn_in=2, kernel=Kernel.isir)
    assert {key: seen[key] for key in expected} == expected
    assert seen["dtype"] == torch.float64


@pytest.mark.parametrize("rows", [1, 7, 40, 10_000])
def test_slices_of_the_differentiable_pass_add_up(monkeypatch, rows):
    model = Mlp(latent_dim=3, hidden=[6]).build(torch.rand(9), levels=2)
    images = (torch.rand(5, 9) < 0.5).double()
    particles = Coupled(**SMALL)(model, images, generator()).chains.particles
    expected = in_one_pass(model, images, particles)
    monkeypatch.setattr(VAE, "rows_at_a_time", lambda self, images: rows)
    sizes, log_likelihood = [], model.log_likelihood

    def spy(images, z):
        sizes.append(z.shape[:2].numel())
        return log_likelihood(images, z)

    monkeypatch.setattr(model, "log_likelihood", spy)
    gradient = decoder_gradient(model, images, model.encode(images).detach(), particles)
    torch.testing.assert_close(flat(gradient), expected)
    # A group is never split; else no slice is larger than it should be.
    assert max(sizes) <= max(rows, 4) and sum(sizes) == particles.coefficient.numel()


def test_thinned_particles_are_made_up_to_a_round_number(monkeypatch):
    model = Mlp(latent_dim=3, hidden=[6]).build(torch.rand(9), levels=2)
    images = (torch.rand(50, 9) < 0.5).double()
    particles = Coupled(**SMALL)(model, images, generator()).chains.particles
    thinned = thin(particles, 0.1, generator())
    sizes, log_likelihood = [], model.log_likelihood

    def spy(images, z):
        sizes.append(len(z))
        return log_likelihood(images, z)

    monkeypatch.setattr(model, "log_likelihood", spy)
    gradient = decoder_gradient(model, images, model.encode(images).detach(), thinned)
    monkeypatch.undo()
    torch.testing.assert_close(flat(gradient), in_one_pass(model, images, thinned))
    assert sizes == [len(padded(thinned).image_index)]
    assert sizes[0] > len(thinned.image_index)


@pytest.mark.parametrize("kernel", ["isir", "isir_hmc"])
def test_images_that_are_left_are_made_up_to_a_round_number(monkeypatch, kernel):
    images = TOY.images.repeat(70, 1)
    proposal, log_weight, sizes = MODEL.encode(images).detach(), MODEL.log_weight, []

    def spy(images, proposal, noise):
        sizes.append(len(images))
        return log_weight(images, proposal, noise)

    estimator = Coupled(**EXACT, kernel=kernel)
    with monkeypatch.context() as patched:
        patched.setattr(MODEL, "log_weight", spy)
        rounded = estimator.run_chains(MODEL, images, proposal, generator())
        made_up = sizes.copy()
        sizes.clear()
        patched.setattr(posterior, "round_number", lambda count: count)
        exact = estimator.run_chains(MODEL, images, proposal, generator())
    assert sizes[0] == 210 and made_up == [min(round_number(size), 210) for size in sizes]
    assert made_up != sizes
    for one, other in zip(rounded.particles, exact.particles, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(rounded.evaluations, exact.evaluations)


@pytest.mark.parametrize("burn_in", [0, 1, 100])
@pytest.mark.parametrize("kernel", list(Kernel))
def test_every_log_weight_is_of_its_own_image(monkeypatch, kernel, burn_in):
    # While some are left, and at a long burn-in again when all have met, one after the other.
    images = TOY.images.repeat(7, 1)
    proposal = MODEL.encode(images).detach()
    sizes = []

    def spy(log_weight, *arguments, **settings):
        def checked(noise, image_index):
            found = log_weight(noise, image_index)
            rows = proposal.rows(image_index)
            torch.testing.assert_close(found, MODEL.log_weight(images[image_index], rows, noise))
            sizes.append(len(image_index))
            return found

        return run_lagged_chains(checked, *arguments, **settings)

    monkeypatch.setattr(coupled, "run_lagged_chains", spy)
    estimator = Coupled(num_samples=4, lag=2, burn_in=burn_in, kernel=kernel)
    estimator.run_chains(MODEL, images, proposal, generator())
    assert sizes[0] == 21
    assert min(sizes) < 21 or (kernel is not Kernel.isir_disir and burn_in == 100)


def test_a_measure_without_particles_has_the_gradient_zero():
    image_index = torch.zeros(1, dtype=torch.long)
    particles = SignedParticles(image_index, torch.zeros(1, 4, 2), torch.ones(1, 4))
    none = SignedParticles(*(part[:0] for part in particles))
    proposal = MODEL.encode(TOY.images).detach()
    gradient = decoder_gradient(MODEL, TOY.images, proposal, thin(none, 0.1, generator()))
    assert [g.shape for g in gradient] == [p.shape for p in MODEL.decoder.parameters()]
    assert not flat(gradient).any()


def test_a_decoder_that_is_not_trained_is_refused():
    model = copy.deepcopy(MODEL)
    model.decoder.requires_grad_(False)
    with pytest.raises(ConfigError, match="estimator=coupled: .* decoder is not trained; use"):
        Coupled(**SMALL)(model, TOY.images, generator())


class TestDiagnostics:
    @pytest.mark.parametrize("kernel", list(Kernel))
    def test_correction_norm_is_the_sum_of_its_absolute_coefficients(self, kernel):
        estimate = Coupled(**EXACT, kernel=kernel)(MODEL, TOY.images, generator(1))
        correction = estimate.chains.correction
        sizes = integrate(
            correction._replace(coefficient=correction.coefficient.abs()),
            3,
            torch.ones(*correction.coefficient.shape, 1),
        )
        assert (sizes > 0).any()
        norm = estimate.diagnostics["coupling/correction_norm"]
        torch.testing.assert_close(norm, sizes.mean())

    def test_correction_norm_is_zero_where_the_chains_met_at_once(self):
        # At a large burn-in every pair has met before the correction begins.
        estimate = Coupled(4, 2, 100)(MODEL, TOY.images, generator())
        assert estimate.diagnostics["coupling/correction_norm"] == 0

    def test_mismatch_is_the_divergence_of_the_proposal_from_the_posterior(self):
        images = TOY.images[:1].expand(20_000, -1)
        chains = Coupled(10, 2, 1).run_chains(
            MODEL, images, MODEL.encode(images).detach(), generator()
        )
        proposal = MODEL.encode(images[:1])
        diagonal = MultivariateNormal(proposal.mean, torch.diag_embed(proposal.std**2))
        divergence = kl_divergence(TOY.posterior(images[:1]), diagonal)
        evidence = TOY.log_likelihood(images[:1])
        assert is_unbiased(chains.mean_log_weight[:, None], divergence + evidence)
        assert not is_unbiased(chains.log_mean_weight[:, None], divergence + evidence)
        # The first sum alone has the bias of two steps.
        z = TOY.transform(images[0], chains.main.noise)
        log_weights = MODEL.log_joint(images[:1], z.flatten(0, 1)[None])[0] - (
            diagonal.log_prob(z.flatten(0, 1))
        )
        main = integrate(chains.main, len(images), log_weights.view(-1, 10, 1))
        assert not is_unbiased(main, divergence + evidence)
        # log of the mean of 19 weights is too low by half their relative variance over 19, to the
        # first order; mismatch is too large by that.
        noise = torch.randn(100_000, 1, 2)
        weights = TOY.log_weight(images[0])(noise, torch.arange(len(noise))).exp()
        first_order = weights.var() / weights.mean() ** 2 / 2 / 19
        assert 0 < chains.mismatch.mean() - divergence < 2 * first_order

    def test_mismatch_is_logged(self):
        estimate = Coupled(**SMALL)(MODEL, TOY.images, generator())
        assert estimate.diagnostics["proposal/mismatch"] == estimate.chains.mismatch.mean()


def test_thinning_spares_a_call_s_differentiable_pass_most_particles(monkeypatch):
    counts = []

    def spy(model, images, proposal, particles):
        counts.append(particles.coefficient.numel())
        return decoder_gradient(model, images, proposal, particles)

    monkeypatch.setattr(coupled, "decoder_gradient", spy)
    for least in (0.0, 0.03):
        Coupled(min_coefficient=least)(MODEL, TOY.images, generator())
    assert sum(counts[2:]) < 0.7 * sum(counts[:2])


def test_there_is_no_objective():
    # Nobody knows log p(x); the value of the surrogate means nothing (trap 7).
    assert Coupled(**SMALL)(MODEL, TOY.images, generator()).objective is None


def test_truncated_images_are_told():
    estimate = Coupled(num_samples=2, lag=1, max_steps=2)(
        MODEL, TOY.images.repeat(50, 1), generator()
    )
    assert 0 < estimate.chains.truncated.sum() < 150


class TestBeta:
    def test_is_frozen_within_a_call(self):
        estimator = Coupled(**SMALL, beta=0.3)
        estimate = estimator(MODEL, TOY.images, generator())
        assert estimator.current_beta == 0.3
        again = estimator(MODEL, TOY.images, generator())
        assert torch.equal(estimate.chains.particles.noise, again.chains.particles.noise)

    def test_moves_by_the_formula(self):
        estimator = Coupled(**SMALL, beta=0.3)
        estimate = estimator(MODEL, TOY.images, generator())
        estimator.adapt(estimate)
        ess = float(estimate.chains.ess)
        assert float(estimator.current_beta) == pytest.approx(
            0.3 - 0.01 * (ess - 0.3 * 4), abs=1e-15
        )
        assert float(estimator.current_beta) != 0.3
        assert float(estimate.diagnostics["coupling/beta"]) == 0.3  # the one that was used

    @pytest.mark.parametrize("ess, clipped", [(1000.0, 1e-6), (-1000.0, 1 - 1e-6)])
    def test_is_clipped(self, ess, clipped):
        estimator = Coupled(**SMALL)
        estimate = estimator(MODEL, TOY.images, generator())
        estimate.chains = estimate.chains._replace(ess=torch.tensor(ess))
        estimator.adapt(estimate)
        assert float(estimator.current_beta) == pytest.approx(clipped, abs=1e-15)

    @pytest.mark.parametrize("settings", [dict(adapt_beta=False), dict(kernel=Kernel.isir)])
    def test_stays_where_it_has_no_reason_to_move(self, settings):
        estimator = Coupled(**SMALL, **settings, beta=0.3)
        estimator.adapt(estimator(MODEL, TOY.images, generator()))
        assert estimator.current_beta == 0.3

    def test_moves_where_the_kernel_is_given_by_name(self):
        estimator = Coupled(**SMALL, kernel="isir_disir")
        estimator.adapt(estimator(MODEL, TOY.images, generator()))
        assert estimator.current_beta != 0.5

    def test_changes_the_next_call(self):
        low, high = Coupled(**SMALL, beta=0.1), Coupled(**SMALL, beta=0.9)
        noise = [e(MODEL, TOY.images, generator()).chains.particles.noise for e in (low, high)]
        assert noise[0].shape != noise[1].shape or not torch.equal(*noise)

    def test_survives_a_checkpoint(self):
        estimator, restored = Coupled(**SMALL), Coupled(**SMALL)
        estimator.adapt(estimator(MODEL, TOY.images, generator()))
        restored.load_state_dict(estimator.state_dict())
        assert torch.equal(restored.current_beta, estimator.current_beta)
        estimates = [e(MODEL, TOY.images, generator(1)) for e in (estimator, restored)]
        for first, second in zip(*(e.chains.particles for e in estimates), strict=True):
            assert torch.equal(first, second)

    def test_in_a_checkpoint_does_not_move_on(self):
        estimator = Coupled(**SMALL)
        state = estimator.state_dict()
        estimator.adapt(estimator(MODEL, TOY.images, generator()))
        assert state["beta"] == 0.5


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_samples=1), "num_samples must be at least 2, got 1"),
        (dict(lag=0), "lag must be at least 1, got 0"),
        (dict(burn_in=-1), "burn_in must be at least 0, got -1"),
        (dict(lag=9, max_steps=9), r"max_steps must be at least burn_in \+ lag = 10, got 9"),
        (dict(survival=0.5), r"survival must be in \[0, 0.5\), got 0.5"),
        (dict(survival=torch.nan), r"survival must be in \[0, 0.5\), got nan"),
        (dict(beta=1.0), r"beta must be in \[0, 1\), got 1.0"),
        (dict(beta=torch.nan), r"beta must be in \[0, 1\), got nan"),
        (
            dict(kernel="disir"),
            "kernel must be one of isir, .*, got disir, whose chains",
        ),
        (dict(beta=-0.5), r"beta must be in \[0, 1\), got -0.5"),
        (dict(min_coefficient=-0.1), r"min_coefficient must be in \[0, 1\), got -0.1"),
        (dict(min_coefficient=1.0), r"min_coefficient must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Coupled(**settings)
