"""A disk that is full, and folders that cannot be written to: one line, nothing lost."""

import os
import shutil
import subprocess

import pytest
import torch

from faults import runs
from ucvae import checkpoint


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of so many bytes at a folder."""
    mounted = []

    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        if os.name == "nt" or os.geteuid() != 0 or not shutil.which("mount"):
            pytest.skip("only root may mount a small disk")
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(["mount", *options], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def one_line(output):
    errors = [line for line in output.splitlines() if line.startswith("ucvae-train: error: ")]
    assert len(errors) == 1 and "Traceback" not in output, output
    return errors[0]


def test_disk_that_fills_while_a_run_goes_on_costs_no_checkpoint(
    server, finished, small_disk, tmp_path
):
    disk = small_disk("2m")
    shutil.copytree(finished, disk / "a")
    before = torch.load(disk / "a" / "checkpoints" / "last.pt", weights_only=True)
    filler = disk / "filler"
    size = (disk / "a" / "checkpoints" / "last.pt").stat().st_size
    free = shutil.disk_usage(disk).free
    filler.write_bytes(bytes(max(0, free - 24_576 - size // 2)))
    server.start(tmp_path, "resume=disk/a", "trainer.max_epochs=40")
    code, output = server.end()
    assert code == 2, output
    line = one_line(output)
    assert "checkpoints/last.pt: No space left on device" in line, line
    assert not list((disk / "a").rglob("*.partial"))
    kept = checkpoint.load(disk / "a" / "checkpoints" / "last.pt")
    assert kept["step"] >= before["step"]
    filler.unlink()
    server.start(tmp_path, "resume=disk/a", "trainer.max_epochs=4")
    code, output = server.end()
    assert code == 0, output
    assert runs.read(disk / "a")["result"]["epochs"] == 4


def test_full_disk_is_one_line_and_leaves_nothing(server, small_disk, tmp_path):
    disk = small_disk("64k")
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
    server.start(tmp_path, *runs.SHORT, f"hydra.run.dir={disk / 'a'}")
    code, output = server.end()
    assert code == 2 and output == (
        f"ucvae-train: error: hydra.run.dir: cannot write to {disk / 'a'}: "
        "No space left on device\n"
    )
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_folder_that_cannot_be_written_to(server, tmp_path):
    (tmp_path / "file").touch()
    for folder, reason in ((tmp_path / "file" / "a", "Not a directory"), ("/proc/a", "No such")):
        server.start(tmp_path, *runs.SHORT, f"hydra.run.dir={folder}")
        code, output = server.end()
        assert code == 2 and output.count("\n") == 1
        assert f"hydra.run.dir: cannot write to {folder}: {reason}" in output
