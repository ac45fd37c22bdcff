"""TensorBoard shows what it serves to whoever reaches it: the docs start it for this machine."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [*PAGES, *(path for room in ("ucvae", "scripts") for path in (ROOT / room).rglob("*.py"))]
START = re.compile(r"^.*\btensorboard +(?:-|serve).*$", re.MULTILINE)


def test_the_docs_start_it():
    assert any(START.search(page.read_text()) for page in PAGES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_is_started_on_the_loopback_address_only(path):
    text = path.read_text()
    assert "bind_all" not in text
    for command in START.findall(text):
        assert "--host 127.0.0.1" in command or "--host localhost" in command, command
