"""Exercise 5: SeCO and SpaCO on a real Llama.

The loop of exercise 4 again, now with minichunk's parts. They know nothing of the order in which they
are called, nor of gradients that have to be handed on: that is yours.

    batch = prepare(model, input_ids, labels, None)
        checked, with the labels shifted. In the place of None could stand a number to divide the loss by:
        None counts the valid targets of the whole batch
    chunks = cut(length, chunk_size)
        a list of Chunk(start, stop)
    memory = new_memory(model, input_ids, kept, OPTIONS)
        what chunks leave behind for later ones, here their keys and values. kept: the chunks that will be
        rebuilt, in order. It has room for all that lies before the last of them, and for the gradients
        sent back to the others
    fill(model, input_ids, chunks, memory, OPTIONS)
        run `chunks` in order, without gradients, and write their keys and values into the memory
    loss, written, received = rebuild(model, batch, chunk, memory, OPTIONS)
        run one chunk again on top of the memory, with its graph. loss: its share of the mean loss, that is
        summed over the chunk's targets and divided by the number of all targets; written: its keys and
        values, a list of tensors; received: what has been sent back to each so far

Backpropagating through a rebuilt chunk sends the gradients of all earlier keys and values to the memory:
`received` is where they come out again. (The last chunk is seen by nobody: both of its lists are empty.)

Check: python -m pytest tutorials/exercises -k seco
"""

from __future__ import annotations

from collections.abc import Sequence

import torch  # noqa: F401
from torch import Tensor

from minichunk import Llama, Weight
from minichunk.batch import prepare  # noqa: F401
from minichunk.chunks import cut  # noqa: F401
from minichunk.protocol import Options
from minichunk.seco import fill, new_memory, rebuild  # noqa: F401

OPTIONS = Options()  # what may change a step's cost, but not its result: hand it on as it is


def seco(model: Llama, input_ids: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    """Add the exact gradient of the mean loss to `.grad`; return the mean loss, detached (Algorithm 1).

    input_ids, labels: int64 (B, T). The mean is over all valid targets of the whole batch.

    Hints. Nobody looks at the last chunk: which chunks does the fill need? The losses are divided when
    they come: what makes the mean loss of them, and what was `received` computed from?
    """
    raise NotImplementedError("seco: Algorithm 1 with minichunk's parts")


def spaco(model: Llama, input_ids: Tensor, labels: Tensor, chunk_size: int, entries: Sequence[Weight | None]) -> Tensor:
    """Add an estimate of the gradient to `.grad`; return one of the mean loss, detached (Algorithm 2).

    entries: what a sampler drew, one entry for each chunk, first chunk first. None: the chunk is skipped,
    that is never rebuilt. Weight(loss, relay): multiply the chunk's loss by weight.loss, and what it has
    received from later chunks by weight.relay.
    Returns the sum over the kept chunks of weight.loss times their part of the mean loss. When no chunk
    is kept, returns 0 and touches no gradient.

    Hints. Which chunks does new_memory have to know about? Which must the fill write, so that the kept
    ones see all of their past?
    """
    raise NotImplementedError("spaco: Algorithm 2 with minichunk's parts, for the entries that a sampler drew")
