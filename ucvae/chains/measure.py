r"""What lagged coupled chains give: a signed measure (Eq 15) of each image, and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ucvae.errors import NonFiniteError

LogWeight = Callable[[Tensor, Tensor], Tensor]
"""``log_weight(noise [n, k, D], image_index [n]) -> [n, k]``, in nats, up to a constant."""


class SignedParticles(NamedTuple):
    """A signed measure for each image, in G groups of K particles.

    Attributes:
        image_index: ``[G]``, the image that a group belongs to.
        noise: ``[G, K, D]``.
        coefficient: ``[G, K]``; all of an image's coefficients add up to 1.
    """

    image_index: Tensor
    noise: Tensor
    coefficient: Tensor

    @classmethod
    def join(cls, parts: Sequence[SignedParticles]) -> SignedParticles:
        """All groups of several measures, in their order; at least one measure."""
        return cls(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


class LaggedChains(NamedTuple):
    """What the chains of a batch give.

    Attributes:
        main: the first sum of Eq 14, an average over L steps of X, whose coefficients add up to 1
            for every image.
        correction: the second sum, which takes away the bias of the first; its coefficients add up
            to 0 for every image. It may have no group at all.
        particles: both together, the whole signed measure. Where the kernel is ``isir`` or
            ``isir_hmc`` every sample is there once, in a group of its own, with all the
            coefficients that it has got in different steps and from both chains added up; what
            these cancel is most of the correction. Other kernels have a group of K for each state
            of a chain, those of the main sum first; groups of one where states have samples in
            different numbers.
        meeting_time: ``tau`` ``[n]``; the last step of a pair that a cap or the roulette has ended.
        truncated: ``[n]``; True where a cap has ended a pair that had not met. Such an image's
            estimate is biased. With roulette (``survival`` above 0) nothing is truncated.
        evaluations: log-weight evaluations ``[n]``.
        ess: mean effective sample size over every DISIR sub-step of both chains, 0-dim; NaN for
            a kernel that has none, such as ``isir``.
        acceptance: of the trajectories of both chains, 0-dim; NaN for a kernel that has none, and
            where there was none.
        mean_log_weight: ``[n]`` float64, the signed measure's estimate of ``E_{p(z|x)}[log w]``:
            unbiased, as every such estimate is.
        log_mean_weight: ``[n]`` float64, log of the average weight of the independent draws among
            X's start and the proposals of its first L steps: an estimate of ``log p(x)``, too low
            rather than too high.
    """

    main: SignedParticles
    correction: SignedParticles
    particles: SignedParticles
    meeting_time: Tensor
    truncated: Tensor
    evaluations: Tensor
    ess: Tensor
    acceptance: Tensor
    mean_log_weight: Tensor
    log_mean_weight: Tensor

    @property
    def mismatch(self) -> Tensor:
        """``mean_log_weight - log_mean_weight`` ``[n]``, nats: about ``KL(p(z|x) || q)``.

        It scatters widely for an image, as all signed estimates do; average it over many. The
        meeting time grows like its exponential: from a state of weight w a chain needs some
        ``w / p(x)`` independent proposals to move on.
        """
        return self.mean_log_weight - self.log_mean_weight


def evaluate(log_weight: LogWeight, noise: Tensor, image_index: Tensor) -> Tensor:
    """The user's function, its answer checked.

    Raises:
        ValueError: it is no tensor of the shape ``[n, k]``.
    """
    values = log_weight(noise, image_index)
    if not isinstance(values, Tensor) or values.shape != noise.shape[:2]:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"log_weight must return a tensor [n, k] = {list(noise.shape[:2])} for noise "
            f"of the shape {list(noise.shape)}, got {got}"
        )
    return values


def refuse_invalid(not_below_infinity: Tensor, impossible: Tensor) -> None:
    """Name the first image that no chain can use; waits for the device.

    Args:
        not_below_infinity: ``[n]``; log weights have a NaN or +inf among them.
        impossible: ``[n]``; all K of a step are -inf.

    Raises:
        NonFiniteError: there is one.
    """
    invalid = (not_below_infinity | impossible).nonzero()[:, 0].tolist()
    if not invalid:
        return
    named = f"log weights: image {invalid[0]} of the batch ({len(invalid)} in all) has "
    if not_below_infinity[invalid[0]]:
        raise NonFiniteError(f"{named}a NaN or +inf among them")
    raise NonFiniteError(f"{named}only -inf among the K of a step: no sample is possible")
