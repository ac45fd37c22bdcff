r"""How far estimators' gradients are from that of the log-likelihood, on a trained run.

On a fitted model no gradient is known exactly, but a good one can be had: for each of n training
images by 2,000 weighted posterior draws, from a Gaussian that is fitted to it for long. Its own
bias is that of self-normalised importance sampling, which falls as 1 / draws. With ``r_i`` this
gradient of the decoder for image i, and ``m_i`` the mean of an estimator's over R replicates, this
prints

``bias``
    ``|E b|^2`` with ``b_i = m_i - r_i``: the squared bias of a gradient over all training images,
    in parts of the variance between images. It is estimated without bias, from pairs of different
    images (:func:`squared_mean`), so that a small one may come out negative; ``+-`` is the standard
    error over images, by the jackknife. The first row has ``|E r|^2`` in its place: it is what an
    estimator would have that sees nothing of the gradient.
``noise``
    The variance within an image over the variance between images, as in ``bench.py noise``.
``images``
    After how many images the bias outweighs all noise: the mean of so many gradients has a variance
    as large as its squared bias, ``(1 + noise) / bias``. ``-`` where the bias is within two
    standard errors of 0.

What is remembered for an image is learnt in ``--visits`` visits, with the decoder as it is; in what
is measured each call refines it anew, and learns nothing. Everything runs on the CPU, with the best
model of ``RUN_DIR``. All gradients are kept: 4 bytes for each image and parameter of the decoder,
at most five times.

    python scripts/measure_bias.py RUN_DIR --images 500 --replicates 10
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from bench import IWAE, SNIS, drawing, in_batches, visit
from explain_meeting_times import load, posterior_gradients
from measure_thinning import image_gradients
from rivals.contenders import compose
from torch import Tensor

from ucvae.errors import UcvaeError
from ucvae.estimators.iwae import Iwae
from ucvae.estimators.remembered import Remembering
from ucvae.models.vae import VAE
from ucvae.randomness import stream


class Row(NamedTuple):
    """What is printed of an estimator."""

    bias: float
    error: float
    noise: float

    @property
    def images(self) -> float | None:
        """After how many the bias outweighs the noise; None where no bias is seen."""
        return (1 + self.noise) / self.bias if self.bias > 2 * self.error else None


def squared_mean(rows: Tensor) -> tuple[float, float]:
    r"""``|E row|^2`` without bias, and its standard error by the jackknife.

    ``|sum_i d_i|^2 - sum_i |d_i|^2`` sums over pairs of different rows, and the product of two
    independent ones has the expectation ``|E d|^2``.

    Args:
        rows: ``[n, parameters]``, n at least 3.
    """
    n = len(rows)
    total = rows.sum(0, dtype=torch.float64)
    squares = torch.stack([row.double().square().sum() for row in rows])
    with_all = torch.stack([row.double() @ total for row in rows]) - squares
    pairs = with_all.sum()
    without = (pairs - 2 * with_all) / ((n - 1) * (n - 2))  # each row in turn
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    return (pairs / (n * (n - 1))).item(), error.item()


def measure(
    estimator: Iwae | Remembering,
    model: VAE,
    images: Tensor,
    reference: Tensor,
    replicates: int,
    seed: int,
) -> Row:
    """Compare an estimator's gradients with those of the log-likelihood.

    Args:
        estimator: it learns nothing.
        model: on the CPU; its decoder differentiable.
        images: ``[n, P]``.
        reference: their gradients ``[n, parameters]``.
        replicates: independent gradients for each image, at least 2.
        seed: of the draws.
    """
    generator = stream(seed, "bias")
    total = torch.zeros_like(reference)
    squares = torch.zeros(len(images), dtype=torch.float64)
    for _ in range(replicates):
        for batch in in_batches(images):
            with torch.no_grad():
                encoded = model.encode(batch.images)
                particles = drawing(estimator, model, batch, encoded)(generator).particles
            gradients = image_gradients(model, batch.images, encoded, particles)
            total[batch.places] += gradients
            squares[batch.places] += gradients.double().square().sum(1)
    mean = total / replicates
    within = (squares - replicates * mean.double().square().sum(1)) / (replicates - 1)
    between = variance(reference)
    bias, error = squared_mean(mean - reference)
    return Row(bias / between, error / between, within.mean().item() / between)


def variance(rows: Tensor) -> float:
    """The trace of the covariance of ``[n, parameters]``."""
    return rows.double().var(0).sum().item()


def estimators(model: VAE, images: Tensor, visits: int, seed: int) -> dict[str, Iwae | Remembering]:
    """All that are compared, with what they remember; IWAE with one sample is ELBO."""
    samples = {"elbo": 1, "iwae, K 10": 10, "iwae, K 50": 50}
    biased = {
        name: compose([*IWAE, f"estimator.num_samples={count}"]).estimator
        for name, count in samples.items()
    }
    remembering = {
        "snis": compose(SNIS).estimator,
        "coupled": compose(["estimator=coupled"]).estimator,
    }
    for estimator in remembering.values():
        estimator.begin(model, len(images))
    visit(remembering.values(), model, images, visits, seed)
    return biased | remembering


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for its error messages, and the arguments, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="The docstring says what is printed."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run of ucvae-train")
    parser.add_argument("--images", type=int, default=500, help="training images (default 500)")
    parser.add_argument("--replicates", type=int, default=10, help="of an image (default 10)")
    parser.add_argument("--visits", type=int, default=10, help="of an image (default 10)")
    parser.add_argument("--data-dir", help="default: where the run looked")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    for name, least in (("images", 10), ("replicates", 2), ("visits", 0)):
        if getattr(given, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(given, name)}")
    return parser, given


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a row for each estimator."""
    parser, given = parse(arguments)
    try:
        subject = load(given.run, given.images, given.seed, 1000, given.data_dir)
        images, model = subject.images, subject.model.requires_grad_(True)
        reference = posterior_gradients(subject, model)
        between = variance(reference)
        size, error = (value / between for value in squared_mean(reference))
        print(
            f"{given.run}: {len(images)} training images, {given.replicates} replicates, "
            f"{given.visits} visits, seed {given.seed}"
        )
        print(f"{'':<16} {'bias':>9} {'+-':>8} {'noise':>7} {'images':>9}")
        print(f"{'gradient itself':<16} {size:>9.5f} {error:>8.5f}", flush=True)
        for name, estimator in estimators(model, images, given.visits, given.seed).items():
            row = measure(estimator, model, images, reference, given.replicates, given.seed)
            until = "-" if row.images is None else f"{row.images:,.0f}"
            print(
                f"{name:<16} {row.bias:>9.5f} {row.error:>8.5f} {row.noise:>7.3g} {until:>9}",
                flush=True,
            )
    except UcvaeError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
