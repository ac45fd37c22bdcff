"""The fixtures of the commands' own tests, and a server of real runs."""

import pytest
from cli.conftest import calls, command, train  # noqa: F401

from faults import runs


@pytest.fixture(scope="session")
def server():
    server = runs.Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def finished(server, tmp_path_factory):
    """The folder of an undisturbed run; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    server.start(folder, *runs.SHORT, "hydra.run.dir=a")
    code, output = server.end()
    assert code == 0, output
    return folder / "a"
