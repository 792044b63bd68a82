"""SeCO's gradient is that of ordinary backpropagation, in every parameter."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import minichunk as mc
from minichunk.batch import prepare
from minichunk.chunks import Chunk, cut
from minichunk.memory.attention import Past
from minichunk.memory.cache import LayerCache
from minichunk.memory.kernels import FlashCPU
from minichunk.models.lora import DropoutMasks
from minichunk.protocol import Options
from minichunk.seco import fill, new_memory, rebuild

from .gradients import distance, oracle, take_gradients
from .rounding import exactly, outcome
from .strategies import (
    OBJECTIVES,
    SECO_HOW,
    Batch,
    Drawn,
    batches,
    blocks_of,
    build,
    examples,
    models,
    tiny,
    tiny_state,
    with_adapter,
)

spaco_module = sys.modules["minichunk.spaco"]  # the attribute of that name is the function
IDS = torch.randint(23, (2, 9), generator=torch.Generator().manual_seed(3))


@contextmanager
def masks_of(model: mc.Llama, seed: int, chunks: list[Chunk]) -> Iterator[None]:
    """Within the block the model draws the dropout masks that the chunks draw after this seed, put together."""
    torch.manual_seed(seed)
    if model.masks is None:
        yield
        return
    step_seed = int(torch.randint(2**62, ()))
    with pytest.MonkeyPatch.context() as patch:
        of = DropoutMasks.of
        patch.setattr(DropoutMasks, "of", lambda self, *_: of(self, step_seed, chunks))
        with model.masks.of(step_seed, chunks):
            yield


def full_with_masks(model: mc.Llama, batch: Batch, seed: int, chunk_size: int, **options: Any) -> torch.Tensor:
    """`full`, with the dropout masks that the chunks draw put together."""
    with masks_of(model, seed, cut(batch.input_ids.shape[1], chunk_size)):
        return mc.full(model, batch.input_ids, batch.labels, positions=batch.positions, **options)


@examples(100)
@example(  # a graph of a chunk between two others that matter: which few draws have
    model=build(tiny(), 0), batch=Batch(IDS, IDS), size=3, block=3, options={"graphs": 1}, fill=(0, 0), objective=None,
    seed=0,
)  # fmt: skip
@given(
    model=models(), batch=batches(positions=True), size=st.integers(1, 16), block=st.integers(1, 6), options=SECO_HOW,
    fill=st.tuples(st.integers(0, 4), st.integers(0, 3)), objective=OBJECTIVES, seed=st.integers(0, 2**31),
)  # fmt: skip
def test_seco_equals_full(
    model: mc.Llama, batch: Batch, size: int, fill: tuple[int, int], block: int, options: dict[str, Any],
    objective: Drawn | None, seed: int,
) -> None:  # fmt: skip
    """Chunks shorter and longer than a block of the past, and such blocks that end within a chunk; the layers all at
    once or in blocks; on the device and in host memory; positions that are not those of the text."""
    options |= {"fill_size": fill[0] * size + fill[1] if fill[0] else None, "positions": batch.positions}
    objective = None if "graphs" in options else objective
    options |= {"objective": objective}
    exact = exactly(model, lambda: full_with_masks(model, batch, seed, size, objective=objective))
    torch.manual_seed(seed)
    with blocks_of(block):
        exact.check(outcome(model, lambda: mc.seco(model, batch.input_ids, batch.labels, size, **options)))


@examples(25)
@given(
    model=models(), first=batches(), second=batches(), chunk_size=st.integers(1, 9), block=st.integers(1, 6),
    seeds=st.tuples(*[st.integers(0, 99)] * 2),
)  # fmt: skip
def test_accumulated_batches_equal_full(
    model: mc.Llama, first: Batch, second: Batch, chunk_size: int, block: int, seeds: tuple[int, int]
) -> None:
    """Two batches with the divisor of both together add up to one mean over all targets."""
    count = first.num_targets + second.num_targets
    draws = list(zip((first, second), seeds, strict=True))

    def seco(batch: Batch, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return mc.seco(model, batch.input_ids, batch.labels, chunk_size, num_targets=count)

    def full(batch: Batch, seed: int) -> torch.Tensor:
        return full_with_masks(model, batch, seed, chunk_size, num_targets=count)

    exact = exactly(model, lambda: sum(full(*draw) for draw in draws))
    with blocks_of(block):
        exact.check(outcome(model, lambda: sum(seco(*draw) for draw in draws)))


@examples(25)
@given(model=models(lora=False), batch=batches(positions=True), objective=OBJECTIVES, recompute=st.booleans())
def test_full_equals_naive_attention(model: mc.Llama, batch: Batch, objective: Drawn | None, recompute: bool) -> None:
    """The oracle itself, against softmax over T x T scores written out."""
    whole = [Chunk(0, batch.input_ids.shape[1])]
    text, told = (model, batch.input_ids, batch.labels), {"positions": batch.positions, "objective": objective}
    exact = exactly(model, lambda: oracle(*text, whole, [mc.Weight(1, 1)], **told))
    exact.check(outcome(model, lambda: mc.full(*text, **told, recompute=recompute)))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_forward_pass_between_a_rebuild_and_its_backward_changes_nothing(recompute: bool) -> None:
    """Dropout's masks are drawn again for the chunk that is run again, whatever else has drawn some since."""
    model = with_adapter(build(tiny(), seed=8), targets=("q_proj", "down_proj"), dropout=0.5)
    ids = torch.randint(23, (1, 6))
    results = []
    for disturb in (False, True):
        torch.manual_seed(1)
        chunk, options = Chunk(0, 6), Options(recompute=recompute, dropout_seed=model.dropout_seed())
        memory = new_memory(model, ids, [chunk], options)
        loss, _, _ = rebuild(model, prepare(model, ids, ids, None), chunk, memory, options)
        if disturb:
            model(ids)
        loss.backward()
        results.append(take_gradients(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_does_not_run_attention_again(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, chunk = build(tiny(layers=3), seed=9), Chunk(4, 8)
    ids = torch.randint(23, (1, 8))
    options = Options(recompute=recompute)
    memory = new_memory(model, ids, [Chunk(0, 4), chunk], options)
    fill(model, ids, [Chunk(0, 4)], memory, options)
    calls, forward = [], FlashCPU.forward
    monkeypatch.setattr(FlashCPU, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))
    loss, _, _ = rebuild(model, prepare(model, ids, ids, None), chunk, memory, options)
    loss.backward()
    assert len(calls) == 3 * 2  # in each layer the chunk itself and its past


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
    patch.setattr("minichunk.memory.layer_memory.LayerMemories.hand_over", lambda *_: [])


def wrong_order(patch: pytest.MonkeyPatch) -> None:
    """First chunk first: nothing has been sent back yet when a chunk asks."""
    patch.setattr(spaco_module, "reversed", iter, raising=False)


def forgotten(patch: pytest.MonkeyPatch, **factor: float) -> None:
    original = spaco_module.check_weights
    patch.setattr(spaco_module, "check_weights", lambda *a: [w and w._replace(**factor) for w in original(*a)])


def top_left_mask(patch: pytest.MonkeyPatch) -> None:
    """What `is_causal=True` means with fewer queries than keys: query i sees the keys up to i, not start + i."""

    def attend(self: Past, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        for *_, (past_k, past_v) in self.memory.pieces(0, self.start):
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    patch.setattr(Past, "attend", attend)


def shuffled_dropout(patch: pytest.MonkeyPatch) -> None:
    """A rebuild that draws other masks than the fill."""
    original, calls = DropoutMasks.of, iter(range(10**6))
    patch.setattr(DropoutMasks, "of", lambda self, seed, chunks: original(self, seed and seed + next(calls), chunks))


def every_block_is_the_first(patch: pytest.MonkeyPatch) -> None:
    """Gradients of all blocks of the past go to the first one's positions."""
    original = LayerCache.add_grads
    patch.setattr(LayerCache, "add_grads", lambda self, _, *grads: original(self, 0, *grads))


MISTAKES = [
    no_relay, wrong_order, partial(forgotten, relay=1.0), partial(forgotten, loss=1.0), top_left_mask,
    shuffled_dropout, every_block_is_the_first,
]  # fmt: skip


@pytest.mark.parametrize("break_it", [None, *MISTAKES])
def test_negative_controls(break_it: Callable[[pytest.MonkeyPatch], None] | None) -> None:
    """Each of these mistakes makes the comparison with the oracle fail, by far; without one it holds."""
    model = with_adapter(build(tiny(layers=3), seed=2), 2, 4, ("q_proj", "k_proj", "v_proj", "down_proj"), 0.2)
    ids = torch.randint(23, (1, 12))
    entries = [mc.Weight(1.5, 0.5), None, mc.Weight(0.7, 2.0), mc.Weight(2.0, 3.0)]
    chunks = cut(12, 3)

    def expected() -> torch.Tensor:
        with masks_of(model, 5, chunks):
            return oracle(model, ids, ids, chunks, entries)

    exact = exactly(model, expected)
    torch.manual_seed(5)
    with pytest.MonkeyPatch.context() as patch, blocks_of(4):
        if break_it is not None:
            break_it(patch)
        got = outcome(model, lambda: mc.spaco(model, ids, ids, 3, sampler=lambda *_: entries))
    if break_it is None:
        exact.check(got)
    else:
        assert distance(got, exact.values) > 1e-2
        with pytest.raises(AssertionError, match=r"is off by .*, allowed .*; worst at \("):
            exact.check(got)


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
        ({"positions": torch.tensor([[0, -1]])}, "positions is torch.int64 .* must be int64 from 0 on"),
        ({"positions": torch.tensor([[0, 1, 2]])}, r"positions is .* of shape \[1, 3\]"),
        ({"positions": torch.tensor([[0, 1]], dtype=torch.int32)}, "positions is torch.int32"),
        ({"layers_at_once": 0}, "layers_at_once is 0, but must be at least 1"),
        ({"graphs": -1}, "graphs is -1, but must be at least 0"),
        ({"graphs": 2, "offload": True}, "graphs is 2, but is not supported together with offload"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], words: str) -> None:
    model = build(tiny(), seed=5)
    arguments = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, 2]]), "chunk_size": 1, **change}
    with pytest.raises(mc.InputError, match=words):
        mc.seco(model, **arguments)
    assert all(p.grad is None for p in model.parameters())
    uncut = SimpleNamespace(lm_head=model.lm_head, parameters=model.parameters, dropout_seed=model.dropout_seed)
    with pytest.raises(mc.InputError, match="SimpleNamespace has no method blocks"):
        mc.seco(uncut, IDS, IDS, 4, layers_at_once=1)  # type: ignore[arg-type]
    with pytest.raises(mc.InputError, match="positions are for a model with rope"):
        mc.seco(build(tiny_state(), seed=5), IDS, IDS, 1, positions=IDS)
    with pytest.raises(mc.InputError, match="nothing to train"):
        mc.seco(model.requires_grad_(False), IDS, IDS, 1)
