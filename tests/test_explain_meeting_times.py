"""``scripts/explain_meeting_times.py``: its divergences and waits against closed forms."""

import importlib
from pathlib import Path

import hydra
import pytest
import torch
from references import LinearGaussian
from torch.distributions import MultivariateNormal, kl_divergence

from ucvae import training
from ucvae.config import config_dir, train_settings
from ucvae.data.digits import Digits

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("explain_meeting_times")


@pytest.fixture
def subject(script, double):
    """A linear-Gaussian model, whose posteriors and divergences are Gaussian."""
    toy = LinearGaussian()
    model = toy.model.requires_grad_(False)
    posterior = script.sample_posterior(model, toy.images, seed=0)
    yield script.Subject(None, None, model, toy.images, posterior, seed=0, max_steps=200), toy
    model.requires_grad_(True)


class TestInClosedForm:
    def test_evidence(self, subject):
        subject, toy = subject
        # A full Gaussian fits exactly, so that its 2,000 weights scatter little.
        torch.testing.assert_close(
            subject.posterior.evidence, toy.log_likelihood(toy.images), rtol=0, atol=0.01
        )

    @pytest.mark.parametrize("width", [1.0, 1.5])
    def test_divergences(self, script, subject, width):
        subject, toy = subject
        encoded = subject.model.encode(toy.images)
        proposal = script.full(encoded, width)
        q = MultivariateNormal(encoded.mean, torch.diag_embed((width * encoded.std) ** 2))
        p = toy.posterior(toy.images)
        reverse, forward = subject.divergences(proposal)
        # Means of 3 x 200 and 3 x 2,000 draws whose standard deviations are about 1.3 and 0.7.
        assert reverse == pytest.approx(kl_divergence(q, p).mean().item(), abs=0.25)
        assert forward == pytest.approx(kl_divergence(p, q).mean().item(), abs=0.05)

    def test_refinement_with_a_full_covariance_finds_the_posterior(self, script, subject):
        subject, toy = subject
        refined = script.refine(subject.model, toy.images, seed=1, diagonal=False)
        covariance = refined.scale @ refined.scale.mT
        p = toy.posterior(toy.images)
        assert kl_divergence(p, MultivariateNormal(refined.mean, covariance)).max() < 0.02
        diagonal = script.refine(subject.model, toy.images, seed=1, diagonal=True)
        assert not diagonal.scale.tril(-1).any()
        q = MultivariateNormal(diagonal.mean, scale_tril=diagonal.scale)
        assert 0.02 < kl_divergence(p, q).min()

    def test_log_weights_are_the_joint_over_the_proposal(self, script, subject):
        subject, toy = subject
        refined = script.refine(subject.model, toy.images, seed=1, diagonal=False, steps=5)
        noise, index = torch.randn(2, 4, 2), torch.tensor([2, 0])
        z = refined.mean[index, None] + noise @ refined.scale[index].mT
        q = MultivariateNormal(refined.mean[index, None], scale_tril=refined.scale[index, None])
        expected = subject.model.log_joint(toy.images[index], z) - q.log_prob(z)
        found = script.log_weight_of(refined, subject.model, toy.images)(noise, index)
        torch.testing.assert_close(found, expected)


def test_a_state_of_the_weight_of_all_others_is_left_with_probability_nine_tenths(script, subject):
    subject, _ = subject
    subject = subject._replace(images=torch.zeros(20_000, 4))
    start = script.State(torch.zeros(20_000, 2), torch.zeros(20_000))
    waits = script.steps_until_moved(subject, lambda noise, _: torch.zeros(noise.shape[:2]), start)
    # Geometric with p = 0.9: the mean's standard error is sqrt(0.1) / 0.9 / sqrt(20,000) = 0.0025.
    assert waits.mean() == pytest.approx(10 / 9, abs=5 * 0.0025)
    low = script.State(start.noise, start.log_weight - 2)
    waits = script.steps_until_moved(subject, lambda noise, _: torch.zeros(noise.shape[:2]), low)
    assert waits.mean() < 1.05


