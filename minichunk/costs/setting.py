"""What is to be trained and how, as a forecast is told."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..chunks import check_fill_size, cut
from ..errors import InputError
from ..models.shapes import memory_bytes, shape
from ..protocol import Options, Recompute
from ..samplers import most_kept

CHUNKED = ("seco", "spaco")
METHODS = (*CHUNKED, "full", "full-recompute", "full-recompute-tiled", "full-recompute-offload")


@dataclass(frozen=True)
class Setting:
    """What is to be trained, and how. cache_grad_dtype None: float32, or wider with a wider model."""

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

    def kept(self, num_chunks: int) -> int:
        """The most chunks that a step keeps, see `most_kept`."""
        return most_kept(self.sampler, self.budget, num_chunks) if self.method == "spaco" else num_chunks

    def options(self) -> Options:
        """As seco and spaco would be told."""
        return Options(self.fill_size, self.recompute, self.cache_grad_dtype, self.offload)

    def memory_bytes(self, tokens: int) -> tuple[int, int]:
        """What is remembered of so many tokens, and the gradients sent back to it, where the last chunks are kept."""
        chunks = cut(tokens, self.chunk_size)
        kept = chunks[-self.kept(len(chunks)) :]
        return memory_bytes(shape(self.model), self.dtype, kept, self.options())

    def check(self) -> None:
        """Raise InputError for a method or a size that cannot be."""
        if self.method not in METHODS:
            raise InputError(f"--method is {self.method!r}, but must be one of {', '.join(METHODS)}")
        cut(1, self.chunk_size)  # checks the size
        check_fill_size(self.fill_size, self.chunk_size)
