"""Models whose log-likelihood and gradient are known exactly, and tests that decide "unbiased".

The models of :data:`REFERENCES` have three roads to exactness: closed form, quadrature, and
enumeration, which gives the expectations of biased estimators and the law of the meeting time too.

The rule of the tests: an estimate repeated many times gives batch means, whose distance from the
truth in standard errors is a t statistic of B - 1 degrees of freedom. The worst of the m components
is compared with the quantile that a correct estimator exceeds with probability ``FALSE_ALARM`` in
all (Bonferroni). Means of batches, not medians nor trimmed means: a signed estimator has heavy
tails, and its mean is what is claimed. A test of this kind is worth something only with a control
beside it, a wrong estimator that the same function rejects.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from ucvae.chains import SignedParticles
from ucvae.models.likelihoods import Bernoulli, GaussianLikelihood
from ucvae.models.mlp import FullGaussianEncoder
from ucvae.models.ppca import AffineEncoder
from ucvae.models.vae import VAE

FALSE_ALARM = 1e-6


def is_unbiased(estimates: Tensor, truth: Tensor, batches: int = 50) -> bool:
    """Whether the mean of independent ``estimates [R, m]`` agrees with ``truth [m]``."""
    parts = estimates.tensor_split(min(batches, len(estimates)))
    means = torch.stack([part.mean(0) for part in parts])
    error = means.mean(0) - truth
    standard_error = means.std(0) / len(means) ** 0.5
    # A component that never varies must be exact, to rounding.
    floor = 1e-9 * (1 + truth.abs())
    worst = (error.abs() / (standard_error + floor)).max()
    limit = stats.t.isf(FALSE_ALARM / (2 * estimates.shape[1]), len(means) - 1)
    return bool(worst < limit)


def has_frequencies(counts: Tensor, probabilities: Tensor) -> bool:
    """Pearson's chi-square test of counts against exact probabilities, at ``FALSE_ALARM``."""
    possible = probabilities > 0
    if counts[~possible].any():
        return False
    expected = counts.sum() * probabilities[possible]
    assert expected.min() > 5, "too few draws for the test's distribution to hold"
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    return bool(statistic < stats.chi2.isf(FALSE_ALARM, int(possible.sum()) - 1))


def integrate(particles: SignedParticles, num_images: int, values: Tensor) -> Tensor:
    """``sum_i c_i values_i`` of each image, ``[n, m]``; values ``[G, K, m]`` at the particles."""
    terms = (particles.coefficient[:, :, None] * values).sum(1)
    total = torch.zeros(num_images, values.shape[-1], dtype=values.dtype)
    return total.index_add(0, particles.image_index, terms)


class Reference:
    """A model, images, and what is exactly true of them.

    Attributes:
        name: for tables.
        model: a float64 :class:`VAE` with a fixed encoder.
        images: ``[m, P]``.
    """

    name: str
    model: VAE
    images: Tensor

    def log_likelihood(self, images: Tensor) -> Tensor:
        """``log p(x)`` of images ``[n, P]``; ``[n]``, nats, differentiable in the decoder."""
        raise NotImplementedError

    def gradient(self, image: Tensor) -> Tensor:
        """The exact gradient of ``log p(x)`` of one image in the decoder's parameters, flat."""
        value = self.log_likelihood(image[None]).sum()
        return flat(torch.autograd.grad(value, list(self.model.decoder.parameters())))

    def log_weight(self, image: Tensor):
        """The log weights of one image for the chains, whatever the number of its replicates."""
        proposal = self.model.encode(image[None]).detach()

        def of_noise(noise: Tensor, image_index: Tensor) -> Tensor:
            rows = proposal.rows(torch.zeros_like(image_index))
            return self.model.log_weight(image.expand(len(noise), -1), rows, noise)

        return of_noise

    @torch.no_grad()
    def transform(self, image: Tensor, noise: Tensor) -> Tensor:
        """``z`` of noise ``[..., D]`` for one image."""
        proposal = self.model.encode(image[None])
        return proposal.mean[0] + proposal.std[0] * noise

    @torch.no_grad()
    def to_noise(self, image: Tensor, z: Tensor) -> Tensor:
        """The inverse of :meth:`transform`."""
        proposal = self.model.encode(image[None])
        return (z - proposal.mean[0]) / proposal.std[0]


