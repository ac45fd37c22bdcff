"""The loop: what a run leaves, and that a run taken up again is the run never stopped."""

import copy
import dataclasses
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import hydra
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ucvae import checkpoint, results, training
from ucvae.config import GROUPS, choices, config_dir, train_settings
from ucvae.data.base import ImageData
from ucvae.data.cifar10 import Cifar10
from ucvae.data.digits import Digits
from ucvae.errors import NonFiniteError, RunError
from ucvae.estimators.base import Estimate, Estimator
from ucvae.estimators.elbo import Elbo
from ucvae.evaluation import importance
from ucvae.evaluation.ais import Ais
from ucvae.evaluation.importance import ImportanceSampling
from ucvae.evaluation.split import SplitLogLikelihood
from ucvae.stopping import Stopped, StopRequest

CPU = torch.device("cpu")
# On images of 8 bits: a step takes seconds. Their data sets and networks are tried one by one, too.
LARGE = {f"experiment=paper_{name}" for name in ("fig3", "table1b", "table1b_cifar10")}
CHOICES = [
    pytest.param(choice, marks=[pytest.mark.slow] * (choice in LARGE))
    for group in (*GROUPS, "experiment")
    for choice in (f"{group}={name}" for name in choices(group))
]
# Small enough to be quick, and with a checkpoint in the middle of each epoch.
QUICK = (
    "model.hidden=[16]",
    "model.latent_dim=3",
    "trainer.max_epochs=3",
    "trainer.batch_size=50",
    "trainer.valid_every=2",
    "trainer.valid_samples=5",
    "trainer.log_every=3",
    "trainer.checkpoint_every=4",
    "evaluator.num_samples=20",
)
COUPLED = ("estimator=coupled", "estimator.num_samples=4", "estimator.lag=2")


@pytest.fixture(scope="module")
def settings_of():
    import ucvae.cli._hydra  # noqa: F401  (registers the resolvers)

    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield lambda *overrides: train_settings(hydra.compose("train", list(overrides)))


@pytest.fixture(scope="module")
def digits() -> ImageData:
    data = Digits().load(Path())
    return dataclasses.replace(data, train=data.train[:520])


def start(settings, data, folder, resume=False):
    folder.mkdir(exist_ok=True)
    return training.run(settings, data, CPU, folder, resume)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_shipped_config_takes_a_training_step(choice, settings_of, tmp_path):
    settings = settings_of(choice)
    # Random images of the kind that the data set gives: the step does not depend on the files.
    generator = torch.Generator().manual_seed(0)
    binarization = getattr(settings.dataset, "binarization", "static")
    shape = {Digits: (1, 8, 8), Cifar10: (3, 32, 32)}.get(type(settings.dataset), (1, 28, 28))
    grey = {
        split: torch.randint(256, (20, *shape), generator=generator, dtype=torch.uint8)
        for split in ("train", "valid", "test")
    }
    data = ImageData.from_grey("random", binarization, grey)
    if hasattr(settings.estimator, "max_steps"):
        settings.estimator.max_steps = settings.estimator.burn_in + settings.estimator.lag
    model = settings.model.build(data.train_mean, data.levels)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = settings.optimizer.build(model.parameters())
    images = training.as_input(data.epoch_images(generator), data.levels)
    settings.estimator.begin(model, len(images))
    estimate = settings.estimator(model, images, generator, torch.arange(len(images)))
    estimate.surrogate.backward()
    optimizer.step()
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, value in model.state_dict().items():
        assert value.isfinite().all() and value.equal(before[name]) == (name in fixed), name
    least = dict(chains=2, temperatures=3, leapfrog_steps=1, pilot_images=1, pilot_chains=1)
    for name, value in (
        least if isinstance(settings.evaluator, Ais) else dict(num_samples=10)
    ).items():
        setattr(settings.evaluator, name, value)
    values = settings.evaluator(model, images[:2], generator)
    assert values.isfinite().all()


