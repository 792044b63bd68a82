"""SeCO's gradient is that of ordinary backpropagation, in every parameter."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minichunk as mc
from minichunk.attention import Past
from minichunk.chunks import Chunk, cut
from minichunk.kernels import FlashCPU
from minichunk.lora import DropoutMasks
from minichunk.model import Recompute
from minichunk.seco import new_cache, rebuild

from .gradients import check_gradients, oracle, take_gradients
from .strategies import Batch, batches, build, models, tiny

spaco_module = sys.modules["minichunk.spaco"]  # the attribute of that name is the function


def full_with_masks(model: mc.Llama, batch: Batch, seed: int, chunks: list[Chunk], **keywords: object) -> torch.Tensor:
    """`full`, with the dropout masks that the chunks draw put together."""
    torch.manual_seed(seed)
    if model.dropout_masks is None:
        return mc.full(model, batch.input_ids, batch.labels, **keywords)
    step_seed = int(torch.randint(2**62, ()))
    with pytest.MonkeyPatch.context() as patch:
        of = DropoutMasks.of
        patch.setattr(DropoutMasks, "of", lambda self, *_: of(self, step_seed, chunks))
        return mc.full(model, batch.input_ids, batch.labels, **keywords)


@settings(max_examples=250, deadline=None)
@given(
    model=models(),
    batch=batches(),
    chunk_size=st.integers(1, 16),
    fill_chunks=st.integers(0, 4),
    extra=st.integers(0, 3),
    recompute=st.sampled_from([False, True, "all"]),
    seed=st.integers(0, 2**31),
)
def test_seco_equals_full(
    model: mc.Llama, batch: Batch, chunk_size: int, fill_chunks: int, extra: int, recompute: Recompute, seed: int
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


@pytest.mark.parametrize("recompute", [False, True, "all"])
def test_a_forward_pass_between_a_rebuild_and_its_backward_changes_nothing(recompute: Recompute) -> None:
    """Dropout's masks are drawn again for the chunk that is run again, whatever else has drawn some since."""
    model = build(tiny(), seed=8)
    mc.add_lora(model, 2, 4, ("q_proj", "down_proj"), dropout=0.5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    ids = torch.randint(23, (1, 6))
    results = []
    for disturb in (False, True):
        torch.manual_seed(1)
        chunk = Chunk(0, 6)
        cache = new_cache(model, ids, [chunk])
        loss, _, _ = rebuild(model, ids, torch.roll(ids, -1, 1), chunk, cache, recompute)
        if disturb:
            model(ids)
        loss.backward()
        results.append(take_gradients(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(("recompute", "passes"), [(False, 1), (True, 1), ("all", 2)])
def test_recompute_does_not_run_attention_again_unless_told(
    recompute: Recompute, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chunk = build(tiny(layers=3), seed=9), Chunk(4, 8)
    ids = torch.randint(23, (1, 8))
    cache = new_cache(model, ids, [Chunk(0, 4), chunk])
    cache.write(0, model.write(ids[:, :4], cache, [Chunk(0, 4)]))
    calls, forward = [], FlashCPU.forward
    monkeypatch.setattr(FlashCPU, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))
    loss, _, _ = rebuild(model, ids, ids, chunk, cache, recompute)
    loss.backward()
    assert len(calls) == passes * 3 * 2  # in each layer the chunk itself and its past


def test_what_recompute_keeps_goes_with_the_graph() -> None:
    """No reference cycle holds a chunk's attention until Python looks for cycles."""
    model, seen = build(tiny(), seed=9), []
    ids = torch.randint(23, (1, 8))
    original = Past.__init__

    def spy(self: Past, *arguments: object, **keywords: object) -> None:
        original(self, *arguments, **keywords)  # type: ignore[arg-type]
        seen.append(weakref.ref(self))

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Past, "__init__", spy)
            mc.seco(model, ids, ids, 4, recompute=True)
        assert seen
        assert all(reference() is None for reference in seen)
    finally:
        gc.enable()


def no_relay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("minichunk.cache.Cache.received", lambda *_: [])


def wrong_order(patch: pytest.MonkeyPatch) -> None:
    """First chunk first: nothing has been sent back yet when a chunk asks."""
    patch.setattr(spaco_module, "reversed", iter, raising=False)


def forgotten_relay_factor(patch: pytest.MonkeyPatch) -> None:
    original = spaco_module.check_weights
    patch.setattr(
        spaco_module, "check_weights", lambda *a: [mc.Weight(w.loss, 1.0) if w else None for w in original(*a)]
    )


def forgotten_loss_factor(patch: pytest.MonkeyPatch) -> None:
    original = spaco_module.check_weights
    patch.setattr(
        spaco_module, "check_weights", lambda *a: [mc.Weight(1.0, w.relay) if w else None for w in original(*a)]
    )


def top_left_mask(patch: pytest.MonkeyPatch) -> None:
    """What `is_causal=True` means with fewer queries than keys: query i sees the keys up to i, not start + i."""

    def attend(self: Past, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        for _, past_k, past_v in self.memory.pieces(self.start, max(1, self.start)):
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    patch.setattr(Past, "attend", attend)


def shuffled_dropout(patch: pytest.MonkeyPatch) -> None:
    """A rebuild that draws other masks than the fill."""
    original, calls = DropoutMasks.of, iter(range(10**6))
    patch.setattr(DropoutMasks, "of", lambda self, seed, chunks: original(self, seed and seed + next(calls), chunks))


@pytest.mark.parametrize(
    "break_it",
    [None, no_relay, wrong_order, forgotten_relay_factor, forgotten_loss_factor, top_left_mask, shuffled_dropout],
)
def test_negative_controls(break_it: Callable[[pytest.MonkeyPatch], None] | None) -> None:
    """Each of these mistakes makes the comparison with the oracle fail, by far; without one it holds."""
    model = build(tiny(layers=3), seed=2)
    mc.add_lora(model, 2, 4, ("q_proj", "k_proj", "v_proj", "down_proj"), dropout=0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.randint(23, (1, 12))
    entries = [mc.Weight(1.5, 0.5), None, mc.Weight(0.7, 2.0), mc.Weight(2.0, 3.0)]
    chunks = cut(12, 3)
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ()))
    assert model.dropout_masks is not None
    with model.dropout_masks.of(seed, chunks):
        oracle(model, ids, ids, chunks, entries)
    expected = take_gradients(model)
    torch.manual_seed(5)
    with pytest.MonkeyPatch.context() as patch:
        if break_it is not None:
            break_it(patch)
        mc.spaco(model, ids, ids, 3, sampler=lambda *_: entries)
    got = take_gradients(model)
    if break_it is None:
        check_gradients(got, expected)
    else:
        with pytest.raises(AssertionError, match="gradient of"):
            check_gradients(got, expected, rtol=1e-2)


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
        ({"chunk_size": 9, "fill_size": 8}, "fill_size is 8, but must be at least the chunk size, 9"),
        ({"input_ids": torch.zeros(0, 2, dtype=torch.int64)}, "must be int64"),
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
