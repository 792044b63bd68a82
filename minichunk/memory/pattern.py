"""What a query sees: a rule about positions, which knows nothing of chunks; and into which parts a chunk falls by it.

Because the rule knows nothing of chunks, any cut gives the same numbers: chunks of the fill, chunks of the rebuild, a
text that is written token by token.

A pattern *pins* some positions, which every later query sees, and *reaches* back over those right before a query. Full
attention pins all; a window pins the sinks, and reaches over the window; strided blocks pin every so manieth block.
What is neither pinned nor in reach of anything to come can be forgotten, see places.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Queries of a chunk that see alike, at the positions from `start` to `stop`: in tiles of `length`, each of which
    sees the `reach` positions before it and itself, as far as they are the last `window` up to a query's own; and all
    of them the first `pinned` of the pinned positions, which lie before any tile's reach.
    """

    start: int
    stop: int
    length: int
    reach: int
    window: int
    pinned: int


def whole(start: int, stop: int, pinned: int) -> Part:
    """Queries that see everything before them, of which the first `pinned` positions are pinned."""
    return Part(start, stop, stop - start, start - pinned, stop - pinned, pinned)


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

    def pinned(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The stretches of pinned positions in between, each (start, stop)."""
        stop = stop if self.window is None else min(stop, self.sinks)
        return [(start, stop)] if start < stop else []

    def pinned_before(self, position: int) -> int:
        """How many pinned positions lie before this one."""
        return position if self.window is None else min(position, self.sinks)

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """Up to window + sinks nothing is left out, and from there on the sinks lie before the band: no overlap."""
        edge = stop if self.window is None else min(stop, self.window + self.sinks)
        if start < edge:
            yield whole(start, edge, self.pinned_before(start))
        if self.window is not None and edge < stop:
            first = max(start, edge)
            yield Part(first, stop, stop - first, self.window - 1, self.window, self.sinks)

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

    The blocks of LongGen (arXiv 2410.01485). All numbers are at least 1.
    """

    block: int = 64
    local: int = 16
    stride: int = 16

    @property
    def reach(self) -> int:
        """See Window; the last query of a block sees most."""
        return self.block * self.local - 1

    def pinned(self, start: int, stop: int) -> list[tuple[int, int]]:
        """See Window."""
        apart = self.block * self.stride
        blocks = range(start // apart * apart, stop, apart)
        stretches = [(max(start, low), min(stop, low + self.block)) for low in blocks]
        return [(low, high) for low, high in stretches if low < high]

    def pinned_before(self, position: int) -> int:
        """See Window."""
        rounds, rest = divmod(position, self.block * self.stride)
        return rounds * self.block + min(rest, self.block)

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """A block is a tile. Up to the local blocks and one more, the pinned first one, nothing is left out."""
        edge = min(stop, self.block * (self.local + 1))
        if start < edge:
            yield whole(start, edge, min(start, self.block))
        start = max(start, edge)
        while start < stop:
            block, inside = divmod(start, self.block)
            length = min(self.block - inside, stop - start)
            far = (block - self.local) // self.stride + 1  # pinned blocks that are not among the local ones
            tiles = 1
            if length == self.block:  # and the ones after it up to where another pinned block is left behind
                tiles = min(stop // self.block, far * self.stride + self.local) - block
            reach = (self.local - 1) * self.block + inside
            yield Part(start, start + tiles * length, length, reach, reach + length, far * self.block)
            start += tiles * length

    def mask(self, length: int, start: int = 0, device: torch.device | None = None) -> Tensor:
        """bool (length - start, length): what the positions from `start` see."""
        j = torch.arange(length, device=device)
        i = j[start:, None]
        Q, K = i // self.block, j // self.block
        return (j <= i) & ((Q - self.local < K) | (K % self.stride == 0))


FULL = Window()
Pattern = Window | Strided
