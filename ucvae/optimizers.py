"""Optimizers of torch, with the settings that the experiments of the field vary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from ucvae.config import require


class Schedule(Enum):
    """Of the learning rate."""

    constant = "constant"
    burda = "burda"

    def factor(self, epoch: int) -> float:
        """What the learning rate is multiplied with in an epoch, counted from 0.

        Burda's (Burda et al 2016, Section 5): ``10^(-i/7)`` for ``3^i`` epochs, i = 0, ..., 7,
        which are 3,280 epochs in all; later ones go on at the last rate.
        """
        if self is Schedule.constant:
            return 1.0
        stage = sum(epoch >= (3**i - 1) // 2 for i in range(1, 8))
        return 10 ** (-stage / 7)


class Optimizer:
    """What the optimizers share."""

    lr: float
    schedule: Schedule

    def learning_rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return self.lr * self.schedule.factor(epoch)


@dataclass
class RMSProp(Optimizer):
    """RMSProp; the paper's, at its learning rate."""

    lr: float = 5e-4
    decay: float = 0.99
    eps: float = 1e-8
    schedule: Schedule = Schedule.constant

    def __post_init__(self) -> None:
        _check(self.lr, self.eps)
        require(0 <= self.decay < 1, f"decay must be in [0, 1), got {self.decay}")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        parameters = list(parameters)
        return torch.optim.RMSprop(
            parameters,
            lr=self.lr,
            alpha=self.decay,
            eps=self.eps,
            capturable=_on_gpu(parameters),
        )


@dataclass
class Adam(Optimizer):
    """Adam; eps as in Burda et al 2016."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-4
    schedule: Schedule = Schedule.constant

    def __post_init__(self) -> None:
        _check(self.lr, self.eps)
        require(0 <= self.beta1 < 1, f"beta1 must be in [0, 1), got {self.beta1}")
        require(0 <= self.beta2 < 1, f"beta2 must be in [0, 1), got {self.beta2}")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        parameters = list(parameters)
        return torch.optim.Adam(
            parameters,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
            capturable=_on_gpu(parameters),
        )


def _on_gpu(parameters: list[nn.Parameter]) -> bool:
    """Whether steps may be captured in a CUDA graph, which wants all state on the device."""
    return all(parameter.is_cuda for parameter in parameters)


def _check(lr: float, eps: float) -> None:
    require(0 < lr < float("inf"), f"lr must be positive and finite, got {lr}")
    require(0 < eps < float("inf"), f"eps must be positive and finite, got {eps}")
