r"""What decides how long the coupled chains of a trained run take to meet.

    python scripts/explain_meeting_times.py RUN_DIR TABLE [TABLE ...]

prints the tables asked for, all for the same training images of the run:

``times``
    Meeting times with the run's own proposal, for both kernels: three rows.
``chains``
    Kernel, beta, K and L at the run's own proposal, and where the estimator's rule takes beta.
``weights``
    How high above ``p(x)`` the weights climb at which chains sit, and how many ISIR steps they stay
    there: from a state of weight w, some ``w / p(x)`` independent proposals are needed to move on.
``noise``
    What the estimate is worth: variance of the decoder's gradient within an image over its
    variance between images, for kernels, betas, K and L, and with proposals of a full covariance
    refined for each image.
``proposals``
    The decoder as it is, other proposals for the same images: wider ones, and ones refined for
    each image, with a diagonal and with a full covariance.
``visits``
    Proposals of a full covariance as they are remembered in training
    (``estimator.proposals=remembered``), after so many visits to each image with the decoder fixed.
    A visit is one step of 10 samples.
``encoders``
    The decoder as it is, the encoder trained on for ``--epochs`` epochs by other objectives.
``sizes``
    The decoder as it is, encoders of other sizes and covariances (``model.encoder``) trained from
    scratch for ``--epochs`` epochs by DReG, K = 10; and the noise of IWAE, and of ISIR with these
    proposals as they are and with ones that are remembered, at the first visit to an image.
``switch``
    Decoder and encoder trained on for ``--steps`` steps, by IWAE and by the coupled estimator.

Columns: ``reverse`` is ``KL(q || p(z|x)) = log p(x) - E_q[log w]``, ``forward`` is
``KL(p(z|x) || q) = E_p[log w] - log p(x)``, both in nats and averaged over images, with ``p(x)``
and ``E_p`` by 2,000 draws from proposals refined for each image. Times are steps after the lag,
``tau - L``; ``truncated`` is the share of images that had not met at ``--max-steps``;
``evaluations`` are those of the decoder, for an image; ``sum|c|`` is the sum of the absolute
coefficients of an image, 1 for a chain that met at once. Everything runs on the CPU, on
``checkpoints/best.pt``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure_thinning import image_gradients
from torch import Tensor

from ucvae import checkpoint
from ucvae.chains import Kernel, LaggedChains, LogWeight, SignedParticles, run_lagged_chains
from ucvae.chains.kernels import Arms, State, StepNoise, draw_noise, step
from ucvae.chains.thinning import thin
from ucvae.config import TrainSettings, train_settings
from ucvae.data.base import ImageData, as_input
from ucvae.errors import ConfigError, UcvaeError
from ucvae.estimators.base import Estimate, Estimator
from ucvae.estimators.coupled import Coupled, Proposals
from ucvae.estimators.elbo import Elbo
from ucvae.estimators.iwae import Iwae
from ucvae.models.gaussians import Encoded, FullGaussian, Proposal
from ucvae.models.mlp import Covariance, Encoder, Mlp
from ucvae.models.refinement import improve, log_joint_gradient
from ucvae.models.vae import VAE
from ucvae.randomness import stream
from ucvae.studies.base import settle_beta

PAPER = dict(num_samples=10, lag=10, burn_in=1)
# Of the table ``noise``.
NOISE_IMAGES, REPLICATES = 60, 12
COLUMNS = (
    f"{'':34} {'reverse':>7} {'forward':>7} | {'mean':>6} {'p50':>4} {'p90':>4} {'p99':>4} "
    f"{'truncated':>9} {'evaluations':>11} {'sum|c|':>6}"
)


def full(encoded: Encoded, width: float = 1.0) -> FullGaussian:
    """The encoder's proposals, ``width`` times as wide."""
    mean, scale = FullGaussian.of(encoded)
    return FullGaussian(mean, width * scale)


def log_weight_of(proposal: FullGaussian, model: VAE, images: Tensor) -> LogWeight:
    """The log importance weights for the chains."""

    def of_noise(noise: Tensor, image_index: Tensor) -> Tensor:
        return model.log_weight(images[image_index], proposal.rows(image_index), noise)

    return of_noise


class Posterior(NamedTuple):
    """Of each image: ``log p(x) [n]``, and weighted draws ``z [n, m, D]`` with weights ``[n, m]``.

    By importance sampling from proposals refined for each image, which fit far better than the
    encoder's: its own estimate of ``log p(x)`` is too low where it has never been.
    """

    evidence: Tensor
    z: Tensor
    weights: Tensor


