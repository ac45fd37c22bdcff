r"""Proposals remembered for each training image and improved at each visit.

An encoder answers for all images at once, by default with a diagonal covariance, and the chains pay
for what it misses: their time to meet grows like the exponential of the mismatch. Here each
training image has a Gaussian of its own, with a full covariance. It starts from the encoder's and
is refined at each visit, the more the worse it fits (:mod:`ucvae.models.refinement`).

A proposal depends on samples that the chains do not use, so the chains that use it give gradients
as unbiased as with any other. It may have missed a part of the posterior; the estimator therefore
mixes it with the encoder's (:class:`~ucvae.models.gaussians.DefensiveMixture`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ucvae.errors import ConfigError
from ucvae.models.gaussians import Encoded, FullGaussian


class Lesson(NamedTuple):
    """What a visit leaves behind.

    Attributes:
        places: of the images ``[n]`` in the memory.
        proposal: of each, as improved by the visit.
        better: ``[n]``; by the samples of the visit its ELBO was at least that of the encoder's.
        evaluations: of the decoder, ``[n]``, that the visit took.
    """

    places: Tensor
    proposal: FullGaussian
    better: Tensor
    evaluations: Tensor


class RememberedProposals:
    """A Gaussian with a full covariance for each of N images.

    The lower triangles are packed: ``4 N (D + D (D + 1) / 2)`` bytes in float32, 46 MB at D = 20
    and 1 GB at D = 100 for 50,000 images.

    Args:
        num_images: N.
        dim: D.
        device: of the memory.
        dtype: of the memory.

    Raises:
        ConfigError: there is no room for it.
    """

    def __init__(self, num_images: int, dim: int, device: torch.device, dtype: torch.dtype) -> None:
        rows, columns = torch.tril_indices(dim, dim, device=device)
        self._triangle = rows * dim + columns  # places in a flat [D, D] matrix
        self.dim = dim
        self.known = torch.zeros(num_images, dtype=torch.bool, device=device)
        try:
            self.mean = torch.zeros(num_images, dim, device=device, dtype=dtype)
            self.scale = torch.zeros(num_images, len(rows), device=device, dtype=dtype)
        except RuntimeError as error:
            size = num_images * (dim + len(rows)) * dtype.itemsize / 1e9
            raise ConfigError(
                f"estimator.proposals=remembered: no room for {size:,.1f} GB on {device}, which "
                f"{num_images:,} images take at model.latent_dim={dim}; use a smaller one, or "
                "estimator.proposals=encoder"
            ) from error

    def of(self, index: Tensor, encoded: Encoded) -> FullGaussian:
        """The proposals of the images at ``index [n]``; the encoder's where none is known.

        Waits for the device once: how many are not known.
        """
        unknown = (~self.known[index]).nonzero()[:, 0]
        start = FullGaussian.of(encoded.rows(unknown))
        mean = self.mean[index].index_copy_(0, unknown, start.mean)
        flat = mean.new_zeros(len(index), self.dim**2)
        flat.index_copy_(1, self._triangle, self.scale[index])
        scale = flat.view(-1, self.dim, self.dim).index_copy_(0, unknown, start.scale)
        return FullGaussian(mean, scale)

    def keep(self, lesson: Lesson) -> None:
        """Remember the proposals of a visit.

        One that was known before and has fallen behind the encoder's is forgotten: a young model
        may move further between two visits than a memory can follow.
        """
        places, proposal, better, _ = lesson
        self.known[places] = better | ~self.known[places]
        self.mean[places] = proposal.mean
        self.scale[places] = proposal.scale.flatten(1).index_select(1, self._triangle)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"known": self.known, "mean": self.mean, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            RuntimeError: it is of other sizes.
        """
        for name, own in self.state_dict().items():
            value = state[name]
            if own.shape != value.shape:
                raise RuntimeError(
                    f"remembered proposals: {name} {list(value.shape)} in the place of "
                    f"{list(own.shape)}"
                )
            own.copy_(value)
