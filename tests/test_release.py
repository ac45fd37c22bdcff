"""The version stands in one place, and all that tells of it agrees: changelog, citation, tags."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import ucvae

REPOSITORY = Path(__file__).resolve().parents[1]
HEADING = re.compile(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", re.MULTILINE)


def git(root, *arguments):
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return done.stdout.split() if done.returncode == 0 else []


def numbers(version):
    return tuple(map(int, version.split(".")))


def tagged(root):
    """The versions of the tags of HEAD, and that of the last tag at or before it."""
    here = git(root, "tag", "--points-at", "HEAD", "--list", "v[0-9]*")
    last = git(root, "describe", "--tags", "--abbrev=0", "--match", "v[0-9]*")
    return [tag[1:] for tag in here], [tag[1:] for tag in last]


def disagreements(root, version):
    """What the changelog and the tags of a checkout tell that is not so of this version."""
    text = (root / "CHANGELOG.md").read_text()
    sections = HEADING.findall(text)
    here, last = tagged(root)
    versions = [name for name, _ in sections[1:]]
    found = []
    if len(sections) != text.count("\n## "):
        found.append("a heading that is neither [Unreleased] nor [X.Y.Z] - YYYY-MM-DD")
    if sections[0] != ("Unreleased", "") or not all(date for _, date in sections[1:]):
        found.append("[Unreleased] is not first, or a version has no date")
    if [*map(numbers, versions)] != sorted({*map(numbers, versions)}, reverse=True):
        found.append("the versions are not in order, the last one first")
    if versions and versions[0] != version:
        found.append(f"the last version is {versions[0]}, and the package's {version}")
    found += [f"tag v{tag} on version {version}" for tag in here if tag != version]
    found += [f"no section for the tag v{tag}" for tag in last if tag not in versions]
    return found


def test_the_checkout_agrees():
    assert not disagreements(REPOSITORY, ucvae.__version__)


def test_the_last_tag_is_of_this_version_or_of_one_before():
    _, last = tagged(REPOSITORY)
    if not last:
        pytest.skip("no tag of a version here: a shallow clone, no checkout, or nothing released")
    assert numbers(last[0]) <= numbers(ucvae.__version__)


UNRELEASED = "# Changelog\n\n## [Unreleased]\n\n"
RELEASED = UNRELEASED + "## [0.2.0] - 2026-03-04\n\n## [0.1.0] - 2026-01-02\n"


@pytest.mark.parametrize(
    ("changelog", "tags", "version", "wrong"),
    [
        (UNRELEASED, [], "0.2.0", None),
        (RELEASED, [], "0.2.0", None),
        (RELEASED, ["v0.2.0", "other"], "0.2.0", None),
        (RELEASED, ["v0.2.0"], "0.1.0", "tag v0.2.0 on version 0.1.0"),
        (RELEASED, ["v0.3.0"], "0.2.0", "no section for the tag v0.3.0"),
        (UNRELEASED, ["v0.2.0"], "0.2.0", "no section for the tag v0.2.0"),
        (RELEASED, [], "0.3.0", "the last version is 0.2.0"),
        (RELEASED.replace("0.1.0", "0.3.0"), [], "0.2.0", "not in order"),
        (RELEASED.replace(" - 2026-01-02", ""), [], "0.2.0", "has no date"),
        (RELEASED + "\n## 0.0.1\n", [], "0.2.0", "a heading that is neither"),
    ],
)
def test_what_disagrees_is_found(changelog, tags, version, wrong, tmp_path):
    (tmp_path / "CHANGELOG.md").write_text(changelog)
    me = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    git(tmp_path, "init", "--quiet")
    git(tmp_path, *me, "commit", "--quiet", "--allow-empty", "--message", "a commit")
    for tag in tags:
        git(tmp_path, "tag", tag)
    assert len(git(tmp_path, "tag")) == len(tags)
    found = "; ".join(disagreements(tmp_path, version))
    assert (wrong in found) if wrong else not found


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == ucvae.__version__
    assert citation["type"] == "software" and citation["cff-version"] == "1.2.0"
    (paper,) = citation["references"]
    cited = " ".join((REPOSITORY / "README.md").read_text().split())
    assert f"*{paper['title']}*, UAI {paper['year']}" in cited and paper["url"] in cited