@pytest.fixture(scope="module")
def finished(settings_of, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    settings = settings_of(*QUICK, *COUPLED)
    return folder, settings, start(settings, digits, folder)


class TestWhatARunLeaves:
    def test_result(self, finished, digits):
        folder, settings, result = finished
        assert json.loads((folder / "result.json").read_text()) == result
        assert result["dataset"] == "digits" and result["binarization"] == "static"
        assert result["split_sha256"] == digits.split_sha256
        assert (result["estimator"], result["seed"], result["epochs"]) == ("coupled", 0, 3)
        assert result["status"] == "finished" and result["config"] == settings.raw
        assert result["test"]["num_samples"] == 20 and result["test"]["num_images"] == 300
        assert result["test"]["evaluator"] == "importance"
        values = np.loadtxt(folder / "test_log_likelihoods.csv", delimiter=",", skiprows=1)
        assert values[:, 0].tolist() == list(range(300))
        assert values[:, 1].mean() == pytest.approx(result["test"]["log_likelihood"], rel=1e-12)
        error = values[:, 1].std(ddof=1) / 300**0.5
        assert error == pytest.approx(result["test"]["standard_error"], rel=1e-12)
        assert result["valid"]["epoch"] in (2, 3)
        assert result["train_images_per_s"] > 0 and result["wall_clock_s"] > 0
        coupling = result["coupling"]
        times = coupling["meeting_time"]
        assert 2 <= times["p50"] <= times["p90"] <= times["p99"] <= times["max"] <= 1000
        assert times["p50"] <= times["mean"] * 2 and coupling["truncated_fraction"] == 0
        # (L = 2) lag steps of two sub-steps with 3 fresh samples, and two starts, at the least.
        assert coupling["decoder_evaluations_per_image"] >= 2 * 2 * 3 + 2

    def test_test_value_is_that_of_the_best_checkpoint(self, finished, digits):
        folder, settings, result = finished
        state = checkpoint.load(folder / "checkpoints" / "best.pt")
        assert state["epoch"] == result["valid"]["epoch"] and "optimizer" not in state
        model = settings.model.build(digits.train_mean, 2)
        model.load_state_dict(state["model"])
        images = training.as_input(digits.test, 2)
        values = settings.evaluator(model, images, training.stream(0, "test", CPU))
        assert result["test"]["log_likelihood"] == values.mean().item()
        assert result["test"]["standard_error"] == pytest.approx(
            values.std().item() / math.sqrt(300)
        )

    @pytest.mark.parametrize("refinements", [0, 3])
    def test_validation_is_by_proposals_refined_as_often_as_asked(
        self, refinements, settings_of, digits, tmp_path
    ):
        settings = settings_of(*QUICK, *COUPLED, f"trainer.valid_refinements={refinements}")
        result = start(settings, digits, tmp_path)
        model = settings.model.build(digits.train_mean, 2)
        model.load_state_dict(checkpoint.load(tmp_path / "checkpoints" / "best.pt")["model"])
        images = training.as_input(digits.valid, 2)
        noise = training.stream(0, "validation", CPU)
        values = ImportanceSampling(num_samples=5, refinements=refinements)(model, images, noise)
        assert result["valid"]["log_likelihood"] == values.mean().item()
        # And the number matters: the other one has another value.
        other = ImportanceSampling(num_samples=5, refinements=3 - refinements)
        values = other(model, images, training.stream(0, "validation", CPU))
        assert result["valid"]["log_likelihood"] != values.mean().item()

    def test_metrics_and_events(self, finished):
        folder, _, result = finished
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        # Every three steps, and after each epoch of eleven.
        logged = [line["step"] for line in lines if "train/iwae_bound" in line]
        assert logged == sorted({*range(3, 34, 3), 11, 22, 33})
        assert [line["epoch"] for line in lines if "valid/log_likelihood" in line] == [2, 3]
        assert lines[-1]["test/log_likelihood"] == result["test"]["log_likelihood"]
        events = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
        scalars = set(events.Tags()["scalars"])
        assert scalars >= {
            "train/iwae_bound",
            "train/gradient_norm_decoder",
            "train/gradient_norm_encoder",
            "valid/log_likelihood",
            "test/log_likelihood",
            "coupling/meeting_time_p99",
            "coupling/truncated_fraction",
            "coupling/decoder_evaluations",
            "coupling/correction_norm",
            "proposal/ess",
            "proposal/mismatch",
            "proposal/refinements",
            "latent/active_units",
            "time/images_per_s",
            "time/train_seconds",
        }
        noise = {tag.partition("/")[2] for tag in scalars if tag.startswith("gradient_noise/")}
        assert noise == {"0.weight", "0.bias", "2.weight", "2.bias"}
        # Batches of 50 of unlike images: neither noise alone (1, or 2 at the most) nor none of it.
        shares = [events.Scalars(f"gradient_noise/{name}")[0].value for name in noise]
        assert 0.01 < min(shares) and max(shares) < 2
        # The estimator climbs no bound, so none is logged as its objective.
        assert "train/objective" not in scalars
        assert set(events.Tags()["images"]) == {"samples", "reconstructions"}
        histogram = events.Histograms("coupling/meeting_time")
        assert [event.histogram_value.num for event in histogram] == [520] * 3
        for line in lines:
            for tag in set(line) - {"step", "epoch"}:
                values = {event.step: event.value for event in events.Scalars(tag)}
                assert values[line["step"]] == pytest.approx(line[tag])

    def test_hyperparameters_tab(self, finished):
        folder, _, result = finished
        events = EventAccumulator(str(folder)).Reload()
        content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        assert b"estimator.lag" in content
        assert events.Scalars("test/log_likelihood")[0].value == pytest.approx(
            result["test"]["log_likelihood"]
        )


class TestStep:
    """One step with an estimator whose every number is known."""

    @pytest.fixture
    def one_step(self, settings_of, digits, tmp_path):
        def of(surrogate, objective):
            class Known(Estimator):
                def __call__(self, model, images, generator, index=None):
                    return Estimate(surrogate(model), objective, {"x/y": torch.tensor(3.0)})

            plain = SimpleNamespace(build=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
            settings = settings_of(*QUICK)
            settings = dataclasses.replace(settings, estimator=Known(), optimizer=plain)
            loop = training.Training(settings, digits, CPU, tmp_path, StopRequest())
            before = [p.clone() for p in loop.model.parameters()]
            loop._train_step(torch.zeros(2, 64), torch.arange(2))
            return loop, before

        return of

    def test_takes_the_gradient_as_it_is(self, one_step):
        # 10^6 in each coordinate: no clipping, neither by norm nor by value (trap 6).
        loop, before = one_step(lambda model: 1e6 * sum(p.sum() for p in model.parameters()), None)
        for parameter, old in zip(loop.model.parameters(), before, strict=True):
            assert torch.equal(parameter, old - 1e6)
        size = sum(p.numel() for p in loop.model.decoder.parameters())
        norm = loop.means.check(1)["train/gradient_norm_decoder"]
        assert norm == pytest.approx(1e6 * size**0.5)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("part", ["decoder", "encoder"])
    def test_with_a_gradient_that_is_not_finite_ends_the_run(self, one_step, part, value):
        # In one coordinate, where the surrogate itself is finite.
        def surrogate(model):
            last = list(getattr(model, part).parameters())[-1]
            last.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), value))
            return sum(p.sum() for p in model.parameters())

        loop, _ = one_step(surrogate, None)
        assert not all(p.isfinite().all() for p in loop.model.parameters())  # no step is skipped
        with pytest.raises(NonFiniteError, match=f"train/gradient_norm_{part} became"):
            loop.save_last()

    def test_logs_the_objective_and_not_the_surrogate(self, one_step):
        loop, _ = one_step(
            lambda model: 1e6 * sum(p.sum() for p in model.parameters()), torch.tensor(7.0)
        )
        logged = loop.means.check(1)
        norms = {"train/gradient_norm_decoder", "train/gradient_norm_encoder"}
        assert {name: logged[name] for name in logged if name not in norms} == {
            "train/objective": 7.0,
            "x/y": 3.0,
        }

    def test_logs_no_objective_where_there_is_none(self, one_step):
        loop, _ = one_step(lambda model: sum(p.sum() for p in model.parameters()), None)
        assert "train/objective" not in loop.means.check(1)


def test_truncated_images_are_told_wherever_a_result_is(settings_of, digits, tmp_path, caplog):
    """With a cap right behind the lag some pairs have not met: that is never silent (trap 4)."""
    caplog.set_level("INFO")
    cap = ("estimator.max_steps=3", "estimator.survival=0")
    settings = settings_of(*QUICK, *COUPLED, *cap, "trainer.max_epochs=1")
    result = start(settings, digits, tmp_path)
    fraction = result["coupling"]["truncated_fraction"]
    assert 0 < fraction < 1 and fraction * 520 == pytest.approx(round(fraction * 520))
    assert json.loads((tmp_path / "result.json").read_text())["coupling"] == result["coupling"]
    assert f"truncated {100 * fraction:.2g}%" in caplog.text
    # Four lines, of 3, 3, 3 and 2 batches, the last of 20 images.
    logged = [line["coupling/truncated_fraction"] for line in metrics(tmp_path)[:4]]
    assert sum(logged[:3]) * 150 + logged[3] * 70 == pytest.approx(fraction * 520)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("coupling/truncated_fraction")
    assert [event.value for event in events] == pytest.approx(logged)


