"""A run that is killed at any moment and taken up again ends as if never stopped."""

import contextlib
import os
import random
import shutil
import signal
import time

import pytest

from faults import runs


@pytest.fixture(scope="module")
def unstopped(server, tmp_path_factory):
    """What an undisturbed run leaves, and how long it takes once everything is loaded."""
    folder = tmp_path_factory.mktemp("unstopped")
    for _ in range(2):  # the first one warms the caches
        shutil.rmtree(folder / "a", ignore_errors=True)
        begun = time.monotonic()
        server.start(folder, *runs.SHORT, "hydra.run.dir=a")
        code, output = server.end()
        assert code == 0, output
    return runs.read(folder / "a"), time.monotonic() - begun


@pytest.mark.parametrize("count", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_bit_equal(count, server, unstopped, tmp_path):
    expected, seconds = unstopped
    moments = random.Random(count)
    killed = resumed = tried = 0
    while killed < count or resumed < count * 0.2:
        tried += 1
        assert tried < 4 * count, "the runs end before they can be killed, or before they begin"
        folder = tmp_path / str(tried)
        folder.mkdir()
        # Strata, so that no part of the run's life is left out.
        moment = (min(killed, count - 1) + moments.random()) / count * seconds
        begun = time.monotonic()
        pid = server.start(folder, *runs.SHORT, "hydra.run.dir=a")
        time.sleep(moment)
        with contextlib.suppress(ProcessLookupError):  # done already
            os.kill(pid, signal.SIGKILL)
        code, output = server.end()
        assert code in (0, -signal.SIGKILL), output
        if code == 0:  # too late; the machine has become faster
            seconds = min(seconds * 0.9, time.monotonic() - begun)
        if code != 0:
            killed += 1
            server.start(folder, "resume=a")
            code, output = server.end()
            resumed += code == 0
            if code != 0:  # before its first checkpoint: the same command just works
                assert "so there is no run to go on with" in output or "no such folder" in output
                seconds *= 1.1 if killed >= count else 1  # the machine has become slower
                server.start(folder, *runs.SHORT, "hydra.run.dir=a")
                code, output = server.end()
        assert code == 0, f"killed after {moment:.3f} s: {output}"
        assert "Traceback" not in output
        left = runs.read(folder / "a")
        assert runs.differences(expected, left) == [], f"killed after {moment:.3f} s"
        assert runs.written_twice(folder / "a") == [], f"killed after {moment:.3f} s"
        shutil.rmtree(folder)
