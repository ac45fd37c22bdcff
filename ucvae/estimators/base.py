"""What every gradient estimator gives to the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ucvae.chains import LaggedChains
from ucvae.config import require
from ucvae.models.vae import VAE


@dataclass
class Estimate:
    """A gradient estimate in the form of a scalar to differentiate.

    Attributes:
        surrogate: 0-dim; its gradient is minus the estimate, averaged over the batch, so that an
            optimizer minimises it. Its value means nothing.
        objective: 0-dim, nats per image: the bound that the surrogate climbs; None where the
            estimator has no objective.
        diagnostics: 0-dim tensors by TensorBoard tag.
        chains: the coupled chains behind the estimate, where there are any.
        lesson: what the estimator wants to learn from in :meth:`Estimator.adapt`: tensors with a
            row for each image, in NamedTuples, so that several processes can join theirs.
    """

    surrogate: Tensor
    objective: Tensor | None
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    chains: LaggedChains | None = None
    lesson: Any = None


class Estimator:
    """A map from model, images and random numbers to an :class:`Estimate`.

    A call never changes the estimator. What it learns from an estimate it learns in
    :meth:`adapt`, between calls, so that each estimate depends on the past only.

    Attributes:
        same_work: whether each call does the same on the device, whatever it finds there, and
            learns nothing: then training may replay its steps (``ucvae/graphs.py``). A subclass has
            to say so itself.
    """

    same_work: ClassVar[bool] = False

    def __call__(
        self, model: VAE, images: Tensor, generator: torch.Generator, index: Tensor | None = None
    ) -> Estimate:
        """The estimate for images ``[n, P]`` in [0, 1].

        Args:
            model: the VAE.
            images: of the batch.
            generator: the only source of randomness, on the images' device.
            index: places ``[n]`` of the images among those of training, no place twice; for an
                estimator that remembers something of each image, which needs it.

        Raises:
            ValueError: ``images`` is no such batch, or has no image.
        """
        raise NotImplementedError

    def may_be_replayed(self) -> bool:
        """Whether the class says itself that its work is the same; it does not inherit that."""
        return bool(vars(type(self)).get("same_work", False))

    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing beside the others, and why; whoever gives one is told."""
        return {}

    def check(self, model: VAE) -> None:
        """Refuse a model that the estimator cannot train; called before any work.

        Raises:
            ConfigError: one line that says what is allowed.
        """

    def begin(self, model: VAE, num_images: int) -> None:
        """Make room for what :meth:`adapt` will learn; called once, before the first estimate.

        Args:
            model: on its device.
            num_images: of the training set.
        """

    def inherit(self, state: dict[str, Any]) -> bool:
        """Begin with what another estimator has learnt of the same training images.

        Args:
            state: the other's :meth:`state_dict`.

        Returns:
            Whether there was anything that this one can use.
        """
        return False

    def adapt(self, estimate: Estimate) -> None:
        """Learn from an estimate, for the next call."""

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`adapt` has learnt, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""


def require_batch(images: Tensor) -> None:
    """Refuse what is no batch of images ``[n, P]``; an empty one has no mean, and gives NaN."""
    require(
        images.ndim == 2 and len(images) >= 1,
        f"images must be a batch [n, P] of at least one image, got {list(images.shape)}",
    )
