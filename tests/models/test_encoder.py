"""Encoders of their own size and with correlations, ``model.encoder``."""

import copy
import math

import pytest
import torch

from ucvae.evaluation.importance import log_likelihood
from ucvae.models.gaussians import FullGaussian, Gaussian
from ucvae.models.mlp import Activation, Covariance, Encoder, Initialization, Mlp

pytestmark = pytest.mark.usefixtures("double")

IMAGES = torch.arange(5 * 16, dtype=torch.float64).view(5, 16) % 3 / 2
FULL = Encoder(covariance=Covariance.full)


def small(encoder=None, latent_dim=3, **settings):
    torch.manual_seed(0)
    settings = Mlp(latent_dim, [8, 6], encoder=encoder or Encoder(), **settings)
    return settings.build(torch.rand(1, 4, 4), 2)


def test_by_default_mirrors_the_decoder_under_the_names_of_older_checkpoints():
    model = small()
    names = ["features.0", "features.2", "mean", "std"]
    expected = [f"{name}.{part}" for name in names for part in ("weight", "bias")]
    assert list(model.encoder.state_dict()) == expected
    assert isinstance(model.encode(IMAGES), Gaussian)


def test_a_full_covariance_starts_as_the_diagonal_one():
    diagonal, full = small().encode(IMAGES), small(FULL).encode(IMAGES)
    assert isinstance(full, FullGaussian)
    for part, expected in zip(full, FullGaussian.of(diagonal), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize(
    ("initialization", "variance"),
    [
        ("torch", lambda inputs, outputs: 1 / (3 * inputs)),
        ("glorot", lambda inputs, outputs: 2 / (inputs + outputs)),
        ("lecun", lambda inputs, outputs: 1 / inputs),
        ("he", lambda inputs, outputs: 2 / inputs),
    ],
)
def test_weights_start_with_the_variance_of_their_initialization(initialization, variance):
    torch.manual_seed(0)
    mean = torch.rand(1, 20, 20)
    model = Mlp(30, [300, 100], initialization=Initialization(initialization)).build(mean, 2)
    linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(linear) == 7
    for layer in linear:
        outputs, inputs = layer.weight.shape
        # Of n squares, each with mean v and at most (normal) the variance 2 v^2, the mean is off by
        # v sqrt(2 / n): 2.6% where n is 3,000, the least, and 0.4% where it is 120,000. The four
        # variances differ by 12% or more in a layer of 120,000, and by 23% in one of 3,000.
        expected = variance(inputs, outputs)
        error = expected * (2 / layer.weight.numel()) ** 0.5
        assert layer.weight.square().mean().item() == pytest.approx(expected, abs=4 * error)
    *others, output = linear
    assert output.bias.equal(mean.flatten().clamp(1e-3, 1 - 1e-3).logit())
    assert all(layer.bias.any() == (initialization == "torch") for layer in others)


@pytest.mark.parametrize("initialization", ["glorot", "lecun", "he"])
def test_a_full_covariance_starts_as_the_diagonal_one_whatever_the_weights(initialization):
    settings = {"initialization": Initialization(initialization)}
    diagonal, full = small(**settings), small(FULL, **settings)
    assert full.encode(IMAGES).scale.equal(torch.diag_embed(diagonal.encode(IMAGES).std))
    for own, other in zip(full.decoder.parameters(), diagonal.decoder.parameters(), strict=True):
        assert own.equal(other)


def test_a_full_covariance_has_correlations_that_are_linear_in_the_features():
    encoder = small(FULL).encoder
    with torch.no_grad():
        encoder.below.weight.normal_()
        encoder.below.bias.normal_()
    features = encoder.features(IMAGES)
    std = (1 + encoder.std(features).exp()).log() + 1e-6
    b10, b20, b21 = encoder.below(features).T
    zero, one = torch.zeros(5), torch.ones(5)
    rows = [[one, zero, zero], [b10, one, zero], [b20, b21, one]]
    unit = torch.stack([torch.stack(row, -1) for row in rows], 1)
    q = encoder(IMAGES)
    torch.testing.assert_close(q.scale, torch.diag_embed(std) @ unit)
    assert torch.equal(q.mean, encoder.mean(features))


def test_a_full_covariance_has_a_positive_diagonal_where_the_softplus_underflows():
    model = small(FULL)
    with torch.no_grad():
        model.encoder.std.bias.fill_(-1e4)
    noise = torch.randn(5, 2, 3)
    assert model.log_weight(IMAGES, model.encode(IMAGES), noise).isfinite().all()


def test_in_one_dimension_there_is_nothing_to_correlate():
    assert isinstance(small(FULL, latent_dim=1).encode(IMAGES), Gaussian)


@pytest.mark.parametrize("activation", list(Activation))
def test_residual_blocks_add_to_the_hidden_layers(activation):
    encoder = small(Encoder(hidden=[7], blocks=2), activation=activation).encoder
    shapes = [tuple(p.shape) for p in encoder.parameters() if p.dim() == 2]
    assert shapes == [(7, 16), (7, 7), (7, 7), (7, 7), (7, 7), (3, 7), (3, 7)]
    f = {"relu": torch.relu, "tanh": torch.tanh}[activation.value]
    layers = [m for m in encoder.modules() if isinstance(m, torch.nn.Linear)]
    h = f(layers[0](IMAGES))
    h = h + layers[2](f(layers[1](f(h))))
    h = h + layers[4](f(layers[3](f(h))))
    torch.testing.assert_close(encoder(IMAGES).mean, encoder.mean(h))


def test_the_decoder_is_the_same_whatever_the_encoder():
    larger = small(Encoder([30, 20], 1, Covariance.full)).decoder
    shapes = [p.shape for p in larger.parameters()]
    assert shapes == [p.shape for p in small().decoder.parameters()]


def test_a_full_covariance_survives_a_checkpoint():
    model, other = small(FULL), small(FULL)
    with torch.no_grad():
        model.encoder.below.weight.normal_()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(model.encode(IMAGES).scale, other.encode(IMAGES).scale)


@pytest.mark.parametrize("refinements", [0, 2])
def test_importance_sampling_takes_a_full_covariance(refinements):
    # Both proposals are the same, and so are the draws.
    found = [sampled(small(encoder), refinements) for encoder in (Encoder(), FULL)]
    torch.testing.assert_close(*found)


def test_importance_sampling_weighs_by_the_correlations():
    model = small(FULL)
    with torch.no_grad():
        model.encoder.below.bias.fill_(0.5)
        q = model.encode(IMAGES)
        noise = torch.randn(5, 20, 3, generator=torch.Generator().manual_seed(0))
        z = q.mean[:, None] + (q.scale[:, None] @ noise[..., None])[..., 0]
        by_torch = torch.distributions.MultivariateNormal(
            q.mean[:, None], scale_tril=q.scale[:, None]
        )
        prior = torch.distributions.Normal(0, 1).log_prob(z).sum(-1)
        weights = prior + model.log_likelihood(IMAGES, z) - by_torch.log_prob(z)
    torch.testing.assert_close(sampled(model), weights.logsumexp(-1) - math.log(20))


def sampled(model, refinements=0):
    generator = torch.Generator().manual_seed(0)
    return log_likelihood(model, IMAGES, 20, generator, refinements=refinements)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(hidden=[]), "hidden must be a list of widths"),
        (dict(hidden=[8, 0]), "hidden must be a list of widths"),
        (dict(blocks=-1), "blocks must be at least 0, got -1"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Encoder(**settings)
