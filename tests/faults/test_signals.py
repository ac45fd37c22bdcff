"""SIGTERM and Ctrl-C end a real run with a checkpoint, by the right exit code."""

import json
import os
import signal
import time

import pytest

from faults import runs


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_tells_how_to_go_on(number, code, server, tmp_path):
    folder = tmp_path / "a"
    pid = server.start(tmp_path, *runs.SHORT, "trainer.max_epochs=100000", "hydra.run.dir=a")
    while not (folder / "metrics.jsonl").exists():
        os.kill(pid, 0)  # it is there
        time.sleep(0.02)
    os.kill(pid, number)
    ended, output = server.end()
    assert ended == code, output
    line = f"ucvae-train: error: stopped by {number.name}; go on with: ucvae-train resume="
    assert output.splitlines()[-1].startswith(line) and "Traceback" not in output
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    server.start(tmp_path, "resume=a", f"trainer.max_epochs={int(last['epoch']) + 1}")
    ended, output = server.end()
    assert ended == 0, output
    assert json.loads((folder / "result.json").read_text())["epochs"] >= last["epoch"]
