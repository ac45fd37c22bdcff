"""A finished run evaluated again: the value, what is written, and data or weights that differ."""

import copy
import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path

import hydra
import pytest
import torch

from ucvae import checkpoint, results, training
from ucvae.cli import eval as eval_command
from ucvae.config import Checkpoint, EvalSettings, config_dir, train_settings
from ucvae.data.base import ImageData, as_input
from ucvae.data.digits import Digits
from ucvae.errors import RunError
from ucvae.evaluation import rerun
from ucvae.evaluation.ais import Ais
from ucvae.evaluation.importance import ImportanceSampling, log_likelihood
from ucvae.evaluation.split import evaluate
from ucvae.models.mlp import Mlp
from ucvae.models.vae import VAE
from ucvae.randomness import stream

CPU = torch.device("cpu")
QUICK = (
    "estimator=iwae",
    "model.hidden=[16]",
    "model.latent_dim=3",
    "trainer.max_epochs=1",
    "trainer.valid_samples=5",
    "evaluator.num_samples=20",
    "device=cpu",
)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return Digits().load(Path())


@pytest.fixture(scope="module")
def trained():
    import ucvae.cli._hydra  # noqa: F401  (registers the resolvers)

    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return train_settings(hydra.compose("train", list(QUICK)))


@pytest.fixture(scope="module")
def finished(trained, digits, tmp_path_factory):
    """A run of one epoch, which has nothing but its best checkpoint left to evaluate."""
    folder = tmp_path_factory.mktemp("run")
    training.run(trained, digits, CPU, folder, resume=False)
    (folder / "checkpoints" / "last.pt").unlink()
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy of the run, to write into or to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def command(monkeypatch, tmp_path):
    """A function that runs ``ucvae-eval`` in ``tmp_path`` and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["ucvae-eval", *arguments])
        return eval_command.main()

    yield run
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers[:], root.level = before


def by_hand(settings, folder, images, num_samples, generator, which="best"):
    """Log-likelihood of uint8 images under the weights in a run's ``best.pt``, or ``last.pt``."""
    weights = torch.load(folder / "checkpoints" / f"{which}.pt", weights_only=True)["model"]
    model = settings.model.build(torch.zeros(64), levels=2)
    model.load_state_dict(weights)
    return log_likelihood(model, images.flatten(1).float(), num_samples, generator)


