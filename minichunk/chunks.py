"""Cutting: a sequence into chunks, chunks into groups for the fill."""

from collections.abc import Sequence
from typing import NamedTuple

from .errors import InputError


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