def test_the_global_generator_has_no_part_in_a_run(settings_of, digits, tmp_path):
    settings, found = settings_of(*QUICK, *COUPLED, "trainer.max_epochs=1"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(start(settings, digits, tmp_path / str(seed))["test"])
        assert torch.equal(before, torch.get_rng_state())
    assert found[0] == found[1]


def test_the_estimator_is_told_which_images_it_gets(settings_of, digits, tmp_path):
    # What is remembered of an image must be found again by the same image, in each epoch's order.
    seen = []

    class Watching(Elbo):
        def __call__(self, model, images, generator, index=None):
            seen.append((images, index))
            return super().__call__(model, images, generator, index)

        def begin(self, model, num_images):
            seen.append(num_images)

    settings = dataclasses.replace(settings_of(*QUICK), estimator=Watching())
    start(settings, digits, tmp_path)
    num_images, *batches = seen
    assert num_images == len(digits.train)
    for images, index in batches:
        expected = training.as_input(digits.train[index], digits.levels)
        assert torch.equal(images, expected)
    everyone = torch.cat([index for _, index in batches]).view(3, -1)
    assert torch.equal(everyone.sort().values, torch.arange(len(digits.train)).expand(3, -1))
    assert not torch.equal(everyone[0], everyone[1])


def test_bound_climbed_is_logged_as_objective(settings_of, digits, tmp_path):
    start(settings_of(*QUICK, "estimator=iwae", "trainer.max_epochs=1"), digits, tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["train/objective"] < 0 and "coupling/truncated_fraction" not in line


def test_training_improves_the_log_likelihood(settings_of, digits, tmp_path):
    """40 epochs of IWAE gain over one nat on digits; an untrained model knows the mean image only.

    The standard error of the difference is below that of one value, 0.2 nats, on the same images.
    """
    settings = settings_of("estimator=iwae", "trainer.max_epochs=40", "evaluator.num_samples=200")
    result = start(settings, digits, tmp_path)
    untrained = settings.model.build(digits.train_mean, 2)
    values = settings.evaluator(
        untrained, training.as_input(digits.test, 2), torch.Generator().manual_seed(0)
    )
    assert result["test"]["log_likelihood"] > values.mean().item() + 1


@pytest.fixture(scope="module", params=["warm", "coupled", "remembered", "dynamic", "following"])
def setup(request, settings_of, digits):
    """Coupled runs on static images; IWAE with Adam, and SNIS, on images drawn for each epoch."""
    if request.param == "warm":
        warm = "trainer.switch.epochs=1", "trainer.switch.optimizer=fresh"
        return settings_of(*QUICK, *COUPLED, *warm, "optimizer.schedule=burda"), digits
    if request.param == "coupled":
        adapted = "estimator.kernel=isir_disir", "estimator.proposals=encoder"
        return settings_of(*QUICK, *COUPLED, *adapted), digits
    if request.param == "remembered":
        return settings_of(*QUICK, *COUPLED), digits
    grey = {split: getattr(digits, split) * 200 for split in ("train", "valid", "test")}
    data = ImageData.from_grey("grey_digits", "dynamic", grey)
    if request.param == "following":
        changing = "estimator.refine_known=true", "estimator.follow_encoder=true"
        return settings_of(*QUICK, "estimator=snis", *changing), data
    return settings_of(*QUICK, "estimator=iwae", "optimizer=adam"), data


@pytest.fixture(scope="module")
def unstopped(setup, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unstopped")
    return folder, start(*setup, folder)


class TestResume:
    @pytest.mark.parametrize("stop_after", [1, 6, 11, 20, 25])
    def test_killed_run_ends_bit_equal(self, setup, unstopped, stop_after, tmp_path, monkeypatch):
        """Steps 0, 4, ... and epochs' ends (11, 22) have checkpoints; the rest is replayed."""
        self.kill(setup, tmp_path, stop_after, monkeypatch)
        saved = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["step"]
        assert saved == max(at for at in (0, 4, 8, 11, 12, 16, 20, 22, 24) if at <= stop_after)
        self.assert_equal(unstopped, tmp_path, start(*setup, tmp_path, resume=True))

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal_saves_at_once(self, setup, unstopped, number, tmp_path, monkeypatch):
        step = training.Training._train_step

        def signalled(self, *batch):
            step(self, *batch)
            if self.step == 6:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(training.Training, "_train_step", signalled)
        with pytest.raises(Stopped) as stopped:
            start(*setup, tmp_path)
        assert stopped.value.signal == number
        monkeypatch.undo()
        assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["step"] == 6
        self.assert_equal(unstopped, tmp_path, start(*setup, tmp_path, resume=True))

    def test_stopped_while_testing(self, setup, unstopped, tmp_path, monkeypatch):
        def interrupted(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(training, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(*setup, tmp_path)
        monkeypatch.undo()
        self.assert_equal(unstopped, tmp_path, start(*setup, tmp_path, resume=True))

    @pytest.mark.parametrize("number", [1, 2])
    def test_stopped_in_a_validation(self, setup, unstopped, number, tmp_path, monkeypatch):
        """The run that goes on makes it anew; the epoch before it is saved."""
        calls, log_likelihood = [], importance.log_likelihood

        def signalled(*arguments, **settings):
            calls.append(settings)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return log_likelihood(*arguments, **settings)

        monkeypatch.setattr(importance, "log_likelihood", signalled)
        with pytest.raises(Stopped):
            start(*setup, tmp_path)
        monkeypatch.undo()
        assert len(calls) == number
        validated = sum("valid/log_likelihood" in line for line in metrics(tmp_path))
        assert validated == number - 1
        state = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
        assert state["validation_due"] and state["batch"] == 0 and state["step"] in (11, 22, 33)
        self.assert_equal(unstopped, tmp_path, start(*setup, tmp_path, resume=True))

    def test_a_damaged_state_does_not_take_the_place_of_a_whole_one(
        self, setup, unstopped, tmp_path, monkeypatch
    ):
        save, after = checkpoint.save, []
        self.kill(setup, tmp_path, 9, monkeypatch)
        last, previous = checkpoint.last(tmp_path), checkpoint.previous(tmp_path)
        last.write_bytes(last.read_bytes()[:-100])
        whole = previous.read_bytes()

        def saved(path, *arguments):
            save(path, *arguments)
            if path == last:
                after.append(previous.read_bytes() == whole)

        monkeypatch.setattr(checkpoint, "save", saved)
        result = start(*setup, tmp_path, resume=True)
        assert after[:2] == [True, False] and not any(after[1:])
        self.assert_equal(unstopped, tmp_path, result)

    def test_all_the_places_that_a_run_was_made_in_are_told(self, setup, tmp_path, monkeypatch):
        settings, data = setup
        places = [{"git_revision": name, "device": {"threads": 1}} for name in "aab"]
        for epochs, place in enumerate(places, start=1):
            monkeypatch.setattr(results, "environment", lambda *_, place=place: place)
            trainer = dataclasses.replace(settings.trainer, max_epochs=epochs + 1)
            again = dataclasses.replace(settings, trainer=trainer)
            result = start(again, data, tmp_path, resume=epochs > 1)
            told = [session["git_revision"] for session in result["sessions"]]
            assert result["git_revision"] == place["git_revision"] == told[-1]
            assert told == (["a"] if epochs < 3 else ["a", "b"])

    @staticmethod
    def kill(setup, folder, after, monkeypatch):
        """Start a run that dies after so many steps."""

        class Killed(BaseException):
            pass

        step = training.Training._train_step

        def killed(self, *batch):
            if self.step == after:
                raise Killed
            step(self, *batch)

        monkeypatch.setattr(training.Training, "_train_step", killed)
        with pytest.raises(Killed):
            start(*setup, folder)
        monkeypatch.undo()

    @staticmethod
    def assert_equal(unstopped, folder, result):
        other_folder, other = unstopped
        timed = ("wall_clock_s", "train_s", "train_images_per_s")
        for key in result:
            if key not in timed:
                assert result[key] == other[key], key
        for name in ("last.pt", "best.pt"):
            ours, theirs = (
                checkpoint.load(path / "checkpoints" / name) for path in (folder, other_folder)
            )
            if name == "last.pt":  # the last validation comes with it
                seconds = seconds_of_training(folder)
                assert seconds == sorted(seconds) and seconds[-1] == ours["train_seconds"]
            for key in ("train_seconds", "wall_seconds"):
                ours.pop(key, None), theirs.pop(key, None)
            assert_same(ours, theirs, name)
        assert metrics(folder) == metrics(other_folder)


def assert_same(one, two, where):
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    else:
        assert one == two, where


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if not key.startswith("time/")} for line in lines]


def seconds_of_training(folder):
    """As each validation has recorded them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["time/train_seconds"] for line in lines if "valid/log_likelihood" in line]


@pytest.fixture(scope="module")
def short_run(settings_of, digits, tmp_path_factory):
    """A finished run of one epoch, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("short")
    settings = settings_of(*QUICK, "estimator=coupled", "trainer.max_epochs=1")
    start(settings, digits, folder)
    return settings, folder


def damaged(run, folder, name, change):
    settings, original = run
    shutil.copytree(original, folder, dirs_exist_ok=True)
    path = folder / "checkpoints" / name
    state = checkpoint.load(path)
    change(state)
    checkpoint.save(path, state)
    return settings


def test_resume_on_a_device_of_another_kind(short_run, settings_of, digits, tmp_path, caplog):
    """A CPU cannot go on with a GPU's random numbers, of which a checkpoint has 16 bytes."""

    def change(state):
        state["noise"] = torch.zeros(16, dtype=torch.uint8)

    damaged(short_run, tmp_path, "last.pt", change)
    longer = settings_of(*QUICK, "trainer.max_epochs=4")
    result = start(longer, digits, tmp_path, resume=True)
    assert result["epochs"] == 4
    (warning,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert "on a device of another kind" in warning
    noise = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["noise"]  # a CPU's again
    assert len(noise) == len(torch.Generator().get_state()) == training.STATE_SIZES["cpu"]


def test_the_result_has_the_validation_of_the_model_it_tests(
    short_run, settings_of, digits, tmp_path
):
    """Killed between best.pt and last.pt, a run goes on with a record before that of best.pt."""

    def change(state):
        state["best"] = {**state["best"], "log_likelihood": 0.0, "epoch": 0}

    damaged(short_run, tmp_path, "last.pt", change)
    best = checkpoint.load(tmp_path / "checkpoints" / "best.pt")
    result = start(settings_of(*QUICK, "trainer.max_epochs=4"), digits, tmp_path, resume=True)
    assert result["valid"] == best["valid"] and best["valid"]["epoch"] == best["epoch"]


@pytest.mark.parametrize("name", ["model", "optimizer", "noise", "best", "means", "split_sha256"])
@pytest.mark.parametrize("content", [None, 5, {}])
def test_resume_from_a_checkpoint_with_a_damaged_entry(name, content, short_run, digits, tmp_path):
    def change(state):
        state[name] = content
        if content is None:
            del state[name]

    settings = damaged(short_run, tmp_path, "last.pt", change)
    with pytest.raises(RunError) as error:
        start(settings, digits, tmp_path, resume=True)
    assert len(str(error.value).splitlines()) == 1


def test_resume_without_its_best_checkpoint_is_refused_at_once(
    short_run, digits, tmp_path, monkeypatch
):
    settings, original = short_run
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "best.pt").unlink()
    monkeypatch.setattr(training.Training, "train", lambda self: pytest.fail("it trained"))
    with pytest.raises(RunError, match=r"no file .*best\.pt"):
        start(settings, digits, tmp_path, resume=True)


@pytest.mark.parametrize("line", ["garbage", '{"a": 1}', "5"])
def test_resume_with_damaged_metrics(line, short_run, digits, tmp_path):
    settings, original = short_run
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged in line 1"):
        start(settings, digits, tmp_path, resume=True)


def test_finished_run_is_tested_again_with_the_same_result(short_run, digits, tmp_path):
    settings, original = short_run
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    before = json.loads((tmp_path / "result.json").read_text())
    assert start(settings, digits, tmp_path, resume=True)["test"] == before["test"]
    assert metrics(tmp_path) == metrics(original)


def test_another_seed_is_another_run(settings_of, digits, tmp_path):
    results_ = [
        start(settings_of(*QUICK, "estimator=elbo", f"seed={seed}"), digits, tmp_path / str(seed))
        for seed in (0, 1)
    ]
    assert results_[0]["test"]["log_likelihood"] != results_[1]["test"]["log_likelihood"]


def test_resume_on_other_data_is_refused(settings_of, digits, tmp_path):
    settings = settings_of(*QUICK, "estimator=elbo")
    start(settings, digits, tmp_path)
    other = dataclasses.replace(digits, split_sha256=digits.split_sha256 | {"train": "0"})
    with pytest.raises(RunError, match="data differ"):
        start(settings, other, tmp_path, resume=True)


def test_early_stopping(settings_of, digits, tmp_path):
    settings = settings_of(
        *QUICK, "estimator=elbo", "trainer.valid_every=1", "trainer.patience=2", "optimizer.lr=1.0"
    )
    settings.trainer.max_epochs = 50
    result = start(settings, digits, tmp_path)
    assert result["status"] == "early_stopped"
    assert result["epochs"] == result["valid"]["epoch"] + 2 < 50


class TestWarmStart:
    WARM = ("trainer.switch.epochs=2", "trainer.switch.num_samples=5")

    def test_it_is_a_run_of_iwae_until_the_switch(self, settings_of, digits, tmp_path):
        warm = settings_of(*QUICK, *COUPLED, *self.WARM)
        found = self.at_epoch(2, warm, digits, tmp_path / "warm")
        for count, same in ((5, True), (6, False)):
            settings = settings_of(*QUICK, "estimator=iwae", f"estimator.num_samples={count}")
            other = self.at_epoch(2, settings, digits, tmp_path / str(count))
            assert all(found[name].equal(other[name]) for name in found) == same

    @staticmethod
    def at_epoch(epoch, settings, data, folder):
        """The weights as they are validated after an epoch."""
        found, validate = {}, training.Training._validate

        def look(self, bar):
            if self.epoch == epoch:
                found.update((k, v.clone()) for k, v in self.model.state_dict().items())
            validate(self, bar)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.Training, "_validate", look)
            start(settings, data, folder)
        return found

    @pytest.mark.parametrize(("state", "steps"), [("kept", 33), ("fresh", 11)])
    def test_then_it_is_coupled(self, state, steps, settings_of, digits, tmp_path):
        kind = f"trainer.switch.optimizer={state}"
        every = "trainer.valid_every=3"  # and yet there is one at the switch
        result = start(settings_of(*QUICK, *COUPLED, *self.WARM, kind, every), digits, tmp_path)
        lines = metrics(tmp_path)
        assert {line["epoch"] for line in lines if "train/objective" in line} == {0, 1}
        assert {line["epoch"] for line in lines if "coupling/particles" in line} == {2}
        assert [line["epoch"] for line in lines if "valid/log_likelihood" in line] == [2, 3]
        assert result["coupling"]["meeting_time"]["p50"] >= 2
        # Of the optimizer: 11 steps an epoch.
        last = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
        assert {int(of["step"]) for of in last["optimizer"]["state"].values()} == {steps}

    def test_patience_begins_anew_at_the_switch(self, settings_of, digits, tmp_path, monkeypatch):
        settings = settings_of(
            *QUICK, *COUPLED, "trainer.max_epochs=8", "trainer.switch.epochs=5",
            "trainer.valid_every=1", "trainer.patience=2",
        )  # fmt: skip
        falling = iter(range(0, -100, -1))  # no validation after the first is a new best
        monkeypatch.setattr(
            training.importance,
            "log_likelihood",
            lambda model, images, *rest, **named: torch.full((len(images),), float(next(falling))),
        )
        nothing = SplitLogLikelihood(torch.zeros(2), {"log_likelihood": 0.0})
        monkeypatch.setattr(training, "evaluate", lambda *arguments: nothing)
        monkeypatch.setattr(results, "summary", lambda *arguments: "")
        result = start(settings, digits, tmp_path)
        assert (result["status"], result["epochs"]) == ("early_stopped", 7)


class TestStartFrom:
    SHORT = (*QUICK, "trainer.max_epochs=1", "trainer.valid_every=1")

    @pytest.fixture
    def before(self, settings_of, digits, tmp_path):
        """A run of IWAE, that another can start from."""
        start(settings_of(*QUICK, "estimator=iwae"), digits, tmp_path / "before")
        return tmp_path / "before"

    @staticmethod
    def first_state(settings, data, folder):
        """What the first checkpoint holds, written before any step."""
        states = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "save", lambda path, state, *rest: states.append(state))
            patch.setattr(training.Training, "_done", lambda self: True)
            patch.setattr(training.Training, "finish", lambda self: {})
            start(settings, data, folder)
        return copy.deepcopy(states[0])

    def test_a_run_begins_with_the_model_and_the_averages(
        self, before, settings_of, digits, tmp_path
    ):
        last = checkpoint.load(before / "checkpoints" / "last.pt")
        named = f"start_from={before}"
        settings = settings_of(*self.SHORT, *COUPLED, named, "optimizer.lr=1e-4", "seed=1")
        first = self.first_state(settings, digits, tmp_path / "a")
        for name, value in last["model"].items():
            assert first["model"][name].equal(value), name
        averages = first["optimizer"]["state"]
        for index, saved in last["optimizer"]["state"].items():
            assert all(averages[index][name].equal(saved[name]) for name in saved)
        assert [group["lr"] for group in first["optimizer"]["param_groups"]] == [1e-4]
        assert (first["epoch"], first["step"], first["train_seconds"]) == (0, 0, 0)

        other = self.first_state(settings_of(*self.SHORT, *COUPLED), digits, tmp_path / "b")
        assert not all(other["model"][name].equal(value) for name, value in last["model"].items())

    @pytest.mark.parametrize(
        ("given", "of", "file"),
        [
            ("optimizer=adam", "", "checkpoints/last.pt"),
            ("optimizer=rmsprop", "checkpoints/best.pt", "checkpoints/best.pt"),
        ],
        ids=["another optimizer", "the best checkpoint"],
    )
    def test_without_averages_they_begin_anew(
        self, given, of, file, before, settings_of, digits, tmp_path
    ):
        settings = settings_of(*self.SHORT, *COUPLED, given, f"start_from={before / of}")
        first = self.first_state(settings, digits, tmp_path / "a")
        assert first["optimizer"]["state"] == {}
        wanted = checkpoint.load(before / file)["model"]
        assert all(first["model"][name].equal(value) for name, value in wanted.items())
        result = start(settings, digits, tmp_path / "b")
        assert result["start"]["averages"] == "fresh" and result["epochs"] == 1

    def test_remembered_proposals_are_kept(self, settings_of, digits, tmp_path, caplog):
        caplog.set_level("INFO")
        quick = settings_of(*QUICK, "estimator=snis")
        start(quick, digits, tmp_path / "before")
        last = checkpoint.load(tmp_path / "before" / "checkpoints" / "last.pt")
        memory = last["estimator"]["memory"]
        assert memory["known"].float().mean() > 0.5  # the others have fallen behind the encoder
        for name, of, wanted in (
            ("coupled", "", "kept"),
            ("snis", "", "kept"),
            ("coupled estimator.proposals=encoder", "", "fresh"),
            ("snis estimator.follow_encoder=true", "", "fresh"),
            ("iwae", "", "fresh"),
            ("coupled", "checkpoints/best.pt", "fresh"),
        ):
            caplog.clear()
            given = f"start_from={tmp_path / 'before' / of}"
            settings = settings_of(*self.SHORT, *f"estimator={name}".split(), given)
            first = self.first_state(settings, digits, tmp_path / "after")
            assert first["start"]["proposals"] == wanted
            assert ("and the remembered proposals are kept" in caplog.text) == (wanted == "kept")
            follows = "follow_encoder" in name
            assert ("the remembered proposals begin anew: those of" in caplog.text) == follows
            own = first["estimator"].get("memory")
            if wanted == "kept":
                assert all(own[key].equal(value) for key, value in memory.items())
            else:
                assert own is None or not own["known"].any()

    @pytest.mark.parametrize("follow", ["false", "true"])
    def test_of_a_run_that_ended_before_its_switch_there_are_none(
        self, follow, settings_of, digits, tmp_path, caplog
    ):
        ended = ("estimator=snis", "trainer.switch.epochs=2", "trainer.max_seconds=1e-9")
        start(settings_of(*QUICK, *ended), digits, tmp_path / "before")
        now = ("estimator=snis", f"estimator.follow_encoder={follow}")
        settings = settings_of(*self.SHORT, *now, f"start_from={tmp_path / 'before'}")
        assert self.first_state(settings, digits, tmp_path / "a")["start"]["proposals"] == "fresh"
        assert "begin anew" not in caplog.text

    def test_proposals_of_other_images_are_not_kept(self, settings_of, digits, tmp_path):
        start(settings_of(*QUICK, "estimator=snis"), digits, tmp_path / "before")
        named = f"start_from={tmp_path / 'before'}"
        hashes = digits.split_sha256 | {"train": "0"}
        others = dataclasses.replace(digits, train=digits.train.flip(0), split_sha256=hashes)
        first = self.first_state(
            settings_of(*self.SHORT, "estimator=snis", named), others, tmp_path / "after"
        )
        assert first["start"]["proposals"] == "fresh"
        assert not first["estimator"]["memory"]["known"].any()

    def test_the_start_may_be_the_best(self, before, settings_of, digits, tmp_path, caplog):
        caplog.set_level("INFO")
        spoilt = ("estimator=elbo", f"start_from={before}", "optimizer.lr=1")
        result = start(settings_of(*self.SHORT, *spoilt), digits, tmp_path / "a")
        assert result["valid"]["epoch"] == 0
        best = checkpoint.load(tmp_path / "a" / "checkpoints" / "best.pt")["model"]
        last = checkpoint.load(before / "checkpoints" / "last.pt")["model"]
        assert all(best[name].equal(value) for name, value in last.items())
        lines = metrics(tmp_path / "a")
        assert [line["epoch"] for line in lines if "valid/log_likelihood" in line] == [0, 1]
        # Before any training there is no pace to tell.
        assert re.search(r"epoch 0/1: validation .* units active$", caplog.text, re.MULTILINE)
        assert re.search(r"epoch 1/1: .* units active, [\d,]+ images/s$", caplog.text, re.MULTILINE)

    @pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"short"), os.unlink])
    def test_of_a_damaged_state_the_one_before_it_is_taken(
        self, damage, before, settings_of, digits, tmp_path, caplog
    ):
        damage(before / "checkpoints" / "last.pt")
        settings = settings_of(*self.SHORT, "estimator=elbo", f"start_from={before}")
        result = start(settings, digits, tmp_path / "a")
        assert result["start"]["checkpoint"].endswith("last.previous.pt")
        assert "starting from last.previous.pt, the one before it" in caplog.text

    def test_a_start_before_a_warm_start(self, before, settings_of, digits, tmp_path):
        warm = ("trainer.max_epochs=2", "trainer.switch.epochs=1", f"start_from={before}")
        result = start(settings_of(*self.SHORT, *COUPLED, *warm), digits, tmp_path / "a")
        assert result["start"]["epochs"] == 3 and result["coupling"]["meeting_time"]["p50"] >= 2

    def test_the_result_tells_the_start_also_of_a_start(
        self, before, settings_of, digits, tmp_path
    ):
        one = settings_of(*self.SHORT, "estimator=elbo", f"start_from={before}")
        result = start(one, digits, tmp_path / "one")
        assert result["start"]["checkpoint"] == str(before / "checkpoints" / "last.pt")
        assert result["start"]["epochs"] == 3 and result["start"]["start"] is None
        assert result["start"]["config"]["estimator"]["num_samples"] == 10
        two = settings_of(*self.SHORT, *COUPLED, f"start_from={tmp_path / 'one'}")
        result = start(two, digits, tmp_path / "two")
        assert result["start"]["start"]["epochs"] == 3 and result["epochs"] == 1
        assert json.loads((tmp_path / "two" / "result.json").read_text())["start"]
        without = start(settings_of(*self.SHORT, "estimator=elbo"), digits, tmp_path / "three")
        assert without["start"] is None

    def test_a_run_taken_up_is_the_run_never_stopped(self, before, settings_of, digits, tmp_path):
        settings = settings_of(*self.SHORT, *COUPLED, f"start_from={before}")
        whole = start(settings, digits, tmp_path / "whole")
        step = training.Training._train_step

        def killed(self, *batch):
            step(self, *batch)
            if self.step == 6:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(training.Training, "_train_step", killed)
            start(settings, digits, tmp_path / "parts")
        shutil.rmtree(before)  # it is wanted no more
        parts = start(settings, digits, tmp_path / "parts", resume=True)
        assert parts["test"] == whole["test"] and parts["start"] == whole["start"]

    def test_the_start_is_validated_once(self, before, settings_of, digits, tmp_path):
        class Killed(Exception):
            pass

        def killed(self, bar):
            raise Killed

        settings = settings_of(*self.SHORT, "estimator=elbo", f"start_from={before}")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(training.Training, "_train_epoch", killed)
            start(settings, digits, tmp_path / "a")
        start(settings, digits, tmp_path / "a", resume=True)
        lines = metrics(tmp_path / "a")
        assert [line["epoch"] for line in lines if "valid/log_likelihood" in line] == [0, 1]

    def test_the_start_s_validation_is_no_part_of_the_pace(
        self, before, settings_of, digits, tmp_path
    ):
        calls = []
        settings = settings_of(*self.SHORT, "estimator=elbo", f"start_from={before}")
        with pytest.MonkeyPatch.context() as patch:
            for where, name in (
                (training.Progress, "restart"),
                (training.Training, "_validate"),
                (training.Training, "_train_epoch"),
            ):
                whole = getattr(where, name)

                def called(self, *given, whole=whole, name=name):
                    calls.append(name)
                    return whole(self, *given)

                patch.setattr(where, name, called)
            start(settings, digits, tmp_path / "a")
        begun = calls.index("_train_epoch")
        assert calls[begun - 2 : begun] == ["_validate", "restart"]

    def test_other_images_are_told(self, before, settings_of, digits, tmp_path, caplog):
        settings = settings_of(*self.SHORT, "estimator=elbo", f"start_from={before}")
        start(settings, digits, tmp_path / "same")
        assert "trained on other images" not in caplog.text
        fewer = dataclasses.replace(digits, train=digits.train[:400])
        start(settings, dataclasses.replace(fewer, split_sha256={"train": "0"}), tmp_path / "a")
        assert "last.pt was trained on other images than this run will be" in caplog.text

    def test_a_model_that_does_not_fit_is_refused(self, before, settings_of, digits, tmp_path):
        settings = settings_of(*self.SHORT, f"start_from={before}", "model.latent_dim=4")
        with pytest.raises(RunError, match=r"last\.pt does not fit the run \(size mismatch"):
            start(settings, digits, tmp_path / "a")


