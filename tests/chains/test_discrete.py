r"""Biased quantities too have exact values: the chains on a discrete toy, against enumeration.

:class:`references.Discrete` has eight cells, and what ISIR and its coupling do to them is a finite
Markov chain (:class:`references.CellChains`). So the *biased* expectations of ELBO, IWAE, the first
sum of Eq 14 and the estimate with a cap are known as exactly as the unbiased one, and so is the law
of the meeting time. An estimate is a vector of eight masses, one a cell; the decoder's gradient is
linear in them. Tests are those of :mod:`references`, on R = 50,000 replicates of one image: what is
rejected is a bias above 6 standard errors, 6 / sqrt(R) = 0.027 standard deviations of an estimate.
Each control is the exact value for a neighbouring setting, which the same test has to tell apart.
"""

import pytest
import torch
from references import Discrete, gradients, has_frequencies, integrate, is_unbiased, self_normalized

from ucvae.chains import ComposedKernel, run_lagged_chains
from ucvae.chains.horizon import Horizon
from ucvae.chains.kernels import Arms, State, coupled_step, draw_noise, step
from ucvae.chains.moves import Isir
from ucvae.estimators.coupled import Coupled
from ucvae.estimators.elbo import Elbo
from ucvae.estimators.iwae import Iwae

pytestmark = pytest.mark.usefixtures("double")

REPLICATES = 50_000
TOY = Discrete()
IMAGE = TOY.images[2]  # its posterior is the most uneven, so biases are large
POSTERIOR = TOY.weights(IMAGE) / TOY.weights(IMAGE).sum()


class IsirByMoves(ComposedKernel):
    """ISIR through the general driver; its chains meet in the last move of a step."""

    def moves(self):
        return (Isir(),)


