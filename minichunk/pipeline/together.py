"""What the ranks settle together: before a step what they do, after it a weight that two of them have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ..chunks import Chunk
from ..errors import InputError
from ..protocol import Options
from ..samplers import Weight
from .stage import PipelineStage

Weights = Sequence[Weight | None]


class Said(NamedTuple):
    """What a rank tells all others before a step."""

    shape: tuple[int, ...]
    chunks: Sequence[Chunk]
    options: Options
    weights: Weights | None  # the first rank's
    learns: bool


def agree(
    stage: PipelineStage, input_ids: Tensor, chunks: Sequence[Chunk], options: Options, draw: Callable[[int], Weights]
) -> tuple[Weights, Options, bool]:
    """The first rank's draw and its seed of the dropouts, for all; and whether anything learns on the ranks before.

    Raises InputError unless all ranks are about to do the same, and some parameter learns.
    """
    weights = draw(len(chunks)) if stage.links.is_first else None
    options = replace(options, dropout_seed=stage.dropout_seed())
    learns = any(parameter.requires_grad for parameter in stage.parameters())
    said = stage.links.everyones(Said(tuple(input_ids.shape), chunks, options, weights, learns))
    first = said[0]
    for rank, other in enumerate(said):
        same_seed = replace(other.options, dropout_seed=first.options.dropout_seed)
        if (other.shape, other.chunks, same_seed) != (first.shape, first.chunks, first.options):
            raise InputError(
                f"rank {rank} was called with a batch of shape {list(other.shape)}, {len(other.chunks)} chunks and "
                f"{other.options}, but rank 0 with {list(first.shape)}, {len(first.chunks)} and {first.options}: "
                "all ranks must be given the same"
            )
    if not any(rank.learns for rank in said):
        raise InputError("no parameter of the model requires a gradient: nothing to train")
    assert first.weights is not None
    return first.weights, first.options, any(rank.learns for rank in said[: stage.links.rank])


def set_aside(stage: PipelineStage) -> Tensor | None:
    """The gradient of earlier steps of a weight that is on two ranks; this step's is to be added up by itself."""
    weight = stage.tied_weight
    if weight is None:
        return None
    before, weight.grad = weight.grad, None
    return before


def add_up(stage: PipelineStage, before: Tensor | None) -> None:
    """Give both ranks of a weight that is embedding and LM head the sum of what they have found."""
    weight = stage.tied_weight
    if weight is not None and weight.grad is not None:
        weight.grad += stage.links.swap_ends(weight.grad)
        if before is not None:
            weight.grad += before
