"""Exercise 5: SeCO and SpaCO on a real Llama.

The loop of exercise 4 again, now with minichunk's parts. They know nothing of the order in which they
are called, nor of gradients that have to be handed on: that is yours.

    targets, divisor = check_batch(model, input_ids, labels, None)
        targets: int64 (B, T), the labels shifted; divisor: the number of valid targets of the whole batch
    chunks = cut(length, chunk_size)
        a list of Chunk(start, stop)
    cache = new_cache(model, input_ids, kept)
        memory for one step. kept: the chunks that will be rebuilt, in order. It has room for keys and
        values of all that lies before the last of them, and for the gradients sent back to the others
    fill(model, input_ids, chunks, cache)
        run `chunks` in order, without gradients, and write their keys and values into the cache
    loss, written, received = rebuild(model, input_ids, targets, chunk, cache)
        run one chunk again on top of the cache, with its graph. loss: summed over the chunk's targets;
        written: its keys and values, a list of tensors; received: what has been sent back to each so far

Backpropagating through a rebuilt chunk sends the gradients of all earlier keys and values to the cache:
`received` is where they come out again. (The last chunk is seen by nobody: both of its lists are empty.)

Check: python -m pytest tutorials/exercises -k seco
"""

from __future__ import annotations

from collections.abc import Sequence

import torch  # noqa: F401
from torch import Tensor

from minichunk import Llama, Weight
from minichunk.chunks import check_batch, cut  # noqa: F401
from minichunk.seco import fill, new_cache, rebuild  # noqa: F401


def seco(model: Llama, input_ids: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    """Add the exact gradient of the mean loss to `.grad`; return the mean loss, detached (Algorithm 1).

    input_ids, labels: int64 (B, T). The mean is over all valid targets of the whole batch.

    Hints. Nobody looks at the last chunk: which chunks does the fill need? Where does the division
    belong, so that the parameters get the gradient of the mean, and the relay stays as it was received?
    """
    raise NotImplementedError("seco: Algorithm 1 with minichunk's parts")


def spaco(model: Llama, input_ids: Tensor, labels: Tensor, chunk_size: int, entries: Sequence[Weight | None]) -> Tensor:
    """Add an estimate of the gradient to `.grad`; return one of the mean loss, detached (Algorithm 2).

    entries: what a sampler drew, one entry for each chunk, first chunk first. None: the chunk is skipped,
    that is never rebuilt. Weight(loss, relay): multiply the chunk's loss by weight.loss, and what it has
    received from later chunks by weight.relay.
    Returns the sum over the kept chunks of weight.loss times their part of the mean loss. When no chunk
    is kept, returns 0 and touches no gradient.

    Hints. Which chunks does new_cache have to know about? Which must the fill write, so that the kept
    ones see all of their past?
    """
    raise NotImplementedError("spaco: Algorithm 2 with minichunk's parts, for the entries that a sampler drew")
