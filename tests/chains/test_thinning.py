"""Thinned particles: expectations, numbers and places."""

import pytest
import torch
from references import has_frequencies, is_unbiased

from ucvae.chains import SignedParticles
from ucvae.chains.thinning import MULTIPLE, padded, thin

pytestmark = pytest.mark.usefixtures("double")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


PARTICLES = SignedParticles(
    torch.tensor([4, 0, 4]),
    torch.arange(12, dtype=torch.float64).view(3, 2, 2),
    torch.tensor([[0.5, -0.02], [-1e-3, 0.06], [0.1, 0.0]], dtype=torch.float64),
)


def test_keeps_each_coefficient_s_expectation():
    source, rounds = generator(), 20_000
    kept = torch.zeros(rounds, 6)
    for i in range(rounds):
        thinned = thin(PARTICLES, 0.1, source)
        which = thinned.noise[:, 0, 0].long() // 2  # a particle's noise says which it is
        kept[i, which] = thinned.coefficient[:, 0]
    assert is_unbiased(kept, PARTICLES.coefficient.flatten())
    assert not is_unbiased(kept.clamp(min=0), PARTICLES.coefficient.flatten())
    # The heavy are kept as they are; the light survive with the coefficient +-m or not at all.
    assert (kept[:, 0] == 0.5).all() and (kept[:, 4] == 0.1).all()
    assert [sorted(set(kept[:, k].tolist())) for k in (1, 2, 3, 5)] == [
        [-0.1, 0.0],
        [-0.1, 0.0],
        [0.0, 0.1],
        [0.0],
    ]


def test_draws_a_lot_for_each_image():
    # One lot for all would have the errors of a batch's images move together (as in trap 1):
    # both of a pair that survive with chance 1/2 would do so in half of the rounds.
    source, rounds = generator(), 4000
    pair = SignedParticles(torch.arange(2), torch.zeros(2, 1, 2), torch.full((2, 1), 0.05))
    both = sum(len(thin(pair, 0.1, source).coefficient) == 2 for _ in range(rounds))
    counts = torch.tensor([both, rounds - both], dtype=torch.float64)
    assert has_frequencies(counts, torch.tensor([0.25, 0.75]))


def test_keeps_a_number_of_light_particles_that_is_all_but_fixed():
    # Systematic: 30 of length 0.35 make a line of 10.5, so that 10 or 11 survive, each with
    # chance 1/2. (Independent lots would scatter by sqrt(30 * 0.35 * 0.65) = 2.6.)
    coefficient = torch.full((6, 5), 0.035) * torch.tensor([1.0, -1, 1, 1, -1])
    light = SignedParticles(torch.zeros(6, dtype=torch.long), torch.randn(6, 5, 2), coefficient)
    source = generator()
    counts = torch.tensor([len(thin(light, 0.1, source).coefficient) for _ in range(1000)])
    assert counts.unique().tolist() == [10, 11]
    both = torch.stack([(counts == 10).sum(), (counts == 11).sum()]).double()
    assert has_frequencies(both, torch.tensor([0.5, 0.5]))


def test_leaves_noise_and_image_with_their_particle():
    particles = PARTICLES._replace(coefficient=torch.ones(3, 2))
    thinned = thin(particles, 0.1, generator())
    assert thinned.image_index.tolist() == [0, 0, 4, 4, 4, 4]
    assert torch.equal(thinned.noise, particles.noise[[1, 0, 2]].view(6, 1, 2))
    assert torch.equal(thinned.coefficient, torch.ones(6, 1))


def test_at_zero_keeps_all():
    assert thin(PARTICLES, 0.0, generator()) is PARTICLES


@pytest.mark.parametrize("count, whole", [(0, 0), (7, 7), (33, 36), (260, 288), (1100, 1152)])
def test_padding_adds_nothing_to_the_measure(count, whole):
    noise, coefficient = torch.randn(count, 1, 2), torch.ones(count, 1)
    thinned = SignedParticles(torch.arange(count), noise, coefficient)
    filled = padded(thinned)
    assert len(filled.image_index) == whole
    for part, longer in zip(thinned, filled, strict=True):
        assert torch.equal(longer[:count], part) and len(longer) == whole
    assert not filled.coefficient[count:].any()
    assert padded(filled) is filled


def test_padded_numbers_are_few_and_an_eighth_above_at_most():
    def whole(count):
        one_each = torch.zeros(count, 1)
        return len(padded(SignedParticles(one_each, one_each, one_each)).image_index)

    sizes = {count: whole(count) for count in range(1, 2000)}
    assert all(count <= size <= 1.125 * count for count, size in sizes.items())
    assert len(set(sizes.values())) < 80
    assert {size % MULTIPLE for count, size in sizes.items() if count > 1024} == {0}