class Subject(NamedTuple):
    """What every table needs: the run, its images, their posteriors, how far chains may go."""

    settings: TrainSettings
    data: ImageData
    model: VAE
    images: Tensor
    posterior: Posterior
    seed: int
    max_steps: int

    def of_model(self, model: VAE) -> Subject:
        """The same with another model, encoder and decoder."""
        posterior = sample_posterior(model, self.images, self.seed)
        return self._replace(model=model, posterior=posterior)

    def encoded(self) -> FullGaussian:
        """The encoder's proposals for the images."""
        return full(self.model.encode(self.images))

    def chains(self, proposal: FullGaussian, **settings: Any) -> LaggedChains:
        """Chains of all images; the same random numbers for the same settings."""
        settings = PAPER | dict(max_steps=self.max_steps) | settings
        return run_lagged_chains(
            log_weight_of(proposal, self.model, self.images),
            len(self.images),
            self.model.latent_dim,
            generator=stream(self.seed, "chains"),
            dtype=self.images.dtype,
            **settings,
        )

    def divergences(self, proposal: FullGaussian) -> tuple[float, float]:
        """``KL(q || p(z|x))`` and ``KL(p(z|x) || q)``, averaged over images, nats."""
        evidence, z, weights = self.posterior
        noise = torch.randn_like(z[:, :200], generator=stream(self.seed, "divergence"))
        log_weights = torch.cat(
            [
                log_weight_of(proposal, self.model, self.images)(part, torch.arange(len(z)))
                for part in noise.split(50, dim=1)
            ],
            dim=1,
        )
        reverse = evidence - log_weights.double().mean(1)
        joint = in_parts(self.model.log_joint, self.images, z)
        forward = (weights * (joint - proposal.log_prob(z)).double()).sum(1) - evidence
        return reverse.mean().item(), forward.mean().item()

    def row(self, name: str, proposal: FullGaussian, **settings: Any) -> LaggedChains:
        """Print a row with both divergences."""
        reverse, forward = self.divergences(proposal)
        return self.times(f"{name:<34} {reverse:>7.2f} {forward:>7.2f}", proposal, **settings)

    def times(self, name: str, proposal: FullGaussian, **settings: Any) -> LaggedChains:
        """Print a row of meeting times and costs."""
        chains = self.chains(proposal, **settings)
        after = (chains.meeting_time - (PAPER | settings)["lag"]).double()
        p50, p90, p99 = after.quantile(torch.tensor([0.5, 0.9, 0.99]).double()).tolist()
        size = chains.particles.coefficient.abs().sum()
        print(
            f"{name:<50} | {after.mean():>6.1f} {p50:>4.0f} {p90:>4.0f} {p99:>4.0f} "
            f"{chains.truncated.double().mean():>9.2%} "
            f"{chains.evaluations.double().mean():>11.0f} {size / len(self.images):>6.2f}",
            flush=True,
        )
        return chains

    def three_rows(self, name: str, proposal: FullGaussian) -> None:
        """Print the composed kernel at two correlations, and ISIR."""
        self.row(name, proposal, beta=0.5)
        self.times("  the same, beta 0.95", proposal, beta=0.95)
        self.times("  the same, isir", proposal, kernel="isir")


def in_parts(function: Callable[[Tensor, Tensor], Tensor], images: Tensor, z: Tensor) -> Tensor:
    """``function(images, z)`` of many z, without the memory of a single pass."""
    return torch.cat([function(images, part) for part in z.split(50, dim=1)], dim=1)


def sample_posterior(model: VAE, images: Tensor, seed: int, count: int = 2000) -> Posterior:
    """Importance sampling from refined proposals with full covariances."""
    proposal = refine(model, images, seed, diagonal=False)
    shape = (len(images), count, model.latent_dim)
    z = proposal.transform(torch.randn(shape, generator=stream(seed, "posterior")))
    log_weights = (in_parts(model.log_joint, images, z) - proposal.log_prob(z)).double()
    evidence = log_weights.logsumexp(1) - math.log(count)
    return Posterior(evidence, z, torch.softmax(log_weights, 1))


