import pytest
import torch
from references import LinearGaussian, gradients
from torch.distributions import Normal

from ucvae.models.mlp import Activation, Mlp

pytestmark = pytest.mark.usefixtures("double")


def small(levels=2, **settings):
    settings = {"latent_dim": 3, "hidden": [8, 6]} | settings
    return Mlp(**settings).build(torch.rand(1, 4, 4), levels)


IMAGES = torch.arange(5 * 16, dtype=torch.float64).view(5, 16) % 3 / 2


@pytest.mark.parametrize("levels", [2, 256])
def test_log_weight_is_joint_over_proposal(levels):
    model = small(levels)
    proposal = model.encode(IMAGES)
    noise = torch.randn(5, 7, 3)
    z = proposal.mean[:, None] + proposal.std[:, None] * noise
    log_weight = model.log_weight(IMAGES, proposal, noise)
    torch.testing.assert_close(log_weight, model.log_joint(IMAGES, z) - proposal.log_prob(z))
    # To the encoder too: the density of q moves with its own parameters.
    for one, other in zip(
        gradients(log_weight.sum(), model),
        gradients((model.log_joint(IMAGES, z) - proposal.log_prob(z)).sum(), model),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_log_joint_is_likelihood_and_prior():
    toy = LinearGaussian()
    z = torch.randn(3, 5, 2)
    expected = Normal(toy.model.decoder(z), toy.scale).log_prob(toy.images[:, None]).sum(
        -1
    ) + Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(toy.model.log_joint(toy.images, z), expected)


def test_the_weight_of_the_exact_posterior_is_the_evidence():
    # q = p(z|x), which is diagonal for one latent dimension, makes every weight p(x).
    toy = LinearGaussian(dim=1, shift=0.0, spread=1.0)
    noise = torch.randn(3, 9, 1)
    log_weight = toy.model.log_weight(toy.images, toy.model.encode(toy.images), noise)
    expected = toy.log_likelihood(toy.images)[:, None].expand(-1, 9)
    torch.testing.assert_close(log_weight, expected)


def test_a_frozen_decoder_passes_gradients_through_to_z():
    model = small()
    before = [p.requires_grad for p in model.parameters()]
    z = torch.randn(5, 2, 3, requires_grad=True)
    with model.frozen_decoder():
        value = model.log_likelihood(IMAGES, z).sum()
    (frozen,) = torch.autograd.grad(value, z, retain_graph=True)
    assert not gradients(value + 0 * z.sum(), model.decoder).any()
    (free,) = torch.autograd.grad(model.log_likelihood(IMAGES, z).sum(), z)
    torch.testing.assert_close(frozen, free)
    assert [p.requires_grad for p in model.parameters()] == before


def test_a_frozen_decoder_thaws_after_an_error():
    model = small()
    model.decoder[-1].bias.requires_grad_(False)
    with pytest.raises(RuntimeError), model.frozen_decoder():
        raise RuntimeError
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["decoder.4.bias"]


@pytest.mark.parametrize("activation", list(Activation))
def test_networks_mirror_each_other(activation):
    model = small(activation=activation)
    encoder = [tuple(p.shape) for p in model.encoder.parameters() if p.dim() == 2]
    decoder = [tuple(p.shape) for p in model.decoder.parameters() if p.dim() == 2]
    assert encoder == [(8, 16), (6, 8), (3, 6), (3, 6)]
    assert decoder == [(6, 3), (8, 6), (16, 8)]
    layer = {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}[activation.value]
    assert sum(isinstance(m, layer) for m in model.modules()) == 4


def test_the_encoder_s_std_is_a_softplus_that_stays_positive():
    model = small()
    features = model.encoder.features(IMAGES)
    expected = (1 + model.encoder.std(features).exp()).log() + 1e-6
    torch.testing.assert_close(model.encode(IMAGES).std, expected)
    with torch.no_grad():
        model.encoder.std.bias.fill_(-1e4)
    proposal = model.encode(IMAGES)
    assert (proposal.std > 0).all()
    assert model.log_weight(IMAGES, proposal, torch.randn(5, 2, 3)).isfinite().all()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(latent_dim=0), "latent_dim must be at least 1, got 0"),
        (dict(hidden=[]), "hidden must be a list of widths"),
        (dict(hidden=[8, 0]), "hidden must be a list of widths"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Mlp(**settings)


@pytest.mark.parametrize("levels", [2, 256])
@pytest.mark.parametrize("count", [3, 40])
def test_without_a_graph_the_decoder_takes_few_rows_at_a_time(levels, count, monkeypatch):
    """However many z there are, for memory would grow with them; an image is not split."""
    model = small(levels)
    images, z = IMAGES[:4], torch.randn(4, count, 3)
    rows: list[int] = []
    expected = model.log_likelihood(images, z).detach()
    monkeypatch.setattr(type(model), "rows_at_a_time", lambda self, images: 7)
    # In float64 the first layer is a module like any other.
    model.decoder[0].register_forward_hook(lambda _, given, out: rows.append(out[..., 0].numel()))
    with torch.no_grad():
        torch.testing.assert_close(model.log_likelihood(images, z), expected)
    assert sum(rows) == 4 * count and max(rows) <= max(7, count)
