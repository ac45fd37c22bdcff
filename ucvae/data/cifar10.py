"""CIFAR-10 (Krizhevsky, 2009): colour images of 32x32 pixels in 256 levels.

The files are pickles of Python 2, a dictionary each, with the images under ``b"data"``: a uint8
array ``[10000, 3072]``, an image a row, the 1,024 red values first, then green, then blue, each
row by row. A pickle is a program, so nothing of it is run before its MD5 is that of the original,
and then it can only describe arrays, not make them.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_and_extract_archive

from ucvae.data.base import ImageData, split_train
from ucvae.data.files import FileSet, check_md5, unpacked
from ucvae.errors import DataError

SHAPE = (3, 32, 32)
NUM_VALID = 5_000

_VALUES = 3 * 32 * 32
# Beside its values an image has a label and a file name.
_MAX_BYTES_PER_IMAGE = _VALUES + 512
# Protocol 2 is Python 2's last; later ones have further ways to claim memory.
_PROTOCOL = 2


@dataclass(frozen=True)
class BatchFile:
    """A file with known content.

    Attributes:
        name: file name.
        md5: of the unpacked file, in hexadecimal.
        count: number of images in it.
    """

    name: str
    md5: str
    count: int = 10_000

    def read(self, path: Path) -> Tensor:
        """Read the images from ``path``, plain or ``.gz``, uint8 [count, 3, 32, 32].

        Raises:
            DataError: the file is not the known one.
        """
        with unpacked(path, self.count * _MAX_BYTES_PER_IMAGE) as plain:
            check_md5(plain, path, self.md5)
            content = plain.read_bytes()
        try:
            values = read_values(content)
        except Exception as error:  # noqa: BLE001
            # Python's reader answers damage with whatever its next step trips over.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{path}: cannot be read as a file of CIFAR-10: {reason}") from None
        if values.shape != (self.count, _VALUES):
            found = " x ".join(map(str, values.shape))
            raise DataError(f"{path}: b'data' is {found}, expected {self.count} x {_VALUES}")
        return torch.from_numpy(values.reshape(-1, *SHAPE).copy())


TRAIN = tuple(BatchFile(name, md5) for name, md5 in CIFAR10.train_list)
TEST = tuple(BatchFile(name, md5) for name, md5 in CIFAR10.test_list)


@dataclass
class Cifar10:
    """45,000 / 5,000 / 10,000 images, the last 5,000 of the training files for validation."""

    def load(self, data_dir: Path) -> ImageData:
        """Find, check and read the files; see :class:`ucvae.data.files.FileSet`."""
        files = FileSet(
            title="CIFAR-10",
            names=tuple(file.name for file in (*TRAIN, *TEST)),
            folder=CIFAR10.base_folder,
            system_folder="cifar-10",
            fetch=_fetch,
        )
        paths = files.locate(data_dir)
        train, test = (
            torch.cat([file.read(paths[file.name]) for file in part]) for part in (TRAIN, TEST)
        )
        splits = {**split_train(train, NUM_VALID), "test": test}
        return ImageData.from_splits("cifar10", "none", 256, splits)


def _fetch(names: Sequence[str], folder: Path) -> Path:
    # Not by the class, which would unpickle the files besides.
    download_and_extract_archive(CIFAR10.url, folder, md5=CIFAR10.tgz_md5, remove_finished=True)
    return folder / CIFAR10.base_folder


def read_values(content: bytes) -> np.ndarray:
    """The array under ``b"data"`` of a file's ``content``, uint8 of any shape, read-only.

    Raises:
        Exception: the pickle is damaged, or describes something else.
    """
    for opcode, argument, _ in pickletools.genops(content):
        # The reader makes room for all places of its memo up to the one that is named.
        place = argument if opcode.name == "LONG_BINPUT" and argument is not None else 0
        if opcode.proto > _PROTOCOL or place > len(content):
            raise pickle.UnpicklingError(f"{opcode.name} has no place in it")
    described = _Reader(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(described, dict) or not isinstance(described.get(b"data"), _Described):
        raise pickle.UnpicklingError("it has no array b'data'")
    return described[b"data"].array()


class _Described:
    """Stands for an array, or for its type, of which a pickle tells: keeps what it is told."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array, if it is one of bytes in C order, all of which are there."""
        _, shape, kind, fortran_order, values = self.state
        if kind.arguments[0] not in (b"u1", "u1") or fortran_order:
            raise pickle.UnpicklingError("b'data' is not of unsigned bytes, row by row")
        return np.frombuffer(values, dtype=np.uint8).reshape(shape)


class _Reader(pickle.Unpickler):
    """Reads no other names than an array's, and calls nothing by them."""

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    }

    def find_class(self, module: str, name: str) -> type[_Described]:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
        return _Described
