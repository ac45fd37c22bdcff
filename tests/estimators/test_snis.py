"""Self-normalised importance sampling from remembered proposals: its gradient, and its bias."""

import copy
import functools
import math

import pytest
import torch
from references import DeepDecoder, LinearGaussian, gradients, is_unbiased
from torch.distributions import Independent, MultivariateNormal, Normal

from ucvae.estimators.coupled import Coupled
from ucvae.estimators.iwae import Iwae, dreg_bound
from ucvae.estimators.snis import Snis
from ucvae.models.refinement import improve, log_joint_gradient
from ucvae.models.vae import draw_noise

pytestmark = pytest.mark.usefixtures("double")

TOY = LinearGaussian(dim=5, pixels=10, scale=0.6)
SETTINGS = dict(num_samples=4, proposal_samples=5)
DEFAULT = dict(refine_known=False)  # of the configuration


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def begun(reference, num_images, **settings):
    estimator = Snis(**SETTINGS | DEFAULT | settings)
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


def test_the_gradient_of_known_images_is_by_what_is_remembered():
    """As the weights written out say, with the mixture's density; nothing is refined before."""
    estimator, everyone = taught(TOY, 3, min_weight=0.0), torch.arange(3)
    estimate = estimator(TOY.model, TOY.images, generator(1), everyone)

    model, randomness = copy.deepcopy(TOY.model), generator(1)
    draw_noise(model, TOY.images, 5, randomness)  # the encoder's
    encoded = model.encode(TOY.images).detach()
    mean, scale = estimator.memory.of(everyone, encoded)
    main = MultivariateNormal(mean, scale_tril=scale * (1 + (0.2 / 5) ** 0.5))
    wide = Independent(Normal(encoded.mean, encoded.std), 1)
    noise = torch.randn(3, 4, 6, generator=randomness, dtype=torch.float64)
    xi, by_encoder = noise[..., :5], torch.special.ndtr(noise[..., 5:]) < 0.1
    of_main = mean[:, None] + xi @ main.scale_tril.mT
    z = torch.where(by_encoder, encoded.mean[:, None] + encoded.std[:, None] * xi, of_main)
    densities = [
        math.log(share) + q.log_prob(z.transpose(0, 1)).T for share, q in ((0.9, main), (0.1, wide))
    ]
    log_weights = model.log_joint(TOY.images, z) - torch.logaddexp(*densities)
    weights = torch.softmax(log_weights.detach(), 1)
    expected = gradients((weights * log_weights).sum() / 3, model.decoder)
    torch.testing.assert_close(gradients(-estimate.surrogate, TOY.model.decoder), expected)
    bound = log_weights.detach().exp().mean(1).log()
    torch.testing.assert_close(estimate.objective, bound.mean())
    assert estimate.diagnostics["proposal/refinements"] == 0


def test_what_is_known_is_refined_by_the_samples_of_the_gradient_after_them(monkeypatch):
    """By those that it has drawn itself; a new image is refined first, by samples of its own."""
    # Widened by half. The gaps of the two known images are 0.48 and 0.23 then.
    settings = dict(encoder_share=0.4, num_samples=6, widening=1.25, refinement_gap=0.43)
    estimator, everyone = taught(TOY, 3, **settings), torch.arange(3)
    estimator.memory.known[0] = False
    draws = estimator.draw(TOY.model, TOY.images, generator(2), everyone)
    lesson = draws.lesson
    assert lesson.evaluations[0] >= 5 and lesson.evaluations[1:].tolist() == [0, 0]

    encoded = TOY.model.encode(TOY.images).detach()
    remembered = estimator.memory.of(everyone, encoded)
    of_encoder = torch.isclose(  # whose samples are those that its own noise makes
        encoded.to_noise(draws.z), noise_of(estimator, draws, encoded), rtol=0, atol=1e-9
    ).all(-1)
    assert 0 < of_encoder[1:].sum() < 12
    elbos = torch.zeros(3)
    for i, rate in ((1, 0.5), (2, 0.25)):
        own = draws.z[i : i + 1, ~of_encoder[i]]
        proposal = remembered.rows(torch.tensor([i]))
        log_joint, gradient = log_joint_gradient(TOY.model, TOY.images[i : i + 1], own)
        log_weights = log_joint - proposal.widened(1.25).log_prob(own)
        elbos[i] = log_weights.mean()
        gap = log_weights.logsumexp(1) - math.log(own.shape[1]) - elbos[i]
        assert (gap > 0.43) == (rate == 0.5)
        expected = improve(proposal, proposal.to_noise(own), gradient, torch.tensor([rate]))
        torch.testing.assert_close(lesson.proposal.mean[i], expected.mean[0])
        torch.testing.assert_close(lesson.proposal.scale[i], expected.scale[0])

    # What it is held against is the encoder's bound, here as near as can be told apart.
    encode = estimator.encode
    for ahead in (-1e-6, 1e-6):

        def near(*arguments, ahead=ahead):
            encoded, bound = encode(*arguments)
            log_weights = (elbos - ahead)[:, None].expand_as(bound.log_weights)
            return encoded, bound._replace(log_weights=log_weights)

        monkeypatch.setattr(estimator, "encode", near)
        again = estimator.draw(TOY.model, TOY.images, generator(2), everyone).lesson
        assert again.better[1:].tolist() == [ahead > 0, ahead > 0]


