"""Causal attention of one chunk over the cache, without copying the cache.

A chunk's queries see the whole past and, causally, the chunk itself. These are two ordinary
attentions whose results can be merged by their log-sum-exp, so that the past stays a view of the
cache. Backward, a kernel that is given the *merged* output and log-sum-exp returns the exact
gradients of its piece: it recomputes the probabilities as exp(scores - lse), and the merged lse
makes them those of the whole softmax. For the same reason the past may be cut into blocks.

Every query sees all of the past. So there, the H/G query heads that share a key head can be
*folded* into one head with H/G times the rows: the same numbers in memory, and fewer, larger products.

Shapes: q (B, H, C, D); k, v (B, G, C or past, D); out (B, H, C, D); lse (B, H, C).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .kernels import Kernel, pick_kernel


class KeyValues(Protocol):
    """What attention asks of a layer's memory: its past, block by block, and to take gradients for it."""

    def pieces(self, stop: int, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (start, keys, values) of the positions up to `stop`, in pieces of at most `size`: (B, G, n, D)."""

    def add_grads(self, start: int, key_grads: Tensor, value_grads: Tensor) -> None:
        """Add the gradients (B, G, n, D) that a later chunk sends back to the n positions from `start`."""


BLOCK = 2048  # positions of the past whose gradients are computed at a time: bounds what is in flight


def _rows(x: Tensor) -> Tensor:
    """x with the numbers of each head side by side, as the flash kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


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

    keep: for a layer that recompute runs twice. The first run leaves the attention's output and log-sum-exp
    here and the second takes them, so that only what lies before and after the attention is run again.
    """

    def __init__(self, memory: KeyValues, start: int, keep: bool = False, kernel: Kernel | None = None) -> None:
        self.memory, self.start, self.keep, self.kernel = memory, start, keep, kernel
        self.kept: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the chunk to itself, causally, and to everything before it.

        q: (B, H, C, D). k, v: (B, G, C, D), the chunk's own. Returns (B, H, C, D).

        Backward adds the gradients of the past's keys and values to the memory, in place, instead of
        returning them: they are the relay of Algorithm 1.
        """
        return _ChunkAttention.apply(q, k, v, self)


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, past: Past) -> Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        kernel = ctx.kernel = past.kernel or pick_kernel(q)
        if past.kept is None:
            out, lse = _forward(q, k, v, past, kernel)
        else:
            out, lse = (x.detach() for x in past.kept)
        if past.keep:
            past.kept = (out.detach(), lse)  # detached: what is returned will hold this node, which holds `past`
        ctx.save_for_backward(q, k, v, out, lse)  # one chunk, however long the past
        ctx.past = past
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = _rows(grads[0])
        q, k, v, out, lse = ctx.saved_tensors
        past: Past = ctx.past
        kernel: Kernel = ctx.kernel
        dq, dk, dv = kernel.backward(grad, q, k, v, out, lse, causal=True)
        # The same projections made the past's keys and values: they need gradients if ours do.
        sends_back = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grad, q, out, lse = kernel.prepare(*(fold(x, k.shape[1]) for x in (grad, q, out, lse)))
        total = dq.to(lse.dtype)  # summed over the blocks in float32 or wider, and rounded once
        for start, keys, values in past.memory.pieces(past.start, BLOCK):
            dq_past, dk_past, dv_past = kernel.backward(grad, q, keys, values, out, lse, causal=False)
            total += dq_past.reshape(dq.shape)
            if sends_back:
                past.memory.add_grads(start, dk_past, dv_past)
            del dq_past, dk_past, dv_past  # or they would live on beside the next block's
        return total.to(dq.dtype), dk, dv, None


def _forward(q: Tensor, k: Tensor, v: Tensor, past: Past, kernel: Kernel) -> tuple[Tensor, Tensor]:
    out, lse = kernel.forward(q, k, v, causal=True)
    for _, keys, values in past.memory.pieces(past.start, kernel.piece or max(1, past.start)):
        out_past, lse_past = kernel.forward(fold(q, k.shape[1]), keys, values, causal=False)
        out, lse = merge(out, lse, out_past.reshape(out.shape), lse_past.reshape(lse.shape))
    return out.to(q.dtype), lse


def attend(q: Tensor, k: Tensor, v: Tensor, memory: KeyValues, start: int, kernel: Kernel | None = None) -> Tensor:
    """`Past.attend` for a single call: q (B, H, C, D), k and v (B, G, C, D) of the chunk at `start`."""
    return Past(memory, start, kernel=kernel).attend(q, k, v)
