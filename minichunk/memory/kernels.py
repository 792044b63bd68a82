"""The kernels that chunk attention is made of: plain, and PyTorch's flash kernels for CPU and CUDA.

The flash kernels are operators private to PyTorch, the only ones that take and return a log-sum-exp. Another version
may change them, so each is tried on a few numbers before it is relied on.
Shapes: q (B, H, C, D); k, v (B, G, C or past, D); out (B, H, C, D); lse (B, H, C).
"""

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .layer_memory import wide

aten = torch.ops.aten
Query = Sequence[Tensor]  # of a chunk's backward pass: the gradient of out, q, out and lse


def visible(q: Tensor, k: Tensor, window: int) -> Tensor:
    """bool (C, keys): what queries that are the keys' last see up to their own, the last `window` of it."""
    C, keys = q.shape[2], k.shape[2]
    return torch.ones(C, keys, dtype=torch.bool, device=q.device).tril(keys - C).triu(keys - C - window + 1)


def _rows_first(x: Tensor) -> Tensor:
    """x (B, H, C, D), in memory as (B, C, H, D): the flash kernels copy what has another order."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@dataclass(frozen=True)  # so that kernels of a class are equal, and what is known of one is known of all
class Kernel:
    """Attention of q to k and v, of which there is at least one.

    window: the queries are the last C of the keys' positions, and each sees so many of them, up to its own. None: all.
    block: how many positions of the past `forward` may be given at once; None: all of them.
    takes_many: whether it does no more than a window's work for any number of queries; others build a mask for a few.
    """

    block: ClassVar[int | None] = None
    takes_many: ClassVar[bool] = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Return out and lse."""
        raise NotImplementedError

    def prepare(self, query: Query) -> Query:
        return query  # as `backward` wants them for many blocks of the past: copies are made once

    def backward(self, query: Query, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v, where out and lse may belong to more keys than k's."""
        raise NotImplementedError


@dataclass(frozen=True)
class Plain(Kernel):
    """Softmax attention written out: any dtype and device, C x past scores in memory. With `cap`, scores s become
    cap · tanh(s / cap), as in Gemma 2."""

    block = 2048  # or the scores would grow with the past
    cap: float = math.inf

    def scores(self, q: Tensor, k: Tensor, window: int | None) -> Tensor:
        (B, H, C, D), G = q.shape, k.shape[1]
        # H/G query heads share a key head. Scores in at least float32, as in the fast kernels.
        s = q.reshape(B, G, H // G, C, D).to(wide(q)) @ k.unsqueeze(2).to(wide(q)).mT / D**0.5
        s = self.cap * (s / self.cap).tanh() if self.cap < math.inf else s  # (B, G, H/G, C, past)
        return s if window is None else s.masked_fill(~visible(q, k, window), -torch.inf)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        s = self.scores(q, k, window)
        lse = s.logsumexp(-1)  # (B, G, H/G, C)
        p = (s - lse[..., None]).exp().to(q.dtype)
        return (p @ v.unsqueeze(2)).flatten(1, 2), lse.flatten(1, 2)

    def backward(self, query: Query, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, out, lse = query
        B, H, C, D = q.shape
        shape = (B, k.shape[1], H // k.shape[1], C)
        grad_, q_ = grad.reshape(*shape, D), q.reshape(*shape, D)
        s = self.scores(q, k, window)
        p = (s - lse.reshape(*shape, 1)).exp()
        delta = (grad * out).to(p.dtype).sum(-1).reshape(*shape, 1)
        slope = 1 - (s.masked_fill(s == -torch.inf, 0) / self.cap).square() if self.cap < math.inf else 1  # of the cap
        ds = (p * slope * (grad_ @ v.unsqueeze(2).mT - delta) / D**0.5).to(q.dtype)
        dk, dv = (ds.mT @ q_).sum(2), (p.to(q.dtype).mT @ grad_).sum(2)  # over the query heads that share the key head
        return (ds @ k.unsqueeze(2)).reshape(q.shape), dk, dv


class FlashCPU(Kernel):
    """PyTorch's flash kernel for the CPU: float64, float32, bfloat16."""

    @staticmethod
    def mask(q: Tensor, k: Tensor, window: int | None) -> tuple[bool, Tensor | None]:
        """Whether it is the common one, where nothing is left out; if another one, what is added to the scores."""
        if window is None or q.shape[2] == k.shape[2] <= window:
            return window is not None, None
        return False, q.new_zeros(q.shape[2], k.shape[2]).masked_fill_(~visible(q, k, window), -torch.inf)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        causal, mask = self.mask(q, k, window)
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)

    def prepare(self, query: Query) -> Query:
        # Whole heads go to a core, and few leave some idle: `backward` cuts the past, as if into sequences of a batch.
        B = query[0].shape[0]
        grad, *rest = (x.expand(4 if B == 1 else B, *x.shape[1:]) for x in query)
        return _rows_first(grad), *rest

    def backward(self, query: Query, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        (grad, q, out, lse), operator = query, aten._scaled_dot_product_flash_attention_for_cpu_backward
        B, pieces = k.shape[0], q.shape[0] // k.shape[0]  # more than one: prepared
        # Each piece has a gradient of all queries: of a short past, that costs more than an idle core.
        if pieces == 1 or k.shape[2] % pieces or pieces * k.shape[2] < q.shape[2]:
            causal, mask = self.mask(q, k, window)
            return operator(grad[:B], q[:B], k, v, out[:B], lse[:B], 0.0, causal, attn_mask=mask)
        k, v = (x[0].unflatten(1, (pieces, -1)).transpose(0, 1) for x in (k, v))  # (pieces, G, past/pieces, D)
        dq, dk, dv = operator(grad, q, k, v, out, lse, 0.0, False)
        dk, dv = (x.transpose(0, 1).flatten(1, 2)[None] for x in (dk, dv))
        return dq.sum(0, keepdim=True, dtype=lse.dtype), dk, dv


class FlashCUDA(Kernel):
    """PyTorch's flash kernel for CUDA: bfloat16 and float16, positions before heads, which are 8, 16, … 256 numbers."""

    takes_many = True

    @staticmethod
    def sides(k: Tensor, window: int | None) -> dict[str, int]:
        """How many positions before and after its own a query sees, where that is not all of those before."""
        return {"window_size_left": window - 1, "window_size_right": 0} if window and window < k.shape[2] else {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        sides, (q, k, v) = self.sides(k, window), (x.transpose(1, 2) for x in (q, k, v))
        lengths = (None, None, q.shape[1], k.shape[1])
        out, lse, *_ = aten._flash_attention_forward(q, k, v, *lengths, 0.0, window is not None, False, **sides)
        return out.transpose(1, 2), lse

    def prepare(self, query: Query) -> Query:
        grad, q, out, lse = query
        return _rows_first(grad), q, _rows_first(out), lse.contiguous()

    def backward(self, query: Query, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        sides, (grad, q, out, lse) = self.sides(k, window), query
        grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
        lse = lse.contiguous()  # the kernel takes this for granted, and does not check it
        # Dropout's random state, which the call wants and with dropout 0 does not read.
        state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        rest = (None, None, q.shape[1], k.shape[1], 0.0, window is not None, state, unused)
        dq, dk, dv = aten._flash_attention_backward(grad, q, k, v, out, lse, *rest, **sides)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def kernel_for(device_type: str, dtype: torch.dtype, head_dim: int, capability: tuple[int, int] = (8, 0)) -> Kernel:
    """The kernel made for such tensors: a rule, which tries nothing and needs no device. capability: of a CUDA one."""
    if device_type == "cpu" and dtype in (torch.float64, torch.float32, torch.bfloat16):
        return FlashCPU()
    fits_flash = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    return FlashCUDA() if device_type == "cuda" and fits_flash and capability >= (8, 0) else Plain()


def pick_kernel(q: Tensor) -> Kernel:
    """The fastest kernel that computes q's dtype on q's device, and has been seen to compute it right."""
    about = q.device.type, q.dtype, q.shape[-1]
    kernel = kernel_for(*about, torch.cuda.get_device_capability(q.device)) if q.is_cuda else kernel_for(*about)
    return kernel if kernel == Plain() or usable(kernel, q.device, *about[1:]) else Plain()


@functools.cache  # tried once per process, for each device, dtype and head size that comes
def usable(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel computes what the plain one does, forward and backward; if not, warn."""
    try:
        with _disable_current_modes(), torch.no_grad():  # or who counts bytes would count these
            problem = _difference(kernel, device, dtype, head_dim)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as error:  # whatever a changed operator raises
        problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if problem:
        where = f"with PyTorch {torch.__version__} for {dtype} and heads of {head_dim} on {device}: {problem}"
        text = f"{type(kernel).__name__} does not work {where}. Attention is computed by the slower plain kernel."
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return not problem


def _difference(kernel: Kernel, device: torch.device, dtype: torch.dtype, D: int) -> str:
    """What the kernel gets wrong in the three cases of chunk attention; "" if nothing.

    Wrong is what is off by more than 2^-5 of its norm, 4 units of bfloat16's last place; no rounding is.
    """
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, rows: int) -> Tensor:
        return torch.randn(1, heads, rows, D, generator=generator, device="cpu").to(device, dtype)

    # A chunk of 6 to itself, 4 heads to 2; to a past of 4, with its heads folded to 2 of 12 rows; and within a window.
    cases = (("causal", 6, 4, 6, 6), ("whole", None, 2, 12, 4), ("windowed", 3, 4, 6, 8))
    for kind, window, heads, rows, length in cases:
        q, grad, k, v = random(heads, rows), random(heads, rows), random(2, length), random(2, length)
        q_, k_, v_ = q.double(), k.double(), v.double()
        out, lse = Plain().forward(q_, k_, v_, window)
        # Backward as if there were as much again beside these keys: the kernel must take what it is given.
        merged, merged_lse = (out / 2).to(dtype), lse + math.log(2)
        expected = [out, lse, *Plain().backward((grad.double(), q_, merged.double(), merged_lse), k_, v_, window)]
        got = list(kernel.forward(q, k, v, window))
        given = grad, q, merged, merged_lse.to(got[1].dtype)
        got += kernel.backward(given if window else kernel.prepare(given), k, v, window)
        for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
            error = float((x - y).double().norm() / y.double().norm())
            if not error <= 2**-5:  # not: a NaN is wrong too
                return f"{name} of a {kind} piece is off by {error:.2g} of its norm"
    return ""
