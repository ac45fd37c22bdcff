"""Frozen draws stay frozen; fresh draws are fresh; both have the right law."""

import hashlib

import numpy as np
import pytest
import torch

from ucvae.data.base import ImageData
from ucvae.data.binarization import fresh_draw, frozen_draw

REPEATS = 40_000


def every_level(top: int) -> torch.Tensor:
    """Each level 0..top ``REPEATS`` times, uint8 [REPEATS, top + 1]."""
    return torch.arange(top + 1, dtype=torch.uint8).repeat(REPEATS, 1)


def law_score(bits: torch.Tensor, top: int) -> float:
    """How far the share of ones of each level strays from level / top, in standard deviations.

    The squared standard scores of the top - 1 levels strictly between black and white sum to a
    chi-square variable with mean n = top - 1 and standard deviation sqrt(2 n); returned is its
    distance from the mean in units of that deviation.
    """
    p = torch.arange(top + 1, dtype=torch.float64) / top
    share = bits.double().mean(0)
    assert share[0] == 0 and share[-1] == 1
    score = ((share - p) ** 2 / (p * (1 - p) / len(bits)))[1:-1].sum().item()
    n = top - 1
    return abs(score - n) / (2 * n) ** 0.5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The seeds are fixed, so the limit of 5 deviations asks: is the law right, beyond chance?
def test_law_of_the_fresh_draw():
    assert law_score(fresh_draw(every_level(255), generator()), 255) < 5


@pytest.mark.parametrize("top", [255, 16])
def test_law_of_the_frozen_draw(top):
    assert law_score(frozen_draw(every_level(top), "train", top), top) < 5


def test_law_score_rejects_a_draw_that_is_one_level_off():
    # r <= g in place of r < g moves a chance by 1/255; against the standard error of
    # 0.5 / sqrt(40,000) = 0.0025 that is 1.6 at a level, and 250 levels make it plain.
    grey = every_level(255)
    uniform = torch.randint(255, grey.shape, generator=generator())
    wrong = (uniform <= grey).to(torch.uint8)
    wrong[:, 0] = 0
    assert law_score(wrong, 255) > 5


def test_law_score_rejects_a_threshold():
    assert law_score((every_level(255) > 127).to(torch.uint8), 255) > 5


def test_pixels_are_drawn_independently():
    # Bits of level 128, p = 128/255: neighbours are both 1 with chance p^2 = 0.252; the share over
    # 500,000 pairs has standard error sqrt(0.252 * 0.748 / 500,000) = 0.00061; five are 0.0031.
    grey = torch.full((1000, 1000), 128, dtype=torch.uint8)
    for bits in (fresh_draw(grey, generator()), frozen_draw(grey, "train")):
        for pairs in (bits.view(-1, 2), bits.T.reshape(-1, 2)):
            assert abs(pairs.double().prod(1).mean() - (128 / 255) ** 2) < 0.0031


def test_fresh_draws_differ_from_epoch_to_epoch_and_follow_the_generator():
    grey = torch.full((100, 100), 128, dtype=torch.uint8)
    source = generator(1)
    first, second = fresh_draw(grey, source), fresh_draw(grey, source)
    # Two independent draws agree with chance p^2 + (1 - p)^2 = 0.5; over 10,000 pixels the
    # standard error is 0.005; five are 0.025.
    assert abs((first == second).double().mean() - 0.5) < 0.025
    assert torch.equal(first, fresh_draw(grey, generator(1)))
    assert (grey == 128).all()


def test_frozen_draw_is_pinned():
    grey = torch.arange(256, dtype=torch.uint8).repeat(4).view(4, 1, 16, 16)
    digest = {
        split: hashlib.sha256(frozen_draw(grey, split).numpy()).hexdigest()[:16]
        for split in ("train", "valid", "test")
    }
    assert digest == {
        "train": "eb515f0fa5ccf91c",
        "valid": "256878b49c9cb5fd",
        "test": "58fe6da83af67436",
    }


def test_frozen_draw_ignores_and_leaves_the_global_generators():
    grey = torch.full((10, 10), 100, dtype=torch.uint8)
    np.random.seed(0)
    torch.manual_seed(0)
    first = frozen_draw(grey, "test")
    assert np.random.random() == np.random.RandomState(0).random_sample()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=generator(0)))
    assert torch.equal(first, frozen_draw(grey, "test"))


def test_a_view_is_drawn_as_its_copy():
    grey = torch.arange(200, dtype=torch.uint8).view(10, 20)
    assert torch.equal(frozen_draw(grey.T, "train"), frozen_draw(grey.T.contiguous(), "train"))


def grey_splits() -> dict[str, torch.Tensor]:
    values = torch.randint(256, (3, 50, 1, 4, 4), dtype=torch.uint8, generator=generator())
    return dict(zip(("train", "valid", "test"), values, strict=True))


def test_dynamic_data():
    grey = grey_splits()
    data = ImageData.from_grey("name", "dynamic", grey)
    static = ImageData.from_grey("name", "static", grey)
    assert data.levels == 2
    assert torch.equal(data.train, grey["train"])
    assert torch.equal(data.valid, static.valid) and torch.equal(data.test, static.test)
    held_out = data.valid.clone(), data.test.clone()
    source = generator(3)
    epochs = [data.epoch_images(source) for _ in range(2)]
    assert not torch.equal(*epochs) and set(epochs[0].unique().tolist()) == {0, 1}
    assert torch.equal(data.train, grey["train"])
    assert torch.equal(data.valid, held_out[0]) and torch.equal(data.test, held_out[1])


@pytest.mark.parametrize(("binarization", "levels"), [("static", 2), ("none", 256)])
def test_other_data_are_the_same_each_epoch_and_draw_no_numbers(binarization, levels):
    data = ImageData.from_grey("name", binarization, grey_splits())
    source = generator(3)
    assert data.levels == levels
    assert data.epoch_images(source) is data.train
    assert torch.equal(source.get_state(), generator(3).get_state())


def test_train_mean_is_in_model_units():
    images = torch.tensor([0, 255, 51, 255], dtype=torch.uint8).view(2, 1, 1, 2)
    grey = {"train": images, "valid": images, "test": images}
    for binarization in ("none", "dynamic"):
        mean = ImageData.from_grey("name", binarization, grey).train_mean
        torch.testing.assert_close(mean, torch.tensor([[[0.1, 1.0]]]))
    bits = {split: (part > 0).to(torch.uint8) for split, part in grey.items()}
    mean = ImageData.from_splits("name", "static", 2, bits).train_mean
    torch.testing.assert_close(mean, torch.tensor([[[0.5, 1.0]]]))
