"""Cutting: a row into documents, a sequence into chunks, chunks into groups for the fill."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from sys import maxsize
from typing import NamedTuple

from .errors import InputError


class Chunk(NamedTuple):
    """The positions from `start` up to, not including, `stop`: the paper's x_j."""

    start: int
    stop: int


class Documents(NamedTuple):
    """Where the documents of a row begin, the first one at 0, that see nothing of each other; (): it is one text.

    trunk: how long the first document is, if all others see it, as answers see their prompt; else 0.
    chunk_size: documents of at most so many positions are not cut, so that nothing of them has to be remembered.
    """

    starts: tuple[int, ...] = ()
    trunk: int = 0
    chunk_size: int = 0

    def between(self, start: int, stop: int) -> list[Chunk]:
        """Where each document begins and ends that has positions in between; the last one of a row has no end."""
        starts = self.starts or (0,)
        begins = starts[bisect_right(starts, start) - 1 : bisect_left(starts, stop) + 1]
        return [Chunk(*edges) for edges in pairwise((*begins, maxsize) if begins[-1] < stop else begins)]

    def remembered(self, chunk: Chunk) -> bool:
        """Whether a later chunk sees anything of this one."""
        return chunk.stop <= self.trunk or chunk.stop not in self.starts


ONE = Documents()


def cut(length: int, chunk_size: int, documents: Documents = ONE) -> list[Chunk]:
    """Cut `length` positions into chunks; the last one may be short. Raises InputError.

    A chunk ends where the trunk does; and early, if the document that would be cut fits into a chunk of its own.
    """
    if chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size}, but must be at least 1")
    edges = [0]
    while (start := edges[-1]) < length:
        stop = min(start + chunk_size, documents.trunk if start < documents.trunk else length)
        begin, end = documents.between(start, stop)[-1]
        fits_later = start < begin and stop < min(end, length) <= begin + chunk_size
        edges.append(begin if fits_later else stop)
    return [Chunk(*pair) for pair in pairwise(edges)]


def span(chunks: Sequence[Chunk]) -> slice:
    """All positions of adjacent chunks."""
    return slice(chunks[0].start, chunks[-1].stop)


def check_fill_size(fill_size: int | None, chunk_size: int) -> None:
    """Raise InputError unless at least one chunk fits into a pass of the fill."""
    if fill_size is not None and fill_size < chunk_size:
        raise InputError(f"fill_size is {fill_size}, but must be at least the chunk size, {chunk_size}")


def groups(chunks: Sequence[Chunk], fill_size: int | None) -> list[list[Chunk]]:
    """The passes of the fill: as many adjacent chunks at a time as fit into `fill_size`; None: one."""
    passes: list[list[Chunk]] = []
    for chunk in chunks:
        if passes and passes[-1][-1].stop == chunk.start and chunk.stop - passes[-1][0].start <= (fill_size or 0):
            passes[-1].append(chunk)
        else:
            passes.append([chunk])
    return passes
