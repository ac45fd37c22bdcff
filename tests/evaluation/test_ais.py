"""Annealed importance sampling: unbiased weights in both directions, exact values, resuming."""

import dataclasses
import math

import pytest
import torch
from references import DeepDecoder, LinearGaussian, is_unbiased

from ucvae.errors import NonFiniteError, RunError
from ucvae.evaluation import ais
from ucvae.evaluation.ais import Ais, Annealed, Path, Schedule, Target, anneal, pilot, transition
from ucvae.evaluation.unfinished import Unfinished
from ucvae.models.ppca import Ppca
from ucvae.models.vae import VAE
from ucvae.randomness import stream

pytestmark = pytest.mark.usefixtures("double")

TOY = LinearGaussian()
# Few temperatures and a step at which a third of the trajectories is refused: what is wrong with a
# transition must show in the weights.
COARSE = [0.0, 0.1, 0.3, 0.6, 1.0]
STEP = 0.7
LEAPFROGS = 3
REPLICATES = 8000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def coarse(step=STEP):
    return Path.of(COARSE, torch.full((len(COARSE) - 2,), step))


def deep_posterior(deep, image, count):
    """Draws from the posterior of a bent decoder, by its values on the grid.

    Cells are 0.06 wide and a draw is moved evenly within its own: the density is as good as
    constant there beside the scatter of the weights.
    """
    weights = deep.log_joint_on_grid(image[None])[0].detach().softmax(-1)
    chosen = deep.grid[torch.multinomial(weights, count, replacement=True)]
    width = math.exp(deep.log_cell / 2)
    return chosen + width * (torch.rand(count, 2) - 0.5)


@pytest.fixture(scope="module")
def deep():
    return DeepDecoder()


def cases(deep):
    """Model, image, exact log-likelihood and posterior draws: closed form, and quadrature."""
    image = TOY.images[0]
    draws = TOY.posterior(image[None]).sample((REPLICATES,))[:, 0]
    yield TOY.model, image, TOY.log_likelihood(image[None]).detach(), draws
    image = deep.images[0]
    exact = deep.log_likelihood(image[None]).detach()
    yield deep.model, image, exact, deep_posterior(deep, image, REPLICATES)


def weights_are_right(deep, path=None):
    """Whether ``E[w] = p(x)`` and, the other way, ``E[1/w] = 1/p(x)``; one answer a direction."""
    path = coarse() if path is None else path
    forward, backward = True, True
    for model, image, exact, posterior in cases(deep):
        target = Target(model, image.expand(REPLICATES, -1))
        start = target.from_prior(1, generator(1))
        up = anneal(target, start, path, LEAPFROGS, generator(2))
        start = target.at(posterior[:, None])
        down = anneal(target, start, path.back(), LEAPFROGS, generator(3))
        forward &= is_unbiased((up.log_weights - exact).exp(), torch.ones(1))
        backward &= is_unbiased((exact - down.log_weights).exp(), torch.ones(1))
    return forward, backward


class TestWeights:
    def test_their_means_are_exact_in_both_directions(self, deep):
        """8,000 chains of one image by each model; rule of :mod:`references`."""
        assert weights_are_right(deep) == (True, True)

    # What is wrong, and whether the chains from the prior and from the posterior tell. Where the
    # wrong transition has a stationary law of its own, both must.

    def test_a_transition_that_always_accepts_is_caught(self, deep, monkeypatch):
        draw = ais.Noise.draw
        monkeypatch.setattr(
            ais.Noise,
            "draw",
            lambda z, generator: draw(z, generator)._replace(
                log_uniform=torch.full(z.shape[:-1], -torch.inf)
            ),
        )
        assert weights_are_right(deep) == (False, False)

    @pytest.mark.parametrize("kinetic", [-0.5, 0.0])
    def test_a_wrong_kinetic_energy_is_caught(self, kinetic, deep, monkeypatch):
        monkeypatch.setattr(
            ais,
            "_energy",
            lambda state, momentum, temperature: (
                state.z.square().sum(-1) / 2
                + kinetic * momentum.square().sum(-1)
                - temperature * state.log_likelihood
            ),
        )
        assert weights_are_right(deep) == (False, False)

    @pytest.mark.parametrize("shifted", [COARSE[:-2], COARSE[2:]])
    def test_a_transition_at_the_neighbouring_temperature_is_caught(self, shifted, deep):
        assert weights_are_right(deep, coarse()._replace(temperatures=shifted)) == (False, False)

    def test_increments_that_do_not_reach_1_are_caught(self, deep):
        path = coarse()
        short = path._replace(increments=[*path.increments[:-1], 0.3])
        assert weights_are_right(deep, short) == (False, False)

    def test_a_wrong_gradient_costs_acceptance_and_no_exactness(self, deep, monkeypatch):
        at = Target.at

        def steeper(self, z):
            state = at(self, z)
            return state._replace(gradient=1.3 * state.gradient)

        monkeypatch.setattr(Target, "at", steeper)
        assert weights_are_right(deep) == (True, True)


