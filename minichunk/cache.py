"""What chunk-wise training remembers: keys and values, and the gradients sent back to them.

Everything is allocated once. Chunks are written into it and read from it as views, and the
gradients that later chunks send back are added in place, so that the past is never copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import attend
from .chunks import Chunk
from .config import LlamaConfig


class LayerCache:
    """One layer's keys and values (B, G, capacity, D), and the gradients of the kept chunks.

    kept: the chunks that will receive a gradient. Only they have space for one, chunk after
    chunk in a buffer of (B, G, sum of their lengths, D).
    """

    def __init__(
        self, shape: tuple[int, int, int, int], kept: Sequence[Chunk], like: Tensor, grad_dtype: torch.dtype
    ) -> None:
        B, G, _, D = shape
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)
        self.slots: list[tuple[int, int, int]] = []  # (start, stop, offset in the gradient buffer)
        room = 0
        for start, stop in kept:
            if self.slots and self.slots[-1][1] == start:  # adjacent chunks share a slot
                first, _, offset = self.slots.pop()
                self.slots.append((first, stop, offset))
            else:
                self.slots.append((start, stop, room))
            room += stop - start
        self.key_grads = like.new_zeros((B, G, room, D), dtype=grad_dtype)
        self.value_grads = like.new_zeros((B, G, room, D), dtype=grad_dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """Attention of the chunk at `start`, (B, H, C, D), to itself and to all positions before it."""
        return attend(q, k, v, self, start)

    def past(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the positions from `start` to `stop`: views (B, G, stop - start, D)."""
        return self.keys[:, :, start:stop], self.values[:, :, start:stop]

    def add_grads(self, start: int, key_grads: Tensor, value_grads: Tensor) -> None:
        """Add the gradients (B, G, n, D) that a later chunk sends back to the n positions from `start`."""
        end = start + key_grads.shape[2]
        for first, stop, offset in self.slots:
            low, high = max(first, start), min(stop, end)
            if low < high:
                slot, sent = slice(offset + low - first, offset + high - first), slice(low - start, high - start)
                self.key_grads[:, :, slot] += key_grads[:, :, sent]
                self.value_grads[:, :, slot] += value_grads[:, :, sent]

    def received(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """The gradients sent back to one kept chunk's keys and values: views (B, G, C, D)."""
        first, _, offset = next(slot for slot in self.slots if slot[0] <= chunk.start < slot[1])
        rows = slice(offset + chunk.start - first, offset + chunk.stop - first)
        return self.key_grads[:, :, rows], self.value_grads[:, :, rows]


class Cache:
    """The memory of one training step (or of one generated text), for all layers.

    config: the model's. batch: B. capacity: positions with keys and values.
    kept: the chunks that will receive gradients, first to last.
    like: a tensor with the model's dtype and device.
    grad_dtype: of the gradients' sum; None: float32, or the model's dtype where that is wider.
    dropout_seed: from which a rebuild draws the same dropout masks as the fill; None: ordinary dropout.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        like: Tensor,
        kept: Sequence[Chunk] = (),
        grad_dtype: torch.dtype | None = None,
        dropout_seed: int | None = None,
    ) -> None:
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        grad_dtype = grad_dtype or torch.promote_types(like.dtype, torch.float32)
        self.layers = [LayerCache(shape, kept, like, grad_dtype) for _ in range(config.num_hidden_layers)]
        self.kept = set(kept)
        self.dropout_seed = dropout_seed

    def write(self, start: int, written: Sequence[Tensor]) -> None:
        """Store what a chunk at `start` wrote: keys and values of each layer in turn."""
        for layer, keys, values in zip(self.layers, written[::2], written[1::2], strict=True):
            stop = start + keys.shape[2]
            layer.keys[:, :, start:stop] = keys
            layer.values[:, :, start:stop] = values

    def received(self, chunk: Chunk, written: Sequence[Tensor]) -> list[Tensor]:
        """What later chunks sent back to `written`, in its order and dtype; [] where nothing can have been."""
        if chunk not in self.kept:
            return []
        grads = (grad for layer in self.layers for grad in layer.received(chunk))
        return [grad.to(tensor.dtype) for grad, tensor in zip(grads, written, strict=True)]
