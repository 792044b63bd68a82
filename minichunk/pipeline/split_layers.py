"""Which layers each rank gets: adjacent ones, so that the fullest rank has as little as possible."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from torch import nn

from ..errors import InputError
from ..models.stack import Stack


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


def layer_costs(model: Stack, remembered: Sequence[int] | None = None) -> list[int]:
    """For `deal`: the bytes that each layer takes on its rank; the first also the embedding's, the last the LM head's.

    Counted are the weights as they are stored, in 4 bits for instance; of those that learn, their gradients and what
    AdamW keeps; and what a layer remembers. Not counted are the activations of the chunks in flight, of which a rank
    has more the earlier it comes, and time: a token costs as much as there are weights, in the embedding nothing, and
    in a layer also what its attention over the past takes.

    model: on any device, meta too. remembered: of each layer, on the device, as `layer_memory_bytes` finds it; None:
        nothing, as with offload, or where the length is not known yet.
    """
    costs = [_bytes(layer) for layer in model.layers]
    costs[0] += _bytes(model.embedding)
    costs[-1] += _bytes(model.norm) + _bytes(model.lm_head)
    return costs if remembered is None else [c + r for c, r in zip(costs, remembered, strict=True)]


def _bytes(module: nn.Module) -> int:
    """Of its weights, and of what those that learn need beside them."""
    stored = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return stored + sum(_to_learn(p) for p in module.parameters() if p.requires_grad)


def _to_learn(p: nn.Parameter) -> int:
    """Bytes of a gradient, of two moments, and of a copy if the parameter is in half precision; in float32 at least."""
    wide = max(4, p.itemsize)
    return p.numel() * (3 * wide + (wide if p.itemsize < wide else 0))


def check_counts(counts: Sequence[int], layers: int, ranks: int) -> None:
    """Raise InputError unless these are at least one layer for each rank, and all layers."""
    if len(counts) != ranks or min(counts) < 1 or sum(counts) != layers:
        raise InputError(
            f"the layers are dealt as {list(counts)}, but must be {ranks} numbers of at least 1, "
            f"one for each rank, which add up to the {layers} layers of the model"
        )
