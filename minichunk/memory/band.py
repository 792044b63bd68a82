"""Tiles of queries, each with the stretch of keys that it sees: attention that does no more than a pattern's work.

The tiles' keys overlap. They are views, and tiles go to a kernel as if they were sequences of a batch. A kernel that
knows no band computes one in tiles too, masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 128  # queries, of a kernel that knows no band
KEYS = 32768  # that go to the kernel at once, counted tile by tile: bounds what its backward returns


def band(queries: int, window: int, keys: int, device: torch.device) -> Tensor:
    """bool (queries, keys): what the last `queries` of `keys` positions see, `window` of them and the own last."""
    first = keys - queries  # the first query's position
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(first).triu(first - window + 1)


def hidden(q: Tensor, k: Tensor, window: int) -> Tensor:
    """(C, keys) to add to the scores: -inf where a query does not see."""
    C, keys = q.shape[2], k.shape[2]
    return q.new_zeros(C, keys).masked_fill_(~band(C, window, keys, q.device), -torch.inf)


def is_causal(q: Tensor, k: Tensor, window: int | None) -> bool:
    """Whether that window is the causal mask, from the first key to the own one (one of 1 is not)."""
    return window is not None and k.shape[2] == q.shape[2] <= window


def sees_all(q: Tensor, k: Tensor, window: int) -> bool:
    """Whether that window leaves nothing out: a single query, the keys' last, within it."""
    return q.shape[2] == 1 and k.shape[2] <= window


class Tiles(NamedTuple):
    """`number` tiles of `length` queries, from the row `start` of the queries on.

    The keys of a tile are as many as its queries and `before` more; those of the first begin at the row `low`.
    """

    number: int
    length: int
    before: int
    start: int = 0
    low: int = 0

    def queries(self, x: Tensor) -> Tensor:
        """x (B, H, rows, ·) to (number, B*H, length, ·), or of a single tile (B, H, length, ·)."""
        return self._cut(x, self.start, self.length)

    def keys(self, x: Tensor) -> Tensor:
        """x (B, G, rows, ·) to (number, B*G, before + length, ·), a view in which neighbours overlap; or as above."""
        return self._cut(x, self.low, self.before + self.length)

    def _cut(self, x: Tensor, start: int, width: int) -> Tensor:
        x = x[:, :, start : start + (self.number - 1) * self.length + width]
        return x if self.number == 1 else x.flatten(0, 1).unfold(1, width, self.length).movedim(-1, 2).transpose(0, 1)

    def put(self, x: Tensor, total: Tensor) -> None:
        """Write what `queries` would give, x, to its place in `total` (B, H, rows, ·)."""
        rows = total[:, :, self.start : self.start + self.number * self.length]
        rows.copy_(x if self.number == 1 else x.transpose(0, 1).reshape(rows.shape))

    def add(self, x: Tensor, total: Tensor) -> None:
        """Add what belongs to what `keys` gives, x, in which neighbours overlap, to `total` (B, G, rows, D)."""
        for n, tile in enumerate([x] if self.number == 1 else x.unflatten(1, total.shape[:2])):
            start = self.low + n * self.length
            total[:, :, start : start + tile.shape[2]] += tile

    def at_once(self) -> Iterator[Tiles]:
        """The same tiles, as many at a time as KEYS allows."""
        most = max(1, KEYS // (self.before + self.length))
        for first in range(0, self.number, most):
            rows = first * self.length
            number = min(most, self.number - first)
            yield self._replace(number=number, start=self.start + rows, low=self.low + rows)


def cut_band(queries: int, window: int, keys: int) -> Iterator[Tiles]:
    """Tiles of TILE and a shorter one: those of a band that is full from the first query on, or of one with no edge."""
    if window >= keys:  # each tile sees all that comes before it
        for start in range(0, queries, TILE):
            yield Tiles(1, min(TILE, queries - start), keys - queries + start, start)
        return
    whole = queries // TILE * TILE
    yield from Tiles(whole // TILE, TILE, window - 1).at_once()
    if whole < queries:
        yield Tiles(1, queries - whole, window - 1, whole, whole)


def forward_in_tiles(
    call: Callable[..., tuple[Tensor, Tensor]], cut: Iterable[Tiles], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """out and lse, where `call(q, k, v)` returns those of some tiles."""
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), None
    for tiles in cut:
        out_tiles, lse_tiles = call(tiles.queries(q), tiles.keys(k), tiles.keys(v))
        lse = q.new_empty(q.shape[:3], dtype=lse_tiles.dtype) if lse is None else lse
        tiles.put(out_tiles, out)
        tiles.put(lse_tiles, lse)
    assert lse is not None
    return out, lse


def backward_in_tiles(
    call: Callable[..., tuple[Tensor, Tensor, Tensor]],
    cut: Iterable[Tiles],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, where `call(grad, q, k, v, out, lse)` returns those of some tiles."""
    # Sums over tiles in at least float32, as of blocks of the past.
    wide = torch.promote_types(k.dtype, torch.float32)
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
    for tiles in cut:
        rows = [tiles.queries(x) for x in (grad, q, out, lse)]
        dq_tiles, dk_tiles, dv_tiles = call(*rows[:2], tiles.keys(k), tiles.keys(v), *rows[2:])
        tiles.put(dq_tiles, dq)
        tiles.add(dk_tiles, dk)
        tiles.add(dv_tiles, dv)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
