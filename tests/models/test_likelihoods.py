import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from references import has_frequencies
from torch import nn
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Normal

from ucvae.models.likelihoods import Bernoulli, GaussianLikelihood, LogisticMixture, for_levels
from ucvae.models.mlp import Mlp

pytestmark = pytest.mark.usefixtures("double")

LEVELS = torch.arange(256, dtype=torch.float64) / 255


class TestBernoulli:
    def test_is_torch_s(self):
        images = (torch.rand(5, 12) < 0.5).double()
        logits = 4 * torch.randn(5, 3, 12)
        expected = TorchBernoulli(logits=logits).log_prob(images[:, None]).sum(-1)
        torch.testing.assert_close(Bernoulli().log_prob(images, logits), expected)

    @pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-14), (torch.float32, 3e-7)])
    def test_at_extreme_logits(self, dtype, atol):
        # One pixel; the error that the docstring states is a rounding of a number below 2.
        logits = torch.tensor([0.0, 1e-8, 3, 20, 40, 90, 200, 1e4, 1e8], dtype=torch.float64)
        logits = torch.cat([logits, -logits])[None, :, None]
        for bit in (0.0, 1.0):
            image = torch.full((1, 1), bit)
            expected = TorchBernoulli(logits=logits).log_prob(image).sum(-1)
            values = Bernoulli().log_prob(image.to(dtype), logits.to(dtype)).double()
            torch.testing.assert_close(values, expected, rtol=1e-7, atol=atol)

    def test_gradient(self):
        images = (torch.rand(3, 5) < 0.5).double()
        logits = (3 * torch.randn(3, 4, 5)).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: Bernoulli().log_prob(images, x), logits)

    def test_gradient_at_extreme_logits_is_finite(self):
        logits = torch.tensor([[[-1e6, -100.0, 0.0, 100.0, 1e6]]], requires_grad=True)
        images = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
        (gradient,) = torch.autograd.grad(Bernoulli().log_prob(images, logits).sum(), logits)
        torch.testing.assert_close(gradient, torch.tensor([[[1.0, 0, 0.5, -1, 0]]]))

    def test_mean(self):
        torch.testing.assert_close(
            Bernoulli().mean(torch.tensor([0.0, math.log(3)])), torch.tensor([0.5, 0.75])
        )


def case(dtype, images, samples, hidden, pixels, scale=1.0):
    """Bits, features ``[n, k, H]`` and a linear layer."""
    bits = (torch.rand(images, pixels) < 0.4).to(dtype)
    features = (scale * torch.randn(images, samples, hidden)).to(dtype)
    return bits, features, nn.Linear(hidden, pixels, dtype=dtype)


