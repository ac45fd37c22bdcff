r"""``ucvae.bias`` on simulated batch means, whose law is known.

R tables of B batch means give R p-values. For an unbiased estimator they are uniform: the
Kolmogorov-Smirnov test must not reject that, with a false alarm once in 10^6 runs; the seed is
fixed. Its controls are p-values that are wrong.
"""

import math

import pytest
import torch
from references import FALSE_ALARM
from scipy import stats

from ucvae.bias import BatchMeans
from ucvae.errors import NonFiniteError

pytestmark = pytest.mark.usefixtures("double")

TRUTH = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)
# The covariance of one estimate is MIXING MIXING^T: scales and correlations of all sizes.
MIXING = torch.tensor(
    [
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [5.0, 0.1, 0.0, 0.0, 0.0],
        [0.0, 0.3, 2.0, 0.0, 0.0],
        [0.0, 0.0, -9.0, 1.0, 0.0],
        [1.0, 1.0, 1.0, 1.0, 1.0],
    ],
    dtype=torch.float64,
)


def table(num_batches, truth=TRUTH, mixing=MIXING, bias=0.0):
    """Batch means of batches of 50 to 149 normal estimates each."""
    counts = torch.randint(50, 150, (num_batches,))
    noise = torch.randn(num_batches, mixing.shape[1]) @ mixing.T / counts.sqrt()[:, None]
    return of(truth + bias + noise, counts.tolist())


def of(rows, counts, **settings):
    """The rows as batch means."""
    means = BatchMeans(rows.shape[1], **settings)
    for row, count in zip(rows, counts, strict=True):
        means.add(row, count)
    return means


def is_uniform(p_values):
    return stats.kstest(p_values, "uniform").pvalue > FALSE_ALARM


class TestUnbiased:
    @pytest.mark.parametrize("num_batches, degrees", [(20, 5), (50, 5), (12, 3), (4, 1)])
    def test_p_values_are_uniform(self, num_batches, degrees):
        # Below 4 batches a coordinate the test is of num_batches // 4 combinations of them.
        tests = [table(num_batches).test(TRUTH) for _ in range(500)]
        assert {test.degrees for test in tests} == {degrees}
        assert is_uniform([test.p_value for test in tests])

    def test_p_values_of_the_chi_square_would_not_be(self):
        # At B = 4 m the F distribution is needed.
        tests = [table(20).test(TRUTH) for _ in range(500)]
        assert not is_uniform([stats.chi2.sf(test.chi_square, test.degrees) for test in tests])

    def test_p_values_of_dependent_batches_are_not(self):
        def dependent():
            means = table(40)
            for i in range(1, 40):
                means.means[i] = 0.5 * means.means[i - 1] + 0.5 * means.means[i]
            return means.test(TRUTH).p_value

        assert not is_uniform([dependent() for _ in range(300)])

    def test_standard_error_is_the_root_mean_square_of_the_error(self):
        # Mean squares over 500 tables; a square of about 1 effective degree of freedom has a
        # relative deviation of sqrt(2), so their mean has sqrt(2 / 500) = 6.3%.
        tests = [table(20).test(TRUTH) for _ in range(500)]
        errors = torch.tensor([test.relative_error for test in tests]).square().mean()
        expected = torch.tensor([test.standard_error for test in tests]).square().mean()
        assert errors == pytest.approx(expected.item(), rel=5 * 0.063)

    def test_variance_is_that_of_one_estimate(self):
        # 20,000 batches: a relative deviation of at most sqrt(2 / 20,000) = 1%.
        test = table(20_000).test(TRUTH)
        assert test.variance == pytest.approx(
            (MIXING.square().sum() / TRUTH.square().sum()).item(), rel=0.05
        )


class TestBiased:
    @pytest.mark.parametrize("size, rough_power", [(0.014, 0.2), (0.022, 0.45), (0.03, 0.75)])
    def test_power_is_that_of_the_noncentral_f(self, size, rough_power):
        """At level 0.05 with B = 30, over 500 tables: binomial, 5 standard errors.

        The bias is ``size`` standard deviations of one estimate, in each of 5 independent
        directions.
        """
        num_batches, degrees, level, rounds = 30, 5, 0.05, 500
        bias = size * MIXING.sum(1)
        critical = stats.f.isf(level, degrees, num_batches - degrees)
        found, powers = 0, []
        for _ in range(rounds):
            means = table(num_batches, bias=bias)
            found += means.test(TRUTH).p_value < level
            noncentrality = degrees * size**2 * sum(means.counts)
            powers.append(stats.ncf.sf(critical, degrees, num_batches - degrees, noncentrality))
        power = sum(powers) / rounds
        assert power == pytest.approx(rough_power, abs=0.1)
        assert abs(found - rounds * power) < 5 * math.sqrt(rounds * power * (1 - power))

    def test_bias_far_above_the_noise(self):
        test = table(20, bias=10.0).test(TRUTH)
        assert test.p_value < FALSE_ALARM
        expected = 10 * math.sqrt(5) / TRUTH.norm().item()
        assert test.relative_error == pytest.approx(expected, rel=0.1)

    def test_bias_among_many_coordinates(self):
        truth = torch.ones(500)
        test = table(40, truth, torch.eye(500), bias=0.2).test(truth)
        assert test.degrees == 10 and test.p_value < FALSE_ALARM
        assert table(40, truth, torch.eye(500)).test(truth).p_value > FALSE_ALARM


