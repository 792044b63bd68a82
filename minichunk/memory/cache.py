"""Keys and values: what chunks leave behind in attention layers, and the gradients that are sent back to them.

Everything is allocated once. Chunks are written into it and read from it as views, and the
gradients that later chunks send back are added in place, so that the past is never copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..chunks import Chunk, span
from .attention import Past
from .kernels import Kernel


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

    def past(self, chunks: Sequence[Chunk], keep: bool) -> Past:
        return Past(self, chunks[0].start, keep, self.kernel)

    def write(self, chunks: Sequence[Chunk], written: tuple[Tensor, ...]) -> None:
        keys, values = written  # (B, G, C, D)
        rows = span(chunks)
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
        return self.key_grads[:, :, rows].to(self.keys.dtype), self.value_grads[:, :, rows].to(self.values.dtype)
