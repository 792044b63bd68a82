"""Attention of one chunk over the cache, without copying the cache.

A chunk's queries see the whole past and, causally, the chunk itself. These are two ordinary
attentions whose results can be merged by their log-sum-exp, so that the past stays a view of the
cache. Backward, a kernel that is given the *merged* output and log-sum-exp returns the exact
gradients of its piece: it recomputes the probabilities as exp(scores - lse), and the merged lse
makes them those of the whole softmax. For the same reason the past may be cut into blocks.

With a window (pattern.py), queries see a band that ends with themselves and reaches into the past, and the sinks: two
attentions again, the band in one call of the kernel, for which alone the reach is copied. Full attention is the band
that begins with the chunk, beside a past that is seen as sinks are.

What is seen by every query, all of the past or the sinks: there, the H/G query heads that share a key head can be
*folded* into one head with H/G times the rows: the same numbers in memory, and fewer, larger products.

Shapes: q (B, H, C, D); k, v (B, G, C or past, D); out (B, H, C, D); lse (B, H, C).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import Kernel, pick_kernel
from .pattern import FULL, KeyValues, Part, Window, cut_rows

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
        self.kept: dict[Part, tuple[Tensor, Tensor]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Window = FULL) -> Tensor:
        """Attention of the chunk to itself and to what lies before it, as far as the pattern lets it see.

        q: (B, H, C, D). k, v: (B, G, C, D), the chunk's own. Returns (B, H, C, D).

        Backward adds the gradients of the past's keys and values to the memory, in place, instead of
        returning them: they are the relay of Algorithm 1.
        """
        outs = []
        for part in pattern.parts(self.start, self.start + q.shape[2]):
            start, stop = part.start - self.start, part.stop - self.start
            outs.append(
                _PartAttention.apply(cut_rows(q, start, stop), cut_rows(k, 0, stop), cut_rows(v, 0, stop), self, part)
            )
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


class _PartAttention(torch.autograd.Function):
    """q: of the part. k, v: of the chunk up to the part's end."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, past: Past, part: Part) -> Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        kernel = ctx.kernel = past.kernel or pick_kernel(q)
        if part in past.kept:
            out, lse = (x.detach() for x in past.kept[part])
        else:
            out, lse = _forward(q, k, v, past, part, kernel)
        if past.keep:
            past.kept[part] = (out.detach(), lse)  # detached: what is returned will hold this node, which holds `past`
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
        dq, dk, dv = kernel.backward(grad, q, *part.band(past.memory, past.start, k, v), out, lse, part.window)
        reach = past.start - part.low
        if reach > 0 and sends_back:
            past.memory.add_grads(part.low, dk[:, :, :reach], dv[:, :, :reach])
        if reach:  # what is left are the chunk's own, and zeros for those before the band
            dk, dv = (F.pad(x, (0, 0, -reach, 0)) for x in (dk, dv))
        grad, q, out, lse = kernel.prepare(*(fold(x, k.shape[1]) for x in (grad, q, out, lse)))
        total = dq.to(lse.dtype)  # summed over the blocks in float32 or wider, and rounded once
        for at, keys, values in part.before(past.memory, past.start, k, v, BLOCK):
            dq_past, dk_past, dv_past = kernel.backward(grad, q, keys, values, out, lse, None)
            total += dq_past.reshape(dq.shape)
            if at >= past.start:
                dk[:, :, : keys.shape[2]] += dk_past
                dv[:, :, : keys.shape[2]] += dv_past
            elif sends_back:
                past.memory.add_grads(at, dk_past, dv_past)
            del dq_past, dk_past, dv_past  # or they would live on beside the next block's
        return total.to(dq.dtype), dk, dv, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, past: Past, part: Part, kernel: Kernel) -> tuple[Tensor, Tensor]:
    out, lse = kernel.forward(q, *part.band(past.memory, past.start, k, v), part.window)
    for _, keys, values in part.before(past.memory, past.start, k, v, kernel.piece or max(1, past.start)):
        out_past, lse_past = kernel.forward(fold(q, k.shape[1]), keys, values, None)
        out, lse = merge(out, lse, out_past.reshape(out.shape), lse_past.reshape(lse.shape))
    return out.to(q.dtype), lse


def attend(
    q: Tensor, k: Tensor, v: Tensor, memory: KeyValues, start: int, kernel: Kernel | None = None, pattern: Window = FULL
) -> Tensor:
    """`Past.attend` for a single call: q (B, H, C, D), k and v (B, G, C, D) of the chunk at `start`."""
    return Past(memory, start, kernel=kernel).attend(q, k, v, pattern)
