"""What every evaluator offers to the commands, and what several of them need."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ucvae.errors import NonFiniteError
from ucvae.evaluation.unfinished import Unfinished
from ucvae.models.vae import VAE


class Progress(Protocol):
    """Told how far an evaluation is, often enough for what may interrupt it."""

    def __call__(self, count: int, note: str = "", under_way: float = 0.0, /) -> object:
        """``count`` images were finished since the last call; ``note`` says where it is now.

        ``under_way`` is the work done for images that are not finished, in images.
        """


class Evaluated(NamedTuple):
    """What an evaluator found.

    Attributes:
        values: ``log p(x)`` of each image, ``[N]`` float64, nats.
        details: plain values for ``result.json``, beside those of every evaluator.
    """

    values: Tensor
    details: dict[str, Any]


class Evaluator:
    """An estimate of ``log p(x)``: a dataclass whose fields are its settings.

    Attributes:
        name: in results; values under different names are not to be compared.
        num_samples: of z, for each image.
        num_images: evaluate only so many images, the first of the split; null for all.
    """

    name: str
    num_samples: int
    num_images: int | None

    def __call__(
        self,
        model: VAE,
        images: Tensor,
        generator: torch.Generator,
        progress: Progress | None = None,
    ) -> Tensor:
        """``log p(x)`` of each of the images ``[N, P]``, of which ``num_images``; ``[N]`` nats."""
        raise NotImplementedError

    def evaluate(
        self,
        model: VAE,
        images: Tensor,
        generator: torch.Generator,
        progress: Progress | None,
        unfinished: Unfinished,
    ) -> Evaluated:
        """The same with what the evaluator has to tell besides.

        An evaluator that takes hours keeps what it has finished in ``unfinished``, and goes on from
        what it finds there.
        """
        return Evaluated(self(model, images, generator, progress), {})


def require_finite(values: Tensor) -> Tensor:
    """The log-likelihoods ``[N]``, if all of them are numbers.

    Raises:
        NonFiniteError: one is NaN or infinite; it says which.
    """
    invalid = (~values.isfinite()).nonzero()[:, 0]
    if len(invalid):
        raise NonFiniteError(
            f"log-likelihood: image {int(invalid[0])} ({len(invalid)} of {len(values)} in all) has "
            f"the value {float(values[invalid[0]])}"
        )
    return values
