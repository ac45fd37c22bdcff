"""The convolutional networks: their shapes, their order of pixels, and every use of a model."""

import copy
import itertools
import math

import pytest
import torch
from references import is_unbiased
from torch import nn

from ucvae.chains import Kernel
from ucvae.errors import ConfigError
from ucvae.estimators.coupled import Coupled, Proposals, decoder_gradient
from ucvae.estimators.elbo import Elbo
from ucvae.estimators.iwae import Iwae
from ucvae.evaluation import importance
from ucvae.evaluation.ais import Ais
from ucvae.models import vae
from ucvae.models.conv import Conv, ConvDecoder, ConvEncoder
from ucvae.models.gaussians import FullGaussian, standard_normal_log_prob
from ucvae.models.mlp import Activation, Covariance
from ucvae.models.vae import VAE

pytestmark = pytest.mark.usefixtures("double")

LITERAL = ConvDecoder(start_maps=1, strides=[1, 1, 2])  # the other reading of the paper


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(shape=(2, 4, 6), levels=256, latent_dim=2, decoder=None, **settings):
    encoder = ConvEncoder([3, 4], hidden=5)
    decoder = decoder or ConvDecoder(2, [3], [1, 2])
    return Conv(latent_dim, encoder=encoder, decoder=decoder, **settings).build(
        torch.rand(shape), levels
    )


def random_images(count, model, levels=256, shape=(2, 4, 6)):
    values = torch.randint(0, levels, (count, math.prod(shape)), generator=generator(3))
    return values.double() / (levels - 1)


def pixel_by_pixel(decoder, z):
    """The decoder's result for one ``z [D]``, every number by the definition, in loops.

    A transposed convolution of kernel 4 and padding 1 sends the value at y to the places
    ``stride * y - 1 + k``, k = 0..3, each with its own weight.
    """
    height, width, maps = decoder.start
    dense = decoder.dense.weight @ z + decoder.dense.bias
    values = {
        (y, x): dense[(y * width + x) * maps : (y * width + x + 1) * maps]
        for y, x in itertools.product(range(height), range(width))
    }
    for layer, (height, width) in zip(decoder.convolutions, decoder.sizes, strict=True):
        (stride, _), weight = layer.stride, layer.weight
        out = {
            place: layer.bias.clone() for place in itertools.product(range(height), range(width))
        }
        for (y, x), value in values.items():
            value = decoder.activation(value)
            for ky, kx in itertools.product(range(4), range(4)):
                place = (stride * y - 1 + ky, stride * x - 1 + kx)
                if place in out:
                    out[place] = out[place] + value @ weight[:, :, ky, kx]
        values = out
    size = len(values[0, 0]) // decoder.colours
    return torch.cat(
        [
            values[y, x][colour * size : (colour + 1) * size]
            for colour in range(decoder.colours)
            for y, x in itertools.product(range(height), range(width))
        ]
    )


def log_joint_pixel_by_pixel(model, images, z):
    """``log p(x, z)`` of ``z [n, k, D]``, one z and one value of an image at a time."""
    size = model.likelihood.parameters_per_pixel
    rows = []
    for image, row in zip(images, z, strict=True):
        for one in row:
            parameters = pixel_by_pixel(model.decoder, one).split(size)
            terms = [
                model.likelihood.log_prob(value.view(1, 1), p.view(1, 1, size)).squeeze()
                for value, p in zip(image, parameters, strict=True)
            ]
            rows.append(torch.stack(terms).sum() + standard_normal_log_prob(one))
    return torch.stack(rows).view(z.shape[:2])


# Shapes


def test_the_paper_s_networks():
    model = Conv().build(torch.rand(3, 32, 32), levels=256)
    decoder = [tuple(p.shape) for p in model.decoder.parameters() if p.dim() > 1]
    assert decoder == [(256, 100), (16, 200, 4, 4), (200, 50, 4, 4), (50, 90, 4, 4)]
    assert [c.stride for c in model.decoder.convolutions] == [(2, 2)] * 3
    assert model.decoder.start == (4, 4, 16)
    assert model.decoder.sizes == [(8, 8), (16, 16), (32, 32)]
    encoder = [tuple(p.shape) for p in model.encoder.parameters() if p.dim() > 1]
    convolutions = [(64, 3, 4, 4), (128, 64, 4, 4), (512, 128, 4, 4)]
    assert encoder == [*convolutions, (128, 512 * 4 * 4), (100, 128), (100, 128)]
    assert sum(isinstance(m, nn.ReLU) for m in model.encoder.modules()) == 4
    assert sum(isinstance(m, nn.ReLU) for m in model.decoder.modules()) == 1  # used three times


