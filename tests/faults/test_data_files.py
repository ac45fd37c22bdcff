"""Every data format, each fault: refused by the file's name, in one line and little memory."""

import gzip
import io
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from data.conftest import memory_growth, no_system_folders  # noqa: F401
from data.small_files import (
    TRAIN,
    amat_bytes,
    cifar_bytes,
    marked_colours,
    marked_images,
    matlab_columns,
    md5,
    python2_array,
    save_matlab,
    small_cifar,
    small_idx,
)

from ucvae.data import cifar10, mnist
from ucvae.data.cifar10 import BatchFile
from ucvae.data.mnist_larochelle import read_amat
from ucvae.data.omniglot import read_chardata
from ucvae.errors import DataError

MUCH = 40 << 20
IMAGES = marked_images(6, 1)


@dataclass
class Format:
    """A file of it with an intact content, its reader, and how its header can lie."""

    name: str
    content: bytes
    read: object
    lie: object
    hashed: bool


def idx(monkeypatch, folder):
    content = small_idx(monkeypatch, mnist)
    for name, data in content.items():
        (folder / "MNIST/raw").mkdir(parents=True, exist_ok=True)
        (folder / "MNIST/raw" / name).write_bytes(data)
    return Format(
        f"MNIST/raw/{TRAIN}",
        content[TRAIN],
        lambda path: mnist.Mnist().load(folder),
        lambda data: data[:4] + b"\x7f\xff\xff\xff" * 3 + data[16:],
        hashed=True,
    )


def amat(monkeypatch, folder):
    return Format(
        "binarized_mnist_train.amat",
        amat_bytes(IMAGES),
        lambda path: read_amat(path, 6),
        lambda data: b"1" * (60 << 10),  # it has no header: a line without an end
        hashed=False,
    )


def chardata(monkeypatch, folder):
    columns = matlab_columns(IMAGES)
    content = save_matlab(folder / "made.mat", data=columns, testdata=columns).read_bytes()

    def lie(data):
        # An element that says it has 4 GB.
        return data[:128] + struct.pack("<II", 14, 0xFFFFFFF0) + data[136:]

    return Format(
        "chardata.mat",
        content,
        lambda path: read_chardata(path, {"data": 6, "testdata": 6}),
        lie,
        hashed=False,
    )


def cifar(monkeypatch, folder):
    content = small_cifar(monkeypatch)
    colours = marked_colours(4, 1)
    huge = cifar_bytes(colours, python2_array(colours.tobytes(), (2**31 - 1, 3072)))
    name = cifar10.TRAIN[0].name
    whole = content[name]
    return Format(
        name,
        whole,
        lambda path: BatchFile(name, md5(whole), 6).read(path),
        lambda data: huge,
        hashed=True,
    )


@cache
def bomb(size=1 << 30):
    """Zeros, a thousand times as many as the bytes they are packed in."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9) as file:
        for _ in range(size >> 24):
            file.write(bytes(1 << 24))
    return packed.getvalue()


FAULTS = {
    "empty": lambda kind: b"",
    "a few bytes": lambda kind: kind.content[:7],
    "short": lambda kind: kind.content[:-30],
    "wrong magic": lambda kind: b"\x89PNG\r\n\x1a\n" * 16 + kind.content[128:],
    "another format": lambda kind: b"<html>not found</html>" * 40,
    "absurd sizes": lambda kind: kind.lie(kind.content),
    "a bit flipped": lambda kind: flipped(kind),
}


def flipped(kind):
    content = bytearray(kind.content)
    content[len(content) // 2] ^= 64
    return bytes(content)


@pytest.fixture(params=[idx, amat, chardata, cifar], ids=lambda make: make.__name__)
def kind(request, monkeypatch, tmp_path):
    return request.param(monkeypatch, tmp_path)


def refusal(kind, path):
    """What is said of a file; paths of other places are no part of it."""
    with pytest.raises(DataError) as error:
        kind.read(path)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and message.startswith(str(path)), message
    return message


def write(kind, folder, content, packed) -> Path:
    path = folder / kind.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        path.unlink(missing_ok=True)
        path = path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_intact_it_is_read(kind, packed, tmp_path):
    assert kind.read(write(kind, tmp_path, kind.content, packed)) is not None


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_it_is_refused_by_name(fault, packed, kind, tmp_path, memory_growth):  # noqa: F811
    path = write(kind, tmp_path, FAULTS[fault](kind), packed)
    growth = memory_growth()
    message = refusal(kind, path)
    assert growth() < MUCH
    if kind.hashed and fault == "a bit flipped":
        assert "wrong content: MD5 " in message


def test_a_bomb_takes_little_memory(kind, tmp_path, memory_growth):  # noqa: F811
    path = write(kind, tmp_path, b"", packed=True)
    path.write_bytes(bomb())
    growth = memory_growth()
    assert "longer than the " in refusal(kind, path)
    assert growth() < MUCH
