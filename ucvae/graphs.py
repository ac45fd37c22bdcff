"""CUDA graphs: work that is the same at each call, launched as a whole.

A step of a small network is some hundred kernels of a few microseconds each, which take longer to
launch than to run. A CUDA graph records them once and launches them together. What is drawn from a
generator goes on from where the generator stands at each replay, so that the numbers are those of
the calls themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Calls of a shape before it is captured: libraries set up in the first what they keep.
WARM_UP = 3


class _Graph(NamedTuple, Generic[T]):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: T


class Replayed(Generic[T]):
    """A function on a GPU, replayed as a CUDA graph after its first calls.

    Each shape of the inputs has a graph of its own. The function may change tensors in place, as an
    optimizer does; those must stay where they are. It must launch the same kernels on the same
    memory at each call, and must not wait for the device.

    Args:
        function: of tensors on the device; its result is given back, and lies where the next call
            overwrites it.
        generator: the one source of the function's randomness, on the device.
    """

    def __init__(self, function: Callable[..., T], generator: torch.Generator) -> None:
        self.function = function
        self.generator = generator
        self.stream = torch.cuda.Stream(generator.device)
        self.calls: dict[tuple[torch.Size, ...], int] = {}
        self.graphs: dict[tuple[torch.Size, ...], _Graph[T]] = {}

    def __call__(self, *inputs: Tensor) -> T:
        """The function of these inputs, which differ from call to call in their values at most."""
        shapes = tuple(tensor.shape for tensor in inputs)
        calls = self.calls[shapes] = self.calls.get(shapes, 0) + 1
        if calls <= WARM_UP:
            # On the stream of the capture, so that what a stream keeps is there.
            current = torch.cuda.current_stream(self.generator.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            current.wait_stream(self.stream)
            return outputs
        if shapes not in self.graphs:
            self.graphs[shapes] = self._capture(inputs)
        found = self.graphs[shapes]
        for static, given in zip(found.inputs, inputs, strict=True):
            static.copy_(given)
        found.graph.replay()
        return found.outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Graph[T]:
        static = tuple(tensor.clone() for tensor in inputs)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, stream=self.stream):
            outputs = self.function(*static)
        return _Graph(graph, static, outputs)
