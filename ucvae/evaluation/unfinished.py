"""What an interrupted evaluation has finished, kept on disk until its result is written.

The file's name has a hash of what the result depends on: settings, seed, weights, images, device,
ucvae's version; not of the code between two versions, as in a training that is resumed. So the same
command finds what it had begun, and any other begins afresh. It is written atomically; two equal
evaluations at once do the work twice, and harm nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ucvae import checkpoint
from ucvae.errors import RunError


class Unfinished:
    """One evaluation's file, ``unfinished-NAME-HASH.pt`` in a folder.

    Args:
        folder: of the run's evaluations, which need not exist; None keeps nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.path: Path | None = None

    def find(self, name: str, key: str, **kinds: type) -> dict[str, Any] | None:
        """What was kept of the evaluation with this name and key, on the CPU; None for nothing.

        Raises:
            RunError: the file is damaged; it may be deleted.
        """
        if self.folder is None:
            return None
        self.path = self.folder / f"unfinished-{name}-{key[:16]}.pt"
        if not self.path.exists():
            return None
        try:
            return checkpoint.load(self.path, **kinds)
        except RunError as error:
            raise RunError(f"{error}; delete it to evaluate from the start") from error

    def keep(self, state: dict[str, Any]) -> None:
        """Replace what is kept; tensors and plain values.

        Raises:
            RunError: the file cannot be written.
        """
        if self.path is None:
            return
        own = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save(own, state)
            own.replace(self.path)
        except OSError as error:
            raise RunError(f"evaluation: cannot write {self.path}: {error.strerror}") from error

    def remove(self) -> None:
        """Forget it: the result is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def digest(plain: Any, tensors: Iterable[Tensor]) -> str:
    """SHA-256 of plain values, by their ``repr``, and of tensors, by type, shape and content."""
    found = hashlib.sha256(repr(plain).encode())
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(content.numpy().data)
    return found.hexdigest()