@pytest.mark.slow
def test_every_table_of_a_run(script, tmp_path, capsys):
    import ucvae.cli._hydra  # noqa: F401  (registers the resolvers)

    quick = ["estimator=iwae", "model.hidden=[8]", "model.latent_dim=2", "trainer.max_epochs=1"]
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        settings = train_settings(hydra.compose("train", [*quick, "evaluator.num_samples=5"]))
    training.run(settings, Digits().load(Path()), torch.device("cpu"), tmp_path, resume=False)
    tables = list(script.TABLES)
    script.main(
        [str(tmp_path), *tables, "--images", "10", "--max-steps", "101", "--epochs", "1"]
        + ["--steps", "4"]
    )
    lines = capsys.readouterr().out.splitlines()
    for name in tables:
        assert sum(line.startswith(f"{name}: {tmp_path}") for line in lines) == 1
    assert not any("nan" in line for line in lines)
    (chosen,) = [line for line in lines if line.startswith("the estimator's rule takes beta")]
    assert 0 <= float(chosen.split(" to ")[1].split(",")[0]) < 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["RUN", "prices"], "invalid choice: 'prices'"),
        (["RUN", "times", "--images", "9"], "--images must be at least 10, got 9"),
        (["RUN", "times"], "no file RUN/checkpoints/best.pt"),
    ],
)
def test_wrong_arguments_are_one_line(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_trimmed_mean_is_without_the_largest_thousandth(script):
    of_image = torch.tensor([1e6, *[1.0, 3.0] * 999, 1e5, 1e5])
    noise = script.Noise(of_image, 0.0, 0.0, halves=torch.full((2001, 2), torch.nan))
    # 2,001 images: the two largest are left out, and one of 1e5 stays.
    assert noise.trimmed_mean == pytest.approx((999 * 4 + 1e5) / 1999, rel=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ([0, 1], [0, 1], 1),
        ([0, 1], [2, 3], 0),
        # 1 is not among the 20 noisiest of the second half; 182 is the last of those of the first.
        ([0, 1], [0, 182], 3 / 4),
        ([0, 1], [0, 181], 1 / 2),
    ],
    ids=["the same", "others", "just within", "just outside"],
)
def test_noise_recurs_where_the_same_images_are_noisy_in_both_halves(script, first, second, wanted):
    halves = torch.arange(200.0)[:, None].repeat(1, 2)
    halves[first, 0] = halves[second, 1] = 1000
    parts = [script.Noise(part.mean(1), 0.0, 0.0, part) for part in halves.split(150)]
    assert script.Noise.join(parts).recurring == wanted


@pytest.mark.parametrize("replicates", [2, 5, 6])
def test_replicates_give_the_variance_of_all_and_of_both_halves(script, replicates, monkeypatch):
    gradients = torch.randn(replicates, 7, 3, generator=torch.Generator().manual_seed(0)).double()
    coming = iter(gradients)
    monkeypatch.setattr(script, "image_gradients", lambda *_: next(coming))
    never = script.Weighted(
        script.SignedParticles(torch.arange(7), torch.zeros(7, 1, 2), torch.ones(7, 1)),
        torch.zeros(7),
        torch.zeros(7),
    )
    generator = torch.Generator().manual_seed(1)
    found = script.replicate(lambda _: never, None, None, None, generator, replicates)
    torch.testing.assert_close(found.mean, gradients.mean(0))
    torch.testing.assert_close(found.within, gradients.var(0).sum(1))
    if replicates == 2:
        assert found.halves.isnan().all() and found.noise(1.0).recurring is None
    else:
        parts = gradients[:3], gradients[3:]
        wanted = torch.stack([part.var(0).sum(1) for part in parts], 1)
        torch.testing.assert_close(found.halves, wanted)
        torch.testing.assert_close(found.noise(between=2.0).halves, wanted / 2)
