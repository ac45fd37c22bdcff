"""Refinement of proposals: the natural gradient against the exact one."""

import itertools
import math

import pytest
import torch
from references import LinearGaussian
from torch.distributions import MultivariateNormal, kl_divergence

from ucvae.models import refinement
from ucvae.models.gaussians import FullGaussian
from ucvae.models.refinement import improve, log_joint_gradient, refine

pytestmark = pytest.mark.usefixtures("double")

TOY = LinearGaussian(dim=5, pixels=10, scale=0.6)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def visit(toy, images, proposal, count, source, rate):
    noise = torch.randn(*proposal.mean.shape[:1], count, proposal.mean.shape[1], generator=source)
    _, gradient = log_joint_gradient(toy.model, images, proposal.transform(noise))
    return improve(proposal, noise, gradient, torch.full((len(images),), rate))


def distance(toy, images, proposal):
    """``KL(q || p(z|x))`` of each image."""
    q = MultivariateNormal(proposal.mean, scale_tril=proposal.scale)
    return kl_divergence(q, toy.posterior(images))


class TestImprove:
    def test_is_a_step_of_the_natural_gradient(self):
        # For a Gaussian posterior N(mu, V) h is affine in xi: h = m + A xi with m = S^T V^-1 (mu -
        # mean) and A = I - S^T V^-1 S. Least squares finds both from D + 1 samples but for the
        # ridge, which shrinks A by about 1 / K: 5e-4 for 2,000.
        posterior, rate = TOY.posterior(TOY.images), 0.3
        precision = posterior.precision_matrix
        tilt = (torch.eye(5) + 0.2 * torch.ones(5, 5)).tril()
        start = FullGaussian(posterior.mean + 0.05, posterior.scale_tril @ tilt)
        to_mean = (posterior.mean - start.mean)[:, :, None]
        m = (start.scale.mT @ precision @ to_mean)[:, :, 0]
        a = torch.eye(5) - start.scale.mT @ precision @ start.scale
        assert (m.norm(dim=-1) < 3).all() and (torch.linalg.matrix_norm(a) < 3).all()  # no cap
        lower = a.tril() - torch.diag_embed(a.diagonal(dim1=1, dim2=2)) / 2
        moved = visit(TOY, TOY.images, start, 2000, generator(), rate)
        close = dict(rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(
            moved.mean, start.mean + rate * (start.scale @ m[:, :, None])[:, :, 0], **close
        )
        torch.testing.assert_close(moved.scale, start.scale + rate * start.scale @ lower, **close)
        # The covariance itself moves along S A S^T to first order.
        small = visit(TOY, TOY.images, start, 2000, generator(), 1e-4)
        change = (small.scale @ small.scale.mT - start.scale @ start.scale.mT) / 1e-4
        torch.testing.assert_close(change, start.scale @ a @ start.scale.mT, rtol=5e-3, atol=1e-3)

    def test_few_samples_tell_of_the_directions_that_they_span(self):
        # K - 1 = 2 differences of 5 dimensions: along them h's slope is A's, but for the ridge,
        # which these long differences make small.
        posterior = TOY.posterior(TOY.images[:1])
        start = FullGaussian(posterior.mean, 1.5 * posterior.scale_tril)
        noise = 100 * torch.randn(1, 3, 5, generator=generator())
        a = torch.eye(5) * (1 - 1.5**2)
        moved = improve(
            start,
            noise,
            ((noise @ a.T) - noise) @ torch.linalg.inv(start.scale),
            torch.tensor([1e-3]),
        )
        found = torch.linalg.solve_triangular(
            start.scale[0], (moved.scale - start.scale)[0] / 1e-3, upper=False
        )
        # A Q and its transpose: Q projects onto the span along what the columns' ridges leave out.
        found = found + found.T
        differences = noise[0] - noise[0].mean(0)
        weighted = differences * differences.norm(dim=0)  # h is -1.25 xi
        q = differences.T @ torch.linalg.pinv(differences @ weighted.T) @ weighted
        torch.testing.assert_close(found, -1.25 * (q + q.T) / 2, rtol=1e-3, atol=1e-3)

    def test_dimensions_in_which_nothing_varies_take_no_part(self):
        """10 samples of 103 dimensions, of which the posterior differs from the prior in 3."""
        dim, active = 103, torch.tensor([5, 50, 101])
        start = FullGaussian(torch.zeros(40, dim), torch.eye(dim).repeat(40, 1, 1))
        noise = torch.randn(40, 10, dim, generator=generator())
        a = torch.zeros(dim, dim)
        a[active[:, None], active] = torch.tensor(
            [[-1.0, 0.5, 0.3], [0.5, -0.8, 0.0], [0.3, 0, -0.6]]
        )
        # The prior's gradient is -z, and z is xi: h = A xi.
        moved = improve(start, noise, noise @ a - noise, torch.full((40,), 1e-4))
        lower = (moved.scale - start.scale) / 1e-4
        found = lower + lower.mT
        outside = torch.ones(dim, dim).index_put((active[:, None], active), torch.tensor(0.0))
        assert (found * outside).abs().max() < 1e-8
        # Under one ridge for all columns 10 samples of 103 leave a tenth of A, and noise.
        x = noise - noise.mean(1, keepdim=True)
        plain = (x @ a).mT @ torch.linalg.inv(x @ x.mT + torch.eye(10)) @ x
        plain = (plain + plain.mT) / 2
        error, error_of_plain = (torch.linalg.matrix_norm(b - a).mean() for b in (found, plain))
        assert error < 0.4 * torch.linalg.matrix_norm(a)
        assert error_of_plain > 0.9 * torch.linalg.matrix_norm(a)

    def test_rests_at_the_posterior(self):
        # There h = S^T grad log p + xi vanishes for every sample, so few samples do no harm.
        posterior = TOY.posterior(TOY.images)
        exact = FullGaussian(posterior.mean, posterior.scale_tril)
        moved = visit(TOY, TOY.images, exact, 2, generator(), 0.5)
        torch.testing.assert_close(moved.mean, exact.mean)
        torch.testing.assert_close(moved.scale, exact.scale)

    def test_finds_the_posterior_from_the_encoder_s_proposal(self):
        proposal = FullGaussian.of(TOY.model.encode(TOY.images).detach())
        source, distances = generator(), []
        for _ in range(60):
            distances.append(distance(TOY, TOY.images, proposal))
            proposal = visit(TOY, TOY.images, proposal, 10, source, 0.3)
        assert (distances[0] > 1).all()
        assert (distances[20] < 0.1 * distances[0]).all()
        assert (distance(TOY, TOY.images, proposal) < 1e-4).all()

    def test_keeps_the_scale_s_diagonal_positive_whatever_the_samples(self):
        proposal = FullGaussian.of(TOY.model.encode(TOY.images).detach())
        for sign in (-1, 1):
            noise = torch.randn(3, 4, 5, generator=generator())
            moved = improve(proposal, noise, sign * 1e8 * noise, torch.full((3,), 0.5))
            assert (moved.scale.diagonal(dim1=1, dim2=2) > 0).all()
            assert moved.mean.isfinite().all() and (moved.scale.triu(1) == 0).all()

    @pytest.mark.parametrize("size", [0.1, 100.0])
    def test_is_what_its_formulas_say(self, size):
        # As they are written, with A as a matrix; far from the posterior both are capped.
        count, dim = 4, 6
        proposal = FullGaussian(torch.randn(3, dim), 0.3 * torch.randn(3, dim, dim).tril())
        noise, gradient = torch.randn(3, count, dim), size * torch.randn(3, count, dim)
        rate = torch.tensor([0.1, 0.3, 0.5])
        found = improve(proposal, noise, gradient, rate)
        for i, (mean, scale) in enumerate(zip(*proposal, strict=True)):
            h = gradient[i] @ scale + noise[i]
            x, y = noise[i] - noise[i].mean(0), h - h.mean(0)
            v = y.square().mean(0).sqrt()
            v = v / v.mean()
            a = y.T @ torch.linalg.inv(x * v @ x.T + torch.eye(count)) @ x * v
            m = h.mean(0) - a @ noise[i].mean(0)
            a = (a + a.T) / 2
            m, a = (part * min(1, refinement.MAX_NORM / part.norm()) for part in (m, a))
            lower = a.tril() - a.diagonal().diag() / 2
            torch.testing.assert_close(found.mean[i], mean + rate[i] * scale @ m)
            torch.testing.assert_close(found.scale[i], scale + rate[i] * scale @ lower)

    @pytest.mark.parametrize("dim", [1, 20, 300])
    @pytest.mark.parametrize("count", [2, 10])
    def test_a_gradient_whose_square_is_infinite_moves_it_as_far_as_is_allowed(self, dim, count):
        noise, direction = (torch.randn(3, count, dim).float() for _ in range(2))
        proposal = FullGaussian(torch.zeros(3, dim).float(), torch.eye(dim).float().repeat(3, 1, 1))
        moved, rate = [], torch.full((3,), 0.5).float()
        for size in (1e6, 1e16, 1e25):
            moved.append(improve(proposal, noise, size * direction, rate).scale)
            assert moved[-1].isfinite().all() and (moved[-1].diagonal(0, 1, 2) > 0).all()
        torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(moved[2], moved[0], rtol=1e-3, atol=1e-4)

    def test_keeps_the_diagonal_positive_where_all_but_rounding_cancels(self):
        # A gradient by which left^T right is antisymmetric, in float32: its symmetric part is 0.
        # The samples are orthogonal in all columns, and h as large in each: their ridges are one.
        draws = torch.randn(300, 11, 10)
        noise = 3 * torch.linalg.qr(draws - draws.mean(1, keepdim=True))[0]
        turned = torch.linalg.qr(torch.randn(300, 10, 10))[0]
        quarter = torch.kron(torch.eye(5), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
        gradient = 1e8 * noise @ (turned @ quarter @ turned.mT) - noise
        proposal = FullGaussian(torch.zeros(300, 10), torch.eye(10).repeat(300, 1, 1))
        single = FullGaussian(*(part.float() for part in proposal))
        moved = improve(single, noise.float(), gradient.float(), torch.full((300,), 0.5).float())
        assert (moved.scale.diagonal(dim1=1, dim2=2) > 0).all()

    def test_samples_that_are_no_draws_of_the_gaussian_are_left_out(self):
        proposal = FullGaussian(torch.randn(3, 6), 0.3 * torch.randn(3, 6, 6).tril())
        noise, gradient = torch.randn(3, 5, 6), torch.randn(3, 5, 6)
        rate, drawn = torch.tensor([0.1, 0.3, 0.5]), torch.rand(3, 5).argsort(1) < 3
        found = improve(proposal, noise, gradient, rate, drawn)
        noise, gradient = (part[drawn].view(3, 3, 6) for part in (noise, gradient))
        expected = improve(proposal, noise, gradient, rate)
        torch.testing.assert_close(found.mean, expected.mean)
        torch.testing.assert_close(found.scale, expected.scale)

    def test_needs_two_samples(self):
        proposal = FullGaussian.of(TOY.model.encode(TOY.images).detach())
        with pytest.raises(ValueError, match="noise must have at least 2 samples, got 1"):
            improve(proposal, torch.zeros(3, 1, 5), torch.zeros(3, 1, 5), torch.full((3,), 0.5))


def test_log_joint_gradient_is_autograd_s():
    z = torch.randn(3, 4, 5, requires_grad=True)
    value, gradient = log_joint_gradient(TOY.model, TOY.images, z)
    expected = TOY.model.log_joint(TOY.images, z)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), z)[0])
    assert not value.requires_grad and z.grad is None
    assert all(p.requires_grad for p in TOY.model.decoder.parameters())


