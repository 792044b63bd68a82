"""Where a layer has the keys and values that somebody will still ask for: of all positions, or of those that its
pattern (pattern.py) pins or has in reach; and which of them can receive gradients.

Who asks is a chunk: the next one that is run or, when the fill is done, one that is rebuilt; the last of those begins
where the memory ends. So three things are remembered, one after the other in a buffer:

- the pinned positions;
- the *stretches* that kept chunks have in reach at their starts;
- a ring of the last positions that were written, as many as the reach: whoever comes next asks for no others.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter

from ..chunks import Chunk
from .pattern import Pattern

Stretch = tuple[int, int, int]  # (start, stop, row of the first one)


@dataclass(frozen=True)
class Places:
    """Rows of a buffer, and which positions they have.

    The first rows have the pinned positions. ring: how many rows the ring has, the last ones of `rows`.
    kept: the chunks that will receive gradients. pinned_of, near_of: for each of them, the indices of its pinned
        positions, and those of its positions that the next one has in reach: (start, stop).
    pinned_slots: all pinned_of, neighbours as one, and their rows in a buffer of `pinned_slot_rows`.
    """

    pattern: Pattern
    stretches: Sequence[Stretch]
    ring: int
    rows: int
    kept: Sequence[Chunk]
    pinned_of: Sequence[tuple[int, int]]
    near_of: Sequence[tuple[int, int]]
    pinned_slots: Sequence[Stretch]
    pinned_slot_rows: int

    def writes(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """Where new positions go: (rows of the buffer, positions counted from `start`). One may go to two places."""
        row = self.pattern.pinned_before
        pinned = ((low, high, row(low)) for low, high in self.pattern.pinned(start, stop))
        recent = self._in_ring(max(start, stop - self.ring), stop)
        for places in (pinned, within(self.stretches, start, stop), recent):
            for low, high, row_of_low in places:
                yield slice(row_of_low, row_of_low + high - low), slice(low - start, high - start)

    def near(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """Where positions in reach are: (position, rows of the buffer), one run of rows after the other."""
        for low, high, row in within(self.stretches, start, stop):
            if low == start:
                yield low, slice(row, row + high - low)
                start = high
        for low, high, row in self._in_ring(start, stop):
            yield low, slice(row, row + high - low)

    def by_chunk(
        self, ranges: Sequence[tuple[int, int]], start: int, stop: int
    ) -> Iterator[tuple[Chunk, int, int, int]]:
        """(chunk, start, stop, row counted from the range's start) of what pinned_of or near_of share with these."""
        for i in range(max(0, bisect_right(ranges, start, key=itemgetter(0)) - 1), len(ranges)):
            first, last = ranges[i]
            if first >= stop:
                break
            low, high = max(start, first), min(stop, last)
            if low < high:
                yield self.kept[i], low, high, low - first

    def pinned_grads(self, chunk: Chunk) -> list[Stretch]:
        """Where the gradients of a kept chunk's pinned positions are."""
        stretches = self.pattern.pinned(*chunk)
        indices = [self.pattern.pinned_before(low) for low, _ in stretches]
        rows = [next(within(self.pinned_slots, index, index + 1))[2] for index in indices]
        return [(low, high, row) for (low, high), row in zip(stretches, rows, strict=True)]

    def _in_ring(self, start: int, stop: int) -> Iterator[Stretch]:
        while self.ring and start < stop:
            at = start % self.ring
            end = min(stop, start + self.ring - at)
            yield start, end, self.rows - self.ring + at
            start = end


@lru_cache(maxsize=8)
def places(pattern: Pattern, capacity: int, kept: tuple[Chunk, ...]) -> Places:
    """For up to `capacity` positions, where the kept chunks will receive gradients."""
    pinned = pattern.pinned_before(capacity)
    prefix = pattern.pinned(0, capacity)[:1]
    first = prefix[0][1] if prefix and prefix[0][0] == 0 else 0  # what lies before is never asked for as near
    reaches = [(max(first, start - pattern.reach), start) for start in (*(c.start for c in kept), capacity)]
    stretches, rows = joined(reaches, pinned)
    ring = 0
    if [stretch[:2] for stretch in stretches] != [(first, capacity)]:
        ring = min(pattern.reach, capacity)  # and it has what the last one asks for
        stretches, rows = joined(reaches[:-1], pinned)
    following = [*(c.start for c in kept[1:]), capacity]
    near_of = [(max(c.start, start - pattern.reach), c.stop) for c, start in zip(kept, following, strict=False)]
    pinned_of = [(pattern.pinned_before(c.start), pattern.pinned_before(c.stop)) for c in kept]
    return Places(pattern, stretches, ring, rows + ring, kept, pinned_of, near_of, *joined(pinned_of))


def joined(stretches: Iterable[tuple[int, int]], row: int = 0) -> tuple[list[Stretch], int]:
    """Stretches in order, side by side from that row on, those that overlap or touch as one; and the row after them."""
    found: list[Stretch] = []
    for start, stop in stretches:
        if found and start <= found[-1][1]:
            start, before, row = found.pop()
            stop = max(stop, before)
        if start < stop:
            found.append((start, stop, row))
            row += stop - start
    return found, row


def within(stretches: Sequence[Stretch], start: int, stop: int) -> Iterator[Stretch]:
    """What they share with what lies in between."""
    for i in range(max(0, bisect_right(stretches, start, key=itemgetter(0)) - 1), len(stretches)):
        low, high, row = stretches[i]
        if low >= stop:
            break
        if start < high:
            yield max(low, start), min(high, stop), row + max(low, start) - low