def test_the_other_reading_keeps_one_map_of_16x16():
    model = Conv(decoder=LITERAL).build(torch.rand(3, 32, 32), levels=256)
    decoder = [tuple(p.shape) for p in model.decoder.parameters() if p.dim() > 1]
    assert decoder == [(256, 100), (1, 200, 4, 4), (200, 50, 4, 4), (50, 90, 4, 4)]
    assert model.decoder.start == (16, 16, 1)
    assert model.decoder.sizes == [(16, 16), (16, 16), (32, 32)]


@pytest.mark.parametrize("decoder", [ConvDecoder(), LITERAL], ids=["default", "literal"])
@pytest.mark.parametrize("levels", [2, 256])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (2, 9, 13)])
def test_any_size_and_any_leading_shape(shape, levels, decoder):
    model = Conv(latent_dim=5, decoder=decoder).build(torch.rand(shape), levels)
    numbers = math.prod(shape) * model.likelihood.parameters_per_pixel
    for leading in [(), (2,), (2, 3), (1, 2, 1), (0, 3)]:
        assert model.decoder(torch.randn(*leading, 5)).shape == (*leading, numbers)
    images = torch.rand(2, math.prod(shape)).round()
    proposal = model.encode(images)
    assert proposal.mean.shape == proposal.std.shape == (2, 5)
    assert model.log_weight(images, proposal, torch.randn(2, 3, 5)).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 7, 8), (3, 32, 4), (1, 1, 1)])
def test_images_too_small_for_the_strides_are_refused(shape):
    with pytest.raises(ConfigError) as error:
        Conv().build(torch.rand(shape), 2)
    assert str(error.value) == (
        "model=conv: 3 convolutions of stride 2 (model.encoder.channels) need images of at least "
        f"8x8 pixels, got {shape[1]}x{shape[2]}"
    )
    Conv(encoder=ConvEncoder([2, 2])).build(torch.rand(1, 7, 8), 2)


def test_a_flat_mean_image_is_refused():
    with pytest.raises(ValueError, match=r"train_mean must be \[C, H, W\], got \[784\]"):
        Conv().build(torch.rand(784), 2)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Conv, dict(latent_dim=0), "latent_dim must be at least 1, got 0"),
        (ConvEncoder, dict(channels=[]), "channels must be a list of numbers of at least 1"),
        (ConvEncoder, dict(channels=[8, 0]), "channels must be a list of numbers of at least 1"),
        (ConvEncoder, dict(hidden=0), "hidden must be at least 1, got 0"),
        (ConvDecoder, dict(start_maps=0), "start_maps must be at least 1, got 0"),
        (ConvDecoder, dict(channels=[]), "channels must be a list of numbers of at least 1"),
        (ConvDecoder, dict(strides=[2, 2]), "strides must be a list of 3 numbers, 1 or 2, one"),
        (ConvDecoder, dict(strides=[2, 3, 2]), "strides must be a list of 3 numbers, 1 or 2"),
    ],
)
def test_settings_outside_their_range_are_refused(kind, settings, message):
    with pytest.raises(ValueError) as error:
        kind(**settings)
    assert str(error.value).startswith(message)


def test_a_full_covariance():
    encoder = ConvEncoder([3], hidden=5, covariance=Covariance.full)
    model = Conv(4, encoder=encoder).build(torch.rand(1, 8, 8), 2)
    assert isinstance(model.encode(torch.rand(3, 64)), FullGaussian)


# Numbers


