"""Layers whose queries see a part of the past: the rules, the attention, and the memory. A second path.

A rule about positions says what a query sees. It knows nothing of chunks, so any cut gives the same numbers. It *pins*
some positions, which all later queries see (the sinks of a window; every so many blocks), and lets a query *reach* back
over those right before it. What no query to come can see is forgotten.

Attention is again made of two: to a band of positions that ends with the query's own, and to the pinned positions
before that band. Shapes are those of attention.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chunks import Chunk
from .attention import BLOCK, Past, fold, merge
from .cache import Rows, Span
from .kernels import Kernel
from .layer_memory import MemoryUse

TILE = 128  # queries that go to a kernel at once which builds a mask for them


class QueryRun(NamedTuple):
    """Queries that see alike. Each of them sees:

    - the pinned positions before `low`;
    - from `low` on what comes before it and itself, of that the last `window`.
    """

    start: int
    stop: int
    low: int
    window: int


@dataclass(frozen=True)
class Window:
    """Query i sees j <= i with i - j < window, as Hugging Face's sliding_attention, or j < sinks.

    window: at least 1. None: full attention.
    """

    window: int | None = None
    sinks: int = 0

    @property
    def reach(self) -> int:
        """How many positions before a query at most it sees that are not pinned."""
        return 0 if self.window is None else self.window - 1

    def pinned(self, start: int, stop: int) -> list[Span]:
        """The pinned positions in between, each span (start, stop)."""
        stop = stop if self.window is None else min(stop, self.sinks)
        return [(start, stop)] if start < stop else []

    def run(self, start: int, stop: int) -> QueryRun:
        """What the queries from `start` on see, up to `stop` or as far as they see alike."""
        edge = stop if self.window is None else self.window + self.sinks  # up to here nothing is left out
        if start < edge:
            return QueryRun(start, min(stop, edge), min(start, self.sinks), edge)
        return QueryRun(start, stop, start - self.reach, self.reach + 1)

    def mask(self, length: int, start: int = 0, device: torch.device | None = None) -> Tensor | None:
        """bool (length - start, length): what the positions from `start` see; None: all that came before them."""
        if self.window is None:
            return None
        j = torch.arange(length, device=device)
        i = j[start:, None]
        return (j <= i) & ((i - j < self.window) | (j < self.sinks))


@dataclass(frozen=True)
class Strided:
    """In blocks: query i in block Q sees j <= i in the blocks K with Q - K < local, or K a multiple of stride.

    The blocks of LongGen (arXiv 2410.01485). All numbers are at least 1. stride: None: of no multiples, so that
    Strided(8192, 1, None) are the chunks of Llama 4.
    """

    block: int = 64
    local: int = 16
    stride: int | None = 16

    @property
    def reach(self) -> int:
        """See Window; the last query of a block sees most."""
        return self.block * self.local - 1

    def pinned(self, start: int, stop: int) -> list[Span]:
        """See Window."""
        if self.stride is None:
            return []
        apart = self.block * self.stride
        blocks = range(start // apart * apart, stop, apart)
        spans = [(max(start, low), min(stop, low + self.block)) for low in blocks]
        return [(low, high) for low, high in spans if low < high]

    def run(self, start: int, stop: int) -> QueryRun:
        """See Window; here those of a block see alike."""
        block = start // self.block
        return QueryRun(
            start, min(stop, (block + 1) * self.block), max(0, block - self.local + 1) * self.block, window=stop
        )

    def mask(self, length: int, start: int = 0, device: torch.device | None = None) -> Tensor:
        """See Window."""
        j = torch.arange(length, device=device)
        i = j[start:, None]
        Q, K = i // self.block, j // self.block
        far = torch.zeros_like(K, dtype=torch.bool) if self.stride is None else K % self.stride == 0
        return (j <= i) & ((Q - self.local < K) | far)


FULL = Window()
Pattern = Window | Strided


def runs(pattern: Pattern, start: int, stop: int, most: int) -> Iterator[QueryRun]:
    """What the queries of a chunk see, first to last, at most so many queries at a time."""
    while start < stop:
        run = pattern.run(start, min(stop, start + most))
        yield run
        start = run.stop


class WindowPast(Past):
    """`Past` of a layer that sees a part of it."""

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse."""
        keys, values, band, pinned = self.seen(kernel, k, v)
        parts = [kernel.forward(q[:, :, rows], keys[:, :, at], values[:, :, at], window) for rows, at, window in band]
        out, lse = (torch.cat(pieces, 2) for pieces in zip(*parts, strict=True))
        out = out.to(lse.dtype)
        for row, spans in pinned:
            keys, values = self.read(spans, k, v)
            more = kernel.forward(fold(q[:, :, row:], k.shape[1]), keys, values)
            of_rows = out[:, :, row:], lse[:, :, row:]
            more_out, more_lse = (x.reshape(y.shape) for x, y in zip(more, of_rows, strict=True))
            out[:, :, row:], lse[:, :, row:] = merge(*of_rows, more_out, more_lse)
        return out.to(q.dtype), lse

    def backward(
        self, kernel: Kernel, sends_back: bool, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v; those of the past go to the memory."""
        keys, values, band, pinned = self.seen(kernel, k, v)
        dq, dk, dv = (x.new_zeros(x.shape, dtype=lse.dtype) for x in (q, keys, values))
        for rows, at, window in band:
            grad_, q_, out_, lse_ = (x[:, :, rows] for x in (grad, q, out, lse))
            grads = kernel.backward(grad_, q_, keys[:, :, at], values[:, :, at], out_, lse_, window)
            for total, place, part in zip((dq, dk, dv), (rows, at, at), grads, strict=True):
                total[:, :, place] += part
        past = keys.shape[2] - k.shape[2]
        if sends_back:
            self.memory.add_grads(self.start - past, dk[:, :, :past], dv[:, :, :past])
        dk, dv = dk[:, :, past:], dv[:, :, past:]  # the chunk's own
        for row, spans in pinned:
            grad_, q_, out_, lse_ = (fold(x[:, :, row:], k.shape[1]) for x in (grad, q, out, lse))
            keys, values = self.read(spans, k, v)
            dq_part, *parts = kernel.backward(grad_, q_, keys, values, out_, lse_)
            dq[:, :, row:] += dq_part.reshape(dq[:, :, row:].shape)
            sizes = [stop - start for start, stop in spans]
            for (start, stop), dk_part, dv_part in zip(spans, *(x.split(sizes, 2) for x in parts), strict=True):
                if start >= self.start:
                    dk[:, :, start - self.start : stop - self.start] += dk_part
                    dv[:, :, start - self.start : stop - self.start] += dv_part
                elif sends_back:
                    self.memory.add_grads(start, dk_part, dv_part)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def seen(self, kernel: Kernel, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Any], list[Any]]:
        """What the chunk sees of the past and of itself.

        Returns the keys and values of the band, up to the chunk's end; (queries, keys, window) for each of its runs,
        both as slices; and what is pinned before it, see `pinned`.
        """
        start, C = self.start, k.shape[2]
        found = list(runs(self.memory.pattern, start, start + C, C if kernel.takes_many else TILE))
        low = found[0].low
        band = [(slice(r.start - start, r.stop - start), slice(r.low - low, r.stop - low), r.window) for r in found]
        return *self.read([(low, start), (start, start + C)], k, v), band, list(self.pinned(found))

    def pinned(self, found: Sequence[QueryRun]) -> Iterator[tuple[int, list[Span]]]:
        """Pinned positions, some BLOCK at a time, with the row of the first query of the chunk that sees them."""
        seen, start, within = 0, self.start, self.memory.pattern.pinned
        for run in found:
            some = list[Span]()
            for span in [*within(seen, min(start, run.low)), *within(max(seen, start), run.low)]:  # past, and own
                some.append(span)
                if sum(stop - start for start, stop in some) >= BLOCK:
                    yield run.start - start, some
                    some = []
            if some:
                yield run.start - start, some
            seen = max(seen, run.low)

    def read(self, spans: Sequence[Span], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values (B, G, n, D) of these positions, those of the past before the chunk's own."""
        past = self.memory.read([span for span in spans if span[0] < self.start])
        own = [slice(first - self.start, last - self.start) for first, last in spans if first >= self.start]
        keys, values = (torch.cat([x, *(y[:, :, here] for here in own)], 2) for x, y in zip(past, (k, v), strict=True))
        return keys, values


class DeviceStore:
    """Keys and values (B, G, rows, D), and sums of gradients, on the model's device."""

    early = False  # whether all sums have room from the start

    def __init__(self, heads: tuple[int, int, int], rows: int, like: Tensor, grad_dtype: torch.dtype) -> None:
        B, G, D = heads
        self.keys, self.values = like.new_empty(B, G, rows, D), like.new_empty(B, G, rows, D)
        self.heads, self.like, self.grad_dtype = heads, like, grad_dtype

    def write(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Put (B, G, n, D) into the rows from that one on."""
        here = slice(row, row + keys.shape[2])
        self.keys[:, :, here], self.values[:, :, here] = keys, values

    def pieces(self, runs: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of runs (start, stop, row of the first), (start, keys, values). A piece is gone when the next one comes."""
        for start, stop, row in runs:
            here = slice(row, row + stop - start)
            yield start, self.keys[:, :, here], self.values[:, :, here]

    def new_sums(self, count: int) -> Any:
        """Zeros for the gradients of so many positions."""
        B, G, D = self.heads
        return [self.keys.new_zeros((B, G, count, D), dtype=self.grad_dtype) for _ in range(2)]

    def add(self, sums: Any, row: int, key_grads: Tensor, value_grads: Tensor) -> None:
        """Add gradients (B, G, n, D) to the rows from that one on."""
        for total, grads in zip(sums, (key_grads, value_grads), strict=True):
            total[:, :, row : row + grads.shape[2]] += grads

    def take(self, sums: Any) -> Any:
        """What they have come to, on the device: (B, G, n, D) each."""
        return sums

    def tensors(self) -> list[Tensor]:
        """Keys and values."""
        return [self.keys, self.values]


class WindowCache:
    """The keys and values of a layer that sees a part of the past, for up to `capacity` positions; see LayerMemory.

    With a store in host memory also those of a layer that sees all of it: there all positions are pinned.

    The next chunk of the fill reads it, and each chunk that is rebuilt, the last of which begins at `capacity`. So it
    has rows for the pinned positions, for those that a rebuilt chunk reaches, and, in turn, for the last ones that were
    written, as many as the reach. The rows are in a store that `new_store(rows)` makes.

    receiving: the chunks that later ones send gradients to. Pinned positions receive some from the last chunk on, and
    have room for them from the start; the others from the next chunk that is rebuilt, and have room from then on.
    """

    kernel: Kernel | None = None

    def __init__(
        self, new_store: Callable[[int], DeviceStore], pattern: Pattern, capacity: int, receiving: Sequence[Chunk]
    ) -> None:
        self.pattern, reach = pattern, pattern.reach
        starts = [*(chunk.start for chunk in receiving), capacity]
        spans = [*pattern.pinned(0, capacity), *((max(0, start - reach), start) for start in starts)]
        self.rows, self.last = Rows(spans), 0
        if self.rows.count < capacity:  # the last chunk that is rebuilt finds what it reaches among the last ones
            self.rows, self.last = Rows(spans[:-1]), min(reach, capacity)
        self.store = new_store(self.rows.count + self.last)
        self.sums: dict[Chunk, list[tuple[int, int, Any]]] = {}  # (start, stop, sums); None: no room yet
        for chunk, following in zip(receiving, starts[1:], strict=True):
            pinned = pattern.pinned(*chunk)
            self.sums[chunk] = [(low, high, self.store.new_sums(high - low)) for low, high in pinned]
            at = max(chunk.start, following - reach)
            for low, high in [*pinned, (chunk.stop, chunk.stop)]:  # what the next one reaches, and is not pinned
                if at < low:
                    self.sums[chunk].append((at, low, self.store.new_sums(low - at) if self.store.early else None))
                at = max(at, high)

    def past(self, chunks: Sequence[Chunk], save: bool) -> Past:
        kind = Past if self.pattern == FULL else WindowPast
        return kind(self, chunks[0].start, save, self.kernel)

    def blocks(self, stop: int, size: int | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of full attention: see cache.LayerCache. The pieces are the store's, whatever `size` is."""
        return self.store.pieces([(0, stop, 0)] if stop else [])

    def write(self, chunks: Sequence[Chunk], written: tuple[Tensor, ...]) -> None:
        start, stop = chunks[0].start, chunks[-1].stop
        for low, high, row in [*self.rows.of(start, stop), *self._in_turn(max(start, stop - self.last), stop)]:
            keys, values = (x[:, :, low - start : high - start] for x in written)
            self.store.write(row, keys, values)

    def _in_turn(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, row) of the last positions written."""
        while self.last and start < stop:
            at = start % self.last
            end = min(stop, start + self.last - at)
            yield start, end, self.rows.count + at
            start = end

    def read(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values (B, G, n, D) of these positions, one span after the other."""
        runs, at = list[tuple[int, int, int]](), 0
        for start, stop in spans:
            for low, high, row in [*self.rows.of(start, stop), (stop, stop, 0)]:
                runs += [*self._in_turn(start, low), (low, high, row)]
                start = high
        B, G, D = self.store.heads
        room = (B, G, sum(stop - start for start, stop in spans), D)
        keys, values = self.store.like.new_empty(room), self.store.like.new_empty(room)
        for _, *piece in self.store.pieces([run for run in runs if run[0] < run[1]]):
            here = slice(at, at + piece[0].shape[2])
            keys[:, :, here], values[:, :, here] = piece
            at = here.stop
        return keys, values

    def add_grads(self, position: int, key_grads: Tensor, value_grads: Tensor) -> None:
        """See cache.LayerCache."""
        stop = position + key_grads.shape[2]
        for chunk, parts in self.sums.items():
            for i, (start, end, sums) in enumerate(parts if chunk.start < stop and position < chunk.stop else ()):
                low, high = max(start, position), min(end, stop)
                if low >= high:
                    continue
                if sums is None:
                    sums = self.store.new_sums(end - start)
                    parts[i] = start, end, sums
                sent = slice(low - position, high - position)
                self.store.add(sums, low - start, key_grads[:, :, sent], value_grads[:, :, sent])

    def hand_over(self, chunk: Chunk) -> tuple[Tensor, ...]:
        like, (B, G, D) = self.store.like, self.store.heads
        parts = self.sums.pop(chunk)
        if [part[:2] for part in parts] == [chunk] and parts[0][2] is not None:  # one sum is all of it: no copy
            return tuple(x.to(like.dtype) for x in self.store.take(parts[0][2]))
        totals = [like.new_zeros((B, G, chunk.stop - chunk.start, D)) for _ in range(2)]
        for start, stop, sums in parts:
            for total, part in zip(totals, () if sums is None else self.store.take(sums), strict=sums is not None):
                total[:, :, start - chunk.start : stop - chunk.start] = part
        return tuple(totals)

    def tensors(self) -> MemoryUse:
        sums = [x for parts in self.sums.values() for *_, pair in parts if pair is not None for x in pair]
        return MemoryUse(self.store.tensors(), sums)
