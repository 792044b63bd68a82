"""Rows that begin alike: what they share runs as one row, and nothing else changes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minichunk as mc
from minichunk.chunks import Chunk, cut, groups
from minichunk.memory.shared import SharedCache

from .gradients import oracle
from .rounding import exactly, outcome
from .strategies import (
    HOW,
    OBJECTIVES,
    PROJECTIONS,
    WEIGHTS,
    Drawn,
    blocks_of,
    build,
    examples,
    tiny,
    tiny_state,
    with_adapter,
)


def rows(alike: int, own: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, of which the first are the same in all rows, and labels of which some are left out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(23, (count, alike + own), generator=generator)
    ids[:, :alike] = ids[0, :alike].clone()
    labels = ids.where(torch.rand(ids.shape, generator=generator) < 0.7, -100)
    labels[:, -1] = ids[:, -1]
    return ids, labels


@examples(60)
@given(
    layers=st.integers(1, 3),
    tied=st.booleans(),
    adapter=st.none() | st.lists(st.sampled_from(PROJECTIONS), min_size=1, unique=True),
    sizes=st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(1, 4)).filter(lambda n: n[0] + n[1] > 1),
    chunk_size=st.integers(1, 7),
    fill_chunks=st.integers(1, 3),
    block=st.integers(1, 6),
    weights=st.none() | st.lists(WEIGHTS, min_size=16, max_size=16),
    how=HOW,
    objective=OBJECTIVES,
    seed=st.integers(0, 99),
)
def test_a_tree_of_chunks_equals_its_rows(
    layers: int, tied: bool, adapter: list[str] | None, sizes: tuple[int, int, int], chunk_size: int, fill_chunks: int,
    block: int, weights: Any, how: dict[str, Any], objective: Drawn | None, seed: int,
) -> None:  # fmt: skip
    """SeCO, or one draw of SpaCO with arbitrary factors; the oracle runs every row by itself."""
    model = build(tiny(layers, tie_word_embeddings=tied), seed)
    if adapter is not None:
        with_adapter(model, 2, 4, adapter)
    ids, labels = rows(*sizes, seed)
    B, T = ids.shape
    alike = (ids == ids[:1]).all(0).long().cumprod(0).sum()
    chunks = cut(T, chunk_size, int(alike) if B > 1 else 0)
    entries = [mc.Weight(1.0, 1.0)] * len(chunks) if weights is None else weights[: len(chunks)]
    told = {"objective": objective}
    exact = exactly(model, lambda: oracle(model, ids, labels, chunks, entries, **told))
    told |= {"share": True, "fill_size": fill_chunks * chunk_size, **how}
    with blocks_of(block):
        if weights is None:
            exact.check(outcome(model, lambda: mc.seco(model, ids, labels, chunk_size, **told)))
        else:
            draw = {"sampler": lambda *_: entries}
            exact.check(outcome(model, lambda: mc.spaco(model, ids, labels, chunk_size, **draw, **told)))


def test_cuts_and_passes_end_where_the_trunk_ends() -> None:
    assert cut(11, 4, 6) == [Chunk(0, 4), Chunk(4, 6), Chunk(6, 10), Chunk(10, 11)]
    assert cut(8, 4, 8) == cut(8, 4) and cut(8, 4, 4) == cut(8, 4)
    passes = groups(cut(22, 3, 10), 9, 10)
    assert [sum(stop - start for start, stop in group) for group in passes] == [9, 1, 9, 3]


def test_the_trunk_is_run_and_remembered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, labels) = build(tiny(), 1), rows(8, 4, 4, 1)
    ids[:, 8] = torch.arange(4)
    seen, memories, made = [], [], SharedCache.__init__
    for layer in model.layers:
        layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0]))
    monkeypatch.setattr(SharedCache, "__init__", lambda self, *a: memories.append(self) or made(self, *a))
    mc.seco(model, ids, labels, 4, share=True)
    assert sorted(seen) == [1] * 6 + [4] * 2  # a fill of two chunks, but the last layer's, and the rebuilds
    remembered = [sum(x.numel() for x in memory.tensors().remembered) for memory in memories]
    assert remembered == [8 * 2 * 2 * 4] * 2  # 8 positions, keys and values, 2 heads of 4


@pytest.mark.parametrize(
    ("model", "told", "words"),
    [
        (build(tiny_state("as"), 1), {}, "layer 1 has a state or sees a part of the past"),
        (build(tiny(sliding_window=3, layer_types=("sliding_attention", "full_attention")), 1), {}, "but layer 0 has"),
        (build(tiny(), 1), {"positions": torch.arange(9).repeat(2, 1)}, "not for positions of their own: leave it out"),
    ],
)
def test_what_it_does_not_do_is_refused(model: Any, told: dict[str, Any], words: str) -> None:
    ids, labels = rows(5, 4, 2, 3)
    with pytest.raises(mc.InputError, match=words):
        mc.seco(model, ids, labels, 4, share=True, **told)
