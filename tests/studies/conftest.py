"""What the tests of studies share: small data, and what a PNG and a CSV hold."""

import csv
import struct

import pytest
import torch

from ucvae.data.base import SPLITS, ImageData


@pytest.fixture(scope="module")
def bits():
    """40 random binary images of 2 x 3 pixels, the same in every split."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(2, (40, 1, 2, 3), generator=generator, dtype=torch.uint8)
    return ImageData.from_splits("bits", "static", 2, {split: images for split in SPLITS})


@pytest.fixture(scope="session")
def read_csv():
    """A function that reads a table as a list of rows."""

    def read(path):
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture(scope="session")
def is_picture():
    """A function that says whether a file is a PNG of a size that a page can show."""

    def check(path):
        head = path.read_bytes()[:24]
        width, height = struct.unpack(">II", head[16:24])
        small = path.stat().st_size < 500_000
        return (
            head[:8] == b"\x89PNG\r\n\x1a\n"
            and 400 < width < 2500
            and 300 < height < 2500
            and small
        )

    return check