class TestBernoulliOfALinearLayer:
    """``log_prob_linear`` against ``log_prob`` of the layer's output, in float64."""

    # In float32 a sum of 784 terms, each rounded at 6e-8 of numbers up to about 10.
    @pytest.mark.parametrize(
        "dtype, close",
        [
            (torch.float64, dict(rtol=1e-10, atol=1e-10)),
            (torch.float32, dict(rtol=1e-4, atol=1e-3)),
        ],
    )
    @pytest.mark.parametrize(
        "shape",
        [(1, 1, 4, 6), (3, 1, 5, 13), (1, 7, 5, 8), (20, 10, 60, 784), (2, 400, 40, 784)],
        ids=str,
    )
    def test_value_and_gradients(self, dtype, close, shape):
        bits, features, linear = case(dtype, *shape)
        upstream = torch.randn(shape[:2])
        exact = copy.deepcopy(linear).double()
        inputs = features.clone().requires_grad_(), features.double().requires_grad_()
        value = Bernoulli().log_prob_linear(bits, inputs[0], linear)
        expected = Bernoulli().log_prob(bits.double(), exact(inputs[1]))
        torch.testing.assert_close(value.double(), expected, **close)
        with torch.no_grad():
            forward_only = Bernoulli().log_prob_linear(bits, features, linear)
        torch.testing.assert_close(forward_only.double(), expected, **close)
        (value * upstream).sum().backward()
        (expected * upstream).sum().backward()
        for one, other in (
            (inputs[0], inputs[1]),
            (linear.weight, exact.weight),
            (linear.bias, exact.bias),
        ):
            torch.testing.assert_close(one.grad.double(), other.grad, **close)

    def test_gradient(self):
        bits, features, linear = case(torch.float64, 2, 3, 4, 6)

        def value(features, weight, bias):
            layer = SimpleNamespace(weight=weight, bias=bias)
            return Bernoulli().log_prob_linear(bits, features, layer)

        inputs = features.requires_grad_(), linear.weight, linear.bias
        assert torch.autograd.gradcheck(value, inputs)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_at_extreme_logits(self, dtype):
        # Features 1e4 times a unit weight: logits of +-1e4, where a softplus is exact.
        bits, _, linear = case(dtype, 2, 1, 3, 10)
        with torch.no_grad():
            linear.weight.copy_(torch.randint(2, (10, 3)) * 2 - 1).mul_(torch.tensor([1, 0, 0]))
            linear.bias.zero_()
        features = torch.tensor([[[1e4, 0, 0]], [[-1e4, 0, 0]]], dtype=dtype, requires_grad=True)
        value = Bernoulli().log_prob_linear(bits, features, linear)
        expected = TorchBernoulli(logits=linear(features)).log_prob(bits[:, None]).sum(-1)
        torch.testing.assert_close(value, expected)
        value.sum().backward()
        assert features.grad.isfinite().all() and linear.weight.grad.isfinite().all()

    def test_of_any_layout_and_with_an_expanded_gradient(self):
        bits, features, linear = case(torch.float32, 6, 40, 64, 784)
        dense = Bernoulli().log_prob_linear(bits, features, linear)
        for other in (
            torch.stack([features, features], -1)[..., 0],
            features.transpose(0, 1).contiguous().transpose(0, 1),
        ):
            assert not other.is_contiguous()
            value = Bernoulli().log_prob_linear(bits.T.contiguous().T, other, linear)
            torch.testing.assert_close(value, dense, rtol=1e-5, atol=1e-3)
            torch.testing.assert_close(
                *(
                    torch.autograd.grad(v.sum(), linear.weight, retain_graph=True)
                    for v in (value, dense)
                ),
                rtol=1e-4,
                atol=1e-3,
            )

    def test_only_what_is_wanted_is_differentiated(self):
        bits, features, linear = case(torch.float64, 2, 3, 4, 6)
        linear.requires_grad_(False)
        Bernoulli().log_prob_linear(bits, features.requires_grad_(), linear).sum().backward()
        assert features.grad is not None and linear.weight.grad is None and linear.bias.grad is None


def mixture_parameters(pixels, components, log_scale):
    """``[1, 1, pixels * 3 * components]``; ``log_scale`` is a range that scales are drawn from."""
    logits, means = 2 * torch.randn(2, pixels, components)
    low, high = log_scale
    scales = low + (high - low) * torch.rand(pixels, components)
    return torch.stack([logits, means, scales], dim=-2).flatten()[None, None]


def one_pixel_at_every_level(parameters):
    """Log-probabilities of the 256 levels under one pixel's parameters, ``[256]``."""
    return LogisticMixture(parameters.shape[-1] // 3).log_prob(
        LEVELS[:, None], parameters.expand(256, 1, -1)
    )[:, 0]


def grey(images, pixels):
    """Images with both end levels among their pixels, where there are enough."""
    made = torch.randint(256, (images, pixels)) / 255
    made[:, :1], made[:, -1:] = 0, 1
    return made


def textbook_mixture(images, parameters):
    """``LogisticMixture().log_prob`` as its docstring has it, one operation after the other."""
    logits, means, log_scales = parameters.unflatten(-1, (-1, 3, 10)).unbind(-2)
    log_scales = log_scales.clamp(-7, 50)
    x = images[:, None, :, None]
    inverse_scale = torch.exp(-log_scales)
    middle = (2 * x - 1 - means) * inverse_scale
    half_width = inverse_scale / 255
    inner = (x > 0) & (x < 1)
    component = (
        torch.where(x < 1, -F.softplus(-(middle + half_width)), 0.0)
        + torch.where(x > 0, -F.softplus(middle - half_width), 0.0)
        + torch.where(inner, torch.log(-torch.expm1(-2 * half_width)), 0.0)
    )
    return torch.logsumexp(component + torch.log_softmax(logits, -1), dim=-1).sum(-1)


