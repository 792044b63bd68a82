"""Every kernel of the chunk attention against softmax written out, and autograd's own gradients."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from math import inf, log, nan
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from minichunk.chunks import ONE, Chunk
from minichunk.costs.count import CountBytes
from minichunk.memory import kernels
from minichunk.memory.cache import LayerCache
from minichunk.memory.kernels import FlashCPU, FlashCUDA, Kernel, Plain, kernel_for, pick_kernel
from minichunk.memory.window import FULL, Pattern, Strided, Window, runs

from .gradients import Tensors, distance, visible
from .rounding import Exact, measure
from .strategies import blocks_of, examples, strided, windows


class Unmasked(Plain):
    """The plain kernel given all queries at once, as FlashCUDA is."""

    takes_many = True


class NoEmptyKeys:
    """A kernel that is never called without keys: PyTorch's CPU kernel then divides by 0, and the process is gone."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def forward(self, q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Any:
        assert min(q.shape[2], k.shape[2]) > 0
        return self.kernel.forward(q, k, *rest)


KERNELS = {"plain": Plain(), "plain, all queries": Unmasked(), "capped": Plain(cap=1.5), "flash-cpu": FlashCPU()}
SMALL = {"B": 1, "G": 1, "per_group": 1, "past": 2, "D": 4, "transposed": False, "block": 64}
NAMES = ["output", "dsinks", "dq", "dk", "dv", "dk of the past", "dv of the past"]


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern = FULL, cap: float = inf, sinks: Any = None
) -> torch.Tensor:
    """Bottom-right causal attention of the last C of T positions; keys and values of all T."""
    H, C, D = q.shape[1:]
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    T = k.shape[2]
    scores = q @ k.mT / D**0.5
    scores = scores if cap == inf else cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible(pattern, T)[T - C :], -torch.inf)
    beside = scores if sinks is None else torch.cat([scores, sinks[:, None, None].expand(len(q), H, C, 1)], -1)
    return (scores - beside.logsumexp(-1, keepdim=True)).exp() @ v


def attend_alone(x: torch.Tensor) -> torch.Tensor:
    """A chunk without a past."""
    past = LayerCache((*x.shape[:2], 0, x.shape[3]), [], x, x.dtype).past([Chunk(0, x.shape[2])], save=False)
    return past.attend(x, x, x)


