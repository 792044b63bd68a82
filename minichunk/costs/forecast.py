"""How much memory a training step needs: the real code, run on meta tensors and counted.

Meta tensors have a shape, a dtype and a storage of so many bytes, but no memory and no arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Batch, widen_gradients
from ..chunks import check_fill_size, cut
from ..errors import InputError
from ..full import backpropagate
from ..memory.attention import BLOCK
from ..memory.kernels import kernel_for
from ..memory.offload import OffloadedLayer
from ..models.llama import Llama
from ..models.quantize import check_bitsandbytes
from ..models.shapes import cache_bytes, random_model, shape
from ..protocol import Options, Recompute
from ..samplers import most_kept
from ..seco import fill, new_memory, rebuild
from ..targets import shift
from .baselines import tiled_full
from .count import CountBytes

CHUNKED = ("seco", "spaco")
METHODS = (*CHUNKED, "full", "full-recompute", "full-recompute-tiled", "full-recompute-offload")
BATCH = 2 * torch.int64.itemsize  # bytes per token: input_ids and targets


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
    recompute: Recompute = True
    device: str = "cuda"
    offload: bool = False
    load_in_4bit: bool = False
    fill_size: int | None = None
    sampler: str = "bernoulli"

    def kept(self, num_chunks: int) -> int:
        """The most chunks that a step keeps, see `most_kept`."""
        return most_kept(self.sampler, self.budget, num_chunks) if self.method == "spaco" else num_chunks

    def bytes_per_position(self) -> tuple[int, int]:
        """Of keys and values, and of their gradients."""
        return cache_bytes(shape(self.model), self.dtype, self.cache_grad_dtype)


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
    """The memory at any length: what a step of `base` tokens needs, and what a longer one has more.

    Of a chunked step only the batch and the cache grow: keys and values of all chunks but the last, gradients for
    all kept chunks but the last. Of the others the activations grow, evenly from `base` tokens on.
    per_token, host_per_token: that growth in bytes; SpaCO's without the gradients of more kept chunks.
    """

    setting: Setting
    at_base: Memory
    base: int
    per_token: float
    host_per_token: float = 0.0

    def at(self, tokens: int) -> Memory:
        m = self.at_base
        if self.setting.method not in CHUNKED:
            more = max(0, tokens - self.base)
            peak, host = m.peak + round(more * self.per_token), m.host + round(more * self.host_per_token)
            return Memory(peak, m.weights, m.adapter_and_optimizer, 0, 0, m.chunk + peak - m.peak, host)
        cache, grads = self._cache(tokens)
        batch = (tokens - self.base) * BATCH
        if self.setting.offload:
            return Memory(m.peak + batch, m.weights, m.adapter_and_optimizer, 0, 0, m.chunk + batch, cache + grads)
        fixed = m.weights + m.adapter_and_optimizer + m.chunk + batch
        return Memory(fixed + cache + grads, m.weights, m.adapter_and_optimizer, cache, grads, m.chunk + batch)

    def _cache(self, tokens: int) -> tuple[int, int]:
        size, num_chunks = self.setting.chunk_size, -(-tokens // self.setting.chunk_size)
        cache, grads = self.setting.bytes_per_position()
        return cache * size * (num_chunks - 1), grads * size * max(0, self.setting.kept(num_chunks) - 1)

    def longest(self, available: int, chunk_size: int, host: int | None = None) -> int:
        """Tokens, in whole chunks, that fit into `available` bytes on the device and `host` bytes (None: any number).

        0 if even one chunk does not fit.
        """

        def fits(num_chunks: int) -> bool:
            found = self.at(num_chunks * chunk_size)
            return found.peak <= available and (host is None or found.host <= host)

        low, high = 0, 1  # low fits, high does not
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * chunk_size


def _flash(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Ordinary causal attention as CPU and CUDA compute it; on meta tensors PyTorch would write out all scores."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal=True)[0]
    return out


def step_memory(setting: Setting, tokens: int) -> Memory:
    """Run one training step of `tokens` tokens on meta tensors and count its bytes."""
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        # Not a function mode: recompute runs layers within the backward pass, where such modes are off.
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _flash))
        count = stack.enter_context(CountBytes())
        if setting.load_in_4bit:
            check_bitsandbytes()
        model = random_model(
            setting.model, setting.dtype, setting.rank, setting.targets, "meta", load_in_4bit=setting.load_in_4bit
        )
        count.settle()
        count.peak = count.live  # quantizing a whole model took more; loading it does not
        states = optimizer_states(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
        weights = sum(x.numel() * x.element_size() for x in frozen)
        adapter = sum(p.numel() * p.element_size() for p in trained) + sum(s.numel() * 4 for s in states)
        adapter += sum(p.numel() * max(4, p.element_size()) for p in trained)  # their gradients
        widen_gradients(model)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        cache, grads, host = _step(model, Batch(ids, shift(ids), float(tokens)), setting, count)
    return Memory(count.peak, weights, adapter, cache, grads, count.peak - weights - adapter - cache - grads, host)


def optimizer_states(model: Llama) -> list[Tensor]:
    """AdamW's two moments of every trained parameter, and the float32 copies of those in half precision."""
    trained = [p for p in model.parameters() if p.requires_grad]
    copies = [torch.zeros(p.shape, dtype=torch.float32) for p in trained if p.dtype.itemsize < 4]
    return copies + [torch.zeros(p.shape, dtype=torch.float32) for p in trained for _ in range(2)]


