"""The same code on each device: what needs a GPU is skipped where there is none."""

import dataclasses
from pathlib import Path

import hydra
import pytest
import torch
from references import LinearGaussian, integrate, is_unbiased

from ucvae import training
from ucvae.chains import SignedParticles, run_lagged_chains
from ucvae.chains.hmc import Hmc
from ucvae.config import config_dir, train_settings
from ucvae.data.digits import Digits
from ucvae.estimators.coupled import decoder_gradient
from ucvae.models.mlp import Mlp
from ucvae.models.posterior import Posterior

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    ),
]
every_device = pytest.mark.parametrize("device", DEVICES)


@every_device
@pytest.mark.parametrize(
    "estimator",
    [
        ["estimator=elbo"],
        ["estimator=iwae"],
        ["estimator=coupled"],
        ["estimator=coupled", "estimator.adapt_beta=false"],
        ["estimator=coupled", "estimator.kernel=isir"],
        ["estimator=coupled", "estimator.kernel=isir_hmc"],
    ],
    ids=" ".join,
)
def test_a_run_and_its_resume(device, estimator, tmp_path):
    """A line of metrics after each step brings together all that the run keeps on the device."""
    import ucvae.cli._hydra  # noqa: F401  (registers the resolvers)

    quick = ["model.hidden=[16]", "model.latent_dim=3", "evaluator.num_samples=10"]
    loop = ["trainer.max_epochs=1", "trainer.log_every=1", "trainer.checkpoint_every=2"]
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        settings = train_settings(hydra.compose("train", [*estimator, *quick, *loop]))
    data = Digits().load(Path())
    data = dataclasses.replace(data, train=data.train[:300])
    result = training.run(settings, data, torch.device(device), tmp_path, resume=False)
    settings.trainer.max_epochs = 2
    longer = training.run(settings, data, torch.device(device), tmp_path, resume=True)
    assert result["epochs"] == 1 and longer["epochs"] == 2
    assert longer["device"]["type"] == device
    # 300 images, bits of 64 pixels: between nothing known and everything.
    assert -64 * 0.7 < longer["test"]["log_likelihood"] < 0


@every_device
def test_decoder_gradient_is_that_of_the_cpu(device):
    torch.manual_seed(0)
    model = Mlp(latent_dim=3, hidden=[16]).build(torch.rand(64), levels=2).double()
    images = (torch.rand(5, 64, dtype=torch.float64) < 0.5).double()
    particles = SignedParticles(
        torch.randint(5, (40,)),
        torch.randn(40, 4, 3, dtype=torch.float64),
        torch.randn(40, 4, dtype=torch.float64),
    )

    def gradient(where):
        moved = model.to(where)
        there = images.to(where)
        proposal = moved.encode(there).detach()
        parts = decoder_gradient(
            moved, there, proposal, SignedParticles(*(part.to(where) for part in particles))
        )
        return torch.cat([part.cpu().flatten() for part in parts])

    torch.testing.assert_close(gradient(device), gradient("cpu"))


@every_device
@pytest.mark.parametrize("kernel", ["isir", "isir_disir", "isir_hmc"])
def test_chains_are_unbiased(device, kernel, double):
    """The posterior mean of z in closed form; rule of :mod:`references`, control: truth + 0.2."""
    toy = LinearGaussian()
    model = toy.model.to(device)
    images = toy.images[:1].expand(4000, -1).to(device)
    proposal = model.encode(images).detach()
    chains = run_lagged_chains(
        lambda noise, index: model.log_weight(images[index], proposal.rows(index), noise),
        len(images),
        model.latent_dim,
        generator=torch.Generator(device).manual_seed(0),
        num_samples=5,
        lag=2,
        kernel=kernel,
        dtype=torch.float64,
        hmc=Hmc(Posterior(model, images, proposal), 0.3, 5) if kernel == "isir_hmc" else None,
    )
    particles = SignedParticles(*(part.cpu() for part in chains.particles))
    model.cpu()
    z = (
        toy.model.encode(images.cpu())
        .detach()
        .rows(particles.image_index)
        .transform(particles.noise)
    )
    estimates = integrate(particles, len(images), z)
    truth = toy.posterior(toy.images[:1]).mean[0].detach()
    assert is_unbiased(estimates, truth)
    assert not is_unbiased(estimates, truth + 0.2)
