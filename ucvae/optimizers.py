"""Optimizers of torch, with the settings that the experiments of the field vary."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

import torch
from torch import nn

from ucvae.config import require

# Far above any that trains; what torch's optimizers take has to be a float32.
LARGEST_RATE = 1e6


class Schedule(Enum):
    """Of the learning rate.

    ``steps`` is torch's ``MultiStepLR``: it is multiplied with ``gamma`` at each milestone.
    ``burda`` is that of Burda et al 2016, Section 5: ``10^(-i/7)`` for ``3^i`` epochs, i = 0, ...,
    7, which are 3,280 epochs in all; later ones go on at the last rate.
    """

    constant = "constant"
    steps = "steps"
    burda = "burda"


@dataclass(kw_only=True)
class Optimizer:
    """What the optimizers share.

    Attributes:
        lr: the learning rate of the first epoch.
        schedule: what becomes of it.
        milestones: epochs, counted from 0, that begin with another rate (``steps``).
        gamma: what the rate is multiplied with at each of them.
    """

    lr: float
    schedule: Schedule = Schedule.constant
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, f"lr must be positive and finite, got {self.lr}")
        ascending = [0, *self.milestones]
        require(
            all(before < after for before, after in pairwise(ascending)),
            f"milestones must be epochs from 1 on, in ascending order, got {self.milestones}",
        )
        require(
            bool(self.milestones) == (self.schedule is Schedule.steps),
            f"milestones must be given with schedule=steps and with no other, got "
            f"{self.milestones} with schedule={self.schedule.value}",
        )
        require(0 < self.gamma < math.inf, f"gamma must be positive and finite, got {self.gamma}")
        require(self.lr <= LARGEST_RATE, f"lr must be at most {LARGEST_RATE:g}, got {self.lr}")
        growth = len(self.milestones) * math.log(self.gamma)
        require(
            math.log(self.lr) + growth <= math.log(LARGEST_RATE) + 1e-9,  # rounding
            f"gamma must leave lr at most {LARGEST_RATE:g} after {len(self.milestones)} "
            f"milestones, got gamma={self.gamma} with lr={self.lr}",
        )

    def without_effect(self) -> dict[str, str]:
        """``gamma`` where there are no milestones."""
        return {} if self.milestones else {"gamma": f"schedule={self.schedule.value}"}

    def learning_rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        if self.schedule is Schedule.steps:
            return self.lr * self.gamma ** sum(epoch >= first for first in self.milestones)
        if self.schedule is Schedule.burda:
            stage = sum(epoch >= (3**i - 1) // 2 for i in range(1, 8))
            return self.lr * 10 ** (-stage / 7)
        return self.lr


@dataclass
class RMSProp(Optimizer):
    """RMSProp; the paper's, at its learning rate."""

    lr: float = 5e-4
    decay: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_eps(self.eps)
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

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_eps(self.eps)
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


def _require_eps(eps: float) -> None:
    require(0 < eps < math.inf, f"eps must be positive and finite, got {eps}")
