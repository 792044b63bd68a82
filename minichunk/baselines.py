"""What minichunk is measured against: the textbook way to do SeCO, checkpointing as other trainers have it, and
transformers' Llama.

Nothing else uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import Chunk, check_batch, cut
from .loss import summed_loss
from .model import Llama
from .samplers import Weight
from .seco import fill, rebuild


class ConcatenatingLayer:
    """Keys and values as a list of one leaf per chunk, concatenated whenever they are needed."""

    def __init__(self) -> None:
        self.chunks: dict[int, tuple[Tensor, Tensor]] = {}

    def past(self, start: int, keep: bool) -> ConcatenatingPast:
        return ConcatenatingPast(self, start)


class ConcatenatingPast:
    """What a chunk sees of it."""

    def __init__(self, memory: ConcatenatingLayer, start: int) -> None:
        self.chunks, self.start = memory.chunks, start

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start = self.start
        past = [pair for first, pair in sorted(self.chunks.items()) if first < start]
        k = torch.cat([*(keys for keys, _ in past), k], dim=2)
        v = torch.cat([*(values for _, values in past), v], dim=2)
        if start == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        positions = torch.arange(k.shape[2], device=q.device)
        mask = positions <= positions[start:, None]  # bottom-right causal
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class ConcatenatingCache:
    """What `seco` asks of a cache, answered with autograd's own means."""

    dropout_seed = None

    def __init__(self, num_layers: int) -> None:
        self.layers = [ConcatenatingLayer() for _ in range(num_layers)]

    def write(self, start: int, written: Sequence[Tensor]) -> None:
        for layer, keys, values in zip(self.layers, written[::2], written[1::2], strict=True):
            layer.chunks[start] = (keys.detach().requires_grad_(), values.detach().requires_grad_())

    def received(self, chunk: Chunk, written: Sequence[Tensor]) -> list[Tensor]:
        leaves = [leaf for layer in self.layers for leaf in layer.chunks.get(chunk.start, ())]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]  # [] for the last chunk


def concatenating(
    model: Llama, input_ids: Tensor, labels: Tensor, chunk_size: int, entries: Sequence[Weight | None] | None = None
) -> Tensor:
    """SeCO (or SpaCO with the given entries) as one would first write it: `torch.cat` of the past in every layer."""
    targets, divisor = check_batch(model, input_ids, labels, None)
    chunks = cut(input_ids.shape[1], chunk_size)
    weights = entries or [Weight(1.0, 1.0)] * len(chunks)
    kept = [(chunk, weight) for chunk, weight in zip(chunks, weights, strict=True) if weight is not None]
    cache: Any = ConcatenatingCache(model.config.num_hidden_layers)
    fill(model, input_ids, [chunk for chunk in chunks if chunk.stop <= kept[-1][0].start], cache)
    total = torch.zeros((), device=input_ids.device)
    for chunk, weight in reversed(kept):
        loss, written, received = rebuild(model, input_ids, targets, chunk, cache)
        loss = weight.loss * loss / divisor
        torch.autograd.backward([loss, *written], [None, *(weight.relay * g for g in received)])
        total = total + loss.detach()
    return total


def host_like(x: Tensor) -> Tensor:
    """Room for x in host memory, pinned where x is on a GPU."""
    return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)


class HostInputs(torch.autograd.graph.saved_tensors_hooks):
    """Within the block, what is saved for the backward pass and has this shape waits in host memory.

    shape: of the layers' inputs, (B, T, E). room: makes a tensor in host memory like another one.
    """

    def __init__(self, shape: tuple[int, ...], room: Callable[[Tensor], Tensor] = host_like) -> None:
        def pack(x: Tensor) -> tuple[torch.device | None, Tensor]:
            if x.shape != shape or not x.is_floating_point():
                return None, x
            return x.device, room(x).copy_(x, non_blocking=True)

        def unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
            device, x = packed
            return x if device is None else x.to(device, non_blocking=True, copy=True)

        super().__init__(pack, unpack)


def tiled_full(
    model: Llama,
    input_ids: Tensor,
    labels: Tensor,
    *,
    num_targets: float | None = None,
    offload: bool = False,
    room: Callable[[Tensor], Tensor] = host_like,
) -> Tensor:
    """Gradient checkpointing with the loss in tiles: what long texts are trained with today, without chunks.

    As `full(..., recompute=True)`, but the logits never exist at once. offload: the layers' inputs wait in host
    memory, as with transformers' `gradient_checkpointing_kwargs={"offload": True}`; room: as in HostInputs.
    """
    targets, divisor = check_batch(model, input_ids, labels, num_targets)
    shape = (*input_ids.shape, model.config.hidden_size)
    with HostInputs(shape, room) if offload else nullcontext():
        hidden, _ = model.run(input_ids, recompute=True)
    loss = summed_loss(hidden, model.lm_head.weight, targets) / divisor
    loss.backward()
    return loss.detach()


def transformers_llama(model: Llama) -> Any:
    """transformers' Llama with the same weights and gradient checkpointing, as its users would run it."""
    from transformers import AutoConfig, AutoModelForCausalLM  # type: ignore[import-not-found,unused-ignore]

    config = AutoConfig.for_model(**model.config.to_dict())
    weight = model.model.norm.weight
    with torch.device(weight.device):
        theirs = AutoModelForCausalLM.from_config(config, dtype=weight.dtype, attn_implementation="sdpa")
    theirs.load_state_dict(model.state_dict())
    theirs.gradient_checkpointing_enable()
    return theirs.train()
