"""One contract for all data sets, and what each one's splits must be."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from sklearn.datasets import load_digits

from ucvae.config import build
from ucvae.data import fashion_mnist, mnist, mnist_larochelle, omniglot
from ucvae.data.base import SPLITS, ImageData
from ucvae.data.digits import SPLIT_SIZES, Digits, split_order
from ucvae.errors import ConfigError, DataError

from .small_files import (
    IDX_FOLDERS,
    amat_bytes,
    marked_images,
    matlab_columns,
    read_marks,
    save_matlab,
    small_idx,
    write_all,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "dataset"


@dataclasses.dataclass
class Facts:
    """What is known of a data set: its result's head, split sizes and first hash digits."""

    binarization: str
    levels: int
    sizes: tuple[int, int, int]
    side: int
    sha256: tuple[str, str, str] | None
    needs: str | None
    channels: int = 1


MNIST_SIZES = (50_000, 10_000, 10_000)
OMNIGLOT_SIZES = (23_000, 1_345, 8_070)
MNIST_HELD_OUT = ("d30bca222a2d2bbc", "dd682f67bec2119c")

# The frozen draws are frozen: a hash here never changes. (Omniglot's, Larochelle's and CIFAR-10's
# are not pinned: the files at hand may be a stand-in, or absent.)
TABLE = {
    "digits": Facts(
        "static",
        2,
        (1197, 300, 300),
        8,
        ("7fbd78baf5d405f6", "c5245c5fa4cf9370", "637710a26344e3c4"),
        None,
    ),
    "mnist": Facts("static", 2, MNIST_SIZES, 28, ("f0f9a04c169be61a", *MNIST_HELD_OUT), "MNIST"),
    "mnist_dynamic": Facts(
        "dynamic", 2, MNIST_SIZES, 28, ("c80ceb24eedca80f", *MNIST_HELD_OUT), "MNIST"
    ),
    "mnist_larochelle": Facts("static", 2, MNIST_SIZES, 28, None, "BinaryMNIST"),
    "fashion_mnist": Facts(
        "none",
        256,
        MNIST_SIZES,
        28,
        ("0a8ba65008484d49", "36c6e3dcb65f0d5f", "c867c93ff9536059"),
        "FashionMNIST",
    ),
    "fashion_mnist_binary": Facts(
        "static",
        2,
        MNIST_SIZES,
        28,
        ("4417eb9f5d6f2f09", "dd9ec9fef83d4435", "38b6104cd6055df4"),
        "FashionMNIST",
    ),
    "omniglot": Facts("dynamic", 2, OMNIGLOT_SIZES, 28, None, "OMNIGLOT"),
    "cifar10": Facts(
        "none", 256, (45_000, 5_000, 10_000), 32, None, "cifar-10-batches-py", channels=3
    ),
}


def settings(name: str):
    return build(OmegaConf.load(CONFIGS / f"{name}.yaml"), "dataset")


def test_every_shipped_config_is_in_the_table():
    shipped = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert set(TABLE) <= shipped


