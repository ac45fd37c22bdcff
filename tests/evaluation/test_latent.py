"""Active units, and pictures whose every cell is the image that it should be."""

import types

import pytest
import torch
from torch import nn

from ucvae.evaluation.latent import active_units, reconstruction_grid, sample_grid
from ucvae.models.gaussians import Gaussian
from ucvae.models.likelihoods import Bernoulli
from ucvae.models.mlp import Mlp
from ucvae.models.vae import VAE

SHAPE = (3, 2, 4)
PIXELS = 24


class Given:
    """An encoder whose posterior means are the images themselves, and whose width is large."""

    def encode(self, images):
        return Gaussian(images, torch.full_like(images, 100.0))


def alternating(variances, count):
    """Columns of ``+-s`` about another centre each, with the variances given (over n - 1)."""
    size = (torch.tensor(variances, dtype=torch.float64) * (count - 1) / count).sqrt()
    sign = 1 - 2 * (torch.arange(count, dtype=torch.float64) % 2)
    return sign[:, None] * size + torch.arange(len(variances))


class TestActiveUnits:
    @pytest.mark.parametrize("count", [8, 10_000])
    def test_units_above_the_threshold_are_counted(self, count):
        means = alternating([0, 1e-6, 0.005, 0.0099, 0.0101, 0.012, 4.0], count)
        assert active_units(Given(), means).tolist() == 3

    def test_threshold_can_be_set(self):
        means = alternating([0.005, 0.0099, 0.0101, 4.0], 50)
        counts = [active_units(Given(), means, threshold).item() for threshold in (0, 0.0098, 1)]
        assert counts == [4, 3, 1]

    def test_variance_is_over_all_images_not_within_slices(self):
        """Constant in the first 8,192 images and in the rest, with a variance of 0.04 over both."""
        means = torch.zeros(16_384, 2)
        means[8192:, 0] = 0.4
        assert active_units(Given(), means).item() == 1


@pytest.fixture
def model():
    return Mlp(latent_dim=5, hidden=[16]).build(torch.full(SHAPE, 0.4), levels=2)


def cells(grid, count, shape=SHAPE):
    """The pictures of a grid with eight to a row, in reading order, and what is around them."""
    _, height, width = shape
    around = torch.ones_like(grid, dtype=torch.bool)
    found = []
    for index in range(count):
        top, left = (height + 1) * (index // 8) + 1, (width + 1) * (index % 8) + 1
        place = (..., slice(top, top + height), slice(left, left + width))
        found.append(grid[place])
        around[place] = False
    return torch.stack(found), grid[around]


class TestSampleGrid:
    @pytest.mark.parametrize("count, rows", [(64, 8), (16, 2), (11, 2)])
    def test_cells_are_mean_images_of_prior_draws(self, count, rows, model):
        grid = sample_grid(model, SHAPE, torch.Generator().manual_seed(3), count)
        assert grid.shape == (3, rows * 3 + 1, 8 * 5 + 1)
        z = torch.randn(count, 5, generator=torch.Generator().manual_seed(3))
        expected = model.decoder(z).sigmoid().detach().reshape(-1, *SHAPE)
        found, around = cells(grid, count)
        torch.testing.assert_close(found, expected)
        assert (around == 0.5).all()
        assert 0 <= grid.min() and grid.max() <= 1

    def test_sixty_four_by_default(self, model):
        assert sample_grid(model, SHAPE, torch.Generator()).shape == (3, 25, 41)

    def test_draws_come_from_the_generator_only(self, model):
        state = torch.get_rng_state()
        first, same, other = (
            sample_grid(model, SHAPE, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
        assert first.equal(same) and not first.equal(other)
        assert torch.get_rng_state().equal(state)

    def test_grey_images_are_shown_in_equal_channels(self):
        model = Mlp(latent_dim=2, hidden=[4]).build(torch.full((1, 8, 8), 0.4), levels=2)
        grid = sample_grid(model, (1, 8, 8), torch.Generator())
        assert grid.shape == (3, 73, 73)
        assert grid[0].equal(grid[1]) and grid[0].equal(grid[2])


class TestReconstructionGrid:
    @pytest.mark.parametrize("count, rows", [(32, 8), (5, 2)])
    def test_each_image_is_left_of_its_reconstruction(self, count, rows, model):
        images = torch.randint(2, (count, PIXELS)).float()
        grid = reconstruction_grid(model, images, SHAPE)
        assert grid.shape == (3, rows * 3 + 1, 8 * 5 + 1)
        found, _ = cells(grid, 2 * count)
        assert found[0::2].equal(images.reshape(-1, *SHAPE))
        with torch.no_grad():
            expected = model.decoder(model.encode(images).mean).sigmoid()
        torch.testing.assert_close(found[1::2], expected.reshape(-1, *SHAPE))
        assert len(found[1::2].flatten(1).unique(dim=0)) == count
        assert 0 <= grid.min() and grid.max() <= 1

    def test_values_outside_the_range_are_clipped(self):
        """A mean image may lie outside [0, 1] a little; its picture must not wrap around."""
        likelihood = types.SimpleNamespace(mean=lambda parameters: parameters)
        decoder = nn.Linear(PIXELS, PIXELS)
        nn.init.zeros_(decoder.weight)
        with torch.no_grad():
            decoder.bias.copy_(torch.linspace(-0.5, 1.5, PIXELS))
        model = VAE(Given().encode, decoder, likelihood, PIXELS)
        found, _ = cells(reconstruction_grid(model, torch.zeros(4, PIXELS), SHAPE), 8)
        expected = torch.linspace(-0.5, 1.5, PIXELS).clamp(0, 1).reshape(SHAPE)
        torch.testing.assert_close(found[1::2], expected.expand(4, *SHAPE))

    def test_of_double_precision(self, double):
        model = VAE(Given().encode, nn.Linear(PIXELS, PIXELS), Bernoulli(), PIXELS)
        grid = reconstruction_grid(model, torch.zeros(4, PIXELS), SHAPE)
        assert grid.dtype == torch.float32 and not grid.requires_grad
