"""SeCO's gradient is that of ordinary backpropagation, in every parameter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minichunk as mc
from minichunk.chunks import Chunk, cut
from minichunk.lora import DropoutMasks

from .gradients import check_gradients, oracle, take_gradients
from .strategies import Batch, batches, build, models, tiny


def full_with_masks(model: mc.Llama, batch: Batch, seed: int, chunks: list[Chunk], **keywords: object) -> torch.Tensor:
    """`full`, with the dropout masks that the chunks draw put together."""
    torch.manual_seed(seed)
    if model.dropout_masks is None:
        return mc.full(model, batch.input_ids, batch.labels, **keywords)
    step_seed = int(torch.randint(2**62, ()))
    with pytest.MonkeyPatch.context() as patch:
        select = DropoutMasks.select
        patch.setattr(DropoutMasks, "select", lambda self, *_: select(self, step_seed, chunks))
        return mc.full(model, batch.input_ids, batch.labels, **keywords)


@settings(max_examples=250, deadline=None)
@given(
    model=models(),
    batch=batches(),
    chunk_size=st.integers(1, 16),
    fill_chunks=st.integers(0, 4),
    extra=st.integers(0, 3),
    recompute=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_seco_equals_full(
    model: mc.Llama, batch: Batch, chunk_size: int, fill_chunks: int, extra: int, recompute: bool, seed: int
) -> None:
    fill_size = fill_chunks * chunk_size + extra if fill_chunks else None
    expected_loss = full_with_masks(model, batch, seed, cut(batch.input_ids.shape[1], chunk_size))
    expected = take_gradients(model)
    torch.manual_seed(seed)
    loss = mc.seco(model, batch.input_ids, batch.labels, chunk_size, fill_size=fill_size, recompute=recompute)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-14)
    check_gradients(take_gradients(model), expected)


@settings(max_examples=40, deadline=None)
@given(
    model=models(),
    first=batches(),
    second=batches(),
    chunk_size=st.integers(1, 9),
    seeds=st.tuples(*[st.integers(0, 99)] * 2),
)
def test_accumulated_batches_equal_full(
    model: mc.Llama, first: Batch, second: Batch, chunk_size: int, seeds: tuple[int, int]
) -> None:
    """Two batches with the divisor of both together add up to one mean over all targets."""
    count = first.num_targets + second.num_targets
    for batch, seed in zip((first, second), seeds, strict=True):
        full_with_masks(model, batch, seed, cut(batch.input_ids.shape[1], chunk_size), num_targets=count)
    expected = take_gradients(model)
    for batch, seed in zip((first, second), seeds, strict=True):
        torch.manual_seed(seed)
        mc.seco(model, batch.input_ids, batch.labels, chunk_size, num_targets=count)
    check_gradients(take_gradients(model), expected)


@settings(max_examples=25, deadline=None)
@given(model=models(lora=False), batch=batches())
def test_full_equals_naive_attention(model: mc.Llama, batch: Batch) -> None:
    """The oracle itself, against softmax over T x T scores written out."""
    expected_loss = oracle(
        model, batch.input_ids, batch.labels, [Chunk(0, batch.input_ids.shape[1])], [mc.Weight(1, 1)]
    )
    expected = take_gradients(model)
    loss = mc.full(model, batch.input_ids, batch.labels)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-14)
    check_gradients(take_gradients(model), expected)


def test_full_with_recompute_is_the_same() -> None:
    model = build(tiny(), seed=1)
    ids = torch.randint(23, (2, 12))
    mc.full(model, ids, ids)
    expected = take_gradients(model)
    mc.full(model, ids, ids, recompute=True)
    check_gradients(take_gradients(model), expected)


def test_a_detached_cache_would_be_noticed() -> None:
    """Without the relay the gradient is far off: the equality above is not won by default."""
    model = build(tiny(), seed=2)
    ids = torch.randint(23, (1, 12))
    mc.full(model, ids, ids)
    expected = take_gradients(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minichunk.cache.Cache.received", lambda *_: [])
        mc.seco(model, ids, ids, 4)
    with pytest.raises(AssertionError, match="gradient of"):
        check_gradients(take_gradients(model), expected, rtol=1e-3)


def test_gradients_are_added_to_those_there() -> None:
    model = build(tiny(), seed=3)
    ids = torch.randint(23, (1, 9))
    mc.seco(model, ids, ids, 4)
    once = take_gradients(model)
    mc.seco(model, ids, ids, 4)
    mc.seco(model, ids, ids, 4)
    check_gradients(take_gradients(model), {name: 2 * grad for name, grad in once.items()})


def test_padding_on_the_right_changes_nothing() -> None:
    model = build(tiny(), seed=4)
    ids = torch.randint(23, (1, 9))
    mc.full(model, ids, ids)
    expected = take_gradients(model)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    labels = torch.cat([ids, torch.full((1, 5), -100)], dim=1)
    mc.seco(model, padded, labels, 4)
    check_gradients(take_gradients(model), expected)


def test_bfloat16_parameters_get_float32_gradients() -> None:
    model = mc.Llama(tiny(hidden_size=16, head_dim=8)).bfloat16()
    ids = torch.randint(23, (1, 12))
    mc.seco(model, ids, ids, 4)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_same_seed_same_bits() -> None:
    model = mc.Llama(tiny(hidden_size=16, head_dim=8))
    mc.add_lora(model, 2, 4, ("q_proj", "v_proj"), dropout=0.2)
    ids = torch.randint(23, (2, 40))
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        mc.seco(model, ids, ids, 8)
        runs.append(take_gradients(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": torch.tensor([[1, 99]])}, "token id 99"),
        ({"input_ids": torch.tensor([[1, -3]])}, "token id -3"),
        ({"labels": torch.tensor([[1, 99]])}, "labels has the token id 99"),
        ({"labels": torch.tensor([[5, -100]])}, "no valid target"),
        ({"labels": torch.tensor([[5, 1, 2]])}, r"labels has shape \[1, 3\]"),
        ({"input_ids": torch.tensor([[1]]), "labels": torch.tensor([[1]])}, "at least 2"),
        ({"input_ids": torch.tensor([1, 2])}, "must be int64"),
        ({"input_ids": torch.tensor([[1.0, 2.0]])}, "must be int64"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"chunk_size": 1, "fill_size": 0}, "fill_size is 0"),
        ({"num_targets": 0}, "num_targets is 0"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], words: str) -> None:
    model = build(tiny(), seed=5)
    arguments = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, 2]]), "chunk_size": 1, **change}
    with pytest.raises(mc.InputError, match=words):
        mc.seco(model, **arguments)
    assert all(p.grad is None for p in model.parameters())


def test_a_frozen_model_is_refused() -> None:
    model = build(tiny(), seed=6).requires_grad_(False)
    with pytest.raises(mc.InputError, match="nothing to train"):
        mc.seco(model, torch.tensor([[1, 2]]), torch.tensor([[1, 2]]), 1)