def test_known_images_are_refined_first_where_that_is_asked_for():
    """As when they were new, from what is remembered; the samples teach besides."""
    estimator, everyone = taught(TOY, 3, refine_known=True), torch.arange(3)
    draws = estimator.draw(TOY.model, TOY.images, generator(1), everyone)
    assert (draws.lesson.evaluations >= 5).all()
    visit = estimator.visit(TOY.model, TOY.images, generator(1), everyone)
    assert torch.equal(draws.lesson.evaluations, visit.lesson.evaluations)
    density = visit.proposal.log_prob(draws.z)
    torch.testing.assert_close(
        draws.log_weights, TOY.model.log_joint(TOY.images, draws.z).detach() - density
    )
    assert not torch.equal(draws.lesson.proposal.mean, visit.lesson.proposal.mean)


def noise_of(estimator, draws, encoded):
    """The noise of a call's samples, without what says whose they are, for the seed 2."""
    seeds = generator(2)
    draw_noise(TOY.model, TOY.images, 5, seeds)
    new = estimator.memory.of(torch.arange(3), encoded).rows(torch.tensor([0]))
    estimator.refine(TOY.model, TOY.images[:1], new, seeds)
    return torch.randn(*draws.z.shape[:2], 6, generator=seeds, dtype=torch.float64)[..., :5]


def test_samples_of_the_encoder_alone_teach_nothing():
    """Nor do they tell that a proposal has fallen behind."""
    estimator = taught(TOY, 3, encoder_share=1 - 1e-12)
    lesson = estimator.draw(TOY.model, TOY.images, generator(1), torch.arange(3)).lesson
    assert torch.equal(lesson.proposal.mean, estimator.memory.mean)
    assert lesson.better.all()


def test_a_single_sample_of_its_own_says_nothing_of_a_proposal():
    """Where there are two, these say that all of them have fallen behind."""
    estimator, everyone = taught(TOY, 3, num_samples=2, encoder_share=0.5), torch.arange(3)
    estimator.memory.known[:] = True
    estimator.memory.mean += 10
    counts = []
    for seed in range(10):
        draws = estimator.draw(TOY.model, TOY.images, generator(seed), everyone)
        own = (draws.z > 5).all(-1).sum(1)
        assert torch.equal(draws.lesson.better, own < 2)
        moved = (draws.lesson.proposal.mean != estimator.memory.mean).any(1)
        assert torch.equal(moved, own == 2)
        counts += own.tolist()
    assert set(counts) == {0, 1, 2}


def test_a_proposal_that_has_fallen_behind_the_encoder_s_is_forgotten_and_refined_anew():
    estimator, everyone = taught(TOY, 3), torch.arange(3)
    estimator.memory.known[:] = True
    estimator.memory.mean[1] += 10
    estimate = estimator(TOY.model, TOY.images, generator(1), everyone)
    assert not estimate.lesson.better[1]
    estimator.adapt(estimate)
    assert not estimator.memory.known[1]
    again = estimator(TOY.model, TOY.images, generator(2), everyone)
    assert again.lesson.evaluations[1] >= 5


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
    snis = functools.partial(Snis, **DEFAULT)
    (from_encoder, first), (refined, second) = (mean_error(snis, rate) for rate in (1e-9, 0.5))
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