def refine(
    model: VAE, images: Tensor, seed: int, *, diagonal: bool, steps: int = 300, count: int = 10
) -> FullGaussian:
    """Proposals fitted to each image, from the encoder's on, by the ELBO.

    The gradient is that of the path alone (Roeder, Wu and Duvenaud 2017), whose variance vanishes
    where the proposal fits. The scale is ``diag(s) (I + B)``, B below the diagonal.
    """
    start = full(model.encode(images))
    std = start.scale.diagonal(dim1=1, dim2=2)
    mean, log_std = start.mean.clone().requires_grad_(), std.log().requires_grad_()
    below = torch.zeros_like(start.scale) if diagonal else start.scale / std[:, :, None]
    below.requires_grad_()
    free = [mean, log_std] if diagonal else [mean, log_std, below]
    optimizer = torch.optim.Adam(free)
    generator = stream(seed, "refinement")

    def current() -> FullGaussian:
        unit = below.tril(-1) + torch.eye(model.latent_dim).to(below)
        return FullGaussian(mean, log_std.exp()[:, :, None] * unit)

    with torch.enable_grad():
        for done in range(steps):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - done / steps)
            proposal = current()
            shape = (len(images), count, model.latent_dim)
            z = proposal.transform(torch.randn(shape, generator=generator))
            log_weights = model.log_joint(images, z) - proposal.detach().log_prob(z)
            optimizer.zero_grad()
            (-log_weights.mean(1).sum()).backward()
            optimizer.step()
    return current().detach()


def times_table(subject: Subject) -> None:
    """The run as it is."""
    print(COLUMNS)
    subject.three_rows("encoder", subject.encoded())


def chains_table(subject: Subject) -> None:
    """Kernel, beta, K and L."""
    proposal = subject.encoded()
    print(COLUMNS)
    subject.row("isir, K 10, L 10", proposal, kernel="isir")
    for beta in (0.0, 0.3, 0.5, 0.8, 0.95):
        chains = subject.times(f"isir_disir, K 10, L 10, beta {beta}", proposal, beta=beta)
        print(f"{'':34} effective sample size of its DISIR steps {chains.ess:.2f}")
    beta, ess = settled_beta(subject, proposal)
    print(
        f"the estimator's rule takes beta from 0.5 to {beta:.3f}, effective sample size {ess:.2f}"
    )
    for count in (5, 30, 50):
        subject.times(f"isir_disir, K {count}, L 10, beta 0.5", proposal, num_samples=count)
    for lag in (1, 3, 30):
        subject.times(f"isir_disir, K 10, L {lag}, beta 0.5", proposal, lag=lag)
    for count, lag in itertools.product((10, 50), (1, 3)):
        settings = dict(kernel="isir", num_samples=count, lag=lag)
        subject.times(f"isir, K {count}, L {lag}", proposal, **settings)


def settled_beta(subject: Subject, proposal: FullGaussian) -> tuple[float, float]:
    """Where ``beta - 0.01 (ESS - 0.3 K)`` settles at a fixed model, and the ESS of the last call.

    By chains of 10 steps that are cut off soon after, as most of training's are met by then.
    """
    estimator = Coupled()
    generator = stream(subject.seed, "beta")
    last: list[LaggedChains] = []

    def chains() -> LaggedChains:
        last[:] = [
            run_lagged_chains(
                log_weight_of(proposal, subject.model, subject.images),
                len(subject.images),
                subject.model.latent_dim,
                generator=generator,
                beta=float(estimator.current_beta),
                max_steps=20,
            )
        ]
        return last[0]

    return settle_beta(estimator, chains), last[0].ess.item()


def weights_table(subject: Subject) -> None:
    """How high states climb in so many steps, and how long they stay at a height."""
    log_weight = log_weight_of(subject.encoded(), subject.model, subject.images)
    evidence, z, weights = subject.posterior
    picked = torch.multinomial(weights, 1, generator=stream(subject.seed, "picked"))
    z = z.gather(1, picked[:, :, None].expand(-1, -1, z.shape[2]))
    exact = subject.model.log_joint(subject.images, z) - subject.encoded().log_prob(z)
    print("log w - log p(x) of the state of a chain, over the images")
    print(f"{'':24} {'p10':>6} {'p50':>6} {'p90':>6}")
    for kernel, beta in (("isir", None), ("isir_disir", 0.5), ("isir_disir", 0.95)):
        for steps in (1, 3, 10, 100):
            state = single_chain(subject, log_weight, beta, steps)
            ratio = state.log_weight.double() - evidence
            name = kernel if beta is None else f"{kernel} {beta}"
            print(f"{name:<16} t = {steps:<3} " + _quantiles(ratio))
    print(f"{'a posterior draw':<24} " + _quantiles(exact[:, 0].double() - evidence))
    print("ISIR steps, K 10, until a state moves: isir_disir 0.95 after 100 steps")
    print(f"{'log w - log p(x)':>18} {'1 + w/(9 p(x)), mean':>21} {'observed, mean':>15}")
    waits = steps_until_moved(subject, log_weight, state)
    for part in ratio.argsort().chunk(6):
        expected = (1 + ratio[part].exp() / 9).clamp(max=subject.max_steps)
        print(
            f"{ratio[part].min():>8.1f} to {ratio[part].max():>6.1f} {expected.mean():>21.1f} "
            f"{waits[part].mean():>15.1f}"
        )


