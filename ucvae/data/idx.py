"""MNIST-like data sets: grey 28x28 images in idx files, downloaded and read by torchvision.

Only the image files are needed. An idx file of images is a header of four big-endian 32-bit
numbers (2051, count, height, width) and then a byte a pixel, row by row.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file

from ucvae.data.base import split_train
from ucvae.data.files import FileSet, check_md5, unpacked
from ucvae.errors import DataError

_HEADER = struct.Struct(">4I")
_MAGIC = 2051
_SIDE = 28


@dataclass(frozen=True)
class IdxFile:
    """An image file with known content.

    Attributes:
        name: file name, unpacked.
        count: number of 28x28 images in it.
        md5: MD5 of the unpacked file, in hexadecimal.
    """

    name: str
    count: int
    md5: str

    def read(self, path: Path) -> Tensor:
        """Read the images from ``path``, plain or ``.gz``, uint8 [count, 1, 28, 28].

        Raises:
            DataError: the file is not the known one.
        """
        size = _HEADER.size + self.count * _SIDE * _SIDE
        with unpacked(path, size) as plain:
            found = plain.stat().st_size
            if found != size:
                raise DataError(f"{path}: has {found} bytes unpacked, expected {size}")
            with open(plain, "rb") as file:
                header = _HEADER.unpack(file.read(_HEADER.size))
            expected = (_MAGIC, self.count, _SIDE, _SIDE)
            if header != expected:
                raise DataError(f"{path}: has the idx header {header}, expected {expected}")
            check_md5(plain, path, self.md5)
            return read_image_file(str(plain)).unsqueeze(1)


@dataclass(frozen=True)
class IdxDataset:
    """A data set of two idx image files.

    Attributes:
        torchvision_class: downloads the files; its name is also that of the folder.
        train: the file of training images, the last ``num_valid`` of which are for validation.
        test: the file of test images.
        num_valid: number of validation images.
        system_folder: folder under the system's data set folders.
    """

    torchvision_class: type[MNIST]
    train: IdxFile
    test: IdxFile
    num_valid: int
    system_folder: str

    def load_grey(self, data_dir: Path) -> dict[str, Tensor]:
        """Find and read the images, uint8 [N, 1, 28, 28] in 0..255 by split."""
        title = self.torchvision_class.__name__
        files = FileSet(
            title=title,
            names=(self.train.name, self.test.name),
            folder=f"{title}/raw",
            system_folder=self.system_folder,
            fetch=self._fetch,
        )
        paths = files.locate(data_dir)
        train = self.train.read(paths[self.train.name])
        test = self.test.read(paths[self.test.name])
        return {**split_train(train, self.num_valid), "test": test}

    def _fetch(self, names: Sequence[str], folder: Path) -> Path:
        return Path(self.torchvision_class(folder, download=True).raw_folder)
