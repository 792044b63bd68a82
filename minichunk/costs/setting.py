"""What is to be trained and how, as a forecast is told."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chunks import check_fill_size, cut
from ..errors import InputError
from ..memory.attention import BLOCK
from ..memory.window import Pattern, Strided
from ..models.config import LlamaConfig
from ..models.partial import partial_config
from ..models.shapes import layer_memory_bytes, shape
from ..pipeline.links import MOST_ON_THE_WAY
from ..protocol import Options
from ..samplers import most_kept

FEW = 8  # chunks from which on their memory grows evenly
CHUNKED = ("seco", "spaco")
METHODS = (*CHUNKED, "full", "full-recompute", "full-recompute-tiled", "full-recompute-offload")


@dataclass(frozen=True)
class Share:
    """What one rank of a pipeline has of the layers, which are dealt by these counts."""

    counts: tuple[int, ...]
    rank: int

    @property
    def layers(self) -> slice:
        before = sum(self.counts[: self.rank])
        return slice(before, before + self.counts[self.rank])

    @property
    def in_flight(self) -> int:
        """The most chunks that have been rebuilt and wait for their turn."""
        return len(self.counts) - self.rank

    def with_layers(self, number: int) -> Share:
        """The same rank with so many layers, and one for each of the others."""
        return Share(tuple(number if rank == self.rank else 1 for rank in range(len(self.counts))), self.rank)


@dataclass(frozen=True)
class Setting:
    """What is to be trained, and how. cache_grad_dtype None: float32, or wider with a wider model.

    pattern, full_layers: what `partial_context` would make of the model; None: nothing.
    share: the rank of a pipeline that is meant; None: one process trains all of the model.
    """

    model: str = "llama-3-8b"
    method: str = "seco"
    chunk_size: int = 512
    budget: int = 8
    rank: int = 8
    targets: tuple[str, ...] | None = None
    dtype: torch.dtype = torch.bfloat16
    cache_grad_dtype: torch.dtype | None = None
    recompute: bool = True
    device: str = "cuda"
    offload: bool = False
    load_in_4bit: bool = False
    fill_size: int | None = None
    sampler: str = "bernoulli"
    pattern: Pattern | None = None
    full_layers: tuple[int, ...] | None = None
    share: Share | None = None

    def config(self) -> Any:
        """Of the model. Raises InputError."""
        config = shape(self.model)
        return config if self.pattern is None else partial_config(config, self.pattern, self.full_layers)

    def kept(self, num_chunks: int) -> int:
        """The most chunks that a step keeps, see `most_kept`."""
        return most_kept(self.sampler, self.budget, num_chunks) if self.method == "spaco" else num_chunks

    def options(self) -> Options:
        """As seco and spaco would be told."""
        return Options(self.fill_size, self.recompute, self.cache_grad_dtype, self.offload)

    def memory_bytes(self, tokens: int) -> tuple[int, int]:
        """What is remembered of so many tokens, and the gradients that have room from the start, where the last chunks
        are kept."""
        remembered, gradients = self.layer_memory_bytes(tokens)[self.held()].sum(0).tolist()
        return remembered, gradients

    def layer_memory_bytes(self, tokens: int) -> Tensor:
        """The same for each layer of the whole model, int64 (layers, 2)."""
        num_chunks = -(-tokens // self.chunk_size)
        kept = self.kept(num_chunks)
        few, period = self.few(kept), self.period()
        if num_chunks <= few + period:
            return self._memory_bytes(num_chunks, kept)
        periods, rest = divmod(num_chunks - few, period)
        return self._memory_bytes(few + rest, self.kept_of(few + rest, kept)) + periods * self._growth(kept)

    def few(self, kept: int) -> int:
        """Chunks from which on every further period of them takes as much as the one before."""
        return max(FEW, (kept if self.method == "spaco" else 0) + self.reach() // self.chunk_size + 3)

    def growth(self, kept: int) -> tuple[int, int]:
        """What one more period of chunks adds to both."""
        remembered, gradients = self._growth(kept)[self.held()].sum(0).tolist()
        return remembered, gradients

    def _growth(self, kept: int) -> Tensor:
        few = self.few(kept)
        before, after = (self._memory_bytes(n, self.kept_of(n, kept)) for n in (few, few + self.period()))
        return after - before

    def held(self) -> slice:
        """The layers that are meant."""
        return slice(None) if self.share is None else self.share.layers

    def kept_of(self, num_chunks: int, most: int) -> int:
        """SpaCO keeps no more of a longer text, SeCO all of it."""
        return min(num_chunks, most) if self.method == "spaco" else num_chunks

    @functools.cache  # noqa: B019 (a setting is a value, and there are few)
    def _memory_bytes(self, num_chunks: int, kept: int) -> Tensor:
        chunks = cut(num_chunks * self.chunk_size, self.chunk_size)
        return torch.tensor(layer_memory_bytes(self.config(), self.dtype, chunks[-kept:], self.options()))

    def patterns(self) -> list[Pattern]:
        """What the layers see that have keys and values."""
        config = self.config()
        return config.patterns() if isinstance(config, LlamaConfig) else []

    def reach(self) -> int:
        """How far back the longest window of a layer goes, with what it sees beside it."""
        return max((p.reach + getattr(p, "sinks", 0) for p in self.patterns()), default=0)

    def period(self) -> int:
        """In so many chunks as much is pinned as in the next ones."""
        apart = [p.block * p.stride for p in self.patterns() if isinstance(p, Strided)]
        return math.lcm(*apart, self.chunk_size) // self.chunk_size

    def settled(self) -> int:
        """Tokens from which on a chunk sees as many pieces of the past as ever, and the fill is at its longest pass."""
        blocks = BLOCK * max((p.stride for p in self.patterns() if isinstance(p, Strided)), default=1)
        passes = 1 if self.share is None else MOST_ON_THE_WAY + 1  # a rank still has what it has handed on in them
        return max(blocks, passes * (self.fill_size or 0), self.reach())

    def check(self) -> None:
        """Raise InputError for a method or a size that cannot be."""
        if self.method not in METHODS:
            raise InputError(f"--method is {self.method!r}, but must be one of {', '.join(METHODS)}")
        cut(1, self.chunk_size)  # checks the size
        check_fill_size(self.fill_size, self.chunk_size)