def run(
    kernel: Kernel, B: int, H: int, G: int, C: int, past: int, D: int, dtype: torch.dtype, transposed: bool,
    pattern: Pattern = FULL, has_sinks: bool = False,
) -> tuple[Tensors, Exact]:  # fmt: skip
    """(got, expected) of the output and of the gradients of the sinks, q, k, v and the past's k and v."""
    generator = torch.Generator().manual_seed(B + 10 * H + 100 * C + 1000 * past + D)

    def heads(count: int, length: int) -> torch.Tensor:
        x = torch.randn(B, length, count, D, dtype=torch.float64, generator=generator).transpose(1, 2)
        return (x if transposed else x.contiguous()).to(dtype).requires_grad_()

    q, k, v = heads(H, C), heads(G, C), heads(G, C)
    k_past, v_past = heads(G, past), heads(G, past)
    sinks = torch.randn(H, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(q.shape, dtype=torch.float64, generator=generator).to(dtype)

    # A cache with more room than is used, and a second chunk behind this one.
    filled = [Chunk(0, past)] if past else []
    receiving = [*filled, Chunk(past, past + C)]
    memory = LayerCache((B, G, past + C + 3, D), receiving, q.detach(), torch.float64, pattern)
    for x in memory.tensors().remembered:
        x.fill_(torch.nan)
    memory.kernel = NoEmptyKeys(kernel)
    memory.write([Chunk(0, past)], (k_past.detach(), v_past.detach()))
    out = memory.past([Chunk(past, past + C)], save=False).attend(q, k, v, sinks if has_sinks else None)
    own = torch.autograd.grad(out, (sinks, q, k, v), grad, materialize_grads=True)

    wide = [x.detach().double().requires_grad_() for x in (sinks, q, k, v, k_past, v_past)]

    def expected() -> Tensors:
        keys_values = (torch.cat([wide[4], wide[2]], 2), torch.cat([wide[5], wide[3]], 2))
        out = reference(wide[1], *keys_values, pattern, getattr(kernel, "cap", inf), wide[0] if has_sinks else None)
        grads = torch.autograd.grad(out, wide, grad.double(), materialize_grads=True)
        return dict(zip(NAMES, [out, *grads], strict=True))

    received = memory.hand_over(Chunk(0, past)) if past else (k_past.detach(), v_past.detach())
    got = dict(zip(NAMES, [out, *own, *received], strict=True))
    return got, measure(expected)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@examples(100)
@given(
    B=st.integers(1, 2), G=st.integers(1, 3), per_group=st.integers(1, 3), C=st.integers(1, 20),
    past=st.integers(0, 40), D=st.integers(1, 9), transposed=st.booleans(), block=st.integers(1, 6) | st.just(64),
    pattern=st.just(FULL) | windows(24, 12) | strided(), has_sinks=st.booleans(),
)  # fmt: skip
@example(**SMALL, C=1, pattern=Strided(2, 1, 2), has_sinks=False)
@example(**SMALL, C=1, pattern=Strided(2, 1, None), has_sinks=True)
@example(**SMALL, C=3, pattern=Window(1), has_sinks=False)
def test_attention_over_the_cache(
    kernel: Kernel, B: int, G: int, per_group: int, C: int, past: int, D: int, transposed: bool, block: int,
    pattern: Pattern, has_sinks: bool,
) -> None:  # fmt: skip
    """Chunks before, across and behind the place from which on something is left out; pinned ones in the chunk too.

    Blocks of the past, and the queries that a kernel is given at once, are of one size.
    """
    with blocks_of(block):
        got, exact = run(kernel, B, G * per_group, G, C, past, D, torch.float64, transposed, pattern, has_sinks)
    exact.check(got)


@examples(50)
@given(
    start=st.integers(0, 30), length=st.integers(1, 30), most=st.integers(1, 30), pattern=windows(20, 10) | strided()
)
def test_runs_are_the_rule(start: int, length: int, most: int, pattern: Pattern) -> None:
    """Together they see what the rule says, and nothing twice, and no further back than the pattern's reach."""
    stop = start + length
    seen = torch.zeros(length, stop, dtype=torch.int64)
    at = start
    for run, _ in runs(pattern, ONE, start, stop, most):
        assert run.start == at and run.stop <= at + most
        pinned = {j for span in pattern.pinned(0, run.start) for j in range(*span)}
        assert pinned >= {*range(run.low, run.start - pattern.reach)}
        for i in range(run.start, run.stop):
            first = max(run.low, i - run.window + 1)
            seen[i - start, first : i + 1] += 1
            for low, high in pattern.pinned(0, run.low):
                seen[i - start, low:high] += 1
        at = run.stop
    assert at == stop
    expected = visible(pattern, stop)[start:]
    assert torch.equal(seen, expected.long())
    mask = pattern.mask(stop, start)
    assert mask is not None
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("pattern", [FULL, Window(40, 5), Strided(4, 5, 3)])
def test_lower_precision(kernel: Kernel, dtype: torch.dtype, bound: float, pattern: Pattern) -> None:
    got, exact = run(kernel, 2, 6, 2, 33, 300, 16, dtype, transposed=True, pattern=pattern, has_sinks=True)
    for name, expected in exact.values.items():
        assert float((got[name].detach().double() - expected).norm() / expected.norm()) < bound, name


def test_many_blocks_are_as_exact_as_one() -> None:
    """A query's gradient is a sum over the blocks of the past: in bfloat16 it would drift with their number."""
    errors = {}
    for block in (1024, 8):  # 1 block and 128
        with blocks_of(block):
            got, exact = run(FlashCPU(), 1, 4, 2, 16, 1024, 32, torch.bfloat16, transposed=True)
        errors[block] = distance({"dq": got["dq"].double()}, {"dq": exact.values["dq"]})
    assert errors[8] < 1.25 * errors[1024]  # 0.0034 and 0.0034; summed in bfloat16, 0.0135


def test_heads_of_which_the_numbers_are_not_side_by_side() -> None:
    """A concatenation may choose such strides (seen with a head size of 2); the kernels assume otherwise."""
    x = torch.randn(1, 2, 2, 4, dtype=torch.float64).transpose(2, 3)  # (B, H, D, C) in memory
    assert x.stride(-1) != 1
    measure(lambda: {"output": reference(x, x, x)}).check({"output": attend_alone(x)})


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "expected"),
    [
        ("cpu", torch.float64, 7, (8, 0), FlashCPU),
        ("cpu", torch.bfloat16, 64, (8, 0), FlashCPU),
        ("cpu", torch.float16, 64, (8, 0), Plain),
        ("cuda", torch.float16, 256, (8, 0), FlashCUDA),
        ("cuda", torch.bfloat16, 64, (7, 5), Plain),
        ("cuda", torch.float32, 64, (9, 0), Plain),
        ("cuda", torch.bfloat16, 60, (9, 0), Plain),
        ("cuda", torch.bfloat16, 264, (9, 0), Plain),
        ("meta", torch.bfloat16, 64, (8, 0), Plain),
    ],
)
def test_the_kernel_made_for_a_device_and_dtype(
    device: str, dtype: torch.dtype, head_dim: int, capability: tuple[int, int], expected: type
) -> None:
    kernel = kernel_for(device, dtype, head_dim, capability)
    assert isinstance(kernel, expected)
    assert (kernel.block is None) == (expected is not Plain)  # its scores may not grow with the past


def test_what_has_no_numbers_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "usable", lambda *_: pytest.fail("was tried"))
    assert isinstance(pick_kernel(torch.zeros(1, 1, 1, 8, device="meta")), Plain)


ops = torch.ops.aten
CPU_FORWARD, CPU_BACKWARD = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


def raises(*_: object, **__: object) -> None:
    raise RuntimeError("no kernel image is available\nand much more")


def then(operator: str, change: Callable) -> Callable:
    """The operator, whose results are changed."""
    return lambda *args, **mask: change(*getattr(ops, operator)(*args, **mask))


def without_a_mask(operator: str) -> Callable:
    return lambda *args, **_: getattr(ops, operator)(*args)


def own_lse(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any, **mask: Any) -> Any:
    """A backward that looks right until there are other keys."""
    out, lse = getattr(ops, CPU_FORWARD)(q, k, v, *rest, **mask)
    return getattr(ops, CPU_BACKWARD)(grad, q, k, v, out, lse, *rest, **mask)


@pytest.mark.parametrize(
    ("operator", "changed", "told"),
    [
        (CPU_FORWARD, raises, "RuntimeError: no kernel image is available. Attention"),
        (CPU_FORWARD, then(CPU_FORWARD, lambda out, lse: (out, lse / log(2))), "lse of a causal piece is off by 0.44"),
        (CPU_FORWARD, then(CPU_FORWARD, lambda out, lse: (out, lse.mT)), "RuntimeError: The size of tensor a"),
        (CPU_FORWARD, without_a_mask(CPU_FORWARD), "out of a windowed piece is off by"),
        (CPU_BACKWARD, without_a_mask(CPU_BACKWARD), "dq of a windowed piece is off by"),
        (CPU_BACKWARD, raises, "RuntimeError: no kernel image"),
        (CPU_BACKWARD, own_lse, "dq of a causal piece is off by"),
        (CPU_BACKWARD, then(CPU_BACKWARD, lambda dq, dk, dv: (dq, dk, dv * nan)), "dv of a causal piece is off by nan"),
        (
            CPU_BACKWARD,
            then(CPU_BACKWARD, lambda dq, dk, dv: (dq, dk * 1.05, dv)),
            "dk of a causal piece is off by 0.0",
        ),
    ],
)
def test_an_operator_that_has_changed_is_not_used(
    monkeypatch: pytest.MonkeyPatch, operator: str, changed: Callable, told: str
) -> None:
    """The operators are private to PyTorch: in another version they may be gone, or compute something else."""
    q = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    operators = {CPU_FORWARD: getattr(ops, CPU_FORWARD), CPU_BACKWARD: getattr(ops, CPU_BACKWARD), operator: changed}
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "usable", cache(kernels.usable.__wrapped__))  # what is found out here is not remembered
        patch.setattr(kernels, "aten", SimpleNamespace(**operators))
        with pytest.warns(RuntimeWarning, match=f"FlashCPU does not .* {re.escape(torch.__version__)} .*{told}"):
            assert isinstance(pick_kernel(q), Plain)
        assert isinstance(pick_kernel(q), Plain)  # and is not said again
        torch.testing.assert_close(attend_alone(q), reference(q, q, q), rtol=1e-5, atol=1e-6)
    assert isinstance(pick_kernel(q), FlashCPU)


def test_too_little_memory_is_no_fault_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, "usable", cache(kernels.usable.__wrapped__))
    with monkeypatch.context() as patch:
        patch.setattr(FlashCPU, "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            pick_kernel(torch.zeros(1, 1, 1, 8))
    assert isinstance(pick_kernel(torch.zeros(1, 1, 1, 8)), FlashCPU)  # it is tried again


def test_trying_a_kernel_leaves_no_trace() -> None:
    kernels.usable.cache_clear()
    state = torch.get_rng_state()
    q = torch.zeros(1, 1, 1, 8)
    with CountBytes() as count:
        pick_kernel(q)
    assert count.peak == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_cuda_kernel_calls_fit_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of the CUDA calls, checked without a device: fake tensors run the operators' signatures."""
    given: list[Any] = []

    def seen(operator: Callable) -> Callable:
        return lambda *args, **sides: given.__setitem__(slice(None), [*args, sides]) or operator(*args, **sides)

    names = ("_flash_attention_forward", "_flash_attention_backward")
    operators = {name: seen(getattr(ops, name)) for name in names}
    monkeypatch.setattr(kernels, "aten", SimpleNamespace(**operators))
    kernel = FlashCUDA()
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.zeros(2, 6, 16, 64, dtype=torch.bfloat16)
        k = torch.zeros(2, 2, 48, 64, dtype=torch.bfloat16)
        out, lse = kernel.forward(q, k, k)
        assert out.shape == q.shape
        assert lse.shape == (2, 6, 16)
        grads = kernel.backward((out, q, out, lse), k, k)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
        for window, keys, sides in ((16, q[:, :2], {}), (33, k, {"window_size_left": 32, "window_size_right": 0})):
            out, lse = kernel.forward(q, keys, keys, window)
            assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
            assert (given[8], given[-1]) == (True, sides)  # causal
            grads = kernel.backward((out, q, out, lse), keys, keys, window)
            assert [g.shape for g in grads] == [q.shape, keys.shape, keys.shape]
            assert (given[11], given[-1]) == (True, sides)
        kernel.backward((out, q, out, lse.mT.contiguous().mT), k, k)
    assert given[5].is_contiguous()  # the kernel reads lse row after row, whatever its strides
    assert (given[12].dtype, given[12].shape) == (torch.uint64, (2,))  # seed and offset
