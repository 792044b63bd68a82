"""What the methods keep: one chunk of activations, and gradients for the kept chunks alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import minichunk as mc
from minichunk.batch import prepare
from minichunk.chunks import cut
from minichunk.memory.cache import LayerCache
from minichunk.memory.layer_memory import LayerMemories
from minichunk.memory.window import FULL, Pattern
from minichunk.protocol import Options
from minichunk.seco import fill, new_memory, rebuild
from tutorials.concatenating import Concatenating

from .rounding import exactly, outcome
from .strategies import build, tiny, tiny_state, with_adapter


def saved_bytes_per_chunk(model: Any, length: int, chunk_size: int) -> list[int]:
    """Bytes that autograd saves in the rebuild of each chunk, first chunk first, without parameters and batch."""
    ids = torch.randint(23, (1, length))
    batch, options = prepare(model, ids, ids, None), Options()
    chunks = cut(length, chunk_size)
    memory = new_memory(model, ids, chunks, options)
    fill(model, ids, chunks[:-1], memory, options)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *batch) if isinstance(p, torch.Tensor)}
    totals = []
    for chunk in chunks:
        storages: dict[int, int] = {}

        def pack(x: Tensor, storages: dict[int, int] = storages) -> Tensor:
            if x.untyped_storage().data_ptr() not in own:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            # The graph stays alive until the count is done, so that no address is used twice.
            graph = rebuild(model, batch, chunk, memory, options)
        totals.append(sum(storages.values()))
        del graph
    return totals


def test_saved_bytes_do_not_grow_with_the_past() -> None:
    model = build(tiny(), seed=0)
    totals = saved_bytes_per_chunk(model, length=64, chunk_size=8)
    assert totals[0] > 0
    # The merge with a past is the only difference, and it saves nothing. (The last token has no target.)
    assert {*totals[:-1]} == {totals[0]}
    assert saved_bytes_per_chunk(model, length=128, chunk_size=8)[-2:] == totals[-2:]


def test_a_concatenated_past_would_be_noticed() -> None:
    totals = saved_bytes_per_chunk(Concatenating(build(tiny(), seed=0)), length=64, chunk_size=8)
    assert totals == sorted(set(totals))  # every chunk saves more than the one before


@pytest.mark.parametrize(("kept", "rows"), [([0, 1, 2, 3, 4], 12), ([1, 3], 3), ([0, 1, 4], 6), ([4], 0), ([2], 0)])
def test_gradient_space_for_kept_chunks_alone(kept: list[int], rows: int) -> None:
    """Every kept chunk but the last, which nothing is sent back to; keys up to the last kept one."""
    seen: list[LayerMemories] = []
    model = build(tiny(), seed=0)
    ids = torch.randint(23, (1, 14))
    entries = [mc.Weight(1, 1) if i in kept else None for i in range(5)]
    original = LayerMemories.__init__

    def spy(self: LayerMemories, *arguments: object, **keywords: object) -> None:
        original(self, *arguments, **keywords)  # type: ignore[arg-type]
        seen.append(self)

    with mock.patch.object(LayerMemories, "__init__", spy):
        mc.spaco(model, ids, ids, 3, sampler=lambda *_: entries)
    for layer in seen[0].layers:
        remembered, sums = layer.tensors()
        assert {x.shape[2] for x in remembered} == {0, 3 * kept[-1]}
        assert {x.shape[2] for x in sums} == {rows}


def test_the_fill_does_only_what_the_cache_needs() -> None:
    """Not the last kept chunk, not the LM head, not the last layer beyond its keys and values."""
    model = build(tiny(layers=3), seed=0)
    ids = torch.randint(23, (1, 15))
    calls: list[tuple[str, int]] = []

    def note(name: str) -> object:
        return lambda module, inputs, _: None if torch.is_grad_enabled() else calls.append((name, inputs[0].shape[1]))

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.k_proj.register_forward_hook(note(f"k{i}"))
        layer.self_attn.o_proj.register_forward_hook(note(f"o{i}"))
    model.model.norm.register_forward_hook(note("norm"))
    entries = [None, mc.Weight(1, 1), None, mc.Weight(1, 1), None]
    mc.spaco(model, ids, ids, 3, sampler=lambda *_: entries, fill_size=7)
    assert calls == [(name, n) for n in (6, 3) for name in ("k0", "o0", "k1", "o1", "k2")]


def with_pattern(pattern: Pattern) -> mc.Llama:
    model: mc.Llama = build(tiny(), seed=0)
    for layer in model.layers:
        layer.self_attn.pattern = pattern
    return model


@pytest.mark.parametrize("pattern", [FULL, mc.Window(2, 1)])
def test_no_gradient_is_sent_to_a_past_that_needs_none(pattern: Pattern) -> None:
    """With LoRA on q alone, the first layer's keys and values do not depend on a trained parameter."""
    model = with_adapter(with_pattern(pattern), targets=["q_proj"])
    ids = torch.randint(23, (1, 12))
    layers: list[int] = []
    original = LayerCache.add_grads
    with mock.patch.object(LayerCache, "add_grads", lambda self, *a: layers.append(id(self)) or original(self, *a)):
        mc.seco(model, ids, ids, 4)
    assert len(set(layers)) == 1  # the second layer's


@pytest.mark.parametrize("pattern", [FULL, mc.Window(5, 2)])
def test_the_textbook_baseline_computes_the_same(pattern: Pattern) -> None:
    model, ids = with_pattern(pattern), torch.randint(23, (2, 14))
    kept = [None, mc.Weight(2, 3), None, mc.Weight(4, 5), mc.Weight(1, 1)]
    exact = exactly(model, lambda: mc.spaco(Concatenating(model), ids, ids, 3, sampler=lambda *_: kept))
    exact.check(outcome(model, lambda: mc.spaco(model, ids, ids, 3, sampler=lambda *_: kept)))


KINDS: dict[str, Callable[[], Any]] = {
    "full": lambda: with_pattern(FULL),
    "window": lambda: with_pattern(mc.Window(2, 1)),
    "strided": lambda: with_pattern(mc.Strided(2, 2, 2)),
    "state": lambda: build(tiny_state(), seed=0),
    "textbook": lambda: Concatenating(with_pattern(FULL)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_handed_over_once(kind: str) -> None:
    """A second call would give other numbers (a state's adjoint goes on twice, a window's sums are gone): it raises."""
    options, model, ids, chunks = Options(), KINDS[kind](), torch.randint(23, (1, 9)), cut(9, 3)
    batch, memory = prepare(model, ids, ids, None), new_memory(model, ids, chunks, options)
    fill(model, ids, chunks[:-1], memory, options)
    for chunk in reversed(chunks):
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        torch.autograd.backward([loss, *written], [None, *received])
        with pytest.raises(RuntimeError, match="has been handed its gradients already"):
            memory.hand_over(chunk)
