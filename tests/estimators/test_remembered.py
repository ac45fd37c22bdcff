"""Remembered proposals: what memory keeps, and what calls make of it."""

import copy

import pytest
import torch
from references import DeepDecoder, LinearGaussian, gradients, is_unbiased
from torch.distributions import MultivariateNormal, kl_divergence

from ucvae.chains import run_lagged_chains
from ucvae.errors import ConfigError
from ucvae.estimators import coupled
from ucvae.estimators.coupled import Coupled
from ucvae.estimators.iwae import Iwae
from ucvae.estimators.remembered import Lesson, RememberedProposals
from ucvae.estimators.snis import Snis
from ucvae.models.gaussians import FullGaussian, Gaussian

pytestmark = pytest.mark.usefixtures("double")

TOY = LinearGaussian(dim=5, pixels=10, scale=0.6)
REMEMBER = dict(num_samples=4, lag=2, kernel="isir", proposals="remembered", proposal_samples=5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestMemory:
    def memory(self, follow_encoder=False):
        return RememberedProposals(6, 5, torch.device("cpu"), torch.float64, follow_encoder)

    def test_starts_from_the_encoder_and_gives_back_what_it_keeps(self):
        memory, encoded = self.memory(), TOY.model.encode(TOY.images).detach()
        everyone = torch.tensor([5, 0, 3])
        for kept, start in zip(memory.of(everyone, encoded), FullGaussian.of(encoded), strict=True):
            assert torch.equal(kept, start)
        improved = FullGaussian(torch.randn(3, 5), torch.randn(3, 5, 5).tril())
        some = torch.tensor([5, 3])
        better = torch.tensor([True, False])
        cost = torch.tensor([10, 10])
        moved = encoded.mean[[0, 2]] + 1  # of no account without follow_encoder
        lesson = Lesson(some, improved.rows(torch.tensor([0, 2])), moved, better, cost)
        memory.keep(lesson)
        now = memory.of(everyone, encoded)
        assert torch.equal(now.mean[[0, 2]], improved.mean[[0, 2]])
        assert torch.equal(now.scale[[0, 2]], improved.scale[[0, 2]])
        assert torch.equal(now.scale[1], torch.diag(encoded.std[1]))
        # A first visit's is kept in any case, a later one's where it is no worse.
        memory.keep(lesson)
        assert memory.known.nonzero().flatten().tolist() == [5]

    def test_means_follow_the_encoder_s_where_they_are_known(self):
        memory, encoded = self.memory(follow_encoder=True), TOY.model.encode(TOY.images).detach()
        places = torch.tensor([5, 0, 3])
        improved = FullGaussian(torch.randn(3, 5), torch.randn(3, 5, 5).tril())
        known, ones = torch.arange(2), torch.ones(2, dtype=torch.bool)
        lesson = (improved.rows(known), encoded.mean[known], ones, ones.long())
        memory.keep(Lesson(places[known], *lesson))
        moved = Gaussian(encoded.mean + torch.randn(3, 5), encoded.std)
        now = memory.of(places, moved)
        expected = improved.mean + (moved.mean - encoded.mean)
        torch.testing.assert_close(now.mean[:2], expected[:2])
        assert torch.equal(now.scale[:2], improved.scale[:2])
        assert torch.equal(now.mean[2], moved.mean[2])

    @pytest.mark.parametrize("follow_encoder", [False, True])
    def test_goes_through_a_checkpoint(self, follow_encoder):
        memory, other = self.memory(follow_encoder), self.memory(follow_encoder)
        encoded = TOY.model.encode(TOY.images).detach()
        ones = torch.ones(3, dtype=torch.bool)
        proposal, places = FullGaussian.of(encoded), torch.tensor([1, 2, 4])
        memory.keep(Lesson(places, proposal, encoded.mean, ones, ones.long()))
        other.load_state_dict(copy.deepcopy(memory.state_dict()))
        everyone = torch.arange(6)
        six = Gaussian(*(part[[0, 1, 2, 0, 1, 2]] + 1 for part in encoded))
        for one, two in zip(memory.of(everyone, six), other.of(everyone, six), strict=True):
            assert torch.equal(one, two)
        assert other.known.tolist() == [False, True, True, False, True, False]

    def test_of_another_size_is_refused(self):
        smaller = RememberedProposals(6, 4, torch.device("cpu"), torch.float64)
        with pytest.raises(
            RuntimeError, match=r"remembered proposals: mean \[6, 4\] in the place of"
        ):
            self.memory().load_state_dict(smaller.state_dict())

    def test_that_has_no_room_is_refused(self):
        with pytest.raises(ConfigError, match=r"remembered: no room for 4,012,000.0 GB on cpu"):
            RememberedProposals(10**9, 1000, torch.device("cpu"), torch.float64)


class TestUnbiased:
    """Calls with memories that learn all the while: 50 batch means, as in test_coupled."""

    @pytest.mark.parametrize(("refinements", "follow_encoder"), [(1, False), (3, False), (3, True)])
    @pytest.mark.parametrize("reference", [LinearGaussian(), DeepDecoder()], ids=["ppca", "deep"])
    def test_whatever_has_been_learnt(self, reference, refinements, follow_encoder):
        chosen = 2 if reference.name == "ppca" else 0
        image, other = reference.images[chosen], reference.images[chosen - 1]
        images, everyone = image.expand(400, -1), torch.arange(400)
        estimator = Coupled(
            **REMEMBER,
            refinements=refinements,
            memory_rate=0.05,
            follow_encoder=follow_encoder,
        )
        estimator.begin(reference.model, 400)
        truth, found = reference.gradient(image), []
        for seed in range(50):
            if follow_encoder:  # as with bits drawn anew: what is remembered is of another image
                between = estimator.learn(
                    reference.model, other.expand(400, -1), generator(seed + 50), everyone
                )
                estimator.memory.keep(between)
            estimate = estimator(reference.model, images, generator(seed), everyone)
            found.append(gradients(-estimate.surrogate, reference.model.decoder))
            estimator.adapt(estimate)
        assert is_unbiased(torch.stack(found), truth)
        iwae = torch.stack(
            [
                gradients(
                    -Iwae(4)(reference.model, images, generator(seed)).surrogate,
                    reference.model.decoder,
                )
                for seed in range(50)
            ]
        )
        assert not is_unbiased(iwae, truth)


class TestCall:
    def test_learns_in_adapt_only(self):
        estimator = Coupled(**REMEMBER)
        estimator.begin(TOY.model, 3)
        estimate = estimator(TOY.model, TOY.images, generator(), torch.arange(3))
        assert not estimator.memory.known.any()
        again = estimator(TOY.model, TOY.images, generator(), torch.arange(3))
        assert torch.equal(estimate.chains.particles.noise, again.chains.particles.noise)
        estimator.adapt(estimate)
        assert estimator.memory.known.all()

    def test_chains_meet_sooner_with_what_is_remembered(self):
        images, everyone = TOY.images[:1].expand(200, -1), torch.arange(200)
        estimator = Coupled(**REMEMBER, refinements=1, widening=0)
        estimator.begin(TOY.model, 200)
        times = []
        for seed in range(30):
            estimate = estimator(TOY.model, images, generator(seed), everyone)
            estimator.adapt(estimate)
            times.append(estimate.chains.meeting_time.double().mean())
        # With K = 4 an exact proposal meets with chance 3/4 a step: after L + 1 + 1/3 steps, and
        # one more for the whole state to be equal is in L + 1. (200 images: +-0.05.)
        assert times[0] > 5
        assert times[-1] == pytest.approx(2 + 1 + 4 / 3, abs=0.25)

    @pytest.mark.parametrize("kind", [Coupled, Snis])
    def test_what_is_learnt_of_some_bits_serves_others_where_it_follows_the_encoder(self, kind):
        """PPCA's encoder errs by the same for all images, so that its mean moves as it should."""
        one, other = TOY.images[:1], TOY.images[1:2]
        index, found = torch.zeros(1, dtype=torch.long), {}
        for follow_encoder in (False, True):
            estimator = kind(**(REMEMBER if kind is Coupled else {}), follow_encoder=follow_encoder)
            estimator.begin(TOY.model, 1)
            for seed in range(200):
                estimator.memory.keep(estimator.learn(TOY.model, one, generator(seed), index))
            encoded = TOY.model.encode(other).detach()
            posterior = TOY.posterior(other)
            proposal = estimator.memory.of(index, encoded)
            remembered = MultivariateNormal(proposal.mean, scale_tril=proposal.scale)
            found[follow_encoder] = kl_divergence(remembered, posterior).item()
        assert found[True] < 1e-9 and found[False] > 1

    @pytest.mark.parametrize("before", [False, True])
    @pytest.mark.parametrize("now", [False, True])
    def test_what_did_not_follow_the_encoder_cannot_begin_to(self, before, now):
        """Where the encoder's means were is not known; the other way round they need not be."""
        first, second = (Snis(num_samples=4, follow_encoder=follow) for follow in (before, now))
        first.begin(TOY.model, 3)
        second.begin(TOY.model, 3)
        first.memory.keep(first.learn(TOY.model, TOY.images, generator(), torch.arange(3)))
        assert second.inherit(first.state_dict()) == (before or not now)
        assert second.memory.known.any() == (before or not now)

    def test_forgets_a_proposal_that_has_fallen_behind_the_encoder_s(self):
        estimator = Coupled(**REMEMBER, refinements=1)
        estimator.begin(TOY.model, 3)
        encoded = TOY.model.encode(TOY.images).detach()
        far = FullGaussian.of(encoded)
        far.mean[1] += 100
        everyone, ones = torch.arange(3), torch.ones(3, dtype=torch.bool)
        estimator.memory.keep(Lesson(everyone, far, encoded.mean, ones, ones.long()))
        estimate = estimator(TOY.model, TOY.images, generator(), everyone)
        assert not estimate.lesson.better[1]
        estimator.adapt(estimate)
        assert not estimator.memory.known[1]

    @pytest.mark.parametrize("name", ["refinement_gap", "widening"])
    def test_nats_are_positive_and_finite(self, name):
        for value in (-1.0, float("inf"), float("nan")):
            with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite, got"):
                Coupled(**REMEMBER, **{name: value})

    @pytest.mark.parametrize("begun", [True, False])
    def test_needs_memory_and_index(self, begun):
        estimator = Coupled(**REMEMBER)
        if begun:
            estimator.begin(TOY.model, 3)
        index = None if begun else torch.arange(3)
        with pytest.raises(ValueError, match="remembered proposals: need"):
            estimator(TOY.model, TOY.images, generator(), index)

    def test_counts_the_samples_of_refinements(self, monkeypatch):
        alone = []

        def spy(*args, **kwargs):
            alone.append(run_lagged_chains(*args, **kwargs))
            return alone[-1]

        monkeypatch.setattr(coupled, "run_lagged_chains", spy)
        estimator = Coupled(**REMEMBER, refinements=3, refinement_gap=10.0)
        estimator.begin(TOY.model, 150)
        estimate = estimator(TOY.model, TOY.images.repeat(50, 1), generator(), torch.arange(150))
        upkeep = estimate.chains.evaluations - alone[-1].evaluations
        assert torch.equal(upkeep, estimate.lesson.evaluations)
        assert upkeep.unique().tolist() == [5, 9, 13]

    @pytest.mark.parametrize("nats", [0.0, 0.2])
    def test_chains_propose_from_what_is_widened_and_the_memory_is_not(self, nats):
        estimator = Coupled(**REMEMBER, widening=nats)
        estimator.begin(TOY.model, 3)
        start = estimator.start(TOY.model, TOY.images, generator(), torch.arange(3))
        assert start.proposal.share == estimator.encoder_share
        for used, learnt in zip(
            start.proposal.main, start.lesson.proposal.widened(nats), strict=True
        ):
            assert torch.equal(used, learnt)
        assert (nats == 0) == torch.equal(start.proposal.main.scale, start.lesson.proposal.scale)

    def test_a_source_of_proposals_that_there_is_not_is_named(self):
        with pytest.raises(ValueError, match="proposals must be one of encoder, remembered, got x"):
            Coupled(proposals="x")
