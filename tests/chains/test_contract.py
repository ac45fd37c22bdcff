"""What every kernel made of moves keeps to: one table, one contract.

The truth is that of a linear-Gaussian model, in closed form: its posterior, and the gradient of its
log-likelihood, whose 12 entries are first and second moments of the posterior. As in
``test_unbiased.py`` a test rejects a bias of some 6 standard errors over R = 20,000 replicates,
0.045 standard deviations, and each is shown at the end to reject kernels that are wrong.
"""

from dataclasses import dataclass

import pytest
import torch
from references import LinearGaussian, gradients, integrate, is_unbiased

from ucvae.chains import ComposedKernel, Kernel, run_lagged_chains
from ucvae.chains.kernels import Samples, State
from ucvae.chains.moves import Disir, Isir, Move
from ucvae.chains.selection import select
from ucvae.estimators.coupled import Coupled

pytestmark = pytest.mark.usefixtures("double")

REPLICATES = 20_000
NUM_SAMPLES = 3
TOY = LinearGaussian()
IMAGE = TOY.images[1]
CPU = torch.device("cpu")


@dataclass
class Listed(ComposedKernel):
    listed: tuple[Move, ...]

    def moves(self):
        return self.listed


KERNELS = {
    "isir": Listed((Isir(),)),
    "isir_disir": Listed((Isir(), Disir(0.7))),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def evaluate(noise):
    return TOY.log_weight(IMAGE)(noise, torch.zeros(len(noise), dtype=torch.long)).detach()


def state(noise):
    return State(noise, evaluate(noise[:, None])[:, 0])


def from_the_posterior():
    posterior = TOY.posterior(IMAGE[None])
    normal = torch.randn(REPLICATES, 2, generator=generator(1))
    z = posterior.mean + normal @ posterior.scale_tril[0].T
    return state(TOY.to_noise(IMAGE, z))


def at(point):
    return state(torch.tensor(point).expand(REPLICATES, -1))


def moments(noise):
    return TOY.joint_gradient(IMAGE, TOY.transform(IMAGE, noise))


def averages(samples):
    return (samples.weights[:, :, None] * moments(samples.noise)).sum(1)


def draw(move, seed=2):
    kind = dict(generator=generator(seed), device=CPU, dtype=torch.float64)
    return move.draw(REPLICATES, NUM_SAMPLES, 2, **kind)


def leaves_the_posterior_invariant(move):
    """Both the next state and the average over the samples that it was selected from."""
    after, samples = move.step(from_the_posterior(), draw(move), evaluate)
    truth = TOY.gradient(IMAGE)
    return is_unbiased(moments(after.noise), truth) and is_unbiased(averages(samples), truth)


def has_the_law_of_single_chains_in_pairs(move):
    """By the difference between a chain of a pair and a single one, from the same fixed states."""
    starts = at([1.0, -0.5]), at([-0.4, 0.8])
    moved = move.coupled_step(*starts, draw(move, 3), evaluate)
    chains = (moved.first, moved.first_samples), (moved.second, moved.second_samples)
    for seed, (start, (after, samples)) in enumerate(zip(starts, chains, strict=True)):
        alone, alone_samples = move.step(start, draw(move, 4 + seed), evaluate)
        differences = torch.cat(
            [
                moments(after.noise) - moments(alone.noise),
                averages(samples) - averages(alone_samples),
            ],
            dim=1,
        )
        if not is_unbiased(differences, torch.zeros(differences.shape[1])):
            return False
    return True


def meets_in_equal_states_alone(move):
    moved = move.coupled_step(at([1.0, -0.5]), at([-0.4, 0.8]), draw(move), evaluate)
    first, second = moved.first.rows(moved.met), moved.second.rows(moved.met)
    assert moved.met.any() == move.meets
    return first.noise.equal(second.noise) and first.log_weight.equal(second.log_weight)


def estimates(kernel, log_weight=None, **settings):
    defaults = dict(num_samples=NUM_SAMPLES, lag=1, burn_in=1, dtype=torch.float64)
    settings = defaults | settings
    chains = run_lagged_chains(
        log_weight or TOY.log_weight(IMAGE),
        REPLICATES,
        2,
        generator=generator(6),
        kernel=kernel,
        **settings,
    )
    return chains, integrate(chains.particles, REPLICATES, moments(chains.particles.noise))


def is_right(kernel, **settings):
    return is_unbiased(estimates(kernel, **settings)[1], TOY.gradient(IMAGE))


@every_kernel
class TestMoves:
    def test_leave_the_posterior_invariant(self, kernel):
        assert all(map(leaves_the_posterior_invariant, kernel.moves()))

    def test_have_the_law_of_single_chains_in_pairs(self, kernel):
        assert all(map(has_the_law_of_single_chains_in_pairs, kernel.moves()))

    def test_meet_in_equal_states_alone(self, kernel):
        assert all(map(meets_in_equal_states_alone, kernel.moves()))

    def test_draw_for_each_image(self, kernel):
        # A draw that images shared would leave a batch's mean as scattered as one image's.
        start = at([1.0, -0.5])
        for move in kernel.moves():
            after, _ = move.step(start, draw(move), evaluate)
            one, two = moments(after.noise).tensor_split(2)
            centred = (one - one.mean(0)) * (two - two.mean(0))
            # Independent halves have no covariance: 0 to six standard errors.
            assert (centred.mean(0).abs() < 6 * centred.std(0) / len(one) ** 0.5).all()


@every_kernel
class TestEstimate:
    @pytest.mark.parametrize("lag, burn_in", [(1, 1), (3, 0), (2, 3)])
    def test_is_unbiased(self, kernel, lag, burn_in):
        chains, found = estimates(kernel, lag=lag, burn_in=burn_in)
        assert not chains.truncated.any()
        assert is_unbiased(found, TOY.gradient(IMAGE))
        ones = torch.ones(*chains.particles.coefficient.shape, 1)
        total = integrate(chains.particles, REPLICATES, ones)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-10)

    def test_is_biased_without_the_correction(self, kernel):
        main = estimates(kernel)[0].main
        assert not is_unbiased(
            integrate(main, REPLICATES, moments(main.noise)), TOY.gradient(IMAGE)
        )

    def test_is_unbiased_with_roulette(self, kernel):
        settings = dict(max_steps=2, survival=0.4)
        assert is_right(kernel, **settings)
        assert not is_right(kernel, max_steps=2)

    @pytest.mark.parametrize("burn_in", [0, 1])
    def test_is_unbiased_from_samples_that_are_given(self, kernel, burn_in):
        noise = torch.randn(REPLICATES, NUM_SAMPLES, 2, generator=generator(7))
        asked = 0

        def log_weight(noise, image_index):
            nonlocal asked
            asked += noise[..., 0].numel()
            return TOY.log_weight(IMAGE)(noise, image_index)

        first = noise, evaluate(noise)
        chains, found = estimates(kernel, log_weight, first=first, burn_in=burn_in)
        assert is_unbiased(found, TOY.gradient(IMAGE))
        used = chains.evaluations.sum() - asked
        assert used in (REPLICATES, REPLICATES * NUM_SAMPLES)

    def test_has_no_source_of_randomness_but_the_generator(self, kernel):
        before = torch.get_rng_state()
        one, again = estimates(kernel), estimates(kernel)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(one[1], again[1])


