"""Imports go one way: each room knows only those that CONTRIBUTING.md allows it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ucvae"
EVERYBODY = {"errors", "config"}
LEAVES = ["checkpoint", "results", "randomness", "stopping", "optimizers", "device", "bias"]
LEAVES += ["figures", "progress", "graphs"]
ALLOWED = {
    "errors": set(),
    "config": set(),
    **{leaf: set() for leaf in LEAVES},
    "data": set(),
    "models": set(),
    "chains": set(),
    "estimators": {"chains", "models"},
    "distributed": {"estimators", "models", "device", "stopping"},
    "statistics": {"chains"},
    "tracking": set(),
    "evaluation": {"models", "data", "checkpoint", "results", "randomness", "progress"},
    "studies": {
        *("chains", "models", "estimators", "data", "evaluation"),
        *("bias", "randomness", "results", "figures", "progress"),
    },
    "report": {"figures", "results"},
}
ALLOWED["training"] = set(ALLOWED)
ALLOWED["cli"] = set(ALLOWED)


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    """Rooms named by ``import ucvae.x``, ``from ucvae.x import`` and ``from ucvae import x``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "ucvae" and len(parts) > 1 and parts[1] in ALLOWED:
                yield parts[1]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_go_one_way(path):
    own = room(path)
    if own == "__init__":
        assert not set(imported_rooms(path))
        return
    beyond = set(imported_rooms(path)) - ALLOWED[own] - EVERYBODY - {own}
    assert not beyond, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(beyond))}"


def test_some_packages_have_one_home_each():
    homes = {"hydra": "cli", "torch.utils.tensorboard": "tracking", "matplotlib": "figures"}
    homes |= {"tqdm": "progress"}
    for path in PACKAGE.rglob("*.py"):
        for name, home in homes.items():
            text = path.read_text()
            if f"import {name}" in text or f"from {name}" in text:
                assert room(path) == home, path
