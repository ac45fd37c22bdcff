"""Small data files in the real formats, whose images tell which file and row they came from."""

import gzip
import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy.io

from ucvae.data import cifar10, fashion_mnist, mnist
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


def marked_colours(count: int, mark: int) -> np.ndarray:
    """Images [count, 3, 32, 32]: :func:`marked_images` in red, and noise in green and blue."""
    images = np.random.default_rng(mark).integers(0, 256, (count, 3, 32, 32), np.uint8)
    images[:, 0] = 0
    images[:, 0, :28, :28] = marked_images(count, mark)
    # The marks are read off the first pixels of a whole image, row by row.
    images[:, 0].reshape(count, -1)[:, :28] = images[:, 0, 0, :28]
    return images


def python2_string(text: bytes) -> bytes:
    """A string as Python 2 pickles it."""
    if len(text) < 256:
        return b"U" + bytes([len(text)]) + text
    return b"T" + struct.pack("<i", len(text)) + text


def python2_array(
    values: bytes, shape: tuple[int, ...], kind: bytes = b"u1", fortran: bool = False
) -> bytes:
    """An array as Python 2's NumPy pickles it; the shape is what it says, whatever it holds."""
    sides = b"".join(b"J" + struct.pack("<i", side) for side in shape)
    return (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x10cnumpy\nndarray\nq\x11K\x00\x85U\x01b\x87R("
        b"K\x01(" + sides + b"tcnumpy\ndtype\nq\x12" + python2_string(kind) + b"K\x00K\x01\x87R("
        b"K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + (b"\x88" if fortran else b"\x89")
        + python2_string(values)
        + b"tb"
    )


def cifar_bytes(images: np.ndarray, data: bytes | None = None) -> bytes:
    """Content of a file of CIFAR-10, as Python 2 wrote it; ``data`` in the array's place."""
    count = len(images)
    labels = b"".join(b"K" + bytes([row % 10]) for row in range(count))
    names = b"".join(python2_string(b"frog_s_%06d.png" % row) for row in range(count))
    entries = {
        b"batch_label": python2_string(b"training batch 1 of 5"),
        b"labels": b"](" + labels + b"e",
        b"data": python2_array(images.tobytes(), (count, 3072)) if data is None else data,
        b"filenames": b"](" + names + b"e",
    }
    items = b"".join(python2_string(key) + value for key, value in entries.items())
    return b"\x80\x02}q\x01(" + items + b"u."


def small_cifar(monkeypatch, counts: tuple[int, ...] = (6, 7, 8, 9, 10, 12)) -> dict[str, bytes]:
    """Let cifar10 expect small files; their contents by name. The last 10 images validate."""
    files = (*cifar10.TRAIN, *cifar10.TEST)
    content = {
        file.name: cifar_bytes(marked_colours(count, mark))
        for mark, (file, count) in enumerate(zip(files, counts, strict=True), start=1)
    }
    expect_cifar(monkeypatch, content, counts)
    monkeypatch.setattr(cifar10, "NUM_VALID", 10)
    return content


def expect_cifar(monkeypatch, content: dict[str, bytes], counts: tuple[int, ...]) -> None:
    """Let cifar10 expect these files, which hold so many images each."""
    small = [
        cifar10.BatchFile(name, md5(data), count)
        for (name, data), count in zip(content.items(), counts, strict=True)
    ]
    monkeypatch.setattr(cifar10, "TRAIN", tuple(small[:5]))
    monkeypatch.setattr(cifar10, "TEST", tuple(small[5:]))
