"""The cache in host memory computes what the one on the device computes, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import minichunk as mc
from minichunk import offload
from minichunk.chunks import Chunk, cut
from minichunk.forecast import Setting, forecast
from minichunk.samplers import Weight

from .gradients import distance, oracle, take_gradients
from .rounding import exactly, outcome
from .strategies import Batch, batches, blocks_of, build, examples, models, tiny

WEIGHTS = st.none() | st.builds(Weight, st.floats(-3, 3), st.floats(-3, 3))


def shape_of_a_false_alarm() -> dict[str, object]:
    """Like the case in which a bound relative to the net gradient failed although nothing was wrong."""
    ids = torch.randint(23, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, 4:10] = -100
    entries = [None, None, None, *[Weight(1.0, 1.0)] * 11]  # of 4 chunks, only the last is kept
    return {"model": build(tiny(1), 0), "batch": Batch(ids, labels), "chunk_size": 3, "block": 4, "entries": entries}


@examples(60)
@given(
    model=models(lora=False),
    batch=batches(),
    chunk_size=st.integers(1, 6),
    block=st.integers(1, 6),
    entries=st.lists(WEIGHTS, min_size=14, max_size=14),
)
@example(**shape_of_a_false_alarm())
def test_a_spaco_draw_equals_the_oracle(
    model: mc.Llama, batch: Batch, chunk_size: int, block: int, entries: Sequence[Weight | None]
) -> None:
    chunks = cut(batch.input_ids.shape[1], chunk_size)
    entries = entries[: len(chunks)]
    exact = exactly(model, lambda: oracle(model, batch.input_ids, batch.labels, chunks, entries))
    keywords = {"sampler": lambda *_: entries, "offload": True}
    with blocks_of(block):
        exact.check(outcome(model, lambda: mc.spaco(model, batch.input_ids, batch.labels, chunk_size, **keywords)))


def test_half_precision_loses_no_more_than_on_the_device() -> None:
    """Many blocks are merged in float32: bfloat16 rounds the result once, as it does without blocks."""
    exact = build(tiny(hidden_size=32, head_dim=16, vocab_size=64), seed=0)
    ids = torch.randint(64, (1, 512), generator=torch.Generator().manual_seed(0))
    mc.full(exact, ids, ids)
    expected = take_gradients(exact)
    errors = []
    half = exact.to(torch.bfloat16)
    for where in (False, True):
        with blocks_of(16):
            mc.seco(half, ids, ids, 64, offload=where)
        got = take_gradients(half)
        errors.append(sum(float((got[n].double() - e).square().sum()) for n, e in expected.items()) ** 0.5)
    assert errors[1] <= 1.1 * errors[0]


def test_a_mistake_in_the_blocks_is_found() -> None:
    """A negative control: a block that is one position off."""
    model, ids = build(tiny(), seed=0), torch.randint(23, (1, 12), generator=torch.Generator().manual_seed(0))
    exact = exactly(model, lambda: mc.full(model, ids, ids))
    original = offload.OffloadedLayer.add_grads
    with pytest.MonkeyPatch.context() as patch, blocks_of(4):
        patch.setattr(
            offload.OffloadedLayer, "add_grads", lambda self, start, *grads: original(self, max(0, start - 1), *grads)
        )
        got = outcome(model, lambda: mc.seco(model, ids, ids, 3, offload=True))
    assert distance(got, exact.values) > 1e-2
    with pytest.raises(AssertionError, match="is off by"):
        exact.check(got)


def test_host_memory_holds_keys_values_and_the_kept_gradients_only() -> None:
    stage = offload.Stage((2, 1, 2, 4), torch.zeros(1, dtype=torch.bfloat16), torch.float32)
    layer = offload.OffloadedLayer(stage, 5000, [Chunk(0, 100), Chunk(700, 800)])
    cache, grads = layer.buffers()
    assert sum(x.numel() * x.element_size() for x in cache) == 5000 * 2 * 2 * 4 * 2
    assert sum(x.numel() * x.element_size() for x in grads) == 200 * 2 * 2 * 4 * 4


def test_an_8b_llama_with_128k_tokens_on_24_gib() -> None:
    """The device holds two blocks, whatever the length; the host 256 KiB per token."""
    found = forecast(Setting(cache_grad_dtype=torch.bfloat16, offload=True))
    assert found.per_token < 100  # ids and targets
    assert found.host_per_token == 256 * 1024
    assert found.longest(23 * 2**30, 512, host=40 * 2**30) >= 128_000
    assert found.longest(23 * 2**30, 512, host=20 * 2**30) < 128_000
    assert found.at(131072).peak < 18 * 2**30
