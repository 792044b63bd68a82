"""What only a GPU can show: its kernels against the plain ones, and its memory against the forecast."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import minichunk as mc
from minichunk.blocks import Hidden
from minichunk.chunks import Chunk
from minichunk.costs.forecast import bytes_of_share
from minichunk.costs.setting import Setting
from minichunk.memory.cache import LayerCache
from minichunk.memory.kernels import FlashCUDA, Plain, usable
from minichunk.memory.window import FULL, Pattern, Strided, Window
from minichunk.models.llama import Llama
from minichunk.models.shapes import random_model

from .gradients import distance
from .strategies import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("past", [0, 96])
@pytest.mark.parametrize("pattern", [FULL, Window(24, 3), Window(80, 7), Strided(8, 3, 4)])
def test_cuda_kernel_equals_the_plain_one(past: int, pattern: Pattern) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    q, grad = torch.randn(2, 6, 64, 64, **shape), torch.randn(2, 6, 64, 64, **shape)
    k, v = torch.randn(2, 2, 64, 64, **shape), torch.randn(2, 2, 64, 64, **shape)
    results = []
    for kernel in (FlashCUDA(), Plain()):
        filled = Chunk(0, past)
        memory = LayerCache((2, 2, past, 64), [filled] if past else [], q, torch.float32, pattern)
        memory.kernel = kernel
        keys = torch.linspace(-1, 1, past, device="cuda")[:, None].expand(2, 2, past, 64)
        memory.write([filled], (keys, keys))
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = memory.past([Chunk(past, past + 64)], save=False).attend(*inputs)
        own = torch.autograd.grad(out, inputs, grad)
        results.append([out.detach(), *own, *(memory.hand_over(filled) if past else ())])
    for got, expected in zip(*results, strict=True):
        assert float((got - expected).float().norm()) <= 2e-2 * float(expected.float().norm()) + 1e-6


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cuda_kernel_is_found_usable(dtype: torch.dtype, head_dim: int) -> None:
    """A warning would fail the test, and name the reason."""
    assert usable(FlashCUDA(), torch.device("cuda", 0), dtype, head_dim)


def gradient(
    method: str, dtype: torch.dtype, offload: bool = False, device: str = "cuda", steps: int = 1
) -> dict[str, torch.Tensor]:
    """By one method, of a model and a text that do not depend on method and dtype; in float64 on the CPU.

    steps: how many times over; the gradient is their sum.
    """
    torch.manual_seed(0)
    config = tiny(layers=3, hidden_size=256, intermediate_size=512, num_attention_heads=8, head_dim=32, vocab_size=512)
    model = Llama(config).to(device, torch.bfloat16).to(dtype)  # the same weights, whatever the dtype
    ids = torch.randint(512, (1, 1000), generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(steps):
        if method == "full":
            mc.full(model, ids, ids)
        else:
            mc.seco(model, ids, ids, 128, offload=offload)
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_seco_is_as_exact_as_full(dtype: torch.dtype, offload: bool) -> None:
    """The bound is what rounding does to `full` itself; half as much again for another order of sums."""
    exact = gradient("full", torch.float64)
    assert distance(gradient("seco", dtype, offload), exact) <= 1.5 * distance(gradient("full", dtype), exact)


@pytest.mark.parametrize("offload", [False, True])
def test_seco_in_float64_equals_full(offload: bool) -> None:
    assert distance(gradient("seco", torch.float64, offload), gradient("full", torch.float64)) < 1e-12


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", ["hybrid", "mamba2"])
def test_states_equal_full_on_the_cpu(kind: str, offload: bool) -> None:
    """In float64, where the device may add up in another order and no more; some chunks skipped, too."""
    torch.manual_seed(0)
    layers = ("state", "full_attention", "state")
    attention = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model: mc.StateSpace | mc.Mamba2
    if kind == "mamba2":
        model = mc.Mamba2(mc.Mamba2Config(512, 32, 16, 3, 4, 16, 2)).double()
    else:
        model = mc.StateSpace(mc.StateSpaceConfig(512, 32, 16, 3, layers, **attention)).double()  # type: ignore[arg-type]
    ids, entries = torch.randint(512, (2, 500)), [mc.Weight(2.0, 3.0), None, None, mc.Weight(1.5, 0.5)] * 2

    def gradient(device: str, method: str) -> dict[str, torch.Tensor]:
        model.to(device).zero_grad()
        here = ids.to(device)
        if method == "full":
            mc.full(model, here, here)
        elif method == "seco":
            mc.seco(model, here, here, 64, offload=offload and device == "cuda", recompute=True)
        else:
            mc.spaco(model, here, here, 64, sampler=lambda *_: entries, offload=offload and device == "cuda")
        return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}

    assert distance(gradient("cuda", "seco"), gradient("cpu", "full")) < 1e-12
    assert distance(gradient("cuda", "spaco"), gradient("cpu", "spaco")) < 1e-12


@contextmanager
def late(stream: str) -> Iterator[None]:
    """Within the block the copies, or the computation, begin some 0.3 ms after they could."""

    def after_sleep(original: Any, hidden: Hidden, *arguments: Any) -> Any:
        with torch.cuda.stream(hidden.copies if stream == "copies" else None):
            torch.cuda._sleep(500_000)  # cycles: longer than a chunk takes to come or to be used
        return original(hidden, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("keep", "start", "arrived"):
            original = getattr(Hidden, name)
            patch.setattr(Hidden, name, lambda *arguments, original=original: after_sleep(original, *arguments))
        yield


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])  # the second one while the first is current
@pytest.mark.parametrize("stream", ["copies", "computation"])
def test_a_late_copy_is_waited_for(stream: str, device: str) -> None:
    """Whoever did not wait would find another chunk's numbers, or none."""
    if device == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    expected = gradient("seco", torch.float64, device=device, steps=3)
    with late(stream):
        assert distance(gradient("seco", torch.float64, True, device, steps=3), expected) < 1e-12


@pytest.mark.parametrize("method", ["seco", "spaco"])
@pytest.mark.parametrize(("recompute", "offload"), [(True, False), (False, False), (True, True)])
def test_peak_memory_is_the_forecast(method: str, recompute: bool, offload: bool) -> None:
    setting = Setting(model="llama-3.2-1b", method=method, budget=3, recompute=recompute, offload=offload)
    tokens = 8192
    entries = [None] * (tokens // 512 - 3) + [mc.Weight(1.0, 1.0)] * 3
    model = random_model(setting.model, setting.torch_dtype, setting.rank, device="cuda")
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="cuda")
    arguments: dict[str, Any] = {"chunk_size": 512, "recompute": recompute, "offload": offload}
    if method == "spaco":
        arguments["sampler"] = lambda *_: entries
    step = mc.seco if method == "seco" else mc.spaco
    step(
        model, ids[:, :1024], ids[:, :1024], **(arguments | ({"sampler": mc.Bernoulli(1)} if method == "spaco" else {}))
    )
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step(model, ids, ids, **arguments)
    forecast = bytes_of_share(setting, tokens, None)
    states = 2 * sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert torch.cuda.max_memory_allocated() == pytest.approx(forecast.peak - states, rel=0.05)


def test_deterministic_runs_repeat_every_bit() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    first, second = gradient("seco", torch.bfloat16), gradient("seco", torch.bfloat16)
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)
