r"""Linear layers and matrix products in float32 on a CPU, by oneDNN where torch was built with it.

Torch gives float32 products on x86 to MKL, which on AMD's processors leaves half of the vector unit
unused: a 1,000 x 784 x 200 product takes 1.9 times as long as oneDNN's. The operator used here is
the one that ``torch.compile`` puts in a linear layer's place. Elsewhere everything is torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Multiplications in a product; smaller ones are over before oneDNN's call has been prepared.
ONEDNN_FROM = 2**20


class Linear(nn.Linear):
    """``torch.nn.Linear``, with the products of :func:`product`; it differentiates once."""

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if _has_onednn(inputs) and inputs.numel() * len(self.weight) >= ONEDNN_FROM:
            return _Linear.apply(inputs, self.weight, self.bias)
        return F.linear(inputs, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return product(inputs.flatten(0, -2), weight.T, bias).unflatten(0, inputs.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        wanted = ctx.needs_input_grad
        return (
            product(flat, weight).unflatten(0, grad.shape[:-1]) if wanted[0] else None,
            outer(flat, inputs.flatten(0, -2)) if wanted[1] else None,
            flat.sum(0) if wanted[2] else None,
        )


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left @ right``, with ``bias [n]`` added to each row; no autograd.

    Args:
        left: ``[m, k]``, contiguous or the transpose of a contiguous tensor.
        right: ``[k, n]``, likewise.
        bias: ``[n]``.
    """
    if _has_onednn(left) and left.numel() * right.shape[1] >= ONEDNN_FROM:
        return torch.ops.mkldnn._linear_pointwise(left, right.T, bias, "none", [], "")
    return left @ right if bias is None else torch.addmm(bias, left, right)


def outer(left: Tensor, right: Tensor) -> Tensor:
    """``sum_i left_i right_i^T`` of rows ``[m, p]`` and ``[m, q]``; ``[p, q]``, no autograd."""
    if left.shape[1] > right.shape[1]:  # oneDNN is the faster the wider the product
        return product(right.T, left).T
    return product(left.T, right)


def _has_onednn(tensor: Tensor) -> bool:
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )
