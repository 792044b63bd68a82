"""Every kernel of the chunk attention against softmax written out, and autograd's own gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minichunk.attention import attend
from minichunk.cache import LayerCache
from minichunk.chunks import Chunk
from minichunk.kernels import FlashCPU, FlashCUDA, Kernel, Plain, pick_kernel

from .gradients import Tensors
from .rounding import Exact, measure
from .strategies import blocks_of, examples

KERNELS = [Plain(), FlashCPU()]
NAMES = ["output", "dq", "dk", "dv", "dk of the past", "dv of the past"]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Bottom-right causal attention of the last C of T positions; keys and values of all T."""
    H, C, D = q.shape[1:]
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    T = k.shape[2]
    visible = torch.arange(T) <= torch.arange(T - C, T)[:, None]
    scores = (q @ k.mT / D**0.5).masked_fill(~visible, -torch.inf)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def run(
    kernel: Kernel, B: int, H: int, G: int, C: int, past: int, D: int, dtype: torch.dtype, transposed: bool
) -> tuple[Tensors, Exact]:
    """(got, expected) of the output and of the gradients of q, k, v and the past's k and v."""
    generator = torch.Generator().manual_seed(B + 10 * H + 100 * C + 1000 * past + D)

    def heads(count: int, length: int) -> torch.Tensor:
        x = torch.randn(B, length, count, D, dtype=torch.float64, generator=generator).transpose(1, 2)
        return (x if transposed else x.contiguous()).to(dtype).requires_grad_()

    q, k, v = heads(H, C), heads(G, C), heads(G, C)
    k_past, v_past = heads(G, past), heads(G, past)
    grad = torch.randn(q.shape, dtype=torch.float64, generator=generator).to(dtype)

    # A cache with more room than is used, and a second chunk behind this one.
    memory = LayerCache((B, G, past + C + 3, D), [Chunk(0, past)] if past else [], q.detach(), torch.float64)
    memory.keys.fill_(torch.nan)
    memory.values.fill_(torch.nan)
    memory.keys[:, :, :past], memory.values[:, :, :past] = k_past.detach(), v_past.detach()
    out = attend(q, k, v, memory, past, kernel)
    own = torch.autograd.grad(out, (q, k, v), grad)

    wide = [x.detach().double().requires_grad_() for x in (q, k, v, k_past, v_past)]

    def expected() -> Tensors:
        out = reference(wide[0], torch.cat([wide[3], wide[1]], 2), torch.cat([wide[4], wide[2]], 2))
        return dict(zip(NAMES, [out, *torch.autograd.grad(out, wide, grad.double())], strict=True))

    got = dict(zip(NAMES, [out, *own, memory.key_grads, memory.value_grads], strict=True))
    return got, measure(expected)


@pytest.mark.parametrize("kernel", KERNELS, ids=["plain", "flash-cpu"])
@examples(60)
@given(
    B=st.integers(1, 2),
    G=st.integers(1, 3),
    per_group=st.integers(1, 3),
    C=st.integers(1, 9),
    past=st.integers(0, 40),
    D=st.integers(1, 9),
    transposed=st.booleans(),
    block=st.integers(1, 6) | st.just(64),
)
def test_attention_over_the_cache(
    kernel: Kernel, B: int, G: int, per_group: int, C: int, past: int, D: int, transposed: bool, block: int
) -> None:
    with blocks_of(block):
        got, exact = run(kernel, B, G * per_group, G, C, past, D, torch.float64, transposed)
    exact.check(got)


@pytest.mark.parametrize("kernel", KERNELS, ids=["plain", "flash-cpu"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision(kernel: Kernel, dtype: torch.dtype, bound: float) -> None:
    got, exact = run(kernel, 2, 6, 2, 33, 300, 16, dtype, transposed=True)
    for name, expected in exact.values.items():
        assert float((got[name].detach().double() - expected).norm() / expected.norm()) < bound, name


def test_heads_of_which_the_numbers_are_not_side_by_side() -> None:
    """A concatenation may choose such strides (seen with a head size of 2); the kernels assume otherwise."""
    x = torch.randn(1, 2, 2, 4, dtype=torch.float64).transpose(2, 3)  # (B, H, D, C) in memory
    assert x.stride(-1) != 1
    memory = LayerCache((1, 2, 0, 2), [], x, torch.float64)
    measure(lambda: {"output": reference(x, x, x)}).check({"output": attend(x, x, x, memory, 0, FlashCPU())})


def test_the_kernel_fits_the_device_and_dtype() -> None:
    assert isinstance(pick_kernel(torch.zeros(1, 1, 1, 8)), FlashCPU)
    assert isinstance(pick_kernel(torch.zeros(1, 1, 1, 8, dtype=torch.float16)), Plain)
    assert isinstance(pick_kernel(torch.zeros(1, 1, 1, 8, device="meta")), Plain)


def test_cuda_kernel_calls_fit_the_operators() -> None:
    """Shapes of the CUDA calls, checked without a device: fake tensors run the operators' signatures."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernel = FlashCUDA()
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.zeros(2, 6, 16, 64, dtype=torch.bfloat16)
        k = torch.zeros(2, 2, 48, 64, dtype=torch.bfloat16)
        out, lse = kernel.forward(q, k, k, causal=False)
        assert out.shape == q.shape
        assert lse.shape == (2, 6, 16)
        grads = kernel.backward(out, q, k, k, out, lse, causal=False)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
