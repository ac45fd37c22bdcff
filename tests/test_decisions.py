"""The functions of :mod:`references` that decide "unbiased" and "these frequencies" (trap 8).

All statistical tests lean on them, so each is shown to say yes and no where it should: to decide as
the textbook's test, by the mean and nothing more robust, and to want enough replicates.
"""

import pytest
import torch
from references import FALSE_ALARM, has_frequencies, is_unbiased
from scipy import stats

pytestmark = pytest.mark.usefixtures("double")


def rare(value, other, chance, count=20_000):
    """``other()``, or with a small chance ``value``; one column."""
    hit = torch.rand(count, 1) < chance
    return torch.where(hit, value, other(count))


class TestIsUnbiased:
    def test_decides_as_student_s_t_test_of_batch_means(self):
        # The worst of three components, at a third of the level, for shifts around the limit.
        estimates = torch.randn(5000, 3) * torch.tensor([1.0, 10.0, 0.1])
        found = []
        for shift in torch.linspace(0, 1.5, 31):
            truth = torch.tensor([0.0, shift, 0.0])
            means = estimates.view(50, 100, 3).mean(1)
            p_values = stats.ttest_1samp(means, truth).pvalue
            found.append(is_unbiased(estimates, truth))
            assert found[-1] == (p_values.min() > FALSE_ALARM / 3)
        assert found[0] and not found[-1]

    def test_accepts_a_mean_that_rare_estimates_carry(self):
        # -1 nearly always, and 99 once in 100: the mean is 0, each median or trimmed mean is not.
        estimates = rare(99.0, lambda count: -torch.ones(count, 1), 0.01)
        assert is_unbiased(estimates, torch.zeros(1))

    def test_rejects_a_bias_that_rare_estimates_carry(self):
        # Symmetric about 0, but for a 50 once in 100: medians and trimmed means are 0.
        estimates = rare(50.0, lambda count: torch.randn(count, 1), 0.01)
        assert not is_unbiased(estimates, torch.zeros(1))
        assert is_unbiased(estimates, torch.full((1,), 0.5))

    def test_takes_few_replicates_for_little_evidence(self):
        # Three estimates 86 standard errors away: t with 2 degrees of freedom goes as far as 1,000
        # once in 10^6, where a normal law ends at 5.
        few = torch.tensor([[-1.0], [0.0], [1.0]]) + 50
        assert is_unbiased(few, torch.zeros(1))
        assert not is_unbiased(few.repeat_interleave(20, 0), torch.zeros(1))

    def test_wants_what_never_varies_to_be_exact(self):
        constant = torch.ones(1000, 1)
        assert is_unbiased(constant, torch.ones(1))
        assert not is_unbiased(constant, torch.full((1,), 1 + 1e-6))

    def test_looks_at_every_component(self):
        truth = torch.zeros(40)
        estimates = torch.randn(20_000, 40)
        assert is_unbiased(estimates, truth)
        truth[17] = 0.1  # 14 standard errors
        assert not is_unbiased(estimates, truth)


class TestHasFrequencies:
    def test_decides_as_pearson_s_chi_square_test(self):
        probabilities = torch.tensor([0.5, 0.3, 0.2])
        found = []
        for shift in range(0, 400, 20):
            counts = torch.tensor([5000.0 + shift, 3000.0 - shift, 2000.0])
            p_value = stats.chisquare(counts, 10_000 * probabilities).pvalue
            found.append(has_frequencies(counts, probabilities))
            assert found[-1] == (p_value > FALSE_ALARM)
        assert found[0] and not found[-1]

    def test_rejects_what_cannot_happen(self):
        possible = torch.tensor([0.5, 0.5, 0.0])
        assert has_frequencies(torch.tensor([50.0, 50.0, 0.0]), possible)
        assert not has_frequencies(torch.tensor([50.0, 50.0, 1.0]), possible)

    def test_wants_draws_enough(self):
        with pytest.raises(AssertionError, match="too few draws"):
            has_frequencies(torch.tensor([4.0, 4.0]), torch.tensor([0.5, 0.5]))
