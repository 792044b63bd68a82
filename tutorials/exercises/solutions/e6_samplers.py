"""Solution 6: samplers and their factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minichunk import Weight


def chain_weight(entries: Sequence[Weight | None], chain: Sequence[int]) -> float:
    """By which number the gradient along `chain` is multiplied; 0 if the chain does not survive."""
    first, *others = [entries[i] for i in chain]
    if first is None:
        return 0.0
    product = first.loss
    for entry in others:
        product *= 0.0 if entry is None else entry.relay
    return product


def survival(num_chunks: int, budget: int, length: int) -> float:
    """The probability that a chain through `length` chunks survives when `budget` of the chunks are kept."""
    probability = 1.0
    for i in range(length):  # i chunks of the chain are kept already, out of the budget and out of all
        probability *= (budget - i) / (num_chunks - i)
    return probability


def bernoulli(rates: Sequence[float], generator: torch.Generator | None) -> list[Weight | None]:
    """Keep chunk i with probability rates[i], each by its own coin."""
    coins = torch.rand(len(rates), generator=generator).tolist()
    return [Weight(1 / rate, 1 / rate) if coin < rate else None for coin, rate in zip(coins, rates, strict=True)]


def fixed_budget(budget: int, num_chunks: int, generator: torch.Generator | None) -> list[Weight | None]:
    """Keep exactly `budget` chunks; chains through one and two chunks are exactly unbiased."""
    k, t = num_chunks, min(budget, num_chunks)
    kept = torch.randperm(k, generator=generator)[:t].tolist()
    weight = Weight(k / t, (k - 1) / (t - 1) if t > 1 else 1.0)  # with t = 1 there is nobody to relay from
    return [weight if i in kept else None for i in range(k)]
