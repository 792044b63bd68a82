"""What one training step takes: the real code, run on meta tensors and counted.

Meta tensors have a shape, a dtype and a storage of so many bytes, but no memory and no arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Batch, widen_gradients
from ..chunks import Chunk, cut
from ..full import backpropagate
from ..memory.cache import LayerCache
from ..memory.kernels import kernel_for
from ..memory.layers import LayerMemories, LayerMemory
from ..memory.offload import OffloadedLayer
from ..memory.pattern import FULL
from ..models.llama import Attention
from ..models.pretrained import Pretrained
from ..models.quantize import Linear4bit, check_bitsandbytes
from ..models.shapes import alike, random_model
from ..protocol import Written
from ..seco import fill, new_memory, rebuild
from ..targets import shift
from .alike import Trace, peak_of
from .baselines import tiled_full
from .setting import CHUNKED, Setting

FEW, MORE = 3, 4  # layers: one at each end may differ from those between, of which there must be one, and one more


@dataclass(frozen=True)
class StepBytes:
    """Bytes on the device at the peak of one training step, what they consist of, and bytes in host memory."""

    peak: int
    weights: int
    adapter_and_optimizer: int
    cache: int
    cache_gradients: int
    chunk: int
    host: int = 0


@functools.cache
def step_memory(setting: Setting, tokens: int) -> StepBytes:
    """What a training step of `tokens` tokens takes: counted with few layers, which are alike. Raises InputError."""
    setting.check()
    config = setting.config()
    num_layers = config.num_hidden_layers
    if num_layers <= MORE or not alike(config):
        return count_step(setting, tokens, None)[0]
    (few, few_trace), (more, more_trace) = (count_step(setting, tokens, n) for n in (FEW, MORE))
    peak = peak_of(few_trace, more_trace, num_layers - FEW)
    if peak is None:
        return count_step(setting, tokens, None)[0]

    def line(name: str) -> int:
        at_few: int = getattr(few, name)
        return at_few + (num_layers - FEW) * (getattr(more, name) - at_few)

    weights, adapter, cache, grads = map(line, ("weights", "adapter_and_optimizer", "cache", "cache_gradients"))
    return StepBytes(peak, weights, adapter, cache, grads, peak - weights - adapter - cache - grads, line("host"))


def count_step(setting: Setting, tokens: int, num_layers: int | None) -> tuple[StepBytes, Trace]:
    """Run the step with so many of the model's layers (None: all), and count its bytes."""
    if setting.load_in_4bit:
        _first_use_of_bitsandbytes(setting.dtype)
    with ExitStack() as stack:
        # Not a function mode: recompute runs layers within the backward pass, where such modes are off.
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _flash))
        count = stack.enter_context(Trace())
        model = random_model(
            setting.config(), setting.dtype, setting.rank, setting.targets, "meta", setting.load_in_4bit, num_layers
        )
        states = optimizer_states(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
        weights = sum(x.numel() * x.element_size() for x in frozen)
        adapter = sum(p.numel() * p.element_size() for p in trained) + sum(s.numel() * 4 for s in states)
        adapter += sum(p.numel() * max(4, p.element_size()) for p in trained)  # their gradients
        widen_gradients(model)
        ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
        batch = Batch(ids, shift(ids), float(tokens))
        count.start()  # making the model took more, for 4 bits much more; loading it does not
        step = _chunked_step if setting.method in CHUNKED else _whole_step
        cache, grads, host = step(model, batch, setting, count)
    peak = count.peak
    return StepBytes(peak, weights, adapter, cache, grads, peak - weights - adapter - cache - grads, host), count


@functools.cache
def _first_use_of_bitsandbytes(dtype: torch.dtype) -> None:
    """Let the library make the table of its levels, which it does once: or the first step would have taken more."""
    check_bitsandbytes()
    Linear4bit(torch.empty(64, 64, dtype=dtype, device="meta"), None).weight_as(dtype)


def optimizer_states(model: Pretrained) -> list[Tensor]:
    """AdamW's two moments of every trained parameter, and the float32 copies of those in half precision."""
    trained = [p for p in model.parameters() if p.requires_grad]
    copies = [torch.zeros_like(p, dtype=torch.float32) for p in trained if p.dtype.itemsize < 4]
    return copies + [torch.zeros_like(p, dtype=torch.float32) for p in trained for _ in range(2)]


def _flash(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Ordinary causal attention as CPU and CUDA compute it; on meta tensors PyTorch would write out all scores."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal=True)[0]
    return out


def _chunked_step(model: Pretrained, batch: Batch, setting: Setting, count: Trace) -> tuple[int, int, int]:
    """The heaviest parts of a training step; bytes of the cache and of its gradients on the device, and on the host.

    seco.py and spaco.py call the same functions.

    Of the fill, the group of chunks on the longest past is enough. Of the rebuilds, the last chunk sends gradients
    back, the one before it also receives some, and the further ones do the same on a shorter past.
    """
    chunks = cut(batch.input_ids.shape[1], setting.chunk_size)
    kept = chunks[-setting.kept(len(chunks)) :]
    options = setting.options()
    with torch.device("meta"):  # the host's part too
        made = count.without(
            lambda: new_memory(model, batch.input_ids, kept, options),
            lambda memory: [x for held in memory.tensors() for x in held] if setting.offload else [],
        )
    cache, grads = made.tensors().bytes()  # and not what comes later and goes: that is a chunk's
    memory = _InParts(made.layers, kept[:-1], count)
    for layer in made.layers:
        if isinstance(layer, LayerCache | OffloadedLayer):
            layer.kernel = kernel_for(setting.device, setting.dtype, model.config.head_dim)
    group = (setting.fill_size or setting.chunk_size) // setting.chunk_size
    count.next_part()
    fill(model, batch.input_ids, chunks[:-1][-group:], memory, options)
    for chunk in kept[:-3:-1]:
        count.next_part()
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        if setting.method == "spaco":
            count.next_part()
            received = [1.0 * g for g in received]
        torch.autograd.backward([loss, *written], [None, *received])
        del loss, written, received
    return (0, 0, cache + grads) if setting.offload else (cache, grads, 0)


class _InParts(LayerMemories):
    """Goes through the layers for itself, not within the model's forward pass."""

    def __init__(self, layers: Sequence[LayerMemory], kept: Sequence[Chunk], count: Trace) -> None:
        super().__init__(layers, kept)
        self.count = count

    def write(self, chunks: Sequence[Chunk], written: Written) -> None:
        self.count.next_part()
        super().write(chunks, written)

    def received(self, chunk: Chunk) -> Written:
        self.count.next_part()
        return super().received(chunk)


def _whole_step(model: Pretrained, batch: Batch, setting: Setting, count: Trace) -> tuple[int, int, int]:
    """A step without chunks; returns as `_chunked_step`."""
    for layer in model.modules():
        if isinstance(layer, Attention):  # or each made a mask of (tokens, tokens), as no trainer of long texts does
            layer.pattern = FULL
    if setting.method in ("full", "full-recompute"):
        backpropagate(model, batch, recompute=setting.method == "full-recompute")
        return 0, 0, 0
    host = 0

    def room(x: Tensor) -> Tensor:
        nonlocal host
        host += x.numel() * x.element_size()
        made: Tensor = count.without(lambda: torch.empty_like(x), lambda y: [y])
        return made

    tiled_full(model, batch, offload=setting.method.endswith("offload"), room=room)
    return 0, 0, host
