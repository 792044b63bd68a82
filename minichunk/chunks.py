"""Cutting: a sequence into chunks, chunks into groups for the fill."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from .errors import InputError


class Chunk(NamedTuple):
    """The positions from `start` up to, not including, `stop`: the paper's x_j."""

    start: int
    stop: int


def cut(length: int, chunk_size: int, trunk: int = 0) -> list[Chunk]:
    """Cut `length` positions into chunks, and so also after the first `trunk`; the last one, and the one before the
    trunk's end, may be short. Raises InputError."""
    if chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size}, but must be at least 1")
    edges = [*range(0, trunk, chunk_size), *range(trunk, length, chunk_size), length]
    return [Chunk(start, stop) for start, stop in pairwise(edges)]


def span(chunks: Sequence[Chunk]) -> slice:
    """All positions of adjacent chunks."""
    return slice(chunks[0].start, chunks[-1].stop)


def check_fill_size(fill_size: int | None, chunk_size: int) -> None:
    """Raise InputError unless at least one chunk fits into a pass of the fill."""
    if fill_size is not None and fill_size < chunk_size:
        raise InputError(f"fill_size is {fill_size}, but must be at least the chunk size, {chunk_size}")


def groups(chunks: Sequence[Chunk], fill_size: int | None, trunk: int = 0) -> list[Sequence[Chunk]]:
    """The passes of the fill: as many whole chunks at a time as fit into `fill_size`; None: one. None of them goes over
    the trunk's end."""
    if not chunks:
        return []
    if chunks[0].start < trunk < chunks[-1].stop:
        inside = sum(chunk.start < trunk for chunk in chunks)
        return groups(chunks[:inside], fill_size) + groups(chunks[inside:], fill_size)
    size = 1 if fill_size is None else fill_size // (chunks[0].stop - chunks[0].start)
    return [chunks[i : i + size] for i in range(0, len(chunks), size)]
