"""No random number of the package comes from a global generator (trap 10)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ucvae"
# Functions of torch that take a generator, and must be given one.
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
# Those that take none.
WITHOUT = {"rand_like", "randn_like", "randint_like", "sample", "rsample", "dropout"}
IN_PLACE = {"normal_", "uniform_", "bernoulli_", "exponential_", "random_", "cauchy_"}


def global_draws(source, initialises=False):
    """Lines that draw from a global generator; ``initialises`` lets in-place draws pass."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "")]
            if {"random", "torch.distributions"} & set(names):
                yield node.lineno
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, keywords = node.func.attr, {keyword.arg for keyword in node.keywords}
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        must = (of_torch and name in DRAWS) or (name in IN_PLACE and not initialises)
        if name in WITHOUT or (must and "generator" not in keywords):
            yield node.lineno


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_every_draw_names_its_generator(path):
    # Networks are initialised from torch's global generator, which training seeds and gives back.
    room = path.relative_to(PACKAGE).parts[0]
    assert not list(global_draws(path.read_text(), initialises=room == "models"))


@pytest.mark.parametrize(
    "line",
    [
        "torch.randn(3)",
        "torch.rand(3, device=device)",
        "torch.distributions.Normal(0, 1).rsample()",
        "q.sample((3,))",
        "torch.randn_like(mean)",
        "torch.empty(3).normal_()",
        "import random",
        "from torch.distributions import Normal",
    ],
)
def test_a_draw_without_one_is_found(line):
    assert list(global_draws(line)) == [1]
    assert not list(global_draws("torch.randn(3, generator=generator)"))
