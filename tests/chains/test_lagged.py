import pytest
import torch
from references import integrate

from chains.replay import REPLAYS, TAPES, block, head
from chains.toy import incumbent_first, of_image, steep_log_weight, toy_log_weight
from ucvae.chains import horizon, isir, moves, reference, run_lagged_chains
from ucvae.chains.selection import effective_sample_size
from ucvae.errors import NonFiniteError

pytestmark = pytest.mark.usefixtures("double")

DIM = 2
KERNELS = ("isir", "isir_disir")
# (K, L, t0): t0 = 0, 1, below L, at L, far above it; L = 1.
SETTINGS = [(2, 1, 0), (4, 1, 1), (3, 3, 0), (4, 3, 2), (3, 2, 2), (4, 2, 9), (10, 10, 1)]
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_setting = pytest.mark.parametrize("num_samples, lag, burn_in", SETTINGS)


def run(log_weight=toy_log_weight, num_images=7, dim=DIM, seed=0, **settings):
    settings.setdefault("dtype", torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return run_lagged_chains(log_weight, num_images, dim, generator=generator, **settings)


def flat(chains):
    """All tensors of the chains' result."""
    for field in chains:
        yield from field if isinstance(field, tuple) else (field,)


def totals(part, num_images):
    """The sum of the coefficients of each image."""
    ones = torch.ones(*part.coefficient.shape, 1, dtype=part.coefficient.dtype)
    return integrate(part, num_images, ones)[:, 0]


def literal(tape, image, log_weight, **settings):
    """The literal algorithm on the random numbers that this image had."""
    start, draw, uniform = tape.replay(image)
    return reference.signed_measure(log_weight, start, draw, draw_uniform=uniform, **settings)


def assert_literal(chains, image, expected, kernel):
    """One image's particles, tau and truncation are those of the literal algorithm."""
    {"isir": assert_added_up, "isir_disir": assert_in_order}[kernel](chains, image, expected.terms)
    assert int(chains.meeting_time[image]) == expected.meeting_time
    assert bool(chains.truncated[image]) == expected.truncated


def assert_in_order(chains, image, terms):
    """The groups are the literal summands, in their order."""
    mine = chains.particles.image_index == image
    noise, coefficient = chains.particles.noise[mine], chains.particles.coefficient[mine]
    assert len(noise) == len(terms)
    for g, (factor, state) in enumerate(terms):
        samples, weights = incumbent_first(state)
        torch.testing.assert_close(noise[g], samples, rtol=0, atol=1e-10)
        torch.testing.assert_close(coefficient[g], factor * weights, rtol=0, atol=1e-10)


def assert_added_up(chains, image, terms):
    """Each sample is there once, with all that the literal summands give it.

    A sample of none of them has a coefficient of exactly 0: where both chains are at one sample,
    nothing of it is left in the correction, be it by rounding.
    """
    lag = round(1 / terms[0].factor)
    for part, summands in (
        (chains.main, terms[:lag]),
        (chains.correction, terms[lag:]),
        (chains.particles, terms),
    ):
        expected = {}
        for factor, state in summands:
            for xi, weight in zip(state.samples, state.weights, strict=True):
                key = tuple(xi.tolist())
                expected[key] = expected.get(key, 0.0) + factor * weight
        mine = part.image_index == image
        found = dict(
            zip(
                map(tuple, part.noise[mine][:, 0].tolist()),
                part.coefficient[mine][:, 0].tolist(),
                strict=True,
            )
        )
        assert len(found) == mine.sum() and expected.keys() <= found.keys()
        for key, coefficient in found.items():
            if key in expected:
                assert coefficient == pytest.approx(expected[key], rel=0, abs=1e-12)
            else:
                assert coefficient == 0


@every_kernel
@every_setting
class TestAgainstTheLiteralAlgorithm:
    def test_one_image_from_the_same_generator(self, kernel, num_samples, lag, burn_in):
        settings = dict(lag=lag, burn_in=burn_in, max_steps=500)
        for seed in range(5):
            chains = run(
                num_images=1,
                seed=seed,
                num_samples=num_samples,
                kernel=kernel,
                beta=0.6,
                **settings,
            )
            replay = REPLAYS[kernel](seed, DIM, num_samples, **settings)
            expected = reference.signed_measure(
                of_image(0), replay.start, replay.draw, kernel=kernel, beta=0.6, **settings
            )
            assert_literal(chains, 0, expected, kernel)

    def test_with_first_samples_that_are_given(self, kernel, num_samples, lag, burn_in):
        settings = dict(lag=lag, burn_in=burn_in, max_steps=500)
        image = torch.zeros(1, dtype=torch.long)
        for seed in range(5):
            other = torch.Generator().manual_seed(seed + 100)
            noise = torch.randn(1, num_samples, DIM, generator=other)
            first = noise, toy_log_weight(noise, image)
            tried = 0

            def log_weight(noise, image_index):
                nonlocal tried
                tried += noise.shape[1]
                return toy_log_weight(noise, image_index)

            of_both = dict(kernel=kernel, beta=0.6, **settings)
            chains = run(log_weight, 1, seed=seed, num_samples=num_samples, first=first, **of_both)
            replay = REPLAYS[kernel](seed, DIM, num_samples, **settings, first=first)
            expected = reference.signed_measure(of_image(0), replay.start, replay.draw, **of_both)
            assert_literal(chains, 0, expected, kernel)
            assert chains.evaluations.tolist() == [num_samples + tried]
            cost = evaluations(chains, kernel, num_samples, **settings)
            assert torch.equal(chains.evaluations, cost)

    def test_every_image_of_a_batch(self, monkeypatch, kernel, num_samples, lag, burn_in):
        settings = dict(lag=lag, burn_in=burn_in, kernel=kernel, beta=0.6, max_steps=500)
        tape = TAPES[kernel](monkeypatch, 7, toy_log_weight, DIM, num_samples)
        chains = run(tape.log_weight, num_samples=num_samples, **settings)
        for image in range(7):
            expected = literal(tape, image, of_image(image), **settings)
            assert_literal(chains, image, expected, kernel)
        assert chains.evaluations.tolist() == tape.evaluations
        assert not chains.truncated.any()
        if burn_in <= 2:
            assert len(chains.meeting_time.unique()) > 1  # or compaction was not tried

    def test_under_a_cap(self, monkeypatch, kernel, num_samples, lag, burn_in):
        cap = burn_in + lag + 1
        settings = dict(lag=lag, burn_in=burn_in, kernel=kernel, beta=0.6, max_steps=cap)
        tape = TAPES[kernel](monkeypatch, 40, toy_log_weight, DIM, num_samples)
        chains = run(tape.log_weight, 40, num_samples=num_samples, **settings)
        for image in range(40):
            expected = literal(tape, image, of_image(image), **settings)
            assert_literal(chains, image, expected, kernel)
        assert chains.evaluations.tolist() == tape.evaluations
        if burn_in <= 2:
            assert 0 < chains.truncated.sum() < 40
        assert (chains.meeting_time[chains.truncated] == cap).all()

    def test_with_roulette(self, monkeypatch, kernel, num_samples, lag, burn_in):
        # As steep as to leave enough pairs apart, and a survival that is no power of 2.
        settings = dict(lag=lag, burn_in=burn_in, kernel=kernel, beta=0.6)
        settings |= dict(max_steps=burn_in + lag, survival=0.4)
        tape = TAPES[kernel](monkeypatch, 20, steep_log_weight, DIM, num_samples)
        chains = run(tape.log_weight, 20, num_samples=num_samples, **settings)
        for image in range(20):
            expected = literal(tape, image, of_image(image, steep_log_weight), **settings)
            assert_literal(chains, image, expected, kernel)
        assert chains.evaluations.tolist() == tape.evaluations
        assert not chains.truncated.any()
        if burn_in <= 2 and num_samples < 10:
            ended = {game[-1] for game in tape.games if game}
            assert ended == {0.0, 1.0} and max(map(len, tape.games)) > 1

    def test_with_roulette_from_the_same_generator(self, kernel, num_samples, lag, burn_in):
        settings = dict(lag=lag, burn_in=burn_in, max_steps=burn_in + lag, survival=0.4)
        for seed in range(5):
            of_both = dict(kernel=kernel, beta=0.6, **settings)
            chains = run(steep_log_weight, 1, seed=seed, num_samples=num_samples, **of_both)
            replay = REPLAYS[kernel](seed, DIM, num_samples, **settings)
            expected = reference.signed_measure(
                of_image(0, steep_log_weight),
                replay.start,
                replay.draw,
                draw_uniform=replay.uniform,
                **of_both,
            )
            assert_literal(chains, 0, expected, kernel)


def test_the_literal_roulette_needs_its_uniforms():
    replay = REPLAYS["isir"](0, DIM, 3, lag=1, burn_in=0, max_steps=1, survival=0.4)
    settings = dict(kernel="isir", beta=0.0, lag=1, burn_in=0, max_steps=1, survival=0.4)
    with pytest.raises(ValueError, match="draw_uniform is missing, and survival is not 0"):
        reference.signed_measure(
            of_image(0, steep_log_weight), replay.start, replay.draw, **settings
        )


@pytest.mark.parametrize("rows", [1, 30, 512, 10**6])
@pytest.mark.parametrize(
    "num_samples, lag, burn_in, cap", [(3, 1, 0, 1), (3, 2, 2, 17), (4, 3, 1, 13)]
)
def test_blocks_of_steps_of_any_size_are_the_literal_algorithm(
    monkeypatch, rows, num_samples, lag, burn_in, cap
):
    monkeypatch.setattr(isir, "ROWS", rows)
    settings = dict(lag=lag, burn_in=burn_in, max_steps=cap)
    tape = TAPES["isir"](monkeypatch, 20, steep_log_weight, DIM, num_samples)
    chains = run(tape.log_weight, 20, num_samples=num_samples, kernel="isir", **settings)
    for image in range(20):
        of_one = of_image(image, steep_log_weight)
        expected = literal(tape, image, of_one, kernel="isir", beta=0.0, **settings)
        assert_literal(chains, image, expected, "isir")
    blocks = list(blocks_of(chains, num_samples, **settings))
    assert tape.calls == 1 + len(blocks)
    assert chains.evaluations.tolist() == tape.evaluations
    assert torch.equal(chains.evaluations, evaluations(chains, "isir", num_samples, **settings))
    if cap > 1:
        assert 0 < chains.truncated.sum() < 20 and len(blocks) > 3


@every_kernel
@every_setting
class TestCoefficients:
    def test_add_up_to_one_for_every_image(self, kernel, num_samples, lag, burn_in):
        chains = run(
            num_images=50, num_samples=num_samples, lag=lag, burn_in=burn_in, kernel=kernel
        )
        total = totals(chains.particles, 50)
        torch.testing.assert_close(total, torch.ones(50), rtol=0, atol=1e-12)

    def test_add_up_to_one_where_truncated(self, kernel, num_samples, lag, burn_in):
        chains = run(
            num_images=50,
            num_samples=num_samples,
            lag=lag,
            burn_in=burn_in,
            kernel=kernel,
            max_steps=burn_in + lag,
        )
        total = totals(chains.particles, 50)
        torch.testing.assert_close(total, torch.ones(50), rtol=0, atol=1e-12)

    def test_add_up_to_one_with_roulette(self, kernel, num_samples, lag, burn_in):
        settings = dict(num_samples=num_samples, lag=lag, burn_in=burn_in, kernel=kernel)
        chains = run(num_images=50, max_steps=burn_in + lag, survival=0.4, **settings)
        total = totals(chains.particles, 50)
        torch.testing.assert_close(total, torch.ones(50), rtol=0, atol=1e-10)


class TestRoulette:
    SETTINGS = dict(num_samples=3, lag=1, burn_in=1, max_steps=16)

    @every_kernel
    def test_changes_nothing_where_all_meet_before(self, kernel):
        settings = dict(kernel=kernel, num_samples=4, lag=2)
        capped, other = (run(survival=q, **settings) for q in (0.0, 0.25))
        assert capped.meeting_time.max() < 1000
        for a, b in zip(flat(capped), flat(other), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

    @every_kernel
    def test_ends_pairs_at_the_doublings_of_max_steps(self, kernel):
        # A state of a weight that no other reaches: chains that are there never meet.
        def log_weight(noise, image_index):
            return torch.where(noise[..., 0].abs() < 1e-2, 60.0, 0.0)

        chains = run(log_weight, 4000, kernel=kernel, survival=0.25, **self.SETTINGS)
        ends = chains.meeting_time[chains.meeting_time >= 16]
        ends = ends[(ends / 16).log2() % 1 == 0]
        assert not chains.truncated.any() and len(ends) > 80
        # Geometric: of those that came to an end, 3/4 went no further, 3/16 to the next one.
        for end, share in ((16, 3 / 4), (32, 3 / 16), (64, 3 / 64)):
            error = (share * (1 - share) / len(ends)) ** 0.5
            assert abs((ends == end).double().mean() - share) < 5 * error

    @every_kernel
    def test_draws_for_each_pair(self, kernel, monkeypatch):
        drawn = []
        survivors = horizon.Horizon.survivors

        def listening(*args):
            drawn.append(survivors(*args))
            return drawn[-1]

        monkeypatch.setattr(horizon.Horizon, "survivors", listening)
        settings = self.SETTINGS | dict(max_steps=2)
        run(steep_log_weight, 400, kernel=kernel, survival=0.25, **settings)
        # A quarter of some 300, to five standard errors: all or none if they shared a draw.
        share, count = drawn[0].double().mean(), len(drawn[0])
        assert count > 100 and abs(share - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5


@every_setting
def test_a_group_of_isir_disir_is_a_state_of_one_chain(num_samples, lag, burn_in):
    settings = dict(num_samples=num_samples, lag=lag, burn_in=burn_in)
    chains = run(num_images=50, kernel="isir_disir", **settings)
    per_group = chains.particles.coefficient.sum(-1).abs()
    torch.testing.assert_close(per_group, torch.full_like(per_group, 1 / lag))
    assert torch.bincount(chains.main.image_index).tolist() == [lag] * 50
    # X and Y for each t from t0 + L until the meeting.
    groups = 2 * (chains.meeting_time - burn_in - lag).clamp(min=0)
    assert torch.equal(torch.bincount(chains.correction.image_index, minlength=50), groups)


@every_setting
def test_a_group_of_isir_is_one_sample(num_samples, lag, burn_in):
    chains = run(num_images=50, kernel="isir", num_samples=num_samples, lag=lag, burn_in=burn_in)
    main, correction, both = chains.main, chains.correction, chains.particles
    assert both.noise.shape == (chains.evaluations.sum(), 1, DIM)
    assert torch.equal(torch.bincount(both.image_index), chains.evaluations)
    assert len(both.noise.unique(dim=0)) == len(both.noise)
    for part in (main, correction):
        assert torch.equal(part.noise, both.noise)
        assert torch.equal(part.image_index, both.image_index)
    total = main.coefficient + correction.coefficient
    torch.testing.assert_close(both.coefficient, total, rtol=0, atol=1e-15)


@every_kernel
@every_setting
def test_main_sum_and_correction_are_the_two_sums_of_the_estimator(
    kernel, num_samples, lag, burn_in
):
    chains = run(num_images=50, num_samples=num_samples, lag=lag, burn_in=burn_in, kernel=kernel)
    for part, total in ((chains.main, 1.0), (chains.correction, 0.0)):
        sums = totals(part, 50)
        torch.testing.assert_close(sums, torch.full((50,), total), rtol=0, atol=1e-12)
    assert (chains.main.coefficient >= 0).all()
    # Nothing is to be corrected where the chains met before the second sum begins.
    corrected = torch.zeros(50, dtype=torch.bool)
    corrected[chains.correction.image_index[(chains.correction.coefficient != 0).any(-1)]] = True
    assert torch.equal(corrected, chains.meeting_time > burn_in + lag)


@every_kernel
def test_log_weights_are_averaged_over_the_signed_measure_and_over_independent_draws(kernel):
    # Independent draws are X's start and the fresh samples of its ISIR steps alone.
    drawn = []

    def log_weight(noise, image_index):
        values = toy_log_weight(noise, image_index)
        drawn.append(values)
        return values

    chains = run(log_weight, num_images=6, num_samples=4, lag=3, burn_in=2, kernel=kernel)
    if kernel == "isir":
        independent = drawn[0][:, : 1 + 3 * 3]
    else:
        independent = torch.cat([drawn[call] for call in (0, 1, 3, 5)], dim=1)
    assert independent.shape == (6, 1 + 3 * 3)
    expected = independent.exp().mean(1).log()
    torch.testing.assert_close(chains.log_mean_weight, expected)
    particles = chains.particles
    values = toy_log_weight(particles.noise, particles.image_index)
    expected = integrate(particles, 6, values[:, :, None])[:, 0]
    torch.testing.assert_close(chains.mean_log_weight, expected)
    torch.testing.assert_close(chains.mismatch, chains.mean_log_weight - chains.log_mean_weight)


@every_kernel
@pytest.mark.parametrize("constant", [-3000.0, 3000.0])
def test_a_constant_shifts_the_mean_log_weights_and_nothing_else(kernel, constant):
    # Log weights of images are of this size: exp(3000) is infinite, exp(-3000) is 0.
    settings = dict(num_samples=4, lag=3, kernel=kernel)
    chains = run(**settings)
    shifted = run(lambda *args: toy_log_weight(*args) + constant, **settings)
    for name in ("mean_log_weight", "log_mean_weight"):
        torch.testing.assert_close(getattr(shifted, name), getattr(chains, name) + constant)
    torch.testing.assert_close(shifted.particles, chains.particles, rtol=0, atol=1e-9)


def blocks_of(chains, num_samples, lag, burn_in, max_steps):
    """Which images have how many steps in each evaluation of ``isir`` after the first."""
    end = torch.where(chains.truncated, max_steps, chains.meeting_time - 1)  # last step of the pair
    t = head(lag, burn_in, max_steps)
    while (left := end > t).any():
        ahead = block(t, int(left.sum()), num_samples, lag, max_steps)
        yield left, ahead
        t += ahead


def evaluations(chains, kernel, num_samples, lag, burn_in, max_steps=1000):
    """What images that met when these did cost, and not one evaluation more."""
    end, tau = burn_in + lag - 1, chains.meeting_time
    starts = 2 * (num_samples if burn_in == 0 else 1)
    if kernel == "isir":
        steps = torch.full_like(tau, head(lag, burn_in, max_steps))
        for left, ahead in blocks_of(chains, num_samples, lag, burn_in, max_steps):
            steps[left] += ahead
    else:
        # 2 kernel steps a t alone, 3 in a pair (ISIR's samples are shared); at tau, ISIR alone,
        # and DISIR only where the main sum still needs X.
        alone = 2 * lag + 2 * (end - tau).clamp(min=0) + (tau <= end)
        steps = alone + 3 * (tau - 1 - lag) + 1
    return starts + (num_samples - 1) * steps


@every_kernel
@every_setting
def test_an_image_that_has_met_leaves_the_batch(kernel, num_samples, lag, burn_in):
    settings = dict(kernel=kernel, num_samples=num_samples, lag=lag, burn_in=burn_in)
    chains = run(num_images=30, **settings)
    assert not chains.truncated.any()
    assert torch.equal(chains.evaluations, evaluations(chains, **settings))


def test_at_least_half_of_a_pair_s_evaluations_are_of_steps_before_the_meeting():
    lag, starts = 3, 2
    chains = run(steep_log_weight, 40, num_samples=4, lag=lag, kernel="isir", max_steps=10_000)
    assert not chains.truncated.any() and chains.meeting_time.max() > 50
    together = (chains.evaluations - starts) // 3 - lag
    assert (together <= 2 * (chains.meeting_time - 1 - lag)).all()
    assert (together > chains.meeting_time - 1 - lag).any()


def test_rounding_leaves_nothing_of_the_steps_after_the_meeting(monkeypatch):
    monkeypatch.setattr(
        isir, "ROWS", 10**6
    )  # long blocks, in which images meet long before the end
    chains = run(steep_log_weight, 500, num_samples=4, lag=1, kernel="isir", max_steps=10_000)
    image_index = chains.correction.image_index
    first_of_image = chains.evaluations.cumsum(0) - chains.evaluations
    in_time = image_index.argsort(stable=True)
    number = torch.empty_like(in_time)  # of a sample among its image's, in the order of the draws
    number[in_time] = torch.arange(len(in_time)) - first_of_image[image_index[in_time]]
    # 0 is X's start; 1 to 6 are those of the steps t = 1 and 2; 7 is Y's start; the next are t = 3.
    t = torch.where(number < 7, (number + 2) // 3, (number + 1) // 3)
    t[number == 7] = 0
    after = t >= chains.meeting_time[image_index]
    assert after.double().mean() > 0.1
    assert (chains.correction.coefficient[after] == 0).all()
    last = t == chains.meeting_time[image_index] - 1
    assert (chains.correction.coefficient[last] != 0).any()


@every_kernel
@pytest.mark.parametrize("burn_in", [1, 9])
def test_rounding_cannot_part_chains_that_have_met(kernel, burn_in):
    # On a GPU a sum may depend on its place in the batch. Here no two evaluations of the same noise
    # agree, and by far more than rounding; met chains are one chain all the same (trap 5).
    rounding = torch.Generator().manual_seed(1)

    def log_weight(noise, image_index):
        values = toy_log_weight(noise, image_index)
        return values + 0.1 * torch.randn(values.shape, generator=rounding)

    settings = dict(num_samples=4, lag=2, burn_in=burn_in, kernel=kernel)
    chains = run(log_weight, 200, **settings)
    assert chains.meeting_time.max() < 100 and not chains.truncated.any()
    assert torch.equal(chains.evaluations, evaluations(chains, **settings))
    corrected = torch.zeros(200, dtype=torch.bool)
    corrected[chains.correction.image_index[(chains.correction.coefficient != 0).any(-1)]] = True
    assert torch.equal(corrected, chains.meeting_time > burn_in + 2)


def test_ess_is_the_mean_over_the_disir_steps_of_both_chains(monkeypatch):
    seen = []

    def spy(function, picks):
        def wrapped(*args):
            result = function(*args)
            if args[-1] is not None:
                seen.extend(effective_sample_size(picked.weights) for picked in picks(result))
            return result

        return wrapped

    step, coupled = moves.step, moves.coupled_step
    monkeypatch.setattr(moves, "step", spy(step, lambda result: [result[1]]))
    monkeypatch.setattr(
        moves,
        "coupled_step",
        spy(coupled, lambda moved: [moved.first_samples, moved.second_samples]),
    )
    chains = run(num_samples=5, lag=2, burn_in=4)
    torch.testing.assert_close(chains.ess, torch.cat(seen).mean())
    assert 1 < chains.ess < 5
    assert run(kernel="isir").ess.isnan()


@every_kernel
def test_the_generator_is_the_only_source_of_randomness(kernel):
    before = torch.get_rng_state()
    first, second, other = (run(seed=seed, kernel=kernel) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(first.particles, second.particles, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.particles.noise[0], other.particles.noise[0])


@every_kernel
def test_no_graph_is_built(kernel):
    parameter = torch.ones(1, requires_grad=True)
    chains = run(lambda noise, index: parameter * toy_log_weight(noise, index), kernel=kernel)
    assert not any(part.requires_grad for part in chains.particles)


@every_kernel
def test_float32_chains_are_float32(kernel):
    chains = run(num_images=50, kernel=kernel, dtype=torch.float32, lag=3)
    assert chains.particles.noise.dtype == chains.particles.coefficient.dtype == torch.float32
    # Rounding: some 100 coefficients below 1, each off by 2^-24 of itself.
    total = totals(chains.particles, 50)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 1e-6, 1 - 1e-6])
def test_the_ends_of_beta(beta):
    chains = run(num_images=30, beta=beta, num_samples=4, lag=2, dtype=torch.float32)
    assert chains.particles.noise.isfinite().all()
    assert not chains.truncated.any()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_images=0), "num_images must be at least 1, got 0"),
        (dict(dim=0), "dim must be at least 1, got 0"),
        (dict(num_samples=1), "num_samples must be at least 2, got 1"),
        (dict(lag=0), "lag must be at least 1, got 0"),
        (dict(burn_in=-1), "burn_in must be at least 0, got -1"),
        (dict(lag=4, burn_in=3, max_steps=6), r"max_steps must be at least burn_in \+ lag = 7"),
        (dict(survival=0.5), r"survival must be in \[0, 0.5\), got 0.5"),
        (dict(survival=-0.1), r"survival must be in \[0, 0.5\), got -0.1"),
        (dict(survival=float("nan")), r"survival must be in \[0, 0.5\), got nan"),
        (dict(kernel="gibbs"), "kernel must be one of isir, isir_disir, isir_hmc, got gibbs"),
        (dict(beta=1.0), r"beta must be in \[0, 1\), got 1"),
        (dict(beta=-0.1), r"beta must be in \[0, 1\), got -0.1"),
        (dict(beta=float("nan")), r"beta must be in \[0, 1\), got nan"),
        (
            dict(kernel="disir"),
            "kernel must be one of isir, .*, got disir, .* never meet",
        ),
        (dict(beta=torch.tensor(1.5)), r"beta must be in \[0, 1\), got 1.5"),
        (dict(beta=torch.tensor(1.0)), r"beta must be in \[0, 1\), got 1.0"),
        (dict(beta=torch.tensor(-0.1)), r"beta must be in \[0, 1\), got -0.1"),
        (dict(beta=torch.tensor(torch.nan)), r"beta must be in \[0, 1\), got nan"),
        (dict(beta=torch.full((7,), 0.5)), r"beta must be one number, got a tensor \[7\]"),
    ],
)
def test_arguments_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        run(**settings)


