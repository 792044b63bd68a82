"""The textbook way to do SeCO: keys and values as one leaf per chunk, concatenated in every attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minichunk.chunks import Chunk
from minichunk.memory.layer_memory import LayerMemories, MemoryUse
from minichunk.memory.window import Pattern
from minichunk.models.stack import Stack


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
