import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ucvae.models.gaussians import (
    DefensiveMixture,
    FullGaussian,
    Gaussian,
    standard_normal_log_prob,
    transform_runs,
)

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


def mixture(share=0.3):
    return DefensiveMixture(full(), diagonal(), share)


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
            gaussian.noise_log_prob(noise, gaussian.transform(noise)),
        )

    def test_noise_is_found_again(self, make):
        gaussian, noise = make(), torch.randn(4, 6, 3)
        torch.testing.assert_close(gaussian.to_noise(gaussian.transform(noise)), noise)

    def test_divergence_from_the_prior_is_torch_s(self, make):
        gaussian = make()
        prior = MultivariateNormal(torch.zeros(3), torch.eye(3))
        expected = kl_divergence(of_torch(gaussian), prior)
        torch.testing.assert_close(gaussian.kl_from_prior(), expected)

    def test_detached_is_constant(self, make):
        gaussian = type(make())(*(part.requires_grad_() for part in make()))
        assert gaussian.transform(torch.randn(4, 2, 3)).requires_grad
        assert not gaussian.detach().transform(torch.randn(4, 2, 3)).requires_grad


# Images of groups: runs of any length, one that needs several look-ups, out of order, none at all.
RUNS = [[0, 0, 2, 2, 2, 3], [1] * 20 + [3], [3, 0, 0, 3, 1], []]


@pytest.mark.parametrize("image_index", RUNS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("make", [diagonal, full, mixture])
def test_runs_are_transformed_like_single_groups(make, count, image_index):
    proposal, index = make(), torch.tensor(image_index, dtype=torch.long)
    noise = torch.randn(len(index), count, proposal.noise_dim)
    torch.testing.assert_close(
        transform_runs(proposal, index, noise), proposal.rows(index).transform(noise)
    )


def test_a_run_looks_its_matrix_up_once_for_eight_groups(monkeypatch):
    looked_up, rows = [], FullGaussian.rows

    def spy(self, index):
        looked_up.extend(index.tolist())
        return rows(self, index)

    monkeypatch.setattr(FullGaussian, "rows", spy)
    index = torch.tensor([1] * 8 + [2] * 9 + [0])
    transform_runs(full(), index, torch.randn(18, 1, 3))
    assert looked_up == [1, 2, 2, 0]


def test_standard_normal_is_torch_s():
    z = torch.randn(5, 2, 3)
    torch.testing.assert_close(standard_normal_log_prob(z), Normal(0.0, 1.0).log_prob(z).sum(-1))


def test_a_diagonal_one_is_a_full_one():
    gaussian, z = diagonal(), torch.randn(4, 6, 3)
    same = FullGaussian.of(gaussian)
    torch.testing.assert_close(same.log_prob(z), gaussian.log_prob(z))
    assert FullGaussian.of(same) is same


def test_widening_costs_so_many_nats():
    # D (log(1 + a) + 1 / (2 (1 + a)^2) - 1/2) = D a^2 (1 - 5 a / 3 + ...), with a^2 = nats / D.
    gaussian, nats = full(), 1e-4
    divergence = kl_divergence(of_torch(gaussian), of_torch(gaussian.widened(nats)))
    torch.testing.assert_close(divergence, torch.full_like(divergence, nats), rtol=0.02, atol=0)
    for part, same in zip(gaussian, gaussian.widened(0.0), strict=True):
        assert torch.equal(part, same)


class TestDefensiveMixture:
    def test_density_is_torch_s(self):
        q, z = mixture(), torch.randn(4, 6, 3)
        parts = (of_torch(part).log_prob(z.transpose(0, 1)).T for part in (q.main, q.wide))
        main, wide = parts
        expected = (0.7 * main.exp() + 0.3 * wide.exp()).log()
        torch.testing.assert_close(q.log_prob(z), expected)
        noise = torch.randn(4, 6, q.noise_dim)
        torch.testing.assert_close(
            q.noise_log_prob(noise, q.transform(noise)), q.log_prob(q.transform(noise))
        )
        rows = torch.tensor([3, 0])
        torch.testing.assert_close(q.rows(rows).log_prob(z[rows]), expected[rows])

    def test_draws_have_its_law(self):
        # E exp(-|z|^2 / 2) = |I + V|^(-1/2) exp(-mean^T (I + V)^-1 mean / 2) under N(mean, V). The
        # integrand is within [0, 1]: 200,000 draws have a standard error of at most 0.0012.
        torch.manual_seed(0)
        q = mixture()
        z = q.transform(torch.randn(4, 200_000, 4))
        found = (-z.square().sum(-1) / 2).exp().mean(1)

        def component(gaussian):
            spread = torch.eye(3) + of_torch(gaussian).covariance_matrix
            pull = gaussian.mean[:, None] @ torch.linalg.inv(spread) @ gaussian.mean[:, :, None]
            return torch.det(spread).rsqrt() * (-pull.flatten() / 2).exp()

        def exact(share):
            return (1 - share) * component(q.main) + share * component(q.wide)

        torch.testing.assert_close(found, exact(0.3), rtol=0, atol=0.005)
        assert (found - exact(0.5)).abs().max() > 0.01

    def test_without_a_share_is_the_main_component(self):
        q, noise = mixture(0.0), torch.randn(4, 6, 4)
        assert torch.equal(q.transform(noise), q.main.transform(noise[..., :3]))
        z = torch.randn(4, 6, 3)
        assert torch.equal(q.log_prob(z), q.main.log_prob(z))

    def test_bounds_the_weights_of_what_the_main_component_misses(self):
        q, z = mixture(0.1), 3 * torch.randn(4, 1000, 3)
        assert (q.wide.log_prob(z) - q.log_prob(z)).exp().max() <= 1 / 0.1 + 1e-9
        assert (q.wide.log_prob(z) - q.main.log_prob(z)).exp().max() > 100
