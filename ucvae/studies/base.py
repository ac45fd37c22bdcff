"""What every study offers to the commands, and what several of them need."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ucvae.chains import LaggedChains
from ucvae.data.base import ImageData
from ucvae.estimators.base import Estimate
from ucvae.estimators.coupled import Coupled
from ucvae.models.vae import VAE

# Calls between two looks at whether beta has settled, how far its mean may then have moved, and
# after how many looks it is taken as it is.
BETA_CALLS = 50
BETA_SETTLED = 0.01
BETA_LOOKS = 20


class Study:
    """A measurement of a trained model: a dataclass whose fields are its settings.

    Attributes:
        name: of the choice, ``study=NAME``.
    """

    name: str

    def check(self, model: VAE, data: ImageData) -> None:
        """Refuse what the study cannot work on; called before training, and before the study.

        Raises:
            ConfigError: one line that says what is allowed.
        """

    def __call__(
        self,
        model: VAE,
        data: ImageData,
        seed: int,
        folder: Path,
        between: Callable[[], object] = lambda: None,
    ) -> dict[str, Any]:
        """Study a model, and write tables and figures.

        Args:
            model: on the data's device.
            data: on the device.
            seed: the root of the study's draws.
            folder: where the files go; it exists.
            between: called now and then, for what may interrupt the study.

        Returns:
            Plain numbers for ``result.json``, which are ``name``, ``settings`` and ``files`` of the
            study, and what it found.

        Raises:
            ConfigError: the study cannot work on this model or these data.
            RunError: a file cannot be written.
        """
        self.check(model, data)
        settings = {
            field: value.name if isinstance(value, enum.Enum) else value
            for field, value in vars(self).items()
        }
        found = self.measure(model, data, seed, folder, between)
        return {"name": self.name, "settings": settings, **found}

    def measure(
        self,
        model: VAE,
        data: ImageData,
        seed: int,
        folder: Path,
        between: Callable[[], object],
    ) -> dict[str, Any]:
        """Do the work of a call; returns ``files`` (their names) and the study's own numbers."""
        raise NotImplementedError

    def rows(self, found: dict[str, Any]) -> dict[str, str]:
        """Rows of the terminal's table, from what a call returned."""
        raise NotImplementedError


def settle_beta(coupled: Coupled, chains: Callable[[], LaggedChains]) -> float:
    """Let an estimator adapt its beta to a fixed model as in training, until it has settled.

    Its mean over 50 calls is compared with that over the 50 calls before. What is returned is
    constant from then on: the chains that a study reports have all the same beta.

    Args:
        coupled: whose rule is followed; it is left with the settled beta.
        chains: runs the chains of a batch of images with ``coupled.current_beta``.
    """
    previous = mean = float(coupled.current_beta)
    for look in range(BETA_LOOKS):
        total = 0.0
        for _ in range(BETA_CALLS):
            coupled.adapt(Estimate(torch.zeros(()), None, chains=chains()))
            total += float(coupled.current_beta)
        previous, mean = mean, total / BETA_CALLS
        if look and abs(mean - previous) < BETA_SETTLED:
            break
    coupled.current_beta = torch.tensor(mean, dtype=torch.float64)
    return mean
