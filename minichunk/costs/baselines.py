"""What minichunk is measured against: checkpointing as other trainers have it, and the textbook way to do SeCO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Batch
from ..chunks import Chunk
from ..loss import summed_loss
from ..memory.layer_memory import LayerMemories, MemoryUse
from ..memory.window import Pattern
from ..models.stack import Stack
from ..protocol import Options


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
    model: Stack, batch: Batch, *, offload: bool = False, room: Callable[[Tensor], Tensor] = host_like
) -> Tensor:
    """Gradient checkpointing with the loss in tiles: what long texts are trained with today, without chunks.

    As `full(..., recompute=True)`, but the logits never exist at once. offload: the layers' inputs wait in host
    memory, as with transformers' `gradient_checkpointing_kwargs={"offload": True}`; room: as in HostInputs.
    """
    shape = (*batch.input_ids.shape, model.lm_head.weight.shape[1])
    with HostInputs(shape, room) if offload else nullcontext():
        hidden, _ = model.run(batch.input_ids, options=Options(recompute=True))
    loss = summed_loss(hidden, model.lm_head.weight, batch.targets) / batch.num_targets
    loss.backward()
    return loss.detach()


class ConcatenatingLayer:
    """Keys and values as a list of one leaf per chunk, concatenated whenever they are needed; a LayerMemory."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.chunks: dict[int, tuple[Tensor, Tensor]] = {}

    def past(self, chunks: Sequence[Chunk], save: bool) -> ConcatenatingPast:
        pairs = [pair for start, pair in sorted(self.chunks.items()) if start < chunks[0].start]
        return ConcatenatingPast(pairs, self.pattern)

    def write(self, chunks: Sequence[Chunk], written: tuple[Tensor, ...]) -> None:
        keys, values = written  # (B, G, C, D)
        self.chunks[chunks[0].start] = (keys.detach().requires_grad_(), values.detach().requires_grad_())

    def hand_over(self, chunk: Chunk) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.chunks[chunk.start])

    def tensors(self) -> MemoryUse:
        leaves = [leaf for pair in self.chunks.values() for leaf in pair]
        return MemoryUse(leaves, [leaf.grad for leaf in leaves if leaf.grad is not None])


class ConcatenatingPast:
    """What a chunk sees of it."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], pattern: Pattern) -> None:
        self.pairs, self.pattern = pairs, pattern

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start = sum(keys.shape[2] for keys, _ in self.pairs)
        k = torch.cat([*(keys for keys, _ in self.pairs), k], dim=2)
        v = torch.cat([*(values for _, values in self.pairs), v], dim=2)
        mask = self.pattern.mask(k.shape[2], start, q.device)
        if start == 0 and mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if mask is None:
            positions = torch.arange(k.shape[2], device=q.device)
            mask = positions <= positions[start:, None]  # bottom-right causal
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class Concatenating:
    """A model whose memory is the textbook's, as one would first write it: `torch.cat` of the past in every layer.

    It takes the place of the model in `seco` and `spaco`, and gives the same gradients.
    """

    def __init__(self, model: Stack) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def new_memory(self, batch: int, capacity: int, receiving: Sequence[Chunk] = (), *_: Any) -> LayerMemories:
        layers: Any = self.model.layers
        return LayerMemories([ConcatenatingLayer(layer.self_attn.pattern) for layer in layers], receiving)
