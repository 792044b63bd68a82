"""Keys and values: what chunks leave behind in attention layers, and the gradients that are sent back to them.

Their room is there from the start. Chunks are written into it and read from it as views, and the gradients that later
chunks send back are added in place, so that the past is never copied.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..chunks import ONE, Chunk, Documents
from ..errors import InputError
from .attention import Past
from .kernels import Kernel
from .layer_memory import MemoryUse
from .window import FULL, Pattern, Span, pinned

Shape = tuple[int, int, int, int]  # (B, G, positions, D) of keys, and of values
Piece = tuple[int, int, list[Tensor]]  # start, stop, and keys and values of these positions, (B, G, stop - start, D)


class Rows:
    """Keys and values, or the gradients of both, of some spans of positions alone: a pair of (B, G, rows, D), zeros."""

    def __init__(self, shape: Shape, like: Tensor, dtype: torch.dtype, spans: Iterable[Span]) -> None:
        self.spans = joined(spans)
        room = (*shape[:2], sum(stop - start for start, stop in self.spans), shape[3])
        self.pair = [like.new_zeros(room, dtype=dtype) for _ in range(2)]

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """What has rows among these positions: views."""
        row = 0
        for first, last in self.spans:
            low, high = max(start, first), min(stop, last)
            if low < high:
                yield low, high, [x[:, :, row + low - first : row + high - first] for x in self.pair]
            row += last - first

    def add(self, position: int, *sent: Tensor) -> None:
        """Add (B, G, n, D) each to the n positions from that one on, as far as they have rows."""
        for low, high, pair in self.pieces(position, position + sent[0].shape[2]):
            for total, grads in zip(pair, sent, strict=True):
                total += grads[:, :, low - position : high - position]


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same positions, in order; spans that touch or overlap become one."""
    found: list[Span] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            start, before = found.pop()
            stop = max(stop, before)
        if start < stop:
            found.append((start, stop))
    return found


class LayerCache:
    """One layer's keys and values of as many positions as `shape` has, (B, G, positions, D); see LayerMemory.

    It has rows for the pinned positions, with full attention all (but of documents that no chunk cuts); for those that
    a rebuilt chunk reaches, the last of which begins where the positions end; and, in turn, for the last ones that were
    written.

    receiving, like: see MemorySpec. The gradients sent back are summed in `grad_dtype`: pinned positions have room for
    them from the start, the others from the next chunk that is rebuilt on.
    kernel: of the attention; None: the best one for the device and dtype.
    """

    kernel: Kernel | None = None

    def __init__(
        self, shape: Shape, receiving: Sequence[Chunk], like: Tensor, grad_dtype: torch.dtype,
        pattern: Pattern = FULL, documents: Documents = ONE,
    ) -> None:  # fmt: skip
        if documents.trunk and pattern != FULL:
            raise InputError("share is for full attention, but a layer sees a part of the past")
        self.documents, self.pinned_in = documents, partial(pinned, pattern, documents)
        self.pattern, self.dtype, self.grad_dtype = pattern, like.dtype, grad_dtype
        self.new_rows = partial(Rows, shape, like)
        capacity, reach = shape[2], pattern.reach
        starts = [*(chunk.start for chunk in receiving), capacity]
        spans, turns = [*self.pinned_in(0, capacity), *((max(0, start - reach), start) for start in starts)], 0
        if joined(spans) != [(0, capacity)]:  # the last chunk that is rebuilt finds what it reaches among the last ones
            spans, turns = spans[:-1], min(reach, capacity)
        self.rows, self.last = self.new_rows(like.dtype, spans), self.new_rows(like.dtype, [(0, turns)])
        self.pinned = self.new_rows(grad_dtype, [span for chunk in receiving for span in self.pinned_in(*chunk)])
        reached = zip(receiving, starts[1:], strict=True)  # by the next chunk that is rebuilt
        self.reached = {chunk: (max(chunk.start, start - reach), chunk.stop) for chunk, start in reached}
        self.sums: dict[Chunk, Rows] = {}  # of what is reached, as soon as something has been sent there

    def past(self, chunks: Sequence[Chunk], save: bool) -> Past:
        return Past(self, chunks[0].start, save)

    def write(self, chunks: Sequence[Chunk], written: tuple[Tensor, ...]) -> None:
        start = chunks[0].start
        for low, high, pair in self.pieces(start, chunks[-1].stop):
            for x, new in zip(pair, written, strict=True):
                x.copy_(new[:, :, low - start : high - start])

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """The same of these positions; what has no row of its own is among the last ones."""
        turns = self.last.pair[0].shape[2]
        for piece in [*self.rows.pieces(start, stop), None]:
            end = piece[0] if piece else stop
            start = max(start, end - turns)
            while start < end:
                shift = start // turns * turns
                ((_, last, pair),) = self.last.pieces(start - shift, end - shift)
                yield start, last + shift, pair
                start = last + shift
            if piece:
                yield piece
                start = piece[1]

    def add_grads(self, position: int, key_grads: Tensor, value_grads: Tensor) -> None:
        """Add the gradients (B, G, n, D) that a later chunk sends back to the n positions from that one."""
        stop = position + key_grads.shape[2]
        self.pinned.add(position, key_grads, value_grads)
        if self.pinned_in(position, stop) != [(position, stop)]:  # a band
            for chunk, (low, high) in self.reached.items():
                if position < high and low < stop:
                    self.sums[chunk] = self.sums.get(chunk) or self.new_rows(self.grad_dtype, [(low, high)])
                    self.sums[chunk].add(position, key_grads, value_grads)

    def hand_over(self, chunk: Chunk) -> tuple[Tensor, ...]:
        parts = [*self.sums.pop(chunk).pieces(*chunk)] if chunk in self.sums else []
        parts += self.pinned.pieces(*chunk)  # last, for what is pinned is complete here alone
        if [part[:2] for part in parts] == [chunk]:  # no copy
            return tuple(x.to(self.dtype) for x in parts[0][2])
        whole = self.new_rows(self.dtype, [chunk])
        for low, high, pair in parts:
            for x, new in zip(whole.pair, pair, strict=True):
                x[:, :, low - chunk.start : high - chunk.start] = new
        return tuple(whole.pair)

    def tensors(self) -> MemoryUse:
        sums = [x for rows in (self.pinned, *self.sums.values()) for x in rows.pair]
        return MemoryUse([*self.rows.pair, *self.last.pair], sums)