def test_listed_moves_are_the_kernel_of_that_name():
    # With another K, dtype or beta than the last time, too.
    for settings in ({}, dict(num_samples=4), {}, dict(dtype=torch.float32)):
        named, _ = estimates(Kernel.isir_disir, beta=0.7, **settings)
        listed, _ = estimates(KERNELS["isir_disir"], **settings)
        for one, two in zip(named.particles, listed.particles, strict=True):
            assert torch.equal(one, two)
        assert torch.equal(named.meeting_time, listed.meeting_time)
        assert torch.equal(named.ess, listed.ess)
    assert estimates(KERNELS["isir"])[0].ess.isnan()


def test_a_kernel_in_which_chains_never_meet_is_refused():
    kernel = Listed((KERNELS["isir_disir"].moves()[1],))
    for wrong in (kernel, Listed(())):
        with pytest.raises(ValueError, match="kernel must have a move in which chains can meet"):
            estimates(wrong)
        with pytest.raises(ValueError, match="kernel must have a move in which chains can meet"):
            Coupled(kernel=wrong)


def test_an_estimator_takes_any_of_them():
    for kernel in KERNELS.values():
        estimator = Coupled(NUM_SAMPLES, 1, 1, kernel)
        images = IMAGE.expand(REPLICATES // 20, -1)
        found = torch.stack(
            [
                gradients(-estimator(TOY.model, images, generator(i)).surrogate, TOY.model.decoder)
                for i in range(50)
            ]
        )
        assert is_unbiased(found, TOY.gradient(IMAGE))
        estimator.adapt(estimator(TOY.model, images, generator()))
        assert estimator.current_beta == estimator.beta  # which is the named kernel's


class TestControls:
    """Wrong moves, of which the functions above must say so."""

    class Greedy(Isir):
        """Always selects a fresh sample."""

        def step(self, state, noise, evaluate):
            samples = Samples.of(noise.fresh, evaluate(noise.fresh))
            return samples.select(select(samples.weights, noise.uniforms[:, 1])), samples

    class Copying(Isir):
        """The second chain follows the first."""

        def coupled_step(self, first, second, noise, evaluate):
            moved = super().coupled_step(first, second, noise, evaluate)
            return moved._replace(second=moved.first, second_samples=moved.first_samples)

    class Hasty(Isir):
        """Chains have met where they are close."""

        def coupled_step(self, first, second, noise, evaluate):
            moved = super().coupled_step(first, second, noise, evaluate)
            close = (moved.first.noise - moved.second.noise).norm(dim=1) < 2
            return moved._replace(met=moved.met | close)

    class Selected(Isir):
        """Keeps of a step's samples the incumbent alone."""

        def step(self, state, noise, evaluate):
            after, samples = super().step(state, noise, evaluate)
            return after, samples._replace(
                weights=torch.eye(NUM_SAMPLES)[0].expand_as(samples.weights)
            )

    def test_greedy(self):
        assert not leaves_the_posterior_invariant(self.Greedy())

    def test_samples_with_other_weights(self):
        # From the posterior the incumbent's own average is right; in a pair it is not a chain's.
        assert not has_the_law_of_single_chains_in_pairs(self.Selected())

    def test_copying(self):
        assert not has_the_law_of_single_chains_in_pairs(self.Copying())

    def test_hasty(self):
        assert not meets_in_equal_states_alone(self.Hasty())
        assert not is_right(Listed((self.Hasty(),)))
