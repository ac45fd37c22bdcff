"""Selecting an index from weights, alone or as a maximal coupling of two chains.

All functions are deterministic maps of uniform numbers that the caller draws, so that a coupled
step and its single step can be fed the same noise. Probabilities are float64: a float32 uniform
has steps of 6e-8, and an index that is rarer than that must keep its own frequency.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CoupledIndices(NamedTuple):
    """Indices selected by two chains; ``common`` marks the rows in which they are one draw."""

    first: Tensor
    second: Tensor
    common: Tensor


def normalize(log_weights: Tensor) -> Tensor:
    """Normalised weights ``W_k``, float64, of log weights ``[n, K]``."""
    return torch.softmax(log_weights.double(), dim=-1)


def effective_sample_size(weights: Tensor) -> Tensor:
    """``1 / sum_k W_k^2`` of normalised weights ``[n, K]``; shape ``[n]``, between 1 and K."""
    return weights.square().sum(-1).reciprocal()


def select(masses: Tensor, uniform: Tensor) -> Tensor:
    """Draw an index in proportion to ``masses`` by inversion of the cumulative sum.

    Args:
        masses: non-negative, not necessarily normalised; ``[..., K]``, each row's sum positive.
        uniform: numbers in ``[0, 1)``, ``[...]``.

    Returns:
        Indices ``[...]``. An index of mass zero is never returned.
    """
    cumulative = masses.cumsum(-1)
    total = cumulative[..., -1]
    # Rounding could lift u * total to the total itself, past the last index that has mass.
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulative <= threshold[..., None]).sum(-1).clamp(max=masses.shape[-1] - 1)


def select_coupled(first: Tensor, second: Tensor, uniforms: Tensor) -> CoupledIndices:
    """Maximal coupling of two categoricals (Alg 5).

    With probability ``sum_k min(W_k, V_k)`` both indices are one draw in proportion to
    ``min(W_k, V_k)``; otherwise each comes from its own residual. The first index uses the same
    uniform either way, so that with ``W = V`` it is ``select(W, uniforms[:, 1])``.

    Args:
        first: normalised weights ``W``, ``[n, K]``.
        second: normalised weights ``V``, ``[n, K]``.
        uniforms: numbers in ``[0, 1)``, ``[n, 3]``: one to decide, one for each index.
    """
    overlap = torch.minimum(first, second)
    residual_first, residual_second = first - overlap, second - overlap
    # Where a residual has no mass the weights agree to rounding: nothing is left to draw from.
    exhausted = (residual_first.sum(-1) <= 0) | (residual_second.sum(-1) <= 0)
    common = (uniforms[:, 0] < overlap.sum(-1)) | exhausted
    masses = torch.stack([torch.where(common[:, None], overlap, residual_first), residual_second])
    index_first, index_second = select(masses, uniforms[:, 1:].T)
    return CoupledIndices(index_first, torch.where(common, index_first, index_second), common)
