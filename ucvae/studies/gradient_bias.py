r"""The error of gradient estimators against an exact gradient (Ruiz et al 2021, Fig 2, 5 and 6).

Probabilistic PCA has the exact ``g = grad_theta log p(x)``, here averaged over I images. An
estimate is the mean over the I images of one independent estimate for each. All four estimators
give signed particles ``(c, z)`` (:mod:`ucvae.chains`): the coefficients are 1/K for the ELBO, the
normalised weights W_k for IWAE, and those of Eq 14 for the chains. With ``r = x - theta_0`` and
variance v,

    grad_theta_0 = (r sum c - theta_1 sum c z) / v
    grad_theta_1 = (r (sum c z)^T - theta_1 sum c z z^T) / v,

so sums over particles of 1, z and z z^T hold the whole gradient, and no pixel is touched before
they are averaged over a batch of estimates. The chains run in coordinates of the noise that make
the log weight a sum over dimensions; see :class:`Problem`.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ucvae import figures, results
from ucvae.bias import BatchMeans, BiasTest
from ucvae.chains import Kernel, LaggedChains, SignedParticles, run_lagged_chains
from ucvae.chains.thinning import thin
from ucvae.config import require
from ucvae.data.base import ImageData, as_input
from ucvae.errors import ConfigError
from ucvae.estimators.coupled import Coupled
from ucvae.models.gaussians import Gaussian
from ucvae.models.ppca import LinearGaussianVAE
from ucvae.models.vae import VAE
from ucvae.progress import Progress, Stand
from ucvae.randomness import stream
from ucvae.studies.base import Study, settle_beta

log = logging.getLogger(__name__)

ESTIMATORS = {"ELBO": None, "IWAE": None, "C-ISIR": Kernel.isir, "C-ISIR-DISIR": Kernel.isir_disir}
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MOST_BATCHES = 100
# Particles at a time.
SLICE = 4096
# A batch mean is that of float32 particles, summed in float64.
ROUNDING = 1e-6


@dataclass
class GradientBias(Study):
    """The bias of ELBO, IWAE, C-ISIR and C-ISIR-DISIR on a model with an exact gradient.

    Attributes:
        num_estimates: of each estimator.
        num_images: I, the first of the training images; an estimate is a mean over them.
        num_samples: K of all four.
        lag: L.
        burn_in: t0.
        beta: DISIR's correlation; null adapts it to the images first, as in training, then fixes
            it.
        max_steps: cap on a chain's steps; what reaches it is counted as truncated.
        min_coefficient: particles with a smaller ``|c|`` are thinned without bias, as in training
            (``estimator.min_coefficient``); 0 keeps them all.
        num_coordinates: drawn at random of each of theta_0 and theta_1, for the figures.
        batch: estimates made at a time.
    """

    num_estimates: int = 50_000
    num_images: int = 100
    num_samples: int = 10
    lag: int = 10
    burn_in: int = 1
    beta: float | None = None
    max_steps: int = 10_000
    min_coefficient: float = 1e-3
    num_coordinates: int = 8
    batch: int = 20

    name = "gradient_bias"

    def __post_init__(self) -> None:
        # Enough for 20 batch means of 5.
        require(
            self.num_estimates >= 100,
            f"num_estimates must be at least 100, got {self.num_estimates}",
        )
        for field in ("num_images", "num_coordinates", "batch"):
            value = getattr(self, field)
            require(value >= 1, f"{field} must be at least 1, got {value}")
        self._coupled(Kernel.isir_disir)  # checks the others

    def check(self, model: VAE, data: ImageData) -> None:
        """Refuse a model without an exact gradient, and more images than there are."""
        _known_exactly(model)
        if self.num_images > len(data.train):
            raise ConfigError(
                f"study.num_images must be at most {len(data.train)}, the images of the train "
                f"split, got {self.num_images}"
            )

    def measure(
        self,
        model: VAE,
        data: ImageData,
        seed: int,
        folder: Path,
        between: Callable[[], object],
    ) -> dict[str, Any]:
        """Make the estimates and write ``bias.csv`` and three figures."""
        device = data.train.device
        images = data.epoch_images(stream(seed, f"images of {self.name}", device))
        problem = Problem(_known_exactly(model), as_input(images[: self.num_images], data.levels))
        shown = Shown.choose(
            problem.exact,
            problem.images.shape[1],
            problem.dim,
            self.num_coordinates,
            stream(seed, f"coordinates of {self.name}"),
        )
        betas = {
            name: self._beta(kernel, problem, stream(seed, f"beta of {name}", device))
            for name, kernel in ESTIMATORS.items()
            if kernel is not None
        }
        found = {}
        total = self.num_estimates * len(ESTIMATORS)
        name, done = "", 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            bar.tick()
            between()

        with Progress(lambda: Stand(name, done / total)) as bar:
            for name in ESTIMATORS:
                draw = self._estimator(name, problem, betas.get(name))
                generator = stream(seed, f"{self.name} of {name}", device)
                found[name] = self._repeat(draw, problem, shown, generator, progress)
                log.info(
                    "%s: relative error %.5f, %.1f estimates/s",
                    name,
                    found[name].gradient.relative_error,
                    self.num_estimates / found[name].seconds,
                )
        results.write_rows(folder / "bias.csv", table(shown, found))
        title = (
            f"{data.name} ({data.binarization}), PPCA with D = {model.latent_dim}: "
            f"K = {self.num_samples}, L = {self.lag}, {len(problem.images)} images, "
            f"{self.num_estimates:,} estimates"
        )
        coordinates = shown.coordinates()
        pictures = {
            "bias.png": [row["chosen"] == "largest" for row in coordinates],
            **{
                f"bias_{part}.png": [
                    row["chosen"] == "random" and row["parameter"] == part for row in coordinates
                ]
                for part in ("theta_0", "theta_1")
            },
        }
        for file, chosen in pictures.items():
            panels = {
                label(coordinates[i], float(problem.exact[shown.position[i]])): {
                    name: estimator.errors[:, i].numpy() for name, estimator in found.items()
                }
                for i in range(len(chosen))
                if chosen[i]
            }
            figures.error_boxes(folder / file, title, panels)
        return {
            "files": ["bias.csv", *pictures],
            "estimators": {
                name: {"beta": betas.get(name) if name == "C-ISIR-DISIR" else None}
                | estimator.summary()
                for name, estimator in found.items()
            },
        }

    def rows(self, found: dict[str, Any]) -> dict[str, str]:
        """A row for each estimator."""
        rows = {}
        for name, numbers in found["estimators"].items():
            whole = numbers["gradient"]
            rows[name] = (
                f"error {100 * whole['relative_error']:.2f}% of the gradient where "
                f"{100 * whole['standard_error']:.2f}% is noise, p = {whole['p_value']:.2g}; "
                f"truncated {100 * numbers['truncated_fraction']:.2g}%, "
                f"{numbers['evaluations_per_image']:.0f} evaluations an image"
            )
        return rows

    def _coupled(self, kernel: Kernel) -> Coupled:
        return Coupled(
            num_samples=self.num_samples,
            lag=self.lag,
            burn_in=self.burn_in,
            kernel=kernel,
            max_steps=self.max_steps,
            beta=0.5 if self.beta is None else self.beta,
            min_coefficient=self.min_coefficient,
        )

    def _chains(
        self, kernel: Kernel, problem: Problem, count: int, beta: float, generator: torch.Generator
    ) -> LaggedChains:
        """The chains of ``count`` estimates, one after another with all images each."""
        return run_lagged_chains(
            problem.log_weight,
            count * len(problem.images),
            problem.dim,
            generator=generator,
            num_samples=self.num_samples,
            lag=self.lag,
            burn_in=self.burn_in,
            kernel=kernel,
            beta=beta,
            max_steps=self.max_steps,
            dtype=problem.dtype,
        )

    def _beta(self, kernel: Kernel, problem: Problem, generator: torch.Generator) -> float:
        coupled = self._coupled(kernel)
        if self.beta is not None or kernel is Kernel.isir:
            return coupled.beta
        return settle_beta(
            coupled,
            lambda: self._chains(kernel, problem, 1, float(coupled.current_beta), generator),
        )

    def _estimator(
        self, name: str, problem: Problem, beta: float | None
    ) -> Callable[[int, torch.Generator], Draw]:
        """A function that makes so many estimates."""
        kernel = ESTIMATORS[name]

        def independent(count: int, generator: torch.Generator) -> Draw:
            num = count * len(problem.images)
            noise = torch.randn(
                *(num, self.num_samples, problem.dim),
                generator=generator,
                device=generator.device,
                dtype=problem.dtype,
            )
            index = torch.arange(num, device=generator.device)
            if name == "ELBO":
                weights = noise.new_full(noise.shape[:2], 1 / self.num_samples)
            else:
                log_weights = problem.log_weight(noise, index)
                weights = log_weights.double().softmax(-1).to(problem.dtype)
            return Draw([SignedParticles(index, noise, weights)], self.num_samples * num, 0)

        if kernel is None or beta is None:
            return independent

        def coupled(count: int, generator: torch.Generator) -> Draw:
            chains = self._chains(kernel, problem, count, beta, generator)
            return Draw(
                [chains.particles],
                int(chains.evaluations.sum()),
                int(chains.truncated.sum()),
            )

        return coupled

    def _repeat(
        self,
        draw: Callable[[int, torch.Generator], Draw],
        problem: Problem,
        shown: Shown,
        generator: torch.Generator,
        progress: Callable[[int], object],
    ) -> Found:
        """Make all estimates of one estimator."""
        start = time.perf_counter()
        whole = BatchMeans(len(problem.exact), ROUNDING)
        some = BatchMeans(len(shown.position), ROUNDING)
        values, evaluations, truncated = [], 0, 0
        num_batches = min(MOST_BATCHES, self.num_estimates // 5)
        for in_batch in torch.arange(self.num_estimates).tensor_split(num_batches):
            sums, batch = problem.no_sums(), []
            for part in in_batch.split(self.batch):
                drawn = draw(len(part), generator)
                evaluations += drawn.evaluations
                truncated += drawn.truncated
                kept = [thin(p, self.min_coefficient, generator) for p in drawn.particles]
                of_part, of_shown = problem.sums(kept, len(part), shown)
                sums = Sums(*(a + b for a, b in zip(sums, of_part, strict=True)))
                batch.append(of_shown.cpu())
                progress(len(part))
            values.append(torch.cat(batch))
            whole.add(problem.gradient(sums, len(in_batch)), len(in_batch))
            some.add(values[-1].mean(0), len(in_batch))
        truth = problem.exact[shown.position].cpu()
        chains = self.num_estimates * len(problem.images)
        return Found(
            exact=truth,
            errors=torch.cat(values) - truth,
            gradient=whole.test(problem.exact),
            shown=some.test(truth),
            truncated=truncated / chains,
            evaluations=evaluations / chains,
            seconds=time.perf_counter() - start,
        )


class Draw(NamedTuple):
    """Particles of some estimates, with the evaluations of log weights, and chains cut short.

    The particles come in parts that were never joined: they are most of the memory.
    """

    particles: list[SignedParticles]
    evaluations: int
    truncated: int


class Shown(NamedTuple):
    """Coordinates that are looked at one by one; the first of either kind is the largest.

    Attributes:
        theta_0: pixels ``[m0]``.
        theta_1: pixels and latent dimensions ``[m1, 2]``.
        position: of all of them in the flat gradient ``[m0 + m1]``, theta_0 first.
    """

    theta_0: Tensor
    theta_1: Tensor
    position: Tensor

    @classmethod
    def choose(
        cls, exact: Tensor, pixels: int, dim: int, count: int, generator: torch.Generator
    ) -> Shown:
        """The coordinate with the largest exact gradient, and ``count`` others at random.

        Args:
            exact: the flat gradient.
            pixels: P.
            dim: D.
            count: of theta_0, and as many of theta_1; fewer where there are fewer.
            generator: on the CPU.
        """
        positions = []
        for part in (exact[pixels * dim :], exact[: pixels * dim]):
            largest = int(part.abs().argmax())
            order = torch.randperm(len(part), generator=generator)
            drawn = order[order != largest][:count]
            positions.append(torch.cat([torch.tensor([largest]), drawn]).to(exact.device))
        zero, one = positions
        pair = torch.stack([one // dim, one % dim], dim=-1)
        return cls(zero, pair, torch.cat([zero + pixels * dim, one]))

    def coordinates(self) -> list[dict[str, Any]]:
        """Parameter, pixel, latent dimension, and how it was chosen, of each."""
        rows: list[tuple[str, int, int | str]]
        rows = [("theta_0", int(pixel), "") for pixel in self.theta_0]
        rows += [("theta_1", int(pixel), int(latent)) for pixel, latent in self.theta_1]
        firsts = (0, len(self.theta_0))
        return [
            {
                "parameter": parameter,
                "pixel": pixel,
                "latent": latent,
                "chosen": "largest" if i in firsts else "random",
            }
            for i, (parameter, pixel, latent) in enumerate(rows)
        ]


def _known_exactly(model: VAE) -> LinearGaussianVAE:
    """The model, if its gradient is known exactly."""
    if not isinstance(model, LinearGaussianVAE):
        raise ConfigError(
            "study=gradient_bias: needs a model whose gradient is known exactly; allowed: "
            "model=ppca"
        )
    return model


class Sums(NamedTuple):
    """Sums over particles, in the noise of :class:`Problem`, float64.

    Attributes:
        constant: of c, for each image ``[I]``.
        linear: of c times the noise, for each image ``[I, D]``.
        quadratic: of c times the noise's outer square, over all images ``[D, D]``.
    """

    constant: Tensor
    linear: Tensor
    quadratic: Tensor


class Problem:
    r"""A linear Gaussian model and its images, in the noise that suits it best.

    With the posterior ``N(m, (F F^T)^-1)`` and ``z = mu + sigma xi``, the log weight is, up to a
    constant, ``(|xi|^2 - |F^T (z - m)|^2) / 2``. The model's sigma is the same for all images. Let
    ``diag(sigma) F = U diag(s) V^T``: rotated noise ``eta = U^T xi`` is N(0, I) as well, the steps
    of DISIR commute with the rotation, and the log weight becomes

        sum_d  eta_d^2 (1 - s_d^2) / 2 - eta_d s_d (V^T F^T (mu - m))_d,

    a sum over dimensions where there was a matrix.

    Attributes:
        images: ``[I, P]``, float64.
        exact: gradient of the mean ``log p(x)``, flat: theta_1 (``[P, D]``), then theta_0; float64.
        dtype: of the chains.
        dim: D.
    """

    def __init__(self, model: LinearGaussianVAE, images: Tensor) -> None:
        self.dtype = images.dtype
        model = copy.deepcopy(model).double()
        self.images = images = images.double()
        self.dim = model.latent_dim
        self.variance = model.likelihood.variance
        parameters = [model.decoder.weight.requires_grad_(), model.decoder.bias.requires_grad_()]
        objective = model.exact_log_likelihood(images).mean()
        self.exact = torch.cat([g.flatten() for g in torch.autograd.grad(objective, parameters)])
        with torch.no_grad():
            self.weight, bias = (p.detach() for p in parameters)
            proposal: Gaussian = model.encoder(images)
            mean, covariance = model.posterior(images)
            factor = torch.linalg.cholesky(torch.linalg.inv(covariance))
            std = proposal.std[0]
            left, scale, right = torch.linalg.svd(std[:, None] * factor)
            self.mean = proposal.mean
            self.residual = images - bias
            self.basis = left.T * std  # z = mu + eta @ basis
            shift = (proposal.mean - mean) @ factor @ right.T
            self._curvature = ((1 - scale**2) / 2).to(self.dtype)
            self._slope = (scale * shift).to(self.dtype)

    def log_weight(self, noise: Tensor, index: Tensor) -> Tensor:
        """Log weights ``[n, k]``, up to a constant, of noise ``[n, k, D]``.

        ``index [n]`` counts images again and again, once for each estimate.
        """
        slope = self._slope[index % len(self.images)]
        return noise.square() @ self._curvature - torch.bmm(noise, slope[:, :, None])[:, :, 0]

    def no_sums(self) -> Sums:
        """The sums over no particles."""
        zeros = self.mean.new_zeros
        return Sums(zeros(len(self.images)), zeros(self.mean.shape), zeros(self.dim, self.dim))

    def sums(
        self, particles: Sequence[SignedParticles], count: int, shown: Shown
    ) -> tuple[Sums, Tensor]:
        """Sums over the particles of ``count`` estimates, and each estimate at ``shown``.

        Returns:
            The sums of all, and ``[count, m0 + m1]``, float64.
        """
        num = len(self.images)
        # Of a coordinate (p, d) of theta_1: z_d - mu_d, and row p of theta_1 times z - mu.
        pixel, latent = shown.theta_1.T
        rows = self.basis @ self.weight[pixel].T
        maps = torch.cat([self.basis[:, latent], rows], dim=1).to(self.dtype)

        constant = maps.new_zeros(count * num)
        linear = maps.new_zeros(count * num, self.dim)
        product = maps.new_zeros(count * num, len(pixel))
        quadratic = torch.zeros_like(self.basis)
        for i, x, c in _slices(particles):
            weighted = c[:, None] * x
            constant.index_add_(0, i, c)
            linear.index_add_(0, i, weighted)
            quadratic += weighted.T @ x
            first, second = (x @ maps).chunk(2, dim=1)
            product.index_add_(0, i, c[:, None] * first * second)

        constant = constant.double().view(count, num)
        linear = linear.double().view(count, num, self.dim)
        product = product.double().view(count, num, -1)
        # theta_0: sum of c (r_p - theta_1[p] z) = e sum c - theta_1[p] sum c (z - mu).
        e = self.residual - self.mean @ self.weight.T
        at_zero = constant @ e[:, shown.theta_0] - linear.sum(1) @ (
            self.basis @ self.weight[shown.theta_0].T
        )
        # theta_1: sum of c (r_p - theta_1[p] z) z_d, with z = mu + (z - mu).
        e, mean = e[:, pixel], self.mean[:, latent]
        at_one = (
            constant @ (mean * e)
            + ((linear @ self.basis[:, latent]) * e).sum(1)
            - ((linear @ rows) * mean).sum(1)
            - product.sum(1)
        )
        values = torch.cat([at_zero, at_one], dim=1) / (self.variance * num)
        return Sums(constant.sum(0), linear.sum(0), quadratic), values

    def gradient(self, sums: Sums, count: int) -> Tensor:
        """The mean gradient of ``count`` estimates, flat as :attr:`exact`."""
        constant, linear, quadratic = (part / count for part in sums)
        spread = linear @ self.basis  # sum of c (z - mu)
        first = constant[:, None] * self.mean + spread  # sum of c z
        second = (
            first.T @ self.mean + self.mean.T @ spread + self.basis.T @ quadratic @ self.basis
        )  # sum of c z z^T
        theta_1 = self.residual.T @ first - self.weight @ second
        theta_0 = constant @ self.residual - first.sum(0) @ self.weight.T
        flat = torch.cat([theta_1.flatten(), theta_0])
        return flat / (self.variance * len(self.images))


def _slices(particles: Sequence[SignedParticles]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Image index, noise and coefficient of all particles, as many as stay in a CPU's cache."""
    for part in particles:
        index = part.image_index.repeat_interleave(part.noise.shape[1])
        flat = (index, part.noise.flatten(0, 1), part.coefficient.flatten())
        yield from zip(*(values.split(SLICE) for values in flat), strict=True)