@pytest.mark.parametrize(
    "wrong, got",
    [
        (lambda values: values[..., None], r"\[7, 1, 1\]"),
        (lambda values: values.sum(-1), r"\[7\]"),
        (lambda values: values[:1], r"\[1, 1\]"),
        (lambda values: values.sum(), r"\[\]"),
        (lambda values: values.tolist(), "list"),
        (lambda values: values.numpy(), "ndarray"),
    ],
)
def test_log_weights_of_another_shape_are_refused(wrong, got):
    with pytest.raises(ValueError, match=rf"log_weight must return .* \[7, 1\] .*, got {got}"):
        run(lambda noise, image_index: wrong(toy_log_weight(noise, image_index)))


def test_first_samples_of_another_shape_are_refused():
    first = torch.randn(7, 4, DIM), torch.randn(7, 3)
    message = r"first must be noise \[7, 4, 2\] and its log weights \[7, 4\], got \[7, 4, 2\] and"
    with pytest.raises(ValueError, match=message):
        run(num_samples=4, lag=2, first=first)


def test_log_weights_that_would_broadcast_are_refused():
    # [n, 1] for K - 1 proposals would pass for one weight for all of them.
    def log_weight(noise, image_index):
        return toy_log_weight(noise, image_index)[:, :1]

    with pytest.raises(ValueError, match=r"\[n, k\] = \[7, 9\] .* got \[7, 1\]"):
        run(log_weight)


