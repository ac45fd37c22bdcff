"""The reader of Burda's MATLAB file of Omniglot."""

import struct

import numpy as np
import pytest
import torch

from ucvae.data.omniglot import FILE_NAME, read_chardata
from ucvae.errors import DataError

from .small_files import marked_images, matlab_columns, save_matlab, write_all

COUNTS = {"data": 6, "testdata": 4}


def matrices(**changes) -> dict[str, np.ndarray]:
    good = {
        "data": matlab_columns(marked_images(6, 1)),
        "testdata": matlab_columns(marked_images(4, 2)),
        "targetchar": np.ones((1, 6)),
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


def test_images_stand_upright(tmp_path):
    """A letter L, drawn as rows of an image: tall stroke on the left, foot at the bottom."""
    letter = np.zeros((28, 28), np.uint8)
    letter[4:24, 6] = 255
    letter[23, 6:18] = 255
    images = np.stack([letter] * 6)
    path = save_matlab(tmp_path / FILE_NAME, **matrices(data=matlab_columns(images)))
    read = read_chardata(path, COUNTS)["data"]
    assert read.shape == (6, 1, 28, 28) and read.dtype == torch.uint8
    assert np.array_equal(read[0, 0].numpy(), letter)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("shift", [0, 0.4, -0.4])
def test_values_are_rounded_to_grey_levels(kind, shift, tmp_path):
    levels = np.arange(6 * 784).reshape(6, 28, 28) % 254 + 1
    columns = matlab_columns(levels + shift).astype(kind)
    path = save_matlab(tmp_path / FILE_NAME, **matrices(data=columns))
    assert np.array_equal(read_chardata(path, COUNTS)["data"][:, 0].numpy(), levels)


def test_reads_gzip(tmp_path):
    path = save_matlab(tmp_path / FILE_NAME, **matrices())
    write_all(tmp_path, {FILE_NAME: path.read_bytes()}, packed=True)
    packed = read_chardata(tmp_path / f"{FILE_NAME}.gz", COUNTS)
    plain = read_chardata(path, COUNTS)
    assert all(torch.equal(packed[key], plain[key]) for key in COUNTS)


def with_value(value: float) -> np.ndarray:
    data = matlab_columns(marked_images(6, 1))
    data[100, 3] = value
    return data


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": None}, "has no 'data', only testdata, targetchar"),
        ({"testdata": None}, "has no 'testdata', only data, targetchar"),
        ({"data": np.zeros((784, 5))}, "'data' is 784 x 5, expected 784 x 6"),
        ({"data": np.zeros((6, 784))}, "'data' is 6 x 784, expected 784 x 6"),
        ({"testdata": np.zeros((784, 4, 2))}, "'testdata' is 784 x 4 x 2, expected 784 x 4"),
        ({"data": np.zeros((784, 6), np.uint8)}, "'data' is uint8, expected single or double"),
        ({"data": np.zeros((784, 6), bool)}, "'data' is logical, expected single or double"),
        ({"data": "text"}, "'data' is 1, expected 784 x 6"),
        ({"data": np.zeros((784, 6), complex)}, "'data' holds complex128 values, expected real"),
        ({"data": with_value(np.nan)}, "'data' has values outside [0, 1]"),
        ({"data": with_value(np.inf)}, "'data' has values outside [0, 1]"),
        ({"data": with_value(-0.01)}, "'data' has values outside [0, 1]"),
        ({"data": with_value(1.01)}, "'data' has values outside [0, 1]"),
        ({"data": with_value(255.0)}, "'data' has values outside [0, 1]"),
    ],
)
def test_wrong_content(changes, reason, tmp_path):
    path = save_matlab(tmp_path / FILE_NAME, **matrices(**changes))
    with pytest.raises(DataError) as error:
        read_chardata(path, COUNTS)
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).startswith(f"{path}: {reason}")


def test_cut_file(tmp_path):
    """Cut anywhere, the file is refused; the labels, which stand last, are not needed."""
    path = save_matlab(tmp_path / FILE_NAME, **matrices())
    content = path.read_bytes()
    whole = read_chardata(path, COUNTS)
    refused = 0
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        try:
            read = read_chardata(path, COUNTS)
        except DataError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1
            refused += 1
        else:
            assert all(torch.equal(read[key], whole[key]) for key in COUNTS)
    assert refused > 0.8 * len(content) / 7


@pytest.mark.parametrize(
    "content", [b"", b"<html>no such file</html>", bytes(1000), b"\x89HDF\r\n\x1a\n" + bytes(600)]
)
def test_not_a_matlab_file(content, tmp_path):
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_chardata(path, COUNTS)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1


def test_oversized_file_is_refused_unread(tmp_path):
    path = tmp_path / FILE_NAME
    path.touch()
    with open(path, "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="longer than the "):
        read_chardata(path, COUNTS)


def matlab_element(kind: int, content: bytes, said: int | None = None) -> bytes:
    """An element of a MATLAB 5 file, which says that it has ``said`` bytes."""
    size = len(content) if said is None else said
    return struct.pack("<II", kind, size) + content + bytes(-len(content) % 8)


def matlab_single(name: bytes, shape: tuple[int, int], said: int | None = None) -> bytes:
    """A single matrix of zeros, 784 x 6 in truth, said to have ``shape`` and ``said`` bytes."""
    return matlab_element(
        14,
        matlab_element(6, struct.pack("<II", 7, 0))
        + matlab_element(5, struct.pack("<ii", *shape))
        + matlab_element(1, name)
        + matlab_element(7, bytes(4 * 784 * 6), said),
    )


@pytest.mark.parametrize(
    ("shape", "said", "reason"),
    [
        ((784, 2**31 - 1), None, "'data' is 784 x 2147483647, expected 784 x 6"),
        ((784, 6), 0xFFFFFFF0, "cannot be read as a MATLAB file: "),
    ],
    ids=["shape of 6 TB", "4 GB in the right shape"],
)
def test_absurd_header(shape, said, reason, tmp_path, memory_growth):
    head = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    tail = matlab_single(b"testdata", (784, 6))
    path = tmp_path / FILE_NAME
    counts = {"data": 6, "testdata": 6}
    path.write_bytes(head + matlab_single(b"data", (784, 6)) + tail)
    assert read_chardata(path, counts)["data"].max() == 0

    path.write_bytes(head + matlab_single(b"data", shape, said) + tail)
    growth = memory_growth()
    with pytest.raises(DataError) as error:
        read_chardata(path, counts)
    assert str(error.value).startswith(f"{path}: {reason}")
    assert growth() < 20 << 20