class Found(NamedTuple):
    """What one estimator did.

    Attributes:
        exact: the gradient at the coordinates shown ``[m]``.
        errors: of each estimate there ``[num_estimates, m]``, float64.
        gradient: the test of all coordinates together.
        shown: the test of those shown.
        truncated: fraction of the chains that reached the cap.
        evaluations: of the log weight, for each image.
        seconds: in all.
    """

    exact: Tensor
    errors: Tensor
    gradient: BiasTest
    shown: BiasTest
    truncated: float
    evaluations: float
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "gradient": _plain(self.gradient),
            "shown": _plain(self.shown),
            "truncated_fraction": self.truncated,
            "evaluations_per_image": self.evaluations,
            "variance_times_evaluations": self.gradient.variance * self.evaluations,
            "estimates_per_s": len(self.errors) / self.seconds,
        }

    def rows(self) -> list[dict[str, float]]:
        """A row of the table for each coordinate."""
        levels = torch.tensor(QUANTILES, dtype=self.errors.dtype)
        quantiles = self.errors.quantile(levels, dim=0).T
        variances, means = torch.var_mean(self.errors, dim=0)
        return [
            {
                "exact_gradient": float(exact),
                "mean_error": float(mean),
                "standard_error": math.sqrt(variance / len(self.errors)),
                "variance": float(variance),
            }
            | {f"q{round(100 * q):02}": float(v) for q, v in zip(QUANTILES, row, strict=True)}
            for exact, mean, variance, row in zip(
                self.exact, means, variances, quantiles, strict=True
            )
        ]


def _plain(test: BiasTest) -> dict[str, float | int | None]:
    """The test's fields, an infinite chi-square as None."""
    return {name: value if math.isfinite(value) else None for name, value in test._asdict().items()}


def table(shown: Shown, found: dict[str, Found]) -> list[dict[str, Any]]:
    """``bias.csv``: a row for each estimator and coordinate."""
    return [
        {"estimator": name} | coordinate | row
        for name, estimator in found.items()
        for coordinate, row in zip(shown.coordinates(), estimator.rows(), strict=True)
    ]


def label(coordinate: dict[str, Any], exact: float) -> str:
    """A coordinate as a panel's heading."""
    if coordinate["parameter"] == "theta_0":
        where = rf"$\theta_0$, pixel {coordinate['pixel']}"
    else:
        where = rf"$\theta_1$, pixel {coordinate['pixel']}, latent {coordinate['latent']}"
    return f"{where}; exact gradient {exact:.3g}"