@every_kernel
@pytest.mark.parametrize("noise, weights", [("float32", "float64"), ("float64", "float32")])
def test_log_weights_may_have_a_dtype_of_their_own(kernel, noise, weights):
    noise, weights = getattr(torch, noise), getattr(torch, weights)

    # What is representable in both gives bit-equal particles: weights are float64 in any case.
    def cast(*dtypes):
        def log_weight(noise, image_index):
            values = toy_log_weight(noise, image_index).float()
            for dtype in dtypes:
                values = values.to(dtype)
            return values

        return run(log_weight, kernel=kernel, dtype=noise, lag=3)

    chains, same = cast(weights), cast(noise)
    assert chains.particles.noise.dtype == chains.particles.coefficient.dtype == noise
    assert chains.mismatch.dtype == torch.float64
    for one, two in zip(chains.particles, same.particles, strict=True):
        assert torch.equal(one, two)


@every_kernel
def test_log_weights_keep_their_precision(kernel):
    # At 10^6 float32 has steps of 1/16, which would change every weight.
    def log_weight(noise, image_index):
        return toy_log_weight(noise.double(), image_index)

    settings = dict(kernel=kernel, dtype=torch.float32, lag=3)
    chains = run(log_weight, **settings)
    shifted = run(lambda *args: log_weight(*args) + 1e6, **settings)
    torch.testing.assert_close(shifted.particles, chains.particles, rtol=0, atol=1e-6)