def test_a_trajectory_can_be_run_backwards():
    """From the end with the momentum turned round, a trajectory leads to its start."""
    target = Target(TOY.model, TOY.images)
    state = target.from_prior(4, generator())
    momenta = []
    energy = ais._energy
    noise = ais.Noise(torch.randn(3, 4, 2), torch.full((3, 4), -torch.inf))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ais, "_energy", lambda s, m, b: momenta.append(m) or energy(s, m, b))
        end, _ = transition(target, state, 0.7, torch.tensor(0.3), 6, noise)
        back = ais.Noise(-momenta[0], noise.log_uniform)
        found, _ = transition(target, end, 0.7, torch.tensor(0.3), 6, back)
    torch.testing.assert_close(found.z, state.z)
    torch.testing.assert_close(momenta[2], -noise.momentum)


def test_the_decoder_is_passed_once_a_leapfrog_step(monkeypatch):
    calls = []
    at = Target.at
    monkeypatch.setattr(Target, "at", lambda self, z: calls.append(z) or at(self, z))
    target = Target(TOY.model, TOY.images)
    anneal(target, target.from_prior(2, generator()), coarse(), LEAPFROGS, generator())
    assert len(calls) == 1 + (len(COARSE) - 2) * LEAPFROGS


def test_states_that_are_kept_keep_value_and_gradient():
    target = Target(TOY.model, TOY.images)
    state = target.from_prior(50, generator())
    found, probability = transition(
        target, state, 1.0, torch.tensor(STEP), 3, ais.Noise.draw(state.z, generator(1))
    )
    moved = (found.z != state.z).any(-1)
    assert 0 < moved.double().mean() < 1 and 0 < probability.mean() < 1
    for field, expected in zip(found, target.at(found.z), strict=True):
        torch.testing.assert_close(field, expected)


def test_a_trajectory_that_leaves_the_numbers_is_refused():
    target = Target(TOY.model, TOY.images)
    state = target.from_prior(5, generator())
    noise = ais.Noise.draw(state.z, generator(1))
    found, probability = transition(target, state, 1.0, torch.tensor(1e200), 3, noise)
    assert torch.equal(found.z, state.z) and not probability.any()


