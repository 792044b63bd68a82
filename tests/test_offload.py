"""The cache in host memory computes what the one on the device computes, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minichunk as mc
from minichunk.chunks import Chunk, cut
from minichunk.costs.forecast import forecast
from minichunk.costs.setting import Setting
from minichunk.memory import offload
from minichunk.memory.window import FULL
from minichunk.samplers import Weight

from .fake_cuda import Race, delayed, fake_cuda
from .gradients import oracle
from .rounding import exactly, outcome
from .strategies import Batch, batches, blocks_of, build, cache_of, examples, models, tiny

WEIGHTS = st.none() | st.builds(Weight, st.floats(-3, 3), st.floats(-3, 3))


@examples(40)
@given(
    model=models(lora=False),
    batch=batches(),
    chunk_size=st.integers(1, 6),
    block=st.integers(1, 6),
    entries=st.lists(WEIGHTS, min_size=14, max_size=14),
)
def test_a_spaco_draw_equals_the_oracle(
    model: mc.Llama, batch: Batch, chunk_size: int, block: int, entries: Sequence[Weight | None]
) -> None:
    chunks = cut(batch.input_ids.shape[1], chunk_size)
    entries = entries[: len(chunks)]
    exact = exactly(model, lambda: oracle(model, batch.input_ids, batch.labels, chunks, entries))
    keywords = {"sampler": lambda *_: entries, "offload": True}
    with blocks_of(block):
        exact.check(outcome(model, lambda: mc.spaco(model, batch.input_ids, batch.labels, chunk_size, **keywords)))


def test_host_memory_holds_keys_values_and_the_kept_gradients_only() -> None:
    like, receiving = torch.zeros(1, dtype=torch.bfloat16), [Chunk(0, 100), Chunk(700, 800)]
    layer = cache_of(FULL, (1, 2, 5000, 4), receiving, like, offload=True, grad_dtype=torch.float32)
    cache, grads = layer.tensors()
    assert sum(x.numel() * x.element_size() for x in cache) == 5000 * 2 * 2 * 4 * 2
    assert sum(x.numel() * x.element_size() for x in grads) == 200 * 2 * 2 * 4 * 4


def test_an_8b_llama_with_128k_tokens_on_24_gib() -> None:
    """The device holds two blocks, whatever the length; the host 256 KiB per token."""
    found = forecast(Setting(cache_grad_dtype="bfloat16", offload=True))
    assert found.growth(131072) == (16, 256 * 1024)  # ids and targets
    assert found.longest(23 * 2**30, 40 * 2**30) >= 128_000
    assert found.longest(23 * 2**30, 20 * 2**30) < 128_000
    assert found.at(131072).peak < 18 * 2**30


def step(method: str, model: mc.Llama, where: bool) -> None:
    """A step in which each layer's past comes in up to five blocks, and each kept chunk's gradients go back in two."""
    ids = torch.randint(23, (2, 22), generator=torch.Generator().manual_seed(0))
    if method == "seco":
        mc.seco(model, ids, ids, 6, recompute=True, offload=where)
    else:
        entries = [Weight(1.0, 1.0), None, Weight(2.0, 1.0), Weight(1.0, 3.0)]
        mc.spaco(model, ids, ids, 6, sampler=lambda *_: entries, offload=where)


@pytest.mark.parametrize("method", ["seco", "spaco"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_lanes_wait_for_one_another(method: str, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a second GPU: each copy into a buffer comes after its last reader, each read after the copy."""
    monkeypatch.setattr(offload, "BLOCK", 4)
    model = build(tiny(layers=3), seed=0)
    if lora:
        mc.add_lora(model, 2, 4, ["q_proj", "v_proj"])
    with fake_cuda("cuda:1") as order:
        step(method, model, True)
    streams = {stream.device for uses in order.uses.values() for stream in (uses.maker, *uses.read)}
    assert streams == {"cuda:1"}
    assert len({stream for uses in order.uses.values() for stream in (uses.written[0], *uses.read)}) == 3


WAITS = [
    ("wait", offload.FREE, "bring"),
    ("wait", offload.FILLED, "main"),
    ("wait", offload.FREE, "main"),
    ("wait", offload.FILLED, "send"),
]
MARKS = [
    ("mark", offload.FREE, "main"),
    ("mark", offload.FILLED, "bring"),
    ("mark", offload.FILLED, "main"),
    ("mark", offload.FREE, "send"),
]


@pytest.mark.parametrize(("call", "which", "lane"), WAITS + MARKS)
def test_no_wait_and_no_mark_is_too_much(call: str, which: int, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: without any one of them, two lanes race."""
    monkeypatch.setattr(offload, "BLOCK", 4)
    original = getattr(offload.Slot, call)

    def others_only(slot: offload.Slot, event: int, on: offload.Lane) -> None:
        if (event, on.name) != (which, lane):
            original(slot, event, on)

    monkeypatch.setattr(offload.Slot, call, others_only)
    with pytest.raises(Race), fake_cuda():
        step("seco", build(tiny(layers=3), seed=0), True)


@pytest.mark.parametrize(
    ("call", "lane"), [("follow", "bring"), ("follow", "main"), ("hold", "bring"), ("hold", "main")]
)
def test_lanes_that_do_not_follow_or_hold_are_found(call: str, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(offload.Lane, call)
    monkeypatch.setattr(offload.Lane, call, lambda on, other: None if on.name == lane else original(on, other))
    with pytest.raises(Race), fake_cuda():
        step("seco", build(tiny(layers=3), seed=0), True)


@pytest.mark.parametrize("lane", ["bring", "send", "main"])
def test_the_delays_of_the_gpu_test_reach_each_lane(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What test_gpu.py does with CUDA's lanes, with those of the CPU."""
    monkeypatch.setattr(offload, "BLOCK", 4)
    model, slept = build(tiny(layers=3), seed=0), list[str]()
    ids = torch.randint(23, (2, 22))
    exact = exactly(model, lambda: mc.full(model, ids, ids))
    with delayed(lane, lambda on: slept.append(on.name)):
        exact.check(outcome(model, lambda: mc.seco(model, ids, ids, 6, recompute=True, offload=True)))
    assert set(slept) == {lane}
    assert len(slept) > 3 * 3 * 2  # layers, chunks that look back, blocks


@pytest.mark.parametrize("call", ["mark", "wait"])
def test_a_stream_that_is_not_named_is_found(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA would take one of the current device, which is not the model's."""
    unnamed = {
        "mark": lambda slot, which, _: slot.events[which].record(),
        "wait": lambda slot, which, _: slot.events[which].wait(),
    }
    monkeypatch.setattr(offload.Slot, call, unnamed[call])
    with pytest.raises(Race), fake_cuda("cuda:1"):
        step("seco", build(tiny(layers=3), seed=0), True)