class TestCommand:
    @pytest.mark.parametrize(
        "split, num_samples, seed",
        [("train", 5, 0), ("valid", 5, 0), ("test", 5, 0), ("test", 40, 0), ("test", 5, 7)],
    )
    def test_result_is_that_of_the_best_checkpoint(
        self, split, num_samples, seed, command, run_folder, trained, digits
    ):
        arguments = (f"split={split}", f"evaluator.num_samples={num_samples}", f"seed={seed}")
        assert command("run=run", *arguments, "device=cpu") == 0
        (folder,) = (run_folder / "evaluations").iterdir()
        result = json.loads((folder / "result.json").read_text())

        generator = stream(seed, f"evaluation of {split}")
        values = by_hand(trained, run_folder, getattr(digits, split), num_samples, generator)
        assert result.pop(split) == {
            "log_likelihood": values.mean().item(),
            "standard_error": pytest.approx(values.std().item() / math.sqrt(len(values))),
            "evaluator": "importance",
            "num_samples": num_samples,
            "num_images": 1197 if split == "train" else 300,
        }
        header, *lines = (folder / f"{split}_log_likelihoods.csv").read_text().splitlines()
        assert header == "image,log_likelihood"
        assert [line.split(",") for line in lines] == [
            [str(i), repr(value)] for i, value in enumerate(values.tolist())
        ]
        config = result.pop("config")
        assert (config["run"], config["split"], config["seed"]) == ("run", split, seed)
        assert config["evaluator"]["num_samples"] == num_samples
        assert result == {
            "run": "run",
            "checkpoint": "best",
            "epoch": 1,
            "dataset": "digits",
            "binarization": "static",
            "split_sha256": digits.split_sha256,
            "differing_splits": [],
            "seed": seed,
            **results.environment(CPU),
        }

    @pytest.mark.parametrize("asked, told", [(300, False), (301, True)])
    def test_more_images_than_there_are_is_told(self, asked, told, command, run_folder, capsys):
        sizes = (f"evaluator.num_images={asked}", "evaluator.num_samples=2", "device=cpu")
        assert command("run=run", *sizes) == 0
        warning = f"evaluator.num_images={asked}: all 300 images of the test split are evaluated"
        assert (warning in capsys.readouterr().out) == told
        (path,) = run_folder.glob("evaluations/*/result.json")
        assert json.loads(path.read_text())["test"]["num_images"] == 300

    def test_the_draws_are_not_those_of_the_runs_own_test(self, command, run_folder):
        """Else an evaluation with the run's seed and samples would confirm nothing."""
        own = json.loads((run_folder / "result.json").read_text())["test"]
        assert command("run=run", "evaluator.num_samples=20", "device=cpu") == 0
        (path,) = run_folder.glob("evaluations/*/result.json")
        again = json.loads(path.read_text())["test"]
        assert again["num_samples"] == own["num_samples"]
        assert again["log_likelihood"] != own["log_likelihood"]
        # The images are the same, so the two differ by much less than the error over images.
        assert abs(again["log_likelihood"] - own["log_likelihood"]) < own["standard_error"]

    def test_the_last_checkpoint_on_request(self, command, run_folder, trained, digits, capsys):
        arguments = ("run=run", "checkpoint=last", "evaluator.num_samples=5", "device=cpu")
        assert command(*arguments) != 0
        assert "run=run: no checkpoints/last.pt there" in capsys.readouterr().err

        state = checkpoint.load(run_folder / "checkpoints" / "best.pt")
        weights = {name: value + 0.1 for name, value in state["model"].items()}
        last = state | {"model": weights, "epoch": 1, "epochs": 1.25}
        checkpoint.save(run_folder / "checkpoints" / "last.pt", last)
        assert command(*arguments) == 0
        (path,) = run_folder.glob("evaluations/test-importance-last_*/result.json")
        result = json.loads(path.read_text())
        generator = stream(0, "evaluation of test")
        values = by_hand(trained, run_folder, digits.test, 5, generator, "last")
        assert result["test"]["log_likelihood"] == values.mean().item()
        assert (result["checkpoint"], result["epoch"]) == ("last", 1.25)

        # In the same folder, the best one is another evaluation.
        folder = f"hydra.run.dir={path.parent}"
        assert command("run=run", "evaluator.num_samples=5", "device=cpu", folder) != 0
        assert "already holds" in capsys.readouterr().err

    def test_a_last_checkpoint_tells_its_epoch_with_the_fraction(self, trained, digits, tmp_path):
        """As the run's own result does, so that a report can tell one from a later one."""
        settings = dataclasses.replace(trained, trainer=copy.deepcopy(trained.trainer))
        settings.trainer.max_seconds = 1e-9  # a step
        result = training.run(settings, digits, CPU, tmp_path, resume=False)
        state = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
        assert state["epochs"] == result["epochs"] == pytest.approx(1 / 12, abs=1e-3)

    def test_first_images_only_on_request(self, command, run_folder, trained, digits):
        quick = ("evaluator.num_samples=5", "evaluator.num_images=9", "device=cpu")
        assert command("run=run", *quick) == 0
        (path,) = run_folder.glob("evaluations/*/result.json")
        result = json.loads(path.read_text())["test"]
        generator = stream(0, "evaluation of test")
        values = by_hand(trained, run_folder, digits.test[:9], 5, generator)
        assert (result["num_images"], result["log_likelihood"]) == (9, values.mean().item())

    def test_an_interrupted_evaluation_is_gone_on_with(
        self, command, run_folder, monkeypatch, capsys
    ):
        """By the same command, to the same result; nothing of it is left then."""
        monkeypatch.setattr(VAE, "rows_at_a_time", lambda self, images: 8)
        small = ("chains=2", "temperatures=4", "leapfrog_steps=2", "pilot_images=2", "num_images=9")
        arguments = ("run=run", "evaluator=ais", *(f"evaluator.{key}" for key in small))
        arguments += ("device=cpu",)
        assert command(*arguments) == 0
        (path,) = run_folder.glob("evaluations/*/result.json")
        whole = json.loads(path.read_text())
        assert whole["test"]["evaluator"] == "ais_2x4x2" and whole["test"]["num_samples"] == 2
        assert whole["test"]["settings"]["pilot_images"] == 2
        assert {"acceptance", "ess"} < set(whole["test"])
        shutil.rmtree(run_folder / "evaluations")

        forward, batches = Ais.forward, []

        def interrupted(*given):
            batches.append(given)
            if len(batches) == 3:
                raise KeyboardInterrupt
            return forward(*given)

        with monkeypatch.context() as patch:
            patch.setattr(Ais, "forward", interrupted)
            assert command(*arguments) == 130
        (kept,) = run_folder.glob("evaluations/unfinished-ais_2x4x2-*.pt")
        batches.clear()
        monkeypatch.setattr(Ais, "forward", lambda *given: batches.append(given) or forward(*given))
        assert command(*arguments) == 0
        assert len(batches) == 1  # of 4, 4 and 1 images
        (path,) = run_folder.glob("evaluations/*/result.json")
        assert json.loads(path.read_text()) == whole
        assert not kept.exists()

    def test_weights_that_do_not_fit_are_one_line(self, command, run_folder, capsys):
        path = run_folder / "checkpoints" / "best.pt"
        state = checkpoint.load(path)
        state["config"]["model"]["latent_dim"] = 4
        checkpoint.save(path, state)
        assert command("run=run", "device=cpu") != 0
        error = capsys.readouterr().err
        assert error.startswith("ucvae-eval: error: checkpoint: ") and error.count("\n") == 1
        assert "best.pt does not fit the run (size mismatch" in error
        assert not list(run_folder.glob("evaluations/*/result.json"))


