"""Dropout that can be replayed: a rebuilt chunk draws the masks that the fill drew for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import Chunk


class DropoutMasks:
    """Which masks the model's dropouts draw now; one object, shared by all of a model's adapters.

    A rebuild must draw the masks that the fill drew, or its gradient is another function's. So
    on top of a cache a mask depends on nothing but the step's seed, the module and the chunk.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.chunks: Sequence[Chunk] = ()

    @contextmanager
    def of(self, seed: int | None, chunks: Sequence[Chunk]) -> Iterator[None]:
        """Within the block: the masks of `chunks`, one after the other. No seed, or outside: ordinary dropout."""
        previous = self.seed, self.chunks
        self.seed, self.chunks = seed, chunks
        try:
            yield
        finally:
            self.seed, self.chunks = previous

    def draw(self, x: Tensor, module: str, rate: float) -> Tensor:
        """A mask for x (B, T, ·): 0 with probability `rate`, else 1 / (1 - rate)."""
        if self.seed is None:
            return F.dropout(torch.ones_like(x), rate)
        parts = []
        for start, stop in self.chunks:
            digest = blake2b(f"{self.seed} {module} {start}".encode(), digest_size=7).digest()
            generator = torch.Generator(x.device).manual_seed(int.from_bytes(digest, "big"))
            mask = torch.empty(x.shape[0], stop - start, x.shape[2], dtype=torch.float32, device=x.device)
            parts.append(mask.bernoulli_(1 - rate, generator=generator).div_(1 - rate))
        return torch.cat(parts, dim=1).to(x.dtype)