SCALES = [(-3.0, 0.0), (-7.0, -5.0), (-40.0, -8.0), (2.0, 10.0), (-40.0, 40.0), (60.0, 200.0)]


class TestLogisticMixture:
    @pytest.mark.parametrize("log_scale", SCALES)
    @pytest.mark.parametrize("components", [1, 10])
    def test_probabilities_add_up_to_one(self, components, log_scale):
        for _ in range(20):
            parameters = mixture_parameters(1, components, log_scale)
            total = one_pixel_at_every_level(parameters).exp().sum()
            assert float(total) == pytest.approx(1, abs=1e-9)

    def test_is_the_difference_of_sigmoids(self):
        parameters = mixture_parameters(1, 10, (-3.0, 0.0))
        logits, means, log_scales = parameters.view(3, 10)[:, None]
        x = (2 * LEVELS - 1)[:, None]
        upper = torch.where(x > 1 - 1e-9, torch.inf, (x + 1 / 255 - means) / log_scales.exp())
        lower = torch.where(x < -1 + 1e-9, -torch.inf, (x - 1 / 255 - means) / log_scales.exp())
        probability = (torch.softmax(logits, -1) * (upper.sigmoid() - lower.sigmoid())).sum(-1)
        # A difference of two numbers below 1 is good to 1e-16; keep to where that is 1e-9 of it.
        stable = probability > 1e-6
        assert stable.sum() > 200
        torch.testing.assert_close(
            one_pixel_at_every_level(parameters)[stable],
            probability.log()[stable],
            rtol=0,
            atol=1e-9,
        )

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("log_scale", SCALES)
    def test_gradients_are_finite(self, log_scale, dtype):
        images = LEVELS[None].to(dtype)
        parameters = mixture_parameters(256, 10, log_scale)
        for distance in (0.0, 30.0, -30.0):
            moved = parameters.clone().view(256, 3, 10)
            moved[:, 1] += distance
            moved = moved.view_as(parameters).to(dtype).requires_grad_()
            value = LogisticMixture().log_prob(images, moved).sum()
            (gradient,) = torch.autograd.grad(value, moved)
            assert value.isfinite()
            assert gradient.isfinite().all()

    def test_gradient(self):
        images = torch.tensor([[0.0, 40 / 255, 1.0]])
        parameters = mixture_parameters(3, 4, (-3.0, 0.0)).requires_grad_()
        likelihood = LogisticMixture(4)
        assert torch.autograd.gradcheck(lambda p: likelihood.log_prob(images, p), parameters)

    # In float32 a sum of 784 terms of up to 10 nats, and gradients by means of up to exp(3) each.
    @pytest.mark.parametrize(
        "dtype, close",
        [
            (torch.float64, dict(rtol=1e-9, atol=1e-9)),
            (torch.float32, dict(rtol=1e-4, atol=2e-3)),
        ],
    )
    @pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (7, 10, 784), (1, 60, 784)], ids=str)
    def test_is_the_textbook_s(self, shape, dtype, close):
        images = grey(shape[0], shape[2])
        outputs = mixture_parameters(math.prod(shape), 10, (-3.0, 1.0)).view(*shape[:2], -1)
        outputs = outputs.to(dtype).requires_grad_()
        exact = outputs.detach().double().requires_grad_()
        upstream = torch.randn(shape[:2])
        value = LogisticMixture().log_prob(images.to(dtype), outputs)
        expected = textbook_mixture(images, exact)
        torch.testing.assert_close(value.double(), expected, **close)
        kept = outputs.detach().clone()
        with torch.no_grad():
            forward_only = LogisticMixture().log_prob(images.to(dtype), outputs)
        torch.testing.assert_close(forward_only, value)
        (value * upstream).sum().backward()
        (expected * upstream).sum().backward()
        torch.testing.assert_close(outputs.grad.double(), exact.grad, **close)
        assert outputs.equal(kept)  # it belongs to whoever asks

    @pytest.mark.parametrize("log_scale", SCALES)
    def test_is_the_textbook_s_at_any_scale(self, log_scale):
        images = LEVELS[None]
        for distance in (0.0, 30.0):
            outputs = mixture_parameters(256, 10, log_scale)
            outputs.view(256, 3, 10)[:, 1] += distance
            exact = outputs.clone().requires_grad_()
            outputs.requires_grad_()
            value = LogisticMixture().log_prob(images, outputs)
            expected = textbook_mixture(images, exact)
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
            value.sum().backward()
            expected.sum().backward()
            torch.testing.assert_close(outputs.grad, exact.grad, rtol=1e-7, atol=1e-9)

    def test_large_logits_cost_no_digits(self):
        # Of 256 pixels in float32: each is off by a few roundings of some 10 nats, 1e-6. Adding a
        # logit of 1e4 to one of these would be off by 1e-3.
        outputs = mixture_parameters(256, 10, (-3.0, 0.0))
        outputs.view(256, 3, 10)[:, 0] += 1e4
        value = LogisticMixture().log_prob(LEVELS[None].float(), outputs.float())
        expected = textbook_mixture(LEVELS[None], outputs.float().double())
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=256 * 1e-6)

    @pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (5, 100, 49)], ids=str)
    def test_of_a_linear_layer(self, shape):
        images, features = grey(shape[0], shape[2]), torch.randn(*shape[:2], 6)
        features.requires_grad_()
        linear = nn.Linear(6, shape[2] * 30)
        wanted = features, linear.weight, linear.bias
        mixture = LogisticMixture()
        value = mixture.log_prob_linear(images, features, linear)
        expected = textbook_mixture(images, linear(features))
        torch.testing.assert_close(value, expected)
        with torch.no_grad():
            forward_only = mixture.log_prob_linear(images, features, linear)
        torch.testing.assert_close(forward_only, expected)
        upstream = torch.randn(shape[:2])
        for one, other in zip(
            *(torch.autograd.grad((v * upstream).sum(), wanted) for v in (value, expected)),
            strict=True,
        ):
            torch.testing.assert_close(one, other)

    def test_outputs_of_any_layout(self):
        images, outputs = grey(4, 5), torch.randn(3, 4, 5 * 30).transpose(0, 1)
        assert not outputs.is_contiguous()
        expected = textbook_mixture(images, outputs)
        torch.testing.assert_close(LogisticMixture().log_prob(images, outputs), expected)
        with torch.no_grad():
            torch.testing.assert_close(LogisticMixture().log_prob(images, outputs), expected)

    def test_images_and_samples_keep_their_places(self):
        images = torch.randint(256, (2, 5)) / 255
        parameters = torch.randn(2, 3, 5 * 30)
        values = LogisticMixture().log_prob(images, parameters)
        assert values.shape == (2, 3)
        for i in range(2):
            for k in range(3):
                pixels = [
                    LogisticMixture().log_prob(images[i : i + 1, p : p + 1], one[None, None])[0, 0]
                    for p, one in enumerate(parameters[i, k].view(5, 30))
                ]
                torch.testing.assert_close(values[i, k], torch.stack(pixels).sum())

    def test_mean_is_near_the_distribution_s(self):
        parameters = mixture_parameters(1, 10, (-6.0, -4.0))
        parameters.view(3, 10)[1].clamp_(-0.9, 0.9)
        exact = (one_pixel_at_every_level(parameters).exp() * LEVELS).sum()
        assert float(LogisticMixture().mean(parameters)) == pytest.approx(float(exact), abs=1e-3)


