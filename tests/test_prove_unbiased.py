"""``scripts/prove_unbiased.py``: the proof itself, short and less short, and that it can fail."""

import importlib.util
import json
import sys
from pathlib import Path

import hydra
import pytest
import torch
from references import REFERENCES

import ucvae.cli._hydra  # noqa: F401  (registers the resolvers)
from ucvae.config import config_dir, train_settings
from ucvae.estimators import coupled
from ucvae.estimators.base import Estimate, Estimator
from ucvae.estimators.coupled import Coupled
from ucvae.estimators.iwae import Iwae

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "prove_unbiased.py"
CONTROLS = ["elbo", "iwae", "capped"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prove_unbiased", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def estimators(script, monkeypatch):
    """The table of estimators, for the test's own rows."""
    table = dict(script.ESTIMATORS)
    monkeypatch.setattr(script, "ESTIMATORS", table)
    return table


@pytest.fixture
def prove(script, capsys):
    """A function that runs the script on ``ppca`` and returns its status and its lines."""

    def run(*arguments, references=("ppca",)):
        status = script.main(["--references", *references, *arguments])
        return status, capsys.readouterr().out.splitlines()

    return run


class Exact(Estimator):
    """The exact gradient of the ``ppca`` reference's images, moved by ``bias``, plus noise.

    The noise of an estimate is standard normal in each coordinate, times ``noise``.
    """

    def __init__(self, bias=0.0, noise=0.0):
        self.bias = bias
        self.noise = noise
        self.num_samples = 7
        self.batches = []
        self.adapted = 0

    def __call__(self, model, images, generator, index=None):
        self.batches.append(images)
        reference = REFERENCES["ppca"]()
        reference.model = model
        moved = 0
        for parameter in model.decoder.parameters():
            noise = torch.randn(len(images), *parameter.shape, generator=generator).mean(0)
            moved += ((self.bias + self.noise * noise) * parameter).sum()
        return Estimate(-reference.log_likelihood(images).mean() - moved, None)

    def adapt(self, estimate):
        self.adapted += 1


class TestProof:
    def test_short(self, prove, tmp_path):
        # What the controls take: 'capped' has 0.1 of chi-square an estimate along 15 directions,
        # so some 400 here, where 40 batches leave 10 combinations of them; 120 give p < 10^-6.
        file = tmp_path / "found.json"
        names = [*CONTROLS, "c-isir,L=1", "unlike"]
        status, lines = prove("--estimates", "6000", "--estimators", *names, "--json", str(file))
        assert status == 0
        assert lines[-1] == (
            "2 times no bias found in an unbiased estimator; 3 times a biased one found"
        )
        printed = [line for line in lines if line.startswith("ppca ")]
        assert [line.split()[1] for line in printed] == names
        assert [line.endswith("  biased") for line in printed] == [True] * 3 + [False] * 2
        found = json.loads(file.read_text())
        assert [row["estimator"] for row in found["rows"]] == names
        assert {row["verdict"] for row in found["rows"][3:]} == {"no bias found"}
        assert found["rows"][1]["evaluations"] == 10
        assert [row["truncated"] for row in found["rows"][3:]] == [0, 0]
        assert found["rows"][2]["truncated"] > 0.5

    @pytest.mark.slow
    @pytest.mark.parametrize("reference", REFERENCES)
    def test_of_every_estimator(self, reference, prove):
        # The least chi-square of a control is 'capped' on the discrete toy: 0.06 an estimate, so
        # 900 here for 25 combinations of its coordinates; 150 would do.
        status, lines = prove("--estimates", "15000", references=[reference])
        assert status == 0, "\n".join(lines)

    def test_finds_the_bias_that_is_there(self, script, estimators):
        """IWAE's on the discrete toy, by enumeration.

        The error of the mean is the bias plus noise of the size of the standard error, so the norms
        differ by less than 5 of these.
        """
        toy = REFERENCES["discrete"]()
        estimators["iwae"] = script.Row(lambda: Iwae(3), unbiased=False)
        found = script.prove(toy, "iwae", 60_000, None, 0).test
        bias, truth = [], []
        for image in toy.images:
            truth.append(toy.gradient(image))
            bias.append(toy.gradient_of(image, toy.chains(image, 3).iwae) - truth[-1])
        expected = (torch.cat(bias).norm() / torch.cat(truth).norm()).item()
        assert found.standard_error < expected / 20
        assert abs(found.relative_error - expected) < 5 * found.standard_error

    def test_the_error_of_the_exact_gradient_is_rounding(self, script, estimators):
        estimators["exact"] = script.Row(Exact)
        found = script.prove(REFERENCES["ppca"](), "exact", 1200, None, 0)
        assert found.test.relative_error < 1e-12 and found.test.variance < 1e-24
        assert (found.test.degrees, found.test.p_value) == (0, 1)
        assert found.evaluations == 7

    def test_variance_and_standard_error_are_those_of_the_estimates(self, script, estimators):
        # 36 coordinates of variance 9; 40 batches know the trace to sqrt(2 / (39 * 36)) = 3.8%.
        toy = REFERENCES["ppca"]()
        estimators["noisy"] = script.Row(lambda: Exact(noise=3.0))
        found = script.prove(toy, "noisy", 6000, None, 0).test
        squares = sum(toy.gradient(image).square().sum().item() for image in toy.images)
        assert found.variance == pytest.approx(36 * 9 / squares, rel=5 * 0.038)
        # Each image has a third of the 6,000 estimates.
        assert found.standard_error == pytest.approx((found.variance / 2000) ** 0.5)


class TestFails:
    def test_without_the_correction(self, prove, monkeypatch):
        run_lagged_chains = coupled.run_lagged_chains

        def main_sum_alone(*args, **kwargs):
            chains = run_lagged_chains(*args, **kwargs)
            return chains._replace(particles=chains.main)

        monkeypatch.setattr(coupled, "run_lagged_chains", main_sum_alone)
        status, lines = prove("--estimates", "6000", "--estimators", "iwae", "c-isir,L=1")
        assert status == 1
        assert lines[-1] == "ppca: c-isir,L=1 was found biased, and claims to be unbiased"

    def test_where_chains_are_truncated_even_if_no_bias_shows(self, prove, script, estimators):
        cut = dict(num_samples=4, lag=5, burn_in=0, max_steps=15)
        estimators["cut"] = script.Row(lambda: Coupled(**cut))
        status, lines = prove("--estimates", "3000", "--estimators", "iwae", "cut")
        assert status == 1
        assert lines[-2].endswith("  no bias found")
        assert lines[-1].startswith("ppca: cut had ") and "estimates truncated" in lines[-1]

    def test_where_the_estimates_are_too_few_for_the_controls(self, prove):
        status, lines = prove("--estimates", "1200", "--estimators", "iwae", "capped", "L=1")
        assert status == 1
        assert lines[-2:] == [
            "ppca: iwae was not found biased, and is: too few estimates",
            "ppca: capped was not found biased, and is: too few estimates",
        ]

    def test_of_a_bias_without_variance(self, prove, script, estimators, tmp_path):
        estimators["moved"] = script.Row(lambda: Exact(bias=1e-6))
        file = tmp_path / "found.json"
        arguments = ("--estimates", "1200", "--estimators", "moved", "--json", str(file))
        status, lines = prove(*arguments)
        assert status == 1
        assert lines[-2:] == [
            "ppca: moved was found biased, and claims to be unbiased",
            "no control: nothing here shows that a bias would be found",
        ]
        (row,) = json.loads(file.read_text())["rows"]
        assert row["test"]["chi_square"] is None and row["test"]["p_value"] == 0


class TestRows:
    """How an estimator is called, seen by one that keeps what it gets."""

    def calls(self, script, estimators, **row):
        spy = Exact()
        estimators["spy"] = script.Row(lambda: spy, **row)
        found = script.prove(REFERENCES["ppca"](), "spy", 1200, None, 0)
        assert (found.estimates, found.batches) == (1200, 8)
        assert found.test.relative_error < 1e-6
        return spy, REFERENCES["ppca"]().images

    def test_each_image_in_turn(self, script, estimators):
        spy, images = self.calls(script, estimators)
        assert len(spy.batches) == 8 * 3 and spy.adapted == 0
        for i, batch in enumerate(spy.batches):
            assert torch.equal(batch, images[i % 3].expand(50, -1))

    def test_unlike_images_together(self, script, estimators):
        spy, images = self.calls(script, estimators, unlike=True)
        assert len(spy.batches) == 8
        for batch in spy.batches:
            assert torch.equal(batch, images.repeat(50, 1))

    def test_float32(self, script, estimators):
        spy, _ = self.calls(script, estimators, dtype=torch.float32)
        assert {batch.dtype for batch in spy.batches} == {torch.float32}

    def test_adapted_between_calls(self, script, estimators):
        spy, _ = self.calls(script, estimators, adapts=True)
        assert spy.adapted == len(spy.batches)

    def test_those_of_the_table_claim_what_they_are(self, script):
        rows = script.ESTIMATORS
        assert [name for name, row in rows.items() if not row.unbiased] == CONTROLS
        assert rows["paper"].make() == Coupled()
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            default = train_settings(hydra.compose("train", ["estimator=coupled"])).estimator
        assert rows["default"].make() == default
        descriptions = {name: script.describe(row) for name, row in rows.items()}
        assert len(set(descriptions.values())) == len(rows)
        assert descriptions["c-isir"] == "C-ISIR K=10 L=10 t0=1"
        assert descriptions["adapted"].endswith("beta=0.5 and adapted between calls")

    def test_a_row_does_not_depend_on_the_others(self, estimators, prove):
        def numbers(name, *before):
            _, lines = prove("--estimates", "1200", "--estimators", *before, name)
            words = [line.split() for line in lines]
            return next(row[2:9] for row in words if row[:2] == ["ppca", name])

        estimators["again"] = estimators["L=1"]
        assert numbers("L=1") == numbers("L=1", "elbo", "c-isir")
        assert numbers("L=1") != numbers("again")


@pytest.mark.parametrize(
    "estimates, coordinates, count, expected",
    [
        (1_000_000, 36, None, (145, 2314)),
        (1_000_000, 234, None, (937, 356)),
        (15_000, 234, None, (100, 50)),
        (60_000, 234, None, (100, 200)),
        (1_200, 36, None, (8, 50)),
        (10_000, 36, 500, (7, 500)),
    ],
)
def test_batches(script, estimates, coordinates, count, expected):
    assert script.batches_of(estimates, 3, coordinates, count) == expected
    assert expected[0] * expected[1] * 3 >= estimates


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: --estimates"),
        (["--estimates", "1199"], "--estimates must be at least 1200 for ppca, got 1199"),
        (["--estimates", "many"], "invalid int value: 'many'"),
        (["--estimates", "2000", "--batch", "100"], "must be at least 2400 for ppca, got 2000"),
        (["--estimates", "9999", "--batch", "49"], "--batch must be at least 50, got 49"),
        (["--estimates", "9999", "--estimators", "vae"], "invalid choice: 'vae'"),
        (["--estimates", "9999", "--references", "pca"], "invalid choice: 'pca'"),
        (["--estimates", "9999", "--json", "no/such/file"], "cannot write no/such/file"),
    ],
)
def test_bad_request_is_refused(arguments, message, script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert ": error: " in last and message in last
