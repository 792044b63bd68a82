"""Exercise 6: samplers and their factors.

The gradient is a sum over chains. A chain starts at the loss of one chunk and visits ever earlier
chunks by their keys and values. SpaCO rebuilds a random few of the chunks: a chain survives when all
of its chunks are kept. It is then multiplied by the loss factor of the chunk where it starts and by
the relay factor of every further one. The estimate is unbiased when, for every chain, the probability
to survive times these factors is 1.

A draw is a list with one entry for each chunk, first chunk first: None (skipped) or Weight(loss, relay).

Check: python -m pytest tutorials/exercises -k samplers
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minichunk import Weight


def chain_weight(entries: Sequence[Weight | None], chain: Sequence[int]) -> float:
    """By which number the gradient along `chain` is multiplied; 0 if the chain does not survive.

    entries: a draw. chain: the numbers (from 0) of its chunks in the order of the walk back: first the
    chunk whose loss it starts from, then ever earlier ones. At least one.
    """
    raise NotImplementedError("chain_weight: the product of a chain's factors in one draw")


def survival(num_chunks: int, budget: int, length: int) -> float:
    """The probability that a chain through `length` chunks survives when exactly `budget` chunks are kept.

    Every set of `budget` of the `num_chunks` chunks is equally likely.
    budget and length: 1 to num_chunks.

    Hints. The first chunk of the chain is kept with probability budget / num_chunks. Once it is, how many
    of the remaining chunks are kept? The paper takes (budget / num_chunks) ** length, and so is biased.
    """
    raise NotImplementedError("survival: the probability that all chunks of a chain are among those kept")


def bernoulli(rates: Sequence[float], generator: torch.Generator | None) -> list[Weight | None]:
    """Draw: keep chunk i with probability rates[i], each by its own coin, so that every chain is unbiased.

    rates: in (0, 1], one for each chunk. All randomness comes from `generator` (None: PyTorch's own).

    Hint. Independent coins: a chain survives with the product of its rates. Which factors undo that?
    """
    raise NotImplementedError("bernoulli: a draw with an independent coin for every chunk")


def fixed_budget(budget: int, num_chunks: int, generator: torch.Generator | None) -> list[Weight | None]:
    """Draw: keep exactly `budget` chunks, every set equally likely, so that short chains are unbiased.

    Chains through one chunk and through two chunks have to be exactly right; longer ones cannot be,
    with one loss factor and one relay factor for all chunks. A budget above num_chunks keeps all. With
    a budget of 1 the relay factor is never used: any finite number will do.
    All randomness comes from `generator` (None: PyTorch's own).

    Hints. survival(k, t, 1) times the loss factor must be 1; survival(k, t, 2) times the loss factor times
    the relay factor must be 1 as well. `torch.randperm` takes a generator.
    """
    raise NotImplementedError("fixed_budget: a draw of exactly `budget` chunks")
