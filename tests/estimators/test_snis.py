"""Self-normalised importance sampling from remembered proposals: its gradient, and its bias."""

import copy
import functools
import math

import pytest
import torch
from references import DeepDecoder, LinearGaussian, gradients, is_unbiased

from ucvae.estimators.coupled import Coupled
from ucvae.estimators.iwae import Iwae, dreg_bound
from ucvae.estimators.snis import Snis
from ucvae.models.refinement import improve, log_joint_gradient
from ucvae.models.vae import draw_noise

pytestmark = pytest.mark.usefixtures("double")

TOY = LinearGaussian(dim=5, pixels=10, scale=0.6)
SETTINGS = dict(num_samples=4, proposal_samples=5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def begun(reference, num_images, **settings):
    estimator = Snis(**SETTINGS | settings)
    estimator.begin(reference.model, num_images)
    return estimator


def test_gradient_and_bound_are_those_of_the_weights_written_out():
    estimator, everyone = begun(TOY, 3, min_weight=0.0), torch.arange(3)
    estimate = estimator(TOY.model, TOY.images, generator(), everyone)

    model, randomness = copy.deepcopy(TOY.model), generator()
    proposal = estimator.visit(model, TOY.images, randomness, everyone).proposal
    z = proposal.transform(torch.randn(3, 4, 6, generator=randomness, dtype=torch.float64))
    log_weights = model.log_joint(TOY.images, z) - proposal.log_prob(z)
    weights = log_weights.detach().exp()
    weights /= weights.sum(1, keepdim=True)
    expected = gradients((weights * log_weights).sum() / 3, model.decoder)
    torch.testing.assert_close(gradients(-estimate.surrogate, TOY.model.decoder), expected)
    bound = log_weights.detach().exp().mean(1).log()
    torch.testing.assert_close(estimate.objective, bound.mean())
    ess = 1 / weights.square().sum(1)
    torch.testing.assert_close(estimate.diagnostics["proposal/ess"], ess.mean())
    spent = estimate.lesson.evaluations.double().mean()
    assert estimate.diagnostics["proposal/refinements"] == spent >= 5


def taught(reference, num_images, **settings):
    """An estimator that has seen all images once, and so knows them."""
    estimator = begun(reference, num_images, **settings)
    images = reference.images[:num_images]
    estimator.adapt(estimator(reference.model, images, generator(9), torch.arange(num_images)))
    return estimator


def test_what_is_known_is_refined_by_the_samples_of_the_gradient_after_them():
    """A new image is refined first, by samples of its own."""
    estimator = taught(TOY, 2, widening=0.0, encoder_share=0.0)
    estimator.memory.known[0] = False
    everyone, seeds = torch.arange(2), generator(1)
    draws = estimator.draw(TOY.model, TOY.images[:2], seeds, everyone)
    assert draws.lesson.evaluations[0] >= 5 and draws.lesson.evaluations[1] == 0

    encoded = TOY.model.encode(TOY.images[:2])
    remembered = estimator.memory.of(everyone, encoded).rows(torch.tensor([1]))
    xi = remembered.to_noise(draws.z[1:])
    _, gradient = log_joint_gradient(TOY.model, TOY.images[1:2], draws.z[1:])
    log_weights = draws.log_weights[1]
    gap = log_weights.logsumexp(0) - math.log(4) - log_weights.mean()
    rate = 0.25 if gap <= estimator.refinement_gap else 0.5
    expected = improve(remembered, xi, gradient, torch.tensor([rate]))
    torch.testing.assert_close(draws.lesson.proposal.mean[1:], expected.mean)
    torch.testing.assert_close(draws.lesson.proposal.scale[1:], expected.scale)


def test_samples_of_the_encoder_teach_nothing():
    """Else a Gaussian would be fitted to where it never is."""
    estimator = taught(TOY, 3, encoder_share=1 - 1e-12)
    lesson = estimator.draw(TOY.model, TOY.images, generator(1), torch.arange(3)).lesson
    assert torch.equal(lesson.proposal.mean, estimator.memory.mean)
    estimator = taught(TOY, 3, encoder_share=0.1)
    lesson = estimator.draw(TOY.model, TOY.images, generator(1), torch.arange(3)).lesson
    assert not torch.equal(lesson.proposal.mean, estimator.memory.mean)


def test_thinning_leaves_the_gradient_s_expectation_as_it_is(monkeypatch):
    estimator, everyone = taught(TOY, 3, num_samples=8, min_weight=0.2), torch.arange(3)
    draws, other = (estimator.draw(TOY.model, TOY.images, generator(s), everyone) for s in (1, 2))

    def gradient(drawn, min_weight, seed=0):
        monkeypatch.setattr(estimator, "min_weight", min_weight)
        monkeypatch.setattr(estimator, "draw", lambda *_: drawn)
        surrogate = estimator(TOY.model, TOY.images, generator(seed), everyone).surrogate
        return gradients(surrogate, TOY.model.decoder)

    found = torch.stack([gradient(draws, 0.2, seed) for seed in range(2000)])
    assert found.std(0).max() > 0
    assert is_unbiased(found, gradient(draws, 0.0))
    assert not is_unbiased(found, gradient(other, 0.0))


def test_the_encoder_gets_its_own_bound_s_gradient():
    """By its own samples: those of the remembered proposals have no part in it."""
    estimate = begun(TOY, 3)(TOY.model, TOY.images, generator(), torch.arange(3))
    model = copy.deepcopy(TOY.model)
    noise = draw_noise(model, TOY.images, 5, generator())
    bound = dreg_bound(model, TOY.images, model.encode(TOY.images), noise)
    expected = gradients(bound.surrogate, model.encoder)
    torch.testing.assert_close(gradients(estimate.surrogate, TOY.model.encoder), expected)
    torch.testing.assert_close(estimate.diagnostics["train/iwae_bound"], bound.value.mean())


def test_remembers_in_adapt_and_goes_through_a_checkpoint():
    estimator, everyone = begun(TOY, 3), torch.arange(3)
    estimate = estimator(TOY.model, TOY.images, generator(), everyone)
    assert not estimator.memory.known.any()
    estimator.adapt(estimate)
    assert estimator.memory.known.all()
    other = begun(TOY, 3)
    other.load_state_dict(copy.deepcopy(estimator.state_dict()))
    one, two, new = (
        e(TOY.model, TOY.images, generator(1), everyone).objective
        for e in (estimator, other, begun(TOY, 3))
    )
    assert one == two != new


def test_where_posteriors_are_gaussian_it_becomes_exact():
    """Every weight is then p(x); the encoder's proposals leave IWAE with a gap all along."""
    everyone = torch.arange(3)
    estimator = begun(TOY, 3, widening=0.0, encoder_share=0.0, refinement_gap=0.0)
    for seed in range(100):
        estimate = estimator(TOY.model, TOY.images, generator(seed), everyone)
        estimator.adapt(estimate)
    exact = TOY.log_likelihood(TOY.images).mean()
    torch.testing.assert_close(estimate.objective, exact, rtol=0, atol=1e-6)
    # 1,000 draws of IWAE's bound: its gap to log p(x) is many standard errors.
    found = torch.stack(
        [Iwae(4)(TOY.model, TOY.images, generator(s)).objective for s in range(1000)]
    )
    assert exact - found.mean() > 10 * found.std() / 1000**0.5


def mean_error(kind, rate):
    """Of 50 calls with a memory that 20 visits have taught, and that learns no more."""
    reference = DeepDecoder()
    image = reference.images[0]
    images, everyone = image.expand(400, -1), torch.arange(400)
    truth = reference.gradient(image)
    estimator = kind(**SETTINGS, refinements=1, memory_rate=rate)
    estimator.begin(reference.model, 400)
    for seed in range(20):
        estimator.adapt(estimator(reference.model, images, generator(1000 + seed), everyone))
    found = torch.stack(
        [
            gradients(
                -estimator(reference.model, images, generator(seed), everyone).surrogate,
                reference.model.decoder,
            )
            for seed in range(50)
        ]
    )
    return (found.mean(0) - truth).norm(), is_unbiased(found, truth)


def test_is_biased_the_less_the_better_proposals_fit_and_coupled_is_not():
    # So short a step leaves the proposals as they start, at the encoder's.
    (from_encoder, first), (refined, second) = (mean_error(Snis, rate) for rate in (1e-9, 0.5))
    assert not first and not second
    assert refined < from_encoder / 2
    coupled = functools.partial(Coupled, lag=2, kernel="isir", proposals="remembered")
    assert mean_error(coupled, 0.5)[1]


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_weight_that_no_sample_can_have_is_refused(value):
    with pytest.raises(ValueError, match=rf"^min_weight must be in \[0, 1\), got {value}$"):
        Snis(min_weight=value)


@pytest.mark.parametrize("name", ["num_samples", "proposal_samples"])
def test_a_single_sample_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name} must be at least 2, got 1$"):
        Snis(**{name: 1})