ISIR = pytest.mark.parametrize("kernel", ["isir", IsirByMoves()], ids=["isir", "by moves"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run(**settings):
    settings = dict(num_samples=3, lag=1, burn_in=1, kernel="isir", beta=0.8) | settings
    return run_lagged_chains(
        TOY.log_weight(IMAGE),
        REPLICATES,
        3,
        generator=generator(),
        dtype=torch.float64,
        **settings,
    )


def masses(particles):
    """The mass of each cell under each replicate's signed measure, ``[R, 8]``."""
    values = TOY.indicator(TOY.transform(IMAGE, particles.noise))
    return integrate(particles, REPLICATES, values)


def agrees(counts, probabilities):
    """A chi-square test in which the outcomes of fewer than 10 expected counts are one outcome."""
    counts, probabilities = counts.flatten().double(), probabilities.flatten()
    rare = (probabilities > 0) & (counts.sum() * probabilities < 10)

    def pool(values):
        return torch.cat([values[~rare], values[rare].sum()[None]])

    return has_frequencies(pool(counts), pool(probabilities))


def state_in(cells, seed=7):
    """Chains whose selected noise lies in the orthants ``cells [n]``: N(0, I) given its signs."""
    signs = 2 * (cells[:, None] >> torch.arange(3) & 1) - 1
    noise = torch.randn(len(cells), 3, generator=generator(seed)).abs() * signs
    return State(noise, TOY.weights(IMAGE).log()[cells])


def evaluate(noise):
    return TOY.log_weight(IMAGE)(noise, torch.zeros(len(noise), dtype=torch.long)).detach()


def noise_of(num_images, num_samples=3):
    return draw_noise(
        num_images,
        num_samples,
        3,
        generator=generator(),
        device=torch.device("cpu"),
        dtype=torch.float64,
    )


class TestKernels:
    """One step, from every cell or pair of cells, by chi-square over where it leads."""

    def test_isir(self):
        before = torch.arange(8).repeat(REPLICATES // 8)
        after, _ = step(state_in(before), noise_of(len(before)), evaluate, None)
        pairs = 8 * before + TOY.model.decoder.cells(after.noise)
        counts = torch.bincount(pairs, minlength=64)
        assert agrees(counts, TOY.chains(IMAGE, 3).transition / 8)
        assert not agrees(counts, TOY.chains(IMAGE, 4).transition / 8)

    def test_coupled_isir(self):
        pairs = torch.arange(64).repeat(4 * REPLICATES // 64)
        x, y = pairs // 8, pairs % 8
        moved = coupled_step(state_in(x, 8), state_in(y, 9), noise_of(len(pairs)), evaluate, None)
        c, d = (TOY.model.decoder.cells(state.noise) for state in (moved.first, moved.second))
        assert moved.first.noise[moved.met].equal(moved.second.noise[moved.met])
        unmet = torch.bincount((64 * pairs + 8 * c + d)[~moved.met], minlength=64 * 64)
        met = torch.bincount((8 * pairs + c)[moved.met], minlength=64 * 8)
        counts = torch.cat([unmet, met])

        def law(num_samples):
            chains = TOY.chains(IMAGE, num_samples)
            return torch.cat([chains.unmet.flatten(), chains.met.flatten()]) / 64

        assert agrees(counts, law(3))
        assert not agrees(counts, law(4))

    @pytest.mark.parametrize("beta", [0.0, 0.5, 0.95])
    def test_disir_leaves_the_posterior_invariant(self, beta):
        """Cells in proportion to their weights and, whatever the signs, ``E[xi^2] = 1``."""

        def moved(start, arms):
            before = torch.multinomial(start, REPLICATES, replacement=True, generator=generator(1))
            after, _ = step(state_in(before), noise_of(REPLICATES), evaluate, arms)
            return after.noise

        def cells_agree(noise):
            counts = torch.bincount(TOY.model.decoder.cells(noise), minlength=8)
            return agrees(counts, POSTERIOR)

        arms = Arms.of(torch.tensor(beta), 3)
        noise, one = moved(POSTERIOR, arms), torch.ones(3)
        assert cells_agree(noise) and is_unbiased(noise**2, one)
        # Controls: another start, and proposals that are a tenth too large.
        assert not cells_agree(moved(torch.full((8,), 1 / 8), arms))
        large = Arms(1.1 * arms.decay, 1.1 * arms.mix)
        assert not is_unbiased(moved(POSTERIOR, large) ** 2, one)


SETTINGS = pytest.mark.parametrize(
    "num_samples, lag, burn_in", [(3, 1, 1), (3, 3, 0), (3, 2, 3), (2, 2, 0), (5, 1, 1)]
)


class TestEstimate:
    """The first sum, the sum with a cap, and the whole, each with its own exact expectation."""

    @SETTINGS
    def test_first_sum_has_the_bias_that_it_should(self, num_samples, lag, burn_in):
        exact = TOY.chains(IMAGE, num_samples)
        main = masses(run(num_samples=num_samples, lag=lag, burn_in=burn_in).main)
        assert is_unbiased(main, exact.main(lag, burn_in))
        assert not is_unbiased(main, exact.main(lag, burn_in + 1))
        assert not is_unbiased(main, POSTERIOR)

    @SETTINGS
    @ISIR
    def test_cap_has_the_bias_that_it_should(self, kernel, num_samples, lag, burn_in):
        exact, cap = TOY.chains(IMAGE, num_samples), burn_in + lag
        settings = dict(kernel=kernel, num_samples=num_samples, lag=lag, burn_in=burn_in)
        chains = run(max_steps=cap, **settings)
        assert is_unbiased(masses(chains.particles), exact.estimate(lag, burn_in, cap))
        assert not is_unbiased(masses(chains.particles), exact.estimate(lag, burn_in, cap + 1))
        assert not is_unbiased(masses(chains.particles), POSTERIOR)

    @SETTINGS
    @pytest.mark.parametrize("kernel", ["isir", "isir_disir"])
    def test_whole_has_none(self, kernel, num_samples, lag, burn_in):
        chains = run(kernel=kernel, num_samples=num_samples, lag=lag, burn_in=burn_in)
        assert not chains.truncated.any()
        assert is_unbiased(masses(chains.particles), POSTERIOR)
        assert not is_unbiased(masses(chains.main), POSTERIOR)

    @pytest.mark.parametrize("num_samples, lag, burn_in", [(3, 1, 1), (2, 2, 0)])
    @pytest.mark.parametrize("kernel", ["isir", "isir_disir"])
    def test_roulette_has_none_where_a_cap_has(
        self, kernel, num_samples, lag, burn_in, monkeypatch
    ):
        """From t0 + L on, where many pairs are still apart; weights are no powers of 2.

        The controls are the cap at the same step, and roulette without the weights.
        """
        settings = dict(kernel=kernel, num_samples=num_samples, lag=lag, burn_in=burn_in)
        settings |= dict(max_steps=burn_in + lag)
        chains = run(survival=1 / 3, **settings)
        assert not chains.truncated.any()
        assert (chains.meeting_time > burn_in + lag + 1).double().mean() > 0.01  # the roulette acts
        assert is_unbiased(masses(chains.particles), POSTERIOR)
        assert not is_unbiased(masses(run(**settings).particles), POSTERIOR)
        monkeypatch.setattr(
            Horizon, "weight", property(lambda _: 1.0, lambda *_: None), raising=False
        )
        unweighted = run(survival=1 / 3, **settings)
        assert torch.equal(unweighted.meeting_time, chains.meeting_time)
        assert not is_unbiased(masses(unweighted.particles), POSTERIOR)

    @SETTINGS
    @ISIR
    def test_meeting_times(self, kernel, num_samples, lag, burn_in):
        cap = burn_in + lag + 6
        settings = dict(kernel=kernel, num_samples=num_samples, lag=lag, burn_in=burn_in)
        chains = run(max_steps=cap, **settings)
        met = torch.bincount(chains.meeting_time[~chains.truncated], minlength=cap + 2)
        counts = torch.cat([met, chains.truncated.sum()[None]])

        def law(num_samples, lag):
            times = TOY.chains(IMAGE, num_samples).meeting_time(lag, cap)
            return torch.cat([times, 1 - times.sum()[None]])

        assert agrees(counts, law(num_samples, lag))
        assert not agrees(counts, law(num_samples + 1, lag))
        assert not agrees(counts, law(num_samples, lag + 1))


def decoder_gradients(estimator):
    """Of 50 calls on 1,000 replicates each: batch means already, ``[50, 8 * P]``."""
    images = IMAGE.expand(REPLICATES // 50, -1)
    return torch.stack(
        [
            gradients(-estimator(TOY.model, images, generator(seed)).surrogate, TOY.model.decoder)
            for seed in range(50)
        ]
    )


class TestEstimators:
    """The decoder's gradient as training gets it, bias and all."""

    @pytest.mark.parametrize("dreg", [True, False])
    @pytest.mark.parametrize("num_samples", [1, 2, 5])
    def test_iwae(self, num_samples, dreg):
        found = decoder_gradients(Iwae(num_samples, dreg))

        def exact(num_samples):
            return TOY.gradient_of(IMAGE, self_normalized(TOY.weights(IMAGE), num_samples))

        assert is_unbiased(found, exact(num_samples))
        assert not is_unbiased(found, exact(num_samples + 1))
        assert not is_unbiased(found, TOY.gradient(IMAGE))

    @pytest.mark.parametrize("analytic_kl", [True, False])
    def test_elbo(self, analytic_kl):
        found = decoder_gradients(Elbo(2, analytic_kl))
        assert is_unbiased(found, TOY.gradient_of(IMAGE, torch.full((8,), 1 / 8)))
        assert not is_unbiased(found, TOY.gradient(IMAGE))

    @pytest.mark.parametrize("min_coefficient", [0.0, 0.2])
    def test_coupled(self, min_coefficient):
        exact = TOY.chains(IMAGE, 3)
        settings = dict(num_samples=3, lag=2, kernel="isir", min_coefficient=min_coefficient)
        whole = decoder_gradients(Coupled(**settings))
        capped = decoder_gradients(Coupled(**settings, max_steps=3))
        expected = TOY.gradient_of(IMAGE, exact.estimate(2, 1, 3))
        assert is_unbiased(whole, TOY.gradient(IMAGE)) and not is_unbiased(whole, expected)
        assert is_unbiased(capped, expected) and not is_unbiased(capped, TOY.gradient(IMAGE))
