"""``scripts/bench.py`` from end to end at tiny sizes: its figures fit together, its refusals."""

import importlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import hydra
import pytest
import torch

from ucvae import checkpoint, training
from ucvae.config import config_dir, train_settings
from ucvae.data.base import ImageData
from ucvae.data.digits import Digits
from ucvae.estimators.coupled import decoder_gradient

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
QUICK = ("--quick", "--threads", "1", "--clock", "process")


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        patch.setattr("ucvae.studies.base.BETA_CALLS", 2)  # settled or not
        yield importlib.import_module("bench")


def run_of(estimator, folder):
    """A run of an epoch on digits."""
    import ucvae.cli._hydra  # noqa: F401  (registers the resolvers)

    quick = ["model.hidden=[8]", "model.latent_dim=2", "trainer.max_epochs=1"]
    overrides = [f"estimator={estimator}", *quick, "evaluator.num_samples=5"]
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        settings = train_settings(hydra.compose("train", overrides))
    training.run(settings, Digits().load(Path()), torch.device("cpu"), folder, resume=False)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of("iwae", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def remembering_run(tmp_path_factory):
    return run_of("coupled", tmp_path_factory.mktemp("remembering"))


def measure(script, folder, *arguments):
    path = folder / "figures.json"
    script.main([*arguments, *QUICK, "--output", str(path)])
    return json.loads(path.read_text())


@pytest.fixture
def rival(tmp_path):
    """A function that makes an interpreter that runs a few shell lines in the rival's place."""

    def make(lines):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.mark.slow
def test_training(script, rival, tmp_path, capsys):
    python = rival(
        """read settings; echo '{"versions": {"jax": "1.0"}}'
        while read request; do echo '{"images": 300, "seconds": 1.5}'; done"""
    )
    report = measure(script, tmp_path, "training", "--jax-python", python)
    assert set(report) == {"machine", "arguments", "training"}
    assert report["machine"]["threads"] == 1 and report["machine"]["gpu"] is None
    assert {"processor", "cores", "versions", "git_revision", "date"} < set(report["machine"])
    assert report["training"]["rivals"] == {"jax": {"jax": "1.0"}}
    rows = report["training"]["objectives"]
    bounds = ["ELBO", *(f"IWAE, K {k}{how}" for how in ("", ", thinned") for k in (10, 50))]
    assert list(rows) == [*bounds, "coupled"]
    assert set(rows["coupled"]["images_per_s"]) == {"ucvae"}
    for name in bounds:
        # Of a single round, so that the ratio is that of the figures.
        rates = rows[name]["images_per_s"]
        assert {"ucvae", "eager", "products"} <= set(rates) and min(rates.values()) > 0
        assert rates["jax"] == 200
        assert rows[name]["ratio"] == {
            who: pytest.approx(rates["ucvae"] / rates[who]) for who in ("eager", "jax")
        }
        over = rows[name]["step_over_products"]
        fastest = max(rates["products"], rates.get("oneDNN", 0))
        assert over == pytest.approx(fastest / rates["ucvae"])
        assert {who: [rate] for who, rate in rates.items()} == rows[name]["rounds"]
    printed = capsys.readouterr().out.splitlines()
    assert f"git_revision {report['machine']['git_revision']}" in printed[0]
    assert printed[1].startswith("pythae: left out")
    assert [line.split("  ")[0] for line in printed[-6:]] == list(rows)


def test_ais(script, run, tmp_path, capsys):
    report = measure(script, tmp_path, "ais", "--run", str(run), "--variants", "paper")["ais"]
    # 8x8 images: 1,024 x 784 numbers at a time are 12,544 rows, more than 100 images of 16 chains.
    assert report["images_at_a_time"] == 100 and report["run"] == str(run)
    rate = report["temperatures_x_images_per_s"]
    assert report["rounds"] == [rate] and rate > 0
    assert report["us_per_evaluation"] == pytest.approx(1e6 / (160 * rate))
    assert report["paper_s_per_10000_images"] == pytest.approx(1e8 / rate)
    assert "temperatures x images/s" in capsys.readouterr().out


def test_ais_credits_the_transitions_that_it_makes(script, run, tmp_path, monkeypatch):
    passes, at = [], script.ais.Target.at
    monkeypatch.setattr(script.ais.Target, "at", lambda *given: passes.append(1) or at(*given))

    def rate(clock, work, seconds):
        passes.clear()
        return work()

    monkeypatch.setattr(script.Clock, "rate", rate)
    report = measure(script, tmp_path, "ais", "--run", str(run), "--variants", "paper")["ais"]
    # One pass at the start, and 10 leapfrog steps for each temperature of each of 100 images.
    assert len(passes) == 1 + 10 * report["temperatures_x_images_per_s"] / 100


def test_cost_and_noise(script, run, tmp_path):
    report = measure(script, tmp_path, "coupled", "noise", "--run", str(run))
    found = report["coupled"]["estimators"]
    iwae = found.pop("IWAE, K 10")
    assert list(found) == list(script.UNBIASED)
    for row in found.values():
        assert row["ratio"] == pytest.approx(row["us_per_image"] / iwae["us_per_image"])
        assert row["ratio_of_sums"] == pytest.approx(row["ratio"])
        assert row["evaluation_over_iwae_sample"] == pytest.approx(
            row["us_per_evaluation"] / iwae["us_per_sample"]
        )
        assert row["meeting_time"]["mean"] >= 2 and 0 <= row["truncated_fraction"] <= 1
    # 2 starts and 10 steps of X alone, each of 9 fresh samples by ISIR and 9 by DISIR.
    assert found[script.PAPER]["decoder_evaluations_per_image"] > 2 + 10 * 18
    assert found["isir, K 10, L 3"]["decoder_evaluations_per_image"] < 100
    assert_same_chains(found, "decoder_evaluations_per_image")

    found = report["noise"]["estimators"]
    iwaes = ["IWAE, K 10 (biased)", "the same, thinned at 0.1"]
    snis = "snis: remembered, K 10 (biased)"
    assert list(found) == [*iwaes, snis, *script.UNBIASED]
    paper = found[script.PAPER]
    assert paper["variance_x_time_to_paper"] == pytest.approx(1)
    for row in found.values():
        product = row["noise"] * row["us_per_image"] / (paper["noise"] * paper["us_per_image"])
        assert row["variance_x_time_to_paper"] == pytest.approx(product)
        assert row["noise"] > 0 and 0 < row["largest_share"] <= 1
        # Fewer than 1,000 images: none is left out.
        assert row["trimmed_mean"] == pytest.approx(row["noise"])
        assert row["recurring"] is None  # too few replicates for it
    assert [found[name]["evaluations"] for name in iwaes] == [10, 10]
    assert found[iwaes[0]]["noise"] != found[iwaes[1]]["noise"]
    # The samples of the gradient; few images, if any, have been forgotten and are refined anew.
    assert 10 <= found[snis]["evaluations"] < 10 + 5
    assert_same_chains(found, "evaluations")


def assert_same_chains(found, evaluations):
    """Variants share random numbers, so those that differ in their thinning have the same chains.

    They evaluate 5 samples of a refinement, the one that all start at, 9 fresh ones for each of 4
    steps of X (t0 + L), and Y's start.
    """
    one, other = (found[name] for name in ("default: estimator=coupled", "default, thinned at 0.1"))
    assert one[evaluations] == other[evaluations] >= 5 + 1 + 4 * 9 + 1


def test_variants_are_chosen(script, run, tmp_path, capsys, monkeypatch):
    """By parts of their names; without the paper's there is no ratio to it."""
    arguments = ["--run", str(run), "--variants", "L 5", "thinned"]
    monkeypatch.setitem(script.QUICK, "replicates", 4)
    report = measure(script, tmp_path, "noise", *arguments)
    rows = report["noise"]["estimators"]
    chosen = ["default, thinned at 0.1", "remembered: isir, K 10, L 5"]
    assert list(rows)[3:] == chosen
    assert not any("variance_x_time_to_paper" in row for row in rows.values())
    assert all(0 <= row["recurring"] <= 1 for row in rows.values())
    assert capsys.readouterr().out.splitlines()[-6].endswith("us/image")


def test_visits_improve_proposals(script, run):
    """The ELBO of what is remembered, image by image in its place, over the encoder's."""
    name, places = "default: estimator=coupled", 150
    setting = (run, None, 2, 0, 0, torch.device("cpu"), places)
    subject = script.subject_of(*setting, 10, (name, "remembered: isir, K 10, L 5"))
    memories = [estimator.memory for estimator in subject.variants.values()]
    assert memories[0] is not memories[1] and memories[0].known.sum() > places / 2
    assert torch.equal(memories[0].mean, memories[1].mean)
    with torch.no_grad():
        encoded = subject.model.encode(subject.images)
        noise = torch.randn(places, 200, 2, generator=torch.Generator().manual_seed(1))

        def elbo(proposal):
            return subject.model.log_weight(subject.images, proposal, noise).mean().item()

        index = torch.arange(places)
        remembered = elbo(memories[0].of(index, encoded))
        assert remembered > elbo(encoded)
        assert remembered > elbo(memories[0].of(index.flip(0), encoded))


def test_what_is_measured_of_snis_is_its_gradient(script, run):
    name = "default: estimator=coupled"
    subject = script.subject_of(run, None, 2, 0, 0, torch.device("cpu"), 30, 10, (name,))
    snis, model = subject.snis, subject.model
    assert snis.memory.known.any()
    # It learns otherwise than chains do.
    assert not torch.equal(snis.memory.mean, subject.variants[name].memory.mean)

    (batch,) = script.in_batches(subject.images)
    own = snis(model, batch.images, torch.Generator().manual_seed(4), batch.places)
    own = torch.autograd.grad(own.surrogate, list(model.decoder.parameters()))
    with torch.no_grad():
        encoded = model.encode(batch.images)
    before = snis.memory.mean.clone()
    draw = script.drawing(snis, model, batch, encoded)
    particles = draw(torch.Generator().manual_seed(4)).particles
    assert torch.equal(snis.memory.mean, before)
    measured = decoder_gradient(model, batch.images, encoded, particles)
    for one, other in zip(own, measured, strict=True):
        # A mean over 30 images, to be lowered, beside a sum; z goes into another Gaussian's noise
        # and back, which a narrow one rounds.
        torch.testing.assert_close(-30 * one, other, rtol=1e-3, atol=1e-3)


def test_variants_that_learn_otherwise_learn_for_themselves(script, run):
    names = ("default: estimator=coupled", "default, refined by 10 samples")
    subject = script.subject_of(run, None, 2, 0, 0, torch.device("cpu"), 30, 10, names)
    one, other = (estimator.memory for estimator in subject.variants.values())
    assert not torch.equal(one.mean, other.mean)


def test_in_training_the_run_s_own_memory_is_measured(script, remembering_run, tmp_path):
    state = checkpoint.load(remembering_run / "checkpoints" / "last.pt")
    memory, places = state["estimator"]["memory"], 150
    setting = (remembering_run, None, 2, 0, 0, torch.device("cpu"), places)
    subject = script.subject_of(*setting, None, ("default: estimator=coupled",))
    for name, value in subject.model.state_dict().items():
        assert torch.equal(value, state["model"][name])
    own = subject.variants["default: estimator=coupled"].memory
    train = Digits().load(Path()).train.flatten(1).float()
    for place, image in enumerate(subject.images):
        # Digits has images that are alike: one of those is the one that is meant.
        alike = (train == image).all(1).nonzero()[:, 0]
        assert (memory["mean"][alike] == own.mean[place]).all(1).any()
    arguments = ["--run", str(remembering_run), "--variants", "default", "--in-training"]
    report = measure(script, tmp_path, "coupled", "noise", *arguments)
    assert report["noise"]["variance_between"] > 0
    assert report["coupled"]["visits"] is report["noise"]["visits"] is None


def test_the_time_of_noise_is_that_of_the_same_memory_in_each_round(
    script, remembering_run, tmp_path, monkeypatch
):
    known, gradient_seconds = [], script.gradient_seconds

    def spy(estimator, *rest):
        if isinstance(estimator, script.Coupled):
            known.append(estimator.memory.mean.clone())
        seconds = gradient_seconds(estimator, *rest)
        if isinstance(estimator, script.Coupled):
            assert not torch.equal(estimator.memory.mean, known[-1])
        return seconds

    monkeypatch.setattr(script, "gradient_seconds", spy)
    run = ("--run", str(remembering_run), "--variants", "default: ", "--in-training")
    measure(script, tmp_path, "noise", *run)
    assert len(known) >= 2 and all(torch.equal(one, known[0]) for one in known)


def test_estimators_are_set_as_in_training_on_such_data(script, monkeypatch, remembering_run):
    """And what a run remembers as it did, whichever its data."""
    digits = Digits().load(Path())
    grey = {split: getattr(digits, split) * 200 for split in ("train", "valid", "test")}
    dynamic = ImageData.from_grey("grey_digits", "dynamic", grey)
    assert script.overrides_for(digits) == []
    settings = script.compose([*script.SNIS, *script.overrides_for(dynamic)])
    assert settings.estimator.refine_known and settings.dataset.binarization == "dynamic"

    setting = (remembering_run, None, 2, 0, 0, torch.device("cpu"))
    names, load = ("default: estimator=coupled",), script.fitted

    def remembering(run, data_dir, last):
        found = load(run, data_dir, last)
        memory = found.memory and found.memory | {"encoder_mean": found.memory["mean"] + 1}
        return found._replace(data=dynamic, memory=memory)

    monkeypatch.setattr(script, "fitted", remembering)
    for images, visits in ((40, None), (41, 1)):
        subject = script.subject_of(*setting, images, visits, names)
        for estimator in (subject.snis, *subject.variants.values()):
            assert estimator.follow_encoder
            drift = estimator.memory.encoder_mean - estimator.memory.mean
            assert torch.allclose(drift, torch.ones_like(drift)) == (visits is None)


def test_in_training_needs_a_run_that_remembers(script, run, capsys):
    with pytest.raises(SystemExit):
        script.main(["noise", "--run", str(run), "--in-training"])
    message = f"bench.py: --in-training: the run {run} has no remembered proposals\n"
    assert capsys.readouterr().err == message


def test_in_training_needs_proposals_that_are_known(script, remembering_run, tmp_path, capsys):
    """A run that ended before its switch has a memory, and nothing in it."""
    empty = tmp_path / "empty"
    shutil.copytree(remembering_run, empty)
    path = empty / "checkpoints" / "last.pt"
    state = checkpoint.load(path)
    state["estimator"]["memory"]["known"].zero_()
    checkpoint.save(path, state)
    with pytest.raises(SystemExit):
        script.main(["noise", "--run", str(empty), "--in-training"])
    message = f"bench.py: --in-training: the run {empty} has no remembered proposals\n"
    assert capsys.readouterr().err == message


def test_particles_stay_where_they_are(script):
    """In another Gaussian's noise."""
    from ucvae.chains import SignedParticles
    from ucvae.models.gaussians import FullGaussian, Gaussian

    generator = torch.Generator().manual_seed(0)
    encoded = Gaussian(torch.randn(3, 2, generator=generator), torch.full((3, 2), 0.3))
    proposal = FullGaussian(encoded.mean + 1, torch.randn(3, 2, 2, generator=generator).tril())
    index = torch.tensor([2, 0, 2, 1])
    noise = torch.randn(4, 5, 2, generator=generator)
    particles = SignedParticles(index, noise, torch.ones(4, 5))
    moved = script.in_noise_of(encoded, proposal, particles)
    torch.testing.assert_close(
        encoded.rows(index).transform(moved.noise), proposal.rows(index).transform(noise)
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.slow
def test_memory(script, tmp_path):
    """On the fresh model: the digits' fits into memory that Python has already."""
    found = measure(script, tmp_path, "memory", "--variants", script.PAPER)["memory"]["estimators"]
    assert list(found) == ["IWAE, K 10", script.PAPER]
    peaks = [row["peak_mib"] for row in found.values()]
    assert found[script.PAPER]["ratio"] == pytest.approx(peaks[1] / peaks[0])
    assert 0 < peaks[0] < peaks[1]


def test_a_measurement_trains_a_batch_at_least(script, tmp_path):
    """Where the time is over before it, as by the first checkpoint of a large memory."""
    contenders = importlib.import_module("rivals.contenders")
    clock = script.Clock("wall", torch.device("cpu"))
    task = script.Task(script.mnist_sized(None, 200, 0), None, 2, clock, 0.0)
    ours = contenders.Ours(script.TRAINED["ELBO"], task, tmp_path)
    for steps in (1, 2):
        assert ours.images_per_s() > 0
        assert ours.training.step == steps


def test_products_are_products(script):
    """Each layer's gradients of ``sum(g * (z W))``, and its output."""
    contenders = importlib.import_module("rivals.contenders")
    clock = script.Clock("wall", torch.device("cpu"))
    task = script.Task(None, torch.zeros(1, 5), 2, clock, 0.1)
    for name in contenders.products_on(clock.device):
        made = []
        products = contenders.Products(name, script.TRAINED["IWAE, K 10"], task)
        multiply = products.multiply
        products.multiply = lambda a, b, by=multiply, to=made: to.append(by(a, b))
        assert products.step() == contenders.BATCH_SIZE
        outputs, gradients = made[:3], made[3:]
        for (z, weight, _), output in zip(products.layers, outputs, strict=True):
            torch.testing.assert_close(output, z @ weight, rtol=1e-4, atol=1e-3)
        pairs = zip(gradients[::2], gradients[1::2], strict=True)
        for (z, weight, g), (to_z, to_weight) in zip(products.layers[::-1], pairs, strict=True):
            z, weight = z.requires_grad_(), weight.requires_grad_()
            expected = torch.autograd.grad((g * (z @ weight)).sum(), (z, weight))
            torch.testing.assert_close((to_z, to_weight), expected, rtol=1e-4, atol=1e-3)


class TestInterleaving:
    def test_measurements_take_turns(self, script):
        order = []
        names = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
        assert script.interleave(2, names) == {"a": [1, 3], "b": [2, 4]}
        assert order == ["a", "b", "a", "b"]

    def test_ratio_is_that_within_rounds(self, script):
        # A machine that is 10 times slower in the second round changes no ratio.
        assert script.median_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 1.0]) == 2


