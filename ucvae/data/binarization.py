"""Binarisation of grey images: a pixel of grey level g out of ``top`` is 1 with chance g / top.

Both draws are made in whole numbers: r is uniform on {0, ..., top - 1} and the bit is ``r < g``,
so its chance is g / top exactly, black stays black, white stays white, and no float is needed.

The *frozen* draw is the same for ever and everywhere: its numbers come from NumPy's legacy
``RandomState``, whose streams NumPy has promised never to change (NEP 19), seeded by
:data:`FROZEN_SEED` and the split. The *fresh* draw takes its numbers from the generator given.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FROZEN_SEED = 201001845
"""Seed of every frozen draw (static sets; valid and test of dynamic ones): arXiv 2010.01845."""

STREAMS = {"train": 0, "valid": 1, "test": 2}
"""A stream of its own for each split, so that a split's draw does not hang on another's size."""


def frozen_draw(grey: Tensor, split: str, top: int = 255) -> Tensor:
    """Draw the bits of ``split`` that never change.

    Args:
        grey: uint8 levels in 0..``top``, any shape, on the CPU.
        split: "train", "valid" or "test"; picks the stream.
        top: the grey level that is certainly 1; at most 255.

    Returns:
        uint8 zeros and ones of ``grey``'s shape.
    """
    random = np.random.RandomState([FROZEN_SEED, STREAMS[split]])
    uniform = random.randint(0, top, size=tuple(grey.shape), dtype=np.uint8)
    return torch.from_numpy(uniform).lt_(grey)


def fresh_draw(grey: Tensor, generator: torch.Generator) -> Tensor:
    """Draw bits anew, on ``grey``'s device; one byte a pixel is all the memory it takes.

    Args:
        grey: uint8 levels in 0..255, any shape.
        generator: source of the draw, on the same device as ``grey``.

    Returns:
        uint8 zeros and ones of ``grey``'s shape.
    """
    uniform = torch.randint(
        255, grey.shape, dtype=torch.uint8, device=grey.device, generator=generator
    )
    return uniform.lt_(grey)
