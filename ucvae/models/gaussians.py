r"""Gaussian proposals ``q(z|x)``, one for each image, as maps of noise.

``z = mu + S xi`` with ``xi ~ N(0, I)`` has the density ``log q(z|x) = log N(xi; 0, I) - log |S|``,
which needs no inverse of S where the noise is at hand. S is diagonal, or lower triangular where
there are correlations. A mixture of two Gaussians takes one number of the noise more, which says
whose turn it is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)
# Groups of samples that share one look-up of their image's matrix.
TOGETHER = 8


class Gaussian(NamedTuple):
    """A diagonal Gaussian per image: mean and standard deviation, ``[n, D]`` each."""

    mean: Tensor
    std: Tensor

    def detach(self) -> Gaussian:
        """The same distribution, constant to autograd."""
        return Gaussian(self.mean.detach(), self.std.detach())

    def rows(self, index: Tensor) -> Gaussian:
        """The distributions of the images at ``index``."""
        return Gaussian(self.mean.index_select(0, index), self.std.index_select(0, index))

    def transform(self, noise: Tensor) -> Tensor:
        """``z = mu + sigma * xi`` for noise ``[n, k, D]``."""
        return self.mean[:, None] + self.std[:, None] * noise

    def noise_log_prob(self, noise: Tensor, z: Tensor) -> Tensor:
        """Log-density of ``z = transform(noise)``, ``[n, k]``, from the noise."""
        return standard_normal_log_prob(noise) - self.log_det()[:, None]

    @property
    def noise_dim(self) -> int:
        """How many numbers the noise has."""
        return self.mean.shape[-1]

    def to_noise(self, z: Tensor) -> Tensor:
        """The inverse of :meth:`transform`."""
        return (z - self.mean[:, None]) / self.std[:, None]

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Of a function of z ``[n, k, D]``: its gradient with respect to the noise."""
        return gradient * self.std[:, None]

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of ``z [n, k, D]``; ``[n, k]``."""
        return standard_normal_log_prob(self.to_noise(z)) - self.log_det()[:, None]

    def log_det(self) -> Tensor:
        """``log |S|``, ``[n]``."""
        return self.std.log().sum(-1)

    def kl_from_prior(self) -> Tensor:
        """``KL(q || N(0, I))`` in closed form; ``[n]``, nats."""
        return 0.5 * (self.mean**2 + self.std**2 - 1 - 2 * self.std.log()).sum(-1)


class FullGaussian(NamedTuple):
    """A Gaussian with correlations per image.

    Attributes:
        mean: ``[n, D]``.
        scale: lower triangular with a positive diagonal, ``[n, D, D]``; the covariance is
            ``scale scale^T``.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, gaussian: Gaussian | FullGaussian) -> FullGaussian:
        """The same distribution as one of either kind."""
        if isinstance(gaussian, FullGaussian):
            return gaussian
        return cls(gaussian.mean, torch.diag_embed(gaussian.std))

    def detach(self) -> FullGaussian:
        """The same distribution, constant to autograd."""
        return FullGaussian(self.mean.detach(), self.scale.detach())

    def rows(self, index: Tensor) -> FullGaussian:
        """The distributions of the images at ``index``."""
        return FullGaussian(self.mean.index_select(0, index), self.scale.index_select(0, index))

    def widened(self, nats: float) -> FullGaussian:
        """Wider by a factor that costs about so many nats of ``KL(self || widened)``.

        A factor of ``1 + a`` costs ``D a^2`` for small a.
        """
        return FullGaussian(self.mean, self.scale * (1 + math.sqrt(nats / self.noise_dim)))

    def transform(self, noise: Tensor) -> Tensor:
        """``z = mu + S xi`` for noise ``[n, k, D]``."""
        return torch.baddbmm(self.mean[:, None], noise, self.scale.mT)

    def noise_log_prob(self, noise: Tensor, z: Tensor) -> Tensor:
        """Log-density of ``z = transform(noise)``, ``[n, k]``, from the noise."""
        return standard_normal_log_prob(noise) - self.log_det()[:, None]

    @property
    def noise_dim(self) -> int:
        """How many numbers the noise has."""
        return self.mean.shape[-1]

    def to_noise(self, z: Tensor) -> Tensor:
        """The inverse of :meth:`transform`."""
        centred = (z - self.mean[:, None]).mT
        return torch.linalg.solve_triangular(self.scale, centred, upper=False).mT

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Of a function of z ``[n, k, D]``: its gradient with respect to the noise."""
        return gradient @ self.scale

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of ``z [n, k, D]``; ``[n, k]``."""
        return standard_normal_log_prob(self.to_noise(z)) - self.log_det()[:, None]

    def log_det(self) -> Tensor:
        """``log |S|``, ``[n]``."""
        return self.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def kl_from_prior(self) -> Tensor:
        """``KL(q || N(0, I))`` in closed form; ``[n]``, nats."""
        squares = self.mean.square().sum(-1) + self.scale.square().sum((-2, -1))
        return 0.5 * (squares - self.noise_dim) - self.log_det()