class TestLimitOfTime:
    @pytest.fixture
    def clock(self, monkeypatch):
        """A clock on which a step takes a second, a validation 100, and to save 10.

        Whatever else is to take time can be told to it.
        """
        seconds = [0]

        def lasts(duration, place, name):
            work = getattr(place, name)

            def timed(*given, **named):
                seconds[0] += duration
                return work(*given, **named)

            monkeypatch.setattr(place, name, timed)

        lasts(1, training.Training, "_train_step")
        lasts(10, training.Training, "_save")
        lasts(100, training.importance, "log_likelihood")
        monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: float(seconds[0])))
        return lasts

    @pytest.mark.parametrize("seconds", [5, 11, 14])
    def test_it_ends_training_at_that_step(self, seconds, clock, settings_of, digits, tmp_path):
        settings = settings_of(*QUICK, *COUPLED, f"trainer.max_seconds={seconds}")
        result = start(settings, digits, tmp_path)
        assert (result["status"], result["epochs"]) == ("finished", round(seconds / 11, 3))
        assert result["train_s"] == seconds
        assert result["valid"]["epoch"] == metrics(tmp_path)[-2]["epoch"] == result["epochs"]
        assert result["coupling"]["meeting_time"]["p50"] >= 2
        last = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
        assert (last["step"], last["batch"]) == (seconds, seconds % 11)
        assert metrics(tmp_path)[-2]["step"] == seconds  # the last validation; then the test
        assert "valid/log_likelihood" in metrics(tmp_path)[-2]

    def test_the_beginning_of_an_epoch_is_training(self, clock, settings_of, digits, tmp_path):
        clock(3, training.Training, "_begin_epoch")
        result = start(settings_of(*QUICK, *COUPLED, "trainer.max_epochs=2"), digits, tmp_path)
        assert result["train_s"] == 2 * (3 + 11)

    def test_a_switch_that_never_came_is_told(self, clock, settings_of, digits, tmp_path, caplog):
        warm = ("trainer.switch.epochs=2", "trainer.max_seconds=5")
        result = start(settings_of(*QUICK, *COUPLED, *warm), digits, tmp_path)
        assert "all of the training was iwae's: coupled was to begin after 2 epochs" in caplog.text
        assert "after 2 epochs of iwae (tested before the switch)" in results.summary(
            result, tmp_path
        )

    def test_a_run_that_has_passed_its_limit_is_validated(
        self, clock, settings_of, digits, tmp_path, monkeypatch
    ):
        step = training.Training._train_step

        def signalled(self, *batch):
            step(self, *batch)
            os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patched, pytest.raises(Stopped):
            patched.setattr(training.Training, "_train_step", signalled)
            start(settings_of(*QUICK, *COUPLED), digits, tmp_path)
        settings = settings_of(*QUICK, *COUPLED, "trainer.max_seconds=1e-3")
        result = start(settings, digits, tmp_path, resume=True)
        assert result["valid"]["epoch"] == result["epochs"] == round(1 / 11, 3)

    def test_with_more_time_it_goes_on(self, clock, settings_of, digits, tmp_path):
        for seconds in (6, 14):
            settings = settings_of(*QUICK, *COUPLED, f"trainer.max_seconds={seconds}")
            result = start(settings, digits, tmp_path / "cut", resume=seconds > 6)
        whole = start(settings, digits, tmp_path / "whole")
        assert result["train_s"] == whole["train_s"] == 14
        one, two = (
            checkpoint.load(tmp_path / name / "checkpoints" / "last.pt")
            for name in ("cut", "whole")
        )
        assert_same(one["model"], two["model"], "model")
        assert_same(one["estimator"], two["estimator"], "estimator")


