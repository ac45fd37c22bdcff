r"""ISIR's selection by two decisions has exactly the joint law of Alg 5.

A selection is a function of uniform numbers that is constant between a few breakpoints. So its law
is a finite sum, cell by cell of the grid of all breakpoints, each with its volume as probability.
"""

import math

import pytest
import torch

from ucvae.chains.isir import Chains, Fresh, walk
from ucvae.chains.reference import couple_indices, select_in_two

pytestmark = pytest.mark.usefixtures("double")


def joint_law(select, breakpoints, size):
    """Table ``[size, size]`` of the pairs of indices that ``select(uniforms)`` gives.

    ``breakpoints`` are those of each of its uniforms; more than there are do no harm.
    """
    edges = [torch.tensor([0.0, *inner, 1.0]).clamp(0, 1).sort().values for inner in breakpoints]
    midpoints = torch.cartesian_prod(*((cut[1:] + cut[:-1]) / 2 for cut in edges))
    volumes = torch.cartesian_prod(*(cut.diff() for cut in edges)).prod(-1)
    x, y = select(midpoints)
    return torch.zeros(size**2).index_add(0, size * x + y, volumes).view(size, size)


def literally(select):
    """A function of one row of uniforms, for all rows."""
    return lambda rows: torch.tensor([select(row) for row in rows.tolist()]).unbind(-1)


def cumulative(masses):
    return (masses.cumsum(0) / masses.sum()).nan_to_num().tolist()  # no mass, no breakpoint


class Weights:
    """Log weights of both incumbents and of the K - 1 fresh samples between which they choose."""

    def __init__(self, num_samples, scale, equal=False):
        self.incumbents = scale * torch.randn(2)
        if equal:
            self.incumbents[1] = self.incumbents[0]
        self.fresh = scale * torch.randn(num_samples - 1)
        logs = torch.cat([self.incumbents[:, None], self.fresh.expand(2, -1)], 1)
        self.first, self.second = torch.softmax(logs, -1)  # the incumbent's slot is 0
        self.moves = (1 - self.first[0]).item(), (1 - self.second[0]).item()
        self.which = cumulative(self.fresh.exp())

    def by_alg_5(self):
        first, second = self.first, self.second
        overlap = torch.minimum(first, second)
        # Where one index is drawn for both; then from what is left of each.
        one = [*cumulative(overlap), *cumulative(first - overlap)]
        breakpoints = [overlap.sum().item()], one, cumulative(second - overlap)
        order = list(range(len(first)))
        weights = first.tolist(), second.tolist()
        select = literally(lambda uniforms: couple_indices(*weights, uniforms, order))
        return joint_law(select, breakpoints, len(first))

    def by_two_decisions(self):
        def select(uniforms):
            x, y = (select_in_two(w.tolist(), 0, uniforms) for w in (self.first, self.second))
            return x, y

        return joint_law(literally(select), [self.moves, self.which], len(self.first))

    def by_walking(self):
        size = len(self.first)

        def select(uniforms):
            n = len(uniforms)
            places = 2 + torch.arange(size - 1).expand(1, n, -1)
            fresh = Fresh.of(self.fresh.expand(1, n, -1), places, uniforms[None])
            start = Chains(*(v[:, None].expand(2, n) for v in (self.incumbents, torch.arange(2))))
            # Places 0 and 1 are the incumbents', slot 0; from 2 on slots count from 1.
            return (walk(start, fresh, 1).end.place - 1).clamp(min=0)

        return joint_law(select, [self.moves, self.which], size)

    def by_decisions_of_their_own(self, shared):
        """Wrong: of the two uniforms the chains have only those in ``shared`` in common."""

        def select(uniforms):
            own = [0 if k in shared else 2 for k in (0, 1)]
            y_uniforms = [uniforms[k + own[k]] for k in (0, 1)]
            return (
                select_in_two(self.first.tolist(), 0, uniforms[:2]),
                select_in_two(self.second.tolist(), 0, y_uniforms),
            )

        breakpoints = 2 * [self.moves, self.which]
        return joint_law(literally(select), breakpoints, len(self.first))


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("num_samples", [2, 3, 6])
def test_two_decisions_have_the_joint_law_of_alg_5(num_samples, equal, scale):
    for _ in range(5):
        weights = Weights(num_samples, scale, equal)
        law = weights.by_alg_5()
        torch.testing.assert_close(law.sum(1), weights.first, rtol=0, atol=1e-12)
        torch.testing.assert_close(law.sum(0), weights.second, rtol=0, atol=1e-12)
        torch.testing.assert_close(weights.by_two_decisions(), law, rtol=0, atol=1e-12)
        torch.testing.assert_close(weights.by_walking(), law, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared", [(), (0,), (1,)])
@pytest.mark.parametrize("num_samples", [3, 6])
def test_decisions_that_are_not_both_shared_have_another(num_samples, shared):
    weights = Weights(num_samples, 1.0)
    law, wrong = weights.by_alg_5(), weights.by_decisions_of_their_own(shared)
    # The marginals do not tell.
    torch.testing.assert_close(wrong.sum(1), weights.first, rtol=0, atol=1e-12)
    torch.testing.assert_close(wrong.sum(0), weights.second, rtol=0, atol=1e-12)
    assert (wrong - law).abs().max() > 0.01


@pytest.mark.parametrize("uniforms", [[0.0, 0.0], [1 - 2**-53, 1 - 2**-53]])
def test_the_ends_of_the_uniforms(uniforms):
    # A move for certain at 0, from any finite weight; at the other end only where nothing stays.
    fresh = torch.tensor([-math.inf, -40.0, -math.inf]).expand(1, 3, -1)
    places = torch.tensor([3, 4, 5]).expand(1, 3, -1)
    start = Chains(torch.tensor([[-math.inf, -38.0, 700.0]]), torch.arange(3)[None])
    walked = walk(start, Fresh.of(fresh, places, torch.tensor(uniforms).expand(1, 3, 2)), 1)
    expected = [4, 4, 4] if uniforms[0] == 0 else [4, 1, 2]
    assert walked.end.place.tolist() == [expected]
    assert walked.end.log_weight.tolist() == [
        [
            -40.0 if place == 4 else log
            for place, log in zip(expected, [0, -38.0, 700.0], strict=True)
        ]
    ]


def test_an_impossible_offer_moves_nobody():
    fresh = torch.full((1, 2, 3), -math.inf)
    start = Chains(torch.tensor([[0.0, -math.inf]]), torch.arange(2)[None])
    for uniform in (0.0, 0.5, 1 - 2**-53):
        offer = Fresh.of(fresh, torch.arange(2, 8).view(1, 2, 3), torch.full((1, 2, 2), uniform))
        walked = walk(start, offer, 1)
        assert torch.equal(walked.end.place, start.place)
        assert walked.possible.tolist() == [True, False]