@pytest.mark.parametrize("name", TABLE)
def test_contract(name, request):
    facts = TABLE[name]
    folder = Path("nowhere")
    if facts.needs:
        folder = request.getfixturevalue("data_dir")
        if not (folder / facts.needs).is_dir():
            pytest.skip(f"real data: no {facts.needs} in {folder}")
    data = settings(name).load(folder)

    assert (data.name, data.binarization, data.levels) == (name, facts.binarization, facts.levels)
    assert data.image_shape == (facts.channels, facts.side, facts.side)
    for split, size in zip(("train", "valid", "test"), facts.sizes, strict=True):
        images = getattr(data, split)
        grey = split == "train" and facts.binarization == "dynamic"
        assert images.dtype == torch.uint8
        assert images.shape == (size, *data.image_shape)
        assert images.max() == (255 if grey else facts.levels - 1)
        assert data.split_sha256[split] == hashlib.sha256(images.numpy().tobytes()).hexdigest()
    if facts.sha256:
        assert tuple(sha[:16] for sha in data.split_sha256.values()) == facts.sha256

    epoch = data.epoch_images(torch.Generator().manual_seed(0))
    assert epoch.dtype == torch.uint8 and epoch.shape == data.train.shape
    assert epoch.max() == facts.levels - 1
    top = data.train.max().double()
    assert data.train_mean.dtype == torch.float32
    torch.testing.assert_close(
        data.train_mean, (data.train.double().mean(0) / top).float(), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("module", [mnist, fashion_mnist])
def test_real_test_images_are_not_in_training(module, data_dir):
    grey = module.FILES.load_grey(data_dir)
    images = [image.numpy().tobytes() for split in grey.values() for image in split]
    assert len(set(images)) == len(images) == 70_000


@pytest.mark.parametrize("module", [mnist, fashion_mnist])
def test_idx_splits(module, tmp_path, monkeypatch):
    content = small_idx(monkeypatch, module)
    write_all(tmp_path / IDX_FOLDERS[module], content)
    for binarization in module.NAMES:
        kind = module.Mnist if module is mnist else module.FashionMnist
        data = kind(binarization).load(tmp_path)
        assert data.name == module.NAMES[binarization]
        assert read_marks(data.train) == (list(range(20)), {1})
        assert read_marks(data.valid) == (list(range(20, 30)), {1})
        assert read_marks(data.test) == (list(range(10)), {2})


def test_larochelle_splits(tmp_path, monkeypatch):
    counts = {"train": 20, "valid": 7, "test": 9}
    monkeypatch.setattr(mnist_larochelle, "COUNTS", counts)
    content = {
        mnist_larochelle.FILE_NAMES[split]: amat_bytes(marked_images(count, mark))
        for mark, (split, count) in enumerate(counts.items(), start=1)
    }
    write_all(tmp_path / "BinaryMNIST", content)
    data = mnist_larochelle.MnistLarochelle().load(tmp_path)
    assert (data.name, data.binarization, data.levels) == ("mnist_larochelle", "static", 2)
    for mark, (split, count) in enumerate(counts.items(), start=1):
        assert read_marks(getattr(data, split)) == (list(range(count)), {mark})


def test_omniglot_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot, "COUNTS", {"data": 30, "testdata": 8})
    monkeypatch.setattr(omniglot, "NUM_VALID", 10)
    save_matlab(
        tmp_path / "OMNIGLOT" / "chardata.mat",
        data=matlab_columns(marked_images(30, 1)),
        testdata=matlab_columns(marked_images(8, 2)),
    )
    for binarization, name in omniglot.NAMES.items():
        data = omniglot.Omniglot(binarization).load(tmp_path)
        assert (data.name, data.binarization) == (name, binarization)
        assert read_marks(data.train) == (list(range(20)), {1})
        assert read_marks(data.valid) == (list(range(20, 30)), {1})
        assert read_marks(data.test) == (list(range(8)), {2})


def test_digits_order_deals_every_image_once():
    order = split_order()
    assert torch.equal(order.sort().values, torch.arange(1797))
    assert sum(SPLIT_SIZES.values()) == 1797


def test_digits_are_shuffled():
    # The library lists writers one after another; dealt in order, the splits would be strangers.
    # The mean index of a random 300 of 1797 is 898 with standard error
    # 1797 / sqrt(12 * 300) * sqrt(1 - 300 / 1797) = 27; five of them are 137. In order, the test
    # split's would be 1647.
    assert abs(split_order()[-300:].double().mean() - 898) < 137


def test_digits_bits_are_drawn_from_the_shuffled_images():
    data = Digits().load(Path("nowhere"))
    dealt = torch.from_numpy(load_digits().images)[split_order()].unsqueeze(1)
    bits = torch.cat([data.train, data.valid, data.test])
    assert (bits[dealt == 0] == 0).all() and (bits[dealt == 16] == 1).all()
    # Each of the other levels v is one with chance v / 16; the sum of squared standard scores
    # over 15 levels is chi-square: mean 15, standard deviation sqrt(30) = 5.5; 15 + 5 * 5.5 = 42.
    score = 0.0
    for level in range(1, 16):
        found = bits[dealt == level].double()
        p = level / 16
        score += ((found.mean() - p) ** 2 / (p * (1 - p) / len(found))).item()
    assert score < 42


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("mnist", "static, dynamic"),
        ("fashion_mnist", "none, static, dynamic"),
        ("omniglot", "dynamic, static"),
    ],
)
def test_unknown_binarization(name, allowed):
    node = OmegaConf.load(CONFIGS / f"{name}.yaml")
    node.binarization = "sometimes"
    with pytest.raises(ConfigError) as error:
        build(node, "dataset")
    assert str(error.value) == (f"dataset.binarization must be one of {allowed}, got sometimes")


