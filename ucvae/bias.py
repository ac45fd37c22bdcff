r"""Whether an estimator of a vector is biased: its batch means against the exact vector.

An estimate is repeated and averaged in B batches. The mean ``g_b`` of ``n_b`` independent estimates
has the covariance ``S / n_b``, S that of one estimate, and is nearly normal where ``n_b`` is large,
however heavy the tails of one estimate are (as long as it has a variance). With the grand mean
``g = sum_b n_b g_b / N``, ``N = sum_b n_b``,

    C = sum_b n_b (g_b - g)(g_b - g)^T / (B - 1)

estimates S without bias, and Hotelling's statistic (1931; Anderson, *An Introduction to
Multivariate Statistical Analysis*, 3rd ed, Section 5.2)

    T^2 = N (g - truth)^T C^-1 (g - truth)

is, for an unbiased estimator of m coordinates, ``m (B - 1) / (B - m)`` times an F variable of m and
B - m degrees of freedom. For B far above m it is a chi-square of m degrees of freedom, which is how
to read it; the p-value is the F distribution's. The coordinates may depend on each other in any
way.

**Directions without variance.** A combination of coordinates may be the same in every estimate (a
sum that is always 0). There C says nothing, and the mean has to be exact to rounding: it adds
nothing to T^2 where it is, and makes T^2 infinite where it is not. The degrees of freedom are the
directions that do vary.

**Many coordinates.** C has a useful inverse only where B is several times the degrees of freedom.
Where it is below 4 times, the coordinates are replaced by ``B // 4`` fixed random combinations of
them, for which all of the above holds as well: less power, the same false alarms.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from ucvae.errors import NonFiniteError

BATCHES_PER_DEGREE = 4


class BiasTest(NamedTuple):
    """The error of a mean, set against what an unbiased estimator's would be.

    Attributes:
        relative_error: ``|g - truth| / |truth|``, Euclidean norms.
        standard_error: ``sqrt(trace(C) / N) / |truth|``: the root mean square of the relative
            error if the estimator is unbiased.
        chi_square: Hotelling's T^2.
        degrees: its degrees of freedom: the directions that have variance, or the random
            combinations.
        p_value: the probability of so large a T^2 if the estimator is unbiased.
        variance: ``trace(C) / |truth|^2``, of one estimate.
    """

    relative_error: float
    standard_error: float
    chi_square: float
    degrees: int
    p_value: float
    variance: float


class BatchMeans:
    """Means of batches of independent estimates of a vector, kept on the CPU in float64.

    Args:
        size: m, the number of coordinates.
        rounding: the rounding error of a batch mean, relative to its largest coordinate: below it
            nothing is taken for variance or for bias. The default suits estimates made in float64;
            1e-5 suits float32.
    """

    def __init__(self, size: int, rounding: float = 1e-9) -> None:
        self.size = size
        self.rounding = rounding
        self.means: list[Tensor] = []
        self.counts: list[int] = []

    def add(self, mean: Tensor, count: int) -> None:
        """Add the mean ``[m]`` of ``count`` independent estimates.

        Raises:
            ValueError: the mean has another shape, or the count is below 1.
            NonFiniteError: the mean has a NaN or an infinity.
        """
        if mean.shape != (self.size,):
            raise ValueError(f"mean must have shape [{self.size}], got {list(mean.shape)}")
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        mean = mean.detach().to("cpu", torch.float64, copy=True)
        if not mean.isfinite().all():
            raise NonFiniteError(f"the mean of batch {len(self.means)} has a NaN or an infinity")
        self.means.append(mean)
        self.counts.append(count)

    def test(self, truth: Tensor) -> BiasTest:
        """Compare with the exact vector ``[m]``, which must not be 0; needs 4 batches or more."""
        num_batches = len(self.means)
        if num_batches < BATCHES_PER_DEGREE:
            raise ValueError(f"needs {BATCHES_PER_DEGREE} batches or more, got {num_batches}")
        truth = truth.detach().to("cpu", torch.float64)
        size = truth.norm().item()
        if truth.shape != (self.size,) or not 0 < size < math.inf:
            raise ValueError(f"truth must be finite, not 0, and of shape [{self.size}]")
        means = torch.stack(self.means)
        counts = torch.tensor(self.counts, dtype=torch.float64)[:, None]
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        error = mean - truth
        # Rows whose sum of squares is C.
        deviations = counts.sqrt() * (means - mean) / math.sqrt(num_batches - 1)
        variance = deviations.square().sum().item()
        largest = torch.maximum(means.square().mean(0).sqrt().max(), truth.abs().max())
        chi_square, degrees = _hotelling(
            deviations, total.sqrt() * error, self.rounding * largest * counts.mean().sqrt()
        )
        return BiasTest(
            relative_error=error.norm().item() / size,
            standard_error=math.sqrt(variance / total.item()) / size,
            chi_square=chi_square,
            degrees=degrees,
            p_value=_p_value(chi_square, degrees, num_batches),
            variance=variance / size**2,
        )


def _hotelling(deviations: Tensor, error: Tensor, floor: Tensor) -> tuple[float, int]:
    """T^2 and its degrees of freedom.

    Args:
        deviations: ``[B, m]``; their sum of squares ``deviations^T deviations`` is C.
        error: ``sqrt(N) (g - truth)``, ``[m]``; its covariance is S if the estimator is unbiased.
        floor: what rounding alone may give a coordinate's spread, the norm of a column.
    """
    num_batches, size = deviations.shape
    most = num_batches // BATCHES_PER_DEGREE
    # With as many coordinates as batches no direction is known to have no variance.
    if size < num_batches:
        chi_square, degrees = _t_square(deviations, error, floor)
        if degrees <= most or math.isinf(chi_square):
            return chi_square, degrees
    source = torch.Generator().manual_seed(0)
    combine = torch.randn(size, most, generator=source, dtype=error.dtype)
    combine /= combine.norm(dim=0)
    return _t_square(deviations @ combine, error @ combine, floor)


def _t_square(deviations: Tensor, error: Tensor, floor: Tensor) -> tuple[float, int]:
    # Coordinates in units of their own spread, so that T^2's computation knows no scale. What
    # rounding alone would give in a direction is its share of each coordinate's floor.
    spread = deviations.norm(dim=0).clamp(min=floor)
    _, found, directions = torch.linalg.svd(deviations / spread, full_matrices=False)
    by_rounding = (directions * (floor / spread)).norm(dim=1)
    along = directions @ (error / spread)
    varies = found > by_rounding
    degrees = int(varies.sum())
    if (along[~varies].abs() > by_rounding[~varies] * math.sqrt(len(deviations))).any():
        return math.inf, degrees
    return (along[varies] / found[varies]).square().sum().item(), degrees


def _p_value(chi_square: float, degrees: int, num_batches: int) -> float:
    if degrees == 0:
        return float(chi_square == 0)
    rest = num_batches - degrees
    return float(stats.f.sf(chi_square * rest / (degrees * (num_batches - 1)), degrees, rest))
