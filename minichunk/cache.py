"""What chunk-wise training remembers: keys and values, and the gradients sent back to them.

Everything is allocated once. Chunks are written into it and read from it as views, and the
gradients that later chunks send back are added in place, so that the past is never copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .attention import Past
from .chunks import Chunk
from .config import LlamaConfig


class LayerMemory(Protocol):
    """What a layer's memory is asked; attention.py and Cache ask nothing else."""

    def past(self, start: int, keep: bool) -> Past:
        """What the chunk at `start` sees of it; keep: for a layer that recompute runs again, see Past."""

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Store the keys and values (B, G, C, D) of the chunk at `start`."""

    def pieces(self, stop: int, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (start, keys, values) of the positions up to `stop`, in pieces of at most `size`: (B, G, n, D)."""

    def add_grads(self, start: int, key_grads: Tensor, value_grads: Tensor) -> None:
        """Add the gradients (B, G, n, D) that a later chunk sends back to the n positions from `start`."""

    def received(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """The gradients sent back to one kept chunk's keys and values: (B, G, C, D)."""

    def buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        """What it consists of, for counting: tensors of keys and values, and tensors of gradients."""


class LayerCache:
    """One layer's keys and values (B, G, capacity, D), and the gradients of the kept chunks.

    kept: the chunks that will receive a gradient. Only they have space for one, chunk after
    chunk in a buffer of (B, G, sum of their lengths, D).
    """

    def __init__(
        self, shape: tuple[int, int, int, int], kept: Sequence[Chunk], like: Tensor, grad_dtype: torch.dtype
    ) -> None:
        B, G, _, D = shape
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)
        self.slots: list[tuple[int, int, int]] = []  # (start, stop, offset in the gradient buffer)
        room = 0
        for start, stop in kept:
            if self.slots and self.slots[-1][1] == start:  # adjacent chunks share a slot
                first, _, offset = self.slots.pop()
                self.slots.append((first, stop, offset))
            else:
                self.slots.append((start, stop, room))
            room += stop - start
        self.key_grads = like.new_zeros((B, G, room, D), dtype=grad_dtype)
        self.value_grads = like.new_zeros((B, G, room, D), dtype=grad_dtype)

    def past(self, start: int, keep: bool) -> Past:
        return Past(self, start, keep)

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        rows = slice(start, start + keys.shape[2])
        self.keys[:, :, rows] = keys
        self.values[:, :, rows] = values

    def pieces(self, stop: int, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        for start in range(0, stop, size):
            rows = slice(start, min(start + size, stop))
            yield start, self.keys[:, :, rows], self.values[:, :, rows]

    def add_grads(self, start: int, key_grads: Tensor, value_grads: Tensor) -> None:
        end = start + key_grads.shape[2]
        for first, stop, offset in self.slots:
            low, high = max(first, start), min(stop, end)
            if low < high:
                slot, sent = slice(offset + low - first, offset + high - first), slice(low - start, high - start)
                self.key_grads[:, :, slot] += key_grads[:, :, sent]
                self.value_grads[:, :, slot] += value_grads[:, :, sent]

    def received(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        first, _, offset = next(slot for slot in self.slots if slot[0] <= chunk.start < slot[1])
        rows = slice(offset + chunk.start - first, offset + chunk.stop - first)
        return self.key_grads[:, :, rows], self.value_grads[:, :, rows]

    def buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.keys, self.values], [self.key_grads, self.value_grads]


class Cache:
    """The memory of one training step (or of one generated text), for all layers.

    config: the model's. batch: B. capacity: positions with keys and values.
    kept: the chunks that will receive gradients, first to last.
    like: a tensor with the model's dtype and device.
    grad_dtype: of the gradients' sum; None: float32, or the model's dtype where that is wider.
    offload: keep all of it in host memory, see offload.py.
    dropout_seed: from which a rebuild draws the same dropout masks as the fill; None: ordinary dropout.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        like: Tensor,
        kept: Sequence[Chunk] = (),
        grad_dtype: torch.dtype | None = None,
        dropout_seed: int | None = None,
        offload: bool = False,
    ) -> None:
        G, D, num_layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
        grad_dtype = grad_dtype or torch.promote_types(like.dtype, torch.float32)
        self.layers: list[LayerMemory]
        if offload:
            from .offload import OffloadedLayer, Stage

            stage = Stage((2, batch, G, D), like, grad_dtype)
            self.layers = [OffloadedLayer(stage, capacity, kept) for _ in range(num_layers)]
        else:
            shape = (batch, G, capacity, D)
            self.layers = [LayerCache(shape, kept, like, grad_dtype) for _ in range(num_layers)]
        self.kept = set(kept)
        self.dropout_seed = dropout_seed

    def write(self, start: int, written: Sequence[Tensor]) -> None:
        """Store what a chunk at `start` wrote: keys and values of each layer in turn."""
        for layer, keys, values in zip(self.layers, written[::2], written[1::2], strict=True):
            layer.write(start, keys, values)

    def received(self, chunk: Chunk, written: Sequence[Tensor]) -> list[Tensor]:
        """What later chunks sent back to `written`, in its order and dtype; [] where nothing can have been."""
        if chunk not in self.kept:
            return []
        grads = (grad for layer in self.layers for grad in layer.received(chunk))
        return [grad.to(tensor.dtype) for grad, tensor in zip(grads, written, strict=True)]


def bytes_per_position(config: LlamaConfig, dtype: torch.dtype, grad_dtype: torch.dtype | None) -> tuple[int, int]:
    """Bytes of one position's keys and values in all layers, and of their gradients; grad_dtype: as in Cache."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * dtype.itemsize, numbers * (grad_dtype or torch.promote_types(dtype, torch.float32)).itemsize
