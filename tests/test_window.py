"""Layers that see a part of the past: what they remember, read and send, and mistakes that must be seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import minichunk as mc
from minichunk.chunks import ONE, Chunk, cut
from minichunk.memory import attention, kernels
from minichunk.memory.attention import Past
from minichunk.memory.cache import LayerCache
from minichunk.memory.window import FULL, Pattern, Strided, Window, runs
from minichunk.models.partial import partial_config
from minichunk.models.shapes import layer_memory_bytes, shape
from minichunk.protocol import Options

from .gradients import Tensors, distance, oracle
from .rounding import exactly, measure, outcome
from .strategies import blocks_of, build, examples, give_pattern, strided, tiny, windows

KINDS = ("sliding_attention", "full_attention", "sliding_attention")
IDS = torch.randint(23, (2, 20), generator=torch.Generator().manual_seed(0))


def windowed(sinks: int = 2) -> mc.Llama:
    model = build(tiny(3, sliding_window=5, layer_types=KINDS), seed=2)
    give_pattern(model, Window(5, sinks))
    return model


def layer_of(pattern: Pattern, capacity: int, receiving: Sequence[Chunk]) -> LayerCache:
    like = torch.zeros(1, dtype=torch.float64)
    layer = LayerCache((1, 1, capacity, 1), receiving, like, torch.float64, pattern)
    for x in layer.tensors().remembered:
        x.fill_(torch.nan)
    return layer


def positions(length: int, start: int = 0) -> torch.Tensor:
    """Keys that tell where they are, (1, 1, n, 1)."""
    return torch.arange(start, start + length, dtype=torch.float64)[None, None, :, None]


def seen_spans(pattern: Pattern, start: int, stop: int) -> list[tuple[int, int]]:
    """What the queries of a chunk ask of the past: the band before it, and the pinned positions before that."""
    *_, last = found = [run for run, _ in runs(pattern, ONE, start, stop, attention.TILE)]
    bands = [(run.low, start) for run in found[:1] if run.low < start]
    return bands + pattern.pinned(0, min(start, last.low))


@examples(100)
@given(
    pattern=windows(12, 5) | strided(), length=st.integers(1, 60), chunk_size=st.integers(1, 20),
    fill=st.integers(1, 3), coins=st.lists(st.booleans(), min_size=60, max_size=60),
)  # fmt: skip
def test_every_chunk_finds_what_it_sees(
    pattern: Pattern, length: int, chunk_size: int, fill: int, coins: list[bool]
) -> None:
    """While the memory is filled, in passes of several chunks, and when kept chunks are rebuilt, last to first."""
    chunks = cut(length, chunk_size)
    kept = [chunk for chunk, coin in zip(chunks, coins, strict=False) if coin] or chunks[-1:]
    with blocks_of(4):
        layer = layer_of(pattern, kept[-1].start, kept[:-1])

        def check_reads(start: int, stop: int) -> None:
            for span in seen_spans(pattern, start, stop):
                found = [j for *_, (keys, _) in layer.pieces(*span) for j in keys.flatten().tolist()]
                assert found == [float(j) for j in range(*span)]

        before = [chunk for chunk in chunks if chunk < kept[-1]]
        for i in range(0, len(before), fill):
            group = before[i : i + fill]
            start, stop = group[0].start, group[-1].stop
            check_reads(start, stop)
            layer.write(group, (positions(stop - start, start),) * 2)
        for chunk in reversed(kept):
            check_reads(*chunk)


@examples(60)
@given(pattern=windows(12, 5) | strided() | st.just(FULL), chunk_size=st.integers(1, 20), count=st.integers(1, 9))
def test_what_is_sent_is_handed_over(pattern: Pattern, chunk_size: int, count: int) -> None:
    """Ones sent to all that chunks see of the past come to as many as there are chunks that see a position."""
    chunks = cut(chunk_size * count, chunk_size)
    with blocks_of(4):
        layer = layer_of(pattern, chunks[-1].start, chunks[:-1])
        sent = torch.zeros(chunks[-1].stop)
        for chunk in reversed(chunks):
            if chunk != chunks[-1]:
                for grads in layer.hand_over(chunk):
                    assert torch.equal(grads[0, 0, :, 0], sent[chunk.start : chunk.stop].double())
            for start, stop in seen_spans(pattern, *chunk):
                layer.add_grads(start, *(torch.ones(1, 1, stop - start, 1, dtype=torch.float64),) * 2)
                sent[start:stop] += 1


@pytest.mark.parametrize(("chunk_size", "most", "rows"), [(4, 2, 4), (8, 1, 5)])
def test_gradients_come_late_and_go_when_they_are_handed_over(chunk_size: int, most: int, rows: int) -> None:
    """There are never more than those of the chunks that a reach of 5 touches, and of its positions in them."""
    model = build(tiny(3, sliding_window=6, layer_types=("sliding_attention",) * 3), seed=2)
    give_pattern(model, Window(6, 2))
    ids = torch.randint(23, (1, 40), generator=torch.Generator().manual_seed(0))
    alive: list[int] = []
    layers: set[LayerCache] = set()
    original = LayerCache.add_grads

    def spy(self: LayerCache, *arguments: Any) -> None:
        original(self, *arguments)
        layers.add(self)
        alive.append(len(self.sums))
        assert all(sums.pair[0].shape[2] <= rows for sums in self.sums.values())

    with mock.patch.object(LayerCache, "add_grads", spy):
        mc.seco(model, ids, ids, chunk_size)
    assert max(alive) == most
    assert len(layers) == 3
    assert not any(layer.sums for layer in layers)


@pytest.mark.parametrize(
    ("pattern", "gib"),
    [
        (FULL, [16.0, 31.875, 31.5, 30.0]),
        (Window(1024, 64), [6.08, 21.92, 16.74, 12.43]),
        (Strided(64, 16, 16), [6.70, 22.54, 17.66, 13.53]),
    ],
)
def test_an_8b_llama_of_128k_tokens(pattern: Pattern, gib: list[float]) -> None:
    """Keys and values in inference; and with gradients, in bfloat16, in training, by the chunk."""
    config, T, options = shape("llama-3-8b"), 131072, Options(cache_grad_dtype=torch.bfloat16)
    config = config if pattern == FULL else partial_config(config, pattern)
    for kept, expected in zip(([Chunk(T, T)], *(cut(T, size) for size in (512, 2048, 8192))), gib, strict=True):
        remembered, sums = torch.tensor(layer_memory_bytes(config, torch.bfloat16, kept, options)).sum(0).tolist()
        assert (remembered + sums) / 2**30 == pytest.approx(expected, abs=0.01)


def test_no_more_rows_than_positions_and_pinned_ones() -> None:
    """Chunks shorter than the reach ask for all of the past: it is there once, and the last ones not once more."""
    kept = cut(64, 4)[:-1]
    assert layer_of(Window(20, 3), 60, kept).tensors().bytes()[0] == 16 * 60
    assert layer_of(Window(20, 3), 60, []).tensors().bytes()[0] == 16 * (3 + 19)


def a_window_too_wide(patch: pytest.MonkeyPatch) -> None:
    original = Window.run
    patch.setattr(Window, "run", lambda self, *a: original(replace(self, window=self.window and self.window + 1), *a))


def a_mask_off_by_one(patch: pytest.MonkeyPatch) -> None:
    original = kernels.visible
    patch.setattr(kernels, "visible", lambda *a: original(*a).roll(1, -1))


def sinks_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = Past.seen
    patch.setattr(Past, "seen", lambda self, *a: (*original(self, *a)[:3], []))


def sinks_seen_by_all_queries(patch: pytest.MonkeyPatch) -> None:
    """Also by those at the chunk's start that have them in their band."""
    original = Past.seen
    patch.setattr(Past, "seen", lambda *a: (*original(*a)[:3], [(slice(None), spans) for _, spans in original(*a)[3]]))


