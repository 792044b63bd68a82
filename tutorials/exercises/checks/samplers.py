"""What is known about mistakes in exercise 6, samplers."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, prod
from types import ModuleType
from typing import Any

import torch

import minichunk as mc

from ..diagnose import Values, compare, require, within

Draw = list[Any]  # of None or Weight, if the student is right
DRAWS = 2000
PRINTED = "The loss is not scaled, as in Algorithm 2 as printed. How often does a chain through one chunk survive?"
NOTHING = (
    "The factors are 1: nothing makes up for the skipped chunks. A chunk that is kept one time in five has to count "
    "how often?"
)


def check_samplers(module: ModuleType) -> None:
    """The factors along a chain, the survival of chains, then both samplers."""
    _check_chain_weight(module)
    _check_survival(module)
    _check_bernoulli(module)
    _check_fixed_budget(module)


def _check_number(name: str, got: Any, expected: float, wrongs: dict[str, float]) -> None:
    require(isinstance(got, int | float), f"{name} is a {type(got).__name__}, but must be a number.")
    mistakes = [(words, {name: torch.tensor(wrong).double()}) for words, wrong in wrongs.items()]
    compare({name: torch.tensor(got).double()}, {name: torch.tensor(expected).double()}, mistakes)


@within("chain_weight")
def _check_chain_weight(module: ModuleType) -> None:
    entries = [mc.Weight(2.0, 3.0), None, mc.Weight(5.0, 7.0), mc.Weight(11.0, 13.0)]
    relayed = "A chain through one chunk was multiplied by its relay factor: nothing is relayed in it."
    left_out = "A skipped chunk was left out of the product. Its graph was never rebuilt: does the chain survive?"
    for chain, expected, wrongs in (
        ([2], 5.0, {relayed: 35.0}),
        ([3, 2, 0], 11.0 * 7.0 * 3.0, {}),
        ([3, 1, 0], 0.0, {left_out: 33.0}),
        ([1], 0.0, {}),
    ):
        _check_number(f"chain_weight({chain})", module.chain_weight(entries, chain), expected, wrongs)


@within("survival")
def _check_survival(module: ModuleType) -> None:
    for k, t, p in ((6, 4, 1), (6, 4, 2), (6, 4, 3), (5, 3, 5), (4, 4, 3)):
        expected = prod((t - i) / (k - i) for i in range(p))
        words = (
            "This is (t / k) to the power of the length, as the paper assumes. Once one chunk of the chain is among "
            "the t kept, how many of the others are left, out of how many?"
        )
        _check_number(f"survival({k}, {t}, {p})", module.survival(k, t, p), expected, {words: (t / k) ** p})


def _check_draws(name: str, draw: Callable[[torch.Generator | None], Draw], length: int) -> list[Draw]:
    """Draw often; the draws must be lists of entries, and come from the generator and from nothing else."""

    def some(count: int) -> list[Draw]:
        generator = torch.Generator().manual_seed(0)
        return [draw(generator) for _ in range(count)]

    draws = some(DRAWS)
    for entries in draws[:20]:
        right = isinstance(entries, list | tuple) and len(entries) == length
        right = right and all(e is None or (isinstance(e, mc.Weight) and e.loss != 0) for e in entries)
        require(
            right,
            f"{name} returned {entries}, but has to return a list with an entry for each of the {length} chunks: None, "
            "which says `skip`, or a Weight(loss, relay), whose chunk is rebuilt.",
        )
    before = torch.get_rng_state()
    require(
        some(20) == draws[:20] and torch.equal(before, torch.get_rng_state()),
        "Two generators with the same seed gave different draws. Is `generator` passed on to the function "
        "that makes the random numbers? A run that is resumed has to draw the same chunks.",
    )
    require(
        any(entries != draws[0] for entries in draws),
        f"{name} returned the same draw {DRAWS} times. Is the generator made, or seeded, in the function itself?",
    )
    draw(None)  # PyTorch's own generator
    return draws


def _is_near(count: int, probability: float) -> bool:
    """Whether a count out of DRAWS is within five standard deviations of what it should be."""
    return abs(count - DRAWS * probability) <= 5 * (DRAWS * probability * (1 - probability)) ** 0.5


def _check_counts(draws: list[Draw], rates: list[float], together: float) -> None:
    """How often each chunk is kept, and chunks 0 and 1 together."""
    for i, rate in enumerate(rates):
        count = sum(entries[i] is not None for entries in draws)
        words = f"Chunk {i} was kept {count} times in {DRAWS} draws, instead of about {DRAWS * rate:.0f}."
        require(_is_near(count, rate), f"{words} When is a coin, uniform in [0, 1), below a rate?")
    count = sum(entries[0] is not None and entries[1] is not None for entries in draws)
    require(
        _is_near(count, together),
        f"Every chunk is kept as often as it should be, but chunks 0 and 1 were kept together in {count} of {DRAWS} "
        f"draws, instead of {DRAWS * together:.0f}. Does each chunk have its own coin; is every set as likely?",
    )


def _check_factors(entry: mc.Weight, expected: tuple[float, float], wrongs: dict[str, tuple[float, float]]) -> None:
    def named(pair: tuple[float, float]) -> Values:
        names = ("the loss factor", "the relay factor")
        return {name: torch.tensor(x).double() for name, x in zip(names, pair, strict=True)}

    compare(named(entry), named(expected), [(words, named(wrong)) for words, wrong in wrongs.items()])


@within("bernoulli")
def _check_bernoulli(module: ModuleType) -> None:
    rates = [0.2, 0.5, 0.8, 1.0]
    draws = _check_draws("It", lambda generator: module.bernoulli(rates, generator), len(rates))
    _check_counts(draws, rates, rates[0] * rates[1])
    for i, rate in enumerate(rates):
        for entry in {entries[i] for entries in draws if entries[i]}:
            _check_factors(entry, (1 / rate, 1 / rate), {NOTHING: (1.0, 1.0), PRINTED: (1.0, 1 / rate)})


@within("fixed_budget")
def _check_fixed_budget(module: ModuleType) -> None:
    for k, t in ((6, 4), (5, 2)):
        name = f"fixed_budget({t}, {k})"
        draws = _check_draws(name, lambda generator, k=k, t=t: module.fixed_budget(t, k, generator), k)
        counts = {sum(entry is not None for entry in entries) for entries in draws}
        require(
            counts == {t},
            f"{name} kept {counts} chunks. It has to be exactly {t}, in every draw. Has each chunk a coin of its own, "
            "or can the same chunk be drawn twice?",
        )
        _check_counts(draws, [t / k] * k, t * (t - 1) / (k * (k - 1)))
        loss, relay = k / t, (k - 1) / (t - 1)
        for entry in {entry for entries in draws for entry in entries if entry}:
            _check_factors(entry, (loss, relay), {
                "The relay factor is k / t, as published. Given that one chunk of a chain is kept, t - 1 of the other "
                "k - 1 are: with which probability is the next one among them?": (loss, loss),
                PRINTED: (1.0, relay),
            })  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    lonely, generous = module.fixed_budget(1, 4, generator), module.fixed_budget(9, 3, generator)
    weights = [entry for entry in lonely if entry is not None]
    require(
        len(weights) == 1 and weights[0].loss == 4 and isfinite(weights[0].relay),
        f"fixed_budget(1, 4) returned {lonely}: one chunk has to count for 4, and as nothing but zeros is relayed "
        "then, any finite relay factor will do (infinity times 0 is not 0).",
    )
    require(
        list(generous) == [mc.Weight(1.0, 1.0)] * 3,
        f"fixed_budget(9, 3) returned {generous}. A budget above the number of chunks keeps all: with which factors?",
    )
