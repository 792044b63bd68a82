"""Several documents in a row, and rows that begin alike: nothing changes but what is run at once."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import minichunk as mc
from minichunk.batch import IGNORE, shift
from minichunk.chunks import Chunk, Documents, cut

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
    models,
    state_models,
    tiny,
    tiny_state,
    with_adapter,
)

Weights = Sequence[mc.Weight | None] | None  # None: SeCO


def each_by_itself(
    model: Any, texts: Sequence[tuple[Tensor, Tensor]], places: Sequence[list[int]], chunks: Sequence[Chunk],
    weights: Weights, objective: Drawn | None, shape: tuple[int, int],
) -> Tensor:  # fmt: skip
    """The oracle of each text, int64 (1, T), whose tokens are at these places of the row that is cut into chunks.

    shape: of the log-probabilities that the objective is given, which the texts' fill up one after the other.
    """
    entries = [mc.Weight(1.0, 1.0)] * len(chunks) if weights is None else weights[: len(chunks)]
    count = sum(int((shift(labels) != IGNORE).sum()) for _, labels in texts)
    factors: Sequence[Tensor | None] = [None] * len(texts)
    total = torch.zeros(())
    if objective is not None:
        losses = [F.cross_entropy(model(ids)[0, :-1], labels[0, 1:], reduction="none") for ids, labels in texts]
        leaf = torch.cat([F.pad(-x.detach(), (1, 0)) for x in losses]).requires_grad_()
        total = objective(leaf.view(shape))
        factors = torch.autograd.grad(total, leaf)[0].split([ids.shape[1] for ids, _ in texts])
    for (ids, labels), at, factor in zip(texts, places, factors, strict=True):
        if not (shift(labels) != IGNORE).any():
            continue
        of = [next(j for j, chunk in enumerate(chunks) if place < chunk.stop) for place in at]
        parts = [(j, len([*run])) for j, run in groupby(of)]
        edges = [sum(length for _, length in parts[:i]) for i in range(len(parts) + 1)]
        told: Any = {"num_targets": count} if factor is None else {"objective": lambda x, f=factor: (f * x).nansum()}
        found = oracle(model, ids, labels, [Chunk(*e) for e in pairwise(edges)], [entries[j] for j, _ in parts], **told)
        total = total.detach() + (found if factor is None else 0)
    return total.detach()


def run(model: Any, ids: Tensor, labels: Tensor, size: int, weights: Weights, **told: Any) -> Tensor:
    if weights is None:
        return mc.seco(model, ids, labels, size, **told)
    return mc.spaco(model, ids, labels, size, sampler=lambda count, _: weights[:count], **told)


@examples(100)
@given(
    model=(models() | state_models()).filter(lambda model: model.masks is None),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6).filter(lambda lengths: max(lengths) > 1),
    size=st.integers(1, 12), fill_chunks=st.integers(1, 3), block=st.integers(1, 6),
    weights=st.none() | st.lists(WEIGHTS, min_size=54, max_size=54), how=HOW, objective=OBJECTIVES,
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_packed_row_equals_its_documents(
    model: Any, lengths: list[int], size: int, fill_chunks: int, block: int, weights: Weights, how: dict[str, Any],
    objective: Drawn | None, seed: int,
) -> None:  # fmt: skip
    """SeCO, or one draw of SpaCO with arbitrary factors; layers with windows, in blocks, with states."""
    generator, T = torch.Generator().manual_seed(seed), sum(lengths)
    ids = torch.randint(23, (1, T), generator=generator)
    labels = ids.where(torch.rand(ids.shape, generator=generator) < 0.8, IGNORE)
    longest = lengths.index(max(lengths))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    labels[0, starts[longest] + 1] = 3
    told = {"objective": objective, "starts": starts, "fill_size": fill_chunks * size, **how}
    rope = getattr(model.config, "rope_scaling", None)
    if rope is not None and rope.rope_type in ("dynamic", "longrope"):
        with pytest.raises(mc.InputError, match="give each document a row of its own"):
            mc.seco(model, ids, labels, size, starts=starts)
        return
    texts = [*zip(ids.split(lengths, 1), labels.split(lengths, 1), strict=True)]
    places = [[*range(begin, begin + length)] for begin, length in zip(starts, lengths, strict=True)]
    chunks = cut(T, size, Documents(tuple(starts)))
    exact = exactly(model, lambda: each_by_itself(model, texts, places, chunks, weights, objective, (1, T)))
    with blocks_of(block):
        exact.check(outcome(model, lambda: run(model, ids, labels, size, weights, **told)))
    if weights is None and objective is None:
        exact.check(outcome(model, lambda: mc.full(model, ids, labels, starts=torch.tensor(starts))))


def rows(alike: int, own: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens, of which the first are the same in all rows, and labels of which some are left out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(23, (count, alike + own), generator=generator)
    ids[:, :alike] = ids[0, :alike].clone()
    labels = ids.where(torch.rand(ids.shape, generator=generator) < 0.7, IGNORE)
    labels[0, -1] = ids[0, -1]
    return ids, labels


def in_one_row(ids: Tensor, labels: Tensor, size: int) -> tuple[list[list[int]], list[Chunk]]:
    """Where the tokens of rows that share what they can are in the one row, and its chunks. Token by token."""
    if len(ids) == 1:
        return [[*range(ids.shape[1])]], cut(ids.shape[1], size)
    targets, S = shift(labels).tolist(), 0
    while ids.shape[1] > S and len({*ids[:, S].tolist()}) == 1 and len({x[S] for x in targets} - {IGNORE}) <= 1:
        S += 1
    places, starts, end = [], [0] * (S > 0), S
    for row in targets:
        last = max([t + 1 for t, target in enumerate(row) if target != IGNORE], default=0)
        starts += [end] * (last > S)
        places.append([t if t < S else end + t - S for t in range(len(row))])  # a place too far has no target
        end += max(0, last - S)
    chunks = cut(end, size, Documents(tuple(starts), S))
    return [[min(place, end - 1) for place in row] for row in places], chunks


@examples(60)
@given(
    layers=st.integers(1, 3), tied=st.booleans(),
    adapter=st.none() | st.lists(st.sampled_from(PROJECTIONS), min_size=1, unique=True),
    sizes=st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(1, 4)).filter(lambda n: n[0] + n[1] > 1),
    size=st.integers(1, 9), fill_chunks=st.integers(1, 3), block=st.integers(1, 6),
    weights=st.none() | st.lists(WEIGHTS, min_size=60, max_size=60), how=HOW, objective=OBJECTIVES,
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_tree_of_chunks_equals_its_rows(
    layers: int, tied: bool, adapter: list[str] | None, sizes: tuple[int, int, int], size: int, fill_chunks: int,
    block: int, weights: Weights, how: dict[str, Any], objective: Drawn | None, seed: int,
) -> None:  # fmt: skip
    model = build(tiny(layers, tie_word_embeddings=tied), seed)
    if adapter is not None:
        with_adapter(model, 2, 4, adapter)
    ids, labels = rows(*sizes, seed)
    places, chunks = in_one_row(ids, labels, size)
    texts = [*zip(ids.split(1), labels.split(1), strict=True)]
    exact = exactly(model, lambda: each_by_itself(model, texts, places, chunks, weights, objective, tuple(ids.shape)))
    told = {"objective": objective, "share": True, "fill_size": fill_chunks * size, **how}
    with blocks_of(block):
        exact.check(outcome(model, lambda: run(model, ids, labels, size, weights, **told)))


def test_what_fits_is_not_cut_and_what_nobody_sees_is_neither_filled_nor_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = cut(20, 6, Documents((0, 4, 9, 10)))
    assert packed == [Chunk(0, 4), Chunk(4, 10), Chunk(10, 16), Chunk(16, 20)]
    assert cut(11, 4, Documents((0, 6, 8), 6)) == [Chunk(0, 4), Chunk(4, 6), Chunk(6, 8), Chunk(8, 11)]
    filled, room = [], []
    for name, seen in (("fill", filled), ("new_memory", room)):
        made = getattr(mc.Llama, name)
        monkeypatch.setattr(mc.Llama, name, lambda *a, f=made, seen=seen: seen.append((a, f(*a))) or seen[-1][1])
    ids = torch.randint(23, (1, 20))
    assert mc.seco(build(tiny(), 1), ids.view(2, 10), ids.view(2, 10) * 0 - 100, 6, num_targets=1, share=True) == 0
    filled.clear(), room.clear()
    mc.seco(build(tiny(), 1), ids, ids, 6, starts=(0, 4, 9, 10))
    assert [arguments[3] for arguments, _ in filled] == [[Chunk(10, 16)]]
    assert [x.shape[2] for x in room[0][1].layers[0].tensors().remembered[:2]] == [6, 6]  # of the long one


@pytest.mark.parametrize(
    ("model", "told", "words"),
    [
        (tiny_state("as"), {"share": True}, "share is for full attention, but a layer has a state"),
        (tiny(sliding_window=3, layer_types=("sliding_attention",) * 2), {"share": True}, "a layer sees a part of the"),
        (tiny(), {"share": True, "chunk_loss": lambda hidden, _: hidden.sum()}, "chunk_loss is given"),
        (tiny(), {"starts": [0, 3]}, r"starts is \[0, 3\], but must go up from 0, within a single row"),
    ],
)
def test_what_it_does_not_do_is_refused(model: Any, told: dict[str, Any], words: str) -> None:
    ids, labels = rows(5, 4, 2, 3)
    model = build(model, 1)
    with pytest.raises(mc.InputError, match=words):
        mc.seco(model, ids, labels, 4, **told)
    for starts in ([1, 3], [0, 0], [0, 9]):
        with pytest.raises(mc.InputError, match="must go up from 0"):
            mc.seco(model, ids[:1], labels[:1], 4, starts=starts)