@every_kernel
def test_log_weight_never_gets_an_empty_batch(kernel):
    # A user's function may take the largest of its values, which an empty batch has not.
    def log_weight(noise, image_index):
        assert noise.shape[0] == len(image_index) > 0 and noise.shape[1] > 0
        return toy_log_weight(noise, image_index)

    for burn_in in (0, 1, 12):
        run(log_weight, num_images=4, kernel=kernel, lag=2, burn_in=burn_in, num_samples=4)


def spoilt(value, from_call, samples=slice(0, 1), log_weight=toy_log_weight, to_call=1000):
    """A log weight that goes wrong for image 2, in some samples, from some call to another."""
    calls = 0

    def spoiling(noise, image_index):
        nonlocal calls
        calls += 1
        result = log_weight(noise, image_index)
        if from_call < calls <= to_call:
            result[image_index == 2, samples] = value
        return result

    return spoiling


@every_kernel
def test_log_weight_gets_images_in_their_order_and_none_twice(kernel):
    seen = []

    def log_weight(noise, image_index):
        seen.append(image_index.tolist())
        return steep_log_weight(noise, image_index)

    run(log_weight, num_images=40, kernel=kernel, num_samples=3, lag=2)
    assert all(indices == sorted(set(indices)) for indices in seen)
    assert seen[0] == list(range(40)) and 0 < len(seen[-1]) < 40


