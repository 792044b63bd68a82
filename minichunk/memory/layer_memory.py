"""A model's memory: one for each of its layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..chunks import Chunk
from ..protocol import Options, Written


def wide(x: Tensor) -> torch.dtype:
    """x's dtype, or float32 where that is wider: of sums over chunks, and of products over many tokens."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass
class MemorySpec:
    """What a layer is told that makes a memory: room for `batch` sequences of up to `capacity` positions, and for the
    gradients of the receiving chunks alone. like: a tensor of the model's dtype, on its device."""

    batch: int
    capacity: int
    receiving: Sequence[Chunk]
    options: Options
    like: Tensor


class MemoryUse(NamedTuple):
    """What a memory remembers, and the gradients that are sent back to it (empty where these do not grow)."""

    remembered: list[Tensor]
    gradients: list[Tensor]

    def bytes(self) -> tuple[int, int]:
        return sum(x.nbytes for x in self.remembered), sum(x.nbytes for x in self.gradients)


class LayerMemory(Protocol):
    """What a layer's memory is asked. All else is between it and its layer, which is handed its `past`."""

    def past(self, chunks: Sequence[Chunk], save: bool) -> Any:
        """What these adjacent chunks see of it. save: for a layer that is run twice, see attention.Past."""

    def write(self, chunks: Sequence[Chunk], written: tuple[Tensor, ...]) -> None:
        """Store what the layer wrote for these adjacent chunks."""

    def hand_over(self, chunk: Chunk) -> tuple[Tensor, ...]:
        """The gradients sent back to what this receiving chunk wrote; see protocol.Memory."""

    def tensors(self) -> MemoryUse:
        """All that grows with the length."""


class LayerMemories:
    """The memory of one training step, or of one text; a `protocol.Memory`. receiving: who is sent gradients."""

    def __init__(self, layers: Sequence[LayerMemory], receiving: Sequence[Chunk]) -> None:
        self.layers, self.receiving = list(layers), set(receiving)
        self.handed_over: set[Chunk] = set()

    def write(self, chunks: Sequence[Chunk], written: Written) -> None:
        for layer, tensors in zip(self.layers, written, strict=True):
            layer.write(chunks, tensors)

    def hand_over(self, chunk: Chunk) -> Written:
        if chunk in self.handed_over:  # a state's adjoint would go on twice, and a window's sums are gone
            raise RuntimeError(f"{chunk} has been handed its gradients already; a memory hands them over once")
        self.handed_over.add(chunk)
        return [layer.hand_over(chunk) for layer in self.layers] if chunk in self.receiving else []

    def tensors(self) -> MemoryUse:
        uses = [layer.tensors() for layer in self.layers]
        return MemoryUse([x for use in uses for x in use.remembered], [x for use in uses for x in use.gradients])
