r"""How far estimators' gradients are from that of the log-likelihood, on a trained run.

On a fitted model no gradient is known exactly, but a good one can be had: for each of n training
images by 2,000 weighted posterior draws, from a Gaussian that is fitted to it for long. With
``r_i`` this gradient of the decoder for image i, and ``m_i`` the mean of an estimator's over R
replicates, this prints, all in parts of the variance of ``r_i`` between images,

``gradient``
    ``|E m|^2``: what the estimator climbs by, squared. The first row has ``|E r|^2``, with its
    standard error.
``cosine``
    Of the angle between ``E m`` and ``E r``; it means nothing where the latter is not seen.
``bias``
    ``|E m - E r|^2``, squared, too, with its standard error over images.
``noise``
    The variance within an image, with its standard error over images and the share of the noisiest
    one, as in ``bench.py noise``.
``images``
    After about how many images the bias outweighs all noise: the mean of so many gradients has a
    variance as large as its squared bias, ``(1 + noise) / bias``. ``-`` where the bias is within
    two standard errors of 0.

E is over the images that these n are a sample of. Squares are estimated without bias from pairs of
different images (:func:`squared_mean`), so that a small one may come out negative. They take the
errors of different images for independent of each other.

What this does not tell. The reference is importance sampling too: its own bias falls as 1 / draws,
and a mode that no proposal has found is missed by it and by every estimator. Its effective sample
sizes are printed. Lengths are Euclidean, over the decoder's parameters, not what an optimizer makes
of them. And the decoder stays as it is: what is remembered for an image is learnt in ``--visits``
visits of the best model, while in training the decoder moves between two of them. With
``--in-training`` it is the run's last model, with what a run of SNIS or of coupled chains remembers
itself, as old as it is. In what is measured no call learns anything.

SNIS and coupled chains have their defaults for data like the run's, whatever its own estimator;
with ``--in-training`` remembered means follow the encoder's if those of the run do. Everything runs
on the CPU, in 4 bytes for each image and parameter of the decoder, four times.

    python scripts/measure_bias.py RUN_DIR --images 500 --replicates 10
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from bench import IWAE, SNIS, drawing, fitted, in_batches, overrides_for, visit
from explain_meeting_times import (
    Noise,
    Subject,
    choose,
    load,
    posterior_gradients,
    replicate,
    sample_posterior,
    total_variance,
)
from rivals.contenders import compose
from torch import Tensor

from ucvae.errors import NonFiniteError, UcvaeError
from ucvae.estimators.coupled import Coupled
from ucvae.estimators.iwae import Iwae
from ucvae.estimators.snis import Snis
from ucvae.models.vae import VAE
from ucvae.randomness import stream


class Row(NamedTuple):
    """What is printed of an estimator; see the module's docstring."""

    gradient: float
    cosine: float
    bias: float
    error: float
    noise: Noise

    @property
    def images(self) -> float | None:
        """After about how many the bias outweighs the noise; None where no bias is seen."""
        return (1 + self.noise.mean) / self.bias if self.bias > 2 * self.error else None