def _left_out(count: CountBytes, make: Callable[[], Any], tensors: Callable[[Any], list[Tensor]]) -> Any:
    """What `make` returns, of which `tensors` are host memory, which only meta tensors place on the device."""
    peak = count.peak
    made = make()
    count.leave_out(*tensors(made))
    count.peak = max(peak, count.live)
    return made


def _step(model: Llama, batch: Batch, setting: Setting, count: CountBytes) -> tuple[int, int, int]:
    """The heaviest parts of a training step; bytes of the cache and of its gradients on the device, and on the host.

    seco.py and spaco.py call the same functions.

    Of the fill, the group of chunks on the longest past is enough. Of the rebuilds, the last chunk sends gradients
    back, the one before it also receives some, and the further ones do the same on a shorter past.
    """
    if setting.method not in CHUNKED:
        return 0, 0, _whole_step(model, batch, setting, count)
    chunks = cut(batch.input_ids.shape[1], setting.chunk_size)
    kept = chunks[-setting.kept(len(chunks)) :]
    options = Options(setting.fill_size, setting.recompute, setting.cache_grad_dtype, setting.offload)
    memory: Any = _left_out(count, lambda: new_memory(model, batch.input_ids, kept, options), _host_tensors)
    for layer in memory.layers:
        layer.kernel = kernel_for(setting.device, setting.dtype, model.config.head_dim)
    group = (setting.fill_size or setting.chunk_size) // setting.chunk_size
    fill(model, batch.input_ids, chunks[:-1][-group:], memory, options)
    for chunk in kept[:-3:-1]:
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        if setting.method == "spaco":
            received = [1.0 * g for g in received]
        torch.autograd.backward([loss, *written], [None, *received])
        del loss, written, received
    cache, grads = setting.bytes_per_position()
    cache, grads = cache * kept[-1].start, grads * sum(chunk.stop - chunk.start for chunk in kept[:-1])
    return (0, 0, cache + grads) if setting.offload else (cache, grads, 0)


def _host_tensors(memory: Any) -> list[Tensor]:
    """What an offloaded memory keeps in host memory."""
    layers = [layer for layer in memory.layers if isinstance(layer, OffloadedLayer)]
    return [x for layer in layers for x in (*layer.blocks, *layer.grads)]


def _whole_step(model: Llama, batch: Batch, setting: Setting, count: CountBytes) -> int:
    """A step without chunks; returns the bytes in host memory."""
    if setting.method in ("full", "full-recompute"):
        backpropagate(model, batch, recompute=setting.method == "full-recompute")
        return 0
    host = 0

    def room(x: Tensor) -> Tensor:
        nonlocal host
        host += x.numel() * x.element_size()
        made: Tensor = _left_out(count, lambda: torch.empty_like(x), lambda y: [y])
        return made

    tiled_full(model, batch, offload=setting.method.endswith("offload"), room=room)
    return host


@functools.cache
def forecast(setting: Setting) -> Forecast:
    """Run the step at lengths beyond which it grows evenly, and say by how much."""
    if setting.method not in METHODS:
        raise InputError(f"--method is {setting.method!r}, but must be one of {', '.join(METHODS)}")
    size = setting.chunk_size
    cut(1, size)  # checks the size
    check_fill_size(setting.fill_size, size)
    if setting.method not in CHUNKED:
        base, more = 1024, 1024
        first, second = step_memory(setting, base), step_memory(setting, base + more)
        per_token, host_per_token = (second.peak - first.peak) / more, (second.host - first.host) / more
        return Forecast(setting, first, base, per_token, host_per_token)
    num_chunks = max(BLOCK, setting.fill_size or 0) // size + 3  # a block, or a pass of the fill, on a longer past
    at_base = step_memory(setting, num_chunks * size)
    cache, grads = setting.bytes_per_position()
    grows = cache + (grads if setting.method == "seco" else 0)
    return Forecast(setting, at_base, num_chunks * size, *((BATCH, grows) if setting.offload else (BATCH + grows, 0)))
