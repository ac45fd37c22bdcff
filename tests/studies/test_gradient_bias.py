"""``study=gradient_bias``: its sums against autograd, its verdicts, and what it writes."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from references import FALSE_ALARM, flat

from ucvae.chains import SignedParticles, run_lagged_chains
from ucvae.chains.thinning import thin
from ucvae.data.base import as_input
from ucvae.errors import ConfigError
from ucvae.estimators.coupled import Coupled
from ucvae.models.mlp import Mlp
from ucvae.models.ppca import Ppca
from ucvae.studies import gradient_bias
from ucvae.studies.gradient_bias import ESTIMATORS, GradientBias, Problem, Shown

# Small, and with most corrections at work.
SETTINGS = {
    "num_images": 4,
    "num_samples": 4,
    "lag": 2,
    "beta": 0.5,
    "num_coordinates": 3,
    "batch": 500,
}


def build(data):
    """PPCA of 3 dimensions whose encoder is the posterior, moved and widened.

    Widened, so that the weights are bounded and estimates have moments enough.
    """
    torch.manual_seed(0)
    model = Ppca(3, variance=0.3, train_decoder=False).build(data.train_mean, data.levels)
    with torch.no_grad():
        model.encoder.log_std += 0.2
        model.encoder.mean.bias += 0.3 * model.encoder.log_std.exp()
    return model


@pytest.fixture(scope="module")
def model(bits):
    return build(bits)


@pytest.fixture(scope="module")
def problem(model, bits):
    """In float64, so that sums can be compared to rounding."""
    return Problem(copy.deepcopy(model), as_input(bits.train[:4], 2).double())


def to_z(problem, particles):
    rows = problem.mean[particles.image_index % len(problem.images)]
    return rows[:, None] + particles.noise @ problem.basis


class TestProblem:
    def test_exact_gradient_is_that_of_the_mean(self, problem, model, bits):
        double = copy.deepcopy(model).double()
        double.decoder.requires_grad_()
        images = as_input(bits.train[:4], 2).double()
        value = double.exact_log_likelihood(images).mean()
        parameters = [double.decoder.weight, double.decoder.bias]
        torch.testing.assert_close(problem.exact, flat(torch.autograd.grad(value, parameters)))

    def test_log_weight_is_the_models_up_to_a_constant_of_each_image(self, problem, model, bits):
        index = torch.arange(12)  # three estimates of four images
        noise = torch.randn(12, 50, 3, dtype=torch.float64)
        z = to_z(problem, SignedParticles(index, noise, noise[..., 0]))
        double, images = copy.deepcopy(model).double(), problem.images[index % 4]
        proposal = double.encode(images).detach()
        expected = double.log_joint(images, z) - proposal.log_prob(z)
        difference = expected.detach() - problem.log_weight(noise, index)
        assert difference.std(1).max() < 1e-9
        # What is rotated has the length that it had: it is standard normal as before.
        standard = (z - proposal.mean[:, None]) / proposal.std[:, None]
        torch.testing.assert_close(standard.norm(dim=-1), noise.norm(dim=-1))

    @pytest.mark.parametrize("thinned", [False, True])
    def test_sums_are_autograds_of_the_same_particles(self, problem, model, thinned):
        generator = torch.Generator().manual_seed(1)
        chains = run_lagged_chains(
            problem.log_weight,
            5 * 4,
            3,
            generator=generator,
            num_samples=4,
            lag=2,
            dtype=torch.float64,
        )
        assert len(chains.correction.image_index)
        parts = [chains.main, chains.correction]
        if thinned:
            parts = [thin(part, 0.1, generator) for part in parts]
        double = copy.deepcopy(model).double()
        double.decoder.requires_grad_()
        parameters = [double.decoder.weight, double.decoder.bias]
        expected = []
        for estimate in range(5):
            total = 0
            for part in parts:
                here = part.image_index // 4 == estimate
                own = SignedParticles(*(values[here] for values in part))
                images = problem.images[own.image_index % 4]
                log_joint = double.log_joint(images, to_z(problem, own))
                total = total + (own.coefficient * log_joint).sum() / 4
            expected.append(flat(torch.autograd.grad(total, parameters)))
        expected = torch.stack(expected)

        shown = Shown.choose(problem.exact, 6, 3, 4, generator)
        sums, values = problem.sums(parts, 5, shown)
        torch.testing.assert_close(problem.gradient(sums, 5), expected.mean(0))
        torch.testing.assert_close(values, expected[:, shown.position])


def test_coefficients_of_the_bounds(problem):
    """1/K for the ELBO, normalised weights for IWAE."""
    study = GradientBias(**SETTINGS)
    for name in ("ELBO", "IWAE"):
        draw = study._estimator(name, problem, None)(3, torch.Generator().manual_seed(0))
        ((index, noise, coefficient),) = draw.particles
        assert index.tolist() == list(range(12)) and noise.shape == (12, 4, 3)
        log_weights = problem.log_weight(noise, index)
        expected = log_weights.softmax(-1) if name == "IWAE" else torch.full_like(log_weights, 0.25)
        torch.testing.assert_close(coefficient, expected)
        assert (draw.evaluations, draw.truncated) == (48, 0)


def test_the_largest_coordinate_comes_first_and_none_twice(problem):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        shown = Shown.choose(problem.exact, 6, 3, 4, generator)
        zero, one = problem.exact[18:].abs(), problem.exact[:18].abs()
        assert zero[shown.theta_0[0]] == zero.max()
        assert one[shown.theta_1[0] @ torch.tensor([3, 1])] == one.max()
        assert len(set(shown.position.tolist())) == len(shown.position) == 10
        chosen = [row["chosen"] for row in shown.coordinates()]
        assert chosen == 2 * ["largest", *4 * ["random"]]


def test_fewer_coordinates_than_asked_for(problem):
    shown = Shown.choose(problem.exact, 6, 3, 100, torch.Generator().manual_seed(0))
    assert (len(shown.theta_0), len(shown.theta_1)) == (6, 18)


@pytest.fixture(scope="module")
def found(model, bits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study = GradientBias(num_estimates=8000, **SETTINGS)
    return folder, study, study(model, bits, 3, folder)


class TestVerdicts:
    """8,000 estimates of 4 images, each: the noise is 1% of the gradient, IWAE's bias is 20%."""

    @pytest.mark.parametrize("coordinates", ["gradient", "shown"])
    @pytest.mark.parametrize("name", ESTIMATORS)
    def test_bias_is_found_where_there_is_one(self, found, name, coordinates):
        numbers = found[2]["estimators"][name]
        biased = numbers[coordinates]["p_value"] < FALSE_ALARM
        assert biased == (name in ("ELBO", "IWAE"))
        assert numbers["truncated_fraction"] == 0

    def test_a_forgotten_correction_is_found(self, model, bits, tmp_path, monkeypatch):
        """The control: were the correction lost, the verdict would be another."""

        def run(*arguments, **settings):
            chains = run_lagged_chains(*arguments, **settings)
            return chains._replace(particles=chains.main)

        monkeypatch.setattr(gradient_bias, "run_lagged_chains", run)
        study = GradientBias(num_estimates=8000, **SETTINGS)
        numbers = study(model, bits, 3, tmp_path)["estimators"]["C-ISIR"]
        assert numbers["gradient"]["p_value"] < FALSE_ALARM