def squared_mean(rows: Tensor) -> tuple[float, float]:
    r"""``|E row|^2`` without bias, and its standard error by the jackknife.

    ``|sum_i d_i|^2 - sum_i |d_i|^2`` sums over pairs of different rows, and the product of two
    independent ones has the expectation ``|E d|^2``. The squared error is too large by the part of
    the variance that products of two deviations have, which is all of it where ``E d = 0``: there
    it is twice as large as it should be.

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
    estimator: Iwae | Snis | Coupled,
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
    between = total_variance(reference)
    means, noises = torch.empty_like(reference), []
    for batch in in_batches(images):
        with torch.no_grad():
            encoded = model.encode(batch.images)
        draw = drawing(estimator, model, batch, encoded)
        found = replicate(
            draw, model, batch.images, encoded, generator, replicates, min_coefficient=0.0
        )
        means[batch.places] = found.mean.to(means.dtype)
        noises.append(found.noise(between))
    wanted, _ = squared_mean(reference)
    gradient, _ = squared_mean(means)
    bias, error = squared_mean(means.sub_(reference))
    # Either square is an unbiased estimate, and may be negative where there is nothing to see.
    seen = gradient > 0 and wanted > 0
    cosine = (gradient + wanted - bias) / (2 * (gradient * wanted) ** 0.5) if seen else math.nan
    return Row(gradient / between, cosine, bias / between, error / between, Noise.join(noises))


def estimators(
    model: VAE,
    images: Tensor,
    visits: int,
    seed: int,
    memory: dict[str, Tensor] | None = None,
    for_data: Sequence[str] = (),
) -> dict[str, Iwae | Snis | Coupled]:
    """All that are compared, with what they learn in some visits; or with a memory as it is.

    ``for_data`` are :func:`bench.overrides_for` the run's. Means follow the encoder's if those of
    the memory do.
    """
    iwae = compose(IWAE).estimator
    chosen = SNIS, ["estimator=coupled"]
    snis, coupled = (compose([*overrides, *for_data]).estimator for overrides in chosen)
    for estimator in (snis, coupled):
        if memory is not None:
            estimator.follow_encoder = "encoder_mean" in memory
        estimator.begin(model, len(images))
        if memory is not None and estimator.memory is not None:
            estimator.memory.load_state_dict(memory)
    if memory is None:
        visit((snis, coupled), model, images, visits, seed)
    return {
        "elbo": dataclasses.replace(iwae, num_samples=1),  # for the decoder they are the same
        "iwae, K 10": iwae,
        "iwae, K 50": dataclasses.replace(iwae, num_samples=50),
        "snis, K 10": snis,
        "coupled, K 10": coupled,
    }


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for its error messages, and the arguments, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run of ucvae-train")
    parser.add_argument("--images", type=int, default=500, help="training images (default 500)")
    parser.add_argument("--replicates", type=int, default=10, help="of an image (default 10)")
    parser.add_argument("--visits", type=int, default=10, help="of an image (default 10)")
    parser.add_argument(
        "--in-training",
        action="store_true",
        help="the last model with what the run itself remembers, in the place of visits",
    )
    parser.add_argument("--data-dir", help="default: where the run looked")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    for name, least in (("images", 10), ("replicates", 2), ("visits", 0)):
        if getattr(given, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(given, name)}")
    return parser, given


def load_as_asked(given: argparse.Namespace) -> tuple[Subject, dict[str, Tensor] | None]:
    """The run's best model; or its last, with what it remembers of the images.

    Raises:
        UcvaeError: the run cannot be read, its data cannot, or nothing is remembered there.
    """
    if not given.in_training:
        return load(given.run, given.images, given.seed, 1000, given.data_dir), None
    settings, data, model, memory = fitted(given.run, given.data_dir, last=True)
    model.requires_grad_(False)
    index, images = choose(data, given.images, given.seed)
    posterior = sample_posterior(model, images, given.seed)
    subject = Subject(settings, data, model, images, posterior, given.seed, 1000)
    return subject, {name: of_all[index] for name, of_all in (memory or {}).items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a row for each estimator."""
    parser, given = parse(arguments)
    try:
        subject, memory = load_as_asked(given)
        images, model = subject.images, subject.model
        model.decoder.requires_grad_(True)
        reference = posterior_gradients(subject, model)
        if not reference.isfinite().all():
            raise NonFiniteError(f"{given.run}: the decoder's gradient has a NaN or an infinity")
        between = total_variance(reference)
        size, error = (value / between for value in squared_mean(reference))
        draws = 1 / subject.posterior.weights.square().sum(1)
        print(
            f"{given.run}: {len(images)} training images, replicates {given.replicates}, "
            f"{'in training' if given.in_training else f'visits {given.visits}'}, "
            f"seed {given.seed}; effective draws of the reference: "
            f"median {draws.median():.0f}, least {draws.min():.0f}"
        )
        print(
            f"{'':<15} {'gradient':>9} {'cosine':>6} {'bias':>9} {'+-':>8} {'noise':>7} {'+-':>7} "
            f"{'largest':>7} {'images':>8}"
        )
        print(f"{'the gradient':<15} {size:>9.2g} {'':>6} {'':>9} {error:>8.1g}", flush=True)
        for_data = overrides_for(subject.data)
        compared = estimators(model, images, given.visits, given.seed, memory, for_data)
        for name, estimator in compared.items():
            row = measure(estimator, model, images, reference, given.replicates, given.seed)
            until = "-" if row.images is None else f"{row.images:,.0f}"
            print(
                f"{name:<15} {row.gradient:>9.2g} {row.cosine:>6.2f} {row.bias:>9.2g} "
                f"{row.error:>8.1g} {row.noise.mean:>7.3g} {row.noise.error:>7.2g} "
                f"{row.noise.largest:>7.0%} {until:>8}",
                flush=True,
            )
    except UcvaeError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