class TestRivals:
    @pytest.mark.parametrize(
        "lines, message",
        [
            ("echo first >&2; echo the last >&2; exit 3", "ended without an answer: the last"),
            (
                "read settings; echo '{\"versions\": {}}'; read request; echo oh >&2",
                "ended without an answer: oh",
            ),
            ("exit 0", "ended without an answer: it said nothing"),
        ],
    )
    def test_that_dies_is_told(self, script, rival, tmp_path, capsys, lines, message):
        python = rival(lines)
        with pytest.raises(SystemExit) as stopped:
            measure(script, tmp_path, "training", "--pythae-python", python)
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"bench.py: pythae: {python} {message}\n"

    @pytest.mark.parametrize("name", ["jax", "pythae"])
    def test_is_real(self, script, tmp_path, name):
        python = os.environ.get(f"UCVAE_TEST_{name.upper()}_PYTHON")
        if python is None and importlib.util.find_spec(name):
            python = sys.executable
        if python is None:
            pytest.skip(f"{name} is not installed, nor does UCVAE_TEST_{name.upper()}_PYTHON say")
        found = measure(script, tmp_path, "training", f"--{name}-python", python)["training"]
        assert name in found["rivals"][name]
        for objective in ("ELBO", "IWAE, K 10", "IWAE, K 50"):
            assert found["objectives"][objective]["images_per_s"][name] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["prices"], "no section prices; there are training, coupled, noise, memory"),
        (["coupled"], "coupled: needs --run RUN_DIR"),
        (["noise", "--run", "nowhere"], "checkpoint: no file nowhere/checkpoints/best.pt"),
        (["training", "--jax-python", "nowhere"], "jax: cannot start nowhere: No such file"),
        (["--variants", "isir", "smc"], "--variants: none is smc; there are default: "),
        (["--in-training"], "--in-training: needs --run RUN_DIR"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds must be positive, got 0"),
        (["--clock", "process", "--threads", "2"], "--clock process: adds up the threads' times"),
        (["--output", "nowhere/bench.json"], "--output: no folder nowhere"),
    ],
)
def test_bad_request_is_refused(script, arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        script.main([*arguments, *(("--quick",) if arguments[0] == "training" else ())])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench.py: {message}") and error.count("\n") == 1
