r"""Proposals remembered for each training image and improved at each visit.

An encoder answers for all images at once, by default with a diagonal covariance, and the chains pay
for what it misses: their time to meet grows like the exponential of the mismatch. Here each
training image has a Gaussian of its own, with a full covariance. It starts from the encoder's and
is refined before the chains of each visit, the more the worse it fits
(:mod:`ucvae.models.refinement`). Where there are no chains, :mod:`ucvae.estimators.snis` refines in
another order.

An image whose bits are drawn anew has another posterior at each visit. The encoder sees the bits,
and its mean moves with them: so what is remembered of such an image is how far its mean is from the
encoder's (``follow_encoder``).

A proposal depends on no sample that is drawn from it, so the chains that use it give gradients as
unbiased as with any other. It may have missed a part of the posterior; the estimator therefore
mixes it with the encoder's (:class:`~ucvae.models.gaussians.DefensiveMixture`).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ucvae.config import require
from ucvae.errors import ConfigError
from ucvae.estimators.base import Estimate, Estimator
from ucvae.estimators.iwae import Bound, dreg_bound
from ucvae.models.gaussians import DefensiveMixture, Encoded, FullGaussian
from ucvae.models.refinement import Refined, refine
from ucvae.models.vae import VAE, draw_noise

log = logging.getLogger(__name__)


class Lesson(NamedTuple):
    """What a visit leaves behind.

    Attributes:
        places: of the images ``[n]`` in the memory.
        proposal: of each, as improved by the visit.
        encoder_mean: the encoder's for each at this visit, ``[n, D]``.
        better: ``[n]``; by the samples of the visit its ELBO was at least that of the encoder's.
        evaluations: of the decoder, ``[n]``, for this alone.
    """

    places: Tensor
    proposal: FullGaussian
    encoder_mean: Tensor
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
        follow_encoder: a mean moves as the encoder's does between two visits; for this the
            encoder's are remembered too, in a further ``4 N D`` bytes.

    Raises:
        ConfigError: there is no room for it.
    """

    def __init__(
        self,
        num_images: int,
        dim: int,
        device: torch.device,
        dtype: torch.dtype,
        follow_encoder: bool = False,
    ) -> None:
        rows, columns = torch.tril_indices(dim, dim, device=device)
        self._triangle = rows * dim + columns  # places in a flat [D, D] matrix
        self.dim = dim
        self.known = torch.zeros(num_images, dtype=torch.bool, device=device)
        try:
            self.mean = torch.zeros(num_images, dim, device=device, dtype=dtype)
            self.encoder_mean = torch.zeros_like(self.mean) if follow_encoder else None
            self.scale = torch.zeros(num_images, len(rows), device=device, dtype=dtype)
        except RuntimeError as error:
            width = dim + dim * follow_encoder + len(rows)
            size = num_images * width * dtype.itemsize / 1e9
            raise ConfigError(
                f"proposals remembered: no room for {size:,.1f} GB on {device}, which "
                f"{num_images:,} images take at model.latent_dim={dim}; use a smaller one, "
                "estimator=iwae, or estimator=coupled with estimator.proposals=encoder"
            ) from error

    def unknown(self, index: Tensor) -> Tensor:
        """Which of the images at ``index [n]`` have no proposal here, as their places among the n.

        Waits for the device once: how many they are.
        """
        return (~self.known[index]).nonzero()[:, 0]

    def of(self, index: Tensor, encoded: Encoded, unknown: Tensor | None = None) -> FullGaussian:
        """The proposals of the images at ``index [n]``; the encoder's where none is known.

        Waits for the device, unless it is told which are :meth:`unknown`.
        """
        if unknown is None:
            unknown = self.unknown(index)
        start = FullGaussian.of(encoded.rows(unknown))
        mean = self.mean[index]
        if self.encoder_mean is not None:
            mean = mean + (encoded.mean - self.encoder_mean[index])
        mean = mean.index_copy_(0, unknown, start.mean)
        flat = mean.new_zeros(len(index), self.dim**2)
        flat.index_copy_(1, self._triangle, self.scale[index])
        scale = flat.view(-1, self.dim, self.dim).index_copy_(0, unknown, start.scale)
        return FullGaussian(mean, scale)

    def keep(self, lesson: Lesson) -> None:
        """Remember the proposals of a visit.

        One that was known before and has fallen behind the encoder's is forgotten: a young model
        may move further between two visits than a memory can follow.
        """
        places, proposal, encoder_mean, better, _ = lesson
        self.known[places] = better | ~self.known[places]
        self.mean[places] = proposal.mean
        if self.encoder_mean is not None:
            self.encoder_mean[places] = encoder_mean
        self.scale[places] = proposal.scale.flatten(1).index_select(1, self._triangle)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        state = {"known": self.known, "mean": self.mean, "scale": self.scale}
        return state if self.encoder_mean is None else state | {"encoder_mean": self.encoder_mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            KeyError: it lacks the encoder's means, and these follow them.
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


class Visit(NamedTuple):
    """What a call of an estimator that remembers begins with.

    Attributes:
        bound: the encoder's; its surrogate trains the encoder alone.
        proposal: to draw from, constant to autograd.
        lesson: for the memory.
    """

    bound: Bound
    proposal: DefensiveMixture
    lesson: Lesson


@dataclass(kw_only=True)
class Remembering(Estimator):
    """An estimator that remembers a proposal for each training image, and refines it at each visit.

    Attributes:
        num_samples: K, also of each step of a visit but the first.
        proposal_samples: of the first step of a visit, and of the encoder's bound beside it.
        memory_rate: length of a step, in (0, 0.5].
        refinements: the most steps of a visit.
        refinement_gap: nats; a visit goes on while the log mean weight of the proposal's samples is
            farther than this above their mean log weight, and the latter rises.
        encoder_share: of the encoder's proposals, which are mixed with those remembered; in [0, 1).
        widening: nats of fit that the remembered proposals give up for wider tails.
        follow_encoder: a remembered mean moves as the encoder's does between two visits: for images
            whose bits are drawn anew.
    """

    # The settings of the memory alone.
    OWN: ClassVar[tuple[str, ...]] = (
        "proposal_samples",
        "memory_rate",
        "refinements",
        "refinement_gap",
        "encoder_share",
        "widening",
        "follow_encoder",
    )

    num_samples: int = 10
    proposal_samples: int = 10
    memory_rate: float = 0.5
    refinements: int = 16
    refinement_gap: float = 0.5
    encoder_share: float = 0.1
    widening: float = 0.2
    follow_encoder: bool = False

    def __post_init__(self) -> None:
        for name in ("num_samples", "proposal_samples"):
            value = getattr(self, name)
            require(value >= 2, f"{name} must be at least 2, got {value}")
        require(
            0 < self.memory_rate <= 0.5, f"memory_rate must be in (0, 0.5], got {self.memory_rate}"
        )
        require(self.refinements >= 1, f"refinements must be at least 1, got {self.refinements}")
        require(
            0 <= self.encoder_share < 1,
            f"encoder_share must be in [0, 1), got {self.encoder_share}",
        )
        for name in ("refinement_gap", "widening"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must be at least 0 and finite, got {value}")
        self.memory: RememberedProposals | None = None

    def begin(self, model: VAE, num_images: int) -> None:
        """Make the memory of the proposals."""
        device = next(model.parameters()).device
        self.memory = RememberedProposals(
            num_images, model.latent_dim, device, model.dtype, self.follow_encoder
        )

    def inherit(self, state: dict[str, Any]) -> bool:
        """Begin with the proposals that another estimator remembers of these images.

        Those that did not follow the encoder's means cannot begin to: where these were is lost.

        Raises:
            RuntimeError: they are of other sizes.
        """
        theirs = state.get("memory")
        # One that ended before its switch, say, has learnt nothing.
        if self.memory is None or theirs is None or not theirs["known"].any():
            return False
        if self.follow_encoder and "encoder_mean" not in theirs:
            log.warning(
                "the remembered proposals begin anew: those of the start did not follow the "
                "encoder's means; estimator.follow_encoder=false keeps them"
            )
            return False
        self.memory.load_state_dict(theirs)
        return True

    def visit(
        self, model: VAE, images: Tensor, generator: torch.Generator, index: Tensor | None
    ) -> Visit:
        """The encoder's bound, and the proposals of the images, refined.

        Raises:
            ValueError: there is no memory yet, or ``index`` is missing.
        """
        memory, index = self.require_memory(index)
        encoded, bound = self.encode(model, images, generator)
        refined = self.refine(model, images, memory.of(index, encoded), generator)
        better = refined.elbo >= bound.log_weights.mean(1)
        lesson = Lesson(index, refined.proposal, encoded.mean, better, refined.evaluations)
        return Visit(bound, self.mixture(refined.proposal, encoded), lesson)

    def learn(
        self, model: VAE, images: Tensor, generator: torch.Generator, index: Tensor
    ) -> Lesson:
        """What a call of the estimator has to remember."""
        return self.visit(model, images, generator, index).lesson

    def require_memory(self, index: Tensor | None) -> tuple[RememberedProposals, Tensor]:
        """The memory, and which images a call is for.

        Raises:
            ValueError: there is no memory yet, or ``index`` is missing.
        """
        if self.memory is None or index is None:
            raise ValueError("remembered proposals: need begin(), and the images' index in a call")
        return self.memory, index

    def encode(
        self, model: VAE, images: Tensor, generator: torch.Generator
    ) -> tuple[Encoded, Bound]:
        """The encoder's proposals, constant to autograd, and its bound, which trains it alone."""
        encoded = model.encode(images)
        noise = draw_noise(model, images, self.proposal_samples, generator)
        with model.frozen_decoder():
            return encoded.detach(), dreg_bound(model, images, encoded, noise)

    def refine(
        self, model: VAE, images: Tensor, proposal: FullGaussian, generator: torch.Generator
    ) -> Refined:
        """Some steps of refinement, as the settings say."""
        return refine(
            model,
            images,
            proposal,
            generator,
            num_samples=self.num_samples,
            first=self.proposal_samples,
            rate=self.memory_rate,
            most=self.refinements,
            gap=self.refinement_gap,
        )

    def mixture(self, proposal: FullGaussian, encoded: Encoded) -> DefensiveMixture:
        """What samples are drawn from: a proposal, widened, with a share of the encoder's."""
        return DefensiveMixture(proposal.widened(self.widening), encoded, self.encoder_share)

    def adapt(self, estimate: Estimate) -> None:
        """Remember the proposals of the images that were seen."""
        if self.memory is not None:
            self.memory.keep(estimate.lesson)

    def state_dict(self) -> dict[str, Any]:
        """The memory, where there is one."""
        return {} if self.memory is None else {"memory": self.memory.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The memory as it was."""
        if self.memory is not None:
            self.memory.load_state_dict(state["memory"])
