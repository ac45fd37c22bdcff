r"""How long the coupled chains take to meet (Ruiz et al 2021, Fig 4 and 8).

For a trained model and each kernel, the chains of each image run until they meet, and
``tau = inf{t >= L : X_t = Y_{t-L}}`` is written down, in steps of the kernel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ucvae import figures, results
from ucvae.chains import Kernel, LaggedChains
from ucvae.config import require
from ucvae.data.base import SPLITS, ImageData, as_input
from ucvae.errors import ConfigError
from ucvae.estimators.coupled import Coupled
from ucvae.models.vae import VAE
from ucvae.progress import Progress, Stand
from ucvae.randomness import stream
from ucvae.studies.base import Study, settle_beta

# Images whose chains run together: bounds the memory that their particles take.
BATCH = 100
KERNELS = {Kernel.isir: "C-ISIR", Kernel.isir_disir: "C-ISIR-DISIR"}


@dataclass
class MeetingTimes(Study):
    """Meeting times of both kernels over many images.

    Attributes:
        num_samples: K.
        lag: L.
        burn_in: t0.
        beta: DISIR's correlation; null adapts it to the images first, as in training but on
            chains of t0 + L steps, then fixes it.
        max_steps: cap on a chain's steps; what reaches it is counted as truncated.
        split: of the images.
        num_images: the first of the split.
        replicates: runs of the chains of each image.
    """

    num_samples: int = 10
    lag: int = 10
    burn_in: int = 1
    beta: float | None = None
    max_steps: int = 1000
    split: str = "train"
    num_images: int = 1000
    replicates: int = 1

    name = "meeting_times"

    def __post_init__(self) -> None:
        require(
            self.split in SPLITS, f"split must be one of {', '.join(SPLITS)}, got {self.split!r}"
        )
        for field, least in (("num_images", 2), ("replicates", 1)):
            value = getattr(self, field)
            require(value >= least, f"{field} must be at least {least}, got {value}")
        self._coupled(Kernel.isir_disir, self.max_steps)  # checks the others

    def check(self, model: VAE, data: ImageData) -> None:
        """Refuse more images than there are."""
        count = len(getattr(data, self.split))
        if self.num_images > count:
            raise ConfigError(
                f"study.num_images must be at most {count}, the images of the {self.split} split, "
                f"got {self.num_images}"
            )

    def measure(
        self,
        model: VAE,
        data: ImageData,
        seed: int,
        folder: Path,
        between: Callable[[], object],
    ) -> dict[str, Any]:
        """Run the chains and write ``meeting_times.csv`` and ``meeting_times.png``."""
        device = data.train.device
        images = getattr(data, self.split)
        if self.split == "train":
            images = data.epoch_images(stream(seed, f"images of {self.name}", device))
        batches = as_input(images[: self.num_images], data.levels).split(BATCH)
        found = {}
        total = len(KERNELS) * self.num_images * self.replicates
        name, done = "", 0
        with Progress(lambda: Stand(name, done / total)) as bar:
            for kernel, name in KERNELS.items():
                coupled = self._coupled(kernel, self.max_steps)
                generator = stream(seed, f"{self.name} of {name}", device)
                if kernel is Kernel.isir_disir and self.beta is None:
                    adapting = stream(seed, f"beta of {name}", device)
                    coupled.current_beta = self._settled(model, batches, adapting, between)
                parts = []
                for batch in batches * self.replicates:
                    chains = _chains(coupled, model, batch, generator)
                    parts.append(Times.of(chains))
                    done += len(batch)
                    bar.tick()
                    between()
                joined = Times(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
                beta = float(coupled.current_beta) if kernel is Kernel.isir_disir else None
                found[name] = (joined, beta)
        results.write_rows(folder / "meeting_times.csv", self._table(found))
        title = (
            f"{data.name} ({data.binarization}), {self.split}: {self.num_images:,} images"
            f"{f' x {self.replicates}' if self.replicates > 1 else ''}; "
            f"D = {model.latent_dim}, K = {self.num_samples}, L = {self.lag}"
        )
        figures.meeting_times(
            folder / "meeting_times.png",
            title,
            {
                name if beta is None else rf"{name}, $\beta$ = {beta:.2f}": (
                    times.meeting_time.numpy(),
                    times.truncated.numpy(),
                )
                for name, (times, beta) in found.items()
            },
            self.lag,
            self.max_steps,
        )
        return {
            "files": ["meeting_times.csv", "meeting_times.png"],
            "kernels": {
                name: {"beta": beta} | times.summary(self.replicates)
                for name, (times, beta) in found.items()
            },
        }

    def rows(self, found: dict[str, Any]) -> dict[str, str]:
        """A row for each kernel."""
        rows = {}
        for name, numbers in found["kernels"].items():
            times = numbers["meeting_time"]
            rows[name] = (
                f"meeting time mean {times['mean']:.1f}, p50 {times['p50']}, p90 {times['p90']}, "
                f"p99 {times['p99']}, max {times['max']}; "
                f"truncated {100 * numbers['truncated_fraction']:.2g}%; "
                f"{numbers['evaluations_per_image']:,.0f} evaluations an image"
            )
        return rows

    def _coupled(self, kernel: Kernel, max_steps: int) -> Coupled:
        return Coupled(
            num_samples=self.num_samples,
            lag=self.lag,
            burn_in=self.burn_in,
            kernel=kernel,
            max_steps=max_steps,
            beta=0.5 if self.beta is None else self.beta,
        )

    def _settled(
        self,
        model: VAE,
        batches: tuple[Tensor, ...],
        generator: torch.Generator,
        between: Callable[[], object],
    ) -> Tensor:
        """Beta adapted to the images, all batches in turn."""
        # Chains as short as can be: whole ones would cost more than the study itself.
        short = self._coupled(Kernel.isir_disir, self.burn_in + self.lag)
        turn = itertools.cycle(batches)

        def chains() -> LaggedChains:
            between()
            return _chains(short, model, next(turn), generator)

        settle_beta(short, chains)
        return short.current_beta

    def _table(self, found: dict[str, tuple[Times, float | None]]) -> list[dict[str, Any]]:
        """``meeting_times.csv``: a row for each kernel, replicate and image."""
        return [
            {
                "image": row % self.num_images,
                "replicate": row // self.num_images,
                "kernel": name,
                "meeting_time": int(time),
                "truncated": int(truncated),
                "evaluations": int(evaluations),
                "mismatch": float(mismatch),
            }
            for name, (times, _) in found.items()
            for row, (time, truncated, evaluations, mismatch) in enumerate(zip(*times, strict=True))
        ]


class Times(NamedTuple):
    """What the chains of each image gave, ``[n]`` on the CPU; see ``LaggedChains``."""

    meeting_time: Tensor
    truncated: Tensor
    evaluations: Tensor
    mismatch: Tensor

    @classmethod
    def of(cls, chains: LaggedChains) -> Times:
        """Without the particles, which are most of the memory."""
        return cls(*(getattr(chains, field).cpu() for field in cls._fields))

    def summary(self, replicates: int = 1) -> dict[str, Any]:
        """Plain numbers; a truncated chain counts with the cap, a lower bound of its time.

        Args:
            replicates: of each image, all images in turn. Those of an image are no independent
                ones: the mismatch's error is that over images.
        """
        times = self.meeting_time.sort().values
        of_images = self.mismatch.unflatten(0, (replicates, -1)).mean(0)
        mismatch, error = results.mean_and_error(of_images)
        return {
            "meeting_time": {
                "mean": times.double().mean().item(),
                **{
                    f"p{round(100 * level)}": int(times[math.ceil(level * len(times)) - 1])
                    for level in (0.5, 0.9, 0.99)
                },
                "max": int(times[-1]),
            },
            "truncated_fraction": self.truncated.double().mean().item(),
            "evaluations_per_image": self.evaluations.double().mean().item(),
            "mismatch": {"mean": mismatch, "standard_error": error},
        }


def _chains(
    coupled: Coupled, model: VAE, images: Tensor, generator: torch.Generator
) -> LaggedChains:
    with torch.no_grad():
        proposal = model.encode(images)
    return coupled.run_chains(model, images, proposal, generator)
