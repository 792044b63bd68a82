"""Keys and values: what chunks leave behind in attention layers, and the gradients that are sent back to them.

Everything is allocated once. Chunks are written into it and read from it as views, and the
gradients that later chunks send back are added in place, so that the past is never copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..chunks import Chunk, span
from .attention import Past
from .kernels import Kernel
from .layers import Held


@lru_cache(maxsize=4)
def slots_of(kept: tuple[Chunk, ...]) -> tuple[list[tuple[int, int, int]], int]:
    """Where the gradients of kept chunks are, as (start, stop, offset in the buffer), and how long that must be."""
    slots: list[tuple[int, int, int]] = []
    room = 0
    for start, stop in kept:
        if slots and slots[-1][1] == start:  # adjacent chunks share a slot
            first, _, offset = slots.pop()
            slots.append((first, stop, offset))
        else:
            slots.append((start, stop, room))
        room += stop - start
    return slots, room


class LayerCache:
    """One layer's keys and values (B, G, capacity, D), and the gradients of the kept chunks.

    kept: the chunks that will receive a gradient. Only they have space for one, chunk after
    chunk in a buffer of (B, G, sum of their lengths, D).
    kernel: of the attention; None: the best one for the device and dtype.
    """

    kernel: Kernel | None = None

    def __init__(
        self, shape: tuple[int, int, int, int], kept: Sequence[Chunk], like: Tensor, grad_dtype: torch.dtype
    ) -> None:
        B, G, _, D = shape
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)
        self.slots, room = slots_of(tuple(kept))
        self.key_grads = like.new_zeros((B, G, room, D), dtype=grad_dtype)
        self.value_grads = like.new_zeros((B, G, room, D), dtype=grad_dtype)

    def past(self, chunks: Sequence[Chunk], keep: bool) -> Past:
        return Past(self, chunks[0].start, keep, self.kernel)

    def write(self, chunks: Sequence[Chunk], written: tuple[Tensor, ...]) -> None:
        keys, values = written  # (B, G, C, D)
        rows = span(chunks)
        self.keys[:, :, rows] = keys
        self.values[:, :, rows] = values

    def pieces(self, start: int, stop: int, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        for low in range(start, stop, size):
            rows = slice(low, min(low + size, stop))
            yield low, self.keys[:, :, rows], self.values[:, :, rows]

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
        return self.key_grads[:, :, rows].to(self.keys.dtype), self.value_grads[:, :, rows].to(self.values.dtype)

    def tensors(self) -> Held:
        return Held([self.keys, self.values], [self.key_grads, self.value_grads])
