"""What a query sees: rules about positions. Full attention is one of them.

A rule knows nothing of chunks. It *pins* some positions, which all later queries see (the sinks of a window; every so
many blocks; with full attention, all), and lets a query *reach* back over those right before it, the band.

In a row of several documents it is about the positions of each, counted from where the document begins.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..chunks import Documents

Span = tuple[int, int]  # positions: (start, stop)


class QueryRun(NamedTuple):
    """Queries that see alike: the pinned positions before `low`, and from there to their own the last `window`."""

    start: int
    stop: int
    low: int
    window: int


@dataclass(frozen=True)
class Window:
    """Query i sees j <= i with i - j < window (>= 1; None: all), as Hugging Face's sliding_attention, or j < sinks."""

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
        if self.window is None:  # all that came before is pinned
            return QueryRun(start, stop, start, stop)
        edge = self.window + self.sinks  # up to here nothing is left out
        if start < edge:
            return QueryRun(start, min(stop, edge), min(start, self.sinks), edge)
        return QueryRun(start, stop, start - self.reach, self.window)

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

    The blocks of LongGen (arXiv 2410.01485). All numbers are at least 1. stride: None: of no multiples, as in Llama 4.
    """

    block: int = 64
    local: int = 16
    stride: int | None = 16

    @property
    def reach(self) -> int:
        return self.block * self.local - 1

    def pinned(self, start: int, stop: int) -> list[Span]:
        if self.stride is None:
            return []
        apart = self.block * self.stride
        blocks = range(start // apart * apart, stop, apart)
        spans = [(max(start, low), min(stop, low + self.block)) for low in blocks]
        return [(low, high) for low, high in spans if low < high]

    def run(self, start: int, stop: int) -> QueryRun:
        block = start // self.block
        low = max(0, block - self.local + 1) * self.block
        return QueryRun(start, min(stop, (block + 1) * self.block), low, stop)

    def mask(self, length: int, start: int = 0, device: torch.device | None = None) -> Tensor:
        j = torch.arange(length, device=device)
        i = j[start:, None]
        Q, K = i // self.block, j // self.block
        far = torch.zeros_like(K, dtype=torch.bool) if self.stride is None else K % self.stride == 0
        return (j <= i) & ((Q - self.local < K) | far)


FULL = Window()
Pattern = Window | Strided


def pinned(pattern: Pattern, documents: Documents, start: int, stop: int) -> list[Span]:
    """What is pinned in between, as far as a later chunk sees it: nothing of a document that no chunk cuts."""
    spans = []
    for begin, end in documents.between(start, stop):
        if end - begin > documents.chunk_size or begin < documents.trunk:
            spans += shifted(pattern.pinned(max(start, begin) - begin, min(stop, end) - begin), begin)
    return spans


def shifted(spans: Sequence[Span], by: int) -> list[Span]:
    return [(start + by, stop + by) for start, stop in spans]


Seen = tuple[int, int, list[Span]]  # what all queries from one position up to another see of what is pinned


def runs(
    pattern: Pattern, documents: Documents, start: int, stop: int, most: int
) -> Iterator[tuple[QueryRun, list[Seen]]]:
    """What the queries of a chunk see, first to last, at most so many at a time. With each run comes what is pinned
    before its `low` and did not come with an earlier run of its document: positions of the past and of the chunk."""
    trunk = documents.trunk
    for begin, end in documents.between(start, stop):
        first, last = max(start, begin), min(stop, end)
        seen: list[Seen] = []
        if trunk and first == max(start, trunk):  # from here on, all see the trunk
            seen.append((first, stop, FULL.pinned(0, min(start, trunk)) + FULL.pinned(start, trunk)))
        at, until, inside = first - begin, 0, first - begin
        while at < last - begin:
            run = pattern.run(at, min(last - begin, at + most))
            spans = pattern.pinned(until, min(inside, run.low)) + pattern.pinned(max(until, inside), run.low)
            seen.append((run.start + begin, last, shifted(spans, begin)))
            yield QueryRun(run.start + begin, run.stop + begin, run.low + begin, run.window), seen
            at, until, seen = run.stop, max(until, run.low), []