class LinearGaussian(Reference):
    """``z ~ N(0, I_D)``, ``x|z ~ N(theta_0 + Theta_1 z, s^2 I_P)``, as a VAE and in closed form.

    The encoder is the posterior made worse on purpose: its mean is moved by ``shift`` posterior
    standard deviations and its standard deviations are ``spread`` times the posterior's. A spread
    above 1 bounds the weights, so estimates have moments enough for a t statistic. (In more
    dimensions, where the posterior's coordinates depend on each other, it takes a larger spread.)
    """

    def __init__(
        self,
        name: str = "ppca",
        dim: int = 2,
        pixels: int = 4,
        scale: float = 0.8,
        shift: float = 0.8,
        spread: float = 1.3,
    ) -> None:
        randn = _normals(7)
        self.name = name
        self.scale = scale
        decoder = nn.Linear(dim, pixels, dtype=torch.float64)
        encoder = AffineEncoder(pixels, dim).double()
        with torch.no_grad():
            decoder.weight.copy_(randn(pixels, dim) * 0.7)
            decoder.bias.copy_(randn(pixels) * 0.3)
            covariance = self._posterior_covariance(decoder.weight)
            gain = covariance @ decoder.weight.T / scale**2
            std = covariance.diagonal().sqrt()
            encoder.mean.weight.copy_(gain)
            encoder.mean.bias.copy_(-gain @ decoder.bias + shift * std)
            encoder.log_std.copy_((spread * std).log())
        self.model = VAE(encoder, decoder, GaussianLikelihood(scale**2), dim)
        self.images = randn(3, pixels)

    def _posterior_covariance(self, weight: Tensor) -> Tensor:
        precision = torch.eye(weight.shape[1]).to(weight) + weight.T @ weight / self.scale**2
        return torch.linalg.inv(precision)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> MultivariateNormal:
        """``p(z|x)`` of images ``[n, P]``."""
        weight, bias = self.model.decoder.weight, self.model.decoder.bias
        covariance = self._posterior_covariance(weight)
        return MultivariateNormal((images - bias) @ weight @ covariance / self.scale**2, covariance)

    def log_likelihood(self, images: Tensor) -> Tensor:
        """The marginal of x is ``N(theta_0, Theta_1 Theta_1^T + s^2 I)``."""
        weight, bias = self.model.decoder.weight, self.model.decoder.bias
        covariance = weight @ weight.T + self.scale**2 * torch.eye(len(bias)).to(weight)
        return MultivariateNormal(bias, covariance).log_prob(images)

    @torch.no_grad()
    def joint_gradient(self, image: Tensor, z: Tensor) -> Tensor:
        """``grad log p(x, z)`` in (weight, bias), written out: ``[..., P * D + P]``."""
        pull = (image - self.model.decoder(z)) / self.scale**2
        return torch.cat([(pull[..., :, None] * z[..., None, :]).flatten(-2), pull], dim=-1)


class Correlated(LinearGaussian):
    """The same with an encoder of full covariance, ``spread^2`` times the posterior's."""

    def __init__(self, spread: float = 1.3) -> None:
        super().__init__("correlated", spread=spread)
        diagonal, dim, pixels = self.model.encoder, self.model.latent_dim, self.images.shape[1]
        covariance = self._posterior_covariance(self.model.decoder.weight)
        scale = spread * torch.linalg.cholesky(covariance.detach())
        encoder = FullGaussianEncoder(nn.Identity(), pixels, dim).double()
        encoder.mean = diagonal.mean
        with torch.no_grad():
            encoder.std.weight.zero_()
            encoder.std.bias.copy_((scale.diagonal() - encoder.min_std).expm1().log())
            unit = scale / scale.diagonal()[:, None]
            encoder.below.bias.copy_(unit.flatten()[encoder.places])
        self.model.encoder = encoder
        self.scale_tril = scale


