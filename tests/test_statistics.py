"""Statistics of a training run against draws whose covariance is known."""

import pytest
import torch
from torch import nn

from ucvae.chains import LaggedChains, SignedParticles
from ucvae.errors import NonFiniteError
from ucvae.statistics import ChainCounts, GradientNoise, Means, total_norm


def with_gradient(*gradients):
    parameters = {}
    for index, gradient in enumerate(gradients):
        parameters[f"p{index}"] = nn.Parameter(torch.zeros_like(gradient))
        parameters[f"p{index}"].grad = gradient
    return parameters


class TestTotalNorm:
    def test_is_that_of_all_the_numbers(self):
        tensors = [torch.randn(30, 20), torch.randn(50), torch.randn(())]
        expected = torch.cat([tensor.flatten() for tensor in tensors]).norm()
        assert total_norm(tensors).shape == ()
        torch.testing.assert_close(total_norm(tensors), expected)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_shows_what_is_not_finite(self, value):
        assert not total_norm([torch.ones(3), torch.tensor([1.0, value])]).isfinite()


class TestGradientNoise:
    def test_is_the_share_of_the_covariance_in_the_mean_square(self):
        # 2,000 pairs of 50 numbers: each mean square is known to sqrt(2 / 1e5) = 0.5% or better,
        # the ratio to 0.7%; 4% is beyond five standard errors.
        noise = GradientNoise()
        mean = torch.full((50,), 0.5)
        for pair in range(2000):
            for step in (10 * pair, 10 * pair + 1):
                noise.add(step, with_gradient(mean + 2 * torch.randn(50), torch.randn(50)))
        share = noise.flush(20_000)
        assert share["p0"] == pytest.approx(4 / 4.25, rel=0.04)
        assert share["p1"] == pytest.approx(1.0, rel=0.04)

    def test_is_zero_where_batches_agree(self):
        noise = GradientNoise()
        for step in (20, 21):
            noise.add(step, with_gradient(torch.ones(3), torch.zeros(2)))
        assert noise.flush(21) == {"p0": 0.0, "p1": 0.0}

    def test_takes_consecutive_steps_only(self):
        noise = GradientNoise()
        for step in (19, 21, 22, 23, 25):
            noise.add(step, with_gradient(torch.randn(3)))
        assert noise.flush(25) == {}
        noise.add(30, with_gradient(torch.ones(1)))
        assert noise.flush(30) == {}
        noise.add(31, with_gradient(-torch.ones(1)))
        assert noise.flush(31) == {"p0": 2.0}  # half of (1 + 1)^2, over 1
        noise.add(32, with_gradient(torch.ones(1)))
        assert noise.flush(32) == {}

    def test_makes_no_pair_across_a_part(self):
        noise = GradientNoise()
        noise.add(30, with_gradient(torch.ones(1)))
        noise.part()
        noise.add(31, with_gradient(-torch.ones(1)))
        assert noise.flush(31) == {}

    def test_leaves_out_what_has_no_gradient(self):
        noise = GradientNoise()
        for step in (10, 11):
            noise.add(step, {"fixed": nn.Parameter(torch.ones(2)), **with_gradient(torch.ones(1))})
        assert noise.flush(11) == {"p0": 0.0}

    def test_goes_on_in_the_middle_of_a_pair(self):
        noise, restored = GradientNoise(), GradientNoise()
        noise.add(10, with_gradient(torch.ones(1)))
        restored.load_state_dict(noise.state_dict(), torch.device("cpu"))
        restored.add(11, with_gradient(torch.zeros(1)))
        assert restored.flush(11) == {"p0": 1.0}  # half of 1, over the mean of 1 and 0

    def test_goes_on_between_pairs(self):
        noise, restored = GradientNoise(), GradientNoise()
        for step in (10, 11):
            noise.add(step, with_gradient(torch.full((1,), step - 10.0)))
        restored.load_state_dict(noise.state_dict(), torch.device("cpu"))
        assert restored.flush(11) == {"p0": 1.0}


