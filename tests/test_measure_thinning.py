"""``scripts/measure_thinning.py`` on a tiny run: its variances against what they are exactly."""

import importlib.util
from pathlib import Path

import hydra
import pytest
import torch

from ucvae import checkpoint, training
from ucvae.chains import Kernel
from ucvae.config import config_dir, train_settings
from ucvae.data.digits import Digits
from ucvae.randomness import stream

REPOSITORY = Path(__file__).resolve().parents[1]
QUICK = (
    "model.hidden=[8]",
    "model.latent_dim=2",
    "trainer.max_epochs=1",
    "trainer.valid_samples=5",
    "evaluator.num_samples=5",
)
COUPLED = (
    "estimator=coupled",
    "estimator.num_samples=4",
    "estimator.lag=3",
    "estimator.kernel=isir_disir",
    "estimator.proposals=encoder",
    "estimator.min_coefficient=1e-3",
)


@pytest.fixture(scope="module")
def script():
    path = REPOSITORY / "scripts" / "measure_thinning.py"
    spec = importlib.util.spec_from_file_location("measure_thinning", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """A function that trains on digits for one epoch and returns the run's folder."""
    import ucvae.cli._hydra  # noqa: F401  (registers the resolvers)

    data = Digits().load(Path())

    def train(*overrides):
        folder = tmp_path_factory.mktemp("run")
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            settings = train_settings(hydra.compose("train", [*QUICK, *overrides]))
        training.run(settings, data, torch.device("cpu"), folder, resume=False)
        return folder

    return train


@pytest.fixture(scope="module")
def coupled_run(run_of):
    return run_of(*COUPLED)


def test_added_variance_is_zero_without_thinning_and_grows(script, coupled_run):
    model, estimator, images = script.load(coupled_run, 4, None, seed=0)
    measured = script.measure(model, images, estimator, [0, 0.03, 0.1, 0.3], 5, seed=0)
    rows = measured.thresholds
    assert [row.min_coefficient for row in rows] == [0, 0.03, 0.1, 0.3]
    assert rows[0].added == 0 < rows[1].added < rows[2].added < rows[3].added
    particles = [row.particles for row in rows]
    assert particles == sorted(particles, reverse=True) and len(set(particles)) == 4
    assert all(row.seconds > 0 for row in rows)
    assert measured.meeting_time >= 3 and measured.truncated == 0

    generator = stream(0, "chains")
    gradients = torch.stack(
        [
            script.image_gradients(model, images, proposal, chains.particles)
            for proposal, chains in (
                script.run_chains(estimator, model, images, generator) for _ in range(5)
            )
        ]
    )
    within = gradients.var(0).sum(1).mean().item()
    between = gradients.mean(0).var(0).sum().item() - within / 5
    assert measured.within == pytest.approx(within, rel=1e-4)
    assert measured.between == pytest.approx(between, rel=1e-4)


@pytest.mark.slow
def test_added_variance_is_that_of_systematic_resampling(script, coupled_run):
    """Given the chains: the mean, over the one uniform of an image, of the squared distance.

    A particle of the k light ones survives where ``floor(u + end) > floor(u + end - length)``; 500
    points u in the middle of equal parts of [0, 1) give the mean to better than 1%. Over 3 images x
    150 replicates of the same chains the thinning's own draws leave the estimate a standard error
    of 5%, and the number of particles one of below 1%.
    """
    threshold, replicates = 0.1, 150
    model, estimator, images = script.load(coupled_run, 3, None, seed=1)
    (row,) = script.measure(model, images, estimator, [threshold], replicates, seed=1).thresholds

    generator = stream(1, "chains")
    points = (torch.arange(500) + 0.5) / 500
    added = independent = kept = 0.0
    for _ in range(replicates):
        proposal, chains = script.run_chains(estimator, model, images, generator)
        index, noise, coefficient = chains.particles
        each, size = index.repeat_interleave(noise.shape[1]), coefficient.flatten().abs()
        z = proposal.rows(each).transform(noise.flatten(0, 1)[:, None])[:, 0]
        for image in range(3):
            own = (each == image) & (size < threshold)
            products = inner_products(model, images[image], z[own])
            length, sign = size[own].double() / threshold, coefficient.flatten()[own].sign()
            end = points[:, None] + length.cumsum(0)
            survives = end.floor() > (end - length).floor()
            distance = (survives.double() - length) * sign * threshold
            added += ((distance @ products) * distance).sum(1).mean().item()
            independent += (length * (1 - length) * threshold**2 * products.diagonal()).sum().item()
        kept += (size / threshold).clamp(max=1).sum().item()
    assert row.added == pytest.approx(added / (3 * replicates), rel=0.25)
    assert row.particles == pytest.approx(kept / (3 * replicates), rel=0.04)
    # Decisions taken independently would add more.
    assert added < 0.7 * independent


def inner_products(model, image, z):
    """Of the decoder's gradients at n latents ``[n, D]``, ``[n, n]``."""
    decoder = torch.nn.Sequential(*model.decoder)
    parameters = dict(decoder.named_parameters())

    def log_likelihood(parameters, z):
        logits = torch.func.functional_call(decoder, parameters, z)
        return (image * logits - torch.nn.functional.softplus(logits)).sum()

    gradient = torch.func.vmap(torch.func.grad(log_likelihood), in_dims=(None, 0))
    rows = [g.flatten(1).double() for g in gradient(parameters, z).values()]
    return sum(part @ part.T for part in rows)


def test_variances_within_and_between_images(script, double):
    """Against two-level normal draws: 3 components, variances 4 within and 0.25 between each.

    2,000 images of 5 replicates know the sum within to 1%, and the sum between to 8%.
    """
    exact = 0.5 * torch.randn(2000, 3) + 10
    draws = exact[:, None] + 2 * torch.randn(2000, 5, 3)
    squares = draws.square().sum((1, 2))
    within, between = script.within_and_between(draws.sum(1), squares, 5)
    assert within == pytest.approx(draws.var(1).sum(1).mean().item())
    assert within == pytest.approx(12, rel=0.05)
    assert between == pytest.approx(0.75, rel=0.4)


def test_each_image_has_the_gradient_of_its_own_particles(script, coupled_run):
    model, estimator, images = script.load(coupled_run, 3, None, seed=0)
    proposal, chains = script.run_chains(estimator, model, images, stream(0, "chains"))
    rows = script.image_gradients(model, images, proposal, chains.particles)
    together = script.decoder_gradient(model, images, proposal, chains.particles)
    together = torch.cat([g.flatten() for g in together])
    torch.testing.assert_close(rows.sum(0), together, rtol=1e-4, atol=1e-4)
    assert (rows.diff(dim=0).norm(dim=1) > 1).all()


class TestRun:
    def test_beta_kernel_and_model_are_those_of_the_run(self, script, coupled_run):
        state = checkpoint.load(coupled_run / "checkpoints" / "last.pt")
        model, estimator, images = script.load(coupled_run, 7, None, seed=0)
        assert estimator.current_beta.equal(state["estimator"]["beta"])
        assert estimator.current_beta != estimator.beta
        assert (estimator.kernel, estimator.lag) == (Kernel.isir_disir, 3)
        for name, value in model.state_dict().items():
            assert value.equal(state["model"][name])
        train = Digits().load(Path()).train.flatten(1).float()
        for image in images:
            assert (train == image).all(1).any()
        assert images.shape == (7, 64)

    def test_run_of_another_estimator(self, script, run_of):
        _, estimator, _ = script.load(run_of("estimator=iwae"), 2, None, seed=0)
        assert estimator.kernel is Kernel.isir and estimator.num_samples == 10

    def test_kernel_can_be_chosen(self, script, coupled_run):
        for kernel in Kernel:
            model, estimator, images = script.load(coupled_run, 2, kernel, seed=0)
            assert estimator.kernel is kernel
            _, chains = script.run_chains(estimator, model, images, stream(0, "chains"))
            # Only DISIR's sub-steps have an effective sample size.
            assert chains.ess.isnan() == (kernel is not Kernel.isir_disir)


class TestCommand:
    def test_prints_a_table(self, script, coupled_run, capsys):
        quick = ("--images", "3", "--replicates", "2", "--kernel", "isir")
        script.main([str(coupled_run), *quick, "--min-coefficients", "0", "0.3"])
        lines = capsys.readouterr().out.splitlines()
        assert "isir, K 4, L 3" in lines[3] and "beta" not in lines[3]
        start = next(i for i, line in enumerate(lines) if line.startswith("min_coefficient"))
        zero, thinned = (line.split() for line in lines[start + 1 : start + 3])
        assert zero[0] == "0" and zero[3] == "0" and thinned[0] == "0.3"
        assert float(thinned[1]) < float(zero[1])
        assert lines[-1].startswith("within/between ")

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["nowhere"], "no file nowhere/checkpoints/last.pt"),
            (["nowhere", "--images", "1"], "--images must be at least 2, got 1"),
            (["nowhere", "--replicates", "1"], "--replicates must be at least 2, got 1"),
            (["nowhere", "--min-coefficients", "0", "1"], "must be in [0, 1), got 1"),
        ],
    )
    def test_bad_request_is_refused(
        self, arguments, message, script, capsys, monkeypatch, tmp_path
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            script.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

    def test_variance_that_is_not_resolved_is_said_so(self, script):
        row = script.Thinned(0.01, 5.0, 0.1, 0.5)
        lines = script.report(script.Measurement(2.0, -0.1, 4.0, 0.0, [row])).splitlines()
        assert lines[1].split()[-2:] == ["0.25", "unresolved"]
        assert lines[-1] == "within/between unresolved"
