import functools
import http.server
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ucvae.data import files


@pytest.fixture
def data_dir() -> Path:
    """Folder with the real data, in the layout of the README."""
    value = os.environ.get("UCVAE_TEST_DATA_DIR")
    if not value:
        pytest.skip("real data: UCVAE_TEST_DATA_DIR is not set")
    return Path(value)


@pytest.fixture(autouse=True)
def no_system_folders(monkeypatch):
    """Tests see no data but those they are given."""
    monkeypatch.setattr(files, "SYSTEM_FOLDERS", ())


@pytest.fixture
def memory_growth() -> Callable[[], Callable[[], int]]:
    """Start a watch of this process's memory; what it gives tells the peak growth in bytes.

    Only Linux tells a peak that can be set back.
    """

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    def start() -> Callable[[], int]:
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        return lambda: peak() - before

    try:
        start()
    except OSError as error:
        pytest.skip(f"the peak of memory cannot be watched here: {error}")
    return start


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine: the folder that it serves, and its address."""
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send_header(self, keyword, value):
            # Promises more than it sends for a file that a test calls cut, as a broken line does.
            if keyword == "Content-Length" and (folder / "cut").exists():
                value = str(int(value) + 1000)
            super().send_header(keyword, value)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{web.server_port}/"
        web.shutdown()
        thread.join()
