"""What is known about mistakes in exercise 6, samplers."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, prod
from types import ModuleType
from typing import Any

import torch

import minichunk as mc

from ..diagnose import close, compare, require, within

Draw = list[Any]  # of None or Weight, if the student is right
DRAWS = 2000


def check_samplers(module: ModuleType) -> None:
    """The factors along a chain, the survival of chains, then both samplers."""
    _check_chain_weight(module)
    _check_survival(module)
    _check_bernoulli(module)
    _check_fixed_budget(module)


def _number(name: str, got: Any, expected: float, wrongs: dict[str, float]) -> None:
    require(isinstance(got, int | float), f"{name} is a {type(got).__name__}, but must be a number.")
    mistakes = [(words, {name: torch.tensor(wrong).double()}) for words, wrong in wrongs.items()]
    compare({name: torch.tensor(got).double()}, {name: torch.tensor(expected).double()}, mistakes)


@within("chain_weight")
def _check_chain_weight(module: ModuleType) -> None:
    entries = [mc.Weight(2.0, 3.0), None, mc.Weight(5.0, 7.0), mc.Weight(11.0, 13.0)]
    cases: list[tuple[list[int], float, dict[str, float]]] = [
        ([2], 5.0, {
            "A chain through one chunk was multiplied by its relay factor: nothing is relayed in it.": 35.0,
            "The loss factor is missing. The chain starts at a loss: which factor does that have?": 1.0,
            "A chain through one chunk has the relay factor. It starts at the loss: which one does it need?": 7.0,
        }),
        ([3, 2, 0], 11.0 * 7.0 * 3.0, {
            "The loss factor of every chunk was multiplied in. Whose loss does the chain start from?": 11.0 * 5.0 * 2.0,
            "The relay factor of chain[0] was multiplied in. What does it receive in this chain?": 11.0 * 13 * 7 * 3,
            "The chain starts at chain[0], last in the text, but it was walked the other way.": 2.0 * 7 * 13,
            "Relay factors only: which factor does the loss have?": 13.0 * 7 * 3,
            "The loss factor is missing. The chain starts at a loss: which factor does that have?": 7.0 * 3.0,
            "Only two chunks of the chain have a factor. Where else does it pass?": 11.0 * 7.0,
            "The factors were added. What do two factors in a row do?": 11.0 + 7 + 3,
        }),
        ([3, 1, 0], 0.0, {
            "A skipped chunk was left out of the product. Its graph was never rebuilt: does the chain survive?": 33.0,
        }),
        ([1], 0.0, {"The loss of a skipped chunk was not computed, and yet it has a factor.": 1.0}),
    ]  # fmt: skip
    for chain, expected, wrongs in cases:
        _number(f"chain_weight({chain})", module.chain_weight(entries, chain), expected, wrongs)


@within("survival")
def _check_survival(module: ModuleType) -> None:
    for k, t, p in ((6, 4, 1), (6, 4, 2), (6, 4, 3), (5, 3, 5), (4, 4, 3)):
        expected = 1.0
        for i in range(p):
            expected *= (t - i) / (k - i)
        wrongs = {
            "This is (t / k) to the power of the length, as the paper assumes. Once one chunk of the chain is among "
            "the t kept, how many of the others are left, out of how many?": (t / k) ** p,
            "The second chunk is drawn out of all k again. How many are left when one is taken?": (
                prod(t - i for i in range(p)) / k**p
            ),
            "The budget stays whole: once a chunk is kept, how many of the t are left for the others?": (
                t**p / prod(k - i for i in range(p))
            ),
            "This is the inverse of the probability.": 1 / expected if expected else 0.0,
            "This is the probability that the chain does not survive.": 1 - expected,
            "One chunk too few: how many have to be kept for a chain through `length` chunks?": (
                prod((t - i) / (k - i) for i in range(p - 1))
            ),
            "One chunk too many: how many have to be kept for a chain through `length` chunks?": (
                prod((t - i) / (k - i) for i in range(min(p + 1, k)))
            ),
        }
        _number(f"survival({k}, {t}, {p})", module.survival(k, t, p), expected, wrongs)


def _check_draws(name: str, draw: Callable[[torch.Generator | None], Draw], length: int) -> list[Draw]:
    """Draw often; the draws must be lists of entries, and come from the generator and from nothing else."""

    def some(count: int) -> list[Draw]:
        generator = torch.Generator().manual_seed(0)
        return [draw(generator) for _ in range(count)]

    draws = some(DRAWS)
    for entries in draws[:20]:
        kind = type(entries).__name__
        require(isinstance(entries, list | tuple), f"{name} returned a {kind}, but has to return a list of entries.")
        require(len(entries) == length, f"{name} returned {len(entries)} entries, but there are {length} chunks.")
        for entry in entries:
            empty = isinstance(entry, mc.Weight) and entry.loss == 0
            require(
                not empty, f"{name} returned {entry}. Its chunk would be rebuilt, to count nothing: what says `skip`?"
            )
            fits = entry is None or isinstance(entry, mc.Weight)
            require(fits, f"{name} returned the entry {entry!r}, but it has to be None or a Weight(loss, relay).")
    before = torch.get_rng_state()
    again = some(20)
    require(
        again == draws[:20],
        "Two generators with the same seed gave different draws. Is `generator` passed on to the function "
        "that makes the random numbers? A run that is resumed has to draw the same chunks.",
    )
    untouched = torch.equal(before, torch.get_rng_state())
    require(untouched, f"{name} took random numbers from PyTorch's own generator beside the one it was given.")
    varied = any(entries != draws[0] for entries in draws)
    require(
        varied,
        f"{name} returned the same draw {DRAWS} times. Is the generator made, or seeded, in the function itself?",
    )
    draw(None)  # PyTorch's own generator
    return draws


def _near(count: int, probability: float) -> bool:
    """Whether a count out of DRAWS is within five standard deviations of what it should be."""
    return abs(count - DRAWS * probability) <= 5 * (DRAWS * probability * (1 - probability)) ** 0.5


@within("bernoulli")
def _check_bernoulli(module: ModuleType) -> None:
    rates = [0.2, 0.5, 0.8, 1.0]
    draws = _check_draws("It", lambda generator: module.bernoulli(rates, generator), len(rates))
    kept = [[entry is not None for entry in entries] for entries in draws]
    counts = [sum(column) for column in zip(*kept, strict=True)]
    flipped = all(_near(count, 1 - rate) for count, rate in zip(counts, rates, strict=True))
    require(not flipped, "A chunk is kept with probability 1 - rate. Which side of the coin is which?")
    for number, words in ((0.5, "1/2"), (sum(rates) / len(rates), "the mean of the rates")):
        alike = all(_near(count, number) for count in counts)
        require(not alike, f"Every chunk is kept with the same probability, {words}. Each has a rate of its own.")
    squared = all(_near(count, rate**2) for count, rate in zip(counts, rates, strict=True))
    require(not squared, "A chunk is kept with probability rate²: are there two coins for each?")
    for i, (count, rate) in enumerate(zip(counts, rates, strict=True)):
        require(
            _near(count, rate),
            f"It kept chunk {i}, whose rate is {rate}, {count} times in {DRAWS}. When is a coin, uniform in "
            "[0, 1), below the rate?",
        )
    together = sum(row[0] and row[1] for row in kept)
    require(
        _near(together, rates[0] * rates[1]),
        f"Every chunk is kept as often as it should be, but chunks 0 and 1 were kept together in {together} of {DRAWS} "
        f"draws, where independent coins give {DRAWS * rates[0] * rates[1]:.0f}. Does each chunk have its own coin?",
    )
    for i, rate in enumerate(rates):
        found = {(entries[i].loss, entries[i].relay) for entries in draws if entries[i] is not None}
        _check_factors(found, (1 / rate, 1 / rate), {
            (1.0, 1.0): "The factors are 1: nothing makes up for the skipped chunks. A chunk that is kept one time in "
            "five has to count how often?",
            (rate, rate): "The factors are the rate. A chunk that is rarely kept has to count more, not less.",
            (1.0, 1 / rate): "The loss is not scaled, as in Algorithm 2 as printed. How often does a chain through one "
            "chunk survive?",
            (1 / rate, 1.0): "The relay is not scaled. How often does a chain through two chunks survive?",
            (1 / (1 - rate) if rate < 1 else 0.0, 1 / (1 - rate) if rate < 1 else 0.0): "The factor is one over the "
            "probability to be skipped.",
            (1 / rate**2, 1 / rate): "The loss has 1 / rate twice. Which coin decides whether a chunk's loss counts?",
            (1 / rate**2, 1 / rate**2): "The factors are 1 / rate². How many coins has a chunk?",
            (rate**-0.5, rate**-0.5): "The factors are 1 / sqrt(rate). Each hop's coin has to be undone as a whole.",
            (len(rates) / sum(rates),) * 2: "The factors are one over the mean of the rates. Which coin do they undo?",
            (1 / rate, 1 / rate**2): "The relay has 1 / rate twice. The coin of the chunk that a chain starts from is "
            "undone by its loss factor: which coin is this hop's own?",
        })  # fmt: skip


def _check_factors(
    found: set[tuple[float, float]], expected: tuple[float, float], wrongs: dict[tuple[float, float], str]
) -> None:
    for loss, relay in sorted(found):
        got = torch.tensor([loss, relay]).double()
        if close(got, torch.tensor(expected).double()):
            continue
        for wrong, words in wrongs.items():
            require(not close(got, torch.tensor(wrong).double()), words)
        raise AssertionError(
            f"A kept chunk has Weight(loss={loss:.6g}, relay={relay:.6g}), but it should be "
            f"Weight(loss={expected[0]:.6g}, relay={expected[1]:.6g})."
        )


@within("fixed_budget")
def _check_fixed_budget(module: ModuleType) -> None:
    name = "fixed_budget"
    for k, t in ((6, 4), (5, 2)):
        draws = _check_draws(f"{name}({t}, {k})", lambda g, k=k, t=t: module.fixed_budget(t, k, g), k)
        for entries in draws:
            n = sum(entry is not None for entry in entries)
            require(
                n == t,
                f"{name}({t}, {k}) kept {n} chunks. It has to be exactly {t}, in every draw. Has each chunk a coin of "
                "its own, or can the same chunk be drawn twice?",
            )
        for i in range(k):
            count = sum(entries[i] is not None for entries in draws)
            require(
                _near(count, t / k),
                f"{name}({t}, {k}) kept chunk {i} {count} times in {DRAWS}; every set should be equally likely.",
            )
        together = sum(entries[0] is not None and entries[1] is not None for entries in draws)
        require(
            _near(together, t * (t - 1) / (k * (k - 1))),
            f"{name}({t}, {k}) kept chunks 0 and 1 together {together} times in {DRAWS}. Is every set equally likely, "
            "or are neighbours drawn together?",
        )
        found = {(entry.loss, entry.relay) for entries in draws for entry in entries if entry is not None}
        loss, relay = k / t, (k - 1) / (t - 1)
        _check_factors(found, (loss, relay), {
            (loss, loss): "The relay factor is k / t, as published. Given that one chunk of a chain is kept, t - 1 of "
            "the other k - 1 are: with which probability is the next one among them?",
            (1.0, relay): "The loss is not scaled, as in Algorithm 2 as printed. How often does a chain through one "
            "chunk survive?",
            (1.0, loss): "The loss is not scaled, and the relay factor is k / t: that is Algorithm 2 as printed. How "
            "often do chains through one and through two chunks survive?",
            (loss, 1.0): "The relay is not scaled. How often does a chain through two chunks survive?",
            (1.0, 1.0): "The factors are 1: nothing makes up for the skipped chunks.",
            (relay, relay): "The loss factor is (k - 1) / (t - 1). With which probability is one given chunk kept?",
            (relay, loss): "The two factors are swapped.",
            (loss, loss * relay): "The relay factor undoes the whole chain, but the chain has the loss factor k / t as "
            "well. What is left for the relay to undo?",
            (loss, k / (t - 1)): "The relay factor is k / (t - 1). The chunk kept already is one of the k, too.",
            (loss, (k - 1) / t): "The relay factor is (k - 1) / t. The chunk kept already is one of the t, too.",
            (k // t, (k - 1) // (t - 1)): "The factors are rounded down: // divides whole numbers. What does / do?",
            (1 / loss, 1 / relay): "The factors are the probabilities. Which factor undoes a probability?",
        })  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    try:
        lonely, generous = module.fixed_budget(1, 4, generator), module.fixed_budget(9, 3, generator)
    except ZeroDivisionError as error:
        raise AssertionError(
            "It divides by zero when one chunk is kept. Nothing is relayed then: any finite number will do."
        ) from error
    weights = [entry for entry in lonely if entry is not None]
    require(
        len(weights) == 1 and weights[0].loss == 4,
        f"fixed_budget(1, 4) returned {lonely}: one chunk has to count for 4.",
    )
    require(
        isfinite(weights[0].relay),
        f"fixed_budget(1, 4) has the relay factor {weights[0].relay}. Nothing is relayed then, but zeros are "
        "multiplied by it, and infinity times 0 is not 0: any finite number will do.",
    )
    require(
        list(generous) == [mc.Weight(1.0, 1.0)] * 3,
        f"fixed_budget(9, 3) returned {generous}. A budget above the number of chunks keeps all: with which factors?",
    )
