"""Attention of one chunk over the cache, without copying the cache.

A chunk's queries see the whole past and, causally, the chunk itself. These are two ordinary
attentions whose results can be merged by their log-sum-exp, so that the past stays a view of the
cache. Backward, a kernel that is given the *merged* output and log-sum-exp returns the exact
gradients of its piece: it recomputes the probabilities as exp(scores - lse), and the merged lse
makes them those of the whole softmax. For the same reason the past may be cut into blocks.

A pattern (pattern.py) says what a query sees: pinned positions, which all of a part's queries see, and a band that
ends with the query and reaches into the past. Two attentions again; for the band alone the reach is copied. Full
attention pins all of the past, and its band is the chunk itself.

What every query of a part sees: there, the H/G query heads that share a key head can be
*folded* into one head with H/G times the rows: the same numbers in memory, and fewer, larger products.

Shapes: q (B, H, C, D); k, v (B, G, C or past, D); out (B, H, C, D); lse (B, H, C).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .band import Tiles, backward_in_tiles, forward_in_tiles
from .kernels import Kernel, pick_kernel
from .pattern import Part, Pattern

BLOCK = 2048  # positions of the past whose gradients are computed at a time: bounds what is in flight


class KeyValues(Protocol):
    """What attention asks of a layer's memory: keys and values of its past (B, G, n, D), and to take gradients."""

    pattern: Pattern

    def pinned(self, count: int, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (index, keys, values) of the first `count` pinned positions, in pieces of at most `size`."""

    def near(self, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (position, keys, values) from `start` up to `stop`, of positions in reach, in pieces."""

    def add_pinned_grads(self, index: int, key_grads: Tensor, value_grads: Tensor) -> None:
        """Add the gradients (B, G, n, D) that a later chunk sends back to the n pinned positions from that index."""

    def add_near_grads(self, position: int, key_grads: Tensor, value_grads: Tensor) -> None:
        """The same to the n positions from that one, in reach."""


def _rows(x: Tensor) -> Tensor:
    """x with the numbers of each head side by side, as the flash kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def cut_rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Positions of x (B, ·, C, D): x itself if these are all, or autograd would copy its gradient."""
    return x if (start, stop) == (0, x.shape[2]) else x[:, :, start:stop]


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from the attention to each, in the log-sum-exps' dtype if that is wider."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]
    return out_a * weight_a + out_b * weight_b, lse


def fold(x: Tensor, G: int) -> Tensor:
    """(B, H, C, ·) to (B, G, H/G * C, ·): the query heads of each key head one after the other."""
    return x.reshape(x.shape[0], G, -1, *x.shape[3:])


class Past:
    """What a chunk's attention holds by reference instead of saving: a layer's memory and its place in it.

    save: for a layer that recompute runs twice. The first run leaves the attention's output and log-sum-exp
    here and the second takes them, so that only what lies before and after the attention is run again.
    """

    def __init__(self, memory: KeyValues, start: int, save: bool = False, kernel: Kernel | None = None) -> None:
        self.memory, self.start, self.save, self.kernel = memory, start, save, kernel
        self.saved: dict[Part, tuple[Tensor, Tensor]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the chunk to itself and to what lies before it, as far as the memory's pattern lets it see.

        q: (B, H, C, D). k, v: (B, G, C, D), the chunk's own. Returns (B, H, C, D).

        Backward adds the gradients of the past's keys and values to the memory, in place, instead of
        returning them: they are the relay of Algorithm 1.
        """
        outs = []
        for part in self.memory.pattern.parts(self.start, self.start + q.shape[2]):
            start, stop = part.start - self.start, part.stop - self.start
            outs.append(
                _PartAttention.apply(cut_rows(q, start, stop), cut_rows(k, 0, stop), cut_rows(v, 0, stop), self, part)
            )
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def band(self, part: Part, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, n, D) of a part and of its reach, which is copied to stand before the chunk's own."""
        low = part.start - part.reach
        own = low - self.start
        if own >= 0:
            return cut_rows(k, own, k.shape[2]), cut_rows(v, own, k.shape[2])
        B, G, n, D = k.shape
        band = k.new_empty(B, G, n - own, D), v.new_empty(B, G, n - own, D)
        for at, *pair in chain(self.memory.near(low, self.start), [(self.start, k, v)]):
            for room, x in zip(band, pair, strict=True):
                room[:, :, at - low : at - low + x.shape[2]] = x
        return band

    def pinned(self, part: Part, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(index, keys, values) of what a part sees of the past's pinned positions, in pieces."""
        return self.memory.pinned(min(part.pinned, self.memory.pattern.pinned_before(self.start)), size)

    def own_pinned(self, part: Part, device: torch.device) -> Tensor | None:
        """The rows of the chunk that are pinned positions, as far as a part sees them."""
        pattern = self.memory.pattern
        count = part.pinned - pattern.pinned_before(self.start)
        if count <= 0:
            return None
        rows = [
            torch.arange(low, high, device=device) - self.start for low, high in pattern.pinned(self.start, part.stop)
        ]
        return torch.cat(rows)[:count]


class _PartAttention(torch.autograd.Function):
    """q: of the part. k, v: of the chunk up to the part's end."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, past: Past, part: Part) -> Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        kernel = ctx.kernel = past.kernel or pick_kernel(q)
        if part in past.saved:
            out, lse = (x.detach() for x in past.saved[part])
        else:
            out, lse = _forward(q, k, v, past, part, kernel)
        if past.save:
            past.saved[part] = (out.detach(), lse)  # detached: what is returned will hold this node, which holds `past`
        ctx.save_for_backward(q, k, v, out, lse)  # one chunk, however long the past
        ctx.past, ctx.part = past, part
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = _rows(grads[0])
        q, k, v, out, lse = ctx.saved_tensors
        past: Past = ctx.past
        part: Part = ctx.part
        kernel: Kernel = ctx.kernel
        # The same projections made the past's keys and values: they need gradients if ours do.
        sends_back = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dq, dk, dv = _band_backward(kernel, part, grad, q, *past.band(part, k, v), out, lse)
        reach = past.start - (part.start - part.reach)
        if reach > 0 and sends_back:
            past.memory.add_near_grads(past.start - reach, dk[:, :, :reach], dv[:, :, :reach])
        if reach:  # what is left are the chunk's own, and zeros for those before the band
            dk, dv = (F.pad(x, (0, 0, -reach, 0)) for x in (dk, dv))
        grad, q, out, lse = kernel.prepare(*(fold(x, k.shape[1]) for x in (grad, q, out, lse)))
        total = dq.to(lse.dtype)  # summed over the blocks in float32 or wider, and rounded once
        for at, keys, values in past.pinned(part, BLOCK):
            dq_past, dk_past, dv_past = kernel.backward(grad, q, keys, values, out, lse, None)
            total += dq_past.reshape(dq.shape)
            if sends_back:
                past.memory.add_pinned_grads(at, dk_past, dv_past)
            del dq_past, dk_past, dv_past  # or they would live on beside the next block's
        if (rows := past.own_pinned(part, k.device)) is not None:
            dq_own, dk_own, dv_own = kernel.backward(grad, q, k[:, :, rows], v[:, :, rows], out, lse, None)
            total += dq_own.reshape(dq.shape)
            dk[:, :, rows] += dk_own
            dv[:, :, rows] += dv_own
        return total.to(dq.dtype), dk, dv, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, past: Past, part: Part, kernel: Kernel) -> tuple[Tensor, Tensor]:
    pieces = past.pinned(part, kernel.piece or max(1, past.start))
    if k.shape[2] == 1:  # as when text is written: it sees all that is in reach, which need not be copied
        out, lse = kernel.forward(q, k, v, None)
        pieces = chain(past.memory.near(part.start - part.reach, part.start), pieces)
    else:
        out, lse = _band_forward(kernel, part, q, *past.band(part, k, v))
    rows = past.own_pinned(part, k.device)
    own = [] if rows is None else [(0, k[:, :, rows], v[:, :, rows])]
    for _, keys, values in chain(pieces, own):
        out_past, lse_past = kernel.forward(fold(q, k.shape[1]), keys, values, None)
        out, lse = merge(out, lse, out_past.reshape(out.shape), lse_past.reshape(lse.shape))
    return out.to(q.dtype), lse


def _band_forward(kernel: Kernel, part: Part, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of a part to its band."""
    if q.shape[2] == part.length:
        return kernel.forward(q, k, v, part.window)
    tiles = Tiles(q.shape[2] // part.length, part.length, part.reach).at_once()
    return forward_in_tiles(partial(kernel.forward, window=part.window), tiles, q, k, v)


def _band_backward(
    kernel: Kernel, part: Part, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients."""
    if q.shape[2] == part.length:
        return kernel.backward(grad, q, k, v, out, lse, part.window)
    tiles = Tiles(q.shape[2] // part.length, part.length, part.reach).at_once()
    return backward_in_tiles(partial(kernel.backward, window=part.window), tiles, grad, q, k, v, out, lse)


def attend(q: Tensor, k: Tensor, v: Tensor, memory: KeyValues, start: int, kernel: Kernel | None = None) -> Tensor:
    """`Past.attend` for a single call: q (B, H, C, D), k and v (B, G, C, D) of the chunk at `start`."""
    return Past(memory, start, kernel=kernel).attend(q, k, v)
