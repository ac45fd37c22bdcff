r"""Whether the product's estimators of the decoder's gradient are unbiased, by exact references.

For each reference of ``tests/references.py``, a model whose gradient of ``log p(x)`` is known
exactly, and for each estimator of :data:`ESTIMATORS`, N estimates are made and their mean is
compared with the truth. docs/proof.md tells how to read the table.

**The estimates are those of training.** A call of an estimator on n copies of an image gives, by
one backward pass, minus the mean of n independent estimates of that image's gradient: thinning, the
accumulation in slices and the scaling by the batch are all in it. Each image of a reference has
calls of its own, 1/I of the N estimates for I images, and the images' gradients are laid end to end
as one vector of m coordinates, with one truth and one test. Only the row ``unlike`` puts all images
into each batch, as training does, and compares with the mean of their gradients.

**The test** is Hotelling's T^2 over the batch means (:mod:`ucvae.bias`), printed as chi2 with its
degrees of freedom. A row is called biased at ``p < 10^-6``. The whole table tests 17 unbiased
estimators on 4 references, so it raises a false alarm with probability ``68 * 10^-6`` at most.

**Batches.** One estimate has heavy tails: its corrections are signed and last as long as the chains
stay apart. T^2 takes the batch means for normal, and its law holds as far as the sum of all of them
is; a batch of at least 50 keeps any one estimate from making a batch mean of its own. A batch also
has to be large to be fast, for in the chains' last steps few images are left to share a step. On
the other hand the covariance needs several batches a coordinate. So N is spent first on 100 batches
of 50, then on batches of 300, then on 4 batches a coordinate, and what is left on the size again.
With fewer than 4 batches a degree of freedom the test is of random combinations of the coordinates.

**Controls.** The rows ``elbo``, ``iwae`` and ``capped`` are known to be biased. The exit status is
0 only where these are found biased, and where each estimator that claims to be unbiased shows no
bias and had no chain truncated (a truncated estimate is biased, even where the test cannot tell).
Else it is 1, and the last lines say why; with few estimates it may be for want of power.

    python scripts/prove_unbiased.py --estimates 1000000
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ucvae import results
from ucvae.bias import BATCHES_PER_DEGREE, BatchMeans, BiasTest
from ucvae.chains import Kernel
from ucvae.errors import UcvaeError
from ucvae.estimators.coupled import Coupled, Proposals
from ucvae.estimators.elbo import Elbo
from ucvae.estimators.iwae import Iwae
from ucvae.randomness import stream

# The exact references are part of the tests, which a checkout has and an installed package has not.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from references import FALSE_ALARM, REFERENCES, gradients

# Estimates in a batch, and batches.
LEAST_COUNT = 50
GOOD_COUNT = 300
GOOD_BATCHES = 100


@dataclass(frozen=True)
class Row:
    """An estimator and how it is called.

    Attributes:
        make: a fresh estimator.
        unbiased: what it claims; the others are controls.
        adapts: it learns between calls, as in training.
        unlike: each batch holds all images of the reference.
        dtype: of model and images.
    """

    make: Callable[[], Elbo | Iwae | Coupled]
    unbiased: bool = True
    adapts: bool = False
    unlike: bool = False
    dtype: torch.dtype = torch.float64


def coupled(lag: int = 3, min_coefficient: float = 0.0, **settings: Any) -> Callable[[], Coupled]:
    """Make :class:`Coupled`, with all particles and a lag at which most corrections are at work."""
    return lambda: Coupled(lag=lag, min_coefficient=min_coefficient, **settings)


# What estimator=coupled is by default, but for its kernel.
DEFAULT: dict[str, Any] = {
    "proposals": Proposals.remembered,
    "proposal_samples": 5,
    "min_coefficient": 0.2,
    "survival": 0.4,
}

ESTIMATORS = {
    "elbo": Row(Elbo, unbiased=False),
    "iwae": Row(Iwae, unbiased=False),
    # The paper's setting, without thinning and with it.
    "c-isir": Row(coupled(lag=10, kernel=Kernel.isir)),
    "c-isir-disir": Row(coupled(lag=10)),
    "paper": Row(Coupled),
    # What estimator=coupled is by default.
    "default": Row(coupled(kernel=Kernel.isir, **DEFAULT), adapts=True),
    "thin=0.05": Row(coupled(min_coefficient=0.05)),
    "t0=0": Row(coupled(burn_in=0)),
    "t0=5": Row(coupled(burn_in=5)),
    "L=1": Row(coupled(lag=1)),
    "c-isir,L=1": Row(coupled(lag=1, kernel=Kernel.isir)),
    "K=2": Row(coupled(num_samples=2)),
    "beta=0.9": Row(coupled(beta=0.9)),
    "adapted": Row(coupled(), adapts=True),
    # Slow enough for many batches of proposals that are neither the encoder's nor the best.
    "remembered": Row(
        coupled(kernel=Kernel.isir, proposals=Proposals.remembered, memory_rate=0.02), adapts=True
    ),
    "c-isir-hmc": Row(coupled(kernel=Kernel.isir_hmc)),
    # Few samples, so that pairs stay apart for long enough to make many trajectories.
    "c-isir-hmc,K=2": Row(coupled(lag=1, kernel=Kernel.isir_hmc, num_samples=2)),
    "unlike": Row(coupled(), unlike=True),
    "c-isir-hmc,unlike": Row(coupled(lag=1, kernel=Kernel.isir_hmc), unlike=True),
    "default,hmc": Row(coupled(kernel=Kernel.isir_hmc, **DEFAULT), adapts=True),
    "float32": Row(coupled(), dtype=torch.float32),
    # K=2 cut at t0 + L, where most of its chains have not met.
    "capped": Row(coupled(num_samples=2, max_steps=4), unbiased=False),
    # The same with roulette in the cap's place; ISIR's pairs take longer to meet.
    "roulette": Row(coupled(num_samples=2, max_steps=4, survival=0.4)),
    "c-isir,roulette": Row(coupled(kernel=Kernel.isir, num_samples=2, max_steps=8, survival=0.4)),
    # Roulette where a pair of the default's, of fewer samples, does play it.
    "default,roulette": Row(
        coupled(
            lag=1,
            kernel=Kernel.isir,
            num_samples=2,
            max_steps=2,
            **DEFAULT,
        ),
        adapts=True,
    ),
}


@dataclass(frozen=True)
class Result:
    """A row of the table.

    Attributes:
        reference, estimator: by name.
        unbiased: what the estimator claims.
        estimates, batches: how many were made, and in how many batches.
        test: the mean's error and its significance.
        truncated: fraction of the estimates whose chains were cut at the cap.
        evaluations: of the log weight, for one estimate.
        per_second: estimates made in a second, backward pass included.
    """

    reference: str
    estimator: str
    unbiased: bool
    estimates: int
    batches: int
    test: BiasTest
    truncated: float
    evaluations: float
    per_second: float

    @property
    def verdict(self) -> str:
        """What the test says."""
        return "biased" if self.test.p_value < FALSE_ALARM else "no bias found"

    @property
    def failures(self) -> Iterator[str]:
        """What speaks against the claim, if anything."""
        where = f"{self.reference}: {self.estimator}"
        found = self.test.p_value < FALSE_ALARM
        if self.unbiased and found:
            yield f"{where} was found biased, and claims to be unbiased"
        if self.unbiased and self.truncated > 0:
            yield (
                f"{where} had {self.truncated:.1e} of its estimates truncated: these are biased, "
                f"and '{self.verdict}' is said of the estimator with its cap"
            )
        if not self.unbiased and not found:
            yield f"{where} was not found biased, and is: too few estimates"


def batches_of(estimates: int, images: int, coordinates: int, count: int | None) -> tuple[int, int]:
    """The number of batches, and of estimates of each image in a batch.

    Args:
        estimates: N, of all images together.
        images: I.
        coordinates: m.
        count: the estimates of each image in a batch, or None for a choice.
    """
    if count is None:
        count = max(LEAST_COUNT, min(GOOD_COUNT, estimates // (images * GOOD_BATCHES)))
        batches = max(GOOD_BATCHES, BATCHES_PER_DEGREE * coordinates)
        count = max(count, estimates // (images * batches))
    return math.ceil(estimates / (images * count)), count


def prove(reference: Any, name: str, estimates: int, count: int | None, seed: int) -> Result:
    """Make the estimates of one row of the table, and test their mean.

    Args:
        reference: of ``REFERENCES``.
        name: of :data:`ESTIMATORS`.
        estimates: N.
        count: estimates of each image in a batch, or None for a choice.
        seed: each row has a stream of its own.
    """
    row = ESTIMATORS[name]
    model = copy.deepcopy(reference.model).to(row.dtype)
    images = reference.images.to(row.dtype)
    truths = torch.stack([reference.gradient(image) for image in reference.images])
    truth = truths.mean(0) if row.unlike else truths.flatten()
    batches, count = batches_of(estimates, len(images), len(truth), count)
    calls = [images.repeat(count, 1)] if row.unlike else [i.expand(count, -1) for i in images]
    estimator = row.make()
    # Each replicate of an image has a place of its own, so that memories are independent.
    estimator.begin(model, sum(len(batch) for batch in calls))
    places = torch.arange(sum(len(batch) for batch in calls)).split([len(b) for b in calls])
    generator = stream(seed, f"{reference.name}/{name}")
    means = BatchMeans(len(truth), rounding=1e-9 if row.dtype == torch.float64 else 1e-5)
    truncated = evaluations = 0
    start = time.perf_counter()
    for _ in tqdm(range(batches), f"{reference.name} {name}", leave=False, disable=None):
        parts: list[Tensor] = []
        for batch, index in zip(calls, places, strict=True):
            estimate = estimator(model, batch, generator, index)
            parts.append(gradients(-estimate.surrogate, model.decoder).double())
            if estimate.chains is None:
                evaluations += estimator.num_samples * len(batch)
            else:
                evaluations += int(estimate.chains.evaluations.sum())
                truncated += int(estimate.chains.truncated.sum())
            if row.adapts:
                estimator.adapt(estimate)
        means.add(torch.cat(parts), len(calls[0]))
    seconds = time.perf_counter() - start
    made = batches * count * len(images)
    return Result(
        reference.name,
        name,
        row.unbiased,
        made,
        batches,
        means.test(truth),
        truncated / made,
        evaluations / made,
        made / seconds,
    )


HEADING = (
    f"{'reference':<10}{'estimator':<18}{'error':>9}{'s.e.':>9}{'chi2':>11}{'df':>4}{'p':>9}"
    f"{'truncated':>11}{'evals':>8}{'variance':>10}{'var*evals':>11}{'per s':>9}  verdict"
)


def line(result: Result) -> str:
    """A row as printed."""
    test = result.test
    return (
        f"{result.reference:<10}{result.estimator:<18}{test.relative_error:>9.5f}"
        f"{test.standard_error:>9.5f}{test.chi_square:>11.5g}{test.degrees:>4}"
        f"{test.p_value:>9.2g}{result.truncated:>11.2g}{result.evaluations:>8.1f}"
        f"{test.variance:>10.4g}{test.variance * result.evaluations:>11.4g}"
        f"{result.per_second:>9,.0f}  {result.verdict}"
    )


def describe(row: Row) -> str:
    """An estimator's settings, for the legend."""
    estimator = row.make()
    if not isinstance(estimator, Coupled):
        return f"K={estimator.num_samples}; biased"
    kernel = estimator.kernel.value.upper().replace("_", "-")
    parts = [f"C-{kernel} K={estimator.num_samples} L={estimator.lag} t0={estimator.burn_in}"]
    if estimator.kernel is Kernel.isir_disir:
        parts.append(f"beta={estimator.beta}{' and adapted between calls' * row.adapts}")
    if estimator.proposals is Proposals.remembered:
        parts.append("remembered proposals")
    if estimator.min_coefficient:
        parts.append(f"thinned at {estimator.min_coefficient:g}")
    if row.unlike:
        parts.append("a batch of unlike images")
    if row.dtype != torch.float64:
        parts.append("float32")
    if estimator.survival:
        parts.append(f"roulette from {estimator.max_steps} steps on, q={estimator.survival:g}")
    if not row.unbiased:
        parts.append(f"cut at {estimator.max_steps} steps; biased")
    return ", ".join(parts)


