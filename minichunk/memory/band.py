"""A band of attention by a kernel that knows none: in tiles of queries, each with the keys of its windows, masked.

The tiles' keys overlap. They are views, and tiles go to the kernel as if they were sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

TILE = 128  # queries
KEYS = 32768  # that go to the kernel at once, counted tile by tile: bounds what its backward returns


def band(queries: int, window: int, keys: int, device: torch.device) -> Tensor:
    """bool (queries, keys): what the last `queries` of `keys` positions see, `window` of them and the own last."""
    first = keys - queries  # the first query's position
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(first).triu(first - window + 1)


def mask(queries: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(queries, window - 1 + queries) to add to a tile's scores."""
    seen = band(queries, window, window - 1 + queries, device)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


class Tiles(NamedTuple):
    """`number` tiles of `length` queries, from `start` on."""

    start: int
    number: int
    length: int

    def of(self, x: Tensor, before: int = 0) -> Tensor:
        """x (B, H, positions, ·) to (number, B*H, before + length, ·), a view in which neighbours overlap.

        before: how many positions more than queries x has, all of them before the first query.
        """
        x = x.flatten(0, 1)[:, self.start : self.start + self.number * self.length + before]
        return x.unfold(1, before + self.length, self.length).movedim(-1, 2).transpose(0, 1)

    def back(self, x: Tensor, total: Tensor) -> None:
        """Write x (number, B*H, length, ·) to its place in `total` (B, H, positions, ·)."""
        rows = total[:, :, self.start : self.start + self.number * self.length]
        rows.copy_(x.transpose(0, 1).reshape(rows.shape))

    def add(self, x: Tensor, total: Tensor) -> None:
        """Add x (number, B*G, before + length, D), in which neighbours overlap, to `total` (B, G, keys, D)."""
        for n, tile in enumerate(x.unflatten(1, total.shape[:2])):
            start = self.start + n * self.length
            total[:, :, start : start + tile.shape[2]] += tile


def cut_into_tiles(queries: int, window: int) -> Iterator[Tiles]:
    """Whole tiles, as many at once as KEYS allows, and a shorter one."""
    at_once = max(1, KEYS // (window - 1 + TILE))
    for start in range(0, queries // TILE * TILE, at_once * TILE):
        yield Tiles(start, min(at_once, queries // TILE - start // TILE), TILE)
    if queries % TILE:
        yield Tiles(queries // TILE * TILE, 1, queries % TILE)


def forward_in_tiles(
    operator: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """out and lse of a band. operator: PyTorch's flash attention for the CPU."""
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), None
    for tiles in cut_into_tiles(q.shape[2], window):
        added = mask(tiles.length, window, q.dtype, q.device)
        arguments = tiles.of(q), tiles.of(k, window - 1), tiles.of(v, window - 1)
        out_tiles, lse_tiles = operator(*arguments, 0.0, False, attn_mask=added)
        lse = q.new_empty(q.shape[:3], dtype=lse_tiles.dtype) if lse is None else lse
        tiles.back(out_tiles, out)
        tiles.back(lse_tiles, lse)
    assert lse is not None
    return out, lse


def backward_in_tiles(
    operator: Callable[..., Any], grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v. operator: the backward of PyTorch's flash attention for the CPU."""
    # Sums over tiles in at least float32, as of blocks of the past.
    wide = torch.promote_types(k.dtype, torch.float32)
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
    for tiles in cut_into_tiles(q.shape[2], window):
        added = mask(tiles.length, window, q.dtype, q.device)
        rows = (tiles.of(x) for x in (grad, q))
        keys, values = tiles.of(k, window - 1), tiles.of(v, window - 1)
        dq_tiles, dk_tiles, dv_tiles = operator(
            *rows, keys, values, tiles.of(out), tiles.of(lse), 0.0, False, attn_mask=added
        )
        tiles.back(dq_tiles, dq)
        tiles.add(dk_tiles, dk)
        tiles.add(dv_tiles, dv)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
