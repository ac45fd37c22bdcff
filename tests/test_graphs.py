"""Steps that are launched as a whole: the same numbers as one operation at a time."""

import dataclasses
import json
from pathlib import Path

import hydra
import pytest
import torch

from ucvae import checkpoint, training
from ucvae.config import choices, config_dir, train_settings
from ucvae.data.base import ImageData
from ucvae.data.digits import Digits
from ucvae.estimators.iwae import Iwae

# 520 images in batches of 50: the last one is smaller. A rate that changes, and a switch.
OVERRIDES = (
    *("estimator=elbo", "trainer.switch.epochs=2", "trainer.switch.num_samples=4"),
    *("trainer.switch.optimizer=fresh", "optimizer=adam", "optimizer.schedule=burda"),
    *("model.hidden=[16]", "model.latent_dim=3", "trainer.max_epochs=5", "trainer.batch_size=50"),
    *("trainer.valid_samples=5", "trainer.log_every=7", "evaluator.num_samples=5"),
)


@pytest.fixture(scope="module")
def settings_of():
    import ucvae.cli._hydra  # noqa: F401  (registers the resolvers)

    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield lambda *overrides: train_settings(hydra.compose("train", list(overrides)))


@pytest.fixture(scope="module")
def digits() -> ImageData:
    data = Digits().load(Path())
    return dataclasses.replace(data, train=data.train[:520])


def numbers(folder):
    """All that a run has logged but for its times, and its last parameters."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [
        {
            name: value
            for name, value in line.items()
            if not name.startswith("time") and name != "wall_time"
        }
        for line in lines
    ]
    return logged, checkpoint.load(folder / "checkpoints" / "last.pt")["model"]


class Overwriting:
    """What a graph does, without a GPU: its results lie where the last call's were.

    A graph keeps the learning rate and the estimator that it was captured with.
    """

    made: list["Overwriting"]

    def __init__(self, function, generator):
        assert isinstance(generator, torch.Generator)
        self.function = function
        self.kept = self.now()
        self.static = {}
        self.made.append(self)

    def now(self):
        run = self.function.__self__
        return run.optimizer, run.optimizer.param_groups[0]["lr"], run._current_estimator()

    def __call__(self, *inputs):
        assert self.now() == self.kept
        names, values, gradients = self.function(*inputs)
        static = self.static.setdefault(len(inputs[0]), [values.clone(), *gradients])
        for old, new in zip(static, [values, *gradients], strict=True):
            old.copy_(new)
        return names, static[0], static[1:]


def test_a_run_of_replayed_steps_is_the_run(settings_of, digits, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    for name in ("eager", "replayed"):
        (tmp_path / name).mkdir()
    training.run(settings_of(*OVERRIDES), digits, cpu, tmp_path / "eager", False)

    monkeypatch.setattr(Overwriting, "made", [], raising=False)
    monkeypatch.setattr(training, "Replayed", Overwriting)
    monkeypatch.setattr(training.Training, "_may_replay", lambda run: not run.looking)
    training.run(settings_of(*OVERRIDES), digits, cpu, tmp_path / "replayed", False)

    # Epochs 0; 1; 2 and 3, after the switch; 4: a rate or an estimator each.
    assert len(Overwriting.made) == 4
    logged, parameters = numbers(tmp_path / "eager")
    again, same = numbers(tmp_path / "replayed")
    assert any(name.startswith("gradient_noise/") for line in logged for name in line)
    assert again == logged
    for name, parameter in parameters.items():
        assert torch.equal(same[name], parameter), name


@pytest.mark.parametrize("name", choices("estimator"))
def test_only_what_learns_nothing_may_be_replayed(name, settings_of):
    estimator = settings_of(f"estimator={name}").estimator
    assert estimator.may_be_replayed() == (name in ("elbo", "iwae"))
    assert not (estimator.may_be_replayed() and estimator.state_dict())


def test_a_subclass_has_to_say_itself_that_its_work_is_the_same():
    class Learning(Iwae):
        pass

    class Same(Iwae):
        same_work = True

    assert Iwae().may_be_replayed() and Same().may_be_replayed()
    assert not Learning().may_be_replayed()


def test_iwae_may_not_where_it_thins():
    assert not Iwae(min_weight=0.1).may_be_replayed()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
@pytest.mark.parametrize("estimator", ["elbo", "iwae"])
def test_graphs_give_the_numbers_of_eager_steps(
    estimator, optimizer, settings_of, digits, tmp_path
):
    cuda, found = torch.device("cuda", 0), []
    for graphs in ("true", "false"):
        folder = tmp_path / graphs
        folder.mkdir()
        overrides = (*OVERRIDES, f"estimator={estimator}", f"optimizer={optimizer}")
        settings = settings_of(*overrides, f"trainer.cuda_graphs={graphs}")
        training.run(settings, digits, cuda, folder, False)
        found.append(numbers(folder))
    (logged, parameters), (expected, eager) = found
    for line, by_itself in zip(logged, expected, strict=True):
        assert line == pytest.approx(by_itself, rel=1e-3, abs=1e-5)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, eager[name])