class TestGaussian:
    @pytest.mark.parametrize("variance", [1e-4, 0.1, 3.0])
    def test_is_torch_s(self, variance):
        images, means = torch.randn(5, 12), torch.randn(5, 3, 12)
        expected = Normal(means, variance**0.5).log_prob(images[:, None]).sum(-1)
        torch.testing.assert_close(GaussianLikelihood(variance).log_prob(images, means), expected)

    def test_parameters_are_means(self):
        likelihood = GaussianLikelihood(0.1)
        images = torch.tensor([0.0, 0.3, 1.0])
        assert likelihood.mean(likelihood.initial_bias(images)).equal(images)


@pytest.mark.parametrize("levels, kind", [(2, Bernoulli), (256, LogisticMixture)])
class TestByLevels:
    def test_kind(self, levels, kind):
        assert isinstance(for_levels(levels), kind)

    def test_the_decoder_starts_from_the_mean_training_image(self, levels, kind):
        # At z = 0 hidden layers say little, and the bias says the mean: within 0.1 on average,
        # where a decoder without it (all greys) is off by 0.25, the mean of |u - 1/2|.
        train_mean = torch.rand(1, 20, 20)
        model = Mlp(latent_dim=5).build(train_mean, levels)
        with torch.no_grad():
            mean = model.likelihood.mean(model.decoder(torch.zeros(1, 5)))
            error = (mean - train_mean.flatten()).abs().mean()
            model.decoder[-1].bias.zero_()
            without = model.likelihood.mean(model.decoder(torch.zeros(1, 5)))
        assert error < 0.1
        assert (without - train_mean.flatten()).abs().mean() > 0.2

    def test_a_pixel_that_never_varies_starts_finite(self, levels, kind):
        likelihood = for_levels(levels)
        bias = likelihood.initial_bias(torch.tensor([0.0, 1.0]))
        assert bias.shape == (2 * likelihood.parameters_per_pixel,)
        worst = likelihood.log_prob(torch.tensor([[1.0, 0.0]]), bias[None, None])
        assert worst.isfinite().all()


