"""Checkpoints that are cut short, bit-flipped or hold code: noticed, told, gone on without."""

import os
import random
import shutil
import zipfile

import pytest
import torch

from faults import runs
from ucvae import checkpoint
from ucvae.errors import RunError


def cut_short(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def copy_untested(run, folder):
    """Copy a run as it was before its test, which is then left to do."""
    shutil.copytree(run, folder)
    (folder / "result.json").unlink()


DAMAGES = {"cut short": cut_short, "bit-flipped": flip_a_bit, "missing": os.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_last_falls_back_to_the_one_before_and_says_so(damage, server, finished, tmp_path):
    copy_untested(finished, tmp_path / "a")
    DAMAGES[damage](tmp_path / "a" / "checkpoints" / "last.pt")
    server.start(tmp_path, "resume=a")
    code, output = server.end()
    assert code == 0, output
    (line,) = [line for line in output.splitlines() if "last.previous.pt" in line]
    assert "checkpoints/last.pt" in line and "going on from last.previous.pt" in line
    assert line in (tmp_path / "a" / "train.log").read_text() or "WARNING" in line
    assert runs.differences(runs.read(finished), runs.read(tmp_path / "a")) == []


def test_two_damaged_checkpoints_are_one_line(server, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "a")
    for name in ("last.pt", "last.previous.pt"):
        flip_a_bit(tmp_path / "a" / "checkpoints" / name)
    server.start(tmp_path, "resume=a")
    code, output = server.end()
    assert code == 2 and output.count("\n") == 1
    assert "last.pt is damaged" in output and "last.previous.pt is damaged too" in output


def test_damaged_best_is_told_with_what_to_do(server, finished, command, tmp_path):
    copy_untested(finished, tmp_path / "a")
    flip_a_bit(tmp_path / "a" / "checkpoints" / "best.pt")
    server.start(tmp_path, "resume=a")
    code, output = server.end()
    lines = [line for line in output.splitlines() if line.startswith("ucvae-train: error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in output
    assert "best.pt is damaged" in lines[0] and "train again in another folder" in lines[0]
    evaluated = command("ucvae-eval", "run=a")
    assert evaluated.code == 2 and evaluated.err.count("\n") == 1
    assert "best.pt is damaged" in evaluated.err


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"model": {"weight": torch.randn(1000)}})
    good = path.read_bytes()
    draw = random.Random(0)
    everywhere = [*draw.sample(range(len(good)), 300), *range(len(good) - 100, len(good))]
    for position in everywhere:
        content = bytearray(good)
        content[position] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"a\.pt is damaged"):
            checkpoint.load(path)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99, 1])
def test_a_file_cut_anywhere_is_noticed(share, tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"model": {"weight": torch.randn(1000)}})
    os.truncate(path, int((path.stat().st_size - 1) * share))
    with pytest.raises(RunError, match=r"a\.pt is damaged"):
        checkpoint.load(path)


def test_anybody_can_open_a_checkpoint(finished):
    for name in ("last.pt", "last.previous.pt", "best.pt"):
        path = finished / "checkpoints" / name
        assert "model" in torch.load(path, weights_only=True)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None and len(archive.comment) == 64


def test_a_checkpoint_without_a_hash_is_read(tmp_path):
    torch.save({"format": checkpoint.FORMAT, "value": 3}, tmp_path / "a.pt")
    assert checkpoint.load(tmp_path / "a.pt")["value"] == 3


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("request_", [("ucvae-train", "resume=a"), ("ucvae-eval", "run=a")])
def test_code_in_a_checkpoint_is_refused_and_not_run(request_, finished, command, tmp_path):
    shutil.copytree(finished, tmp_path / "a")
    folder = tmp_path / "a" / "checkpoints"
    for path in folder.iterdir():
        state = torch.load(path, weights_only=True)
        torch.save(state | {"model": Payload(str(tmp_path / "executed"))}, path)
    refused = command(*request_)
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert ".pt is damaged or no checkpoint" in refused.err
    assert not (tmp_path / "executed").exists()
    torch.load(folder / "best.pt", weights_only=False)  # the code was real
    assert (tmp_path / "executed").exists()
