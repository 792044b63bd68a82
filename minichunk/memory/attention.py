"""Attention of one chunk over the cache, without copying the cache.

A chunk's queries see the whole past and, causally, the chunk itself. These are two ordinary attentions, whose results
are merged by their log-sum-exps; and so the past may be cut into blocks, each of them a view of the cache.

Backward, a kernel that is given the *merged* output and log-sum-exp returns the exact gradients of its block: it
computes the probabilities again as exp(scores - lse), and the merged lse makes them those of the whole softmax.

Layers that see a part of the past take a second path: window.py.

Shapes: B batch, H query heads, G key-value heads, C tokens of the chunk, D head size, n positions of the past.
q (B, H, C, D); k, v of the chunk (B, G, C, D), of the past (B, G, n, D); out (B, H, C, D); lse (B, H, C).
"""

from typing import Any

import torch
from torch import Tensor

from .kernels import Kernel, pick_kernel

BLOCK = 2048  # positions of the past whose gradients are computed at a time: bounds what is in flight


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from the attention to each, in the log-sum-exps' dtype if that is wider."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]
    return out_a * weight_a + out_b * weight_b, lse


def fold(x: Tensor, G: int) -> Tensor:
    """(B, H, C, ·) to (B, G, H/G * C, ·): for keys that all queries see, the H/G query heads of a key head are one head
    with more rows. The numbers are the same, and the products fewer and larger."""
    return x.reshape(x.shape[0], G, -1, *x.shape[3:])


class Past:
    """What a chunk's attention holds by reference instead of saving: a layer's memory (cache.py) and its place in it.

    save: for a layer that recompute runs twice. The first run leaves the attention's output and log-sum-exp
    here and the second takes them, so that only what lies before and after the attention is run again.
    """

    def __init__(self, memory: Any, start: int, save: bool = False, kernel: Kernel | None = None) -> None:
        self.memory, self.start, self.save, self.kernel = memory, start, save, kernel
        self.saved: tuple[Tensor, Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Attention of the chunk to itself and to what lies before it.

        q: (B, H, C, D). k, v: (B, G, C, D), the chunk's own. sinks: (H), for each head the score of one key more, which
        is worth nothing, as in gpt-oss. Returns (B, H, C, D).

        Backward adds the gradients of the past's keys and values to the memory, in place, instead of
        returning them: they are the relay of Algorithm 1.
        """
        out: Tensor = _Attention.apply(q, k, v, sinks, self)
        return out

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse."""
        out, lse = kernel.forward(q, k, v, window=k.shape[2])  # the chunk itself
        folded = fold(q, k.shape[1])
        for _, keys, values in self.memory.blocks(self.start, kernel.block):  # the past
            out_past, lse_past = kernel.forward(folded, keys, values)
            out, lse = merge(out, lse, out_past.reshape(out.shape), lse_past.reshape(lse.shape))
        return out.to(q.dtype), lse

    def backward(
        self, kernel: Kernel, sends_back: bool, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v, where out and lse are the merged ones; those of the past go to the memory."""
        dq, dk, dv = kernel.backward(grad, q, k, v, out, lse, window=k.shape[2])  # the chunk itself
        total = dq.to(lse.dtype)  # summed over the blocks in float32 or wider, and rounded once
        grad, q, out, lse = kernel.prepare(*(fold(x, k.shape[1]) for x in (grad, q, out, lse)))
        for position, keys, values in self.memory.blocks(self.start, BLOCK):  # the past
            dq_past, dk_past, dv_past = kernel.backward(grad, q, keys, values, out, lse)
            total += dq_past.reshape(dq.shape)
            if sends_back:
                self.memory.add_grads(position, dk_past, dv_past)  # line 7's other half: the relay
            del dq_past, dk_past, dv_past  # or they would live on beside the next block's
        return total.to(dq.dtype), dk, dv


class _Attention(torch.autograd.Function):
    """What autograd sees of it: q, k and v of one chunk, however long the past."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, past: Past) -> Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        ctx.past, ctx.kernel = past, past.kernel or pick_kernel(q)
        if past.saved is None:
            out, lse = past.forward(ctx.kernel, q, k, v)
            if sinks is not None:  # one more set of keys: all that is below needs their merged log-sum-exp
                merged, lse = merge(out, lse, torch.zeros_like(out), sinks.to(lse.dtype)[:, None].expand_as(lse))
                out = merged.to(out.dtype)
        else:
            out, lse = (x.detach() for x in past.saved)
        if past.save:
            past.saved = out.detach(), lse  # detached: what is returned will hold this node, which holds `past`
        ctx.save_for_backward(sinks, q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The same projections made the past's keys and values: they need gradients if ours do.
        sends_back = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grad, (sinks, *saved) = _rows(grads[0]), ctx.saved_tensors
        dq, dk, dv = ctx.past.backward(ctx.kernel, sends_back, grad, *saved)
        dsinks = None
        if sinks is not None:
            out, lse = saved[-2:]
            p = (sinks.to(lse.dtype)[:, None] - lse).exp()  # (B, H, C): the softmax's share of the sink
            dsinks = -(p * (grad * out).to(lse.dtype).sum(-1)).sum((0, 2)).to(sinks.dtype)
        return dq, dk, dv, dsinks, None


def _rows(x: Tensor) -> Tensor:
    """x with the numbers of each head side by side, as the flash kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()