MISTAKES = [a_window_too_wide, a_mask_off_by_one, sinks_forgotten, sinks_seen_by_all_queries]


@pytest.mark.parametrize("break_it", [None, *MISTAKES])
def test_negative_controls(break_it: Callable[[pytest.MonkeyPatch], None] | None) -> None:
    """Each of these makes SpaCO differ from the oracle, by far; without one it does not."""
    model = windowed()
    chunks, entries = cut(20, 8), [mc.Weight(0.7, 2.0), mc.Weight(1.5, 0.5), mc.Weight(2.0, 3.0)]
    exact = exactly(model, lambda: oracle(model, IDS, IDS, chunks, entries))
    with pytest.MonkeyPatch.context() as patch, blocks_of(3):
        if break_it is not None:
            break_it(patch)
        got = outcome(model, lambda: mc.spaco(model, IDS, IDS, 8, sampler=lambda *_: entries))
    if break_it is None:
        exact.check(got)
    else:
        assert distance(got, exact.values) > 1e-3
        with pytest.raises(AssertionError, match="is off by"):
            exact.check(got)


@pytest.mark.parametrize("pattern", [Window(100, 3), Strided(16, 3, 4)])
def test_many_queries_in_tiles_of_their_real_size(pattern: Pattern) -> None:
    """Whole tiles, several calls of the kernel, and a rest."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 700, 8, dtype=torch.float64, generator=generator) for h in (4, 2, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    past = LayerCache((1, 2, 0, 8), [], q.detach(), q.dtype, pattern).past([Chunk(0, 700)], save=False)

    def tensors(out: torch.Tensor) -> Tensors:
        grads = torch.autograd.grad(out.square().sum(), leaves)
        return dict(zip(("out", "dq", "dk", "dv"), [out, *grads], strict=True))

    mask = pattern.mask(700)
    exact = measure(lambda: tensors(F.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)))
    exact.check(tensors(past.attend(*leaves)))
