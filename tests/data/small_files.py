"""Small data files in the real formats, whose images tell which file and row they came from."""

import gzip
import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy.io

from ucvae.data import fashion_mnist, mnist
from ucvae.data.idx import IdxDataset

TRAIN = "train-images-idx3-ubyte"
TEST = "t10k-images-idx3-ubyte"


def marked_images(count: int, mark: int) -> np.ndarray:
    """Grey images [count, 28, 28] with their row and ``mark`` written in saturated pixels.

    Pixels are 0 or 255, so that binarisation changes none: the first ten hold the row's bits, the
    next four those of ``mark``.
    """
    images = np.zeros((count, 28 * 28), np.uint8)
    images[:, :10] = (np.arange(count)[:, None] >> np.arange(10)) & 1
    images[:, 10:14] = (mark >> np.arange(4)) & 1
    return 255 * images.reshape(count, 28, 28)


def read_marks(images) -> tuple[list[int], set[int]]:
    """Rows, in order, and marks of images in 0..255 or 0..1, [N, 1, 28, 28]."""
    bits = (images.reshape(len(images), -1).numpy() > 0).astype(int)
    return (bits[:, :10] @ (1 << np.arange(10))).tolist(), set(bits[:, 10:14] @ (1 << np.arange(4)))


def idx_bytes(images: np.ndarray) -> bytes:
    """Content of an idx file."""
    return struct.pack(">4I", 2051, *images.shape) + images.tobytes()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def small_idx(monkeypatch, module, num_train: int = 30, num_test: int = 10) -> dict[str, bytes]:
    """Let ``module`` (mnist or fashion_mnist) expect small files; their contents by name."""
    content = {
        TRAIN: idx_bytes(marked_images(num_train, 1)),
        TEST: idx_bytes(marked_images(num_test, 2)),
    }
    files: IdxDataset = module.FILES
    small = replace(
        files,
        train=replace(files.train, count=num_train, md5=md5(content[TRAIN])),
        test=replace(files.test, count=num_test, md5=md5(content[TEST])),
        num_valid=10,
    )
    monkeypatch.setattr(module, "FILES", small)
    return content


IDX_FOLDERS = {mnist: "MNIST/raw", fashion_mnist: "FashionMNIST/raw"}


def write_all(folder: Path, content: dict[str, bytes], packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return folder


def amat_bytes(images: np.ndarray) -> bytes:
    """Content of Larochelle's files: 784 digits a line with a space between."""
    rows = (images.reshape(len(images), -1) > 0).astype(int)
    return "".join(" ".join(map(str, row)) + "\n" for row in rows).encode()


def matlab_columns(images: np.ndarray) -> np.ndarray:
    """Grey images [N, 28, 28] as Burda's file holds them: 784 x N, column-major, in [0, 1]."""
    columns = [image.flatten(order="F") for image in images]
    return np.stack(columns, axis=1).astype(np.float32) / np.float32(255)


def save_matlab(path: Path, **matrices) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, matrices, do_compression=True)
    return path
