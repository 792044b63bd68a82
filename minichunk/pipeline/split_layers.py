"""Which layers each rank gets: adjacent ones, so that the fullest rank has as little as possible."""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from torch import nn

from ..errors import InputError
from ..models.stack import Stack


def split_layers(model: Stack, ranks: int, memory: Sequence[int] | None = None) -> list[int]:
    """How many of the layers each rank gets, at least one, so that the fullest rank has as few bytes as possible; see
    `layer_costs`. Raises InputError for fewer layers than ranks."""
    if len(model.layers) < ranks:
        raise InputError(f"the model has {len(model.layers)} layers, too few for {ranks} ranks: start fewer")
    return list(split_costs(tuple(layer_costs(model, memory)), ranks))


def layer_costs(model: Stack, memory: Sequence[int] | None = None) -> list[int]:
    """The bytes that each layer takes on its rank; the first one's with the embedding, the last one's with the LM head.

    Counted are weights as they are stored; gradients and AdamW's states of those that learn; and the layer's memory:
    neither time nor the activations of chunks in flight, of which a rank has more the earlier it comes.
    model: with its adapter; on any device, meta too. memory: bytes of `layer_memory_bytes`; None: not known.
    """
    costs = [_bytes(layer) for layer in model.layers]
    costs[0] += _bytes(model.embedding)
    costs[-1] += _bytes(model.norm) + _bytes(model.lm_head)
    return costs if memory is None else [cost + more for cost, more in zip(costs, memory, strict=True)]


@cache
def split_costs(costs: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """How many adjacent costs each rank gets, at least one, so that the largest sum is the least possible."""
    until = [0, *accumulate(costs)]

    @cache
    def best(start: int, ranks: int) -> tuple[int, tuple[int, ...]]:
        """For the costs from `start` on: the largest sum, and how many each of these ranks gets."""
        if ranks == 1:
            return until[-1] - until[start], (len(costs) - start,)
        ways = []
        for stop in range(start + 1, len(costs) - ranks + 2):
            fullest, counts = best(stop, ranks - 1)
            ways.append((max(until[stop] - until[start], fullest), (stop - start, *counts)))
        return min(ways)

    return best(0, ranks)[1]


def _bytes(module: nn.Module) -> int:
    """Of its weights, and for those that learn a gradient, AdamW's moments and, of half precision, a master copy."""
    found = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    for p in module.parameters():
        if p.requires_grad:
            found += p.numel() * (3 * max(4, p.itemsize) + (4 if p.itemsize < 4 else 0))
    return found
