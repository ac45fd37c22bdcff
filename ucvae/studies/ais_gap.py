r"""How far annealed importance sampling is from ``log p(x)``, by bounds on either side of it.

The bounds are those of bidirectional Monte Carlo (Grosse et al 2015; Wu et al 2017). For images
that the model itself makes, ``z* ~ p(z)`` and ``x ~ p(x|z*)``, z* is an exact draw from the
posterior. Chains from the prior give a lower bound of ``log p(x)`` in expectation, the same
transitions in the opposite order from z* an upper bound (:mod:`ucvae.evaluation.ais`). Their
distance bounds the error of each, on average. It speaks for images like the model's own: real ones
that the model explains badly may be harder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ucvae import results
from ucvae.config import require
from ucvae.data.base import ImageData
from ucvae.errors import ConfigError
from ucvae.evaluation.ais import Ais, Annealed, Schedule
from ucvae.evaluation.base import require_finite
from ucvae.models.vae import VAE
from ucvae.progress import Fact, Progress, Stand
from ucvae.randomness import stream
from ucvae.studies.base import Study

DIRECTIONS = ("lower", "upper")


@dataclass
class AisGap(Study):
    """Lower and upper bounds of the log-likelihood of simulated images.

    Attributes:
        chains, temperatures, leapfrog_steps, schedule, pilot_images, pilot_chains: as of
            ``evaluator=ais``. The pilot's images are others than those of the bounds.
        num_images: drawn from the model.
    """

    chains: int = 16
    temperatures: int = 1000
    leapfrog_steps: int = 10
    schedule: Schedule = Schedule.sigmoidal
    pilot_images: int = 25
    pilot_chains: int = 8
    num_images: int = 100

    name = "ais_gap"

    def __post_init__(self) -> None:
        require(self.num_images >= 2, f"num_images must be at least 2, got {self.num_images}")
        self._ais()  # checks the others

    def _ais(self) -> Ais:
        return Ais(**{field.name: getattr(self, field.name) for field in fields(self)})

    def check(self, model: VAE, data: ImageData) -> None:
        """Refuse a likelihood that cannot be drawn from."""
        if not hasattr(model.likelihood, "draw"):
            raise ConfigError(
                f"study=ais_gap: needs a likelihood with a method draw, which "
                f"{type(model.likelihood).__name__} has not"
            )

    def measure(
        self,
        model: VAE,
        data: ImageData,
        seed: int,
        folder: Path,
        between: Callable[[], object],
    ) -> dict[str, Any]:
        """Anneal in both directions and write ``ais_gap.csv``."""
        device = data.train.device
        ais = self._ais()

        def draws(count: int, purpose: str) -> tuple[Tensor, Tensor]:
            return simulate(model, count, stream(seed, f"{purpose} of {self.name}", device))

        images, posterior = draws(self.num_images, "images")
        count = max(1, model.rows_at_a_time(images) // ais.chains)
        batches = list(zip(images.split(count), posterior.split(count), strict=True))
        found: dict[str, list[Annealed]] = {direction: [] for direction in DIRECTIONS}
        place, done, share = "pilot", 0, 0.0

        def progress(count: int, note: str = "", under_way: float = 0.0) -> None:
            nonlocal done, share
            done += count
            share = (done + under_way) / (len(DIRECTIONS) * len(images))
            bar.facts["note"] = Fact(note, note)
            bar.tick()
            between()

        with Progress(lambda: Stand(place, share)) as bar:
            pilot, _ = draws(self.pilot_images, "pilot images")
            tuning = stream(seed, f"pilot of {self.name}", device)
            path = ais.path(ais.find_steps(model, pilot, tuning, progress))
            for direction in DIRECTIONS:
                place = f"{direction} bound"
                generator = stream(seed, f"{direction} bound of {self.name}", device)
                for some, draw in batches:
                    annealed = (
                        ais.forward(model, some, path, generator, progress)
                        if direction == "lower"
                        else ais.backward(model, some, draw, path, generator, progress)
                    )
                    found[direction].append(annealed)
                    progress(len(some))
        lower, upper = (
            Annealed(*map(torch.cat, zip(*found[direction], strict=True)))
            for direction in DIRECTIONS
        )
        columns = {
            "lower": require_finite(lower.lower()),
            "upper": require_finite(upper.upper()),
            "ess": lower.ess(),
            "acceptance": lower.acceptance,
        }
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        results.write_rows(
            folder / "ais_gap.csv",
            [{"image": i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows)],
        )
        columns["gap"] = columns["upper"] - columns["lower"]
        return {"files": ["ais_gap.csv"], "evaluator": ais.name} | {
            name: dict(zip(("mean", "standard_error"), results.mean_and_error(values), strict=True))
            for name, values in columns.items()
        }

    def rows(self, found: dict[str, Any]) -> dict[str, str]:
        """Both bounds, and the gap between them."""
        return {
            title: f"{found[name]['mean']:.3f} +- {found[name]['standard_error']:.3f} nats an image"
            for title, name in (
                ("lower bound", "lower"),
                ("upper bound", "upper"),
                (f"gap of {found['evaluator']}", "gap"),
            )
        }


@torch.no_grad()
def simulate(model: VAE, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images ``[count, P]`` of the model, and the ``z [count, D]`` that each was made from."""
    shape = (count, model.latent_dim)
    z = torch.randn(shape, generator=generator, device=generator.device, dtype=model.dtype)
    return model.likelihood.draw(model.decoder(z), generator), z
