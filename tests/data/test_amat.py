"""The reader of Larochelle's text files."""

import numpy as np
import pytest

from ucvae.data.mnist_larochelle import read_amat
from ucvae.errors import DataError

from .small_files import amat_bytes, marked_images, write_all

IMAGES = marked_images(5, 3)
LINE = amat_bytes(IMAGES[:1])


def test_reads_what_was_written(tmp_path):
    images = np.random.RandomState(0).randint(0, 2, (5, 28, 28))
    path = tmp_path / "file.amat"
    path.write_bytes(amat_bytes(images))
    assert np.array_equal(read_amat(path, 5)[:, 0].numpy(), images)
    write_all(tmp_path, {"file.amat": amat_bytes(images)}, packed=True)
    assert np.array_equal(read_amat(tmp_path / "file.amat.gz", 5)[:, 0].numpy(), images)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1],
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.replace(b"\n", b" \n"),
        lambda text: text.replace(b" ", b"  "),
        lambda text: text.replace(b" ", b"\t"),
        lambda text: b" " + text.replace(b"\n", b"\n "),
    ],
    ids=["no last newline", "crlf", "space at end", "two spaces", "tabs", "space at start"],
)
def test_white_space_does_not_matter(change, tmp_path):
    path = tmp_path / "file.amat"
    text = change(amat_bytes(IMAGES)).rstrip(b" ")
    path.write_bytes(text)
    assert np.array_equal(read_amat(path, 5)[:, 0].numpy() * 255, IMAGES)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", ": ends after line 0, expected 5"),
        (LINE * 4, ": ends after line 4, expected 5"),
        (LINE * 6, ": has more than the 5 lines expected"),
        (LINE * 5 + b"\n", ": has more than the 5 lines expected"),
        (LINE * 2 + b"\n" + LINE * 2, ", line 3: has 0 numbers, expected 784"),
        (LINE * 4 + LINE[:-3] + b"\n", ", line 5: has 783 numbers, expected 784"),
        (LINE * 4 + b"1 " + LINE, ", line 5: has 785 numbers, expected 784"),
        (LINE * 4 + LINE[: len(LINE) // 2], ", line 5: has 392 numbers, expected 784"),
        (LINE + b"2" + LINE[1:] + LINE * 3, ", line 2: has '2', expected 0 or 1"),
        (LINE + b"x" + LINE[1:] + LINE * 3, ", line 2: has 'x', expected 0 or 1"),
        (LINE + b"-1" + LINE[1:] + LINE * 3, ", line 2: has '-1', expected 0 or 1"),
        (LINE + b"0.5" + LINE[1:] + LINE * 3, ", line 2: has '0.5', expected 0 or 1"),
        (LINE + b"1.0" + LINE[1:] + LINE * 3, ", line 2: has '1.0', expected 0 or 1"),
        (LINE + b"\xff" + LINE[1:] + LINE * 3, r", line 2: has '\\xff', expected 0 or 1"),
        (LINE.replace(b" ", b","), ", line 1: has 1 numbers, expected 784"),
        (b"\0" * 1568, ", line 1: has 1 numbers, expected 784"),
        (b"0" * 100_000, ": longer than the 15680 bytes that such a file may have"),
        (b"0" * 10_000, ", line 1: has 1 numbers, expected 784"),
    ],
)
def test_damaged_amat(text, reason, tmp_path):
    path = tmp_path / "file.amat"
    path.write_bytes(text)
    with pytest.raises(DataError) as error:
        read_amat(path, 5)
    assert str(error.value) == f"{path}{reason}"