@every_kernel
def test_log_weight_gets_images_in_their_order_where_x_goes_on_alone(kernel):
    # Until a long burn-in is over X goes on, at last for all images, which have met one by one.
    seen = []

    def log_weight(noise, image_index):
        seen.append(image_index.tolist())
        return steep_log_weight(noise, image_index)

    chains = run(log_weight, num_images=20, kernel=kernel, num_samples=3, lag=2, burn_in=200)
    assert chains.meeting_time.unique().numel() > 1 and chains.meeting_time.max() < 200
    assert all(indices == sorted(set(indices)) for indices in seen)
    assert seen[-1] == list(range(20)) or kernel == "isir"


class TestInvalidWeights:
    # With K = 4 and L = 3 calls of isir_disir are: X's start; two for each of the steps alone; Y's
    # start; then coupled ones. At a long burn-in X goes on alone once the chains have met.
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize(
        "burn_in, from_call", [(0, 0), (0, 2), (0, 5), (1, 0), (1, 2), (1, 5), (19, 12)]
    )
    def test_nan_or_infinite_in_isir_disir(self, value, burn_in, from_call):
        self.refuses_not_below_infinity(
            spoilt(value, from_call), kernel="isir_disir", burn_in=burn_in
        )

    # The first call of isir has X's start (4 samples at t0 = 0, else 1), then 3 for each of the
    # steps (4 of them, or t0 + 2), then Y's start. Others follow.
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize(
        "burn_in, from_call, sample",
        [
            (0, 0, 0),
            (0, 0, 8),
            (0, 0, 15),
            (0, 0, -1),
            (1, 0, 0),
            (1, 0, 1),
            (1, 0, 12),
            (1, 0, -1),
            (19, 0, 63),
            (1, 1, 0),
            (1, 3, -1),
        ],
    )
    def test_nan_or_infinite_in_isir(self, value, burn_in, from_call, sample):
        samples = slice(sample, sample + 1 or None)
        log_weight = spoilt(value, from_call, samples, steep_log_weight)
        self.refuses_not_below_infinity(log_weight, kernel="isir", burn_in=burn_in, seed=6)

    def refuses_not_below_infinity(self, log_weight, **settings):
        with pytest.raises(
            NonFiniteError, match=r"log weights: image 2 of .* \(1 in all\) has a NaN or"
        ):
            run(log_weight, lag=3, num_samples=4, **settings)

    @every_kernel
    @pytest.mark.parametrize("burn_in", [0, 1])
    @pytest.mark.parametrize("sample", [0, 3])
    def test_in_first_samples_that_are_given(self, kernel, burn_in, sample):
        noise = torch.randn(7, 4, DIM)
        log_weights = toy_log_weight(noise, torch.arange(7))
        log_weights[2, sample] = torch.nan
        first = noise, log_weights
        self.refuses_not_below_infinity(toy_log_weight, kernel=kernel, burn_in=burn_in, first=first)

    @every_kernel
    def test_in_a_starting_sample_alone(self, kernel):
        # h(X_0) uses it, and no step sees it again.
        once = iter([True])

        def log_weight(noise, image_index):
            result = toy_log_weight(noise, image_index)
            if next(once, False):
                result[2, 3] = torch.nan
            return result

        with pytest.raises(NonFiniteError, match="image 2 .* a NaN or"):
            run(log_weight, kernel=kernel, burn_in=0, lag=1, num_samples=4)

    @every_kernel
    def test_only_minus_infinity(self, kernel):
        with pytest.raises(NonFiniteError, match="image 2 .* only -inf among the K"):
            run(spoilt(-torch.inf, 0, slice(None)), kernel=kernel, num_samples=4)

    @pytest.mark.parametrize("start", [slice(4), slice(-4, None)], ids=["X", "Y"])
    def test_only_minus_infinity_in_a_start_of_isir(self, start):
        # At t0 = 0 all four count, and the steps, which see the selected one, may go on from there.
        with pytest.raises(NonFiniteError, match="image 2 .* only -inf among the K"):
            run(spoilt(-torch.inf, 0, start, to_call=1), kernel="isir", num_samples=4, burn_in=0)

    @pytest.mark.parametrize("samples", [[0, 1, 2, 3], [13, 10, 11, 12]], ids=["X", "Y"])
    def test_only_minus_infinity_in_the_first_step_of_a_chain_of_isir(self, samples):
        with pytest.raises(NonFiniteError, match="image 2 .* only -inf among the K"):
            run(spoilt(-torch.inf, 0, samples, to_call=1), kernel="isir", num_samples=4, lag=3)
        one_is_left = spoilt(-torch.inf, 0, samples[1:], to_call=1)
        run(one_is_left, kernel="isir", num_samples=4, lag=3)

    @every_kernel
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_take_an_image_out_of_the_batch(self, kernel, value):
        asked = 0  # for samples of image 2

        def log_weight(noise, image_index):
            nonlocal asked
            result = toy_log_weight(noise, image_index)
            result[image_index == 2] = value
            asked += result[image_index == 2].numel()
            return result

        with pytest.raises(NonFiniteError, match="image 2"):
            run(log_weight, kernel=kernel, num_samples=4, lag=3, max_steps=10_000)
        # Both starts, 3 steps alone and one of the pair; isir_disir takes two sub-steps each.
        assert asked == {"isir": 2 + 4 * 3, "isir_disir": 2 + 7 * 3}[kernel]

    @every_kernel
    @pytest.mark.parametrize("burn_in", [0, 2])
    def test_some_minus_infinity_is_a_weight_of_zero(self, kernel, burn_in):
        chains = run(spoilt(-torch.inf, 0), kernel=kernel, burn_in=burn_in, lag=2, num_samples=4)
        assert chains.particles.coefficient.isfinite().all()
        assert chains.mismatch.isfinite().all()
        assert not chains.truncated.any()


