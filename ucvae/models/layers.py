r"""Fully connected layers, and matrix products in float32 on a CPU by whichever library is faster.

Torch gives float32 products on x86 to MKL, which on AMD's processors uses 256 bits of the vector
unit at a time. From Zen 5 on that is half of it: on such a machine a 1,000 x 784 x 200 product took
1.9 times as long as oneDNN's, on Zen 4 as long. So oneDNN is taken there, and MKL elsewhere, which
keeps no memory for each shape that it has seen. Layers with a tanh are oneDNN's everywhere: within
its product the tanh takes a fifth of the time of torch's. The operator used here is the one that
``torch.compile`` puts in the place of a linear layer whose weights are constants. Beside float32 on
a CPU everything is torch's own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Multiplications in a product; smaller ones are over before oneDNN's call has been prepared.
ONEDNN_FROM = 2**18

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_CPUINFO = Path("/proc/cpuinfo")
_ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh"}


class Layers(nn.Sequential):
    """Linear layers and activations (ReLU, tanh) in turn, the first a linear one.

    The result is that of ``nn.Sequential``, but for rounding, and so are the parameters' names.
    On a CPU in float32 it is one operation, which differentiates once.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in]``, at least two-dimensional, to ``[..., out]``."""
        return _run(list(self), inputs)

    def all_but_last(self, inputs: Tensor) -> Tensor:
        """What the last layer is given, ``[..., hidden]``."""
        return _run(list(self)[:-1], inputs)


def _run(layers: list[nn.Module], inputs: Tensor) -> Tensor:
    if not _has_onednn(inputs):
        for layer in layers:
            inputs = layer(inputs)
        return inputs
    activations: list[str] = []
    parameters: list[Tensor] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            activations.append("none")
            parameters += [layer.weight, layer.bias]
        else:
            activations[-1] = _ACTIVATIONS[type(layer)]
    return _Layers.apply(inputs, activations, *parameters)


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, activations: list[str], *parameters: Tensor) -> Tensor:
        values = [inputs.flatten(0, -2)]
        for name, weight, bias in zip(activations, parameters[::2], parameters[1::2], strict=True):
            values.append(product(values[-1], weight.T, bias, name))
        ctx.activations = activations
        ctx.save_for_backward(*values, *parameters[::2])
        return values[-1].unflatten(0, inputs.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        depth = len(ctx.activations)
        values, weights = ctx.saved_tensors[: depth + 1], ctx.saved_tensors[depth + 1 :]
        wanted = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        to_parameters: list[Tensor | None] = [None] * (2 * depth)
        for i in reversed(range(depth)):
            if ctx.activations[i] == "relu":
                flat = torch.ops.aten.threshold_backward(flat, values[i + 1], 0)
            elif ctx.activations[i] == "tanh":
                flat = torch.ops.aten.tanh_backward(flat, values[i + 1])
            if wanted[2 + 2 * i]:
                to_parameters[2 * i] = outer(flat, values[i])
            if wanted[3 + 2 * i]:
                to_parameters[2 * i + 1] = flat.sum(0)
            if i or wanted[0]:
                flat = product(flat, weights[i])
        to_inputs = flat.unflatten(0, grad.shape[:-1]) if wanted[0] else None
        return to_inputs, None, *to_parameters


def product(
    left: Tensor, right: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``activation(left @ right + bias)``, the bias added to each row; no autograd.

    Args:
        left: ``[m, k]``.
        right: ``[k, n]``.
        bias: ``[n]``.
        activation: ``none``, ``relu`` or ``tanh``.
    """
    large = left.numel() * right.shape[1] >= ONEDNN_FROM
    if large and (MKL_IS_HALF or activation == "tanh") and _has_onednn(left):
        # oneDNN's ReLU makes 0 of NaN, which nobody would then see.
        within = "tanh" if activation == "tanh" else "none"
        result = torch.ops.mkldnn._linear_pointwise(left, right.T, bias, within, [], "")
        return result.relu_() if activation == "relu" else result
    result = torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)
    return result if activation == "none" else getattr(result, f"{activation}_")()


def outer(left: Tensor, right: Tensor) -> Tensor:
    """``sum_i left_i right_i^T`` of rows ``[m, p]`` and ``[m, q]``; ``[p, q]``, no autograd."""
    # oneDNN is the faster the wider the product; with few rows, turning it back costs more.
    if left.shape[1] > right.shape[1] and len(left) > 200:
        return product(right.T, left).T
    return product(left.T, right)


def round_number(count: int) -> int:
    """The next number, ``count`` or more, of at most three binary digits before its zeros.

    A library prepares its products anew for each number of rows, at the price of several products,
    and keeps what it has prepared: oneDNN half a MiB or more for each. So where the number of rows
    differs from call to call, it had better be one of few.
    """
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


def mkl_is_half(cpuinfo: str) -> bool:
    """Whether it describes a processor of AMD's from Zen 5, its family 26, on."""
    vendor = re.search(r"^vendor_id\s*: (\w+)$", cpuinfo, re.MULTILINE)
    family = re.search(r"^cpu family\s*: (\d+)$", cpuinfo, re.MULTILINE)
    if not (vendor and family):
        return False
    return vendor[1] == "AuthenticAMD" and int(family[1]) >= 26


def _processor() -> str:
    """What Linux tells of the processor; nothing elsewhere, or where it may not be read."""
    try:
        return _CPUINFO.read_text(errors="replace")
    except OSError:
        return ""


# By the processor and not by a clock: a run must be the same when it is started again.
MKL_IS_HALF = mkl_is_half(_processor())


def _has_onednn(tensor: Tensor) -> bool:
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and _ONEDNN
        and bool(torch.backends.mkldnn.enabled)
    )
