import itertools

import pytest
import torch
from references import has_frequencies

from ucvae.chains.reference import couple_indices
from ucvae.chains.selection import effective_sample_size, normalize, select, select_coupled

pytestmark = pytest.mark.usefixtures("double")

# Twentieths; the overlap is (4, 5, 3, 2), of sum 14, and the residuals are (6, 0, 0, 0) and
# (0, 3, 0, 3).
FIRST = torch.tensor([10, 5, 3, 2], dtype=torch.float64) / 20
SECOND = torch.tensor([4, 8, 3, 5], dtype=torch.float64) / 20


def midpoints(count):
    return (torch.arange(count) + 0.5) / count


def joint(first, second):
    """Alg 5's exact table of the two indices."""
    overlap = torch.minimum(first, second)
    apart = torch.outer(first - overlap, second - overlap) / (1 - overlap.sum())
    return torch.diag(overlap) + apart


def table(first, second, size):
    return torch.bincount(first * size + second, minlength=size**2).double()


def test_select_inverts_the_cumulative_sum():
    masses = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0]).expand(8, 5)
    indices = select(masses, torch.tensor([0, 0.1, 0.2499, 0.25, 0.5, 0.75, 0.99, 1 - 2**-53]))
    assert indices.tolist() == [1, 1, 1, 3, 3, 3, 3, 3]


def test_select_never_returns_a_mass_of_zero():
    masses = torch.rand(20_000, 7) * (torch.rand(20_000, 7) < 0.5)
    masses[:, 3] += 1e-300
    masses[::2] *= 1e-12
    for uniform in (0.0, 0.5, 1 - 2**-53):
        indices = select(masses, torch.full((20_000,), uniform))
        assert (masses.gather(1, indices[:, None]) > 0).all()


def test_an_index_over_a_fine_grid_of_uniforms_has_its_weights():
    # The masses have denominators that the grids divide, so the counts are exact.
    u0, u = torch.cartesian_prod(midpoints(20), midpoints(14)).unbind(-1)
    rows = len(u0)
    drawn = select_coupled(
        FIRST.expand(rows, -1), SECOND.expand(rows, -1), torch.stack([u0, u, u], -1)
    )
    for index, weights in ((drawn.first, FIRST), (drawn.second, SECOND)):
        frequency = torch.bincount(index, minlength=4) / rows
        torch.testing.assert_close(frequency, weights, rtol=0, atol=1e-12)
    assert drawn.common.double().mean() == pytest.approx(14 / 20, abs=1e-12)
    assert (drawn.common == (drawn.first == drawn.second)).all()


def test_coupled_indices_have_the_maximal_coupling_s_joint_law():
    rows = 200_000
    first, second = FIRST.expand(rows, -1), SECOND.expand(rows, -1)
    drawn = select_coupled(first, second, torch.rand(rows, 3))
    exact = joint(FIRST, SECOND)
    torch.testing.assert_close(exact.sum(1), FIRST)
    torch.testing.assert_close(exact.sum(0), SECOND)
    assert has_frequencies(table(drawn.first, drawn.second, 4).flatten(), exact.flatten())
    equal = (drawn.first == drawn.second).sum()
    meeting = torch.minimum(FIRST, SECOND).sum()
    counts = torch.stack([equal, rows - equal]).double()
    assert has_frequencies(counts, torch.stack([meeting, 1 - meeting]))

    # Control: independent indices have the right marginals, and only the joint law tells.
    uniforms = torch.rand(rows, 2)
    i, j = select(first, uniforms[:, 0]), select(second, uniforms[:, 1])
    assert has_frequencies(torch.bincount(i, minlength=4).double(), FIRST)
    assert has_frequencies(torch.bincount(j, minlength=4).double(), SECOND)
    assert not has_frequencies(table(i, j, 4).flatten(), exact.flatten())


def test_the_frequency_test_sees_two_percent():
    counts = torch.bincount(select(FIRST.expand(200_000, -1), torch.rand(200_000)), minlength=4)
    wrong = FIRST * torch.tensor([1.02, 0.98, 0.98, 0.98])
    assert not has_frequencies(counts.double(), wrong / wrong.sum())


@pytest.mark.parametrize("size", [2, 5, 10])
def test_coupled_indices_equal_the_literal_alg_5(size):
    first, second = torch.softmax(2 * torch.randn(2, 300, size), -1)
    uniforms = torch.rand(300, 3)
    drawn = select_coupled(first, second, uniforms)
    literal = [
        couple_indices(w.tolist(), v.tolist(), u.tolist(), list(range(size)))
        for w, v, u in zip(first, second, uniforms, strict=True)
    ]
    assert list(zip(drawn.first.tolist(), drawn.second.tolist(), strict=True)) == literal


def test_equal_weights_give_one_index_whatever_the_uniforms():
    # Among so many rows are those whose sum is below 1 by a rounding, and u_0 is at its largest.
    corners = torch.tensor(list(itertools.product([0.0, 1 - 2**-53], repeat=3)))
    weights = torch.softmax(torch.randn(4000, 6), -1)
    assert (weights.sum(-1) < 1 - 2**-53).any()
    for corner in corners:
        uniforms = corner.expand(4000, 3)
        drawn = select_coupled(weights, weights, uniforms)
        assert drawn.common.all()
        assert torch.equal(drawn.first, drawn.second)
        assert torch.equal(drawn.first, select(weights, uniforms[:, 1]))


def test_weights_without_overlap_are_never_common():
    first = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).expand(100, -1)
    drawn = select_coupled(first, first.flip(-1), torch.rand(100, 3))
    assert not drawn.common.any()
    assert (drawn.first < 2).all() and (drawn.second >= 2).all()


def test_weights_are_normalised_in_float64():
    weights = normalize(torch.tensor([[100.0, 70.0, -torch.inf]], dtype=torch.float32))
    assert weights.dtype == torch.float64
    expected = torch.tensor([[1.0, torch.tensor(-30.0).exp(), 0.0]])
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)


def test_effective_sample_size():
    weights = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]])
    assert effective_sample_size(weights).tolist() == [1, 4, 2]
