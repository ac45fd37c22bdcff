"""The kernel ``isir_hmc``: its trajectories, what they leave invariant, and the whole estimate.

The bounds of the statistical tests are those of ``test_unbiased.py``: 20,000 replicates in 50 batch
means, a false alarm once in 10^6 runs.
"""

import math

import pytest
import torch
from references import LinearGaussian, integrate, is_unbiased

from chains.replay import ReplayIsir
from chains.test_lagged import SETTINGS, totals
from chains.toy import of_image, steep_log_weight, toy_log_weight
from ucvae.chains import hmc, isir, reference, run_lagged_chains
from ucvae.chains.hmc import Hmc

pytestmark = pytest.mark.usefixtures("double")

DIM = 2
REPLICATES = 20_000
TOY = LinearGaussian()
IMAGE = TOY.images[1]
every_setting = pytest.mark.parametrize("num_samples, lag, burn_in", SETTINGS)


class OfLogWeight:
    """What is in proportion to ``N(noise; 0, I) w(noise)``; the noise is the coordinates."""

    def __init__(self, log_weight, images=None):
        self.log_weight, self.images = log_weight, images

    def rows(self, image_index):
        return OfLogWeight(self.log_weight, image_index)

    def coordinates(self, noise):
        return noise

    def log_density(self, coordinates):
        return self.log_weight(coordinates, self.images) - coordinates.square().sum(-1) / 2

    def with_gradient(self, coordinates):
        with torch.enable_grad():
            point = coordinates.clone().requires_grad_()
            value = self.log_density(point)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), gradient

    def states(self, coordinates, log_density):
        return coordinates, log_density + coordinates.square().sum(-1) / 2


def of_log_weight(log_weight, step_size=0.5, leapfrog_steps=3):
    return Hmc(OfLogWeight(log_weight), step_size, leapfrog_steps)


def run(log_weight=toy_log_weight, num_images=7, dim=DIM, seed=0, **settings):
    settings = dict(kernel="isir_hmc", hmc=of_log_weight(log_weight)) | settings
    generator = torch.Generator().manual_seed(seed)
    return run_lagged_chains(
        log_weight, num_images, dim, generator=generator, dtype=torch.float64, **settings
    )


class Replay(ReplayIsir):
    """The numbers of a call with one image, drawn again; a block ends where a trajectory is due."""

    def __init__(self, seed, lag, max_steps, **settings):
        self.lag, self.next_step = lag, None
        super().__init__(seed, DIM, lag=lag, max_steps=max_steps, **settings)

    def ahead(self, t, *others):
        return min(super().ahead(t, *others), self.lag - (t + 1) % self.lag)

    def draw(self):
        step, self.next_step = self.next_step or next(self.steps), None
        return step

    def moves(self):
        # The numbers of a step are drawn before those of the moves that it begins with.
        self.next_step = self.next_step or next(self.steps)
        momentum, step = torch.randn(2, 1, 1, DIM, **self.kind)[:, 0, 0]
        length, uniform, *others = torch.rand(4, 1, 1, **self.kind).flatten().tolist()
        return reference.HmcNoise(momentum, 0.5 * (0.5 + length), uniform, step, *others)


