"""Omniglot (Lake et al., 2015) as 28x28 images in Burda's file, binarised.

The file is that of Burda, Grosse and Salakhutdinov, *Importance Weighted Autoencoders* (2016),
who draw the training bits anew each epoch: 24,345 images for training, of which the last 1,345
serve for validation here, and 8,070 for test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import scipy.io
import torch
from torch import Tensor

from ucvae.data.base import ImageData, require_one_of, split_train
from ucvae.data.files import FileSet, download_url, unpacked
from ucvae.errors import DataError

ADDRESS = "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat"

FILE_NAME = "chardata.mat"

COUNTS = {"data": 24_345, "testdata": 8_070}
"""Images under each of the file's keys."""

NUM_VALID = 1_345

NAMES = {"dynamic": "omniglot", "static": "omniglot_static"}

_PIXELS = 28 * 28
_CLASSES = ("single", "double")
_MAX_BYTES_PER_IMAGE = 2 * 8 * _PIXELS


@dataclass
class Omniglot:
    """23,000 / 1,345 / 8,070 images; Burda's protocol is dynamic binarisation."""

    binarization: str = "dynamic"

    def __post_init__(self) -> None:
        require_one_of("binarization", self.binarization, NAMES)

    def load(self, data_dir: Path) -> ImageData:
        """Find and read the file; see :class:`ucvae.data.files.FileSet`."""
        files = FileSet(
            title="Omniglot",
            names=(FILE_NAME,),
            folder="OMNIGLOT",
            system_folder="omniglot",
            fetch=_fetch,
        )
        images = read_chardata(files.locate(data_dir)[FILE_NAME], COUNTS)
        grey = {**split_train(images["data"], NUM_VALID), "test": images["testdata"]}
        return ImageData.from_grey(NAMES[self.binarization], self.binarization, grey)


def _fetch(names: Sequence[str], folder: Path) -> Path:
    # Read at once: no checksum is published, and a cut transfer may pass unnoticed.
    read_chardata(download_url(ADDRESS, folder), COUNTS)
    return folder


def read_chardata(path: Path, counts: dict[str, int]) -> dict[str, Tensor]:
    """Read images from a MATLAB file, plain or ``.gz``, uint8 [N, 1, 28, 28] grey levels by key.

    The file holds a matrix 784 x N of floats in [0, 1] under each key, ink = 1, an image a
    column, pixels in column-major order. They become uint8 by rounding 255 v, which moves a
    pixel's chance of being 1 by at most 1/510, and by nothing where v is a multiple of 1/255.

    Args:
        path: the file.
        counts: number of images expected under each key.

    Raises:
        DataError: names the file, and the key and what is wrong with it.
    """
    max_bytes = sum(counts.values()) * _MAX_BYTES_PER_IMAGE
    with unpacked(path, max_bytes) as plain, open(plain, "rb") as file:
        # Names and sizes come first, so that no more is read than the data set can hold.
        listed = {name: entry for name, *entry in _call(scipy.io.whosmat, file, path)}
        for key, count in counts.items():
            if key not in listed:
                raise DataError(f"{path}: has no {key!r}, only {', '.join(listed) or 'nothing'}")
            shape, kind = listed[key]
            if tuple(shape) != (_PIXELS, count):
                found = " x ".join(map(str, shape))
                raise DataError(f"{path}: {key!r} is {found}, expected {_PIXELS} x {count}")
            if kind not in _CLASSES:
                raise DataError(f"{path}: {key!r} is {kind}, expected {' or '.join(_CLASSES)}")
        matrices = _call(scipy.io.loadmat, file, path, variable_names=list(counts))
    return {key: _to_grey(matrices[key], f"{path}: {key!r}") for key in counts}


def _call(reader: Callable[..., Any], file: BinaryIO, path: Path, **options: Any) -> Any:
    try:
        return reader(file, **options)
    except Exception as error:  # noqa: BLE001
        # scipy's parser answers damage with whatever its next step trips over.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as a MATLAB file: {reason}") from None


def _to_grey(matrix: np.ndarray, place: str) -> Tensor:
    if matrix.dtype.kind != "f":
        raise DataError(f"{place} holds {matrix.dtype} values, expected real floats")
    # Written so that NaN, which compares false with everything, is refused too.
    if not (matrix.min() >= 0 and matrix.max() <= 1):
        raise DataError(f"{place} has values outside [0, 1]")
    grey = np.rint(255 * matrix).astype(np.uint8)
    upright = grey.T.reshape(-1, 28, 28).swapaxes(1, 2)
    return torch.from_numpy(np.ascontiguousarray(upright)).unsqueeze(1)