class TestRefine:
    SETTINGS = dict(num_samples=10, rate=0.3, most=40)

    def refine(self, proposal, gap, images=TOY.images, **settings):
        return refine(TOY.model, images, proposal, generator(), gap=gap, **self.SETTINGS | settings)

    def test_goes_on_until_the_gap_is_closed(self):
        # For a Gaussian posterior the gap of an exact proposal is 0 whatever the samples, and one
        # step from it is a step that stays.
        posterior = TOY.posterior(TOY.images)
        encoded = FullGaussian.of(TOY.model.encode(TOY.images).detach())
        mixed = FullGaussian(encoded.mean.clone(), encoded.scale.clone())
        mixed.mean[1], mixed.scale[1] = posterior.mean[1], posterior.scale_tril[1]
        refined = self.refine(mixed, gap=0.01)
        steps = refined.evaluations / 10
        assert steps[1] == 1 and (steps[[0, 2]] > 3).all() and (steps < 40).all()
        assert (distance(TOY, TOY.images, encoded) > 20).all()
        assert (distance(TOY, TOY.images, refined.proposal) < 0.25).all()
        torch.testing.assert_close(refined.proposal.mean[1], posterior.mean[1])
        # The ELBO is that of the last step's samples: here all but log p(x).
        torch.testing.assert_close(refined.elbo, TOY.log_likelihood(TOY.images), rtol=0, atol=1.0)

    def test_what_has_nothing_left_to_gain_is_left(self, monkeypatch):
        # Steps of no length and a gap that never closes: for the number T of further steps
        # P(T >= j) is that of j independent values in rising order, 1 / j!. So E[T] = e - 1 =
        # 1.718, E[T^2] = sum_j (2 j - 1) / j! = e + 1, and 4 standard errors over 2,000 images are
        # 4 sqrt((e + 1 - (e - 1)^2) / 2000) = 0.078.
        monkeypatch.setattr(refinement, "round_number", lambda count: count)
        posterior = TOY.posterior(TOY.images[:1])
        images = TOY.images[:1].repeat(2000, 1)
        wide = FullGaussian(posterior.mean, 1.5 * posterior.scale_tril)
        proposal = FullGaussian(*(part.repeat(2000, *(part.ndim - 1) * [1]) for part in wide))
        refined = self.refine(proposal, gap=0.0, images=images, rate=1e-9)
        further = refined.evaluations / 10 - 1
        assert abs(further.mean() - (math.e - 1)) < 0.078

    def test_ends_at_the_first_step_that_closes_the_gap_or_falls_short(self, monkeypatch):
        # Told again from each step's own samples, of which the first has fewer.
        steps, gap = [], 0.05

        def spy(proposal, noise, gradient, rate):
            log_weights = TOY.model.log_weight(TOY.images[:1], proposal, noise)
            steps.append((log_weights[0].detach(), float(rate)))
            return improve(proposal, noise, gradient, rate)

        monkeypatch.setattr(refinement, "improve", spy)
        encoded = FullGaussian.of(TOY.model.encode(TOY.images[:1]).detach())
        closed = 0
        for seed in range(40):
            steps.clear()
            refined = refine(
                *(TOY.model, TOY.images[:1], encoded, generator(seed)),
                **self.SETTINGS | dict(first=3, gap=gap, most=1000, rate=0.2),
            )
            bounds = [float(log_weights.mean()) for log_weights, _ in steps]
            gaps = [float(values.exp().mean().log() - values.mean()) for values, _ in steps]
            fits = [gap_ <= gap for gap_ in gaps]
            rises = [True, *(one < other for one, other in itertools.pairwise(bounds))]
            assert all(rises[:-1]) and not any(fits[:-1]) and (fits[-1] or not rises[-1])
            assert [rate for _, rate in steps] == [0.2] * (len(steps) - 1) + [0.1]
            assert refined.elbo.tolist() == pytest.approx(bounds[-1:])
            assert refined.evaluations.tolist() == [3 + 10 * (len(steps) - 1)]
            closed += fits[-1]
        assert 0 < closed < 40

    def test_is_not_left_at_once_where_the_elbo_is_minus_infinity(self, monkeypatch):
        def impossible(model, images, z):
            value, gradient = log_joint_gradient(model, images, z)
            return value - torch.inf, gradient

        monkeypatch.setattr(refinement, "log_joint_gradient", impossible)
        encoded = FullGaussian.of(TOY.model.encode(TOY.images).detach())
        assert (self.refine(encoded, gap=0.5, most=3).evaluations > 10).all()

    def test_others_go_on_with_them_to_a_round_number(self):
        # Nine proposals that are wrong and 31 that are exact: ten go on.
        posterior = TOY.posterior(TOY.images[:1])
        mean, scale = posterior.mean.repeat(40, 1), posterior.scale_tril.repeat(40, 1, 1)
        mean[3:12] += 5
        proposal, images = FullGaussian(mean, scale), TOY.images[:1].repeat(40, 1)
        evaluations = self.refine(proposal, gap=0.1, images=images, most=2).evaluations
        assert (evaluations[3:12] == 20).all() and (evaluations == 20).sum() == 10

    def test_takes_no_more_steps_than_allowed(self):
        encoded = FullGaussian.of(TOY.model.encode(TOY.images).detach())
        assert self.refine(encoded, gap=0.0, most=3).evaluations.tolist() == 3 * [30]
        # Without a gap it takes them all, though sampling alone ends most rises within three steps.
        assert self.refine(encoded, gap=None, most=60).evaluations.tolist() == 3 * [600]
        assert self.refine(encoded, gap=1e9).evaluations.tolist() == 3 * [10]

    def test_the_first_step_may_take_fewer_samples(self):
        encoded = FullGaussian.of(TOY.model.encode(TOY.images).detach())
        refined = self.refine(encoded, gap=None, most=3, first=4)
        assert refined.evaluations.tolist() == 3 * [24]
        once = self.refine(encoded, gap=0.0, most=1, first=4)
        expected = visit(TOY, TOY.images, encoded, 4, generator(), 0.3)
        for found, right in zip(once.proposal, expected, strict=True):
            assert torch.equal(found, right)

    @pytest.mark.parametrize("gap, rate", [(0.0, 0.3), (1e9, 0.15)])
    def test_a_step_is_that_of_improve_and_half_as_long_where_it_fits(self, gap, rate):
        encoded = FullGaussian.of(TOY.model.encode(TOY.images).detach())
        once = self.refine(encoded, gap=gap, most=1)
        expected = visit(TOY, TOY.images, encoded, 10, generator(), rate)
        for found, right in zip(once.proposal, expected, strict=True):
            assert torch.equal(found, right)

    def test_images_do_not_mix(self):
        # Each row's result is a function of its own image: one that needs many steps changes
        # nothing in another's proposal but the random numbers.
        encoded = FullGaussian.of(TOY.model.encode(TOY.images).detach())
        refined = self.refine(encoded, gap=0.05)
        swapped = torch.tensor([2, 0, 1])
        other = self.refine(encoded.rows(swapped), gap=0.05, images=TOY.images[swapped])
        assert (distance(TOY, TOY.images[swapped], other.proposal) < 0.25).all()
        assert (distance(TOY, TOY.images, refined.proposal) < 0.25).all()
