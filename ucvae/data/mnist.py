"""MNIST (LeCun et al., 1998), binarised statically or dynamically from the grey levels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import MNIST

from ucvae.data.base import ImageData, require_one_of
from ucvae.data.idx import IdxDataset, IdxFile

FILES = IdxDataset(
    torchvision_class=MNIST,
    train=IdxFile("train-images-idx3-ubyte", 60_000, "6bbc9ace898e44ae57da46a324031adb"),
    test=IdxFile("t10k-images-idx3-ubyte", 10_000, "2646ac647ad5339dbf082846283269ea"),
    num_valid=10_000,
    system_folder="mnist",
)

NAMES = {"static": "mnist", "dynamic": "mnist_dynamic"}


@dataclass
class Mnist:
    """50,000 / 10,000 / 10,000 images; both binarisations share the bits of valid and test."""

    binarization: str = "static"

    def __post_init__(self) -> None:
        require_one_of("binarization", self.binarization, NAMES)

    def load(self, data_dir: Path) -> ImageData:
        """Find, check and read the files; see :class:`ucvae.data.files.FileSet`."""
        grey = FILES.load_grey(data_dir)
        return ImageData.from_grey(NAMES[self.binarization], self.binarization, grey)