def test_t_square_is_the_textbook_s():
    rows = torch.randn(30, 5) @ MIXING.T / 10 + 1
    test = of(rows, [100] * 30).test(TRUTH)
    error = rows.mean(0) - TRUTH
    expected = 30 * error @ torch.linalg.solve(rows.T.cov(), error)
    assert test.chi_square == pytest.approx(expected.item())
    assert test.p_value == pytest.approx(stats.f.sf(expected.item() * 25 / (5 * 29), 5, 25))
    assert test.relative_error == pytest.approx((error.norm() / TRUTH.norm()).item())
    variance = 100 * rows.var(0).sum().item() / TRUTH.square().sum().item()
    assert test.variance == pytest.approx(variance)
    assert test.standard_error == pytest.approx(math.sqrt(variance / 3000))


def test_batches_weigh_by_their_counts():
    # The same estimates, whole or with the first batch in two halves that agree.
    means, counts = torch.randn(8, 5) + 1, [300, 100, 50, 80, 200, 60, 90, 70]
    test = of(means, counts).test(TRUTH)
    expected = torch.tensor(counts).double() @ means / sum(counts) - TRUTH
    assert test.relative_error == pytest.approx((expected.norm() / TRUTH.norm()).item())
    halves = of(torch.cat([means[:1], means]), [150, 150, *counts[1:]]).test(TRUTH)
    assert halves.relative_error == pytest.approx(test.relative_error)
    assert halves.variance == pytest.approx(test.variance * 7 / 8)


def test_units_of_the_coordinates_do_not_matter():
    units = torch.tensor([1e-3, 1.0, 1e3, 1.0, 1e2])
    means = table(20)
    scaled = of(torch.stack(means.means) * units, means.counts)
    assert scaled.test(TRUTH * units).chi_square == pytest.approx(means.test(TRUTH).chi_square)


class TestWithoutVariance:
    """Estimates that add up to the same number, beside a coordinate that is the same in all."""

    # 4 coordinates that add up to 0, and one that does not vary.
    mixing = torch.cat([torch.eye(4)[:, :3] - torch.eye(4)[:, 1:], torch.zeros(1, 3)]).double()

    def test_p_values_are_uniform(self):
        tests = [table(40, mixing=self.mixing).test(TRUTH) for _ in range(500)]
        assert {test.degrees for test in tests} == {3}
        assert is_uniform([test.p_value for test in tests])

    @pytest.mark.parametrize(
        "bias", [[0, 0, 0, 0, 1e-6], [1e-6, 0, 0, 0, 0], [1e-6, 1e-6, 1e-6, 1e-6, 0]]
    )
    def test_a_bias_is_found_however_small(self, bias):
        test = table(40, mixing=self.mixing, bias=torch.tensor(bias)).test(TRUTH)
        assert test.degrees == 3 and test.chi_square == math.inf and test.p_value == 0

    def test_a_bias_is_found_where_more_varies_than_the_batches_can_tell(self):
        # 10 batches of 3 varying directions: T^2 is of 2 combinations, which would not tell.
        bias = torch.tensor([0, 0, 0, 0, 1e-6])
        test = table(10, mixing=self.mixing, bias=bias).test(TRUTH)
        assert test.chi_square == math.inf and test.p_value == 0
        assert table(10, mixing=self.mixing).test(TRUTH).degrees == 2

    def test_a_bias_along_what_varies_is_told_by_its_size(self):
        bias = torch.tensor([1e-6, -1e-6, 0, 0, 0])
        assert 0 < table(40, mixing=self.mixing, bias=bias).test(TRUTH).p_value

    def test_rounding_is_no_bias(self):
        # Sums of float32 numbers of size 3: errors of 1e-7, the same way in each batch.
        means = table(40, mixing=self.mixing)
        rows = torch.stack(means.means).float() * (1 + 1e-7)
        rounded = of(rows, means.counts, rounding=1e-5)
        test = rounded.test(TRUTH)
        assert test.degrees == 3
        assert test.chi_square == pytest.approx(means.test(TRUTH).chi_square, rel=1e-3)

    def test_an_estimator_that_never_varies(self):
        exact, wrong = table(8, mixing=torch.zeros(5, 1)), table(8, mixing=torch.zeros(5, 1))
        wrong.means = [mean + 1e-3 for mean in wrong.means]
        test = exact.test(TRUTH)
        assert (test.degrees, test.chi_square, test.p_value) == (0, 0.0, 1.0)
        test = wrong.test(TRUTH)
        assert (test.degrees, test.chi_square, test.p_value) == (0, math.inf, 0.0)


class TestRefusals:
    def test_of_a_mean(self):
        means = BatchMeans(2)
        with pytest.raises(ValueError, match=r"mean must have shape \[2\], got \[3\]"):
            means.add(torch.zeros(3), 10)
        with pytest.raises(ValueError, match="count must be at least 1, got 0"):
            means.add(torch.zeros(2), 0)
        means.add(torch.ones(2), 10)
        with pytest.raises(NonFiniteError, match="the mean of batch 1 has a NaN or an infinity"):
            means.add(torch.tensor([1.0, math.nan]), 10)

    def test_of_a_test(self):
        with pytest.raises(ValueError, match="needs 4 batches or more, got 3"):
            table(3).test(TRUTH)
        for truth in (torch.zeros(5), torch.ones(4), torch.full((5,), math.inf)):
            with pytest.raises(
                ValueError, match=r"truth must be finite, not 0, and of shape \[5\]"
            ):
                table(4).test(truth)

    def test_a_mean_that_changes_later_is_another(self):
        means, mean = BatchMeans(1), torch.ones(1)
        means.add(mean, 1)
        mean.zero_()
        assert means.means[0].item() == 1