@pytest.mark.parametrize(
    ("given", "factors"),
    [
        (("estimator=elbo",), [1, 1, 1, 1, 1]),
        (
            ("estimator=elbo", "trainer.switch.epochs=2", "trainer.switch.lr_factor=0.2"),
            [1, 1, 0.2, 0.2, 0.2],
        ),
        (
            ("estimator=elbo", "trainer.switch.epochs=4", "trainer.switch.lr_factor=3")
            + ("trainer.switch.optimizer=fresh",),
            [1, 1, 1, 1, 3],
        ),
    ],
    ids=["no switch", "smaller from the switch on", "fresh optimizer"],
)
def test_the_learning_rate_follows_schedule_and_switch(
    given, factors, settings_of, digits, tmp_path, monkeypatch
):
    settings = settings_of(
        *QUICK, *given, "optimizer=adam", "optimizer.schedule=burda", "trainer.max_epochs=5"
    )
    rates, step = [], training.Training._train_step

    def look(self, *batch):
        rates.append(self.optimizer.param_groups[0]["lr"])
        step(self, *batch)

    monkeypatch.setattr(training.Training, "_train_step", look)
    start(settings, digits, tmp_path)
    burda = [1e-3] + [1e-3 * 10 ** (-1 / 7)] * 3 + [1e-3 * 10 ** (-2 / 7)]
    expected = [rate * factor for rate, factor in zip(burda, factors, strict=True)]
    assert rates == pytest.approx([rate for rate in expected for _ in range(11)], rel=1e-12)


