"""What is to be trained and how, as a forecast is told."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ..chunks import check_fill_size, cut
from ..errors import InputError
from ..memory.pattern import Pattern, Strided
from ..models.config import LlamaConfig
from ..models.partial import partial_config
from ..models.shapes import memory_bytes, shape
from ..protocol import Options, Recompute
from ..samplers import most_kept

FEW = 8  # chunks from which on their memory grows evenly
CHUNKED = ("seco", "spaco")
METHODS = (*CHUNKED, "full", "full-recompute", "full-recompute-tiled", "full-recompute-offload")


@dataclass(frozen=True)
class Setting:
    """What is to be trained, and how. cache_grad_dtype None: float32, or wider with a wider model.

    pattern, full_layers: what `partial_context` would make of the model; None: nothing.
    """

    model: str = "llama-3-8b"
    method: str = "seco"
    chunk_size: int = 512
    budget: int = 8
    rank: int = 8
    targets: tuple[str, ...] | None = None
    dtype: torch.dtype = torch.bfloat16
    cache_grad_dtype: torch.dtype | None = None
    recompute: Recompute = True
    device: str = "cuda"
    offload: bool = False
    load_in_4bit: bool = False
    fill_size: int | None = None
    sampler: str = "bernoulli"
    pattern: Pattern | None = None
    full_layers: tuple[int, ...] | None = None

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
        """What is remembered of so many tokens, and the gradients sent back to it, where the last chunks are kept.

        Every further chunk, and every further one that is kept, takes as much as the one before.
        """
        num_chunks = -(-tokens // self.chunk_size)
        kept = self.kept(num_chunks)
        if num_chunks <= FEW:
            return self._memory_bytes(num_chunks, kept)
        few_kept = min(kept, FEW - 1)
        few, chunk, kept_chunk = self._memory_bytes(FEW, few_kept), *self.growth(few_kept)
        remembered, gradients = (
            few[i] + (num_chunks - FEW) * chunk[i] + (kept - few_kept) * kept_chunk[i] for i in range(2)
        )
        return remembered, gradients

    def growth(self, kept: int = FEW - 1) -> tuple[tuple[int, int], tuple[int, int]]:
        """What one more chunk adds to both where `kept` chunks are kept, and what one more of those kept adds."""
        before, longer, more = (self._memory_bytes(*n) for n in ((FEW, kept), (FEW + 1, kept), (FEW + 1, kept + 1)))
        return (longer[0] - before[0], longer[1] - before[1]), (more[0] - longer[0], more[1] - longer[1])

    @functools.cache  # noqa: B019 (a setting is a value, and there are few)
    def _memory_bytes(self, num_chunks: int, kept: int) -> tuple[int, int]:
        chunks = cut(num_chunks * self.chunk_size, self.chunk_size)
        return memory_bytes(self.config(), self.dtype, chunks[-kept:], self.options())

    def reach(self) -> int:
        """How far back the nearest part goes of what a layer sees of the past, where it does not see all of it."""
        config = self.config()
        if not isinstance(config, LlamaConfig):
            return 0
        near = [p.block * p.local if isinstance(p, Strided) else (p.window or 0) + p.sinks for p in config.patterns()]
        return max(near)

    def check(self) -> None:
        """Raise InputError for a method or a size that cannot be."""
        if self.method not in METHODS:
            raise InputError(f"--method is {self.method!r}, but must be one of {', '.join(METHODS)}")
        cut(1, self.chunk_size)  # checks the size
        check_fill_size(self.fill_size, self.chunk_size)
