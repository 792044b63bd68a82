"""What `seco` and `spaco` ask of a model: all of it. A model of another kind, or a port, implements this.

A chunk leaves something behind for the chunks after it: it *writes* into the model's memory. When those chunks are
backpropagated, the gradients of what they have read gather in the memory, until the chunk's own turn comes and it
is *handed* them. What is remembered, keys and values or a state, is between the model and its memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .chunks import ONE, Chunk, Documents

Written = Sequence[tuple[Tensor, ...]]  # what a chunk writes, one tuple for each layer


def relay(written: Written, sent: Written) -> tuple[list[Tensor], list[Tensor]]:
    """What a chunk wrote, and for each of these tensors the gradient that later chunks have sent back to it.

    Both leave out what has no graph: with LoRA, what lies below the first adapter. They are empty for the last chunk.
    """
    made, received = flat(written), flat(sent)
    pairs = [(m, g) for m, g in zip(made, received, strict=True) if m.requires_grad] if received else []
    return [m for m, _ in pairs], [g for _, g in pairs]


def flat(written: Written) -> list[Tensor]:
    """The tensors of all layers, one after the other."""
    return [tensor for layer in written for tensor in layer]


@dataclass(frozen=True)
class Options:
    """How a step is computed, at what cost, with the same result: keywords of `seco`, which describes them.

    positions: of the whole text, for rope: int64 (T), or (B, 1, T) if they differ from row to row.
    documents: of the row, see `seco`, starts and share.
    """

    fill_size: int | None = None
    recompute: bool = False
    cache_grad_dtype: torch.dtype | None = None
    dropout_seed: int | None = None  # decides the masks of a step's dropouts: those of fill and rebuild are the same
    positions: Tensor | None = field(default=None, repr=False, compare=False)
    documents: Documents = ONE
    sparse: bool = False  # whether chunks may be skipped, as in SpaCO: the adjoints of states have to pass them


DEFAULTS = Options()


class Memory(Protocol):
    """What chunks leave behind, and what later chunks send back to them."""

    def write(self, chunks: Sequence[Chunk], written: Written) -> None:
        """Store what these adjacent chunks wrote, in the fill: tensors without a graph."""

    def hand_over(self, chunk: Chunk) -> Written:
        """The gradients sent back to what this chunk wrote, in its order and dtype; empty if none can have been.

        Asked once for each chunk that is rebuilt, the last one first: a second call for a chunk raises RuntimeError.
        """


class Model(Protocol):
    """Something with an LM head, and a memory of its own kind, which `run` and `fill` are handed back."""

    lm_head: nn.Linear  # weight (V, E), no bias

    def dropout_seed(self) -> int | None:
        """A fresh number from PyTorch's generator, which decides a step's dropout masks; None without dropout."""

    def new_memory(self, batch: int, capacity: int, receiving: Sequence[Chunk] = ..., options: Options = ...) -> Memory:
        """For `batch` sequences of up to `capacity` positions, and for the gradients of the receiving chunks alone:
        those that a later chunk sends gradients to, so without the last one that is rebuilt."""

    def run(
        self, input_ids: Tensor, memory: Any = ..., chunks: Sequence[Chunk] = ..., options: Options = ...
    ) -> tuple[Tensor, Written]:
        """Run adjacent chunks (B, C) on top of the memory; without one, a whole text, as `full` does. Returns what the
        LM head is given, (B, C, E), after the last norm; and what the chunks write, which is not written yet."""

    def fill(self, input_ids: Tensor, memory: Any, chunks: Sequence[Chunk], options: Options) -> Written:
        """The same without gradients, and only as far as the memory needs it."""

    def parameters(self) -> Iterator[nn.Parameter]: ...


class LayeredModel(Model, Protocol):
    """What `layers_at_once` and `offload` ask for beyond that: a model that can be run some layers at a time."""

    def blocks(self, layers_at_once: int) -> Sequence[Model]:
        """Models of at most so many adjacent layers, first ones first, with parameters and a memory of those alone.

        The first block is given tokens, as ever; each other one, what `run` of the one before has returned. `run` of
        the last returns what the LM head is given, and the model's LM head is its.
        """
