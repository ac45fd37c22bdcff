"""Larochelle's binarisation of MNIST, the set of Salakhutdinov and Murray (2008).

Three text files, 50,000 / 10,000 / 10,000 lines of 784 numbers, 0 or 1, one image a line, row by
row. Its draw is the one behind most published figures for static MNIST; ours of
:mod:`ucvae.data.mnist` has the same law but other bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ucvae.data.base import ImageData
from ucvae.data.files import FileSet, download_url, unpacked
from ucvae.errors import DataError

ADDRESS = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"

FILE_NAMES = {split: f"binarized_mnist_{split}.amat" for split in ("train", "valid", "test")}

COUNTS = {"train": 50_000, "valid": 10_000, "test": 10_000}
"""Lines in each split's file."""

_PIXELS = 28 * 28
_SEPARATORS = b" " * (_PIXELS - 1)
_MAX_LINE_BYTES = 4 * _PIXELS


@dataclass
class MnistLarochelle:
    """50,000 / 10,000 / 10,000 images with Larochelle's frozen bits."""

    def load(self, data_dir: Path) -> ImageData:
        """Find and read the files; see :class:`ucvae.data.files.FileSet`."""
        files = FileSet(
            title="Larochelle's binary MNIST",
            names=tuple(FILE_NAMES.values()),
            folder="BinaryMNIST",
            system_folder="binary-mnist",
            fetch=_fetch,
        )
        paths = files.locate(data_dir)
        splits = {split: read_amat(paths[FILE_NAMES[split]], COUNTS[split]) for split in COUNTS}
        return ImageData.from_splits("mnist_larochelle", "static", 2, splits)


def _fetch(names: Sequence[str], folder: Path) -> Path:
    for split, name in FILE_NAMES.items():
        if name in names:
            # Read at once: no checksum is published, and a cut transfer may pass unnoticed.
            read_amat(download_url(ADDRESS + name, folder), COUNTS[split])
    return folder


def read_amat(path: Path, count: int) -> Tensor:
    """Read ``count`` images from a text file, plain or ``.gz``, uint8 [count, 1, 28, 28].

    Raises:
        DataError: names the file, and the line where it is not 784 numbers, each 0 or 1.
    """
    rows = bytearray()
    with unpacked(path, count * _MAX_LINE_BYTES) as plain, open(plain, "rb") as file:
        for number in range(1, count + 1):
            line = file.readline(_MAX_LINE_BYTES)
            if not line:
                raise DataError(f"{path}: ends after line {number - 1}, expected {count}")
            rows += _read_line(line, f"{path}, line {number}")
        if file.read(1):
            raise DataError(f"{path}: has more than the {count} lines expected")
    bits = np.frombuffer(rows, dtype=np.uint8) - ord("0")
    return torch.from_numpy(bits).view(count, 1, 28, 28)


def _read_line(line: bytes, place: str) -> bytes:
    """Give the 784 digits of a line without what separates them."""
    text = line.rstrip()
    numbers = text[::2]
    if len(numbers) != _PIXELS or text[1::2] != _SEPARATORS:  # not one space between digits
        words = text.split()
        if len(words) != _PIXELS:
            raise DataError(f"{place}: has {len(words)} numbers, expected {_PIXELS}")
        wrong = [word for word in words if len(word) != 1]
        if wrong:
            raise DataError(f"{place}: has {_show(wrong[0])}, expected 0 or 1")
        numbers = b"".join(words)
    strange = numbers.translate(None, b"01")
    if strange:
        raise DataError(f"{place}: has {_show(strange[:1])}, expected 0 or 1")
    return numbers


def _show(word: bytes) -> str:
    return repr(word[:20].decode("ascii", "backslashreplace"))
