r"""How fast training is, and what an unbiased gradient costs.

    python scripts/bench.py [SECTION ...] [--run RUN_DIR] [--jax-python PATH] [--pythae-python PATH]

prints a table for each section and writes all figures to ``--output``:

``training``
    Images per second of training on MNIST-sized bits, for ucvae and its rivals.
``coupled`` (needs ``--run``)
    What the gradient of each unbiased variant costs on a fitted model, in gradients of IWAE K = 10.
``noise`` (needs ``--run``)
    How much each variant's gradient scatters, and variance x time against the paper's setting.
``memory``
    What a training step adds to the memory in use at most, against IWAE.
``ais``
    Temperatures x images per second of annealed importance sampling by the paper's protocol.

Without a section, all those whose inputs are given. Measurements take turns: a round makes each of
them once, the figures are medians over rounds, and a ratio is the median of the rounds' ratios.
docs/benchmarks.md tells how to read the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import itertools
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from explain_meeting_times import (
    Noise,
    Weighted,
    in_noise_of,
    iwae_particles,
    load,
    load_run,
    replicate,
    variance_between,
)
from rivals.contenders import (
    BATCH_SIZE,
    NAMES,
    PRODUCTS,
    RIVALS,
    TRAINED,
    Clock,
    Task,
    compose,
    contenders,
    network,
)
from rivals.worker import CLOCKS
from torch import Tensor

import ucvae.cli._hydra  # noqa: F401  (registers the resolvers of the configs)
from ucvae import checkpoint, results
from ucvae import device as devices
from ucvae.chains import Kernel, LaggedChains
from ucvae.chains.thinning import thin
from ucvae.config import TrainSettings, flatten
from ucvae.data.base import ImageData, as_input
from ucvae.data.mnist import Mnist
from ucvae.errors import RunError, UcvaeError
from ucvae.estimators.base import Estimate, Estimator
from ucvae.estimators.coupled import Coupled, Start
from ucvae.estimators.iwae import Iwae
from ucvae.estimators.remembered import Remembering
from ucvae.estimators.snis import Snis
from ucvae.evaluation import ais
from ucvae.models.gaussians import Encoded
from ucvae.models.vae import VAE
from ucvae.randomness import stream
from ucvae.statistics import ChainCounts
from ucvae.studies.base import settle_beta

K = TypeVar("K")
T = TypeVar("T")

LATENT_DIM = 50
# The size and mean of MNIST, for bits that stand for it.
NUM_IMAGES, MEAN = 50_000, 0.13

# Temperatures of AIS between two looks at the clock.
AIS_PIECE = 10

# The measure of all costs.
IWAE = ["estimator=iwae", "estimator.num_samples=10"]

# IWAE's gradient with the proposals that the coupled variants remember.
SNIS = ["estimator=snis", "estimator.num_samples=10"]

REMEMBERED = [
    "estimator=coupled",
    "estimator.num_samples=10",
    "estimator.kernel=isir",
    "estimator.proposals=remembered",
]

# Every unbiased variant that is offered; a new one is a row.
PAPER = "paper: isir_disir, K 10, L 10"
UNBIASED = {
    "default: estimator=coupled": ["estimator=coupled"],
    PAPER: [
        "estimator=coupled",
        "estimator.num_samples=10",
        "estimator.lag=10",
        "estimator.burn_in=1",
        "estimator.kernel=isir_disir",
        "estimator.proposals=encoder",
        "estimator.min_coefficient=1e-3",
        "estimator.survival=0",
    ],
    "isir, K 10, L 3": [
        "estimator=coupled",
        "estimator.num_samples=10",
        "estimator.lag=3",
        "estimator.kernel=isir",
        "estimator.proposals=encoder",
    ],
    "default, thinned at 0.1": ["estimator=coupled", "estimator.min_coefficient=0.1"],
    "default, refined by 10 samples": ["estimator=coupled", "estimator.proposal_samples=10"],
    "remembered: isir, K 10, L 5": [*REMEMBERED, "estimator.lag=5"],
    "remembered: isir_hmc, K 10, L 3": [*REMEMBERED, "estimator.kernel=isir_hmc"],
    "remembered: isir_disir, K 10, L 1": [
        *REMEMBERED,
        "estimator.kernel=isir_disir",
        "estimator.lag=1",
        "estimator.beta=0.9",
        "estimator.adapt_beta=false",
    ],
}


def interleave(rounds: int, measurements: Mapping[K, Callable[[], T]]) -> dict[K, list[T]]:
    """Each round makes every measurement once, in turn."""
    found: dict[K, list[T]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, measure in measurements.items():
            found[name].append(measure())
    return found


def median_ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """Of what was measured in the same rounds."""
    return median(one / other for one, other in zip(ones, others, strict=True))


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    print(f"\n{title}")
    for row in [headings, *rows]:
        first, *others = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join([f"{first.strip():<{widths[0]}}", *others]), flush=True)


# Training


def training_section(given: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Images per second of every contender and objective."""
    data = mnist_sized(given.data_dir, given.train_images, given.seed)
    images = data.train.flatten(1).to(clock.device)
    task = Task(data, images, given.latent_dim, clock, given.seconds)
    pythons = {"pythae": given.pythae_python, "jax": given.jax_python}
    with contextlib.ExitStack() as stack:
        everybody, versions = contenders(task, pythons, given.threads, stack)
        for contender in everybody.values():
            contender.images_per_s()  # warm up, compile
        measurements = {key: contender.images_per_s for key, contender in everybody.items()}
        found = interleave(given.rounds, measurements)
    return training_results(found) | {"rivals": versions}