@pytest.fixture
def evaluated(finished, trained, tmp_path):
    """A function that evaluates the run on data, after a change to its checkpoint's state."""

    def run(data, change=lambda state: None, **settings):
        request = EvalSettings(
            run="a run",
            split=settings.get("split", "test"),
            checkpoint=Checkpoint.best,
            data_dir=None,
            device="cpu",
            seed=2,
            evaluator=ImportanceSampling(num_samples=5),
            raw={},
        )
        state = checkpoint.load(finished / "checkpoints" / "best.pt")
        change(state)
        return rerun.run(request, trained, state, data, CPU, tmp_path)

    return run


class TestOtherData:
    def test_the_same_data_are_not_warned_about(self, evaluated, digits, caplog, tmp_path):
        result = evaluated(digits)
        assert result["differing_splits"] == []
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        assert json.loads((tmp_path / "result.json").read_text()) == result

    @pytest.mark.parametrize("changed", [("valid",), ("train", "test")])
    def test_differing_splits_are_named_and_evaluated(
        self, changed, evaluated, digits, finished, trained, caplog, tmp_path
    ):
        splits = {split: getattr(digits, split) for split in ("train", "valid", "test")}
        splits |= {split: 1 - splits[split] for split in changed}
        data = ImageData.from_splits("digits", "static", 2, splits)
        result = evaluated(data)

        (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
        names = ", ".join(changed)
        expected = f"the data differ from those the run was trained on: {names} of digits"
        assert warning.getMessage() == expected
        assert result["differing_splits"] == list(changed)
        assert result["split_sha256"] == data.split_sha256
        values = by_hand(trained, finished, data.test, 5, stream(2, "evaluation of test"))
        assert result["test"]["log_likelihood"] == values.mean().item()
        assert json.loads((tmp_path / "result.json").read_text()) == result

    def test_dynamic_train_split_has_the_same_bits_whatever_the_seed(
        self, evaluated, digits, finished, trained
    ):
        grey = {split: getattr(digits, split) * 120 for split in ("train", "valid", "test")}
        data = ImageData.from_grey("grey_digits", "dynamic", grey)
        result = evaluated(data, split="train")
        images = data.epoch_images(stream(0, "bits of the train split"))
        values = by_hand(trained, finished, images, 5, stream(2, "evaluation of train"))
        assert images.max() == 1 and not images.equal(digits.train)
        assert result["binarization"] == "dynamic"
        assert result["train"]["log_likelihood"] == values.mean().item()
        assert result["train"]["num_images"] == 1197


def narrower(state):
    state["model"] = Mlp(latent_dim=3, hidden=[8]).build(torch.zeros(64), 2).state_dict()


def incomplete(state):
    del state["model"]["decoder.0.weight"]


def without_weights(state):
    del state["model"]


@pytest.mark.parametrize("change", [narrower, incomplete, without_weights])
def test_weights_that_do_not_fit_the_model(change, evaluated, digits, tmp_path):
    with pytest.raises(RunError, match=r"best\.pt does not fit the run") as error:
        evaluated(digits, change)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "result.json").exists()


