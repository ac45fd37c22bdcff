r"""What a kernel is made of: moves, each a step of a single chain and of a coupled pair.

``isir_disir`` is an ISIR move and then a DISIR move. A kernel of another make lists moves of its
own (:class:`ComposedKernel`), and :func:`~ucvae.chains.run_lagged_chains` does the rest: the lag,
the two sums of Eq 14, images that leave once they have met, roulette. For the estimate to be
unbiased it is enough that

1. each move leaves the target invariant, with density in proportion to ``N(noise; 0, I) w(noise)``,
2. each chain of a coupled step has the law of a single one, and the steps of the two chains depend
   on nothing but their states and that step's noise,
3. chains that meet are one from there on: ``met`` marks pairs whose next states are bit-equal,
4. a step's samples are what the next state was selected from, with the probabilities of the
   selection, so that ``sum_k W_k h(z_k)`` has the expectation of h at the next state, and
5. the meeting times have geometric tails (or light enough ones).

The first four are what ``tests/chains/test_contract.py`` holds every kernel of its table to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ucvae.chains.kernels import (
    Arms,
    CoupledStep,
    Evaluate,
    Samples,
    State,
    StepNoise,
    coupled_step,
    draw_noise,
    step,
)


class Move:
    """One step of a kernel; randomness is drawn first, and the steps are maps of what was drawn.

    Attributes:
        meets: whether chains can meet in it. After a move in which they can, the driver waits for
            the device, to learn which have.
    """

    meets: ClassVar[bool] = True

    def draw(
        self,
        num_images: int,
        num_samples: int,
        dim: int,
        *,
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Any:
        """All that is random in a step of each image: one draw an image, never one a batch.

        Args:
            num_images: n; what is drawn serves n single chains or n pairs.
            num_samples: K, for moves that have so many samples.
            dim: D.
            generator: the only source of randomness.
            device: of the chains.
            dtype: of the noise; decisions are best taken by float64 uniforms.
        """
        raise NotImplementedError

    def step(self, state: State, noise: Any, evaluate: Evaluate) -> tuple[State, Samples]:
        """A step of single chains, one for each image.

        Returns:
            The next state, and the samples that it was selected from with their probabilities.
        """
        raise NotImplementedError

    def coupled_step(
        self, first: State, second: State, noise: Any, evaluate: Evaluate
    ) -> CoupledStep:
        """A step of two chains on shared noise."""
        raise NotImplementedError


class _Resampling(Move):
    def arms(self, noise: StepNoise) -> Arms | None:
        """How this step's samples depend on the incumbent; None where they do not."""
        return None

    def draw(
        self,
        num_images: int,
        num_samples: int,
        dim: int,
        *,
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> StepNoise:
        """A slot, the noise of the other samples, and uniforms."""
        return draw_noise(
            num_images, num_samples, dim, generator=generator, device=device, dtype=dtype
        )

    def step(self, state: State, noise: StepNoise, evaluate: Evaluate) -> tuple[State, Samples]:
        """Alg 1 or Alg 2."""
        return step(state, noise, evaluate, self.arms(noise))

    def coupled_step(
        self, first: State, second: State, noise: StepNoise, evaluate: Evaluate
    ) -> CoupledStep:
        """Alg 3."""
        return coupled_step(first, second, noise, evaluate, self.arms(noise))


class Isir(_Resampling):
    """A step of ISIR (Alg 1): chains meet by selecting the same fresh sample."""


class Disir(_Resampling):
    """A step of DISIR (Alg 2); chains never meet in it.

    Args:
        beta: the correlation, in [0, 1): a number, or a 0-dim tensor.
    """

    meets = False

    def __init__(self, beta: float | Tensor) -> None:
        self.beta = beta
        self._arms: Arms | None = None  # of the last step, which the next ones mostly share

    def arms(self, noise: StepNoise) -> Arms:
        """Those for the noise's K, dtype and device."""
        fresh, arms = noise.fresh, self._arms
        count = fresh.shape[1] + 1
        if (
            arms is None
            or len(arms.decay) != count
            or (arms.decay.dtype, arms.decay.device) != (fresh.dtype, fresh.device)
        ):
            beta = torch.as_tensor(self.beta, dtype=fresh.dtype, device=fresh.device)
            self._arms = arms = Arms.of(beta, count)
        return arms


class ComposedKernel:
    """A kernel of one's own: the settings of its moves, and the moves.

    A subclass is an annotated dataclass, and ``estimator.kernel`` names it by ``_target_``.
    """

    def moves(self) -> Sequence[Move]:
        """The moves of a step, in their order; in one of them, at least, chains can meet."""
        raise NotImplementedError


def moves_of(kernel: ComposedKernel) -> tuple[Move, ...]:
    """The kernel's moves.

    Raises:
        ValueError: chains can meet in none of them, and so never would.
    """
    moves = tuple(kernel.moves())
    if not any(move.meets for move in moves):
        raise ValueError(f"kernel must have a move in which chains can meet, got {kernel}")
    return moves