class TestAgainstTheLiteralAlgorithm:
    def expected(self, seed, log_weight, steps=3, **settings):
        replay = Replay(seed, **{k: v for k, v in settings.items() if k != "beta"})
        posterior = OfLogWeight(log_weight, torch.tensor([0]))

        def gradient(noise):
            value, slope = posterior.with_gradient(noise[None, None])
            return float(value), slope[0, 0]

        own = ("num_samples", "first")
        chains = {key: value for key, value in settings.items() if key not in own}
        return reference.signed_measure(
            of_image(0, log_weight),
            replay.start,
            replay.draw,
            kernel="isir_hmc",
            beta=0.0,
            draw_uniform=replay.uniform,
            hmc=reference.Hmc(gradient, replay.moves, steps, hmc.SMALL / DIM**0.5),
            **chains,
        )

    @every_setting
    @pytest.mark.parametrize("steps", [1, 3])
    def test_one_image_from_the_same_generator(self, num_samples, lag, burn_in, steps):
        settings = dict(num_samples=num_samples, lag=lag, burn_in=burn_in, max_steps=500)
        late = 0
        for seed in range(10):
            kind = dict(hmc=of_log_weight(steep_log_weight, leapfrog_steps=steps))
            chains = run(steep_log_weight, 1, seed=seed, **kind, **settings)
            expected = self.expected(seed, steep_log_weight, steps, **settings)
            self.compare(chains, expected)
            late += expected.meeting_time > 2 * lag
        assert late > 0  # or Y never made a trajectory

    @every_setting
    def test_with_first_samples_that_are_given(self, num_samples, lag, burn_in):
        settings = dict(num_samples=num_samples, lag=lag, burn_in=burn_in, max_steps=500)
        for seed in range(5):
            noise = torch.randn(1, num_samples, DIM, generator=torch.Generator().manual_seed(seed))
            first = noise, steep_log_weight(noise, torch.tensor([0]))
            chains = run(steep_log_weight, 1, seed=seed, first=first, **settings)
            self.compare(chains, self.expected(seed, steep_log_weight, first=first, **settings))

    @every_setting
    def test_with_roulette(self, num_samples, lag, burn_in):
        settings = dict(num_samples=num_samples, lag=lag, burn_in=burn_in)
        settings |= dict(max_steps=burn_in + lag, survival=0.4)
        for seed in range(10):
            chains = run(steep_log_weight, 1, seed=seed, **settings)
            self.compare(chains, self.expected(seed, steep_log_weight, **settings))

    @every_setting
    def test_under_a_cap(self, num_samples, lag, burn_in):
        settings = dict(num_samples=num_samples, lag=lag, burn_in=burn_in)
        settings |= dict(max_steps=burn_in + lag + 1)
        for seed in range(10):
            chains = run(steep_log_weight, 1, seed=seed, **settings)
            self.compare(chains, self.expected(seed, steep_log_weight, **settings))

    @staticmethod
    def compare(chains, expected):
        assert int(chains.meeting_time[0]) == expected.meeting_time
        assert bool(chains.truncated[0]) == expected.truncated
        lag = round(1 / expected.terms[0].factor)
        for part, terms in (
            (chains.main, expected.terms[:lag]),
            (chains.correction, expected.terms[lag:]),
            (chains.particles, expected.terms),
        ):
            # A trajectory that was rejected leaves its start, with coefficient 0, a second time.
            found = added_up(zip(part.noise[:, 0], part.coefficient[:, 0].tolist(), strict=True))
            literal = added_up(
                (xi, factor * weight)
                for factor, state in terms
                for xi, weight in zip(state.samples, state.weights, strict=True)
            )
            for point in found.keys() | literal.keys():
                both = found.get(point, 0.0), literal.get(point, 0.0)
                assert both[0] == pytest.approx(both[1], rel=0, abs=1e-9)


def added_up(particles):
    """The coefficient of each point, which two leapfrogs find up to rounding."""
    total = {}
    for point, coefficient in particles:
        key = tuple(round(number, 8) for number in point.tolist())
        total[key] = total.get(key, 0.0) + coefficient
    return total