def single_chain(subject: Subject, log_weight: LogWeight, beta: float | None, steps: int) -> State:
    """The state of a chain of each image after some steps; ``beta=None`` is ISIR alone."""
    generator = stream(subject.seed, "single chain")
    shape = (len(subject.images), subject.model.latent_dim)
    everyone = torch.arange(shape[0])
    noise = torch.randn(shape, generator=generator)
    state = State(noise, log_weight(noise[:, None], everyone)[:, 0])
    arms = [None] if beta is None else [None, Arms.of(torch.tensor(beta), 10)]
    for _, arm in itertools.product(range(steps), arms):
        state, _ = step(
            state, _draw(subject, len(noise), generator), _of(log_weight, everyone), arm
        )
    return state


def steps_until_moved(subject: Subject, log_weight: LogWeight, start: State) -> Tensor:
    """ISIR steps until a chain leaves its state, ``[n]``; at most ``max_steps``."""
    generator = stream(subject.seed, "waits")
    waits = torch.zeros(len(subject.images), dtype=torch.float64)
    left = torch.arange(len(waits))
    for _ in range(subject.max_steps):
        waits[left] += 1
        here = start.rows(left)
        moved, _ = step(here, _draw(subject, len(left), generator), _of(log_weight, left), None)
        left = left[(moved.noise == here.noise).all(1)]
        if not len(left):
            break
    return waits


def _draw(subject: Subject, count: int, generator: torch.Generator) -> StepNoise:
    return draw_noise(
        count,
        10,
        subject.model.latent_dim,
        generator=generator,
        device=subject.images.device,
        dtype=subject.images.dtype,
    )


def _of(log_weight: LogWeight, image_index: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda noise: log_weight(noise, image_index)


def _quantiles(values: Tensor) -> str:
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype)
    return " ".join(f"{value:>6.1f}" for value in values.quantile(levels).tolist())


@torch.no_grad()
def noise_table(subject: Subject) -> None:
    """Variance within images over variance between images, of the decoder's gradient."""
    images = subject.images[:NOISE_IMAGES]
    proposal = subject.model.encode(images)
    differentiable = copy.deepcopy(subject.model).requires_grad_(True)
    between = variance_between(subject, differentiable)
    print(
        f"{'':34} {'evaluations':>11} {'truncated':>9} {'noise':>7} {'+-':>6} {'median':>6} "
        f"{'largest image':>13} {'noise x evaluations':>20}"
    )
    for name, estimate in noise_rows(subject, images, proposal).items():
        generator = stream(subject.seed, "noise")
        noise = replicate(estimate, differentiable, images, proposal, generator).noise(between)
        print(
            f"{name:<34} {noise.evaluations:>11.0f} {noise.truncated:>9.2%} {noise.mean:>7.2f} "
            f"{noise.error:>6.2f} {noise.of_image.median():>6.2f} {noise.largest:>13.0%} "
            f"{noise.mean * noise.evaluations:>20.0f}",
            flush=True,
        )


