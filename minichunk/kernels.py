"""The kernels that chunk attention is made of: plain, and PyTorch's flash kernels for CPU and CUDA.

Shapes: q (B, H, C, D); k, v (B, G, C or past, D); out (B, H, C, D); lse (B, H, C).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

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
        # H/G query heads share a key head. Scores in at least float32, as in the fast kernels.
        wide = torch.promote_types(q.dtype, torch.float32)
        s = q.reshape(B, G, H // G, C, D).to(wide) @ k.unsqueeze(2).to(wide).mT / D**0.5
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
        # The kernel gives whole heads to the cores, and few heads leave cores idle: cut the past into
        # pieces, as if they were other sequences of the batch, which share their queries.
        pieces = 1 if causal or q.shape[0] > 1 or k.shape[2] % 4 else 4
        if pieces > 1:
            k, v = (x[0].unflatten(1, (pieces, -1)).transpose(0, 1) for x in (k, v))  # (pieces, G, past/pieces, D)
            grad, q, out, lse = (x.expand(pieces, *x.shape[1:]) for x in (grad, q, out, lse))
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)
        if pieces > 1:
            dq = dq.sum(0, keepdim=True)
            dk, dv = (x.transpose(0, 1).flatten(1, 2)[None] for x in (dk, dv))
        return dq, dk, dv


class FlashCUDA:
    """PyTorch's flash kernel for CUDA: bfloat16 and float16, heads before positions."""

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
        # Dropout's random state, which the call wants and with dropout 0 does not read.
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = aten._flash_attention_backward(grad, q, k, v, out, lse, *lengths, 0.0, causal, state, state[0])
        return tuple(x.transpose(1, 2) for x in grads)


_chosen: Kernel | None = None


@contextmanager
def use_kernel(kernel: Kernel) -> Iterator[None]:
    """Within the block, use this kernel whatever the device (for tests and for forecasts)."""
    global _chosen
    previous, _chosen = _chosen, kernel
    try:
        yield
    finally:
        _chosen = previous


def kernel_for(device_type: str, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The fastest kernel for this dtype and head size on a device that is recent enough."""
    if device_type == "cpu" and dtype != torch.float16:
        return FlashCPU()
    if device_type == "cuda" and dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 256:
        return FlashCUDA()
    return Plain()


def pick_kernel(q: Tensor) -> Kernel:
    """The fastest kernel that computes q's dtype on q's device."""
    if _chosen is not None:
        return _chosen
    kernel = kernel_for(q.device.type, q.dtype, q.shape[-1])
    if isinstance(kernel, FlashCUDA) and torch.cuda.get_device_capability(q.device) < (8, 0):
        return Plain()
    return kernel
