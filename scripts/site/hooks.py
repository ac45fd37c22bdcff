"""Links that work on a code host and in the site alike.

Pages link to files of the checkout as they lie there: ``../ucvae/chains/isir.py``. In the site a
module's place is its part of an API page, and CONTRIBUTING.md and CHANGELOG.md are pages. A link to
any other file outside docs/ stays as it is, and ``mkdocs build --strict`` refuses it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
MODULE = re.compile(r"^::: (ucvae[\w.]*)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make pages of those files beside docs/ that are pages."""
    root = Path(config.config_file_path).parent
    for name in ROOT_PAGES:
        files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links out of docs/ into links within the site."""
    own = page.file.src_uri
    # Where the page's file lies in the checkout, and so what its links are relative to.
    here = "" if own in ROOT_PAGES else posixpath.join("docs", posixpath.dirname(own))
    places = {
        name.replace(".", "/") + ".py": f"{api.relative_to(config.docs_dir).as_posix()}#{name}"
        for api in Path(config.docs_dir, "api").glob("*.md")
        for name in MODULE.findall(api.read_text())
    }
    places |= {name: name for name in ROOT_PAGES} | {"README.md": "index.md"}

    def rewritten(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, link["path"]))
        inside = target.removeprefix("docs/") if target.startswith("docs/") else places.get(target)
        if inside is None:
            return link[0]
        path, hash_, anchor = inside.partition("#")
        return (
            posixpath.relpath(path, posixpath.dirname(own) or ".")
            + (hash_ + anchor or link["anchor"] or "")
        )  # fmt: skip

    return LINK.sub(rewritten, markdown)