@every_kernel
def test_chains_that_cannot_meet_are_counted_as_truncated(kernel):
    # Every sample of image 1 but the two starts has weight 0: its chains stay where they are.
    def log_weight(noise, image_index):
        values = toy_log_weight(noise, image_index)
        if kernel == "isir":
            first_call = len(image_index) == 3 and noise.shape[1] % 3 == 2
            values[image_index == 1, slice(1, -1) if first_call else slice(None)] = -torch.inf
        elif noise.shape[1] > 1:
            values[image_index == 1] = -torch.inf
        return values

    settings = dict(num_samples=4, lag=2, burn_in=1, max_steps=25)
    chains = run(log_weight, num_images=3, kernel=kernel, **settings)
    assert chains.truncated.tolist() == [False, True, False]
    assert chains.meeting_time[1] == 25
    torch.testing.assert_close(totals(chains.particles, 3), torch.ones(3), rtol=0, atol=1e-12)
    if kernel == "isir":
        assert torch.equal(chains.evaluations, evaluations(chains, kernel, **settings))
        assert chains.evaluations[1] == 2 + 25 * 3
        # X and Y by turns in each of the steps t = 3, ..., 25, over L = 2.
        mine = chains.correction.image_index == 1
        assert chains.correction.coefficient[mine].abs().sum() == 2 * 23 / 2