def report(found: list[Result]) -> tuple[str, int]:
    """The lines below the table, and the exit status."""
    failures = [failure for result in found for failure in result.failures]
    claims = [result.unbiased for result in found]
    lines = failures or [
        f"{sum(claims)} times no bias found in an unbiased estimator; "
        f"{len(claims) - sum(claims)} times a biased one found"
    ]
    if all(claims):
        lines.append("no control: nothing here shows that a bias would be found")
    return "\n".join(lines), int(bool(failures))


def as_json(found: list[Result], given: argparse.Namespace) -> dict[str, Any]:
    """The results as plain numbers; an infinite chi-square is null."""
    rows = []
    for result in found:
        test = result.test._asdict()
        if math.isinf(test["chi_square"]):
            test["chi_square"] = None
        rows.append({**asdict(result), "test": test, "verdict": result.verdict})
    environment = results.environment(torch.device("cpu"))
    return {"estimates": given.estimates, "seed": given.seed, **environment, "rows": rows}


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for its error messages, and the arguments, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="See the docstring for what is printed."
    )
    parser.add_argument(
        "--estimates", type=int, required=True, metavar="N", help="of each row of the table"
    )
    parser.add_argument("--references", nargs="+", choices=REFERENCES, default=list(REFERENCES))
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch", type=int, metavar="n", help="estimates of an image in a batch (default: by N)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    given = parser.parse_args(arguments)
    if given.batch is not None and given.batch < LEAST_COUNT:
        parser.error(f"--batch must be at least {LEAST_COUNT}, got {given.batch}")
    return parser, given


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status."""
    parser, given = parse(arguments)
    torch.set_num_threads(1)
    references = {name: REFERENCES[name]() for name in given.references}
    for name, reference in references.items():
        least = (given.batch or LEAST_COUNT) * len(reference.images) * 2 * BATCHES_PER_DEGREE
        if given.estimates < least:
            parser.error(f"--estimates must be at least {least} for {name}, got {given.estimates}")
    found: list[Result] = []
    try:
        for name in given.estimators:
            print(f"{name:<18}{describe(ESTIMATORS[name])}")
        print(HEADING, flush=True)
        if given.json:
            results.write(given.json, as_json(found, given))  # refused now rather than in hours
        for reference in references.values():
            for name in given.estimators:
                found.append(prove(reference, name, given.estimates, given.batch, given.seed))
                print(line(found[-1]), flush=True)
                if given.json:
                    results.write(given.json, as_json(found, given))
    except UcvaeError as error:
        parser.error(str(error))
    text, status = report(found)
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
