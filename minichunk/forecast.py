"""How much memory a training step needs: the real code, run under fake tensors and counted."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .attention import BLOCK
from .chunks import Chunk, check_batch, cut
from .count import CountBytes
from .errors import InputError
from .full import full
from .kernels import FlashCUDA, use_kernel
from .model import Llama
from .quantize import check_bitsandbytes
from .seco import fill, new_cache, rebuild
from .shapes import random_model

METHODS = ("seco", "spaco", "full", "full-recompute")


@dataclass(frozen=True)
class Setting:
    """What is to be trained, and how. cache_grad_dtype None: float32, or wider with a wider model."""

    model: str = "llama-3-8b"
    method: str = "seco"
    chunk_size: int = 512
    budget: int = 8
    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dtype: torch.dtype = torch.bfloat16
    cache_grad_dtype: torch.dtype | None = None
    recompute: bool = True
    device: str = "cuda"
    offload: bool = False
    load_in_4bit: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at the peak of one training step, what they consist of, and bytes in host memory."""

    peak: int
    weights: int
    adapter_and_optimizer: int
    cache: int
    cache_gradients: int
    chunk: int
    host: int = 0


@dataclass(frozen=True)
class Forecast:
    """The memory at a length, and how it grows: peak(T) = fixed + per_token * T from `base` tokens on."""

    at_base: Memory
    base: int
    per_token: float
    cache_per_token: float
    cache_gradients_per_token: float
    host_per_token: float = 0.0

    def at(self, tokens: int) -> Memory:
        more = max(0, tokens - self.base)
        m = self.at_base
        cache = m.cache + round(more * self.cache_per_token)
        grads = m.cache_gradients + round(more * self.cache_gradients_per_token)
        peak = m.peak + round(more * self.per_token)
        rest = peak - m.weights - m.adapter_and_optimizer - cache - grads
        host = m.host + round(more * self.host_per_token)
        return Memory(peak, m.weights, m.adapter_and_optimizer, cache, grads, rest, host)

    def longest(self, available: int, chunk_size: int, host: int | None = None) -> int:
        """Tokens, in whole chunks, that fit into `available` bytes on the device and `host` bytes (None: any number).

        0 if even the base does not fit.
        """
        more = [self._room(available - self.at_base.peak, self.per_token)]
        if host is not None:
            more.append(self._room(host - self.at_base.host, self.host_per_token))
        tokens = self.base + min(more)
        return int(tokens // chunk_size * chunk_size) if min(more) >= 0 else 0

    @staticmethod
    def _room(bytes_left: int, per_token: float) -> float:
        return bytes_left if bytes_left < 0 else bytes_left / per_token if per_token > 0 else float("inf")


def step_memory(setting: Setting, tokens: int) -> Memory:
    """Run one training step of `tokens` tokens under fake tensors and count its bytes."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if setting.device == "cuda":
            # Fake CPU tensors stand for CUDA ones: the flash operators' shapes are the same.
            stack.enter_context(use_kernel(FlashCUDA()))
        count = stack.enter_context(CountBytes())
        if setting.load_in_4bit:
            check_bitsandbytes()
        model = random_model(
            setting.model, setting.dtype, setting.rank, setting.targets, load_in_4bit=setting.load_in_4bit
        )
        count.settle()
        count.peak = count.live  # quantizing a whole model took more; loading it does not
        states = optimizer_states(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
        weights = sum(x.numel() * x.element_size() for x in frozen)
        adapter = sum(p.numel() * p.element_size() for p in trained) + sum(s.numel() * 4 for s in states)
        adapter += sum(p.numel() * max(4, p.element_size()) for p in trained)  # their gradients
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        cache, grads = _step(model, ids, setting, count)
    if setting.offload:
        return Memory(count.peak, weights, adapter, 0, 0, count.peak - weights - adapter, cache + grads)
    return Memory(count.peak, weights, adapter, cache, grads, count.peak - weights - adapter - cache - grads)


def optimizer_states(model: Llama) -> list[Tensor]:
    """AdamW's two moments of every trained parameter, and the float32 copies of those in half precision."""
    trained = [p for p in model.parameters() if p.requires_grad]
    copies = [torch.zeros(p.shape, dtype=torch.float32) for p in trained if p.dtype.itemsize < 4]
    return copies + [torch.zeros(p.shape, dtype=torch.float32) for p in trained for _ in range(2)]


def _kept(setting: Setting, tokens: int) -> list[Chunk]:
    """The chunks that a step keeps; for SpaCO the last ones, so that the cache is as long as it gets."""
    chunks = cut(tokens, setting.chunk_size)
    return chunks[-setting.budget :] if setting.method == "spaco" else chunks


def _step(model: Llama, ids: Tensor, setting: Setting, count: CountBytes) -> tuple[int, int]:
    """The heaviest part of a training step; returns the bytes of the cache and of its gradients.

    seco.py and spaco.py call the same functions.

    The last chunk sends gradients back, the one before it also receives some, and the further ones do
    the same on a shorter past: three are enough.
    """
    num_targets = float(ids.numel())
    if setting.method in ("full", "full-recompute"):
        full(model, ids, ids, recompute=setting.method == "full-recompute", num_targets=num_targets)
        return 0, 0
    targets, divisor = check_batch(model, ids, ids, num_targets)
    chunks, kept = cut(ids.shape[1], setting.chunk_size), _kept(setting, ids.shape[1])
    peak_before = count.peak
    cache = new_cache(model, ids, kept, setting.cache_grad_dtype, setting.offload)
    buffers = [layer.buffers() for layer in cache.layers]
    if setting.offload:
        # Host memory, which only fake tensors place on the device.
        count.leave_out(*(x for pair in buffers for part in pair for x in part))
        count.peak = max(peak_before, count.live)
    fill(model, ids, chunks[-2:-1], cache)
    for chunk in kept[:-4:-1]:
        loss, written, received = rebuild(model, ids, targets, chunk, cache, setting.recompute)
        if setting.method == "spaco":
            received = [1.0 * g for g in received]
        torch.autograd.backward([loss / divisor, *written], [None, *received])
        del loss, written, received
    both = ([x for pair in buffers for x in pair[i]] for i in (0, 1))
    cache_bytes, grad_bytes = (sum(x.numel() * x.element_size() for x in part) for part in both)
    return cache_bytes, grad_bytes


@functools.cache
def forecast(setting: Setting) -> Forecast:
    """Run the step at two lengths beyond which memory grows linearly, and extend the line."""
    if setting.method not in METHODS:
        raise InputError(f"--method is {setting.method!r}, but must be one of {', '.join(METHODS)}")
    size = setting.chunk_size
    cut(1, size)  # checks the size
    if setting.method in ("full", "full-recompute"):
        base, more = 1024, 1024
    else:
        kept = setting.budget if setting.method == "spaco" else 0
        base, more = (max(BLOCK // size + 1, kept) + 2) * size, 2 * size
    first, second = step_memory(setting, base), step_memory(setting, base + more)
    return Forecast(
        first,
        base,
        (second.peak - first.peak) / more,
        (second.cache - first.cache) / more,
        (second.cache_gradients - first.cache_gradients) / more,
        (second.host - first.host) / more,
    )
