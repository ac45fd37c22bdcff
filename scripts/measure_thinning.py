r"""What thinning the particles costs and saves on a trained run.

The coupled estimator drops most particles of little weight before its differentiable pass
(``estimator.min_coefficient``; ``ucvae.estimators.coupled.thin``). For each threshold this prints

- the particles that are left for an image;
- the seconds of thinning and differentiable pass for all images as one batch, median over
  replicates;
- the variance that thinning adds to the decoder's gradient of one image: the mean squared distance
  from the gradient of all particles of the same chains, as a fraction of the variance within an
  image (of the whole gradient over chains) and of the variance between images (of the exact
  gradient), the noise that training has anyway.

Variances are traces, summed over the decoder's parameters. Everything runs on the CPU, with the
weights, data and estimator of ``RUN_DIR/checkpoints/last.pt``, DISIR's learnt beta included. The
chains draw from the encoder's proposals, also for a run that remembers others. A run of another
estimator is measured with the kernel ``isir``, K = 10, L = 10 and t0 = 1.

    python scripts/measure_thinning.py RUN_DIR --images 50 --replicates 20
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ucvae import checkpoint
from ucvae.chains import Kernel, LaggedChains, SignedParticles
from ucvae.chains.thinning import thin
from ucvae.config import train_settings
from ucvae.data.base import as_input
from ucvae.errors import UcvaeError
from ucvae.estimators.coupled import Coupled, decoder_gradient
from ucvae.models.gaussians import Encoded
from ucvae.models.vae import VAE
from ucvae.randomness import stream
from ucvae.results import table


class Thinned(NamedTuple):
    """One threshold: particles per image, seconds of the pass, variance added to a gradient."""

    min_coefficient: float
    particles: float
    seconds: float
    added: float


class Measurement(NamedTuple):
    """What the chains gave: variances of the whole gradient, meeting times, and each threshold."""

    within: float
    between: float
    meeting_time: float
    truncated: float
    thresholds: list[Thinned]


def load(
    run: Path, num_images: int, kernel: Kernel | None, seed: int
) -> tuple[VAE, Coupled, Tensor]:
    """A run's model, estimator and some of its training images, ``[n, P]``.

    Raises:
        UcvaeError: the run cannot be read, or its data cannot.
    """
    path = run / "checkpoints" / "last.pt"
    state = checkpoint.load(path, config=dict)
    settings = train_settings(state["config"])
    data = settings.dataset.load(Path(settings.data_dir).expanduser())
    model = settings.model.build(data.train_mean, data.levels)
    estimator = settings.estimator
    with checkpoint.fitting(path):
        model.load_state_dict(state["model"])
        if isinstance(estimator, Coupled):
            estimator.load_state_dict(state["estimator"])
        else:
            estimator = Coupled(kernel=Kernel.isir)
    if kernel is not None:
        estimator.kernel = kernel
    generator = stream(seed, "images")
    images = data.epoch_images(generator)
    chosen = torch.randperm(len(images), generator=generator)[:num_images]
    return model, estimator, as_input(images[chosen], data.levels)


@torch.no_grad()
def run_chains(
    estimator: Coupled, model: VAE, images: Tensor, generator: torch.Generator
) -> tuple[Encoded, LaggedChains]:
    """The proposals of images ``[n, P]`` and one set of chains, as the estimator runs them."""
    proposal = model.encode(images)
    return proposal, estimator.run_chains(model, images, proposal, generator)


def image_gradients(
    model: VAE, images: Tensor, proposal: Encoded, particles: SignedParticles
) -> Tensor:
    """The decoder's gradient of each image, ``[n, parameters]``."""
    rows = []
    for image in range(len(images)):
        own = particles.image_index == image
        part = SignedParticles(*(field[own] for field in particles))
        gradient = decoder_gradient(model, images, proposal, part)
        rows.append(torch.cat([g.flatten() for g in gradient]))
    return torch.stack(rows)


def within_and_between(total: Tensor, squares: Tensor, replicates: int) -> tuple[float, float]:
    """Unbiased variances within and between images, summed over a gradient's components.

    Args:
        total: ``[n, parameters]``, an image's gradients added up over its replicates.
        squares: ``[n]``, their squared norms added up.
        replicates: R, independent given the image.
    """
    means = total / replicates
    within = (squares - replicates * means.square().sum(1)).mean() / (replicates - 1)
    # The means of R replicates vary by within / R on top of the exact gradients.
    between = means.var(0).sum() - within / replicates
    return within.item(), between.item()


