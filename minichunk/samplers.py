"""Which chunks SpaCO keeps, and by which factors their losses and relays are multiplied.

The gradient of a chunk's loss goes back through the caches of earlier chunks, from one to another: a chain (eq. 3). It
survives when all of its chunks are kept, and is multiplied by the loss factor of the chunk where it starts and by the
relay factor of every further one. Unbiased: for every chain, the probability to survive times these factors is 1.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import NamedTuple

import torch

from .errors import InputError


class Weight(NamedTuple):
    """The factors of one kept chunk: on its own loss, and on what later chunks sent back to it."""

    loss: float
    relay: float


Draw = list[Weight | None]  # one entry for each chunk, first chunk first; None: skipped


@dataclass(frozen=True)
class Bernoulli:
    """Keep each chunk by its own coin, with factor 1/rate on loss and relay: exactly unbiased.

    A chain through p chunks survives with the product of their p rates, and the p factors undo just that. (The paper
    draws t of k without replacement, section 3.3.) rate: in (0, 1], one number or one per chunk. Raises InputError.
    """

    rate: float | Sequence[float]

    def __post_init__(self) -> None:
        for rate in self.rate if isinstance(self.rate, Sequence) else [self.rate]:
            if not isinstance(rate, int | float) or not 0 < rate <= 1:
                raise InputError(f"the Bernoulli rate is {rate}, but must be above 0 and at most 1")

    def rates(self, num_chunks: int) -> Sequence[float]:
        if not isinstance(self.rate, Sequence):
            return [self.rate] * num_chunks
        if len(self.rate) != num_chunks:
            raise InputError(f"Bernoulli has {len(self.rate)} rates, but there are {num_chunks} chunks")
        return self.rate

    def __call__(self, num_chunks: int, generator: torch.Generator | None = None) -> Draw:
        coins = torch.rand(num_chunks, generator=generator, dtype=torch.float64).tolist()
        pairs = zip(coins, self.rates(num_chunks), strict=True)
        return [Weight(1 / rate, 1 / rate) if coin < rate else None for coin, rate in pairs]

    def outcomes(self, num_chunks: int) -> Iterator[tuple[float, Draw]]:
        """All (probability, entries) pairs: 2^num_chunks, or fewer where a rate is 1."""
        for coins in product((False, True), repeat=num_chunks):
            falls = list(zip(coins, self.rates(num_chunks), strict=True))
            probability = math.prod(rate if keep else 1 - rate for keep, rate in falls)
            if probability > 0:
                yield probability, [Weight(1 / rate, 1 / rate) if keep else None for keep, rate in falls]


@dataclass(frozen=True)
class FixedBudget:
    """Keep exactly `budget` = t of k chunks, every subset equally likely: the same cost at every step, a small bias.

    A chain through p chunks survives with t(t-1)…(t-p+1) / (k(k-1)…(k-p+1)). The factors k/t on
    the loss and (k-1)/(t-1) on each relay make chains through one and two chunks exactly right;
    longer ones are shrunk. A budget above the number of chunks keeps all. Raises InputError below 1.
    """

    budget: int

    def __post_init__(self) -> None:
        if not isinstance(self.budget, int) or self.budget < 1:
            raise InputError(f"the budget is {self.budget!r}, but must be a whole number of at least 1 chunk")

    def weight(self, t: int, k: int) -> Weight:
        """The factors of every kept chunk when t of k are kept."""
        return Weight(k / t, (k - 1) / (t - 1) if t > 1 else 1.0)  # with t = 1 no relay is ever used

    def __call__(self, num_chunks: int, generator: torch.Generator | None = None) -> Draw:
        order = torch.randperm(num_chunks, generator=generator).tolist()
        return self._keep(order[: self.budget], num_chunks)

    def outcomes(self, num_chunks: int) -> Iterator[tuple[float, Draw]]:
        subsets = list(combinations(range(num_chunks), min(self.budget, num_chunks)))
        for kept in subsets:
            yield 1 / len(subsets), self._keep(kept, num_chunks)

    def _keep(self, kept: Sequence[int], num_chunks: int) -> Draw:
        weight = self.weight(len(kept), num_chunks)
        return [weight if i in kept else None for i in range(num_chunks)]


@dataclass(frozen=True)
class PaperBudget(FixedBudget):
    """The same draw with the factor k/t on loss and relay, as published (Algorithm 2, eq. 9).

    Biased from chains through two chunks on, as draws are not independent. The loss is scaled too, which Algorithm 2 as
    printed leaves out. cap: the most that the relay's factor may be (the paper advises 2). Raises InputError.
    """

    cap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cap is not None and not self.cap > 0:
            raise InputError(f"the cap is {self.cap}, but must be above 0")

    def weight(self, t: int, k: int) -> Weight:
        return Weight(k / t, k / t if self.cap is None else min(k / t, self.cap))


def most_kept(sampler: str, budget: int, num_chunks: int) -> int:
    """How many chunks a step keeps at most: the budget, or with "bernoulli" what 99.9 % of steps do not exceed, with
    the rate budget / num_chunks. sampler: as on the command line."""
    if sampler != "bernoulli" or num_chunks <= budget:
        return min(budget, num_chunks)
    rate, kept, total = budget / num_chunks, -1, 0.0
    while total < 0.999:
        kept += 1
        ways = math.lgamma(num_chunks + 1) - math.lgamma(kept + 1) - math.lgamma(num_chunks - kept + 1)
        total += math.exp(ways + kept * math.log(rate) + (num_chunks - kept) * math.log1p(-rate))
    return kept
