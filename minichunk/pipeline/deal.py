"""Which layers each rank gets: adjacent ones, so that the fullest rank has as little as possible."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from torch import nn

from ..errors import InputError


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """How many of the layers each rank gets, at least one; the largest sum of their costs is the least possible.

    costs: one for each layer; the embedding's is part of the first one, that of norm and LM head of the last.
    """
    until = [0.0, *accumulate(costs)]

    @cache
    def best(start: int, ranks: int) -> tuple[float, tuple[int, ...]]:
        """For the layers from `start` on: what the fullest of these ranks has, and how many layers each gets."""
        if ranks == 1:
            return until[-1] - until[start], (len(costs) - start,)
        ways = []
        for stop in range(start + 1, len(costs) - ranks + 2):
            fullest, counts = best(stop, ranks - 1)
            ways.append((max(until[stop] - until[start], fullest), (stop - start, *counts)))
        return min(ways)

    return list(best(0, ranks)[1])


def size(module: nn.Module) -> int:
    """Bytes of its weights, which are also what a token costs in its linear layers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def check_counts(counts: Sequence[int], layers: int, ranks: int) -> None:
    """Raise InputError unless these are at least one layer for each rank, and all layers."""
    if len(counts) != ranks or min(counts) < 1 or sum(counts) != layers:
        raise InputError(
            f"the layers are dealt as {list(counts)}, but must be {ranks} numbers of at least 1, "
            f"one for each rank, which add up to the {layers} layers of the model"
        )
