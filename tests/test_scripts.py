"""The set-up scripts, as far as they go without installing anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = ("scripts/_setup", "scripts/train", "scripts/test", "pyproject.toml", "constraints.txt")


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the scripts read, whose .venv is a fake that notes what it is asked to do."""
    root = tmp_path / "a checkout"
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    return root


def fake_environment(folder: Path, *, pip: str = "exit 0") -> Path:
    """Make a ``python`` that records pip's arguments and runs everything else for real."""
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    python = binaries / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'if [ "$1 $2 $3" = "-m pip install" ]; then echo "$@" >>"{folder}/pip.log"; {pip}; fi\n'
        'if [ "$1" = -m ]; then exit 0; fi\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    command = binaries / "ucvae-train"
    command.write_text('#!/usr/bin/env bash\nprintf "%s|" "$PWD" "$@"\n')
    for path in (python, command):
        path.chmod(0o755)
    return folder / "pip.log"


def start(script: Path, *arguments: str, cwd: Path, **environment: str):
    return subprocess.run(
        [str(script), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_installs_once_and_runs_where_the_caller_is(checkout, tmp_path):
    pip_log = fake_environment(checkout / ".venv")
    for _ in range(2):
        done = start(checkout / "scripts/train", "seed=1", "a b", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{tmp_path}|seed=1|a b|"
    (line,) = pip_log.read_text().splitlines()
    assert line.endswith(f"-c {checkout}/constraints.txt -e {checkout}")


def test_works_through_a_symbolic_link(checkout, tmp_path):
    fake_environment(checkout / ".venv")
    (tmp_path / "train").symlink_to(checkout / "scripts/train")
    assert start(tmp_path / "train", cwd=tmp_path).stdout == f"{tmp_path}|"


def test_installs_again_when_the_pins_change(checkout, tmp_path):
    pip_log = fake_environment(checkout / ".venv")
    start(checkout / "scripts/train", cwd=tmp_path)
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    start(checkout / "scripts/train", cwd=tmp_path)
    assert len(pip_log.read_text().splitlines()) == 2


def test_the_test_extra_holds_what_training_needs(checkout, tmp_path):
    pip_log = fake_environment(checkout / ".venv")
    start(checkout / "scripts/test", cwd=tmp_path)
    start(checkout / "scripts/train", cwd=tmp_path)
    (line,) = pip_log.read_text().splitlines()
    assert line.endswith("[test]")


def test_failed_installation_is_told_and_tried_again(checkout, tmp_path):
    pip_log = fake_environment(checkout / ".venv", pip="exit 1")
    for _ in range(2):
        done = start(checkout / "scripts/train", cwd=tmp_path)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.endswith("train: the installation failed; see above\n")
    assert len(pip_log.read_text().splitlines()) == 2


@pytest.mark.parametrize("state", ["interrupted", "broken"])
def test_half_made_environment_is_made_anew(checkout, tmp_path, state):
    venv = checkout / ".venv"
    fake_environment(venv)
    if state == "interrupted":
        (venv / ".ucvae-installing").touch()
    else:
        (venv / "bin" / "python").unlink()
    # A Python whose venv module makes the fake environment again.
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'if [ "$1 $2" = "-m venv" ]; then cp -r "{tmp_path}/fake/." "$3"; exit; fi\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    fake_environment(tmp_path / "fake")
    (venv / "left over").touch()
    done = start(checkout / "scripts/train", cwd=tmp_path, PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}|"
    assert not (venv / "left over").exists() and not (venv / ".ucvae-installing").exists()


def test_python_that_is_too_old_is_named(checkout, tmp_path):
    old = tmp_path / "old"
    old.write_text("#!/usr/bin/env bash\nexit 1\n")
    old.chmod(0o755)
    done = start(checkout / "scripts/train", cwd=tmp_path, PYTHON=str(old))
    assert done.returncode == 1
    assert done.stderr == f"train: PYTHON={old} is not a Python of version 3.11 or later\n"
    assert not (checkout / ".venv").exists()