# What an encoder gives.
Encoded = Gaussian | FullGaussian


# A last number of a mixture's noise by which its main component makes z, whatever its share.
MAIN = 9.0


class DefensiveMixture(NamedTuple):
    r"""``(1 - e) main + e wide``, for each image (Hesterberg 1995).

    Its importance weights are at most 1 / e times those of ``wide``. So where ``main`` has missed a
    part of a posterior, a mode or a tail, they stay as bounded as those of ``wide`` are.

    The noise is ``N(0, I)`` in D + 1 dimensions; the last one says which component makes ``z`` of
    the others. The density of z is the mixture's, whichever it was.

    Attributes:
        main: fits closely.
        wide: leaves nothing out.
        share: e, in [0, 1).
    """

    main: FullGaussian
    wide: Encoded
    share: float

    @property
    def noise_dim(self) -> int:
        """D + 1."""
        return self.main.noise_dim + 1

    def rows(self, index: Tensor) -> DefensiveMixture:
        """The distributions of the images at ``index``."""
        return DefensiveMixture(self.main.rows(index), self.wide.rows(index), self.share)

    def transform(self, noise: Tensor) -> Tensor:
        """``z [n, k, D]`` of noise ``[n, k, D + 1]``."""
        xi, of_main = noise[..., :-1], self.of_main(noise)[..., None]
        return torch.where(of_main, self.main.transform(xi), self.wide.transform(xi))

    def noise_of_main(self, noise: Tensor) -> Tensor:
        """Noise ``[n, k, D + 1]`` of which ``main`` makes z by its own ``[n, k, D]``."""
        last = torch.full_like(noise[..., :1], MAIN)
        return torch.cat([noise, last], -1)

    def of_main(self, noise: Tensor) -> Tensor:
        """Whether ``main`` makes z of the noise ``[n, k, D + 1]``; ``[n, k]``."""
        return torch.special.ndtr(noise[..., -1]) >= self.share

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density of ``z [n, k, D]``; ``[n, k]``."""
        main = self.main.log_prob(z) + math.log1p(-self.share)
        if self.share == 0:
            return main
        return torch.logaddexp(main, self.wide.log_prob(z) + math.log(self.share))

    def noise_log_prob(self, noise: Tensor, z: Tensor) -> Tensor:
        """Log-density of ``z = transform(noise)``, ``[n, k]``."""
        return self.log_prob(z)


Proposal = Encoded | DefensiveMixture


def transform_runs(proposal: Proposal, image_index: Tensor, noise: Tensor) -> Tensor:
    """``z [G, K, D]`` of G groups of samples, with one look-up of the proposal for several groups.

    A full covariance has far more numbers than a sample. So up to :data:`TOGETHER` groups that
    follow each other and belong to one image are transformed together. Waits for the device.

    Args:
        proposal: of n images.
        image_index: the image of each group ``[G]``; best with those of an image together.
        noise: ``[G, K, noise_dim]``.
    """
    if isinstance(proposal, Gaussian):
        return proposal.rows(image_index).transform(noise)
    images, run, lengths = torch.unique_consecutive(
        image_index, return_inverse=True, return_counts=True
    )
    place = torch.arange(len(run), device=run.device) - (lengths.cumsum(0) - lengths)[run]
    blocks = (lengths + TOGETHER - 1) // TOGETHER
    block = (blocks.cumsum(0) - blocks)[run] + place // TOGETHER
    block_images = images.repeat_interleave(blocks)
    padded = noise.new_zeros(len(block_images), TOGETHER, *noise.shape[1:])
    padded[block, place % TOGETHER] = noise
    z = proposal.rows(block_images).transform(padded.flatten(1, 2))
    return z.unflatten(1, (TOGETHER, -1))[block, place % TOGETHER]


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Log-density of N(0, I) over the last dimension, in nats."""
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * LOG_2PI)
