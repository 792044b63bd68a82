"""What a query sees: a rule about positions, which knows nothing of chunks; into which parts a chunk falls by it, and
what each of them reads.

Because the rule knows nothing of chunks, any cut gives the same numbers: chunks of the fill, chunks of the rebuild, a
text that is written token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValues(Protocol):
    """What attention asks of a layer's memory: parts of its past, block by block, and to take gradients for them."""

    def pieces(self, start: int, stop: int, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (position, keys, values) from `start` up to `stop`, in pieces of at most `size`: (B, G, n, D)."""

    def add_grads(self, start: int, key_grads: Tensor, value_grads: Tensor) -> None:
        """Add the gradients (B, G, n, D) that a later chunk sends back to the n positions from `start`."""


def cut_rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Positions of x (B, ·, C, D): x itself if these are all, or autograd would copy its gradient."""
    return x if (start, stop) == (0, x.shape[2]) else x[:, :, start:stop]


class Part(NamedTuple):
    """Positions of a chunk that see alike: `window` positions, from `low` on, the own last; and all before `whole`."""

    start: int
    stop: int
    low: int
    window: int
    whole: int

    def band(self, memory: KeyValues, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, n, D) from `low` on, where the chunk's own k and v begin at `start`.

        The reach into the past is copied to stand before the chunk's own.
        """
        reach = start - self.low
        if reach <= 0:
            return cut_rows(k, -reach, k.shape[2]), cut_rows(v, -reach, k.shape[2])
        k, v = (F.pad(x, (0, 0, reach, 0)) for x in (k, v))
        for at, keys, values in memory.pieces(self.low, start, reach):
            rows = slice(at - self.low, at - self.low + keys.shape[2])
            k[:, :, rows], v[:, :, rows] = keys, values
        return k, v

    def before(
        self, memory: KeyValues, start: int, k: Tensor, v: Tensor, size: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(position, keys, values) of what lies before `whole`, in pieces. Sinks may lie in the chunk itself."""
        yield from memory.pieces(0, min(self.whole, start), size)
        if self.whole > start:
            yield start, k[:, :, : self.whole - start], v[:, :, : self.whole - start]


@dataclass(frozen=True)
class Window:
    """Query i sees j <= i with i - j < window, as Hugging Face's sliding_attention, or j < sinks.

    window: at least 1. None: full attention.
    """

    window: int | None = None
    sinks: int = 0

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """Up to window + sinks nothing is left out, and from there on the sinks lie before the band: no overlap."""
        edge = stop if self.window is None else min(stop, self.window + self.sinks)
        if start < edge:
            yield Part(start, edge, start, edge - start, start)
        if self.window is not None and edge < stop:
            first = max(start, edge)
            yield Part(first, stop, first - self.window + 1, self.window, self.sinks)

    def mask(self, length: int, start: int = 0, device: torch.device | None = None) -> Tensor | None:
        """bool (length - start, length): what the positions from `start` see; None: all that came before them."""
        if self.window is None:
            return None
        j = torch.arange(length, device=device)
        i = j[start:, None]
        return (j <= i) & ((i - j < self.window) | (j < self.sinks))


@dataclass(frozen=True)
class Strided:
    """In blocks: query i in block Q sees j <= i in the blocks K with Q - K < local, or K a multiple of stride."""

    block: int = 64
    local: int = 16
    stride: int = 16

    def mask(self, length: int, start: int = 0, device: torch.device | None = None) -> Tensor:
        """bool (length - start, length): what the positions from `start` see."""
        j = torch.arange(length, device=device)
        i = j[start:, None]
        Q, K = i // self.block, j // self.block
        return (j <= i) & ((Q - K < self.local) | (K % self.stride == 0))


FULL = Window()
Pattern = Window | Strided