class TestTrajectory:
    """From the exact posterior of a linear-Gaussian model, in the proposal's noise."""

    @staticmethod
    def moments(step_size, leapfrog_steps, decide=True):
        posterior = TOY.posterior(IMAGE[None])
        normal = torch.randn(REPLICATES, 2)
        z = posterior.mean + normal @ posterior.scale_tril[0].T
        start = TOY.to_noise(IMAGE, z)[:, None]
        everyone = torch.zeros(REPLICATES, dtype=torch.long)
        drawn = hmc.draw(REPLICATES, 2, torch.Generator().manual_seed(5), torch.float64)
        if not decide:
            drawn = drawn._replace(trajectory=torch.zeros_like(drawn.trajectory))
        target = OfLogWeight(TOY.log_weight(IMAGE), everyone)
        after, accepted = hmc.trajectory(target, start, drawn, step_size, leapfrog_steps)
        values = TOY.joint_gradient(IMAGE, TOY.transform(IMAGE, after.coordinates))[:, 0]
        return values, accepted.double().mean()

    @pytest.mark.parametrize("step_size, leapfrog_steps", [(0.3, 1), (0.9, 2), (0.9, 3)])
    def test_leaves_the_posterior_invariant(self, step_size, leapfrog_steps):
        torch.manual_seed(1)
        values, accepted = self.moments(step_size, leapfrog_steps)
        assert 0.3 < accepted < 0.99
        assert is_unbiased(values, TOY.gradient(IMAGE))

    def test_would_not_without_its_decision(self):
        torch.manual_seed(1)
        values, accepted = self.moments(0.9, 2, decide=False)
        assert accepted == 1 and not is_unbiased(values, TOY.gradient(IMAGE))

    def test_is_rejected_where_its_energy_is_no_number(self):
        def log_weight(noise, image_index):
            inside = noise.square().sum(-1) < 4
            return torch.where(inside, toy_log_weight(noise, image_index), torch.nan)

        kept = of_log_weight(log_weight, step_size=30.0)
        noise = torch.zeros(5, 1, DIM)
        before = log_weight(noise, torch.arange(5))
        moved = kept.move(noise, before, torch.arange(5), torch.Generator().manual_seed(0))
        assert not moved.acceptance.any() and not moved.noise.isnan().any()


def test_an_impossible_place_is_never_gone_to():
    def log_weight(noise, image_index):
        return torch.where(noise[..., 0] > 0, toy_log_weight(noise, image_index), -torch.inf)

    chains = run(log_weight, 400, hmc=of_log_weight(log_weight), num_samples=30, lag=2)
    used = chains.particles.coefficient != 0
    assert (chains.particles.noise[..., 0][used] > 0).all()
    assert chains.acceptance < run(num_images=400, num_samples=30, lag=2).acceptance - 0.05


def test_noise_is_found_again_after_many_steps():
    """A state that ISIR never leaves, and trajectories of no length: it stays for long."""

    def log_weight(noise, image_index):
        return torch.where(noise[..., 0].abs() < 1e-2, 60.0, 0.0)

    settings = dict(num_samples=3, lag=2, burn_in=1, max_steps=60)
    still = Hmc(OfLogWeight(log_weight), 1e-12, 1)
    chains = run(log_weight, 400, hmc=still, **settings)
    assert chains.truncated.any()
    values = log_weight(chains.particles.noise, chains.particles.image_index[:, None])
    found = integrate(chains.particles, 400, values[..., None])[:, 0]
    torch.testing.assert_close(found, chains.mean_log_weight, rtol=0, atol=1e-6)


def estimates(particles):
    values = TOY.joint_gradient(IMAGE, TOY.transform(IMAGE, particles.noise))
    return integrate(particles, REPLICATES, values)