def test_the_learning_rate_falls_at_milestones_and_at_the_switch(
    settings_of, digits, tmp_path, monkeypatch
):
    settings = settings_of(
        *QUICK,
        *("estimator=elbo", "optimizer.lr=1e-3", "trainer.max_epochs=5"),
        *("optimizer.schedule=steps", "optimizer.milestones=[1,4]", "optimizer.gamma=0.1"),
        *("trainer.switch.epochs=2", "trainer.switch.lr_factor=0.5"),
    )
    rates, begin = [], training.Training._begin_epoch

    def look(self):
        begun = begin(self)
        rates.append(self.optimizer.param_groups[0]["lr"])
        return begun

    monkeypatch.setattr(training.Training, "_begin_epoch", look)
    start(settings, digits, tmp_path)
    assert rates == pytest.approx([1e-3, 1e-4, 0.5e-4, 0.5e-4, 0.5e-5], rel=1e-12)


def test_the_gradients_of_two_estimators_make_no_pair(settings_of, digits, tmp_path, monkeypatch):
    steps = []
    part = training.GradientNoise.part
    monkeypatch.setattr(training.GradientNoise, "part", lambda self: (steps.append(1), part(self)))
    settings = settings_of(*QUICK, "estimator=elbo", "trainer.switch.epochs=1")
    start(settings, digits, tmp_path)
    assert steps == [1]


