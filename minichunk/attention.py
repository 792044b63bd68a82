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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels import Kernel, pick_kernel

if TYPE_CHECKING:
    from .cache import LayerMemory

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


@dataclass
class _Past:
    """What a chunk's attention holds by reference instead of saving: the cache and its place in it."""

    memory: LayerMemory
    start: int
    kernel: Kernel


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, past: _Past) -> Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        out, lse = past.kernel.forward(q, k, v, causal=True)
        for _, keys, values in past.memory.pieces(past.start, max(1, past.start)):  # in one piece, if it can be had
            out_past, lse_past = past.kernel.forward(fold(q, k.shape[1]), keys, values, causal=False)
            out, lse = merge(out, lse, out_past.reshape(out.shape), lse_past.reshape(lse.shape))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)  # one chunk, however long the past
        ctx.past = past
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = _rows(grads[0])
        q, k, v, out, lse = ctx.saved_tensors
        past: _Past = ctx.past
        dq, dk, dv = past.kernel.backward(grad, q, k, v, out, lse, causal=True)
        # The same projections made the past's keys and values: they need gradients if ours do.
        sends_back = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grad, q, out, lse = (fold(x, k.shape[1]) for x in (grad, q, out, lse))
        for start, keys, values in past.memory.pieces(past.start, BLOCK):
            dq_past, dk_past, dv_past = past.kernel.backward(grad, q, keys, values, out, lse, causal=False)
            dq = dq + dq_past.reshape(dq.shape)
            if sends_back:
                past.memory.add_grads(start, dk_past, dv_past)
            del dq_past, dk_past, dv_past  # or they would live on beside the next block's
        return dq, dk, dv, None


def attend(q: Tensor, k: Tensor, v: Tensor, memory: LayerMemory, start: int, kernel: Kernel | None = None) -> Tensor:
    """Attention of the chunk at `start` to itself, causally, and to everything before it.

    q: (B, H, C, D). k, v: (B, G, C, D), the chunk's own. Returns (B, H, C, D).

    Backward adds the gradients of the past's keys and values to `memory`, in place, instead of
    returning them: they are the relay of Algorithm 1.
    """
    return _ChunkAttention.apply(q, k, v, _Past(memory, start, kernel or pick_kernel(q)))
