"""The exact references, each checked by a computation that shares nothing with it.

An error in a reference would make every test that leans on it wrong in the same way, so each value
here comes by two roads, and the checks of convergence have coarse rules beside them that fail.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from references import (
    REFERENCES,
    CellChains,
    DeepDecoder,
    Discrete,
    LinearGaussian,
    compositions,
    flat,
    gradients,
    has_frequencies,
    is_unbiased,
)

from ucvae.models.gaussians import standard_normal_log_prob

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture(params=REFERENCES)
def reference(request):
    return REFERENCES[request.param]()


class TestEach:
    def test_is_what_a_reference_must_be(self, reference):
        assert REFERENCES[reference.name]().name == reference.name
        assert all(p.dtype == torch.float64 for p in reference.model.parameters())
        assert reference.images.dtype == torch.float64 and len(reference.images) == 3
        assert reference.log_likelihood(reference.images).shape == (3,)
        size = len(flat(reference.model.decoder.parameters()))
        for image in reference.images:
            assert reference.gradient(image).shape == (size,)

    def test_is_the_same_each_time(self, reference):
        torch.manual_seed(1)
        other = REFERENCES[reference.name]()
        assert other.images.equal(reference.images)
        for one, two in zip(other.model.parameters(), reference.model.parameters(), strict=True):
            assert one.equal(two)

    def test_by_importance_sampling(self, reference):
        """``E_q[w / p(x)] = 1``, and ``E_q[w / p(x) grad log p(x, z)]`` is the gradient.

        50 batches of 2,000 for each image; the rule of :mod:`references`. Controls: a likelihood
        that is wrong by a tenth of a nat, and the gradient without the weights, the ELBO's.
        """
        for image in reference.images:
            truth = reference.gradient(image)
            value = reference.log_likelihood(image[None]).detach()
            log_weight = reference.log_weight(image)
            weights, weighted, plain = [], [], []
            for _ in range(50):
                noise = torch.randn(1, 2000, reference.model.latent_dim)
                with torch.no_grad():
                    weight = (log_weight(noise, torch.zeros(1, dtype=torch.long)) - value).exp()
                z = reference.transform(image, noise)
                log_likelihood = reference.model.log_likelihood(image[None], z)
                decoder = reference.model.decoder
                weights.append(weight.mean()[None])
                weighted.append(gradients((weight * log_likelihood).mean(), decoder))
                plain.append(gradients(log_likelihood.mean(), decoder))
            weights, weighted, plain = map(torch.stack, (weights, weighted, plain))
            one = torch.ones(1)
            assert is_unbiased(weights, one) and not is_unbiased(weights * math.exp(0.1), one)
            assert is_unbiased(weighted, truth) and not is_unbiased(plain, truth)


def test_joint_gradients_are_autograd_s():
    for reference in (LinearGaussian(), Discrete()):
        model, image = reference.model, reference.images[0]
        z = torch.randn(5, model.latent_dim)
        log_joint = model.log_joint(image[None], z[None])[0]
        expected = torch.stack([gradients(value, model.decoder) for value in log_joint])
        torch.testing.assert_close(reference.joint_gradient(image, z), expected)


@pytest.mark.parametrize("name", [name for name in REFERENCES if name.startswith("ppca")])
def test_linear_gaussian_weights_are_bounded(name):
    """``log p(z|x) - log q(z|x)`` is a quadratic form that goes down in every direction."""
    toy = REFERENCES[name]()
    precision = toy.posterior(toy.images[:1]).precision_matrix[0]
    proposal = torch.diag(toy.model.encode(toy.images[:1]).std[0].detach() ** -2)
    assert torch.linalg.eigvalsh(precision - proposal).min() > 0


class TestDeepDecoder:
    """Quadrature that has converged: 1e-9 relative, where estimates have standard errors of 1e-3.

    The trapezoid rule's error goes as ``exp(-c points)``: half the points give 5e-8, so all of them
    its square, 2e-15. Beyond 8 standard deviations the prior holds ``exp(-8^2 / 2) = 1e-14``.
    """

    toy = DeepDecoder()

    def difference(self, **settings):
        """The largest relative difference of values and gradients under another rule."""
        other = DeepDecoder(**settings)
        return max(
            ((new - old).norm() / old.norm()).item()
            for image in self.toy.images
            for new, old in (
                (other.log_likelihood(image[None]), self.toy.log_likelihood(image[None])),
                (other.gradient(image), self.toy.gradient(image)),
            )
        )

    @pytest.mark.parametrize(
        "settings",
        [dict(points=512), dict(points=384, half_width=12.0), dict(points=640, half_width=10.0)],
    )
    def test_has_converged_in_points_and_box(self, settings):
        assert self.difference(**settings) < 1e-9

    @pytest.mark.parametrize(
        "settings", [dict(points=64), dict(points=96), dict(half_width=4.0), dict(half_width=6.0)]
    )
    def test_a_coarse_grid_or_a_narrow_box_would_show(self, settings):
        assert self.difference(**settings) > 1e-9

    @pytest.mark.parametrize("points, converged", [(320, True), (60, False)])
    def test_by_gauss_and_legendre_with_derivatives_written_out(self, points, converged):
        w1, b1, w2, b2 = (p.detach().numpy() for p in self.toy.model.decoder.parameters())
        nodes, areas = np.polynomial.legendre.leggauss(points)
        z = 9 * np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
        areas = 81 * np.outer(areas, areas).ravel()
        prior = np.exp(-(z**2).sum(1) / 2) / (2 * np.pi)
        hidden = np.tanh(z @ w1.T + b1)
        ones = 1 / (1 + np.exp(-(hidden @ w2.T + b2)))
        for image in self.toy.images:
            x = image.numpy()
            joint = areas * prior * np.prod(np.where(x == 1, ones, 1 - ones), -1)
            pull = (x - ones) * (joint / joint.sum())[:, None]
            back = (pull @ w2) * (1 - hidden**2)
            gradient = [back.T @ z, back.sum(0), pull.T @ hidden, pull.sum(0)]
            gradient = np.concatenate([part.ravel() for part in gradient])
            value = self.toy.log_likelihood(image[None]).item()
            assert (abs(np.log(joint.sum()) - value) < 1e-9) == converged
            found = self.toy.gradient(image).numpy()
            assert (np.linalg.norm(found - gradient) < 1e-9 * np.linalg.norm(found)) == converged

    @torch.no_grad()
    def test_posteriors_have_two_modes_and_weights_are_bounded(self):
        toy = self.toy
        log_joint = toy.log_joint_on_grid(toy.images)
        surface = log_joint.view(3, 256, 256)
        middle = surface[:, 1:-1, 1:-1]
        peak = torch.ones_like(middle, dtype=torch.bool)
        for i, j in itertools.product((0, 1, 2), repeat=2):
            if (i, j) != (1, 1):
                peak &= middle > surface[:, i : i + 254, j : j + 254]
        heights = [middle[image][peak[image]] for image in range(2)]
        assert [len(both) for both in heights] == [2, 2]
        assert all(both.max() - both.min() < 1 for both in heights)

        proposal = toy.model.encode(toy.images)
        assert (proposal.std > 1).all()
        log_weight = log_joint - proposal.log_prob(toy.grid.expand(3, -1, -1))
        largest = (log_weight.max(1).values - toy.log_likelihood(toy.images)).exp()
        assert (largest < 10).all()


class TestDiscrete:
    toy = Discrete()

    def test_cells_are_equally_likely_under_the_proposal(self):
        for image in self.toy.images:
            z = self.toy.transform(image, torch.randn(100_000, 3))
            counts = torch.bincount(self.toy.model.decoder.cells(z), minlength=8)
            assert has_frequencies(counts.double(), torch.full((8,), 1 / 8))

    def test_a_sample_s_weight_is_its_cell_s(self):
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3))).flip(1)
        noise = (torch.randn(5, 8, 3).abs() + 1e-3) * signs
        for image in self.toy.images:
            log_weights = self.toy.log_weight(image)(noise, torch.zeros(5, dtype=torch.long))
            expected = self.toy.weights(image).log().expand(5, -1)
            torch.testing.assert_close(log_weights.detach(), expected)
            assert self.toy.indicator(noise).equal(torch.eye(8).expand(5, 8, 8))

    def test_likelihood_and_gradient_by_hand(self):
        table = self.toy.model.decoder.table.tolist()
        for image in self.toy.images:
            weights, bits = [], image.tolist()
            for row in table:
                weights.append(1.0)
                for bit, logit in zip(bits, row, strict=True):
                    weights[-1] *= 1 / (1 + math.exp(-logit if bit else logit))
            value = self.toy.log_likelihood(image[None]).item()
            assert value == pytest.approx(math.log(sum(weights) / 8), abs=1e-12)
            gradient = [
                weight / sum(weights) * (bit - 1 / (1 + math.exp(-logit)))
                for weight, row in zip(weights, table, strict=True)
                for bit, logit in zip(bits, row, strict=True)
            ]
            torch.testing.assert_close(self.toy.gradient(image), torch.tensor(gradient))
            posterior = self.toy.chains(image, 2).posterior
            torch.testing.assert_close(
                self.toy.gradient_of(image, posterior), self.toy.gradient(image)
            )

    def test_decoder_has_no_gradient_with_respect_to_z(self):
        # The prior and the proposal have; the hook of the doubly reparameterised gradient needs it.
        z = torch.randn(3, 2, 3, requires_grad=True)
        with self.toy.model.frozen_decoder():
            value = self.toy.model.log_joint(self.toy.images, z).sum()
        (gradient,) = torch.autograd.grad(value, z)
        (prior,) = torch.autograd.grad(standard_normal_log_prob(z).sum(), z)
        assert gradient.equal(prior)


WEIGHTS = torch.tensor([0.05, 1.3, 0.4], dtype=torch.float64)


def maximal_coupling(first, second):
    """``Pr(i, j)`` of two categoricals, Alg 5 literally: nested lists over their K indices."""
    overlap = [min(pair) for pair in zip(first, second, strict=True)]
    rest = 1 - sum(overlap)
    law = [[0.0] * len(first) for _ in first]
    for i, j in itertools.product(range(len(first)), repeat=2):
        if i == j:
            law[i][j] += overlap[i]
        elif rest > 1e-15:
            law[i][j] += (first[i] - overlap[i]) * (second[j] - overlap[j]) / rest
    return law


class TestCellChains:
    """Enumeration by counts against enumeration of every sequence of samples, one by one."""

    @pytest.mark.parametrize("num_samples", [2, 3, 4])
    def test_by_sequences(self, num_samples):
        chains = CellChains(WEIGHTS, num_samples)
        weights, cells = WEIGHTS.tolist(), range(3)
        iwae, transition = torch.zeros(3), torch.zeros(3, 3)
        unmet, met = torch.zeros(3, 3, 3, 3), torch.zeros(3, 3, 3)
        for sequence in itertools.product(cells, repeat=num_samples):
            total = sum(weights[c] for c in sequence)
            for c in sequence:
                iwae[c] += weights[c] / total / 3**num_samples
        for fresh in itertools.product(cells, repeat=num_samples - 1):
            probability = 3 ** -(num_samples - 1)
            normalized = {}
            for s in cells:
                total = weights[s] + sum(weights[c] for c in fresh)
                normalized[s] = [weights[c] / total for c in (s, *fresh)]
                for c, weight in zip((s, *fresh), normalized[s], strict=True):
                    transition[s, c] += probability * weight
            for s, r in itertools.product(cells, repeat=2):
                law = maximal_coupling(normalized[s], normalized[r])
                for i, j in itertools.product(range(num_samples), repeat=2):
                    c, d = (s, *fresh)[i], (r, *fresh)[j]
                    if i == j and i > 0:
                        met[s, r, c] += probability * law[i][j]
                    else:
                        unmet[s, r, c, d] += probability * law[i][j]
        torch.testing.assert_close(chains.iwae, iwae)
        torch.testing.assert_close(chains.transition, transition)
        torch.testing.assert_close(chains.met, met)
        torch.testing.assert_close(chains.unmet, unmet)

    def test_compositions(self):
        for total, cells in ((1, 3), (4, 2), (10, 8)):
            counts, probability = compositions(total, cells)
            assert len(counts.unique(dim=0)) == len(counts) == math.comb(total + cells - 1, total)
            assert (counts.sum(1) == total).all()
            torch.testing.assert_close(probability.sum(), torch.tensor(1.0))
            # A cell's count is binomial: its mean, and its variance.
            mean, variance = total / cells, total / cells * (1 - 1 / cells)
            torch.testing.assert_close(probability @ counts, torch.full((cells,), mean))
            torch.testing.assert_close(
                probability @ (counts - mean) ** 2, torch.full((cells,), variance)
            )

    @pytest.mark.parametrize("num_samples", [2, 4, 10])
    def test_isir_leaves_the_posterior_invariant(self, num_samples):
        for image in Discrete().images:
            chains = Discrete().chains(image, num_samples)
            posterior, transition = chains.posterior, chains.transition
            assert (posterior @ transition - posterior).abs().max() < 1e-15
            flow = posterior[:, None] * transition
            assert (flow - flow.T).abs().max() < 1e-15  # it is reversible
            # Control: a step whose K samples were all fresh would lead to this law.
            assert (chains.iwae - posterior).abs().max() > 0.01

    def test_a_coupled_step_moves_each_chain_as_a_step_does(self):
        for image in Discrete().images:
            chains = Discrete().chains(image, 3)
            first = chains.unmet.sum(3) + chains.met
            second = chains.unmet.sum(2) + chains.met
            transition = chains.transition
            torch.testing.assert_close(first, transition[:, None].expand(8, 8, 8))
            torch.testing.assert_close(second, transition[None].expand(8, 8, 8))

    @pytest.mark.parametrize("lag, burn_in", [(1, 0), (1, 1), (3, 0), (3, 2), (2, 5)])
    @pytest.mark.parametrize("num_samples", [2, 4])
    def test_the_estimator_is_unbiased_by_linear_algebra(self, num_samples, lag, burn_in):
        """Its expectation is the posterior to rounding, and not without its correction or capped.

        The chains of this image are still apart after 400 steps with a probability below 1e-15.
        """
        chains = Discrete().chains(Discrete().images[1], num_samples)

        def bias(masses):
            return (masses - chains.posterior).abs().max()

        assert 1 - chains.meeting_time(lag, 400).sum() < 1e-14
        assert bias(chains.estimate(lag, burn_in, 400)) < 1e-14
        assert bias(chains.estimate(lag, burn_in, burn_in + lag)) > 1e-4
        assert bias(chains.main(lag, burn_in)) > 1e-4
        assert bias(chains.iwae) > 1e-2