class DeepDecoder(Reference):
    """A two-dimensional latent, a tanh network and six bits; integrals by the trapezoid rule.

    The integrand ``p(x, z)`` is analytic and falls like a Gaussian, so the rule converges
    geometrically in the number of points. Posteriors are bent, and those of the first two images
    have two modes of like height. The encoder's standard deviations are above the prior's, and
    ``p(x|z) <= 1``, so the weights are bounded: below 10 times their mean.

    Args:
        points: of the grid, in each dimension.
        half_width: of the box, about the origin.
    """

    name = "deep"

    def __init__(self, points: int = 256, half_width: float = 8.0) -> None:
        randn = _normals(0)
        hidden = nn.Linear(2, 8, dtype=torch.float64)
        output = nn.Linear(8, 6, dtype=torch.float64)
        encoder = AffineEncoder(6, 2).double()
        with torch.no_grad():
            hidden.weight.copy_(randn(8, 2) * 1.5)
            hidden.bias.copy_(randn(8) * 0.5)
            output.weight.copy_(randn(6, 8) * 1.5)
            output.bias.copy_(randn(6) * 0.3)
            encoder.mean.weight.copy_(randn(2, 6) * 0.2)
            encoder.mean.bias.zero_()
            encoder.log_std.fill_(math.log(1.25))
        self.model = VAE(encoder, nn.Sequential(hidden, nn.Tanh(), output), Bernoulli(), 2)
        self.images = torch.zeros(3, 6, dtype=torch.float64)
        self.images[0, 1:5] = 1
        self.images[1, 2] = 1
        axis = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
        self.grid = torch.cartesian_prod(axis, axis)
        self.log_cell = 2 * math.log(2 * half_width / (points - 1))

    def log_likelihood(self, images: Tensor) -> Tensor:
        """``log int p(x, z) dz``; the integrand is far below rounding at the ends of the box."""
        return self.log_joint_on_grid(images).logsumexp(-1) + self.log_cell

    def log_joint_on_grid(self, images: Tensor) -> Tensor:
        """``log p(x, z)`` of images ``[n, P]`` at the points of the grid, ``[n, points^2]``."""
        return self.model.log_joint(images, self.grid.expand(len(images), -1, -1))