def test_nan_ends_the_run_and_keeps_the_last_good_checkpoint(
    settings_of, digits, tmp_path, monkeypatch
):
    settings = settings_of(*QUICK, "estimator=iwae")
    step = training.Training._train_step

    def poisoned(self, *batch):
        if self.step == 9:
            with torch.no_grad():
                next(self.model.decoder.parameters()).fill_(math.nan)
        step(self, *batch)

    monkeypatch.setattr(training.Training, "_train_step", poisoned)
    with pytest.raises(NonFiniteError, match=r"became nan between steps 10 and 11"):
        start(settings, digits, tmp_path)
    state = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
    assert state["step"] == 8
    assert all(value.isfinite().all() for value in state["model"].values())


class TestCheckpointFiles:
    def test_code_in_a_checkpoint_is_not_executed(self, tmp_path):
        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        torch.save({"format": checkpoint.FORMAT, "model": Payload()}, tmp_path / "bad.pt")
        with pytest.raises(RunError, match=r"bad\.pt is damaged or no checkpoint"):
            checkpoint.load(tmp_path / "bad.pt")
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("keep", [0, 10, 500])
    def test_cut_short(self, keep, tmp_path):
        path = tmp_path / "a.pt"
        checkpoint.save(path, {"model": {"weight": torch.zeros(1000)}})
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(RunError, match=r"a\.pt"):
            checkpoint.load(path)

    @pytest.mark.parametrize("content", [b"short", b"\x80\x02.", bytes(range(256))])
    def test_not_a_checkpoint(self, content, tmp_path):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(RunError, match=r"a\.pt is damaged or no checkpoint"):
            checkpoint.load(tmp_path / "a.pt")

    def test_other_format(self, tmp_path):
        torch.save({"format": 99}, tmp_path / "a.pt")
        with pytest.raises(RunError, match="format 99, this version reads 1"):
            checkpoint.load(tmp_path / "a.pt")

    def test_failed_write_keeps_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a.pt"
        checkpoint.save(path, {"value": 1})

        def full(state, file):
            file.write(b"part")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(RunError, match="No space left"):
            checkpoint.save(path, {"value": 2})
        assert checkpoint.load(path)["value"] == 1
        assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_result_that_cannot_be_written(tmp_path):
    (tmp_path / "result.json").mkdir()
    with pytest.raises(RunError, match="cannot write"):
        results.write(tmp_path / "result.json", {})