class TestCounts:
    def test_chains_cut_at_the_cap_are_counted(self, model, bits, tmp_path, monkeypatch):
        cut = []

        def run(*arguments, **settings):
            chains = run_lagged_chains(*arguments, **settings)
            cut.append(chains.truncated.sum().item())
            return chains

        monkeypatch.setattr(gradient_bias, "run_lagged_chains", run)
        study = GradientBias(num_estimates=200, max_steps=3, **SETTINGS)
        numbers = study(model, bits, 3, tmp_path)["estimators"]
        for name in ("C-ISIR", "C-ISIR-DISIR"):
            assert 0 < numbers[name]["truncated_fraction"] < 1
        # Of 200 estimates of 4 images each, by both kernels.
        found = sum(numbers[name]["truncated_fraction"] for name in ("C-ISIR", "C-ISIR-DISIR"))
        assert found * 800 == pytest.approx(sum(cut))

    @pytest.mark.parametrize("least", [0.0, 0.05])
    def test_light_particles_are_thinned(self, model, bits, tmp_path, monkeypatch, least):
        seen = []

        def spy(particles, min_coefficient, generator):
            kept = thin(particles, min_coefficient, generator)
            seen.append((min_coefficient, kept.coefficient.numel(), particles.coefficient.numel()))
            return kept

        monkeypatch.setattr(gradient_bias, "thin", spy)
        sums = []
        original = Problem.sums

        def counted(self, particles, *arguments):
            sums.append(sum(part.coefficient.numel() for part in particles))
            return original(self, particles, *arguments)

        monkeypatch.setattr(Problem, "sums", counted)
        study = GradientBias(num_estimates=100, min_coefficient=least, **SETTINGS)
        study(model, bits, 3, tmp_path)
        assert {threshold for threshold, _, _ in seen} == {least}
        # What is left is what is summed, and less than there was where a threshold is set.
        assert sum(sums) == sum(kept for _, kept, _ in seen)
        assert (sum(sums) < sum(whole for _, _, whole in seen)) == (least > 0)


