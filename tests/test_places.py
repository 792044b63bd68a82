"""What a layer that sees a part of its past remembers: enough for every chunk, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minichunk as mc
from minichunk.chunks import Chunk, cut
from minichunk.memory.cache import LayerCache
from minichunk.memory.offload import DeviceBlocks, OffloadedLayer
from minichunk.memory.pattern import FULL, Pattern, Strided, Window
from minichunk.memory.places import places
from minichunk.models.partial import partial_config
from minichunk.models.shapes import memory_bytes, shape
from minichunk.protocol import Options

from .strategies import blocks_of, build, examples, give_pattern, strided, tiny, windows

GIB = 2**30


def layer_of(pattern: Pattern, capacity: int, kept: Sequence[Chunk], offload: bool) -> LayerCache | OffloadedLayer:
    like = torch.zeros(1, dtype=torch.float64)
    if offload:
        return OffloadedLayer(DeviceBlocks((2, 1, 1, 1), like, torch.float64), capacity, kept, pattern)
    layer = LayerCache((1, 1, capacity, 1), kept, like, torch.float64, pattern)
    layer.keys.fill_(torch.nan)
    return layer


def positions(length: int, start: int = 0) -> torch.Tensor:
    """Keys that tell where they are, (1, 1, n, 1)."""
    return torch.arange(start, start + length, dtype=torch.float64)[None, None, :, None]


def check_reads(layer: LayerCache | OffloadedLayer, start: int, stop: int) -> None:
    """Whatever the queries from start to stop ask of the past is there, and is what was written."""
    for part in layer.pattern.parts(start, stop):
        low = part.start - part.reach
        near = [(at, keys.clone()) for at, keys, _ in layer.near(low, start)] if low < start else []
        assert [n for at, keys in near for n in range(at, at + keys.shape[2])] == list(range(low, start))
        for at, keys in near:
            assert torch.equal(keys, positions(keys.shape[2], at))
        pinned = [j for stretch in layer.pattern.pinned(0, start) for j in range(*stretch)][: part.pinned]
        found = [int(x) for _, keys, _ in layer.pinned(len(pinned), 3) for x in keys.flatten()]
        assert found == pinned


@examples(100)
@given(
    pattern=windows(12, 5) | strided() | st.just(FULL),
    length=st.integers(1, 60),
    chunk_size=st.integers(1, 20),
    fill=st.integers(1, 3),
    keep=st.lists(st.booleans(), min_size=60, max_size=60),
    offload=st.booleans(),
)
def test_every_chunk_finds_what_it_sees(
    pattern: Pattern, length: int, chunk_size: int, fill: int, keep: list[bool], offload: bool
) -> None:
    """While the memory is filled, in passes of several chunks, and when the kept ones are rebuilt, last to first."""
    chunks = cut(length, chunk_size)
    kept = [chunk for chunk, coin in zip(chunks, keep, strict=False) if coin] or chunks[-1:]
    capacity = kept[-1].start
    with blocks_of(4):
        layer = layer_of(pattern, capacity, kept[:-1], offload)
        before = [chunk for chunk in chunks if chunk < kept[-1]]
        for i in range(0, len(before), fill):
            group = before[i : i + fill]
            start, stop = group[0].start, group[-1].stop
            check_reads(layer, start, stop)
            layer.write(group, (positions(stop - start, start),) * 2)
        for chunk in reversed(kept):
            check_reads(layer, *chunk)


@examples(60)
@given(
    pattern=windows(12, 5) | strided(), chunk_size=st.integers(1, 20), count=st.integers(1, 9), offload=st.booleans()
)
def test_what_is_sent_is_received(pattern: Pattern, chunk_size: int, count: int, offload: bool) -> None:
    """Ones sent to all that chunks see of the past come to as many as there are chunks that see a position."""
    chunks = cut(chunk_size * count, chunk_size)
    with blocks_of(4):
        layer = layer_of(pattern, chunks[-1].start, chunks[:-1], offload)
        seen = torch.zeros(chunks[-1].stop)
        for chunk in reversed(chunks):
            if chunk != chunks[-1]:
                for received in layer.hand_over(chunk):
                    assert torch.equal(received[0, 0, :, 0], seen[chunk.start : chunk.stop].double())
            for part in pattern.parts(*chunk):
                low, pinned = part.start - part.reach, pattern.pinned_before(chunk.start)
                if low < chunk.start:
                    layer.add_near_grads(low, *(torch.ones(1, 1, chunk.start - low, 1, dtype=torch.float64),) * 2)
                    seen[low : chunk.start] += 1
                if n := min(part.pinned, pinned):
                    layer.add_pinned_grads(0, *(torch.ones(1, 1, n, 1, dtype=torch.float64),) * 2)
                    rows = [j for stretch in pattern.pinned(0, chunk.start) for j in range(*stretch)]
                    seen[rows[:n]] += 1


@pytest.mark.parametrize(("chunk_size", "most", "rows"), [(4, 2, 4), (8, 1, 5)])
def test_gradients_of_the_reach_come_late_and_go_when_they_are_received(chunk_size: int, most: int, rows: int) -> None:
    """There are never more than those of the chunks that a reach of 5 touches, and of its positions in them."""
    model = build(tiny(3, sliding_window=6, layer_types=("sliding_attention",) * 3), seed=2)
    give_pattern(model, Window(6, 2))
    ids = torch.randint(23, (1, 40), generator=torch.Generator().manual_seed(0))
    alive: list[int] = []
    layers: set[LayerCache] = set()
    original = LayerCache.add_near_grads

    def spy(self: LayerCache, position: int, key_grads: torch.Tensor, value_grads: torch.Tensor) -> None:
        original(self, position, key_grads, value_grads)
        alive.append(len(self.near_grads))
        layers.add(self)
        assert all(x.shape[2] <= rows for pair in self.near_grads.values() for x in pair)

    with mock.patch.object(LayerCache, "add_near_grads", spy):
        mc.seco(model, ids, ids, chunk_size)
    assert max(alive) == most
    assert len(layers) == 3
    assert not any(layer.near_grads for layer in layers)


@pytest.mark.parametrize(
    ("pattern", "remembered", "trained"),
    [
        (FULL, 16.0, {512: 31.875, 2048: 31.5, 8192: 30.0}),
        (Window(1024, 64), 6.08, {512: 21.92, 2048: 16.74, 8192: 12.43}),
        (Strided(64, 16, 16), 6.70, {512: 23.16, 2048: 17.97, 8192: 13.59}),
    ],
)
def test_an_8b_llama_of_128k_tokens(pattern: Pattern, remembered: float, trained: dict[int, float]) -> None:
    """GiB of keys and values in inference; and with gradients, in bfloat16, in training, by the chunk."""
    config, T = shape("llama-3-8b"), 131072
    config = config if pattern == FULL else partial_config(config, pattern)
    in_bfloat16 = Options(cache_grad_dtype=torch.bfloat16)
    assert memory_bytes(config, torch.bfloat16, [Chunk(T, T)])[0] / GIB == pytest.approx(remembered, abs=0.01)
    for chunk_size, expected in trained.items():
        found = memory_bytes(config, torch.bfloat16, cut(T, chunk_size), in_bfloat16)
        assert sum(found) / GIB == pytest.approx(expected, abs=0.01)
        offloaded = memory_bytes(config, torch.bfloat16, cut(T, chunk_size), Options(None, False, torch.bfloat16, True))
        assert offloaded[0] == found[0]  # the host has no more either


def test_no_more_rows_than_positions_and_pinned_ones() -> None:
    """Chunks shorter than the reach ask for all of the past: it is there once, and no ring."""
    kept = tuple(cut(64, 4)[:-1])
    found = places(Window(20, 3), 60, kept)
    assert (found.rows, found.ring) == (60, 0)
    assert places(Window(20, 3), 60, ()).rows == 3 + 19
    assert places(FULL, 60, ()).rows == places(FULL, 60, kept).rows == 60
