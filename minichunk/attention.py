"""Causal attention of one chunk over the cache, without copying the cache.

A chunk's queries see the whole past and, causally, the chunk itself. These are two ordinary
attentions whose results can be merged by their log-sum-exp, so that the past stays a view of the
cache. Backward, a kernel that is given the *merged* output and log-sum-exp returns the exact
gradients of its piece: it recomputes the probabilities as exp(scores - lse), and the merged lse
makes them those of the whole softmax.

Shapes: q (B, H, C, D); k, v (B, G, C or past, D); out (B, H, C, D); lse (B, H, C).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .cache import LayerCache

aten = torch.ops.aten


class Kernel(Protocol):
    """Attention of q to k and v, all of them or (`causal`, equally many) up to the own position."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return out and lse."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""


class Plain:
    """Softmax attention written out: any dtype, any device, C x past scores in memory."""

    def scores(self, q: Tensor, k: Tensor, causal: bool) -> Tensor:
        B, H, C, D = q.shape
        G = k.shape[1]
        # H/G query heads share a key head; sums over scores in at least float32, as the fast kernels do.
        q = q.reshape(B, G, H // G, C, D)
        s = (q @ k.unsqueeze(2).mT).to(torch.promote_types(q.dtype, torch.float32)) / D**0.5
        if causal:
            s = s.masked_fill(torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
        return s  # (B, G, H/G, C, past)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        s = self.scores(q, k, causal)
        lse = s.logsumexp(-1)  # (B, G, H/G, C)
        p = (s - lse[..., None]).exp().to(q.dtype)
        return (p @ v.unsqueeze(2)).flatten(1, 2), lse.flatten(1, 2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, H, C, D = q.shape
        shape = (B, k.shape[1], H // k.shape[1], C)
        grad_, q_ = grad.reshape(*shape, D), q.reshape(*shape, D)
        p = (self.scores(q, k, causal) - lse.reshape(*shape, 1)).exp()
        delta = (grad * out).to(p.dtype).sum(-1).reshape(*shape, 1)
        ds = (p * (grad_ @ v.unsqueeze(2).mT - delta) / D**0.5).to(q.dtype)
        dq = (ds @ k.unsqueeze(2)).reshape(q.shape)
        dk = (ds.mT @ q_).sum(2)  # summed over the query heads that share the key head
        dv = (p.to(q.dtype).mT @ grad_).sum(2)
        return dq, dk, dv


class FlashCPU:
    """PyTorch's flash kernel for the CPU: float64, float32, bfloat16."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)


class FlashCUDA:
    """PyTorch's flash kernel for CUDA: bfloat16 and float16, heads before positions."""

    def __init__(self) -> None:
        # Dropout's random state, which the backward call wants and with dropout 0 does not read.
        self.state = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        lengths = (None, None, q.shape[1], k.shape[1])
        out, lse, *_ = aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False)
        return out.transpose(1, 2), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
        lengths = (None, None, q.shape[1], k.shape[1])
        state = (x.to(q.device) for x in self.state)
        grads = aten._flash_attention_backward(grad, q, k, v, out, lse, *lengths, 0.0, causal, *state)
        return tuple(x.transpose(1, 2) for x in grads)


def pick_kernel(q: Tensor) -> Kernel:
    """The fastest kernel that computes q's dtype on q's device."""
    if q.device.type == "cpu" and q.dtype != torch.float16:
        return FlashCPU()
    if q.device.type == "cuda" and q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        return FlashCUDA()
    return Plain()


def _rows(x: Tensor) -> Tensor:
    """x with the numbers of each head side by side, as the flash kernels take for granted."""
    return x if x.stride(-1) == 1 else x.contiguous()


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys from the attention to each."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a = (lse_a - lse).exp()[..., None].to(out_a.dtype)
    weight_b = (lse_b - lse).exp()[..., None].to(out_b.dtype)
    return out_a * weight_a + out_b * weight_b, lse


@dataclass
class _Past:
    """What a chunk's attention holds by reference instead of saving: the cache and its place in it."""

    memory: LayerCache
    start: int
    kernel: Kernel


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, past: _Past) -> Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        out, lse = past.kernel.forward(q, k, v, causal=True)
        if past.start > 0:
            out_past, lse_past = past.kernel.forward(q, *past.memory.past(past.start), causal=False)
            out, lse = merge(out, lse, out_past, lse_past)
        ctx.save_for_backward(q, k, v, out, lse)  # one chunk, however long the past
        ctx.past = past
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = _rows(grads[0])
        q, k, v, out, lse = ctx.saved_tensors
        past: _Past = ctx.past
        dq, dk, dv = past.kernel.backward(grad, q, k, v, out, lse, causal=True)
        if past.start > 0:
            before = past.memory.past(past.start)
            dq_past, dk_past, dv_past = past.kernel.backward(grad, q, *before, out, lse, causal=False)
            dq = dq + dq_past
            # The same projections made the past's keys and values: they need gradients if ours do.
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                past.memory.add_grads(past.start, dk_past, dv_past)
        return dq, dk, dv, None


def attend(q: Tensor, k: Tensor, v: Tensor, memory: LayerCache, start: int, kernel: Kernel | None = None) -> Tensor:
    """Attention of the chunk at `start` to itself, causally, and to everything before it.

    q: (B, H, C, D). k, v: (B, G, C, D), the chunk's own. Returns (B, H, C, D).

    Backward adds the gradients of the past's keys and values to `memory`, in place, instead of
    returning them: they are the relay of Algorithm 1.
    """
    return _ChunkAttention.apply(q, k, v, _Past(memory, start, kernel or pick_kernel(q)))