@pytest.mark.parametrize("levels", [2, 256])
@pytest.mark.parametrize(
    ("shape", "decoder"),
    [
        ((2, 4, 6), ConvDecoder(2, [3], [1, 2])),
        ((3, 5, 4), ConvDecoder(1, [3], [2, 1])),
        ((1, 7, 9), ConvDecoder(2, [3, 2], [2, 2, 2])),
    ],
    ids=["strides 1, 2", "strides 2, 1, odd", "strides 2, 2, 2, odd"],
)
def test_the_definition(shape, decoder, levels):
    model = tiny(shape, levels, decoder=decoder, activation=Activation.tanh)
    z = torch.randn(2, 3, 2)
    expected = torch.stack([pixel_by_pixel(model.decoder, one) for one in z.flatten(0, 1)])
    torch.testing.assert_close(model.decoder(z), expected.view(2, 3, -1))
    images = random_images(2, model, levels, shape)
    torch.testing.assert_close(
        model.log_joint(images, z), log_joint_pixel_by_pixel(model, images, z)
    )


def test_each_pixel_gets_its_own_parameters():
    """The last bias numbers the channels, and one weight marks one place of one channel."""
    model = tiny((3, 4, 4), decoder=ConvDecoder(1, [1], [2, 2]))
    last = model.decoder.convolutions[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.arange(90.0))
    parameters = model.decoder(torch.randn(2)).view(3, 4, 4, 30)
    for colour in range(3):
        # 10 weights, then 10 means, then 10 scales, the same at each place.
        expected = torch.arange(30.0) + 30 * colour
        assert torch.equal(parameters[colour], expected.expand(4, 4, 30))
    _, means, _ = model.likelihood._split(model.decoder(torch.randn(2)))
    assert torch.equal(means.view(3, 16, 10)[1], torch.arange(40.0, 50.0).expand(16, 10))

    # Only the place (1, 0) of the 2x2 maps before the last layer is lit; it reaches rows 1 to 4
    # and columns -1 to 2, of which rows 1 to 3 and columns 0 to 2 are in the image.
    with torch.no_grad():
        last.bias.zero_()
        last.weight[0, 30 * 2 + 7] = 1.0
    lit = torch.zeros(1, 1, 2, 2)
    lit[0, 0, 1, 0] = 1.0
    model.decoder.convolutions[0].register_forward_hook(lambda *_: lit)
    parameters = model.decoder(torch.randn(1, 2)).view(3, 4, 4, 30)
    found = parameters.nonzero().tolist()
    assert found == [[2, y, x, 7] for y in (1, 2, 3) for x in (0, 1, 2)]


@pytest.mark.parametrize("levels", [2, 256])
def test_training_starts_from_the_mean_of_each_colour(levels):
    train_mean = torch.tensor([0.2, 0.5, 0.7])[:, None, None] + 0.1 * torch.rand(3, 8, 8)
    model = Conv(latent_dim=3).build(train_mean, levels)
    with torch.no_grad():
        model.decoder.convolutions[-1].weight.zero_()
        mean = model.likelihood.mean(model.decoder(torch.randn(3))).view(3, 8, 8)
    expected = train_mean.mean((1, 2))[:, None, None].expand(3, 8, 8)
    # The mixture's means spread 0.25 about the mean image and are cut off at 0 and 1.
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-9 if levels == 2 else 0.02)


def test_long_passes_are_sliced_by_the_widest_layer(monkeypatch):
    """Bits have less output than the decoder has in its middle."""
    model = Conv(latent_dim=3).build(torch.rand(1, 32, 32), 2)
    images = torch.zeros(1, 1024)
    assert model.decoder.widest == 200 * 8 * 8 == 50 * 16 * 16
    assert model.rows_at_a_time(images) == vae.CPU_NUMBERS // 12_800
    colour = Conv(latent_dim=3).build(torch.rand(3, 32, 32), 256)
    assert colour.decoder.widest == 90 * 32 * 32
    assert colour.rows_at_a_time(torch.zeros(1, 3072)) == vae.CPU_NUMBERS // 92_160


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_a_pass_without_gradients_is_sliced(rows, monkeypatch):
    model = tiny()
    images, z = random_images(5, model), torch.randn(5, 3, 2)
    expected = model.log_likelihood(images, z)
    monkeypatch.setattr(VAE, "rows_at_a_time", lambda self, images: rows)
    sizes = []
    model.decoder.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[:2]))
    with torch.no_grad():
        torch.testing.assert_close(model.log_likelihood(images, z), expected)
    # An image's samples stay together.
    assert [n * k for n, k in sizes] == {1: [3] * 5, 7: [6, 6, 3], 1000: [15]}[rows]


# Use