class TestWhatItLeaves:
    def test_numbers_are_plain_and_settings_whole(self, found):
        _, study, numbers = found
        assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
        assert numbers["name"] == "gradient_bias" and numbers["settings"] == vars(study)
        assert list(numbers["estimators"]) == list(ESTIMATORS)
        for name, row in study.rows(numbers).items():
            whole = numbers["estimators"][name]["gradient"]
            assert f"error {100 * whole['relative_error']:.2f}% of the gradient" in row
        one = numbers["estimators"]["IWAE"]
        assert one["evaluations_per_image"] == 4
        assert one["variance_times_evaluations"] == 4 * one["gradient"]["variance"]

    def test_files(self, found, is_picture):
        folder, _, numbers = found
        names = ["bias.csv", "bias.png", "bias_theta_0.png", "bias_theta_1.png"]
        assert sorted(path.name for path in folder.iterdir()) == numbers["files"] == names
        assert all(is_picture(folder / name) for name in names[1:])

    def test_table(self, found, read_csv, problem):
        folder, study, numbers = found
        rows = read_csv(folder / "bias.csv")
        assert list(rows[0]) == [
            *("estimator", "parameter", "pixel", "latent", "chosen", "exact_gradient"),
            *("mean_error", "standard_error", "variance"),
            *("q01", "q05", "q25", "q50", "q75", "q95", "q99"),
        ]
        assert len(rows) == 4 * 2 * (1 + study.num_coordinates)
        for row in rows:
            pixel = int(row["pixel"])
            theta_0 = row["parameter"] == "theta_0"
            position = 18 + pixel if theta_0 else 3 * pixel + int(row["latent"])
            assert float(row["exact_gradient"]) == pytest.approx(float(problem.exact[position]))
            quantiles = [float(value) for name, value in row.items() if name.startswith("q")]
            assert quantiles == sorted(quantiles)
            error = math.sqrt(float(row["variance"]) / study.num_estimates)
            assert float(row["standard_error"]) == pytest.approx(error)
        for name, estimator in numbers["estimators"].items():
            own = [row for row in rows if row["estimator"] == name]
            error, exact = (
                np.array([float(row[field]) for row in own])
                for field in ("mean_error", "exact_gradient")
            )
            relative = np.linalg.norm(error) / np.linalg.norm(exact)
            assert estimator["shown"]["relative_error"] == pytest.approx(relative)

    @pytest.mark.slow
    def test_seed_decides(self, model, bits, tmp_path, read_csv):
        study = GradientBias(**(SETTINGS | {"num_estimates": 100, "beta": None}))
        tables = []
        for place, seed in enumerate((0, 0, 1)):
            folder = tmp_path / str(place)
            folder.mkdir()
            study(model, bits, seed, folder)
            tables.append((folder / "bias.csv").read_text())
        assert tables[0] == tables[1] != tables[2]


REFUSED = {
    "num_estimates": (99, "num_estimates must be at least 100"),
    "num_images": (0, "num_images must be at least 1"),
    "num_coordinates": (0, "num_coordinates must be at least 1"),
    "batch": (0, "batch must be at least 1"),
    "num_samples": (1, "num_samples must be at least 2"),
    "lag": (0, "lag must be at least 1"),
    "beta": (1.0, r"beta must be in \[0, 1\)"),
    "max_steps": (5, r"max_steps must be at least burn_in \+ lag = 11"),
    "min_coefficient": (1.0, r"min_coefficient must be in \[0, 1\)"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_bad_settings(field):
    value, message = REFUSED[field]
    with pytest.raises(ValueError, match=f"^{message}"):
        GradientBias(**{field: value})


def test_model_without_an_exact_gradient_is_refused(bits, tmp_path):
    model = Mlp(latent_dim=3, hidden=[4]).build(bits.train_mean, 2)
    with pytest.raises(ConfigError, match="known exactly; allowed: model=ppca$"):
        GradientBias()(model, bits, 0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_more_images_than_there_are_is_refused(model, bits, tmp_path):
    with pytest.raises(ConfigError, match="study.num_images must be at most 40"):
        GradientBias(num_images=41)(model, bits, 0, tmp_path)


def test_defaults_are_those_of_training():
    """So that what is studied is what ``estimator=coupled`` does; the cap alone is higher."""
    study, estimator = GradientBias(), Coupled()
    for field in ("num_samples", "lag", "burn_in", "min_coefficient"):
        assert getattr(study, field) == getattr(estimator, field)
