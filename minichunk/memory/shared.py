"""A tree of chunks: rows that begin alike. What they share, the trunk, is one row; each goes on with chunks of its own.

A query of a row sees the trunk's keys and values, views that are expanded to all rows, and then its row's own. What the
rows send back to the trunk is summed over them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..chunks import Chunk
from ..errors import InputError
from .attention import Past
from .cache import LayerCache, Piece
from .kernels import Kernel
from .layer_memory import MemorySpec, MemoryUse
from .window import FULL


def shared_cache(layer: Any, spec: MemorySpec, number: int) -> "SharedCache":
    """The memory of a layer, where the rows share a trunk. Raises InputError for a layer without full attention."""
    S = spec.options.trunk
    before = [chunk for chunk in spec.receiving if chunk.start < S]
    after = [Chunk(start - S, stop - S) for start, stop in spec.receiving if start >= S]
    trunk = layer.new_memory(replace(spec, batch=1, capacity=min(S, spec.capacity), receiving=before))
    own = layer.new_memory(replace(spec, capacity=max(0, spec.capacity - S), receiving=after))
    if not isinstance(trunk, LayerCache) or trunk.pattern != FULL:
        raise InputError(f"share is for full attention, but layer {number} has a state or sees a part of the past")
    return SharedCache(trunk, own, S)


class SharedCache:
    """One layer's keys and values: `trunk` has the first S positions of all rows, `own` the others of each."""

    kernel: Kernel | None = None
    pattern = FULL

    def __init__(self, trunk: LayerCache, own: LayerCache, S: int) -> None:
        self.trunk, self.own, self.S = trunk, own, S

    def past(self, chunks: Sequence[Chunk], save: bool) -> Past:
        start = chunks[0].start
        return self.trunk.past(chunks, save) if start < self.S else SharedPast(self, start, save)

    def _place(self, chunks: Sequence[Chunk]) -> tuple[LayerCache, list[Chunk]]:
        """The cache that these chunks are in, and they as it counts them."""
        if chunks[0].start < self.S:
            return self.trunk, list(chunks)
        return self.own, [Chunk(start - self.S, stop - self.S) for start, stop in chunks]

    def write(self, chunks: Sequence[Chunk], written: tuple[Tensor, ...]) -> None:
        cache, here = self._place(chunks)
        cache.write(here, written)

    def hand_over(self, chunk: Chunk) -> tuple[Tensor, ...]:
        cache, (chunk,) = self._place([chunk])
        return cache.hand_over(chunk)

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        rows, S = self.own.rows.pair[0].shape[0], self.S
        for low, high, pair in self.trunk.pieces(start, min(stop, S)):
            yield low, high, [x.expand(rows, -1, -1, -1) for x in pair]
        for low, high, pair in self.own.pieces(max(0, start - S), stop - S):
            yield low + S, high + S, pair

    def add_grads(self, position: int, *sent: Tensor) -> None:
        if position >= self.S:
            self.own.add_grads(position - self.S, *sent)
        else:
            self.trunk.add_grads(position, *(x.sum(0, keepdim=True, dtype=self.trunk.grad_dtype) for x in sent))

    def tensors(self) -> MemoryUse:
        trunk, own = self.trunk.tensors(), self.own.tensors()
        return MemoryUse(trunk.remembered + own.remembered, trunk.gradients + own.gradients)


class SharedPast(Past):
    """What a row's own chunk sees: the trunk, and its row after it; no span goes over the end of the trunk."""

    def seen(self, kernel: Kernel, k: Tensor, v: Tensor) -> tuple[list[Any], Tensor, Tensor, list[Any]]:
        band, keys, values, _ = super().seen(kernel, k, v)
        spans = [(0, self.memory.S), (self.memory.S, self.start)]
        return band, keys, values, [(0, [span for span in spans if span[0] < span[1]])]