def training_results(found: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    """Medians and ratios, by objective, printed as a table too."""
    rows: dict[str, Any] = {}
    for title in TRAINED:
        rates = {name: found[title, name] for name in NAMES if (title, name) in found}
        ours = rates["ucvae"]
        rows[title] = {
            "images_per_s": {name: median(values) for name, values in rates.items()},
            "ratio": {name: median_ratio(ours, rates[name]) for name in RIVALS if name in rates},
            "rounds": rates,
        }
        if "products" in rates:
            fastest = map(max, zip(*(rates[n] for n in PRODUCTS if n in rates), strict=True))
            rows[title]["step_over_products"] = median_ratio(list(fastest), ours)

    def cells(row: dict[str, Any]) -> Iterator[str]:
        for name in NAMES:
            yield f"{row['images_per_s'][name]:,.0f}" if name in row["images_per_s"] else "-"
        for name in RIVALS:
            yield f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "-"
        yield f"{row['step_over_products']:.2f}" if "step_over_products" in row else "-"

    print_table(
        "training: images per second; ucvae's over its rivals'; step over matrix products",
        ["", *NAMES, *(f"/{name}" for name in RIVALS), "step/products"],
        [[title, *cells(row)] for title, row in rows.items()],
    )
    return {"objectives": rows}


@functools.cache
def mnist_sized(data_dir: str | None, num_images: int, seed: int) -> ImageData:
    """Static MNIST from ``data_dir``, or bits of its size and mean."""
    if data_dir:
        return Mnist().load(Path(data_dir).expanduser())
    generator = stream(seed, "images")
    sizes = {"train": num_images, "valid": 100, "test": 100}
    splits = {
        name: (torch.rand(size, 1, 28, 28, generator=generator) < MEAN).byte()
        for name, size in sizes.items()
    }
    return ImageData.from_splits("bits", "static", 2, splits)


# One gradient


class Batch(NamedTuple):
    """Images ``[n, P]`` and their places ``[n]`` among those that are measured."""

    images: Tensor
    places: Tensor


def in_batches(images: Tensor) -> list[Batch]:
    """The first of the measured images, as the batches of training."""
    places = torch.arange(len(images), device=images.device)
    parts = zip(images.split(BATCH_SIZE), places.split(BATCH_SIZE), strict=True)
    return [Batch(*part) for part in parts]


def gradient(
    estimator: Estimator, model: VAE, batch: Batch, generator: torch.Generator
) -> Estimate:
    """All that a training step does for its gradient, upkeep included; the optimizer is not."""
    with torch.enable_grad():
        model.zero_grad()
        estimate = estimator(model, batch.images, generator, batch.places)
        estimate.surrogate.backward()
    estimator.adapt(estimate)
    return estimate


@torch.no_grad()
def start_call(estimator: Coupled, model: VAE, batch: Batch, generator: torch.Generator) -> Start:
    """What a call begins with."""
    return estimator.start(model, batch.images, generator, batch.places)


def chains_from(
    begun: Start, estimator: Coupled, model: VAE, batch: Batch, generator: torch.Generator
) -> LaggedChains:
    """The chains of a call."""
    return estimator.run_chains(
        model,
        batch.images,
        begun.proposal,
        generator,
        first=begun.first,
    )


class Subject(NamedTuple):
    """A model, training images, and what is measured on them.

    Attributes:
        model: on the device.
        images: ``[n, P]`` on the device; all that are measured.
        iwae: the measure of all costs.
        snis: it remembers nothing where none asks for it.
        variants: those asked for of :data:`UNBIASED`. Proposals that are remembered have visited
            the images, and beta is adapted to the model, as in training.
    """

    model: VAE
    images: Tensor
    iwae: Iwae
    snis: Snis
    variants: dict[str, Coupled]


class Fitted(NamedTuple):
    """What a run has left.

    Attributes:
        settings: what it was asked to do.
        data: on the CPU.
        model: the best, or the last.
        memory: the state of the proposals that it remembers, beside the last model.
    """

    settings: TrainSettings
    data: ImageData
    model: VAE
    memory: dict[str, Tensor] | None


@functools.cache
def fitted(run: Path, data_dir: str | None, last: bool) -> Fitted:
    """A run's data and best model; or its last, with what it remembers.

    Raises:
        UcvaeError: the run cannot be read, its data cannot, or nothing is remembered there.
    """
    settings, data, model = load_run(run, data_dir)
    if not last:
        return Fitted(settings, data, model, None)
    path = run / "checkpoints" / "last.pt"
    state = checkpoint.load(path, model=dict, estimator=dict)
    memory = state["estimator"].get("memory")
    if memory is None or not memory["known"].any():
        raise RunError(f"--in-training: the run {run} has no remembered proposals")
    with checkpoint.fitting(path):
        model.load_state_dict(state["model"])
    return Fitted(settings, data, model, memory)


def overrides_for(data: ImageData) -> list[str]:
    """Overrides by which an estimator is set as in training; dynamic MNIST stands for its like."""
    return ["dataset=mnist_dynamic"] if data.binarization == "dynamic" else []


@functools.cache
def subject_of(
    run: Path | None,
    data_dir: str | None,
    latent_dim: int,
    train_images: int,
    seed: int,
    device: torch.device,
    num_images: int,
    visits: int | None,
    names: tuple[str, ...],
    with_snis: bool = True,
) -> Subject:
    """A run's model and training images; without a run a fresh model of MNIST's size.

    Without a number of ``visits`` it is the last model, with the proposals that the run remembers.
    """
    memory = None
    if run:
        _, data, model, memory = fitted(run, data_dir, last=visits is None)
    else:
        data = mnist_sized(data_dir, train_images, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = compose(network(latent_dim)).model.build(data.train_mean, data.levels)
    model.to(device)
    generator = stream(seed, "batches")
    images = data.epoch_images(generator)
    chosen = torch.randperm(len(images), generator=generator)[:num_images]
    images = as_input(images[chosen], data.levels).to(device)
    iwae = compose(IWAE).estimator
    for_data = overrides_for(data)
    snis = compose([*SNIS, *for_data]).estimator
    variants = {name: compose([*UNBIASED[name], *for_data]).estimator for name in names}
    remembering = (*([snis] if with_snis else []), *variants.values())
    if memory is not None:
        for estimator in remembering:
            estimator.follow_encoder = "encoder_mean" in memory  # as in the run that learnt it
    for estimator in (iwae, *remembering):
        estimator.begin(model, len(images))
    if visits is not None:
        visit(remembering, model, images, visits, seed)
    for estimator in remembering:
        if memory is not None and estimator.memory is not None:
            estimator.memory.load_state_dict({name: all_[chosen] for name, all_ in memory.items()})
    for estimator in variants.values():
        settle(estimator, model, images, seed)
    return Subject(model, images, iwae, snis, variants)


def subject_for(given: argparse.Namespace, clock: Clock) -> Subject:
    """What a section measures; made once, with estimators of the section's own."""
    subject = subject_of(
        given.run,
        given.data_dir,
        given.latent_dim,
        given.train_images,
        given.seed,
        clock.device,
        max(images_of(name, given) for name in given.sections),
        None if given.in_training else given.visits,
        given.variants,
        with_snis="noise" in given.sections,
    )
    return subject._replace(
        snis=copy.deepcopy(subject.snis), variants=copy.deepcopy(subject.variants)
    )


def images_of(section: str, given: argparse.Namespace) -> int:
    """How many images a section measures."""
    if section == "noise":
        return given.images
    return BATCH_SIZE * given.batches * (given.rounds if section == "coupled" else 1)


@torch.no_grad()
def visit(
    estimators: Iterable[Remembering], model: VAE, images: Tensor, visits: int, seed: int
) -> None:
    """Let remembered proposals learn from every image so many times, the decoder as it is.

    Those of estimators that learn in the same way are learnt once.
    """
    learnt: dict[tuple[Any, ...], dict[str, Any]] = {}
    for estimator in estimators:
        if estimator.memory is None:
            continue
        way = (
            type(estimator),
            estimator.num_samples,
            estimator.proposal_samples,
            estimator.memory_rate,
            estimator.refinements,
            estimator.refinement_gap,
            estimator.encoder_share,
            estimator.widening,
            estimator.follow_encoder,
        )
        if way not in learnt:
            generator = stream(seed, "visits", images.device)
            for batch in visits * in_batches(images):
                estimator.memory.keep(estimator.learn(model, batch.images, generator, batch.places))
            learnt[way] = estimator.memory.state_dict()
        estimator.memory.load_state_dict(learnt[way])


def settle(estimator: Coupled, model: VAE, images: Tensor, seed: int) -> None:
    """Let the beta of an estimator settle, by short chains of a few images."""
    if not estimator.adapt_beta or estimator.kernel is not Kernel.isir_disir:
        return
    short = copy.copy(estimator)
    short.max_steps = estimator.burn_in + estimator.lag + 10
    steered = dataclasses.replace(estimator)  # which has no memory that could learn meanwhile
    generator = stream(seed, "beta", images.device)
    some = itertools.cycle(in_batches(images))

    def chains() -> LaggedChains:
        short.current_beta = steered.current_beta
        few = Batch(*(part[:20] for part in next(some)))
        begun = start_call(short, model, few, generator)
        return chains_from(begun, short, model, few, generator)

    settle_beta(steered, chains)
    estimator.current_beta = steered.current_beta


def gradient_seconds(
    estimator: Estimator,
    model: VAE,
    batches: Sequence[Batch],
    generator: torch.Generator,
    clock: Clock,
    counts: ChainCounts | None = None,
    seconds: float = 0.0,
) -> float:
    """Seconds an image of a gradient, over all batches, and again until ``seconds`` are over."""

    def work() -> int:
        for batch in batches:
            estimate = gradient(estimator, model, batch, generator)
            if counts is not None and estimate.chains is not None:
                counts.add(estimate.chains)
        return sum(len(batch.images) for batch in batches)

    return 1 / clock.rate(work, seconds)


def evaluation_seconds(
    estimator: Coupled, model: VAE, batch: Batch, generator: torch.Generator, clock: Clock
) -> float:
    """Seconds that a decoder evaluation takes in the chains, which is the same for any batch.

    The encoder, and what is remembered and refined, are ready before.
    """
    proposal = start_call(estimator, model, batch, generator).proposal
    start = clock()
    evaluations = estimator.run_chains(model, batch.images, proposal, generator).evaluations.sum()
    return (clock() - start) / evaluations.item()


def coupled_section(given: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """The cost of every unbiased variant, on the same batches of a fitted model."""
    model, images, iwae, _, variants = subject_for(given, clock)
    batches = in_batches(images)
    counts = {name: ChainCounts(e.max_steps, clock.device) for name, e in variants.items()}
    for estimator in (iwae, *variants.values()):
        gradient(estimator, model, batches[0], stream(given.seed, "warm-up", clock.device))

    def generator_of(index: int) -> torch.Generator:
        """The same random numbers for every variant of a round."""
        return stream(given.seed, f"round {index}", clock.device)

    own = itertools.cycle(batches)
    per_image: dict[str, list[float]] = {name: [] for name in ("IWAE, K 10", *variants)}
    per_evaluation: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(given.rounds):
        part = list(itertools.islice(own, given.batches))
        seconds = gradient_seconds(
            iwae, model, part, generator_of(index), clock, seconds=given.seconds
        )
        per_image["IWAE, K 10"].append(seconds)
        for name, estimator in variants.items():
            generator = generator_of(index)
            seconds = gradient_seconds(estimator, model, part, generator, clock, counts[name])
            per_image[name].append(seconds)
            per_evaluation[name].append(
                evaluation_seconds(estimator, model, part[0], generator, clock)
            )

    reference = per_image["IWAE, K 10"]
    per_sample = [seconds / iwae.num_samples for seconds in reference]
    found: dict[str, Any] = {
        "IWAE, K 10": {
            "us_per_image": 1e6 * median(reference),
            "us_per_sample": 1e6 * median(per_sample),
            "rounds_s_per_image": reference,
        }
    }
    for name, estimator in variants.items():
        found[name] = {
            "overrides": UNBIASED[name],
            "us_per_image": 1e6 * median(per_image[name]),
            "ratio": median_ratio(per_image[name], reference),
            "ratio_of_sums": sum(per_image[name]) / sum(reference),
            "us_per_evaluation": 1e6 * median(per_evaluation[name]),
            "evaluation_over_iwae_sample": median_ratio(per_evaluation[name], per_sample),
            "beta": float(estimator.current_beta),
            "rounds_s_per_image": per_image[name],
            **(counts[name].summary() or {}),
        }
    print_table(
        f"coupled: a gradient on {given.run}, over that of IWAE, K 10 "
        f"({found['IWAE, K 10']['us_per_image']:.0f} us an image)",
        ["", "ratio", "of sums", "evaluations", "tau", "p99", "truncated", "evaluation/sample"],
        [
            [
                name,
                f"{found[name]['ratio']:.1f}",
                f"{found[name]['ratio_of_sums']:.1f}",
                f"{found[name]['decoder_evaluations_per_image']:.0f}",
                f"{found[name]['meeting_time']['mean']:.1f}",
                f"{found[name]['meeting_time']['p99']}",
                f"{found[name]['truncated_fraction']:.2%}",
                f"{found[name]['evaluation_over_iwae_sample']:.2f}",
            ]
            for name in variants
        ],
    )
    return {
        "run": str(given.run),
        "rounds": given.rounds,
        "batches": given.batches,
        "visits": None if given.in_training else given.visits,
        "estimators": found,
    }


def noise_section(given: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """The noise of the estimators, on the same images of a fitted model."""
    between = exact_variance(
        given.run, given.data_dir, given.in_training, given.between_images, given.seed
    )
    model, images, iwae, snis, variants = subject_for(given, clock)
    batches = in_batches(images[: given.images])

    def noise(estimator: Iwae | Snis | Coupled) -> Noise:
        generator = stream(given.seed, "noise", clock.device)
        parts = []
        for batch in batches:
            with torch.no_grad():
                encoded = model.encode(batch.images)
            found = replicate(
                drawing(estimator, model, batch, encoded),
                model,
                batch.images,
                encoded,
                generator,
                given.replicates,
                min_coefficient=0.0,  # of what is drawn here; the variants' are thinned
            )
            parts.append(found.noise(between))
        return Noise.join(parts)

    def seconds_an_image(estimator: Iwae | Snis | Coupled) -> float:
        # On a copy: what a round teaches a memory would make the next one cheaper.
        generator = stream(given.seed, "noise times", clock.device)
        return gradient_seconds(copy.deepcopy(estimator), model, batches, generator, clock)

    thinned = dataclasses.replace(iwae, min_weight=0.1)
    estimators: dict[str, Iwae | Snis | Coupled] = {
        "IWAE, K 10 (biased)": iwae,
        "the same, thinned at 0.1": thinned,
        "snis: remembered, K 10 (biased)": snis,
        **variants,
    }
    noises = {name: noise(estimator) for name, estimator in estimators.items()}
    measurements = {
        name: functools.partial(seconds_an_image, estimator)
        for name, estimator in estimators.items()
    }
    interleave(1, measurements)  # a warm-up
    seconds = interleave(given.rounds, measurements)
    found = {
        name: {
            "noise": noise.mean,
            "standard_error": noise.error,
            "median": noise.of_image.median().item(),
            "largest_share": noise.largest,
            "trimmed_mean": noise.trimmed_mean,
            "recurring": noise.recurring,
            "evaluations": noise.evaluations,
            "truncated_fraction": noise.truncated,
            "us_per_image": 1e6 * median(seconds[name]),
        }
        for name, noise in noises.items()
    }
    headings = [
        *("noise", "+-", "largest", "trimmed", "recurring"),
        *("evaluations", "truncated", "us/image"),
    ]
    if PAPER in noises:
        headings.append("var x time/paper")
        for name, row in found.items():
            time = median_ratio(seconds[name], seconds[PAPER])
            row["variance_x_time_to_paper"] = noises[name].mean / noises[PAPER].mean * time
    print_table(
        f"noise: {given.run}, {given.images} training images, {given.replicates} replicates",
        ["", *headings],
        [
            [
                name,
                f"{row['noise']:.3g}",
                f"{row['standard_error']:.2g}",
                f"{row['largest_share']:.0%}",
                f"{row['trimmed_mean']:.3g}",
                "" if row["recurring"] is None else f"{row['recurring']:.0%}",
                f"{row['evaluations']:.0f}",
                f"{row['truncated_fraction']:.2%}",
                f"{row['us_per_image']:.0f}",
                *([f"{row['variance_x_time_to_paper']:.3g}"] if PAPER in noises else []),
            ]
            for name, row in found.items()
        ],
    )
    return {
        "run": str(given.run),
        "images": sum(len(batch.images) for batch in batches),
        "replicates": given.replicates,
        "visits": None if given.in_training else given.visits,
        "variance_between": between,
        "estimators": found,
    }


@functools.cache
@torch.no_grad()
def exact_variance(
    run: Path, data_dir: str | None, last: bool, num_images: int, seed: int
) -> float:
    """Of the decoder's gradient between images."""
    reference = load(run, num_images, seed, 1000, data_dir)
    if last:
        reference = reference.of_model(copy.deepcopy(fitted(run, data_dir, last).model).cpu())
    return variance_between(reference, copy.deepcopy(reference.model).requires_grad_(True))


def drawing(
    estimator: Iwae | Snis | Coupled, model: VAE, batch: Batch, encoded: Encoded
) -> Callable[[torch.Generator], Weighted]:
    """What a call differentiates, in the noise of ``encoded``, as a function of the generator."""
    if isinstance(estimator, Coupled):
        return functools.partial(coupled_particles, estimator, model, batch, encoded)
    if isinstance(estimator, Iwae):
        return functools.partial(thinned_iwae, estimator, model, batch, encoded)
    return functools.partial(snis_particles, estimator, model, batch, encoded)


def thinned_iwae(
    estimator: Iwae, model: VAE, batch: Batch, encoded: Encoded, generator: torch.Generator
) -> Weighted:
    """What a call of IWAE differentiates."""
    whole = iwae_particles(model, batch.images, encoded, estimator.num_samples, generator)
    return whole._replace(particles=thin(whole.particles, estimator.min_weight, generator))


@torch.no_grad()
def snis_particles(
    estimator: Snis, model: VAE, batch: Batch, encoded: Encoded, generator: torch.Generator
) -> Weighted:
    """What a call of SNIS differentiates; remembered proposals learn nothing."""
    drawn = estimator.draw(model, batch.images, generator, batch.places)
    kept = thin(drawn.particles, estimator.min_weight, generator)
    noise = encoded.rows(kept.image_index).to_noise(kept.noise)
    evaluations = drawn.lesson.evaluations + estimator.num_samples
    return Weighted(kept._replace(noise=noise), evaluations, torch.zeros_like(evaluations))


def coupled_particles(
    estimator: Coupled, model: VAE, batch: Batch, encoded: Encoded, generator: torch.Generator
) -> Weighted:
    """What a call differentiates: its thinned particles, in the noise of ``encoded``.

    Remembered proposals are refined anew, as in any call, and learn nothing.
    """
    begun = start_call(estimator, model, batch, generator)
    chains = chains_from(begun, estimator, model, batch, generator)
    evaluations = chains.evaluations
    if begun.lesson is not None:
        evaluations = evaluations + begun.lesson.evaluations
    particles = thin(chains.particles, estimator.min_coefficient, generator)
    if begun.lesson is not None:
        particles = in_noise_of(encoded, begun.proposal, particles)
    return Weighted(particles, evaluations, chains.truncated)


# Memory


def memory_section(given: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """What training steps add to the memory in use, each in a process of its own."""
    model, images, iwae, _, variants = subject_for(given, clock)
    images = images[: images_of("memory", given)]
    model, batches = copy.deepcopy(model).cpu(), in_batches(images.cpu())
    estimators = {"IWAE, K 10": iwae} | variants
    measurements = {
        name: functools.partial(
            in_a_process_of_its_own,
            step_memory,
            pickle.dumps((estimator, model, batches)),
            given.device,
            given.threads,
        )
        for name, estimator in estimators.items()
    }
    peaks = interleave(given.rounds, measurements)
    if min(peaks["IWAE, K 10"]) == 0:
        raise RunError("memory: the model is too small; a step of IWAE's fits into what is in use")
    found = {
        name: {
            "peak_mib": median(peaks[name]),
            "ratio": median_ratio(peaks[name], peaks["IWAE, K 10"]),
            "rounds_mib": peaks[name],
        }
        for name in estimators
    }
    print_table(
        f"memory: the most that a training step adds, on {given.run or 'a fresh model'}",
        ["", "MiB", "ratio"],
        [[name, f"{row['peak_mib']:.1f}", f"{row['ratio']:.2f}"] for name, row in found.items()],
    )
    return {"run": given.run and str(given.run), "estimators": found}


def in_a_process_of_its_own(function: Callable[..., T], *arguments: Any) -> T:
    """The function's result in a process that has run nothing before."""
    # All of them are forks of one process, which imports what takes long and does nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ucvae.cli._hydra", "ucvae.training"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def step_memory(subject: bytes, device_name: str, threads: int) -> float:
    """MiB by which the memory of a few steps rises above what it is before them.

    Weights, their gradients, the optimizer's state, remembered proposals, and what libraries take
    up for good at their first use are there before: a step on two images has made them.

    Args:
        subject: pickled estimator, model and batches.
        device_name: where the steps run.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    device = devices.resolve(device_name)
    estimator, model, batches = pickle.loads(subject)  # noqa: S301  (from the process that started this one)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters())
    generator = stream(0, "memory", device)

    def step(batch: Batch) -> None:
        gradient(estimator, model, Batch(*(part.to(device) for part in batch)), generator)
        optimizer.step()

    step(Batch(*(part[:2] for part in batches[0])))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present
        before = resident("VmRSS")
    for batch in batches:
        step(batch)
    after = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")
    return (after - before) / 2**20


def resident(field: str) -> int:
    """Bytes of this process in memory, now (``VmRSS``) or at most (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise KeyError(field)


# Evaluation


def ais_section(given: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """How fast chains are annealed: the paper's 16 an image, with 10 leapfrog steps each."""
    model, images, *_ = subject_for(given, clock)
    chains, temperatures, leapfrogs = ais.PAPER
    batch = images[: max(1, model.rows_at_a_time(images) // chains)]
    path = ais.Path.of(
        ais.Schedule.linear.temperatures(AIS_PIECE + 1),
        torch.full((AIS_PIECE,), 0.05, device=clock.device),
    )
    target = ais.Target(model, batch)
    generator = stream(given.seed, "ais", clock.device)

    def work() -> int:
        start = target.from_prior(chains, generator)
        ais.anneal(target, start, path, leapfrogs, generator)
        return len(batch) * AIS_PIECE

    work()  # warm up
    rounds = interleave(given.rounds, {"ais": lambda: clock.rate(work, given.seconds)})["ais"]
    rate = median(rounds)
    found: dict[str, Any] = {
        "images_at_a_time": len(batch),
        "temperatures_x_images_per_s": rate,
        "us_per_evaluation": 1e6 / (rate * chains * leapfrogs),
        "paper_s_per_10000_images": 10_000 * temperatures / rate,
        "rounds": rounds,
    }
    print_table(
        f"ais: {chains} chains, {leapfrogs} leapfrog steps, {len(batch)} images at a time, on "
        f"{given.run or 'a fresh model'}",
        ["", "temperatures x images/s", "us/evaluation", "hours for 10,000 images"],
        [
            [
                f"T = {temperatures:,}",
                f"{rate:,.0f}",
                f"{found['us_per_evaluation']:.2f}",
                f"{found['paper_s_per_10000_images'] / 3600:.2f}",
            ]
        ],
    )
    return {"run": given.run and str(given.run)} | found


# The command

SECTIONS = {
    "training": training_section,
    "coupled": coupled_section,
    "noise": noise_section,
    "memory": memory_section,
    "ais": ais_section,
}
NEED_RUN = ("coupled", "noise")
QUICK = {
    "rounds": 1,
    "seconds": 0.02,
    "batches": 1,
    "images": 10,
    "replicates": 2,
    "visits": 2,
    "between_images": 10,
    "train_images": 500,
    "latent_dim": 2,
}


class Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The parser, for its error messages, and the arguments, checked."""
    parser = Parser(
        prog="bench.py",
        description=__doc__.partition("\n")[0],
        epilog="docs/benchmarks.md tells how to read what is printed.",
    )
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    add("--run", type=Path, metavar="RUN_DIR", help="folder of a run of ucvae-train")
    add("--data-dir", help="static MNIST for training (default: random bits); the run's data")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default cpu)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of a CPU (default: all)")
    add(
        "--clock", choices=list(CLOCKS), default="wall", help="process: on a busy machine, 1 thread"
    )
    add("--rounds", type=int, default=5, help="(default 5)")
    add("--seconds", type=float, default=1.0, help="of a measurement (default 1)")
    add("--batches", type=int, default=2, help="a round, of coupled and memory (default 2)")
    add("--images", type=int, default=60, help="of noise (default 60)")
    add("--replicates", type=int, default=12, help="estimates an image, of noise (default 12)")
    add("--visits", type=int, default=20, help="of remembered proposals beforehand (default 20)")
    add(
        "--in-training",
        action="store_true",
        help="the run's last model and the proposals that it remembers, with no more visits",
    )
    add(
        "--variants",
        nargs="+",
        metavar="NAME",
        default=[""],
        help="unbiased variants whose names have one of these in them (default: all)",
    )
    add("--jax-python", metavar="PATH", help="interpreter that has jax and optax")
    add("--pythae-python", metavar="PATH", help="interpreter that has pythae")
    add("--output", type=Path, default=Path("bench.json"), help="(default bench.json)")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.set_defaults(between_images=300, train_images=NUM_IMAGES, latent_dim=LATENT_DIM)
    given = parser.parse_args(arguments)
    if given.quick:
        vars(given).update(QUICK)
    for name, least in (
        ("threads", 1),
        ("rounds", 1),
        ("batches", 1),
        ("images", 2),
        ("replicates", 2),
        ("visits", 0),
    ):
        if getattr(given, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(given, name)}")
    for part in given.variants:
        if not any(part in name for name in UNBIASED):
            parser.error(f"--variants: none is {part}; there are {', '.join(UNBIASED)}")
    given.variants = tuple(
        name for name in UNBIASED if any(part in name for part in given.variants)
    )
    if not 0 < given.seconds < float("inf"):
        parser.error(f"--seconds must be positive, got {given.seconds:g}")
    if given.clock == "process" and (given.threads > 1 or given.device != "cpu"):
        parser.error("--clock process: adds up the threads' times; it needs --threads 1 on a CPU")
    for name in given.sections:
        if name not in SECTIONS:
            parser.error(f"no section {name}; there are {', '.join(SECTIONS)}")
        if name in NEED_RUN and not given.run:
            parser.error(f"{name}: needs --run RUN_DIR")
    if given.in_training and not given.run:
        parser.error("--in-training: needs --run RUN_DIR")
    if not given.output.parent.is_dir():
        parser.error(f"--output: no folder {given.output.parent}")
    given.sections = given.sections or [
        name for name in SECTIONS if given.run or name not in NEED_RUN
    ]
    return parser, given


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what the figures were found."""
    environment = results.environment(device)
    processor = results.environment(torch.device("cpu"))["device"]["name"]
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": environment["device"]["name"] if device.type == "cuda" else None,
        "versions": environment["versions"],
        "git_revision": environment["git_revision"],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the figures."""
    parser, given = parse(arguments)
    torch.set_num_threads(given.threads)
    try:
        clock = Clock(given.clock, devices.resolve(given.device))
        if given.run:
            fitted(
                given.run, given.data_dir, given.in_training
            )  # now, not after the training, is the time to miss it
        report: dict[str, Any] = {"machine": machine(clock.device)}
        print(", ".join(f"{name} {value}" for name, value in flatten(report["machine"]).items()))
        report["arguments"] = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(given).items()
        }
        for name in dict.fromkeys(given.sections):
            report[name] = SECTIONS[name](given, clock)
            results.write(given.output, report)
    except UcvaeError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
