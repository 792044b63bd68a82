"""How much memory a training step needs: the real code, run under fake tensors and counted."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .attention import BLOCK, FlashCUDA, use_kernel
from .chunks import Chunk, check_batch, cut
from .count import CountBytes
from .errors import InputError
from .full import full
from .model import Llama
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


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of one training step, and what they consist of."""

    peak: int
    weights: int
    adapter_and_optimizer: int
    cache: int
    cache_gradients: int
    chunk: int


@dataclass(frozen=True)
class Forecast:
    """The memory at a length, and how it grows: peak(T) = fixed + per_token * T from `base` tokens on."""

    at_base: Memory
    base: int
    per_token: float
    cache_per_token: float
    cache_gradients_per_token: float

    def at(self, tokens: int) -> Memory:
        more = max(0, tokens - self.base)
        m = self.at_base
        cache = m.cache + round(more * self.cache_per_token)
        grads = m.cache_gradients + round(more * self.cache_gradients_per_token)
        peak = m.peak + round(more * self.per_token)
        rest = peak - m.weights - m.adapter_and_optimizer - cache - grads
        return Memory(peak, m.weights, m.adapter_and_optimizer, cache, grads, rest)

    def longest(self, available: int, chunk_size: int) -> int:
        """Tokens, in whole chunks, of which the peak fits into `available` bytes; 0 if even the base does not."""
        if self.at_base.peak > available:
            return 0
        tokens = self.base + int((available - self.at_base.peak) / self.per_token)
        return tokens // chunk_size * chunk_size


def step_memory(setting: Setting, tokens: int) -> Memory:
    """Run one training step of `tokens` tokens under fake tensors and count its bytes."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if setting.device == "cuda":
            # Fake CPU tensors stand for CUDA ones: the flash operators' shapes are the same.
            stack.enter_context(use_kernel(FlashCUDA()))
        count = stack.enter_context(CountBytes())
        model = random_model(setting.model, setting.dtype, setting.rank, setting.targets)
        states = optimizer_states(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
        adapter = sum(p.numel() * p.element_size() for p in trained) + sum(s.numel() * 4 for s in states)
        adapter += sum(p.numel() * max(4, p.element_size()) for p in trained)  # their gradients
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        _step(model, ids, setting)
        cache, grads = _cache_bytes(model, ids, setting)
    rest = count.peak - weights - adapter - cache - grads
    return Memory(count.peak, weights, adapter, cache, grads, rest)


def optimizer_states(model: Llama) -> list[Tensor]:
    """AdamW's two moments of every trained parameter, and the float32 copies of those in half precision."""
    trained = [p for p in model.parameters() if p.requires_grad]
    copies = [torch.zeros(p.shape, dtype=torch.float32) for p in trained if p.dtype.itemsize < 4]
    return copies + [torch.zeros(p.shape, dtype=torch.float32) for p in trained for _ in range(2)]


def _kept(setting: Setting, tokens: int) -> list[Chunk]:
    """The chunks that a step keeps; for SpaCO the last ones, so that the cache is as long as it gets."""
    chunks = cut(tokens, setting.chunk_size)
    return chunks[-setting.budget :] if setting.method == "spaco" else chunks


def _step(model: Llama, ids: Tensor, setting: Setting) -> None:
    """The heaviest part of a training step; seco.py and spaco.py call the same functions.

    The last chunk sends gradients back, the one before it also receives some, and the further ones do
    the same on a shorter past: three are enough.
    """
    count = float(ids.numel())
    if setting.method in ("full", "full-recompute"):
        full(model, ids, ids, recompute=setting.method == "full-recompute", num_targets=count)
        return
    targets, divisor = check_batch(model, ids, ids, count)
    chunks, kept = cut(ids.shape[1], setting.chunk_size), _kept(setting, ids.shape[1])
    cache = new_cache(model, ids, kept, setting.cache_grad_dtype)
    fill(model, ids, chunks[-2:-1], cache)
    for chunk in kept[:-4:-1]:
        loss, written, received = rebuild(model, ids, targets, chunk, cache, setting.recompute)
        if setting.method == "spaco":
            received = [1.0 * g for g in received]
        torch.autograd.backward([loss / divisor, *written], [None, *received])
        del loss, written, received


def _cache_bytes(model: Llama, ids: Tensor, setting: Setting) -> tuple[int, int]:
    """Bytes of the cache and of its gradients, of a cache made as the step makes it."""
    if setting.method in ("full", "full-recompute"):
        return 0, 0
    layers = new_cache(model, ids, _kept(setting, ids.shape[1]), setting.cache_grad_dtype).layers
    cache = sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))
    grads = sum(x.numel() * x.element_size() for layer in layers for x in (layer.key_grads, layer.value_grads))
    return cache, grads


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
    )