def test_weights_that_do_not_fit_the_data(evaluated, digits):
    cropped = dataclasses.replace(digits, train=digits.train[..., 1:])
    with pytest.raises(RunError, match=r"best\.pt does not fit the run \(size mismatch"):
        evaluated(cropped)


class TestSplit:
    """:func:`ucvae.evaluation.split.evaluate` by itself."""

    def test_may_be_interrupted_between_slices(self, digits):
        model = Mlp(latent_dim=3, hidden=[8]).build(digits.train_mean, 2)
        calls = []

        def between():
            calls.append(len(calls))
            if len(calls) == 2:
                raise KeyboardInterrupt

        # 1,024 x 784 numbers at a time are 12,544 rows of 64 pixels: 2 images of 5,000 samples.
        evaluator = ImportanceSampling(num_samples=5000, num_images=9)
        with pytest.raises(KeyboardInterrupt):
            evaluate(evaluator, model, digits, "test", torch.Generator(), between)
        assert calls == [0, 1]
        calls.extend([2, 3])
        evaluate(evaluator, model, digits, "test", torch.Generator(), between)
        assert len(calls) == 4 + 5

    def test_without_a_terminal_a_line_tells_how_far_it_is(self, digits, monkeypatch, caplog):
        monkeypatch.setattr("ucvae.progress.FIRST_LINE", 0.0)
        monkeypatch.setattr("ucvae.progress.LINE_INTERVAL", 0.0)
        model = Mlp(latent_dim=3, hidden=[8]).build(digits.train_mean, 2)
        evaluator = Ais(2, 3, 1, pilot_images=2, num_images=4)
        with caplog.at_level(logging.INFO):
            evaluate(evaluator, model, digits, "test", torch.Generator())
        lines = [record.getMessage() for record in caplog.records]
        assert "test log-likelihood: 0 of 4 images; pilot, 1 of 32" in lines
        assert "test log-likelihood: 0 of 4 images; temperature 1 of 3" in lines
        assert lines[-1] == "test log-likelihood: 4 of 4 images"

    def test_single_precision_is_averaged_in_double(self, digits):
        """What a report takes the mean of must have the mean of the result."""
        model = Mlp(latent_dim=3, hidden=[8]).build(digits.train_mean, 2)

        class Single(ImportanceSampling):
            def __call__(self, *arguments):
                return super().__call__(*arguments).float()

        found = evaluate(Single(num_samples=2), model, digits, "test", torch.Generator())
        assert found.values.dtype == torch.float64
        assert found.summary["log_likelihood"] == found.values.mean().item()

    def test_images_of_256_levels_are_scaled(self, digits):
        data = ImageData.from_splits(
            "grey", "none", 256, {s: getattr(digits, s) * 200 for s in ("train", "valid", "test")}
        )
        model = Mlp(latent_dim=3, hidden=[8]).build(data.train_mean, 256)
        evaluator = ImportanceSampling(num_samples=4, num_images=6)
        found = evaluate(evaluator, model, data, "valid", torch.Generator().manual_seed(0))
        images = as_input(data.valid[:6], 256)
        assert images.max() == pytest.approx(200 / 255)
        expected = log_likelihood(model, images, 4, torch.Generator().manual_seed(0))
        assert torch.equal(found.values, expected)
        assert found.summary["log_likelihood"] == expected.mean().item()
        assert found.summary["num_images"] == 6
