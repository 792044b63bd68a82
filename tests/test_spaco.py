"""SpaCO's expectation, enumerated: no statistics, no tolerance for luck."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minichunk as mc
from minichunk import losses
from minichunk.chunks import Chunk, cut

from .gradients import Tensors, combine, distance, gradients_by_chain_length, oracle
from .rounding import Exact, exactly, measure, outcome, weighted
from .strategies import (
    CUTS,
    HOW,
    OBJECTIVES,
    WEIGHTS,
    Batch,
    Drawn,
    batches,
    blocks_of,
    build,
    examples,
    models,
    state_models,
    tiny,
)

LENGTH = 13


def case(chunk_size: int, layers: int = 3, seed: int = 0) -> tuple[mc.Llama, torch.Tensor, torch.Tensor, list[Chunk]]:
    model = build(tiny(layers), seed)
    ids = torch.randint(23, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, 2:5] = -100
    return model, ids, labels, cut(LENGTH, chunk_size)


def expectation(
    model: mc.Llama, ids: torch.Tensor, labels: torch.Tensor, chunk_size: int, sampler: object, **options: Any
) -> tuple[Tensors, Exact]:
    """Loss and gradient of SpaCO, averaged over all outcomes of the sampler; and the same by the oracle.

    A draw's weights make other terms cancel than in the exact gradient: the error of the sum is
    bounded by the noise of the draws, each measured by its own oracle, times their probabilities.
    """
    chunks, told = cut(ids.shape[1], chunk_size), {"objective": options.get("objective")}
    got, expected, total = [], [], 0.0
    for probability, entries in sampler.outcomes(len(chunks)):  # type: ignore[attr-defined]
        draw = {"sampler": lambda *_, entries=entries: entries, **options}
        got.append((probability, outcome(model, lambda draw=draw: mc.spaco(model, ids, labels, chunk_size, **draw))))
        exact = exactly(model, lambda entries=entries: oracle(model, ids, labels, chunks, entries, **told))
        expected.append((probability, exact))
        total += probability
    assert total == pytest.approx(1, abs=1e-12)
    return combine(got), weighted(expected)


def test_bernoulli_is_unbiased_for_a_preference() -> None:
    """No function of a sum would be, if the sum were estimated too: its weights come from the whole fill."""
    model, ids, labels, _ = case(chunk_size=4)
    reference = mc.log_probs(build(tiny(3), seed=9), ids, labels, 4)
    told = {"objective": losses.dpo(reference, 0.5)}
    got, draws = expectation(model, ids, labels, 4, mc.Bernoulli([0.9, 0.2, 0.5, 0.35]), **told)
    exactly(model, lambda: mc.full(model, ids, labels, **told)).check(got, beside=draws)


@examples(25)
@given(
    model=models(lora=False) | state_models(max_layers=3), batch=batches(max_length=8), chunk_size=st.integers(2, 5),
    block=st.integers(1, 6), rates=st.lists(st.floats(0.1, 1), min_size=4, max_size=4), at_once=CUTS,
)  # fmt: skip
def test_bernoulli_is_unbiased_for_any_model(
    model: Any, batch: Batch, chunk_size: int, block: int, rates: list[float], at_once: int | None
) -> None:
    sampler = mc.Bernoulli(rates[: math.ceil(batch.input_ids.shape[1] / chunk_size)])
    with blocks_of(block):
        text = batch.input_ids, batch.labels
        got, draws = expectation(model, *text, chunk_size, sampler, layers_at_once=at_once)
    exactly(model, lambda: mc.full(model, batch.input_ids, batch.labels)).check(got, beside=draws)


def survival(p: int, t: int, k: int) -> float:
    """The chance that t of k chunks, drawn without replacement, hold p given ones (hypergeometric)."""
    return math.prod((t - i) / (k - i) for i in range(p))


@pytest.mark.parametrize("cap", ["fixed", None, 2.0])
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 9])
def test_a_budget_is_biased_as_the_theory_says(budget: int, cap: float | str | None) -> None:
    """Factor k/t for the loss, one per hop, chance t(t-1)…/(k(k-1)…) to survive: what is left of each chain length.

    The fixed budget is right for chains through two chunks; the published estimator only for the loss.
    """
    model, ids, labels, chunks = case(chunk_size=3)
    k, t = len(chunks), min(budget, len(chunks))
    if cap == "fixed":
        sampler, relay, least = mc.FixedBudget(budget), (k - 1) / (t - 1) if t > 1 else 1.0, 1e-3
    else:
        sampler, relay, least = mc.PaperBudget(budget, cap), min(k / t, cap or math.inf), 1e-2  # type: ignore
    factors = [survival(p, t, k) * (k / t) * relay ** (p - 1) for p in range(1, k + 1)]
    assert factors[0] == pytest.approx(1)
    assert cap != "fixed" or t == 1 or factors[1] == pytest.approx(1)
    got, draws = expectation(model, ids, labels, 3, sampler, layers_at_once=budget % 3 or None)
    chains = partial(gradients_by_chain_length, model, ids, labels, chunks)
    expected = measure(lambda: combine(list(zip(factors, chains(), strict=True))))
    expected.check({name: x for name, x in got.items() if name != "loss"}, beside=draws)
    exact = exactly(model, lambda: mc.full(model, ids, labels))
    if t < k:
        assert distance(got, exact.values) > least
        Exact({"loss": exact.values["loss"]}, exact.noise).check({"loss": got["loss"]}, beside=draws)
    else:
        exact.check(got, beside=draws)


def test_fixed_budget_is_unbiased_with_one_layer() -> None:
    """Chains hop at least one layer down: with one layer none is longer than two chunks."""
    model, ids, labels, _ = case(chunk_size=3, layers=1)
    got, draws = expectation(model, ids, labels, 3, mc.FixedBudget(2))
    exactly(model, lambda: mc.full(model, ids, labels)).check(got, beside=draws)


@examples(55)
@given(
    model=models(lora=False) | state_models(max_layers=3), batch=batches(positions=True), chunk_size=st.integers(1, 6),
    block=st.integers(1, 6), weights=st.lists(WEIGHTS, min_size=14, max_size=14), fill_chunks=st.integers(1, 3),
    how=HOW, objective=OBJECTIVES,
)  # fmt: skip
def test_any_draw_equals_the_oracle(
    model: Any, batch: Batch, chunk_size: int, block: int, weights: list[mc.Weight | None], fill_chunks: int, how: Any,
    objective: Drawn | None,
) -> None:  # fmt: skip
    """One draw with arbitrary factors, against autograd through the whole sequence."""
    chunks = cut(batch.input_ids.shape[1], chunk_size)
    entries = weights[: len(chunks)]
    text, told = (model, batch.input_ids, batch.labels), {"objective": objective}
    told |= {"positions": batch.positions} if model.takes_positions else {}
    exact = exactly(model, lambda: oracle(*text, chunks, entries, **told))
    keywords = {"sampler": lambda *_: entries, "fill_size": fill_chunks * chunk_size, **how, **told}
    with blocks_of(block):
        exact.check(outcome(model, lambda: mc.spaco(*text, chunk_size, **keywords)))


@pytest.mark.parametrize("sampler", [mc.Bernoulli(1), mc.Bernoulli([1.0] * 5), mc.FixedBudget(5), mc.PaperBudget(7)])
def test_with_every_chunk_kept_all_samplers_are_seco(sampler: object) -> None:
    model, ids, labels, _ = case(chunk_size=3)
    mc.add_lora(model, 2, 4, ("q_proj", "down_proj"), dropout=0.2)
    results = []
    for keywords in ({}, {"sampler": sampler}):
        torch.manual_seed(1)
        # A default-generator draw would move the dropout's seed: the sampler has its own.
        generator = {"generator": torch.Generator().manual_seed(0)} if keywords else {}
        method = partial(mc.spaco if keywords else mc.seco, model, ids, labels, 3, **keywords, **generator)
        results.append(outcome(model, method))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])  # factors of exactly 1


def test_a_draw_that_keeps_nothing_leaves_the_gradients() -> None:
    model, ids, labels, _ = case(chunk_size=3)
    assert float(mc.spaco(model, ids, labels, 3, sampler=lambda k, _: [None] * k)) == 0
    assert all(p.grad is None for p in model.parameters())


def test_the_generator_decides_the_draw() -> None:
    for sampler in (mc.Bernoulli(0.5), mc.FixedBudget(3), mc.PaperBudget(3)):
        draws = [sampler(64, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    "sampler", [mc.Bernoulli(0.4), mc.Bernoulli([0.2, 0.9, 0.5]), mc.FixedBudget(2), mc.PaperBudget(2)]
)
def test_draws_come_as_often_as_the_outcomes_say(sampler: object) -> None:
    """What tests and tutorials enumerate is what the sampler draws: 4,000 seeded draws."""
    generator = torch.Generator().manual_seed(0)
    draws = [tuple(sampler(3, generator)) for _ in range(4000)]  # type: ignore[operator]
    outcomes = {tuple(entries): p for p, entries in sampler.outcomes(3)}  # type: ignore[attr-defined]
    assert set(draws) <= set(outcomes)
    for entries, p in outcomes.items():
        assert abs(draws.count(entries) / 4000 - p) < 5 * math.sqrt(p * (1 - p) / 4000)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lambda *_: [None], "returned 1 entries, but there are 5 chunks"),
        (lambda: lambda *_: [mc.Weight(math.nan, 1.0)] * 5, "must be finite"),
        (lambda: mc.Bernoulli([0.5, 0.5]), "2 rates, but there are 5 chunks"),
        (lambda: mc.Bernoulli(0), "rate is 0"),
        (lambda: mc.Bernoulli(math.nan), "rate is nan"),
        (lambda: mc.Bernoulli([0.5, -1]), "rate is -1"),
        (lambda: mc.FixedBudget(0), "budget is 0"),
        (lambda: mc.PaperBudget(2, cap=0), "cap is 0"),
    ],
)
def test_a_wrong_sampler_is_refused(make: Callable[[], Any], words: str) -> None:
    model, ids, labels, _ = case(chunk_size=3)
    with pytest.raises(mc.InputError, match=words):
        mc.spaco(model, ids, labels, 3, sampler=make())