@pytest.fixture(scope="module")
def toy():
    """A model with D = 1, two images, and their ``log p(x)`` by the trapezium rule.

    The grid reaches 8 standard deviations.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    settings = Conv(1, Activation.tanh, ConvEncoder([3], hidden=5), ConvDecoder(2, [2], [2, 1]))
    model = settings.build(torch.rand(2, 2, 2), 2)
    with torch.no_grad():
        for convolution in model.decoder.convolutions:
            convolution.weight.mul_(3)
    images = random_images(2, model, 2, (2, 2, 2))
    grid = torch.linspace(-8, 8, 161)[None, :, None].expand(len(images), -1, -1)
    exact = model.log_joint(images, grid).logsumexp(1) + math.log(16 / 160)
    truth = torch.autograd.grad(exact.sum(), list(model.decoder.parameters()))
    yield model, images, exact.detach(), truth
    torch.set_default_dtype(before)


def test_importance_sampling_and_ais_find_the_exact_log_likelihood(toy):
    model, images, exact, _ = toy
    # With S samples the log of the mean weight has the error sd(w) / (p sqrt(S)); measured here:
    # sd(w) / p = 2.7, so 0.019 at S = 20,000.
    found = importance.log_likelihood(model, images, 20_000, generator())
    torch.testing.assert_close(found, exact, rtol=0, atol=5 * 0.019)
    # The same of AIS: 100 chains of 10 temperatures scatter by 0.002 over seeds.
    ais = Ais(chains=100, temperatures=10, leapfrog_steps=3, pilot_images=2)
    torch.testing.assert_close(ais(model, images, generator()), exact, rtol=0, atol=5 * 0.002)
    # A decoder that is wrong in one number would be found out.
    spoilt = copy.deepcopy(model)
    with torch.no_grad():
        spoilt.decoder.convolutions[-1].bias[0] += 1
    wrong = importance.log_likelihood(spoilt, images, 20_000, generator())
    assert ((wrong - exact).abs() > 10 * 0.019).any()


ESTIMATORS = {
    "isir": Coupled(2, lag=2, kernel=Kernel.isir),
    "isir_disir": Coupled(2, lag=2),
    "remembered": Coupled(
        2, lag=1, kernel=Kernel.isir, proposals=Proposals.remembered, min_coefficient=0.2
    ),
    "elbo": Elbo(1),
    "iwae": Iwae(2),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_coupled_gradient_has_the_exact_expectation(name, toy):
    """And the same test rejects the gradients of the bounds."""
    model, images, _, truth = toy
    estimator, copies = ESTIMATORS[name], 20
    rows = torch.arange(2).repeat(copies)
    estimator.begin(model, len(rows))
    parameters = list(model.decoder.parameters())
    estimates = []
    for seed in range(30):
        estimate = estimator(model, images[rows], generator(seed), torch.arange(len(rows)))
        # Minus the mean over the batch; the truth is a sum over the two images.
        gradient = torch.autograd.grad(-2 * estimate.surrogate, parameters)
        estimates.append(torch.cat([part.flatten() for part in gradient]))
    exact = torch.cat([part.flatten() for part in truth])
    assert is_unbiased(torch.stack(estimates), exact) == isinstance(estimator, Coupled)


def test_the_differentiable_pass_over_particles(toy):
    model, images, _, _ = toy
    particles = Coupled(3, lag=2)(model, images, generator()).chains.particles
    proposal = model.encode(images).detach()
    found = decoder_gradient(model, images, proposal, particles)
    z = proposal.rows(particles.image_index).transform(particles.noise)
    value = log_joint_pixel_by_pixel(model, images[particles.image_index], z)
    parameters = list(model.decoder.parameters())
    expected = torch.autograd.grad((particles.coefficient * value).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_both_precisions_agree():
    model = tiny((3, 8, 8))
    images, noise = random_images(4, model, shape=(3, 8, 8)), torch.randn(4, 5, 2)
    expected = model.log_weight(images, model.encode(images), noise)
    model, images, noise = model.float(), images.float(), noise.float()
    found = model.log_weight(images, model.encode(images), noise)
    assert found.dtype == torch.float32
    # 192 values with log-probabilities of about -5, each off by some roundings of 1e-7 of its
    # terms, which reach some hundred: 192 * 1e-5 at worst.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=192e-5)
