import pytest
import torch
from references import LinearGaussian, has_frequencies, is_unbiased

from chains.toy import incumbent_first, of_image, row, toy_log_weight
from ucvae.chains import reference
from ucvae.chains.kernels import Arms, State, coupled_step, draw_noise, step

pytestmark = pytest.mark.usefixtures("double")

CPU = torch.device("cpu")
DIM = 3


def arms_of(beta, num_samples):
    return Arms.of(torch.tensor(beta), num_samples) if beta else None


def noise_for(num_images, num_samples, seed=0, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    return draw_noise(
        num_images, num_samples, dim, generator=generator, device=CPU, dtype=torch.float64
    )


def states(num_images):
    noise = torch.randn(num_images, DIM)
    return State(noise, toy_log_weight(noise[:, None], torch.arange(num_images))[:, 0])


def evaluate(noise):
    return toy_log_weight(noise, torch.arange(len(noise)))


def literal(state):
    """A literal state of which only the selected noise counts."""
    return reference.State([state], [1.0], 0, 0)


def assert_state(state, samples, i, expected):
    noise, weights = incumbent_first(expected)
    torch.testing.assert_close(samples.noise[i], noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(samples.weights[i], weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.noise[i], expected.selected, rtol=0, atol=1e-12)
    assert float(state.log_weight[i]) == pytest.approx(of_image(i)(expected.selected), abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.4, 0.95])
@pytest.mark.parametrize("num_samples", [2, 3, 7])
class TestAgainstTheLiteralAlgorithms:
    def test_step(self, num_samples, beta):
        start, noise = states(40), noise_for(40, num_samples)
        state, samples = step(start, noise, evaluate, arms_of(beta, num_samples))
        for i in range(40):
            expected = reference.step(literal(start.noise[i]), row(noise, i), of_image(i), beta)
            assert_state(state, samples, i, expected)

    def test_coupled_step(self, num_samples, beta):
        first, second, noise = states(40), states(40), noise_for(40, num_samples)
        moved = coupled_step(first, second, noise, evaluate, arms_of(beta, num_samples))
        for i in range(40):
            x, y = reference.coupled_step(
                literal(first.noise[i]), literal(second.noise[i]), row(noise, i), of_image(i), beta
            )
            assert_state(moved.first, moved.first_samples, i, x)
            assert_state(moved.second, moved.second_samples, i, y)
            # Where the selected samples are one and the same, and only there, the chains have met
            # (a tiny beta makes them the same to rounding sooner, which need not be noticed).
            if beta != 1e-6:
                assert bool(moved.met[i]) == bool((x.selected == y.selected).all())

    def test_equal_states_stay_equal_and_move_as_one_chain(self, num_samples, beta):
        start, noise, arms = states(40), noise_for(40, num_samples), arms_of(beta, num_samples)
        alone, samples = step(start, noise, evaluate, arms)
        moved = coupled_step(start, start, noise, evaluate, arms)
        for state in (moved.first, moved.second):
            torch.testing.assert_close(state, alone, rtol=0, atol=1e-14)
        for both in (moved.first_samples, moved.second_samples):
            torch.testing.assert_close(both, samples, rtol=0, atol=1e-14)

    def test_each_chain_s_samples_are_those_of_the_single_step(self, num_samples, beta):
        first, second = states(40), states(40)
        noise, arms = noise_for(40, num_samples), arms_of(beta, num_samples)
        moved = coupled_step(first, second, noise, evaluate, arms)
        for start, samples in ((first, moved.first_samples), (second, moved.second_samples)):
            expected = step(start, noise, evaluate, arms)[1]
            torch.testing.assert_close(samples, expected, rtol=0, atol=1e-14)


def test_chains_meet_only_in_a_fresh_sample_of_isir():
    first, second, noise = states(2000), states(2000), noise_for(2000, 4)
    met = coupled_step(first, second, noise, evaluate, None).met
    assert 0 < met.sum() < 2000
    assert not coupled_step(first, second, noise, evaluate, arms_of(0.5, 4)).met.any()


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_chains_that_are_close_have_not_met(beta):
    # DISIR draws two chains together, to rounding in the end; they meet in a fresh sample alone.
    first = states(2000)
    second = State(first.noise + 1e-9, first.log_weight)
    moved = coupled_step(first, second, noise_for(2000, 4), evaluate, arms_of(beta, 4))
    assert torch.allclose(moved.first.noise, moved.second.noise, rtol=0, atol=1e-8)
    assert torch.equal(moved.met, (moved.first.noise == moved.second.noise).all(-1))
    assert moved.met.any() == (beta == 0) and not moved.met.all()


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.3, 0.9, 1 - 1e-6])
@pytest.mark.parametrize("num_samples", [2, 3, 6])
def test_disir_s_samples_are_standard_normal_with_correlation_beta_to_the_distance(
    num_samples, beta
):
    # The samples are linear in K independent N(0, 1) (the incumbent and the K - 1 fresh draws), so
    # feeding the K unit vectors as K dimensions reads off the map, whose square is the covariance.
    slots = torch.arange(num_samples)
    unit = torch.eye(num_samples)
    noise = noise_for(num_samples, num_samples, dim=num_samples)._replace(
        slot=slots, fresh=unit[1:].expand(num_samples, -1, -1)
    )
    incumbent = unit[:1].expand(num_samples, -1)
    others = Arms.of(torch.tensor(beta), num_samples).propose(incumbent, noise)
    expected = torch.tensor(beta) ** (slots[:, None] - slots).abs()
    for a in range(num_samples):
        in_order = torch.cat([others[a, :a], incumbent[a : a + 1], others[a, a:]])
        torch.testing.assert_close(in_order @ in_order.T, expected, rtol=0, atol=1e-12)


