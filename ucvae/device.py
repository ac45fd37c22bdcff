"""Where the computation runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from ucvae.errors import ConfigError, OutOfMemoryError

if TYPE_CHECKING:
    import torch


def gpus() -> int:
    """Return how many CUDA devices this process can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


class Place(NamedTuple):
    """A process among those of its run.

    Attributes:
        rank: from 0 to ``size`` - 1.
        size: how many processes the run has.
        local_rank: among those on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def alone(self) -> bool:
        """Whether the run has one process."""
        return self.size == 1


ALONE = Place()


def place() -> Place:
    """This process's place, by the environment, in which ``torchrun`` tells it.

    Raises:
        ConfigError: the environment speaks of several processes, and not of all that they need.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    found = {name: os.environ.get(name, "") for name in names}
    wrong = [name for name, value in found.items() if not value.isdecimal()]
    if not os.environ.get("MASTER_ADDR"):
        wrong.append("MASTER_ADDR")
    if wrong:
        raise ConfigError(
            f"{wrong[0]}={os.environ.get(wrong[0], '')} in the environment, where "
            f"WORLD_SIZE={found['WORLD_SIZE']} says that the run has several processes; start "
            "them by torchrun, or unset WORLD_SIZE"
        )
    rank, size, local_rank, _ = map(int, found.values())
    return Place(rank, size, local_rank)


def resolve(name: str, here: Place = ALONE) -> torch.device:
    """Turn the ``device`` key into a device that this machine has.

    Args:
        name: ``auto`` (the first CUDA device, or the CPU where there is none), ``cpu``, ``cuda``
            or ``cuda:N``.
        here: this process; of several each takes a CUDA device of its own.

    Raises:
        ConfigError: the name is none of these, or this machine has no such device; the message
            lists what it has.
    """
    import torch

    count = gpus()
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
    number = match and match[1]
    if number and not here.alone:
        raise ConfigError(f"device={name}: each of {here.size} processes has its own; use cuda")
    index = int(number or here.local_rank)
    if match and index < count:
        # For convolutions, unlike for matrix products, torch's default is not float32 but TF32.
        torch.backends.cudnn.allow_tf32 = False
        return torch.device("cuda", index)
    known = ", ".join(["auto", "cpu", *(["cuda"] if count else [])])
    known += "".join(f", cuda:{index}" for index in range(count))
    fault = "this machine has no such device" if match else "no such device"
    if match and count and not here.alone:
        fault = f"this machine has no device for process {here.local_rank + 1}"
    raise ConfigError(f"device={name}: {fault}; here: {known}")


# torch has a class of its own for CUDA's allocator only; a size of 2^63 bytes has no allocator.
_SHORT = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED|size calculation overflowed")
_ASKED = re.compile(r"tried to allocate (\d[\d.]* \w+)", re.IGNORECASE)


@contextmanager
def within_memory() -> Iterator[None]:
    """Take what does not fit into memory for a request that was too large, not for a defect.

    Raises:
        OutOfMemoryError: in place of what Python or torch raise where memory does not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _SHORT.search(str(error)):
            raise
        asked = _ASKED.search(str(error))
        raise OutOfMemoryError(
            f"out of memory{f' (tried to allocate {asked[1]})' if asked else ''}; a smaller batch "
            "or model, or fewer samples, take less"
        ) from error
