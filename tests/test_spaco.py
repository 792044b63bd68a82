"""SpaCO's expectation, enumerated: no statistics, no tolerance for luck."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minichunk as mc
from minichunk.chunks import Chunk, cut

from .gradients import (
    Gradients,
    check_gradients,
    combine,
    distance,
    gradients_by_chain_length,
    oracle,
    take_gradients,
)
from .strategies import Batch, batches, build, models, tiny

LENGTH = 13


def case(chunk_size: int, layers: int = 3, seed: int = 0) -> tuple[mc.Llama, torch.Tensor, torch.Tensor, list[Chunk]]:
    model = build(tiny(layers), seed)
    ids = torch.randint(23, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, 2:5] = -100
    return model, ids, labels, cut(LENGTH, chunk_size)


def exact(model: mc.Llama, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
    return mc.full(model, ids, labels), take_gradients(model)


def expectation(
    model: mc.Llama, ids: torch.Tensor, labels: torch.Tensor, chunk_size: int, sampler: object
) -> tuple[float, Gradients]:
    """Loss and gradient of SpaCO, averaged over all outcomes of the sampler."""
    terms, loss, total = [], 0.0, 0.0
    for probability, entries in sampler.outcomes(math.ceil(ids.shape[1] / chunk_size)):  # type: ignore[attr-defined]
        value = mc.spaco(model, ids, labels, chunk_size, sampler=lambda *_, entries=entries: entries)
        terms.append((probability, take_gradients(model)))
        loss += probability * float(value)
        total += probability
    assert total == pytest.approx(1, abs=1e-12)
    return loss, combine(terms)


@pytest.mark.parametrize("chunk_size", [13, 7, 5, 3])  # 1, 2, 3 and 5 chunks
@pytest.mark.parametrize("rate", [0.3, 1.0, "per chunk"])
def test_bernoulli_is_unbiased(chunk_size: int, rate: float | str) -> None:
    model, ids, labels, chunks = case(chunk_size)
    rates = [0.9, 0.2, 0.5, 0.35, 1.0][: len(chunks)] if rate == "per chunk" else rate
    expected_loss, expected = exact(model, ids, labels)
    loss, got = expectation(model, ids, labels, chunk_size, mc.Bernoulli(rates))  # type: ignore[arg-type]
    assert loss == pytest.approx(float(expected_loss), rel=1e-12)
    check_gradients(got, expected, whole=1e-13)


@settings(max_examples=25, deadline=None)
@given(
    model=models(lora=False),
    batch=batches(max_length=8),
    chunk_size=st.integers(2, 5),
    rates=st.lists(st.floats(0.1, 1), min_size=4, max_size=4),
)
def test_bernoulli_is_unbiased_for_any_model(
    model: mc.Llama, batch: Batch, chunk_size: int, rates: list[float]
) -> None:
    _, expected = exact(model, batch.input_ids, batch.labels)
    sampler = mc.Bernoulli(rates[: math.ceil(batch.input_ids.shape[1] / chunk_size)])
    _, got = expectation(model, batch.input_ids, batch.labels, chunk_size, sampler)
    check_gradients(got, expected, whole=1e-13)


def survival(p: int, t: int, k: int) -> float:
    """The chance that t of k chunks, drawn without replacement, hold p given ones (DESIGN: hypergeometric)."""
    return math.prod((t - i) / (k - i) for i in range(p))


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 9])
def test_fixed_budget_is_right_for_chains_through_two_chunks(budget: int) -> None:
    model, ids, labels, chunks = case(chunk_size=3)
    k, t = len(chunks), min(budget, len(chunks))
    chains = gradients_by_chain_length(model, ids, labels, chunks)
    relay = (k - 1) / (t - 1) if t > 1 else 1.0
    factors = [survival(p, t, k) * (k / t) * relay ** (p - 1) for p in range(1, k + 1)]
    assert factors[0] == pytest.approx(1)
    assert t == 1 or factors[1] == pytest.approx(1)
    _, got = expectation(model, ids, labels, 3, mc.FixedBudget(budget))
    check_gradients(got, combine(list(zip(factors, chains, strict=True))), rtol=1e-11, whole=1e-12)
    bias = distance(got, exact(model, ids, labels)[1])
    assert bias > 1e-3 if t < k else bias < 1e-12


def test_fixed_budget_is_unbiased_with_one_layer() -> None:
    """Chains hop at least one layer down: with one layer none is longer than two chunks."""
    model, ids, labels, _ = case(chunk_size=3, layers=1)
    _, got = expectation(model, ids, labels, 3, mc.FixedBudget(2))
    check_gradients(got, exact(model, ids, labels)[1], whole=1e-13)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5])
def test_the_published_estimator_is_biased_as_the_theory_says(budget: int, cap: float | None) -> None:
    """Factor k/t per hop, chance t(t-1)…/(k(k-1)…) to survive: what is left of each chain length."""
    model, ids, labels, chunks = case(chunk_size=3)
    k, t = len(chunks), budget
    chains = gradients_by_chain_length(model, ids, labels, chunks)
    relay = k / t if cap is None else min(k / t, cap)
    factors = [survival(p, t, k) * (k / t) * relay ** (p - 1) for p in range(1, k + 1)]
    loss, got = expectation(model, ids, labels, 3, mc.PaperBudget(budget, cap))
    check_gradients(got, combine(list(zip(factors, chains, strict=True))), rtol=1e-11, whole=1e-12)
    expected_loss, expected = exact(model, ids, labels)
    assert loss == pytest.approx(float(expected_loss), rel=1e-12)  # the loss, at least, is unbiased
    assert distance(got, expected) > 1e-2 if t < k else distance(got, expected) < 1e-12


@settings(max_examples=60, deadline=None)
@given(
    model=models(lora=False),
    batch=batches(),
    chunk_size=st.integers(1, 6),
    weights=st.lists(st.none() | st.builds(mc.Weight, st.floats(-2, 2), st.floats(-2, 2)), min_size=14, max_size=14),
    fill_chunks=st.integers(1, 3),
)
def test_any_draw_equals_the_oracle(
    model: mc.Llama, batch: Batch, chunk_size: int, weights: list[mc.Weight | None], fill_chunks: int
) -> None:
    """One draw with arbitrary factors, against autograd through the whole sequence."""
    chunks = cut(batch.input_ids.shape[1], chunk_size)
    entries = weights[: len(chunks)]
    expected_loss = oracle(model, batch.input_ids, batch.labels, chunks, entries)
    expected = take_gradients(model)
    loss = mc.spaco(
        model, batch.input_ids, batch.labels, chunk_size, sampler=lambda *_: entries, fill_size=fill_chunks * chunk_size
    )
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-12, atol=1e-13)
    check_gradients(take_gradients(model), expected)


@pytest.mark.parametrize("sampler", [mc.Bernoulli(1), mc.Bernoulli([1.0] * 5), mc.FixedBudget(5), mc.PaperBudget(7)])
def test_with_every_chunk_kept_all_samplers_are_seco(sampler: object) -> None:
    model, ids, labels, _ = case(chunk_size=3)
    mc.add_lora(model, 2, 4, ("q_proj", "down_proj"), dropout=0.2)
    results: list[tuple[float, Gradients]] = []
    for keywords in ({}, {"sampler": sampler}):
        torch.manual_seed(1)
        method = mc.spaco if keywords else mc.seco
        # A default-generator draw would move the dropout's seed: the sampler has its own.
        generator = {"generator": torch.Generator().manual_seed(0)} if keywords else {}
        loss = method(model, ids, labels, 3, **keywords, **generator)
        results.append((float(loss), take_gradients(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-14)
    check_gradients(results[1][1], results[0][1], rtol=1e-14)


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


def entries_that(*entries: object) -> object:
    return lambda *_: list(entries)


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (entries_that(None), "returned 1 entries, but there are 5 chunks"),
        (entries_that(*[mc.Weight(math.nan, 1.0)] * 5), "must be finite"),
        (entries_that(*[mc.Weight(1.0, math.inf)] * 5), "must be finite"),
        (mc.Bernoulli([0.5, 0.5]), "2 rates, but there are 5 chunks"),
    ],
)
def test_a_wrong_sampler_is_refused(sampler: object, words: str) -> None:
    model, ids, labels, _ = case(chunk_size=3)
    with pytest.raises(mc.InputError, match=words):
        mc.spaco(model, ids, labels, 3, sampler=sampler)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mc.Bernoulli(0), "rate is 0"),
        (lambda: mc.Bernoulli(1.5), "rate is 1.5"),
        (lambda: mc.Bernoulli(math.nan), "rate is nan"),
        (lambda: mc.Bernoulli([0.5, -1]), "rate is -1"),
        (lambda: mc.FixedBudget(0), "budget is 0"),
        (lambda: mc.PaperBudget(-2), "budget is -2"),
        (lambda: mc.PaperBudget(2, cap=0), "cap is 0"),
    ],
)
def test_wrong_values_are_named(make: object, words: str) -> None:
    with pytest.raises(mc.InputError, match=words):
        make()  # type: ignore[operator]
