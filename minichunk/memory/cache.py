"""Keys and values: what chunks leave behind in attention layers, and the gradients that are sent back to them.

Room for keys and values is there from the start. Chunks are written into it and read from it as views, and the
gradients that later chunks send back are added in place, so that the past is never copied. places.py knows what is
remembered where: everything, where the layer sees everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..chunks import Chunk
from .attention import Past
from .kernels import Kernel
from .layer_memory import MemoryUse
from .pattern import FULL, Pattern
from .places import Stretch, places, within


class LayerCache:
    """One layer's keys and values of up to `capacity` positions, as far as the pattern needs them, (B, G, rows, D).

    kept: the chunks that will receive a gradient. Only they have space for one: for their pinned positions, which the
    last chunk sees already, from the start, as key_grads and value_grads (B, G, rows, D); for what is in reach of the
    chunks right after them from the first that arrives until it is received.
    kernel: of the attention; None: the best one for the device and dtype.
    """

    kernel: Kernel | None = None

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        kept: Sequence[Chunk],
        like: Tensor,
        grad_dtype: torch.dtype,
        pattern: Pattern = FULL,
    ) -> None:
        B, G, capacity, D = shape
        self.pattern, self.places = pattern, places(pattern, capacity, tuple(kept))
        self.keys, self.values = (like.new_empty((B, G, self.places.rows, D)) for _ in range(2))
        slots = (B, G, self.places.pinned_slot_rows, D)
        self.key_grads, self.value_grads = (like.new_zeros(slots, dtype=grad_dtype) for _ in range(2))
        self.near_grads: dict[Chunk, tuple[Tensor, Tensor]] = {}

    def past(self, chunks: Sequence[Chunk], save: bool) -> Past:
        return Past(self, chunks[0].start, save, self.kernel)

    def write(self, chunks: Sequence[Chunk], written: tuple[Tensor, ...]) -> None:
        keys, values = written  # (B, G, C, D)
        for rows, part in self.places.writes(chunks[0].start, chunks[-1].stop):
            self.keys[:, :, rows] = keys[:, :, part]
            self.values[:, :, rows] = values[:, :, part]

    def pinned(self, count: int, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        for low in range(0, count, size):
            rows = slice(low, min(low + size, count))
            yield low, self.keys[:, :, rows], self.values[:, :, rows]

    def near(self, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        for position, rows in self.places.near(start, stop):
            yield position, self.keys[:, :, rows], self.values[:, :, rows]

    def add_pinned_grads(self, index: int, key_grads: Tensor, value_grads: Tensor) -> None:
        for low, high, row in within(self.places.pinned_slots, index, index + key_grads.shape[2]):
            slot, sent = slice(row, row + high - low), slice(low - index, high - index)
            self.key_grads[:, :, slot] += key_grads[:, :, sent]
            self.value_grads[:, :, slot] += value_grads[:, :, sent]

    def add_near_grads(self, position: int, key_grads: Tensor, value_grads: Tensor) -> None:
        B, G, n, D = key_grads.shape
        for chunk, low, high, row in self.places.by_chunk(self.places.near_of, position, position + n):
            if chunk not in self.near_grads:
                rows = (B, G, row + chunk.stop - low, D)
                self.near_grads[chunk] = self.key_grads.new_zeros(rows), self.value_grads.new_zeros(rows)
            for total, sent in zip(self.near_grads[chunk], (key_grads, value_grads), strict=True):
                total[:, :, row : row + high - low] += sent[:, :, low - position : high - position]

    def hand_over(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        near, pinned = self.near_grads.pop(chunk, (None, None)), self.places.pinned_grads(chunk)
        keys = self._received(chunk, near[0], self.key_grads, pinned)
        values = self._received(chunk, near[1], self.value_grads, pinned)
        return keys.to(self.keys.dtype), values.to(self.values.dtype)

    def _received(self, chunk: Chunk, near: Tensor | None, grads: Tensor, pinned: Sequence[Stretch]) -> Tensor:
        """The gradients of a chunk's keys, or of its values, from those of its near and of its pinned positions."""
        start, stop = chunk
        if near is None and [stretch[:2] for stretch in pinned] == [(start, stop)]:  # all of them: no copy
            return grads[:, :, pinned[0][2] :][:, :, : stop - start]
        B, G, _, D = grads.shape
        total = grads.new_zeros((B, G, stop - start, D))
        for low, high, row in pinned:
            total[:, :, low - start : high - start] = grads[:, :, row : row + high - low]
        if near is not None:
            total[:, :, -near.shape[2] :] += near
        return total

    def tensors(self) -> MemoryUse:
        near = [x for pair in self.near_grads.values() for x in pair]
        return MemoryUse([self.keys, self.values], [self.key_grads, self.value_grads, *near])
