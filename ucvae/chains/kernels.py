r"""Iterated sampling importance resampling (ISIR), its dependent version (DISIR), and couplings.

The state of a chain is the selected noise ``xi`` and its cached log weight. One step (Alg 1 and 2
of the paper) puts the selected noise, the *incumbent*, into slot ``a ~ Uniform{1..K}``, fills the
other slots outward from ``a`` by

    xi_k = beta * xi_{k -+ 1} + sqrt(1 - beta^2) * eps_k,      eps_k ~ N(0, I),

and selects the next state in proportion to the weights. ISIR is ``beta = 0``. In a coupled step
(Alg 3) both chains share ``a`` and every ``eps_k``, and their indices are maximally coupled.

**Layout.** Samples are stored with the incumbent first and the K - 1 others after it, in the order
of their slots. This is a relabelling of the paper's slots that depends on ``a`` alone, so it
changes neither chain's law nor the coupling; it spares moving samples about.

Everything here is a pure function of the state and of noise drawn beforehand (:func:`draw_noise`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ucvae.chains.selection import normalize, select, select_coupled

Evaluate = Callable[[Tensor], Tensor]
"""Noise ``[n, k, D]`` of the n images at hand to log weights ``[n, k]``."""


class State(NamedTuple):
    """Selected noise ``[n, D]`` and its log weight ``[n]``, one row per image."""

    noise: Tensor
    log_weight: Tensor

    def rows(self, index: Tensor) -> State:
        """The rows of ``index``, in its order."""
        return State(self.noise[index], self.log_weight[index])

    def append(self, other: State) -> State:
        """These rows followed by those of ``other``."""
        return State(
            torch.cat([self.noise, other.noise]), torch.cat([self.log_weight, other.log_weight])
        )


class Samples(NamedTuple):
    """The K samples of one step.

    Noise ``[n, K, D]``, log weights ``[n, K]``, and normalised weights ``[n, K]`` (float64).
    """

    noise: Tensor
    log_weights: Tensor
    weights: Tensor

    @classmethod
    def of(cls, noise: Tensor, log_weights: Tensor) -> Samples:
        """Samples with these log weights, and the weights that they give."""
        return cls(noise, log_weights, normalize(log_weights))

    @property
    def invalid(self) -> Tensor:
        """Where no sample can be selected ``[n]``: a softmax makes one NaN of all the weights."""
        return self.weights[:, 0].isnan()

    def select(self, index: Tensor) -> State:
        """The states that indices ``[n]`` select."""
        rows = torch.arange(len(index), device=index.device)
        return State(self.noise[rows, index], self.log_weights[rows, index])


class StepNoise(NamedTuple):
    """All that is random in a step: ``slot`` a ``[n]``, ``fresh`` eps ``[n, K-1, D]``, uniforms."""

    slot: Tensor
    fresh: Tensor
    uniforms: Tensor


class CoupledStep(NamedTuple):
    """Both chains after a coupled step.

    ``met`` ``[n]`` marks the images whose two chains have selected the same sample in this step:
    from here on they are one chain. The samples of this step still differ in the incumbent.
    """

    first: State
    second: State
    first_samples: Samples
    second_samples: Samples
    met: Tensor


class Arms(NamedTuple):
    """The two autoregressive arms of DISIR as linear maps, for each slot ``a`` of the incumbent.

    With the others in the order of their slots, ``xi_others = decay[a] * xi_incumbent + mix[a] @
    eps``: ``decay`` is ``[K, K-1]``, ``mix`` is ``[K, K-1, K-1]``.
    """

    decay: Tensor
    mix: Tensor

    @classmethod
    def of(cls, beta: Tensor, num_samples: int) -> Arms:
        """The maps for correlation ``beta`` (a 0-dim tensor in [0, 1)) and K samples."""
        slots = torch.arange(num_samples, device=beta.device)
        others = slots[:-1] + (slots[:-1] >= slots[:, None])  # [K, K-1]: the slots other than a
        offset = others - slots[:, None]
        decay = beta ** offset.abs()
        between = (others[:, :, None] - others[:, None, :]).abs()
        same_arm = offset[:, :, None].sign() == offset[:, None, :].sign()
        not_farther = offset[:, None, :].abs() <= offset[:, :, None].abs()
        scale = (1 - beta**2).sqrt()
        mix = torch.where(same_arm & not_farther, scale * beta**between, 0.0)
        return cls(decay, mix)

    def propose(self, incumbent: Tensor, noise: StepNoise) -> Tensor:
        """The K - 1 samples beside the incumbent ``[n, D]``; shape ``[n, K-1, D]``."""
        driven = torch.bmm(self.mix[noise.slot], noise.fresh)
        return self.decay[noise.slot][:, :, None] * incumbent[:, None] + driven


def draw_noise(
    num_images: int,
    num_samples: int,
    dim: int,
    *,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> StepNoise:
    """Draw one step's noise for each image, the slot too: one ``a`` an image, never a batch."""
    slot = torch.randint(num_samples, (num_images,), generator=generator, device=device)
    fresh = torch.randn(
        num_images, num_samples - 1, dim, generator=generator, device=device, dtype=dtype
    )
    uniforms = torch.rand(num_images, 3, generator=generator, device=device, dtype=torch.float64)
    return StepNoise(slot, fresh, uniforms)


def step(
    state: State, noise: StepNoise, evaluate: Evaluate, arms: Arms | None
) -> tuple[State, Samples]:
    """One ISIR (``arms=None``) or DISIR step of single chains (Alg 1, Alg 2).

    Returns:
        The next :class:`State` and the :class:`Samples` of this step.
    """
    proposals = noise.fresh if arms is None else arms.propose(state.noise, noise)
    samples = _beside(state, proposals, evaluate(proposals))
    return samples.select(select(samples.weights, noise.uniforms[:, 1])), samples


def coupled_step(
    first: State, second: State, noise: StepNoise, evaluate: Evaluate, arms: Arms | None
) -> CoupledStep:
    """One step of two chains on shared noise with maximally coupled indices (Alg 3, Alg 5).

    At ``beta = 0`` (``arms=None``) the fresh samples are the same for both chains and are
    evaluated once, and the chains meet where the common index is one of them.
    """
    if arms is None:
        first_new = second_new = noise.fresh
        first_log = second_log = evaluate(noise.fresh)
    else:
        first_new = arms.propose(first.noise, noise)
        second_new = arms.propose(second.noise, noise)
        both = evaluate(torch.cat([first_new, second_new], dim=1))
        first_log, second_log = both.chunk(2, dim=1)
    first_samples = _beside(first, first_new, first_log)
    second_samples = _beside(second, second_new, second_log)
    indices = select_coupled(first_samples.weights, second_samples.weights, noise.uniforms)
    met = indices.common & (indices.first > 0) if arms is None else torch.zeros_like(indices.common)
    return CoupledStep(
        first_samples.select(indices.first),
        second_samples.select(indices.second),
        first_samples,
        second_samples,
        met,
    )


def _beside(state: State, noise: Tensor, log_weights: Tensor) -> Samples:
    return Samples.of(
        torch.cat([state.noise[:, None], noise], dim=1),
        torch.cat([state.log_weight[:, None], log_weights], dim=1),
    )
