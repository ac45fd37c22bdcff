"""scikit-learn's handwritten digits, 8x8, binarised statically; comes with the library.

The images are the test part of the UCI set *Optical Recognition of Handwritten Digits*
(Alpaydin and Kaynak, 1998): 1,797 images of 17 grey levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from ucvae.data.base import ImageData
from ucvae.data.binarization import FROZEN_SEED

SPLIT_SIZES = {"train": 1197, "valid": 300, "test": 300}
"""Images in each split; 1,797 in all."""


@dataclass
class Digits:
    """The default data set, which needs no files; static binarisation with chance v / 16."""

    def load(self, data_dir: Path) -> ImageData:
        """Give the data; ``data_dir`` is not read."""
        images = torch.from_numpy(load_digits().images.astype(np.uint8)).unsqueeze(1)
        parts = images[split_order()].split(list(SPLIT_SIZES.values()))
        grey = dict(zip(SPLIT_SIZES, parts, strict=True))
        return ImageData.from_grey("digits", "static", grey, top=16)


def split_order() -> torch.Tensor:
    """Order in which the library's images are dealt to train, valid and test, int64 [1797].

    The library lists the images writer by writer, so they are shuffled first, by NumPy's frozen
    legacy generator.
    """
    total = sum(SPLIT_SIZES.values())
    return torch.from_numpy(np.random.RandomState(FROZEN_SEED).permutation(total))