class TestUnbiased:
    @staticmethod
    def run(**settings):
        return run(TOY.log_weight(IMAGE), REPLICATES, 2, seed=3, **settings)

    @pytest.mark.parametrize(
        "num_samples, lag, burn_in", [(2, 1, 0), (4, 1, 1), (3, 3, 0), (3, 2, 3), (3, 2, 7)]
    )
    def test_the_whole_is_and_the_first_sum_is_not(self, num_samples, lag, burn_in):
        chains = self.run(num_samples=num_samples, lag=lag, burn_in=burn_in)
        truth = TOY.gradient(IMAGE)
        assert not chains.truncated.any() and chains.meeting_time.max() > 2 * lag
        assert is_unbiased(estimates(chains.particles), truth)
        if burn_in < 2:
            assert not is_unbiased(estimates(chains.main), truth)

    def test_with_roulette_and_not_with_a_cap(self):
        settings = dict(num_samples=2, lag=2, burn_in=0, max_steps=2)
        whole, capped = self.run(survival=1 / 3, **settings), self.run(**settings)
        assert is_unbiased(estimates(whole.particles), TOY.gradient(IMAGE))
        assert not is_unbiased(estimates(capped.particles), TOY.gradient(IMAGE))

    def test_not_with_a_trajectory_of_the_first_chain_alone(self, monkeypatch):
        move = isir._Ledger.move

        def of_x(ledger, hmc, image_index, chains, time):
            moved = move(ledger, hmc, image_index, chains, time)
            if len(chains.place) == 1:
                return moved
            both = zip(moved, chains, strict=True)
            return isir.Chains(*(torch.stack([new[0], old[1]]) for new, old in both))

        settings = dict(num_samples=2, lag=1, burn_in=1)
        assert is_unbiased(estimates(self.run(**settings).particles), TOY.gradient(IMAGE))
        monkeypatch.setattr(isir._Ledger, "move", of_x)
        assert not is_unbiased(estimates(self.run(**settings).particles), TOY.gradient(IMAGE))

    def test_not_where_the_chains_are_at_different_places_of_the_period(self, monkeypatch):
        """One trajectory in all, at t = L: X has made it when it is at L, Y has not."""
        move = isir._Ledger.move

        def once(ledger, hmc, image_index, chains, time):
            alone = len(chains.place) == 1
            return move(ledger, hmc, image_index, chains, time) if alone else chains

        settings = dict(num_samples=2, lag=2, burn_in=1)
        assert is_unbiased(estimates(self.run(**settings).particles), TOY.gradient(IMAGE))
        monkeypatch.setattr(isir._Ledger, "move", once)
        assert not is_unbiased(estimates(self.run(**settings).particles), TOY.gradient(IMAGE))


def test_a_proposal_that_is_too_narrow_costs_less():
    """A posterior of 1.7 times the proposal's width in one of 8 dimensions: E[w^2] is infinite.

    So is the variance by ISIR alone, and what is found of it is too little, if anything.
    """

    def log_weight(noise, image_index):
        return (1 - 1 / 1.7**2) / 2 * noise[..., 0] ** 2 - math.log(1.7)

    settings = dict(num_samples=10, lag=3, burn_in=1, max_steps=100_000)
    by_isir = run(log_weight, REPLICATES, 8, kernel="isir", hmc=None, **settings)
    by_hmc = run(log_weight, REPLICATES, 8, hmc=of_log_weight(log_weight), **settings)
    found = [
        integrate(chains.particles, REPLICATES, chains.particles.noise[..., :1] ** 2)
        for chains in (by_isir, by_hmc)
    ]
    assert is_unbiased(found[1], torch.tensor([1.7**2]))
    assert found[1].var() < found[0].var() / 5
    assert by_hmc.meeting_time.max() < by_isir.meeting_time.max() / 5


@every_setting
def test_coefficients_add_up_to_one(num_samples, lag, burn_in):
    settings = dict(num_samples=num_samples, lag=lag, burn_in=burn_in)
    for more in ({}, {"max_steps": burn_in + lag}, {"max_steps": burn_in + lag, "survival": 0.4}):
        chains = run(num_images=50, **settings, **more)
        total = totals(chains.particles, 50)
        torch.testing.assert_close(total, torch.ones(50), rtol=0, atol=1e-10)


class Counting(OfLogWeight):
    """Counts the evaluations of each image."""

    def __init__(self, log_weight, spent, images=None):
        super().__init__(log_weight, images)
        self.spent = spent

    def rows(self, image_index):
        return Counting(self.log_weight, self.spent, image_index)

    def log_density(self, coordinates):
        self.spent[self.images] += coordinates.shape[1]
        return super().log_density(coordinates)


