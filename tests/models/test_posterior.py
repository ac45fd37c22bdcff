"""The posterior in the coordinates of a proposal: the same z, densities and gradients."""

import pytest
import torch

from ucvae.models.gaussians import DefensiveMixture, FullGaussian, Gaussian
from ucvae.models.mlp import Mlp
from ucvae.models.posterior import Posterior

pytestmark = pytest.mark.usefixtures("double")

COUNT, DIM, CHAINS = 40, 3, 2
# Nine are made up to a round number, behind the others.
ROWS = {"some": torch.tensor([0, 3, 7, 8, 12, 19, 30, 31, 39]), "all": torch.arange(COUNT)}


def proposals():
    mean, std = torch.randn(COUNT, DIM), 0.3 + torch.rand(COUNT, DIM)
    scale = torch.randn(COUNT, DIM, DIM).tril(-1) / 3 + torch.diag_embed(std)
    narrow, full = Gaussian(mean, std), FullGaussian(mean + 0.5, scale)
    return {"diagonal": narrow, "full": full, "mixture": DefensiveMixture(full, narrow, 0.4)}


@pytest.fixture(params=["diagonal", "full", "mixture"])
def case(request):
    model = Mlp(latent_dim=DIM, hidden=[8]).build(torch.rand(16), levels=2)
    images = (torch.rand(COUNT, 16) < 0.5).double()
    return model, images, proposals()[request.param]


@pytest.mark.parametrize("rows", ROWS)
def test_states_and_coordinates_are_of_the_same_z(case, rows):
    model, images, proposal = case
    index = ROWS[rows]
    images, some = images[index], proposal.rows(index)
    noise = torch.randn(len(index), CHAINS, proposal.noise_dim)
    posterior = Posterior(*case).rows(index)
    assert len(posterior.images) > len(index) or rows == "all"
    coordinates = posterior.coordinates(noise)
    assert coordinates.shape == (len(index), CHAINS, DIM)
    z = some.transform(noise)
    gaussian = some.main if isinstance(some, DefensiveMixture) else some
    torch.testing.assert_close(gaussian.transform(coordinates), z)
    value = posterior.log_density(coordinates)
    torch.testing.assert_close(value, model.log_joint(images, z))
    back, log_weight = posterior.states(coordinates, value)
    torch.testing.assert_close(some.transform(back), z)
    torch.testing.assert_close(log_weight, model.log_weight(images, some, noise))
    torch.testing.assert_close(log_weight, model.log_weight(images, some, back))
    if isinstance(some, DefensiveMixture):  # some came from the wide one, and none does now
        assert 0 < some.of_main(noise).double().mean() < 1 and some.of_main(back).all()


@pytest.mark.parametrize("rows", ROWS)
def test_gradients_are_those_of_the_coordinates(case, rows):
    posterior = Posterior(*case).rows(ROWS[rows])
    point = torch.randn(len(ROWS[rows]), CHAINS, DIM)
    value, gradient = posterior.with_gradient(point)
    assert not gradient.requires_grad
    torch.testing.assert_close(value, posterior.log_density(point))
    for d in range(DIM):
        step = 1e-6 * torch.nn.functional.one_hot(torch.tensor(d), DIM)
        above, below = (posterior.log_density(point + s) for s in (step, -step))
        torch.testing.assert_close(gradient[..., d], (above - below) / 2e-6, rtol=1e-5, atol=1e-5)