def test_to_moves_every_split_and_keeps_the_rest():
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    data = ImageData.from_splits(
        "name", "static", 2, {"train": images, "valid": images, "test": images}
    )
    moved = data.to("meta")
    assert {moved.train.device.type, moved.valid.device.type, moved.test.device.type} == {"meta"}
    assert (moved.name, moved.levels, moved.split_sha256) == ("name", 2, data.split_sha256)


def test_sha256_is_of_the_bytes_in_c_order():
    images = torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2)
    turned = images.transpose(2, 3)
    data = ImageData.from_splits(
        "name", "none", 256, {"train": images, "valid": turned, "test": images}
    )
    expected = hashlib.sha256(np.ascontiguousarray(turned.numpy()).tobytes()).hexdigest()
    assert data.split_sha256["valid"] == expected != data.split_sha256["train"]


class TestOnesOwnData:
    """Splits that somebody made: what is wrong with them is told, not trained on."""

    BITS = torch.ones(3, 1, 2, 5, dtype=torch.uint8)

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"levels": 17}, "levels must be 2 or 256, got 17"),
            (
                {"levels": 256, "binarization": "dynamic"},
                "with dynamic binarization levels must be 2, got 256",
            ),
            ({"train": BITS.numpy()}, "train must be a torch.Tensor, got ndarray"),
            (
                dict.fromkeys(SPLITS, BITS[..., :0]),
                "train has images [1, 2, 0]; all splits must have the same, of at least a pixel",
            ),
            (
                {"binarization": "dyn"},
                "binarization must be one of static, dynamic, none, got dyn",
            ),
            ({"valid": None}, "no split valid; there must be train, valid, test"),
            ({"train": BITS.float()}, "train must be uint8 [N, C, H, W], got float32 [3, 1, 2, 5]"),
            ({"test": BITS[:, 0]}, "test must be uint8 [N, C, H, W], got uint8 [3, 2, 5]"),
            ({"valid": BITS[..., :4]}, "valid has images [1, 2, 4]; all splits must have the same"),
            ({"train": BITS[:0]}, "train must have at least 1 image, got 0"),
            ({"valid": BITS[:1]}, "valid must have at least 2 images, got 1"),
            ({"test": BITS[:1]}, "test must have at least 2 images, got 1"),
            ({"test": 2 * BITS}, "the values of test must be in 0..1, got 2"),
            ({"train": 255 * BITS}, "the values of train must be in 0..1, got 255"),
        ],
    )
    def test_splits_are_checked(self, changes, told):
        splits = {split: changes.get(split, self.BITS) for split in SPLITS}
        splits = {split: images for split, images in splits.items() if images is not None}
        kind = changes.get("binarization", "static")
        with pytest.raises(DataError) as error:
            ImageData.from_splits("mine", kind, changes.get("levels", 2), splits)
        assert str(error.value).startswith(f"dataset mine: {told}")

    @pytest.mark.parametrize(
        ("binarization", "top", "images", "told"),
        [
            ("static", 16, 17 * BITS, "the values of train must be in 0..16, got 17"),
            ("dynamic", 16, BITS, "only static binarization may have a top, got 16"),
            ("none", 16, BITS, "only static binarization may have a top, got 16"),
            ("static", 255, BITS / 2, "train must be uint8 [N, C, H, W], got float32"),
            ("dyn", 255, BITS, "binarization must be one of static, dynamic, none, got dyn"),
        ],
    )
    def test_grey_levels_are_checked(self, binarization, top, images, told):
        with pytest.raises(DataError) as error:
            ImageData.from_grey("mine", binarization, {split: images for split in SPLITS}, top)
        assert str(error.value).startswith(f"dataset mine: {told}")

    @pytest.mark.parametrize("binarization", ["static", "dynamic", "none"])
    def test_the_least_that_is_taken(self, binarization):
        grey = {"train": 255 * self.BITS[:1], "valid": self.BITS[:2], "test": self.BITS[:2]}
        data = ImageData.from_grey("mine", binarization, grey)
        assert data.train.max() == (1 if binarization == "static" else 255)