class Table(nn.Module):
    """A decoder that is constant on each orthant of z: row ``sum_i 2^i [z_i > 0]`` of a table.

    It has no gradient with respect to z, so the encoder's gradients mean nothing.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def cells(self, z: Tensor) -> Tensor:
        """Which row is looked up for ``z [..., D]``."""
        return ((z > 0) * 2 ** torch.arange(z.shape[-1], device=z.device)).sum(-1)

    def forward(self, z: Tensor) -> Tensor:
        return self.table[self.cells(z)]


class Discrete(Reference):
    """Three-dimensional z, of which the decoder sees the signs alone: eight cells.

    The encoder is the prior, so each cell has the probability 1/8 under it and a sample's weight
    is its cell's ``p(x|cell)``. What ISIR does to cells is a finite Markov chain, which
    :class:`CellChains` enumerates. (DISIR's is not: its proposals depend on more than the signs.)
    """

    name = "discrete"
    num_cells = 8

    def __init__(self, pixels: int = 4) -> None:
        randn = _normals(5)
        encoder = AffineEncoder(pixels, 3).double()
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.zero_()
        self.model = VAE(encoder, Table(1.5 * randn(self.num_cells, pixels)), Bernoulli(), 3)
        self.images = (randn(3, pixels) > 0).double()

    def log_likelihood(self, images: Tensor) -> Tensor:
        """``log (1/8) sum_c p(x|c)``."""
        return self._log_weights(images).logsumexp(-1) - math.log(self.num_cells)

    @torch.no_grad()
    def weights(self, image: Tensor) -> Tensor:
        """``p(x|c)`` of the cells, ``[8]``."""
        return self._log_weights(image[None])[0].exp()

    @torch.no_grad()
    def joint_gradient(self, image: Tensor, z: Tensor) -> Tensor:
        """``grad log p(x, z)`` in the table, written out: ``[..., 8 * P]``."""
        return self.gradient_of(image, self.indicator(z))

    def indicator(self, z: Tensor) -> Tensor:
        """1 at the cell of ``z [..., D]``, 0 at the others; ``[..., 8]``."""
        return nn.functional.one_hot(self.model.decoder.cells(z), self.num_cells).to(z)

    @torch.no_grad()
    def gradient_of(self, image: Tensor, masses: Tensor) -> Tensor:
        """``sum_c masses_c grad log p(x|c)`` for (signed) masses ``[..., 8]``; ``[..., 8 * P]``."""
        pull = image - self.model.decoder.table.sigmoid()
        return (masses[..., None] * pull).flatten(-2)

    def chains(self, image: Tensor, num_samples: int) -> CellChains:
        """The chains of one image, by enumeration."""
        return CellChains(self.weights(image), num_samples)

    def _log_weights(self, images: Tensor) -> Tensor:
        rows = self.model.decoder.table.expand(len(images), -1, -1)
        return self.model.likelihood.log_prob(images, rows)


class CellChains:
    r"""ISIR on cells of equal probability under the proposal, by enumeration (Alg 1, 3, 4, 5).

    K - 1 fresh samples fall into the C cells by a multinomial, and the incumbent is in cell s. The
    transition, and the mean normalised weight of each cell among the K samples, is

        P(s, c) = E[(n_c + [c = s]) w_c / (sum_j n_j w_j + w_s)],

    with ``n`` the counts. In a coupled step both chains have the same counts; the indices are
    maximally coupled over C + 1 labels, the incumbent and the C cells of fresh samples, since the
    overlap of two equal samples of a cell adds up. Two chains in the same cell that have not met
    hold different noise.

    Args:
        weights: of the cells, ``[C]``.
        num_samples: K.
    """

    def __init__(self, weights: Tensor, num_samples: int) -> None:
        self.weights = weights
        self.num_samples = num_samples
        cells = len(weights)
        self.uniform = torch.full((cells,), 1 / cells, dtype=weights.dtype)
        self.posterior = weights / weights.sum()
        self.iwae = self_normalized(weights, num_samples)
        self.transition, self.unmet, self.met = self._enumerate()

    def _enumerate(self) -> tuple[Tensor, Tensor, Tensor]:
        """``P [s, c]``; ``Pr(unmet, at (c, d)) [s, r, c, d]``; ``Pr(met, at c) [s, r, c]``.

        All for a step from X in cell s and Y in cell r that have not met.
        """
        cells = len(self.weights)
        counts, probability = compositions(self.num_samples - 1, cells)
        fresh = counts * self.weights  # [N, C]
        # Normalised weights of the labels, [s, N, 1 + C]: the incumbent, then the fresh by cell.
        masses = torch.cat(
            [
                self.weights[:, None, None].expand(-1, len(fresh), 1),
                fresh.expand(cells, -1, -1),
            ],
            dim=-1,
        )
        masses = masses / masses.sum(-1, keepdim=True)
        transition = torch.einsum("n,snc->sc", probability, masses[:, :, 1:])
        transition += torch.diag(probability @ masses[:, :, 0].T)

        unmet = torch.zeros(cells, cells, cells, cells, dtype=self.weights.dtype)
        met = torch.zeros(cells, cells, cells, dtype=self.weights.dtype)
        for s, r in itertools.product(range(cells), repeat=2):
            overlap = torch.minimum(masses[s], masses[r])
            met[s, r] = probability @ overlap[:, 1:]
            rest = 1 - overlap.sum(-1)
            apart = probability / torch.where(rest > 0, rest, 1)  # residuals are 0 where it is
            pair = torch.einsum("n,ni,nj->ij", apart, masses[s] - overlap, masses[r] - overlap)
            pair[0, 0] += probability @ overlap[:, 0]
            unmet[s, r] = _labels_to_cells(_labels_to_cells(pair, s).T, r).T
        return transition, unmet, met

    def law(self, t: int) -> Tensor:
        """The law of X_t's cell, ``[C]``; for t >= 1 also the expectation of ``h(X_t)``."""
        return self.uniform @ torch.linalg.matrix_power(self.transition, t)

    def main(self, lag: int, burn_in: int) -> Tensor:
        """The expected masses of the first sum of Eq 14, ``[C]``: the estimate uncorrected."""
        # h(X_0) averages over K independent samples, as IWAE does; so does h(X_1) in effect.
        terms = [self.law(t) if t else self.iwae for t in range(burn_in, burn_in + lag)]
        return torch.stack(terms).mean(0)

    def estimate(self, lag: int, burn_in: int, max_steps: int) -> Tensor:
        """The expected masses of the estimate with a cap on t, ``[C]``."""
        total = self.main(lag, burn_in)
        if burn_in == 0:
            total = total + (self.law(lag) - self.iwae) / lag
        for t, apart in enumerate(self._apart(lag, max_steps), start=lag + 1):
            if t >= burn_in + lag:
                total = total + (apart.sum(1) - apart.sum(0)) @ self.transition / lag
        return total

    def meeting_time(self, lag: int, max_steps: int) -> Tensor:
        """``Pr(tau = t)`` for t from 0 to ``max_steps + 1``, ``[max_steps + 2]``.

        The rest up to 1 is the probability of being truncated: no meeting in step ``max_steps``
        or before. Chains that select the same sample in step t are equal from t + 1 on.
        """
        law = torch.zeros(max_steps + 2, dtype=self.weights.dtype)
        for t, apart in enumerate(self._apart(lag, max_steps), start=lag + 1):
            law[t + 1] = torch.einsum("sr,src->", apart, self.met)
        return law

    def _apart(self, lag: int, max_steps: int):
        """``Pr(X_{t-1} in s, Y_{t-1-L} in r, not met) [s, r]`` for t = L + 1, ..., max_steps."""
        apart = torch.outer(self.law(lag), self.uniform)
        for _ in range(lag, max_steps):
            yield apart
            apart = torch.einsum("sr,srcd->cd", apart, self.unmet)


def self_normalized(weights: Tensor, num_samples: int) -> Tensor:
    """``E[n_c w_c / sum_j n_j w_j]`` over K independent samples: IWAE's masses, ``[C]``."""
    counts, probability = compositions(num_samples, len(weights))
    masses = counts * weights
    return probability @ (masses / masses.sum(-1, keepdim=True))


def compositions(total: int, cells: int) -> tuple[Tensor, Tensor]:
    """Ways to share ``total`` samples among equally likely cells, ``[N, cells]``, and how likely.

    >>> compositions(2, 2)[0].tolist(), compositions(2, 2)[1].tolist()
    ([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]], [0.25, 0.5, 0.25])
    """
    picks = torch.tensor(list(itertools.combinations_with_replacement(range(cells), total)))
    counts = nn.functional.one_hot(picks, cells).sum(1).double()
    log_probability = (
        math.lgamma(total + 1) - (counts + 1).lgamma().sum(-1) - total * math.log(cells)
    )
    return counts, log_probability.exp()


def _labels_to_cells(masses: Tensor, incumbent: int) -> Tensor:
    """Masses ``[1 + C, ...]`` of the incumbent and the cells of fresh samples, by cell."""
    cells = masses[1:].clone()
    cells[incumbent] += masses[0]
    return cells


def flat(tensors) -> Tensor:
    """All entries of some tensors in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradients(scalar: Tensor, module: nn.Module) -> Tensor:
    """The gradient of a scalar in a module's parameters, flat; 0 where it has none."""
    parameters = list(module.parameters())
    parts = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
    return flat(
        torch.zeros_like(p) if part is None else part
        for p, part in zip(parameters, parts, strict=True)
    )


def _normals(seed: int):
    """Standard normals of a shape, float64, always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


# What a reference is called in tables, and how to make it.
REFERENCES: dict[str, Callable[[], Reference]] = {
    "ppca": LinearGaussian,
    "ppca_5d": partial(LinearGaussian, "ppca_5d", 5, 10, scale=1.2, shift=0.4, spread=1.7),
    "deep": DeepDecoder,
    "discrete": Discrete,
}