class TestProgress:
    """What is told on the way, where there is no terminal: with no pause, a line at every step."""

    @pytest.fixture
    def lines(self, settings_of, digits, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr("ucvae.progress.FIRST_LINE", 0.0)
        monkeypatch.setattr("ucvae.progress.LINE_INTERVAL", 0.0)
        monkeypatch.setenv("TERM", "dumb")

        def of(*overrides, **options):
            caplog.clear()
            with caplog.at_level("INFO", logger="ucvae"):
                start(settings_of(*QUICK, *overrides), digits, tmp_path / "run", **options)
            messages = (record.getMessage() for record in caplog.records)
            return [text for text in messages if ", step " in text and text.startswith("epoch")]

        return of

    def test_coupled(self, lines):
        found = lines(*COUPLED)
        assert [line.partition(":")[0] for line in found[:2]] == [
            "epoch 1/3, step 1",
            "epoch 1/3, step 2",
        ]
        assert len(found) == 3 * 11
        number = r"-\d+\.\d\d"
        known = rf"[\d,]+ images/s, encoder's iwae bound {number}, meeting time p90 \d+"
        assert re.fullmatch(rf"epoch 1/3, step 9: {known}, \d\d:\d\d left", found[8])
        # The first validation comes after the second epoch; nothing is left at the end.
        assert re.fullmatch(rf"epoch 3/3, step 33: {known}, validation {number}", found[-1])

    def test_elbo_has_an_objective_and_no_meeting_times(self, lines):
        found = lines("estimator=elbo")
        assert re.search(r"images/s, elbo -\d+\.\d\d, \d\d:\d\d left$", found[8])

    def test_warm_start_tells_whose_bound_it_is(self, lines):
        found = lines("estimator=elbo", "trainer.switch.epochs=1", "trainer.log_every=1")
        assert ", iwae -" in found[10] and ", elbo -" in found[11]

    def test_pace_of_a_run_taken_up_is_that_of_now(self, lines, monkeypatch):
        seen = []
        monkeypatch.setattr(training.Training, "_tell", _spied(training.Training._tell, seen))
        lines("estimator=elbo")
        seen.clear()
        lines("estimator=elbo", "trainer.max_epochs=4", resume=True)
        # The three epochs before have no part: the first line is of 150 images, after 1,560.
        assert seen[0] == (1560 + 50 * (36 - 33), 1560)


def _spied(tell, seen):
    def spy(self, *arguments):
        seen.append((self._images(), self.logged_images))
        tell(self, *arguments)

    return spy