def test_every_image_has_a_slot_of_its_own():
    slots = torch.stack([noise_for(6, 3, seed).slot for seed in range(2000)])
    assert has_frequencies(torch.bincount(slots.flatten()).double(), torch.full((3,), 1 / 3))
    # One slot for a whole batch would have every pair equal; independent ones have a third.
    equal = (slots[:, 0] == slots[:, 1]).sum()
    counts = torch.stack([equal, 2000 - equal]).double()
    assert has_frequencies(counts, torch.tensor([1 / 3, 2 / 3]))


def test_noise_is_standard_normal_and_uniform():
    noise = noise_for(20_000, 4)
    fresh = noise.fresh.flatten(1)
    moments = torch.cat([fresh, fresh**2, fresh[:, :1] * fresh[:, 1:]], dim=1)
    truth = torch.cat([torch.zeros(9), torch.ones(9), torch.zeros(8)])
    assert is_unbiased(moments, truth)
    assert noise.uniforms.dtype == torch.float64
    counts = torch.histc(noise.uniforms, bins=10, min=0, max=1)
    assert has_frequencies(counts, torch.full((10,), 0.1))


class TestInvariance:
    """A step from the exact posterior ends in the exact posterior.

    Moments of z and z z^T over 40,000 chains, of the selected sample and of the K weighted ones.
    """

    rows = 40_000
    toy = LinearGaussian()
    image = toy.images[0]

    def moments(self, noise, weights=None):
        z = self.toy.transform(self.image, noise)
        values = torch.stack([z[..., 0], z[..., 1], z[..., 0] ** 2, z[..., 1] ** 2, z.prod(-1)], -1)
        return values if weights is None else (weights[:, :, None] * values).sum(1)

    def truth(self):
        posterior = self.toy.posterior(self.image[None])
        mean, covariance = posterior.mean[0], posterior.covariance_matrix[0]
        second = covariance + torch.outer(mean, mean)
        return torch.stack([*mean, second[0, 0], second[1, 1], second[0, 1]])

    def after_a_step(self, arms):
        log_weight = self.toy.log_weight(self.image)

        def evaluate(noise):
            return log_weight(noise, torch.zeros(len(noise), dtype=torch.long))

        z = self.toy.posterior(self.image[None]).sample((self.rows,))[:, 0]
        start = self.toy.to_noise(self.image, z)
        state = State(start, evaluate(start[:, None])[:, 0])
        return step(state, noise_for(self.rows, 4, dim=2), evaluate, arms)

    @pytest.mark.parametrize("beta", [0.0, 0.8])
    def test_of_the_kernels(self, beta):
        state, samples = self.after_a_step(arms_of(beta, 4))
        assert is_unbiased(self.moments(state.noise), self.truth())
        assert is_unbiased(self.moments(samples.noise, samples.weights), self.truth())

    def test_is_lost_where_proposals_are_too_wide(self):
        arms = arms_of(0.8, 4)
        state, samples = self.after_a_step(arms._replace(mix=1.2 * arms.mix))
        assert not is_unbiased(self.moments(state.noise), self.truth())
        assert not is_unbiased(self.moments(samples.noise, samples.weights), self.truth())

    def test_is_not_had_by_importance_sampling(self):
        # Without an incumbent the weighted samples are IWAE's, which are biased.
        noise = torch.randn(self.rows, 4, 2)
        log_weights = self.toy.log_weight(self.image)(noise, torch.zeros(self.rows).long())
        weights = torch.softmax(log_weights, -1)
        assert not is_unbiased(self.moments(noise, weights), self.truth())
