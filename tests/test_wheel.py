"""A wheel built from the tree works in a clean environment, from any folder."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def call(*arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    # Through the source distribution, so that nothing outside it can be needed.
    call(sys.executable, "-m", "build", "--no-isolation", "-o", folder, REPOSITORY, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def binaries(wheel, tmp_path_factory):
    """The commands of a fresh environment that holds the wheel, and this one's dependencies."""
    venv = tmp_path_factory.mktemp("clean")
    call(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    python = venv / "bin" / "python"
    install = ["--no-deps", "--no-index", "--disable-pip-version-check", wheel]
    call(sys.executable, "-m", "pip", "--python", python, "install", *install, cwd=venv)
    # A path from a .pth file has its own .pth files ignored: the checkout's stays out of sight.
    purelib = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv)
    (Path(purelib.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    found = call(python, "-c", "import ucvae; print(ucvae.__file__)", cwd=venv)
    assert Path(found.strip()).is_relative_to(venv)
    return venv / "bin"


def test_wheel_holds_every_config(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = REPOSITORY / "configs"
    expected = {f"ucvae/configs/{path.relative_to(configs)}" for path in configs.rglob("*.yaml")}
    assert expected and expected <= names
    assert "ucvae/py.typed" in names  # the package has types for its users' checkers
    assert not any(name.startswith(("tests/", "configs/")) for name in names)


@pytest.mark.slow
def test_wheel_trains_evaluates_and_reports_from_another_folder(binaries, tmp_path):
    shown = call(binaries / "ucvae-train", "--cfg", "job", cwd=tmp_path)
    assert "ucvae.estimators.coupled.Coupled" in shown
    quick = ["trainer.max_epochs=1", "evaluator.num_samples=20", "model.hidden=[20]", "device=cpu"]
    call(binaries / "ucvae-train", "estimator=elbo", *quick, "hydra.run.dir=a", cwd=tmp_path)
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["dataset"] == "digits" and result["test"]["log_likelihood"] < 0
    call(binaries / "ucvae-eval", "run=a", "evaluator.num_samples=10", "device=cpu", cwd=tmp_path)
    assert len(list((tmp_path / "a" / "evaluations").iterdir())) == 1
    shown = call(binaries / "ucvae-report", "a", cwd=tmp_path)
    assert "importance, 20 samples" in shown and "importance, 10 samples" in shown
