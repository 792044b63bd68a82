"""Cutting: a sequence into chunks, chunks into groups for the fill, labels into targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .errors import InputError

IGNORE = -100  # Hugging Face's label of a position without a target


class Chunk(NamedTuple):
    """The positions from `start` up to, not including, `stop`: the paper's x_j."""

    start: int
    stop: int


def cut(length: int, chunk_size: int) -> list[Chunk]:
    """Cut `length` positions into chunks; the last one may be short. Raises InputError."""
    if chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size}, but must be at least 1")
    return [Chunk(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size)]


def span(chunks: Sequence[Chunk]) -> slice:
    """All positions of adjacent chunks."""
    return slice(chunks[0].start, chunks[-1].stop)


def check_fill_size(fill_size: int | None, chunk_size: int) -> None:
    """Raise InputError unless at least one chunk fits into a pass of the fill."""
    if fill_size is not None and fill_size < chunk_size:
        raise InputError(f"fill_size is {fill_size}, but must be at least the chunk size, {chunk_size}")


def groups(chunks: Sequence[Chunk], fill_size: int | None) -> list[Sequence[Chunk]]:
    """The passes of the fill: as many whole chunks at a time as fit into `fill_size`; None: one."""
    if not chunks:
        return []
    size = 1 if fill_size is None else fill_size // (chunks[0].stop - chunks[0].start)
    return [chunks[i : i + size] for i in range(0, len(chunks), size)]


def shift(labels: Tensor) -> Tensor:
    """Targets (B, T): what position t has to predict is the label of t + 1, and nothing at the end.

    Done once and before cutting, so that no target is lost where one chunk ends and the next begins.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)
