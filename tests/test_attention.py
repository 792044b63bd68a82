"""Every kernel of the chunk attention against softmax written out, and autograd's own gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minichunk.attention import attend
from minichunk.cache import LayerCache
from minichunk.chunks import Chunk
from minichunk.kernels import FlashCPU, FlashCUDA, Kernel, Plain, pick_kernel

KERNELS = [Plain(), FlashCPU()]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Bottom-right causal attention of the last C of T positions; keys and values of all T."""
    H, C, D = q.shape[1:]
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    T = k.shape[2]
    visible = torch.arange(T) <= torch.arange(T - C, T)[:, None]
    return (q @ k.mT / D**0.5).masked_fill(~visible, -torch.inf).softmax(-1) @ v


def run(
    kernel: Kernel, B: int, H: int, G: int, C: int, past: int, D: int, dtype: torch.dtype, transposed: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(got, expected) of the output and of the gradients of q, k, v and the past's k and v."""
    generator = torch.Generator().manual_seed(B + 10 * H + 100 * C + 1000 * past + D)

    def heads(count: int, length: int) -> torch.Tensor:
        x = torch.randn(B, length, count, D, dtype=torch.float64, generator=generator).transpose(1, 2)
        return (x if transposed else x.contiguous()).to(dtype).requires_grad_()

    q, k, v = heads(H, C), heads(G, C), heads(G, C)
    k_past, v_past = heads(G, past), heads(G, past)
    grad = torch.randn(q.shape, dtype=torch.float64, generator=generator)

    # A cache with more room than is used, and a second chunk behind this one.
    memory = LayerCache((B, G, past + C + 3, D), [Chunk(0, past)] if past else [], q.detach(), torch.float64)
    memory.keys.fill_(torch.nan)
    memory.values.fill_(torch.nan)
    memory.keys[:, :, :past], memory.values[:, :, :past] = k_past.detach(), v_past.detach()
    out = attend(q, k, v, memory, past, kernel)
    own = torch.autograd.grad(out, (q, k, v), grad.to(dtype))

    wide = [x.detach().double().requires_grad_() for x in (q, k, v, k_past, v_past)]
    expected = reference(wide[0], torch.cat([wide[3], wide[1]], 2), torch.cat([wide[4], wide[2]], 2))
    grads = torch.autograd.grad(expected, wide, grad)
    got = [out, *own, memory.key_grads, memory.value_grads]
    return [(g.detach().double(), e.detach()) for g, e in zip(got, [expected, *grads], strict=True)]


@pytest.mark.parametrize("kernel", KERNELS, ids=["plain", "flash-cpu"])
@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 2),
    G=st.integers(1, 3),
    per_group=st.integers(1, 3),
    C=st.integers(1, 9),
    past=st.integers(0, 40),
    D=st.integers(1, 9),
    transposed=st.booleans(),
)
def test_attention_over_the_cache(
    kernel: Kernel, B: int, G: int, per_group: int, C: int, past: int, D: int, transposed: bool
) -> None:
    for got, expected in run(kernel, B, G * per_group, G, C, past, D, torch.float64, transposed):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kernel", KERNELS, ids=["plain", "flash-cpu"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision(kernel: Kernel, dtype: torch.dtype, bound: float) -> None:
    for got, expected in run(kernel, 2, 6, 2, 33, 300, 16, dtype, transposed=True):
        assert float((got - expected).norm() / expected.norm()) < bound


def test_many_blocks_are_as_exact_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A query's gradient is a sum over the blocks of the past: in bfloat16 it would drift with their number."""
    errors: dict[int, float] = {}
    for block in (1024, 8):  # 1 block and 128
        monkeypatch.setattr("minichunk.attention.BLOCK", block)
        _, (dq, expected), *_ = run(FlashCPU(), 1, 4, 2, 16, 1024, 32, torch.bfloat16, transposed=True)
        errors[block] = float((dq - expected).norm() / expected.norm())
    assert errors[8] < 1.25 * errors[1024]  # 0.0034 and 0.0034; summed in bfloat16, 0.0135


def test_heads_of_which_the_numbers_are_not_side_by_side() -> None:
    """A concatenation may choose such strides (seen with a head size of 2); the kernels assume otherwise."""
    x = torch.randn(1, 2, 2, 4, dtype=torch.float64).transpose(2, 3)  # (B, H, D, C) in memory
    assert x.stride(-1) != 1
    memory = LayerCache((1, 2, 0, 2), [], x, torch.float64)
    torch.testing.assert_close(attend(x, x, x, memory, 0, FlashCPU()), reference(x, x, x), rtol=1e-12, atol=1e-13)


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