class TestSamples:
    """Draws have the frequencies, or the moments, that ``log_prob`` says."""

    def test_bits(self):
        logits = torch.tensor([-2.0, 0.0, 1.5])
        generator = torch.Generator().manual_seed(0)
        drawn = Bernoulli().draw(logits.expand(20_000, 3), generator)
        for pixel in range(3):
            one = logits[pixel].sigmoid().double()
            counts = torch.bincount(drawn[:, pixel].long(), minlength=2)
            assert has_frequencies(counts.double(), torch.stack([1 - one, one]))
        assert not has_frequencies(counts.double(), torch.tensor([0.25, 0.75]).double())

    def test_grey_levels(self):
        # One pixel, two components: one wide and about the middle, one at the upper end.
        mixture = LogisticMixture(2)
        parameters = torch.tensor([[0.0, 0.7], [-0.1, 0.98], [-3.0, -4.0]]).flatten()
        levels = torch.arange(256.0)[:, None] / 255
        of_level = mixture.log_prob(levels, parameters.expand(256, 1, -1))[:, 0].double().exp()
        count = 200_000
        generator = torch.Generator().manual_seed(0)
        drawn = mixture.draw(parameters.expand(count, -1), generator)
        assert drawn.shape == (count, 1) and 0 <= drawn.min() and drawn.max() == 1
        counts = torch.bincount((255 * drawn[:, 0]).round().long(), minlength=256).double()
        # Neighbouring levels together, so that no expected count is too small for the test.
        groups = torch.arange(256) // 8
        observed = torch.zeros(32).double().index_add(0, groups, counts)
        expected = torch.zeros(32).double().index_add(0, groups, of_level)
        common = count * expected > 20
        observed = torch.cat([observed[common], observed[~common].sum()[None]])
        expected = torch.cat([expected[common], expected[~common].sum()[None]])
        keep = count * expected > 5
        assert has_frequencies(observed[keep], expected[keep] / expected[keep].sum())
        assert not has_frequencies(observed[keep].flip(0), expected[keep] / expected[keep].sum())

    def test_real_values(self):
        means = torch.tensor([-1.0, 0.5])
        generator = torch.Generator().manual_seed(0)
        drawn = GaussianLikelihood(0.25).draw(means.expand(20_000, 2), generator).double()
        # Standard errors 0.5 / 141 of a mean, sqrt(2 / 20,000) of a relative variance.
        assert ((drawn.mean(0) - means).abs() < 5 * 0.5 / 141).all()
        assert ((drawn.var(0) / 0.25 - 1).abs() < 5 * 0.01).all()
