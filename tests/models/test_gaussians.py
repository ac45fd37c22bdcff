import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from ucvae.models.gaussians import FullGaussian, Gaussian, standard_normal_log_prob

pytestmark = pytest.mark.usefixtures("double")


def diagonal():
    return Gaussian(torch.randn(4, 3), torch.rand(4, 3) + 0.1)


def full():
    below = torch.randn(4, 3, 3).tril(-1)
    return FullGaussian(torch.randn(4, 3), below + torch.diag_embed(torch.rand(4, 3) + 0.1))


def of_torch(gaussian):
    if isinstance(gaussian, Gaussian):
        return MultivariateNormal(gaussian.mean, torch.diag_embed(gaussian.std**2))
    return MultivariateNormal(gaussian.mean, scale_tril=gaussian.scale)


@pytest.mark.parametrize("make", [diagonal, full])
class TestBoth:
    def test_density_is_torch_s(self, make):
        gaussian, z = make(), torch.randn(6, 4, 3)
        expected = of_torch(gaussian).log_prob(z).T
        torch.testing.assert_close(gaussian.log_prob(z.transpose(0, 1)), expected)
        rows = torch.tensor([2, 0, 2])
        some = z.transpose(0, 1)[rows]
        torch.testing.assert_close(gaussian.rows(rows).log_prob(some), expected[rows])

    def test_noise_is_pushed_forward(self, make):
        # The density of z = g(xi) is that of xi over the map's determinant.
        gaussian, noise = make(), torch.randn(4, 6, 3)
        torch.testing.assert_close(
            gaussian.log_prob(gaussian.transform(noise)),
            standard_normal_log_prob(noise) - gaussian.log_det()[:, None],
        )

    def test_detached_is_constant(self, make):
        gaussian = type(make())(*(part.requires_grad_() for part in make()))
        assert gaussian.transform(torch.randn(4, 2, 3)).requires_grad
        assert not gaussian.detach().transform(torch.randn(4, 2, 3)).requires_grad


def test_standard_normal_is_torch_s():
    z = torch.randn(5, 2, 3)
    torch.testing.assert_close(standard_normal_log_prob(z), Normal(0.0, 1.0).log_prob(z).sum(-1))


def test_a_diagonal_one_is_a_full_one():
    gaussian, z = diagonal(), torch.randn(4, 6, 3)
    torch.testing.assert_close(FullGaussian.of(gaussian).log_prob(z), gaussian.log_prob(z))