class Noise(NamedTuple):
    """The noise of an estimate of the decoder's gradient.

    Attributes:
        of_image: ``[n]``, an image's variance over replicates, over the variance between images.
        evaluations: of the decoder, for an image.
        truncated: the share of images that had not met at the cap.
        halves: ``[n, 2]``, as ``of_image``, by the first half of the replicates and by the others;
            NaN where one of these is a single replicate.
    """

    of_image: Tensor
    evaluations: float
    truncated: float
    halves: Tensor

    @classmethod
    def join(cls, parts: Sequence[Noise]) -> Noise:
        """That of all images together."""
        sizes = [len(part.of_image) for part in parts]

        def over_images(values: Sequence[float]) -> float:
            return sum(map(operator.mul, values, sizes)) / sum(sizes)

        of_image, evaluations, truncated, halves = zip(*parts, strict=True)
        return cls(
            torch.cat(of_image),
            over_images(evaluations),
            over_images(truncated),
            torch.cat(halves),
        )

    @property
    def mean(self) -> float:
        """Over images."""
        return self.of_image.mean().item()

    @property
    def error(self) -> float:
        """The standard error of the mean, over images."""
        return (self.of_image.std() / len(self.of_image) ** 0.5).item()

    @property
    def largest(self) -> float:
        """The share of the whole that the noisiest image has."""
        return (self.of_image.max() / self.of_image.sum()).item()

    @property
    def trimmed_mean(self) -> float:
        """The mean without the largest thousandth of the images."""
        kept = len(self.of_image) - len(self.of_image) // 1000
        return self.of_image.sort().values[:kept].mean().item()

    @property
    def recurring(self) -> float | None:
        """How many of the noisiest hundredth of the images are in the noisiest tenth elsewhere.

        That is, in the other half of the replicates; the mean of both ways. 0.1 by chance: where
        events strike any image, or all images are equally noisy. 1 where it is always the same
        images. None where a half is a single replicate.
        """
        if self.halves.isnan().any():
            return None
        count = len(self.halves)
        noisiest = self.halves.argsort(dim=0, descending=True)
        place = noisiest.argsort(dim=0)
        elsewhere = place.flip(1).gather(0, noisiest[: max(1, count // 100)])
        return (elsewhere < count / 10).double().mean().item()


class Replicates(NamedTuple):
    """Independent estimates of the decoder's gradient of each of n images.

    Attributes:
        mean: ``[n, parameters]`` float64, over the estimates.
        within: ``[n]``, their variance, a trace.
        evaluations: of the decoder, for an image and estimate.
        truncated: the share of images that had not met at the cap.
        halves: ``[n, 2]``, the variance of the first half of the estimates and of the others.
    """

    mean: Tensor
    within: Tensor
    evaluations: float
    truncated: float
    halves: Tensor

    def noise(self, between: float) -> Noise:
        """The noise, by the variance between images; see :func:`variance_between`."""
        return Noise(self.within / between, self.evaluations, self.truncated, self.halves / between)


def replicate(
    estimate: Callable[[torch.Generator], Weighted | LaggedChains],
    model: VAE,
    images: Tensor,
    proposal: Encoded,
    generator: torch.Generator,
    replicates: int = REPLICATES,
    min_coefficient: float = 1e-3,
) -> Replicates:
    """Repeat an estimate, thinned as the coupled estimator does.

    Args:
        estimate: draws the particles of all images.
        model: its decoder differentiable, on the device of all the rest.
        images: ``[n, P]``.
        proposal: what the particles' noise refers to.
        generator: of the estimates and of the thinning.
        replicates: estimates of each image, at least 2.
        min_coefficient: of the thinning.
    """
    totals, squares = [torch.zeros(())] * 2, [torch.zeros(())] * 2  # of either half
    evaluations = truncated = 0.0
    for index in range(replicates):
        drawn = estimate(generator)
        particles = thin(drawn.particles, min_coefficient, generator)
        gradients = image_gradients(model, images, proposal, particles).double()
        half = 2 * index // replicates
        totals[half] = totals[half] + gradients
        squares[half] = squares[half] + gradients.square().sum(1)
        evaluations += drawn.evaluations.double().mean().item() / replicates
        truncated += drawn.truncated.double().mean().item() / replicates

    def variance(total: Tensor, square: Tensor, count: int) -> Tensor:
        return (square - total.square().sum(1) / count) / (count - 1 or math.nan)

    counts = replicates - replicates // 2, replicates // 2
    total = totals[0] + totals[1]
    return Replicates(
        mean=total / replicates,
        within=variance(total, squares[0] + squares[1], replicates),
        evaluations=evaluations,
        truncated=truncated,
        halves=torch.stack(list(map(variance, totals, squares, counts)), 1),
    )


class Weighted(NamedTuple):
    """IWAE's estimate in the form of the chains'."""

    particles: SignedParticles
    evaluations: Tensor
    truncated: Tensor


def iwae_particles(
    model: VAE, images: Tensor, proposal: Proposal, count: int, generator: torch.Generator
) -> Weighted:
    """IWAE's normalised weights of ``count`` draws for each image."""
    shape = (len(images), count, proposal.noise_dim)
    noise = torch.randn(shape, generator=generator, device=images.device, dtype=images.dtype)
    with torch.no_grad():
        weights = torch.softmax(model.log_weight(images, proposal, noise), -1)
    everyone = torch.arange(len(images), device=images.device)
    never = torch.zeros(len(images), device=images.device)
    return Weighted(
        SignedParticles(everyone, noise, weights), torch.full_like(everyone, count), never
    )


def in_noise_of(
    encoded: Encoded, proposal: Proposal, particles: SignedParticles
) -> SignedParticles:
    """The same z, which are ``proposal``'s, in the encoder's noise, which the gradient takes."""
    z = proposal.rows(particles.image_index).transform(particles.noise)
    noise = encoded.rows(particles.image_index).to_noise(z)
    return particles._replace(noise=noise)


def noise_rows(
    subject: Subject, images: Tensor, proposal: Encoded
) -> dict[str, Callable[[torch.Generator], Weighted | LaggedChains]]:
    """What the noise table compares, by name."""

    def chains(estimator: Coupled, generator: torch.Generator) -> LaggedChains:
        estimator.max_steps = subject.max_steps
        return estimator.run_chains(subject.model, images, proposal, generator)

    def refined_chains(settings: dict[str, Any], generator: torch.Generator) -> Weighted:
        run = run_lagged_chains(
            log_weight_of(refined, subject.model, images),
            len(images),
            subject.model.latent_dim,
            generator=generator,
            max_steps=subject.max_steps,
            **settings,
        )
        particles = in_noise_of(proposal, refined, run.particles)
        return Weighted(particles, run.evaluations, run.truncated)

    refined = refine(subject.model, images, subject.seed, diagonal=False)
    rows: dict[str, Callable[[torch.Generator], Weighted | LaggedChains]] = {
        f"IWAE, K {count} (biased)": partial(iwae_particles, subject.model, images, proposal, count)
        for count in (10, 50)
    }
    for count, lag in ISIR_CHOICES:
        estimator = Coupled(num_samples=count, lag=lag, kernel=Kernel.isir)
        rows[f"isir, K {count}, L {lag}"] = partial(chains, estimator)
    for count, lag, beta in COMPOSED_CHOICES:
        estimator = Coupled(num_samples=count, lag=lag, beta=beta)
        rows[f"isir_disir, K {count}, L {lag}, beta {beta}"] = partial(chains, estimator)
    for settings in REFINED_CHOICES:
        name = "refined: {kernel}, K 10, L {lag}".format(**settings)
        rows[name] = partial(refined_chains, settings)
    return rows


VISITS = (0, 5, 10, 20, 40)
ISIR_CHOICES = [(10, 1), (10, 3), (10, 10), (50, 2), (50, 10)]
COMPOSED_CHOICES = [
    (10, 3, 0.5),
    (10, 10, 0.0),
    (10, 10, 0.3),
    (10, 10, 0.5),
    (10, 10, 0.8),
    (10, 10, 0.95),
    (30, 3, 0.5),
]
REFINED_CHOICES = [
    dict(kernel="isir", lag=1),
    dict(kernel="isir", lag=3),
    dict(kernel="isir", lag=10),
    dict(kernel="isir_disir", lag=3),
    dict(kernel="isir_disir", lag=10),
]


@torch.no_grad()
def posterior_gradients(subject: Subject, differentiable: VAE) -> Tensor:
    """The decoder's gradient of each image, ``[n, parameters]``, by posterior draws."""
    images = subject.images
    _, z, weights = subject.posterior
    proposal = subject.model.encode(images)
    noise = proposal.to_noise(z)
    particles = SignedParticles(torch.arange(len(images)), noise, weights.to(noise.dtype))
    kept = thin(particles, 1e-3, stream(subject.seed, "between"))
    return image_gradients(differentiable, images, proposal, kept)


def variance_between(subject: Subject, differentiable: VAE) -> float:
    """The variance over images of the decoder's gradient, a trace."""
    return total_variance(posterior_gradients(subject, differentiable))


def total_variance(gradients: Tensor) -> float:
    """The trace of the covariance of ``[n, parameters]``."""
    return sum(part.double().var(0).sum().item() for part in gradients.split(10_000, dim=1))


def proposals_table(subject: Subject) -> None:
    """Other proposals for the same posteriors."""
    encoded = subject.model.encode(subject.images)
    print(COLUMNS)
    for width in (1.0, 1.25):
        subject.three_rows(f"encoder, {width} times as wide", full(encoded, width))
    for name, diagonal in (("diagonal", True), ("full covariance", False)):
        refined = refine(subject.model, subject.images, subject.seed, diagonal=diagonal)
        subject.three_rows(f"{name}, refined per image", refined)


def visits_table(subject: Subject, rate: float = 0.5) -> None:
    """Proposals improved a little at each visit, as the estimator's memory does it."""
    proposal, generator = subject.encoded(), stream(subject.seed, "visits")
    shape = (len(subject.images), 10, subject.model.latent_dim)
    print(COLUMNS)
    for visit in range(VISITS[-1] + 1):
        if visit in VISITS:
            subject.row(f"{visit} visits, isir, L 3", proposal, kernel="isir", lag=3)
            subject.times("  the same, isir_disir 0.5, L 10", proposal, beta=0.5)
        noise = torch.randn(shape, generator=generator)
        z = proposal.transform(noise)
        _, gradient = log_joint_gradient(subject.model, subject.images, z)
        proposal = improve(proposal, noise, gradient, torch.full(shape[:1], rate))


def encoders_table(subject: Subject, epochs: int) -> None:
    """The same decoder with encoders trained on by other objectives."""
    print(COLUMNS)
    subject.three_rows("as it is", subject.encoded())
    objectives = {
        "ELBO": Elbo(num_samples=1),
        "IWAE, DReG, K 10": Iwae(num_samples=10),
        "IWAE, DReG, K 50": Iwae(num_samples=50),
        "forward KL, K 50": ForwardKl(num_samples=50),
    }
    for name, estimator in objectives.items():
        model = copy.deepcopy(subject.model)
        model.encoder.requires_grad_(True)
        for _ in training_steps(subject, model, estimator, name, epochs=epochs):
            pass
        other = subject._replace(model=model.requires_grad_(False))
        other.three_rows(f"{name}, {epochs} epochs", other.encoded())


ENCODERS = {
    "as the decoder": Encoder(),
    "as the decoder, full covariance": Encoder(covariance=Covariance.full),
    "[600] and 2 blocks, full covariance": Encoder([600], 2, Covariance.full),
    "[600] and 2 blocks": Encoder([600], 2),
}


def sizes_table(subject: Subject, epochs: int) -> None:
    """The same decoder with encoders of other sizes, from scratch."""
    if not isinstance(subject.settings.model, Mlp):
        raise ConfigError("sizes: needs a run of model=mlp")
    model = copy.deepcopy(subject.model).requires_grad_(True)
    between = variance_between(subject, model)
    print(COLUMNS)
    for name, encoder in ENCODERS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(subject.seed)
            settings = dataclasses.replace(subject.settings.model, encoder=encoder)
            model.encoder = settings.build(subject.data.train_mean, subject.data.levels).encoder
        model.decoder.requires_grad_(False)
        for _ in training_steps(subject, model, Iwae(num_samples=10), name, epochs=epochs):
            pass
        model.requires_grad_(True)
        other = subject._replace(model=copy.deepcopy(model).requires_grad_(False))
        other.row(name, other.encoded(), kernel="isir", lag=3)
        other.times("  the same, isir_disir 0.5, L 10", other.encoded(), beta=0.5)
        estimators: dict[str, Iwae | Coupled] = {
            "iwae": Iwae(num_samples=10),
            "isir, L 3": Coupled(lag=3, kernel=Kernel.isir),
            "isir, L 3, remembered": Coupled(
                lag=3, kernel=Kernel.isir, proposals=Proposals.remembered
            ),
        }
        for row, estimator in estimators.items():
            noise = first_noise(other, model, estimator, between)
            print(
                f"  {row}: {noise.evaluations:.0f} evaluations, noise {noise.mean:.2f} +- "
                f"{noise.error:.2f}, median {noise.of_image.median():.2f}",
                flush=True,
            )


@torch.no_grad()
def first_noise(
    subject: Subject, differentiable: VAE, estimator: Iwae | Coupled, between: float
) -> Noise:
    """The noise of an estimator that sees each image for the first time."""
    model, images = subject.model, subject.images[:NOISE_IMAGES]
    encoded, everyone = model.encode(images), torch.arange(NOISE_IMAGES)[: len(images)]

    def draw(generator: torch.Generator) -> Weighted:
        if isinstance(estimator, Iwae):
            return iwae_particles(model, images, encoded, estimator.num_samples, generator)
        estimator.max_steps = subject.max_steps
        estimator.begin(model, len(images))
        begun = estimator.start(model, images, generator, everyone)
        chains = estimator.run_chains(model, images, begun.proposal, generator, begun.first)
        if begun.lesson is None:
            return Weighted(chains.particles, chains.evaluations, chains.truncated)
        particles = in_noise_of(encoded, begun.proposal, chains.particles)
        spent = chains.evaluations + begun.lesson.evaluations
        return Weighted(particles, spent, chains.truncated)

    generator = stream(subject.seed, "noise")
    return replicate(draw, differentiable, images, encoded, generator).noise(between)


class ForwardKl(Estimator):
    """The wake-phase gradient for the encoder, ``sum_k W_k grad_phi log q(z_k|x)``.

    Bornschein and Bengio 2015, with ``W_k`` the normalised weights of K draws from q.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __call__(
        self, model: VAE, images: Tensor, generator: torch.Generator, index: Tensor | None = None
    ) -> Estimate:
        """The estimate for images ``[n, P]``."""
        proposal = model.encode(images)
        noise = torch.randn(len(images), self.num_samples, model.latent_dim, generator=generator)
        with torch.no_grad():
            z = proposal.transform(noise)
            weights = torch.softmax(model.log_weight(images, proposal, noise), -1)
        return Estimate(-(weights * proposal.log_prob(z)).sum(-1).mean(), None)


def switch_table(subject: Subject, steps: int) -> None:
    """Decoder and encoder trained on by IWAE and by the coupled estimator."""
    print(COLUMNS)
    subject.three_rows("as it is", subject.encoded())
    for name, estimator in {
        "IWAE": Iwae(num_samples=10),
        "coupled": Coupled(lag=3, beta=0.3, adapt_beta=False),
    }.items():
        model = copy.deepcopy(subject.model).requires_grad_(True)
        for done in training_steps(subject, model, estimator, name, steps=steps):
            if done in (steps // 4, steps):
                other = subject.of_model(copy.deepcopy(model).requires_grad_(False))
                other.three_rows(f"{name}, {done} steps", other.encoded())


def training_steps(
    subject: Subject,
    model: VAE,
    estimator: Estimator,
    name: str,
    *,
    epochs: int | None = None,
    steps: int | None = None,
) -> Iterator[int]:
    """Train what requires a gradient; yields the number of steps done so far."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = subject.settings.optimizer.build(trained)
    generator = stream(subject.seed, f"training by {name}")
    size = subject.settings.trainer.batch_size
    limit = epochs * math.ceil(len(subject.data.train) / size) if steps is None else steps
    done = 0
    while done < limit:
        images = subject.data.epoch_images(generator)
        for batch in torch.randperm(len(images), generator=generator).split(size):
            with torch.enable_grad():
                estimate = estimator(model, as_input(images[batch], subject.data.levels), generator)
                optimizer.zero_grad()
                estimate.surrogate.backward()
            optimizer.step()
            done += 1
            yield done
            if done == limit:
                return


def load_run(run: Path, data_dir: str | None) -> tuple[TrainSettings, ImageData, VAE]:
    """A run's settings, its data and its best model.

    Raises:
        UcvaeError: the run cannot be read, or its data cannot.
    """
    path = run / "checkpoints" / "best.pt"
    state = checkpoint.load(path, config=dict)
    settings = train_settings(state["config"])
    data = settings.dataset.load(Path(data_dir or settings.data_dir).expanduser())
    model = settings.model.build(data.train_mean, data.levels)
    with checkpoint.fitting(path):
        model.load_state_dict(state["model"])
    return settings, data, model


def load(run: Path, num_images: int, seed: int, max_steps: int, data_dir: str | None) -> Subject:
    """A run's best model with frozen parameters, and some of its training images.

    Raises:
        UcvaeError: the run cannot be read, or its data cannot.
    """
    settings, data, model = load_run(run, data_dir)
    model.requires_grad_(False)
    _, inputs = choose(data, num_images, seed)
    posterior = sample_posterior(model, inputs, seed)
    return Subject(settings, data, model, inputs, posterior, seed, max_steps)


def choose(data: ImageData, num_images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Some training images: which ones ``[n]``, and as models take them ``[n, P]``."""
    generator = stream(seed, "images")
    images = data.epoch_images(generator)
    chosen = torch.randperm(len(images), generator=generator)[:num_images]
    return chosen, as_input(images[chosen], data.levels)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for its error messages, and the arguments, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="The docstring says what is printed."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run of ucvae-train")
    parser.add_argument(
        "tables", nargs="+", choices=TABLES, metavar="TABLE", help=", ".join(TABLES)
    )
    parser.add_argument("--images", type=int, default=300, help="training images (default 300)")
    parser.add_argument("--max-steps", type=int, default=1000, help="cap on a chain's steps")
    parser.add_argument("--epochs", type=int, default=5, help="of encoders and sizes (default 5)")
    parser.add_argument(
        "--steps", type=int, default=2000, help="of the table switch (default 2000)"
    )
    parser.add_argument("--data-dir", help="default: where the run looked")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    for name, least in (("images", 10), ("max_steps", 101), ("epochs", 1), ("steps", 4)):
        if getattr(given, name) < least:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} must be at least {least}, got {getattr(given, name)}")
    return parser, given


TABLES: dict[str, Callable[[Subject, argparse.Namespace], None]] = {
    "times": lambda subject, given: times_table(subject),
    "chains": lambda subject, given: chains_table(subject),
    "weights": lambda subject, given: weights_table(subject),
    "noise": lambda subject, given: noise_table(subject),
    "proposals": lambda subject, given: proposals_table(subject),
    "visits": lambda subject, given: visits_table(subject),
    "encoders": lambda subject, given: encoders_table(subject, given.epochs),
    "sizes": lambda subject, given: sizes_table(subject, given.epochs),
    "switch": lambda subject, given: switch_table(subject, given.steps),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables that were asked for."""
    parser, given = parse(arguments)
    try:
        subject = load(given.run, given.images, given.seed, given.max_steps, given.data_dir)
        for name in given.tables:
            print(f"\n{name}: {given.run}, {given.images} training images, seed {given.seed}")
            TABLES[name](subject, given)
    except UcvaeError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
