"""Optimizers of torch, with the settings that the experiments of the field vary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ucvae.config import require


@dataclass
class RMSProp:
    """RMSProp; the paper's, at its learning rate."""

    lr: float = 5e-4
    decay: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check(self.lr, self.eps)
        require(0 <= self.decay < 1, f"decay must be in [0, 1), got {self.decay}")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        return torch.optim.RMSprop(parameters, lr=self.lr, alpha=self.decay, eps=self.eps)


@dataclass
class Adam:
    """Adam; eps as in Burda et al 2016."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-4

    def __post_init__(self) -> None:
        _check(self.lr, self.eps)
        require(0 <= self.beta1 < 1, f"beta1 must be in [0, 1), got {self.beta1}")
        require(0 <= self.beta2 < 1, f"beta2 must be in [0, 1), got {self.beta2}")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        return torch.optim.Adam(
            parameters, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True
        )


def _check(lr: float, eps: float) -> None:
    require(0 < lr < float("inf"), f"lr must be positive and finite, got {lr}")
    require(0 < eps < float("inf"), f"eps must be positive and finite, got {eps}")