def ppca(images=60, seed=0):
    """A model of 12 pixels and D = 5, with images of its own and their posterior draws."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Ppca(5, variance=0.5).build(torch.rand(12), levels=2)
        with torch.no_grad():
            z = torch.randn(images, 5)
            drawn = model.likelihood.draw(model.decoder(z), generator(seed))
    return model, drawn, z


def is_within(errors, tolerance):
    """Whether a mean error ``[n]`` is within the tolerance, 3 standard errors included."""
    mean, error = errors.mean().abs(), errors.std() / len(errors) ** 0.5
    return bool(mean + 3 * error < tolerance)


class TestAgainstPpca:
    """At the cost of 64 chains x 120 temperatures x 3 leapfrog steps: 23,040 passes an image.

    A log weight has a standard deviation of about 1 there. The log of a mean of 64 weights is then
    too low by 1 / 128 = 0.008 nats, and a mean over 60 images has a standard error of (1 / 64 /
    60)^1/2 = 0.016: 0.056 with three of them.
    """

    def estimate(self, **settings):
        model, images, _ = ppca()
        evaluator = Ais(**{"chains": 64, "temperatures": 120, "leapfrog_steps": 3} | settings)
        return evaluator(model, images, generator()) - model.exact_log_likelihood(images).detach()

    @pytest.mark.parametrize("schedule", Schedule)
    def test_within_a_tenth_of_a_nat(self, schedule):
        assert is_within(self.estimate(schedule=schedule), 0.1)

    def test_not_so_with_few_temperatures_and_steps_far_too_large(self, monkeypatch):
        steps = Ais.find_steps
        monkeypatch.setattr(Ais, "find_steps", lambda *arguments: 20 * steps(*arguments))
        errors = self.estimate(temperatures=10)
        assert not is_within(errors, 0.1)
        assert errors.mean() < -0.1  # still a lower bound

    def test_single_precision_does_as_well(self):
        model, images, _ = ppca()
        exact = model.exact_log_likelihood(images).detach()
        evaluator = Ais(64, 120, 3)
        found = evaluator(model.float(), images.float(), generator())
        assert found.dtype == torch.float64 and is_within(found - exact, 0.1)

    def test_the_exact_value_lies_between_the_bounds(self):
        """Means over 60 images with their standard errors; and fewer temperatures, a wider gap."""
        model, images, z = ppca()
        exact = model.exact_log_likelihood(images).detach()
        gaps = []
        for temperatures in (6, 60):
            evaluator = Ais(16, temperatures, 3)
            path = evaluator.path(evaluator.find_steps(model, images, generator(1)))
            lower = evaluator.forward(model, images, path, generator(2)).lower() - exact
            upper = evaluator.backward(model, images, z, path, generator(3)).upper() - exact
            for below in (lower, -upper):
                assert below.mean() < 3 * below.std() / 60**0.5
            gaps.append((upper - lower).mean())
        assert gaps[1] < 0.4 < 1 < gaps[0]


class TestPilot:
    def acceptance(self, seed, **settings):
        model, images, _ = ppca()
        evaluator = Ais(**{"chains": 40, "temperatures": 30, "leapfrog_steps": 5} | settings)
        path = evaluator.path(evaluator.find_steps(model, images, generator(seed)))
        return evaluator.forward(model, images, path, generator(seed + 1)).acceptance.mean()

    @pytest.mark.parametrize("pilot_images", [3, 25])
    def test_other_chains_accept_as_often_as_was_aimed_at(self, pilot_images):
        # 2,400 chains: a standard error below 0.01. What is left are the pilot's scatter and lag.
        assert abs(self.acceptance(3, pilot_images=pilot_images) - 0.65) < 0.06

    def test_each_temperature_has_a_step_of_its_own(self):
        model, images, _ = ppca()
        temperatures = Schedule.linear.temperatures(40)
        steps = pilot(Target(model, images), 8, temperatures, 5, generator())
        assert steps.shape == (39,) and (steps > 0).all()
        # The posterior is narrower than the prior.
        assert steps[-5:].mean() < 0.8 * steps[:5].mean()
        assert len(steps.unique()) > 30

    def test_images_are_spread_over_the_split(self, monkeypatch):
        seen = []
        monkeypatch.setattr(
            ais, "pilot", lambda target, *rest: seen.append(target.images[:, 0].tolist())
        )
        for count in (3, 4, 7, 10, 99):
            Ais(pilot_images=count).find_steps(None, torch.arange(10.0)[:, None], generator())
        everyone = list(range(10))
        assert seen == [[0, 3, 6], [0, 2, 5, 7], [0, 1, 2, 4, 5, 7, 8], everyone, everyone]


class TestSchedule:
    def test_linear(self):
        assert Schedule.linear.temperatures(4) == pytest.approx([0, 0.25, 0.5, 0.75, 1])

    def test_sigmoidal(self):
        found = Schedule.sigmoidal.temperatures(10)
        assert (found[0], found[5], found[-1]) == (0, pytest.approx(0.5), 1)
        below, above = 1 / (1 + math.exp(4)), 1 / (1 + math.exp(-4))
        third = 1 / (1 + math.exp(-4 * (2 * 0.3 - 1)))
        assert found[3] == pytest.approx((third - below) / (above - below))
        assert sorted(found) == found

    def test_a_path_and_its_way_back(self):
        path = Path.of([0.0, 0.25, 0.5, 1.0], torch.tensor([3.0, 2.0]))
        assert path.increments == [0.25, 0.25, 0.5] and path.temperatures == [0.25, 0.5]
        back = path.back()
        assert back.increments == [0.5, 0.25, 0.25] and back.temperatures == [0.5, 0.25]
        assert back.steps.tolist() == [2, 3]


def test_averages_over_chains():
    weights = torch.tensor([[1.0, 3.0, 4.0], [2.0, 2.0, 2.0]])
    found = Annealed(weights.log(), torch.zeros(2))
    torch.testing.assert_close(found.lower().exp(), torch.tensor([8 / 3, 2]))
    torch.testing.assert_close(found.upper().exp(), torch.tensor([3 / (1 + 1 / 3 + 1 / 4), 2]))
    torch.testing.assert_close(found.ess(), torch.tensor([64 / 26, 3]))


SMALL = Ais(chains=3, temperatures=12, leapfrog_steps=2, pilot_images=4, pilot_chains=3)


@pytest.fixture
def in_threes(monkeypatch):
    """Batches of three images, and a short pilot."""
    monkeypatch.setattr(ais, "PILOT_START", 3)
    monkeypatch.setattr(VAE, "rows_at_a_time", lambda self, images: 10)


@pytest.mark.usefixtures("in_threes")
class TestBatches:
    def test_each_has_a_stream_and_all_have_the_pilots_steps(self):
        model, images, _ = ppca(8)
        done = []
        found = SMALL.evaluate(
            model,
            images,
            generator(5),
            lambda count, *_: done.append(count),
            Unfinished(),
        )
        path = SMALL.path(SMALL.find_steps(model, images, stream(5, "pilot")))
        parts = [
            SMALL.forward(model, batch, path, stream(5, f"batch {index}"))
            for index, batch in enumerate(images.split(3))
        ]
        assert torch.equal(found.values, torch.cat([part.lower() for part in parts]))
        assert sum(done) == 8 and [count for count in done if count] == [3, 3, 2]
        ess = torch.cat([part.ess() for part in parts])
        acceptance = torch.cat([part.acceptance for part in parts])
        assert found.details == {
            "settings": {
                **{f: v for f, v in dataclasses.asdict(SMALL).items() if f != "schedule"},
                "schedule": "sigmoidal",
            },
            "acceptance": {"mean": acceptance.mean().item(), "min": acceptance.min().item()},
            "ess": {"mean": ess.mean().item(), "min": ess.min().item()},
        }

    @pytest.mark.parametrize("stop_at", ["pilot", "temperature", 1, 2])
    def test_an_interrupted_one_goes_on_where_it_stopped(self, stop_at, tmp_path, monkeypatch):
        model, images, _ = ppca(8)
        whole = SMALL.evaluate(model, images, generator(5), None, Unfinished())
        batches = []

        def interrupt(count, note="", under_way=0.0):
            batches.append(count) if count else None
            if len(batches) == stop_at or (isinstance(stop_at, str) and note.startswith(stop_at)):
                raise KeyboardInterrupt

        folder = tmp_path / "evaluations"
        with pytest.raises(KeyboardInterrupt):
            SMALL.evaluate(model, images, generator(5), interrupt, Unfinished(folder))
        kept = list(folder.glob("*")) if folder.exists() else []
        finished = 0 if isinstance(stop_at, str) else stop_at
        assert len(kept) == (finished > 0)

        calls = []
        forward, steps = Ais.forward, Ais.find_steps
        monkeypatch.setattr(Ais, "forward", lambda *a: calls.append("batch") or forward(*a))
        monkeypatch.setattr(Ais, "find_steps", lambda *a: calls.append("pilot") or steps(*a))
        unfinished = Unfinished(folder)
        done = []
        found = SMALL.evaluate(
            model, images, generator(5), lambda count, *_: done.append(count), unfinished
        )
        assert torch.equal(found.values, whole.values) and found.details == whole.details
        assert calls == ["pilot"] * (finished == 0) + ["batch"] * (3 - finished)
        assert sum(done) == 8
        (path,) = folder.iterdir()
        assert path.name.startswith("unfinished-ais_3x12x2-") and path.suffix == ".pt"
        unfinished.remove()
        assert not list(folder.iterdir())

    def test_what_another_evaluation_left_is_not_taken_up(self, tmp_path, monkeypatch):
        model, images, _ = ppca(8)
        other, _, _ = ppca(8, seed=1)
        SMALL.evaluate(model, images, generator(5), None, Unfinished(tmp_path))
        calls = []
        steps = Ais.find_steps
        monkeypatch.setattr(Ais, "find_steps", lambda *a: calls.append("pilot") or steps(*a))
        for arguments in (
            (SMALL, model, images, generator(6)),
            (SMALL, model, 1 - images, generator(5)),
            (SMALL, other, images, generator(5)),
            (dataclasses.replace(SMALL, chains=2), model, images, generator(5)),
            (dataclasses.replace(SMALL, schedule=Schedule.linear), model, images, generator(5)),
        ):
            evaluator, *rest = arguments
            calls.clear()
            evaluator.evaluate(*rest, None, Unfinished(tmp_path))
            assert calls == ["pilot"]
        calls.clear()
        SMALL.evaluate(model, images, generator(5), None, Unfinished(tmp_path))
        assert not calls

    def test_a_damaged_file_is_named(self, tmp_path):
        model, images, _ = ppca(8)
        SMALL.evaluate(model, images, generator(5), None, Unfinished(tmp_path))
        (path,) = tmp_path.iterdir()
        path.write_bytes(b"no checkpoint")
        with pytest.raises(RunError, match=rf"{path.name} is damaged.*; delete it"):
            SMALL.evaluate(model, images, generator(5), None, Unfinished(tmp_path))

    def test_a_folder_that_cannot_be_written_to_is_named(self, tmp_path):
        model, images, _ = ppca(8)
        (tmp_path / "file").touch()
        with pytest.raises(RunError, match="evaluation: cannot write .*file/unfinished-ais_3x12x2"):
            SMALL.evaluate(model, images, generator(5), None, Unfinished(tmp_path / "file"))

    def test_a_value_that_is_no_number_is_an_error_that_says_where(self):
        model, images, _ = ppca(8)
        images[4, 0] = math.nan
        with pytest.raises(NonFiniteError, match=r"log-likelihood: image 4 \(1 of 8 in all\)"):
            SMALL(model, images, generator())

    def test_only_the_first_images_on_request(self):
        model, images, _ = ppca(8)
        few = dataclasses.replace(SMALL, num_images=4)(model, images, generator())
        assert torch.equal(few, SMALL(model, images[:4], generator()))


@pytest.mark.parametrize(
    "settings, name",
    [
        ({}, "ais_16x1000x10"),
        ({"temperatures": 10_000}, "ais_paper"),
        ({"temperatures": 10_000, "schedule": Schedule.linear}, "ais_paper_linear"),
        ({"chains": 4, "leapfrog_steps": 5, "schedule": Schedule.linear}, "ais_4x1000x5_linear"),
    ],
)
def test_results_name_the_size(settings, name):
    assert Ais(**settings).name == name
    assert Ais(**settings).num_samples == settings.get("chains", 16)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(chains=0), "chains must be at least 1, got 0"),
        (dict(temperatures=1), "temperatures must be at least 2, got 1"),
        (dict(leapfrog_steps=0), "leapfrog_steps must be at least 1, got 0"),
        (dict(pilot_images=0), "pilot_images must be at least 1, got 0"),
        (dict(pilot_chains=0), "pilot_chains must be at least 1, got 0"),
        (dict(num_images=1), "num_images must be at least 2 or null, got 1"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Ais(**settings)
