"""What every data set becomes: three splits of uint8 images that live on the device."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ucvae.config import require
from ucvae.data.binarization import fresh_draw, frozen_draw
from ucvae.errors import DataError

SPLITS = ("train", "valid", "test")
BINARIZATIONS = ("static", "dynamic", "none")

_CHUNK_IMAGES = 4096


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set's splits, with what a result must say about them.

    A model sees images as floats in [0, 1]: uint8 / (``levels`` - 1).

    Attributes:
        name: names data set and binarisation together, as in ``dataset=NAME``.
        binarization: "static" (one draw, frozen), "dynamic" (training images drawn anew each
            epoch, valid and test frozen) or "none".
        levels: number of values a pixel takes: 2 (binary) or 256.
        train: uint8 [N, C, H, W] in 0..levels - 1, except that a dynamic set holds the grey
            levels 0..255 to draw from; use :meth:`epoch_images`.
        valid: uint8 [N, C, H, W] in 0..levels - 1.
        test: uint8 [N, C, H, W] in 0..levels - 1.
        split_sha256: SHA-256 of each split's bytes as held, in C order, by split.
    """

    name: str
    binarization: str
    levels: int
    train: Tensor
    valid: Tensor
    test: Tensor
    split_sha256: dict[str, str]

    @classmethod
    def from_splits(
        cls, name: str, binarization: str, levels: int, splits: Mapping[str, Tensor]
    ) -> ImageData:
        """Take the splits as they are, uint8 [N, C, H, W] on the CPU, and record their hashes.

        Raises:
            DataError: they are of another kind than :class:`ImageData` says, or too few.
        """
        _check_splits(name, binarization, splits)
        _check_levels(name, binarization, levels, splits)
        held = {split: splits[split].contiguous() for split in SPLITS}
        sha256 = {split: hashlib.sha256(held[split].numpy().data).hexdigest() for split in SPLITS}
        return cls(name, binarization, levels, split_sha256=sha256, **held)

    @classmethod
    def from_grey(
        cls, name: str, binarization: str, grey: Mapping[str, Tensor], top: int = 255
    ) -> ImageData:
        """Binarise grey splits, uint8 [N, C, H, W] in 0..``top``, as ``binarization`` says.

        Only a static set may have ``top`` other than 255.

        Raises:
            DataError: they are no such splits.
        """
        _check_splits(name, binarization, grey)
        _check_range(name, top, grey, SPLITS)
        if top != 255 and binarization != "static":
            raise DataError(f"dataset {name}: only static binarization may have a top, got {top}")
        if binarization == "none":
            return cls.from_splits(name, binarization, 256, grey)
        drawn = SPLITS if binarization == "static" else ("valid", "test")
        splits = {
            split: frozen_draw(images, split, top) if split in drawn else images
            for split, images in grey.items()
        }
        return cls.from_splits(name, binarization, 2, splits)

    def to(self, device: torch.device | str) -> ImageData:
        """Give the same data with all splits on ``device``."""
        moved = {split: getattr(self, split).to(device) for split in SPLITS}
        return dataclasses.replace(self, **moved)

    def epoch_images(self, generator: torch.Generator) -> Tensor:
        """Give the training images of one epoch, uint8 [N, C, H, W] in 0..levels - 1.

        A dynamic set draws them anew from ``generator``, which must be on the images' device;
        others return ``train`` itself and leave the generator alone.
        """
        if self.binarization == "dynamic":
            return fresh_draw(self.train, generator)
        return self.train

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    @property
    def train_mean(self) -> Tensor:
        """Mean training image as a model sees it, float32 [C, H, W] in [0, 1].

        For a dynamic set it is the mean over the draws too: that of grey level / 255.
        """
        top = 255 if self.binarization == "dynamic" else self.levels - 1
        # Whole-number sums are exact, so the mean does not depend on the device or the chunks.
        total = sum(part.sum(0, dtype=torch.int64) for part in self.train.split(_CHUNK_IMAGES))
        return (total.double() / (top * len(self.train))).float()


def _check_splits(name: str, binarization: str, splits: Mapping[str, Tensor]) -> None:
    """Refuse what is no data set: wrong numbers would come of it without a word."""
    if binarization not in BINARIZATIONS:
        raise DataError(
            f"dataset {name}: binarization must be one of {', '.join(BINARIZATIONS)}, got "
            f"{binarization}"
        )
    for split in SPLITS:
        if split not in splits:
            raise DataError(f"dataset {name}: no split {split}; there must be {', '.join(SPLITS)}")
        images = splits[split]
        if not isinstance(images, Tensor):
            raise DataError(
                f"dataset {name}: {split} must be a torch.Tensor, got {type(images).__name__}"
            )
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DataError(
                f"dataset {name}: {split} must be uint8 [N, C, H, W], got "
                f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            )
        if images.shape[1:] != splits["train"].shape[1:] or 0 in images.shape[1:]:
            raise DataError(
                f"dataset {name}: {split} has images {list(images.shape[1:])}; all splits must "
                "have the same, of at least a pixel"
            )
        least = 1 if split == "train" else 2  # of one image there is no standard error
        if len(images) < least:
            number = f"{least} image{'s' * (least > 1)}"
            raise DataError(
                f"dataset {name}: {split} must have at least {number}, got {len(images)}"
            )


def _check_levels(name: str, binarization: str, levels: int, splits: Mapping[str, Tensor]) -> None:
    if levels not in (2, 256):
        raise DataError(f"dataset {name}: levels must be 2 or 256, got {levels}")
    if binarization == "dynamic" and levels != 2:
        raise DataError(f"dataset {name}: with dynamic binarization levels must be 2, got {levels}")
    # What a dynamic set holds of its training images is the grey levels to draw from.
    fixed = ("valid", "test") if binarization == "dynamic" else SPLITS
    _check_range(name, levels - 1, splits, fixed)


def _check_range(
    name: str, top: int, splits: Mapping[str, Tensor], checked: tuple[str, ...]
) -> None:
    for split in checked:
        largest = int(splits[split].max())
        if largest > top:
            raise DataError(
                f"dataset {name}: the values of {split} must be in 0..{top}, got {largest}"
            )


def as_input(images: Tensor, levels: int) -> Tensor:
    """Give images uint8 [n, C, H, W] as a model sees them: float32 [n, P] in [0, 1]."""
    return images.flatten(1).float() / (levels - 1)


def split_train(images: Tensor, num_valid: int) -> dict[str, Tensor]:
    """Hold the last ``num_valid`` of a set's training images out for validation."""
    cut = len(images) - num_valid
    return {"train": images[:cut], "valid": images[cut:]}


def require_one_of(field: str, value: str, names: Mapping[str, str]) -> None:
    """Raise ``ValueError`` naming ``field`` unless ``value`` is a key of ``names``."""
    require(value in names, f"{field} must be one of {', '.join(names)}, got {value}")
