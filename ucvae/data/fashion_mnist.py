"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017), with its 256 grey levels or binarised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import FashionMNIST as TorchvisionFashionMNIST

from ucvae.data.base import ImageData, require_one_of
from ucvae.data.idx import IdxDataset, IdxFile

FILES = IdxDataset(
    torchvision_class=TorchvisionFashionMNIST,
    train=IdxFile("train-images-idx3-ubyte", 60_000, "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
    test=IdxFile("t10k-images-idx3-ubyte", 10_000, "8181f5470baa50b63fa0f6fddb340f0a"),
    num_valid=10_000,
    system_folder="fashion-mnist",
)

NAMES = {
    "none": "fashion_mnist",
    "static": "fashion_mnist_binary",
    "dynamic": "fashion_mnist_binary_dynamic",
}


@dataclass
class FashionMnist:
    """50,000 / 10,000 / 10,000 images."""

    binarization: str = "none"

    def __post_init__(self) -> None:
        require_one_of("binarization", self.binarization, NAMES)

    def load(self, data_dir: Path) -> ImageData:
        """Find, check and read the files; see :class:`ucvae.data.files.FileSet`."""
        grey = FILES.load_grey(data_dir)
        return ImageData.from_grey(NAMES[self.binarization], self.binarization, grey)
