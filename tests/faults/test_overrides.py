"""Overrides at random, over every key: a valid run, or one line and a non-zero exit."""

import dataclasses
import os
import shutil
import signal
import threading

import hydra
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from faults import runs
from ucvae import checkpoint
from ucvae.config import GROUPS, choices, config_dir
from ucvae.data.digits import Digits

# Where the value names a place, one that is in the test's folder, or that cannot be.
PLACES = ("hydra.run.dir", "hydra.sweep.dir", "data_dir", "resume", "run", "hydra.output_subdir")
FOLDERS = [
    "new",
    "new/deep",
    "file",
    "file/x",
    "a",
    "",
    "null",
    "/proc/x",
    "'with, comma'",
    "x" * 300,
]
HYDRAS = (
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.job.name",
    "hydra.verbose",
)
VALUES = st.one_of(
    st.integers(-3, 200).map(str),
    st.integers().map(str),
    st.floats(allow_nan=True, allow_infinity=True).map(repr),
    st.sampled_from(["null", "true", "false", "", "[]", "[16]", "[16,-1]", "{}", "{a:1}", "'x'"]),
    st.sampled_from(
        ["0.5", "1e-3", "1e400", "???", "${seed}", "${nothing}", "${", "a b", "é", "\\"]
    ),
    st.sampled_from(["coupled", "elbo", "iwae", "mlp", "conv", "digits", "isir", "auto", "cpu"]),
    st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=8),
)


def keys_of(config, path=""):
    """Every dotted key of a configuration, with those of groups of keys."""
    for name, value in config.items_ex(resolve=False):
        key = f"{path}{name}"
        yield key
        if isinstance(value, DictConfig):
            yield from keys_of(value, f"{key}.")


def every_key(name, groups):
    """Of the configuration as it is by default, and with each choice of each group."""
    import ucvae.cli._hydra  # noqa: F401  (registers the resolvers)

    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        asked = [[], *([f"{group}={choice}"] for group in groups for choice in choices(group))]
        found = {key for more in asked for key in keys_of(hydra.compose(name, more))}
    return sorted(key for key in found if "_target_" not in key)


@st.composite
def an_override(draw, keys, groups):
    kind = draw(st.integers(0, 9))
    if kind == 0:
        group = draw(st.sampled_from(groups))
        return f"{group}={draw(st.sampled_from(choices(group)))}"
    if kind == 1:
        place = draw(st.sampled_from(PLACES))
        return f"{place}={draw(st.sampled_from(FOLDERS))}"
    key = draw(st.sampled_from([*keys, *HYDRAS]))
    prefix = draw(st.sampled_from([""] * 8 + ["+", "++", "~"]))
    return f"{prefix}{key}={draw(VALUES)}"


@pytest.fixture
def tried(request, train, command, calls, monkeypatch, tmp_path):
    """A function that tries overrides on a command, and looks at what becomes of it."""
    data = Digits().load(tmp_path)
    few = {split: getattr(data, split)[:60] for split in ("train", "valid", "test")}
    data = dataclasses.replace(data, **few)
    for kind in kinds_of_data():
        monkeypatch.setattr(kind, "load", lambda self, data_dir: data)
    monkeypatch.setattr("ucvae.evaluation.rerun.run", lambda *arguments: {})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # what ~ stands for
    (tmp_path / "file").touch()
    assert train("hydra.run.dir=a").code == 0
    assert checkpoint.last(tmp_path / "a").exists()
    kept = tmp_path.with_name(tmp_path.name + "_kept")
    shutil.copytree(tmp_path, kept)
    codes = []

    def attempt(name, overrides):
        before = sorted(tmp_path.rglob("*"))
        finished = command(name, *overrides)
        told = f"{overrides}: {finished.code}, {finished.err}"
        assert finished.code in (0, 2), told
        assert "Traceback" not in finished.err + finished.out, told
        if finished.code:
            assert finished.err.startswith(f"{name}: error: "), told
            assert finished.err.count("\n") == 1, told
            assert finished.out == "" or "hydra.verbose=" in told, told
            assert sorted(tmp_path.rglob("*")) == before, told
        else:
            for path in tmp_path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
        codes.append(finished.code)
        return finished

    yield attempt
    # Neither all of one kind nor all of the other, or nothing was tried.
    assert 0.02 < codes.count(0) / len(codes) < 0.9


def kinds_of_data():
    from hydra.utils import get_class

    targets = {
        OmegaConf.load(config_dir() / "dataset" / f"{choice}.yaml").get("_target_")
        for choice in choices("dataset")
    }
    return {get_class(target) for target in targets if target}


COUNTS = [pytest.param(15), pytest.param(1000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("name", "config", "base", "groups"),
    [
        ("ucvae-train", "train", (), (*GROUPS, "experiment")),
        ("ucvae-eval", "eval", ("run=a",), ("evaluator", "study")),
    ],
)
def test_overrides_at_random(name, config, base, groups, count, tried):
    keys = every_key(config, groups)
    assert len(keys) > 10

    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(an_override(keys, groups), min_size=1, max_size=3))
    def attempt(overrides):
        tried(name, [*base, *overrides])

    attempt()


# Values that many keys allow, and some with which a run has no end, or no memory.
PLAUSIBLE = st.one_of(
    st.integers(1, 50).map(str),
    st.floats(1e-4, 1).map(repr),
    st.sampled_from(["0", "1", "1e-8", "1e3", "true", "null", "1000000", "10000000000"]),
)
# They say where and how long, not what to compute; ``dataset`` would look for files.
ASIDE = ("data_dir", "device", "resume", "dataset", "trainer.max_epochs", "trainer.max_seconds")


@pytest.fixture
def frugal_server():
    server = runs.Server(memory=8 * 2**30)
    yield server
    server.close()


@pytest.mark.slow
def test_what_is_accepted_really_runs(frugal_server, tmp_path):
    keys = [key for key in every_key("train", GROUPS) if not key.startswith(ASIDE)]
    groups = [group for group in GROUPS if group != "dataset"]
    choice = st.sampled_from([f"{group}={choice}" for group in groups for choice in choices(group)])
    override = st.one_of(choice, *[st.builds("{}={}".format, st.sampled_from(keys), PLAUSIBLE)] * 4)
    codes = []

    @settings(
        max_examples=60,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(override, min_size=1, max_size=2))
    def attempt(overrides):
        folder = tmp_path / str(len(codes))
        folder.mkdir()
        chosen = tuple(text.partition("=")[0] for text in overrides if text.split("=")[0] in groups)
        small = [text for text in runs.SHORT if not text.startswith(chosen)]
        asked = (*small, "trainer.max_epochs=1", *overrides, "hydra.run.dir=a")
        pid = frugal_server.start(folder, *asked)
        # The second ends it within a batch that takes for ever.
        stops = [threading.Timer(wait, os.kill, (pid, signal.SIGTERM)) for wait in (8, 12)]
        for stop in stops:
            stop.start()
        code, output = frugal_server.end()
        for stop in stops:
            stop.cancel()
        codes.append(code)
        told = f"{overrides}: {code}, {output}"
        assert code in (0, 1, 2, 143) and "Traceback" not in output, told
        if code:
            assert output.count(": error: ") == 1, told
            assert output.splitlines()[-1].startswith("ucvae-train: error: "), told
        else:
            assert (folder / "a" / "result.json").exists(), told
        shutil.rmtree(folder)

    attempt()
    assert codes.count(0) > 0.2 * len(codes)