def measure(
    model: VAE,
    images: Tensor,
    estimator: Coupled,
    min_coefficients: Sequence[float],
    replicates: int,
    seed: int,
) -> Measurement:
    """Compare thinned gradients with whole ones, on the same chains for every threshold.

    Args:
        model: on the CPU.
        images: ``[n, P]`` in [0, 1], at least 2.
        estimator: its ``min_coefficient`` is not used.
        min_coefficients: the thresholds.
        replicates: independent chains for each image, at least 2.
        seed: of the chains and of the thinning.
    """
    num_images, num_thresholds = len(images), len(min_coefficients)
    for_chains, for_thinning = stream(seed, "chains"), stream(seed, "thinning")
    total = torch.zeros(num_images, sum(p.numel() for p in model.decoder.parameters())).double()
    squares = torch.zeros(num_images).double()
    kept, seconds, added = torch.zeros(3, num_thresholds, replicates).double()
    meeting_time, truncated = torch.zeros(2, replicates).double()
    for replicate in range(replicates):
        proposal, chains = run_chains(estimator, model, images, for_chains)
        whole = image_gradients(model, images, proposal, chains.particles).double()
        total += whole
        squares += whole.square().sum(1)
        meeting_time[replicate] = chains.meeting_time.double().mean()
        truncated[replicate] = chains.truncated.double().mean()
        for index, min_coefficient in enumerate(min_coefficients):
            start = time.perf_counter()
            particles = thin(chains.particles, min_coefficient, for_thinning)
            decoder_gradient(model, images, proposal, particles)
            seconds[index, replicate] = time.perf_counter() - start
            thinned = image_gradients(model, images, proposal, particles).double()
            added[index, replicate] = (thinned - whole).square().sum(1).mean()
            kept[index, replicate] = particles.coefficient.numel() / num_images
    rows = zip(
        min_coefficients,
        kept.mean(1).tolist(),
        seconds.median(1).values.tolist(),
        added.mean(1).tolist(),
        strict=True,
    )
    return Measurement(
        *within_and_between(total, squares, replicates),
        meeting_time.mean().item(),
        truncated.mean().item(),
        [Thinned(*row) for row in rows],
    )


def report(measured: Measurement) -> str:
    """Both ratios of each threshold, as a table, and below it the noise that they add to."""

    def ratio(one: float, other: float) -> str:
        # The estimate of a variance between images that the noise within them hides can be < 0.
        return f"{one / other:.2g}" if other > 0 else "unresolved"

    heading = ("min_coefficient", "particles", "seconds", "added/within", "added/between")
    lines = ["{:>15}  {:>9}  {:>8}  {:>12}  {:>13}".format(*heading)]
    for row in measured.thresholds:
        lines.append(
            f"{row.min_coefficient:>15g}  {row.particles:>9.1f}  {row.seconds:>8.4f}  "
            f"{ratio(row.added, measured.within):>12}  {ratio(row.added, measured.between):>13}"
        )
    lines.append(f"within/between {ratio(measured.within, measured.between)}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for its error messages, and the arguments, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="See the docstring for what is printed."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run of ucvae-train")
    parser.add_argument("--images", type=int, default=50, help="training images (default 50)")
    parser.add_argument("--replicates", type=int, default=20, help="chains an image (default 20)")
    parser.add_argument(
        "--min-coefficients",
        type=float,
        nargs="+",
        default=[0.0, 1e-4, 1e-3, 1e-2],
        metavar="M",
        help="thresholds in [0, 1) (default 0 1e-4 1e-3 1e-2)",
    )
    kernels = [kernel.value for kernel in Kernel]
    parser.add_argument("--kernel", choices=kernels, help="default: the run's, or isir")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    for name in ("images", "replicates"):
        if getattr(given, name) < 2:
            parser.error(f"--{name} must be at least 2, got {getattr(given, name)}")
    for value in given.min_coefficients:
        if not 0 <= value < 1:
            parser.error(f"--min-coefficients must be in [0, 1), got {value:g}")
    return parser, given


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser, given = parse(arguments)
    kernel = given.kernel and Kernel(given.kernel)
    try:
        model, estimator, images = load(given.run, given.images, kernel, given.seed)
        measured = measure(
            model, images, estimator, given.min_coefficients, given.replicates, given.seed
        )
    except UcvaeError as error:
        parser.error(str(error))
    kernel = getattr(estimator.kernel, "value", estimator.kernel)  # a name, or a kernel of moves
    chains = f"{kernel}, K {estimator.num_samples}, L {estimator.lag}"
    if estimator.kernel is Kernel.isir_disir:
        chains += f", beta {estimator.current_beta.item():.2f}"
    rows = {
        "run": str(given.run),
        "images": f"{len(images)}, {given.replicates} replicates each",
        "chains": chains,
        "meeting time": f"{measured.meeting_time:.1f}, truncated {100 * measured.truncated:.2g}%",
    }
    print(table(rows), report(measured), sep="\n")


if __name__ == "__main__":
    main()
