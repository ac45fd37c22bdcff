"""The one-operation layers against ``nn.Sequential``, and oneDNN's products against float64."""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ucvae.models import layers
from ucvae.models.layers import Layers, outer, product, round_number

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}
# Of float32: sums of n products of N(0, 1) numbers are off by about eps * n (worst case n = 1000).
CLOSE = dict(rtol=1e-4, atol=1e-3)


@pytest.fixture(autouse=True, params=[True, False], ids=["oneDNN", "MKL"])
def library(request, monkeypatch):
    """Every test by either library, whichever is faster here."""
    monkeypatch.setattr(layers, "MKL_IS_HALF", request.param)


needs_onednn = pytest.mark.skipif(not layers._ONEDNN, reason="torch without oneDNN")


def stack(activation, *widths, last=True):
    modules = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        modules += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return Layers(*(modules[:-1] if last else modules))


def both(run, inputs):
    """``run`` of float32 inputs by oneDNN, and of the same in float64 by torch's own modules."""
    return run(*inputs), run(*(x.double() for x in inputs))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", [(300,), (30, 10), (1, 1), (2, 3)])
def test_values_and_gradients_are_nn_sequential_s(activation, last, shape):
    # Wide enough for oneDNN with 300 rows, and too small for it with 1 or 6.
    fast = stack(activation, 120, 80, 130, last=last)
    exact = nn.Sequential(*copy.deepcopy(fast)).double()
    x = torch.randn(*shape, 120, requires_grad=True)
    y = x.detach().double().requires_grad_()
    weight = torch.randn(*shape, 130)
    value, expected = fast(x), exact(y)
    torch.testing.assert_close(value.double(), expected, **CLOSE)
    (value * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad.double(), y.grad, **CLOSE)
    for one, other in zip(fast.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, **CLOSE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("where", ["input", "weight", "bias"])
def test_a_nan_is_not_hidden(activation, where):
    # oneDNN's ReLU makes 0 of it, and a run would go on with a dead unit.
    fast = stack(activation, 120, 80, 130, last=False)
    x = torch.randn(300, 120)
    with torch.no_grad():
        {"input": x, "weight": fast[2].weight, "bias": fast[2].bias}[where].flatten()[0] = torch.nan
    expected = nn.Sequential(*fast)(x).isnan()
    assert expected.any() and torch.equal(fast(x).isnan(), expected)


@needs_onednn
def test_is_one_operation_in_float32_and_torch_s_own_in_float64():
    fast = stack("relu", 120, 80, 130)
    assert fast(torch.randn(5, 120)).grad_fn.name() == "_LayersBackward"
    assert fast.double()(torch.randn(5, 120).double()).grad_fn.name() == "AddmmBackward0"


def test_an_expanded_gradient_and_inputs_of_any_layout():
    fast = stack("tanh", 64, 80, 130)
    exact = nn.Sequential(*copy.deepcopy(fast)).double()
    wide = torch.randn(50, 20, 128)
    for x in (wide[..., :64], wide[..., ::2], wide.transpose(0, 1)[..., 64:], wide[:1, :1, :64]):
        fast.zero_grad()
        exact.zero_grad()
        value, expected = fast(x), exact(x.double())
        torch.testing.assert_close(value.double(), expected, **CLOSE)
        value.sum().backward()  # a gradient of strides 0
        expected.sum().backward()
        for one, other in zip(fast.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(one.grad.double(), other.grad, **CLOSE)


def test_only_what_is_wanted_is_differentiated():
    fast = stack("relu", 120, 80, 130)
    fast[0].weight.requires_grad_(False)
    fast[2].bias.requires_grad_(False)
    fast(torch.randn(300, 120)).sum().backward()
    named = {name for name, p in fast.named_parameters() if p.grad is not None}
    assert named == {"0.bias", "2.weight"}


def test_all_but_last():
    fast = stack("tanh", 120, 80, 130)
    x = torch.randn(300, 120)
    torch.testing.assert_close(fast[2](fast.all_but_last(x)), fast(x), **CLOSE)
    assert list(fast.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("rows", [1, 7, 500])
@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
def test_product(rows, activation):
    left, right, bias = torch.randn(rows, 90), torch.randn(90, 70), torch.randn(70)
    function = {"none": lambda x: x}.get(activation) or getattr(torch, activation)
    value, expected = both(
        lambda a, b, c: (
            product(a, b, c, activation) if a.dtype == torch.float32 else function(a @ b + c)
        ),
        (left, right, bias),
    )
    torch.testing.assert_close(value.double(), expected, **CLOSE)
    # Transposes of contiguous tensors, and no bias.
    turned = product(left.T.contiguous().T, right.T.contiguous().T)
    torch.testing.assert_close(turned.double(), left.double() @ right.double(), **CLOSE)


def test_tanh_is_exact_from_tiny_to_saturated():
    """oneDNN's own, within the product. ``2 sigmoid(2 x) - 1`` would lose the tiny ones."""
    size = torch.logspace(-30, 3, 400)
    bias = torch.cat([-size, size, torch.tensor([0.0, torch.inf, -torch.inf])])
    found = product(torch.zeros(300, 90), torch.zeros(90, len(bias)), bias, "tanh")
    expected = bias.double().tanh().expand(300, -1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [3, 150, 400])
@pytest.mark.parametrize("widths", [(70, 90), (90, 70)])
def test_outer(rows, widths):
    left, right = (torch.randn(rows, width) for width in widths)
    expected = left.double().T @ right.double()
    torch.testing.assert_close(outer(left, right).double(), expected, **CLOSE)


@pytest.mark.parametrize(
    "vendor, family, half",
    [
        ("AuthenticAMD", 26, True),
        ("AuthenticAMD", 27, True),
        ("AuthenticAMD", 25, False),
        ("GenuineIntel", 26, False),
        (None, 26, False),
    ],
)
def test_where_mkl_is_half(vendor, family, half):
    lines = ["processor\t: 0", *([f"vendor_id\t: {vendor}"] if vendor else [])]
    text = "\n".join([*lines, f"cpu family\t: {family}", "model\t\t: 17", ""])
    assert layers.mkl_is_half(text) is half and not layers.mkl_is_half("")


ZEN_5 = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\n"


@pytest.mark.parametrize("found, half", [(ZEN_5, True), ("", False), (None, False), ("/", False)])
def test_the_processor_decides_at_import(monkeypatch, tmp_path, found, half):
    """By Linux's file of it; there may be none, or one that cannot be read, here a folder."""
    read_text, asked = Path.read_text, []

    def instead(path, *arguments, **settings):
        if str(path) != "/proc/cpuinfo":
            return read_text(path, *arguments, **settings)
        asked.append(path)
        (tmp_path / "cpuinfo").write_text(found or "")
        place = {None: "missing", "/": "."}.get(found, "cpuinfo")
        return read_text(tmp_path / place, *arguments, **settings)

    monkeypatch.setattr(Path, "read_text", instead)
    assert runpy.run_path(layers.__file__)["MKL_IS_HALF"] is half and asked


@needs_onednn
@pytest.mark.parametrize("rows", [1, 300])
def test_small_products_are_torch_s_own(monkeypatch, rows):
    asked = []

    def spy(left, *arguments):
        asked.append(len(left))
        return torch.zeros(len(left), 70)

    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=spy))
    product(torch.ones(rows, 90), torch.ones(90, 70), None, "tanh")
    assert asked == ([300] if rows == 300 else [])


@needs_onednn
def test_which_library_is_asked(monkeypatch):
    onednn = torch.ops.mkldnn._linear_pointwise
    asked = []

    def spy(*arguments):
        asked.append(activation)
        return onednn(*arguments)

    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=spy))
    for activation in ("none", "relu", "tanh"):
        product(torch.ones(300, 90), torch.ones(90, 70), None, activation)
    assert asked == (["none", "relu", "tanh"] if layers.MKL_IS_HALF else ["tanh"])


def test_without_onednn_the_numbers_are_the_same(monkeypatch):
    fast = stack("relu", 120, 80, 130)
    x = torch.randn(300, 120)
    value = fast(x)
    monkeypatch.setattr(layers, "_ONEDNN", False)
    assert not layers._has_onednn(x)
    torch.testing.assert_close(fast(x), value, **CLOSE)


def test_round_numbers_are_few_and_a_quarter_above_at_most():
    rounded = [round_number(count) for count in range(129)]
    assert all(count <= up <= 1.25 * count for count, up in enumerate(rounded))
    assert sorted(set(rounded)) == [
        *range(9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128
    ]  # fmt: skip
