"""What one training step takes: the real code, run on meta tensors and counted.

Meta tensors have a shape, a dtype and a storage of so many bytes, but no memory and no arithmetic.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Batch, shift, widen_gradients
from ..models.quantize import Linear4bit, check_bitsandbytes
from ..models.shapes import alike, random_model
from ..models.stack import Stack
from .alike import Trace, peak_of
from .alone import stage_alone
from .heaviest import chunked_step, rank_step, whole_step
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
    num_layers = config.num_hidden_layers if setting.share is None else setting.share.counts[setting.share.rank]
    if num_layers <= MORE or not alike(config):
        return count_step(setting, tokens, None)[0]
    (few, few_trace), (more, more_trace) = (_count_few(setting, tokens, n) for n in (FEW, MORE))
    peak = peak_of(few_trace, more_trace, num_layers - FEW)
    if peak is None:
        return count_step(setting, tokens, None)[0]

    def line(name: str) -> int:
        at_few: int = getattr(few, name)
        return at_few + (num_layers - FEW) * (getattr(more, name) - at_few)

    weights, adapter, cache, grads = map(line, ("weights", "adapter_and_optimizer", "cache", "cache_gradients"))
    return StepBytes(peak, weights, adapter, cache, grads, peak - weights - adapter - cache - grads, line("host"))


def _count_few(setting: Setting, tokens: int, layers: int) -> tuple[StepBytes, Trace]:
    """The step with so few layers, of the model or of the rank that is meant."""
    if setting.share is None:
        return count_step(setting, tokens, layers)
    share = setting.share.with_layers(layers)
    return _count_rank(replace(setting, share=share), tokens, sum(share.counts))


def count_step(setting: Setting, tokens: int, num_layers: int | None) -> tuple[StepBytes, Trace]:
    """Run the step of a model with so many layers (None: as many as it has), and count its bytes."""
    if setting.load_in_4bit:
        _first_use_of_bitsandbytes(setting.dtype)
    with ExitStack() as stack:
        # Not a function mode: recompute runs layers within the backward pass, where such modes are off.
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _flash))
        count = stack.enter_context(Trace())
        model: Stack = random_model(
            setting.config(), setting.dtype, setting.rank, setting.targets, "meta", setting.load_in_4bit, num_layers
        )
        step = functools.partial(chunked_step if setting.method in CHUNKED else whole_step, model)
        if setting.share is not None:
            stage, below_learns = stage_alone(model, setting.share, count.next_part)
            model, step = stage, functools.partial(rank_step, stage, below_learns)
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
        cache, grads, host = step(batch, setting, count)
    peak = count.peak
    return StepBytes(peak, weights, adapter, cache, grads, peak - weights - adapter - cache - grads, host), count


_count_rank = functools.lru_cache(32)(count_step)  # however the layers are dealt, few of them stand for a rank's


@functools.cache
def _first_use_of_bitsandbytes(dtype: torch.dtype) -> None:
    """Let the library make the table of its levels, which it does once: or the first step would have taken more."""
    check_bitsandbytes()
    Linear4bit(torch.empty(64, 64, dtype=dtype, device="meta"), None).weight_as(dtype)


def optimizer_states(model: nn.Module) -> list[Tensor]:
    """AdamW's two moments of every trained parameter, and the float32 copies of those in half precision."""
    trained = [p for p in model.parameters() if p.requires_grad]
    copies = [torch.zeros_like(p, dtype=torch.float32) for p in trained if p.dtype.itemsize < 4]
    return copies + [torch.zeros_like(p, dtype=torch.float32) for p in trained for _ in range(2)]


def _flash(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Ordinary causal attention as CPU and CUDA compute it; on meta tensors PyTorch would write out all scores."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal=True)[0]
    return out