class TestMeans:
    def test_are_those_since_the_last_flush(self):
        means = Means()
        means.add(1, {"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
        means.add(2, {"a": torch.tensor(2.0)})
        assert means.flush(2) == {"a": 1.5, "b": 5.0}
        means.add(3, {"a": torch.tensor(7.0)})
        assert means.flush(3) == {"a": 7.0}

    def test_of_a_name_in_several_company(self):
        means = Means()
        means.add(1, {"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
        means.add(2, {"b": torch.tensor(7.0), "a": torch.tensor(4.0)})
        means.add_row(3, ("a",), torch.tensor([7.0], dtype=torch.float64))
        restored = Means()
        restored.load_state_dict(means.state_dict(), torch.device("cpu"))
        assert means.flush(3) == restored.flush(3) == {"a": 4.0, "b": 6.0}

    def test_go_on_from_a_checkpoint_with_each_name_by_itself(self):
        means = Means()
        sums = {"a": torch.tensor(3.0).double(), "b": torch.tensor(4.0).double()}
        state = {"sums": sums, "counts": {"a": 2, "b": 2}, "first_step": 1}
        means.load_state_dict(state, torch.device("cpu"))
        means.add(3, {"a": torch.tensor(6.0), "b": torch.tensor(8.0)})
        assert means.flush(3) == {"a": 3.0, "b": 4.0}

    def test_keep_nothing_of_the_caller_s(self):
        means, values = Means(), torch.ones(1, dtype=torch.float64)
        means.add_row(1, ("a",), values)
        values.fill_(3)
        means.add_row(2, ("a",), values)
        assert values == 3 and means.flush(2) == {"a": 2.0}

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_with_one_value_that_is_not_finite_are_refused(self, value):
        means = Means()
        for step, a in enumerate((1.0, value, 1.0), start=4):
            means.add(step, {"fine": torch.ones(()), "a": torch.tensor(a)})
        with pytest.raises(NonFiniteError, match=f"a became {value} between steps 4 and 6"):
            means.flush(6)


class TestChainCounts:
    @staticmethod
    def chains(times, truncated, evaluations):
        none = SignedParticles(torch.zeros(0), torch.zeros(0, 1, 1), torch.zeros(0, 1))
        # One of the six has no weight.
        coefficient = torch.ones(2 * len(times), 6)
        coefficient[:, 3] = 0
        particles = none._replace(coefficient=coefficient)
        value = torch.zeros(())
        return LaggedChains(
            none,
            none,
            particles,
            torch.tensor(times),
            torch.tensor(truncated),
            torch.tensor(evaluations),
            value,
            value,
            value,
            value,
        )

    def test_are_those_of_all_images_of_all_batches(self):
        counts = ChainCounts(20, torch.device("cpu"))
        assert counts.summary() is None
        counts.add(self.chains([3, 4, 20], [False, False, True], [10, 20, 90]))
        counts.add(self.chains([3, 3, 4, 20, 20], [False] * 3 + [True] * 2, [10, 10, 20, 70, 70]))
        assert counts.summary() == {
            "meeting_time": {"mean": 77 / 8, "p50": 4, "p90": 20, "p99": 20, "max": 20},
            "truncated_fraction": 3 / 8,
            "decoder_evaluations_per_image": 300 / 8,
            "particles_per_image": 16 * 5 / 8,
        }

    def test_of_pairs_that_have_gone_on(self):
        counts = ChainCounts(20, torch.device("cpu"))
        counts.add(self.chains([3, 21, 22, 80], [False] * 4, [10, 90, 90, 300]))
        times = counts.summary()["meeting_time"]
        assert times == {"mean": 66 / 4, "p50": 21, "p90": 21, "p99": 21, "max": 21}

    def test_are_no_more_for_chains_that_may_go_on_for_long(self):
        counts = ChainCounts(10**15, torch.device("cpu"))
        assert counts.histogram.numel() == 10_001
        counts.add(self.chains([3, 10_000, 10**14], [False] * 3, [10, 90, 90]))
        assert counts.summary()["meeting_time"]["max"] == 10_000

    def test_of_a_checkpoint_with_a_longer_histogram(self):
        """As they were written before 10,000 was the longest time that is told apart."""
        state = ChainCounts(9, torch.device("cpu")).state_dict()
        state["histogram"] = torch.zeros(50_002, dtype=torch.long)
        state["histogram"][torch.tensor([5, 10_000, 10_001, 50_001])] = torch.tensor([8, 1, 2, 3])
        counts = ChainCounts(50_000, torch.device("cpu"))
        counts.load_state_dict(state)
        assert counts.histogram.nonzero()[:, 0].tolist() == [5, 10_000]
        assert counts.histogram[[5, 10_000]].tolist() == [8, 6]
        counts.take(ChainCounts(50_000, torch.device("cpu")))
