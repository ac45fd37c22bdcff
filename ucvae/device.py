"""Where the computation runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ucvae.errors import ConfigError

if TYPE_CHECKING:
    import torch


def gpus() -> int:
    """Return how many CUDA devices this process can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def resolve(name: str) -> torch.device:
    """Turn the ``device`` key into a device that this machine has.

    Args:
        name: ``auto`` (the first CUDA device, or the CPU where there is none), ``cpu``, ``cuda``
            or ``cuda:N``.

    Raises:
        ConfigError: the name is none of these, or this machine has no such device; the message
            lists what it has.
    """
    import torch

    count = gpus()
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
    if match and int(match[1] or 0) < count:
        # For convolutions, unlike for matrix products, torch's default is not float32 but TF32.
        torch.backends.cudnn.allow_tf32 = False
        return torch.device("cuda", int(match[1] or 0))
    here = ", ".join(["auto", "cpu", *(["cuda"] if count else [])])
    here += "".join(f", cuda:{index}" for index in range(count))
    fault = "this machine has no such device" if match else "no such device"
    raise ConfigError(f"device={name}: {fault}; here: {here}")