@every_setting
def test_every_evaluation_is_counted(num_samples, lag, burn_in):
    spent = torch.zeros(30, dtype=torch.long)

    def log_weight(noise, image_index):
        spent[image_index] += noise.shape[1]
        return steep_log_weight(noise, image_index)

    target = Hmc(Counting(steep_log_weight, spent), 0.5, 2)
    chains = run(log_weight, 30, num_samples=num_samples, lag=lag, burn_in=burn_in, hmc=target)
    assert torch.equal(chains.evaluations, spent)
    assert 0 < chains.acceptance < 1


def test_acceptance_is_that_of_chains_and_two_that_have_met_are_one(monkeypatch):
    accepted, apart = [], []
    of_hmc, of_ledger = Hmc.move, isir._Ledger.move

    def moving(target, *others):
        moved = of_hmc(target, *others)
        accepted.append(moved.acceptance)
        return moved

    def listening(ledger, hmc, image_index, chains, time):
        apart.append(chains.place[0] != chains.place[-1])
        return of_ledger(ledger, hmc, image_index, chains, time)

    monkeypatch.setattr(Hmc, "move", moving)
    monkeypatch.setattr(isir._Ledger, "move", listening)
    chains = run(num_images=100, num_samples=4, lag=2, burn_in=9)
    counted = torch.cat(
        [part[:, 0] for part in accepted]
        + [part[:, -1][two] for part, two in zip(accepted, apart, strict=True)]
    )
    assert 0 < torch.cat(apart[1:]).double().mean() < 1  # some have met and go on
    torch.testing.assert_close(chains.acceptance, counted.double().mean())


def test_a_pair_that_meets_before_the_second_trajectory_pays_for_one():
    settings = dict(num_samples=10, lag=3, burn_in=1)
    spent = torch.zeros(200, dtype=torch.long)
    target = Hmc(Counting(toy_log_weight, spent), 0.5, 3)
    chains = run(num_images=200, hmc=target, **settings)
    # In their second steps pairs meet at t = 5, so that tau is 6, or by the moves of t = 6.
    early, late = chains.meeting_time <= 5, chains.meeting_time > 6
    assert early.any() and late.any()
    assert (spent[early] == 5).all() and (spent[late] >= 15).all()
    assert set(spent[~early & ~late].tolist()) <= {5, 15}


@pytest.mark.parametrize("burn_in", [1, 9])
def test_rounding_cannot_part_chains_that_have_met(burn_in):
    # No two evaluations of the same noise agree; met chains are one chain all the same.
    rounding = torch.Generator().manual_seed(1)

    def log_weight(noise, image_index):
        values = toy_log_weight(noise, image_index)
        return values + 0.1 * torch.randn(values.shape, generator=rounding)

    settings = dict(num_samples=4, lag=2, burn_in=burn_in)
    chains = run(log_weight, 200, hmc=of_log_weight(log_weight), **settings)
    assert chains.meeting_time.max() < 100
    corrected = torch.zeros(200, dtype=torch.bool)
    corrected[chains.correction.image_index[(chains.correction.coefficient != 0).any(-1)]] = True
    assert torch.equal(corrected, chains.meeting_time > burn_in + 2)


def test_the_generator_is_the_only_source_of_randomness_and_no_graph_is_built():
    before = torch.get_rng_state()
    first, again, other = (run(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    for one, two in zip(first.particles, again.particles, strict=True):
        assert torch.equal(one, two) and not one.requires_grad
    assert not torch.equal(first.particles.noise[0], other.particles.noise[0])


def test_trajectories_belong_to_the_kernel_of_that_name():
    message = "hmc must be given with the kernel isir_hmc and with no other"
    for kernel, target in (("isir_hmc", None), ("isir", of_log_weight(toy_log_weight))):
        with pytest.raises(ValueError, match=message):
            run(kernel=kernel, hmc=target)
