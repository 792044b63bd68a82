"""Several ranks find what one process finds, bit for bit: they add the same numbers in the same order."""

from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minichunk as mc
from minichunk.pipeline.links import MOST_ON_THE_WAY
from minichunk.pipeline.stage import split_costs

from . import ranks as tasks
from .ranks import Case, Ranks
from .strategies import OBJECTIVES, batches, build, examples, models, state_models, tiny, tiny_state, with_adapter

PICTURE = tasks.tutorial("pipeline_picture")


def case(model: Any, length: int = 11, chunk_size: int = 3, rows: int = 2, **others: Any) -> Case:
    ids = torch.randint(23, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, :4] = ids[0, :4].clone()
    return Case(model, ids, ids, chunk_size, **others)


def check(ranks: Ranks, number: int, case: Case, task: Any = tasks.in_several) -> None:
    """Each parameter is on one rank, a tied one on two, with the bits of one process; every rank knows the loss."""
    answers = ranks.ask(number, task, case)
    expected = answers[0][1]
    left = set(expected) - {"loss"}
    for rank, (got, _) in enumerate(answers):
        for name, tensor in got.items():
            assert torch.equal(tensor, expected[name]), f"{name} differs on rank {rank}"
        names = set(got) - {"loss"}
        assert names <= left, "a parameter is on two ranks"
        left -= names
    assert not left, f"on no rank: {left}"


@st.composite
def cases(draw: st.DrawFn, number: int) -> Case:
    """Of all options, on at least as many layers as ranks."""
    kinds = st.one_of(models(), models(), state_models())
    model = draw(kinds.filter(lambda model: len(model.layers) >= number))
    batch = draw(batches(positions=model.takes_positions))
    chunk_size = draw(st.integers(1, 16))
    layers = len(model.layers)
    cuts = draw(st.none() | st.sets(st.integers(1, layers - 1), min_size=number - 1, max_size=number - 1))
    ends = [0, *sorted(cuts), layers] if cuts is not None else []
    options: dict[str, Any] = {
        "fill_size": draw(st.none() | st.integers(chunk_size, 20)),
        **draw(st.builds(dict, num_targets=st.none() | st.just(7.0)) | st.builds(dict, objective=OBJECTIVES)),
        "recompute": draw(st.booleans()), "cache_grad_dtype": draw(st.none() | st.just(torch.float32)),
        "positions": batch.positions,
    }  # fmt: skip
    method = draw(st.sampled_from(["seco", "spaco"]))
    if method == "spaco":
        options["sampler"] = draw(st.sampled_from([mc.Bernoulli(0.6), mc.FixedBudget(2), mc.PaperBudget(3, cap=2)]))
    counts = [stop - start for start, stop in pairwise(ends)] or None
    seed, steps = draw(st.integers(0, 2**31)), draw(st.integers(1, 2))
    return Case(model, batch.input_ids, batch.labels, chunk_size, method, options, counts, seed, steps)


@examples(18)
@given(st.data())
def test_several_ranks_find_what_one_process_finds(ranks: Ranks, data: st.DataObject) -> None:
    number = data.draw(st.sampled_from([2, 3]))
    check(ranks, number, data.draw(cases(number)))


def adapted(config: Any, targets: list[str], dropout: float = 0.0) -> Any:
    """With an adapter in all layers but the one at index 1."""
    model = with_adapter(build(config, 0), 2, 4, targets, dropout)
    model.layers[1].requires_grad_(False)
    return model


MAMBA = mc.Mamba2Config(23, 8, 3, 3, num_heads=4, head_dim=4, n_groups=2, eos_token_id=None)
TIED = tiny_state("sasas", tie_word_embeddings=True)
SELDOM = [  # drawn by `cases`
    *((4, case(build(tiny(4), 0), 11, size, options={"recompute": size == 2})) for size in (2, 6, 11)),  # 6 to 1 chunks
    *((4, case(build(TIED, 0), 11, size, steps=2)) for size in (2, 6, 11)),  # whose gradients add up
    (3, case(build(MAMBA, 0), method="spaco", options={"sampler": mc.FixedBudget(3)})),
    (3, case(adapted(tiny(3), ["q_proj", "down_proj"], 0.5), method="spaco", options={"sampler": mc.Bernoulli(0.7)})),
    (3, case(adapted(tiny_state("ssa"), ["q_proj"]))),  # the last layer's, which needs no gradient from the others
    (3, case(adapted(tiny_state("ssa"), ["a_proj"]))),  # the first one's, which needs all of them
    (2, case(build(tiny(), 0), method="spaco", options={"sampler": mc.Bernoulli(1e-9)})),  # keeps nothing
    (2, case(build(tiny(), 0), options={"share": True, "fill_size": 6})),
    (3, case(build(MAMBA, 0), rows=1, options={"starts": (0, 1, 7)})),
]


@pytest.mark.parametrize(("number", "case"), SELDOM)
def test_ranks_find_what_one_process_finds(ranks: Ranks, number: int, case: Case) -> None:
    """Though each has random numbers of its own: the first one draws chunks and masks for all."""
    check(ranks, number, case)


def test_a_copy_without_a_document_adds_nothing(ranks: Ranks) -> None:
    """In half precision too, where gradients are wider than weights."""
    model = build(tiny(layers=2), 0).to(torch.bfloat16)
    (busy, _), (idle, expected) = ranks.ask(2, tasks.copies_of_which_one_is_idle, case(model, length=8))
    assert busy.keys() == idle.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.dtype == torch.float32
        assert torch.equal(busy[name], grad) and torch.equal(idle[name], grad)


@pytest.mark.parametrize(("number", "chunks"), [(1, 3), (2, 5), (3, 7), (4, 2)])
def test_the_bubble_is_that_of_the_formula(ranks: Ranks, number: int, chunks: int) -> None:
    """If a rebuild takes as long as a backward, the first rank waits for that part of its walk."""
    answers = ranks.ask(number, tasks.works, case(build(tiny(layers=4), 0), 2 * chunks, 2))
    walk = [work for work in PICTURE.equal_times([works for works, _ in answers])[0] if work.what != "fill"]
    span = walk[-1].stop - walk[0].start
    assert Fraction(span - len(walk), span) == Fraction(number - 1, chunks + number - 1)
    for rank, (works, most) in enumerate(answers):
        assert most <= MOST_ON_THE_WAY
        assert [chunk for what, chunk, *_ in works if what == "fill"] == list(range(chunks - 1))
        for kind in ("rebuild", "backward"):
            assert [chunk for what, chunk, *_ in works if what == kind] == list(reversed(range(chunks)))
        waiting = accumulate({"fill": 0, "rebuild": 1, "backward": -1}[what] for what, *_ in works)
        assert max(waiting) == min(number - rank, chunks)
        assert all(begin <= end <= then for (*_, begin, end), (*_, then, _) in pairwise(works))


def test_the_fullest_rank_gets_as_little_as_possible() -> None:
    assert split_costs((1, 1, 1, 1), 2) == (2, 2)
    assert split_costs((5, 1, 1, 1, 1, 1), 2) == (1, 5)
    assert split_costs((1, 1, 1, 9), 3) == (1, 2, 1)
    assert split_costs((1, 2, 3), 1) == (3,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 2}, "2 layers, too few for 3 ranks"),
        ({"counts": [1, 3]}, "[1, 3], but must be 3 numbers"),
        ({"counts": [4, 0, 0]}, "at least 1"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"others_are_shorter": True}, "rank 1 was called with a batch of shape [2, 10]"),
        ({"method": "seco"}, "call pipeline_seco or pipeline_spaco"),
        ({"frozen": True}, "nothing to train"),
    ],
)
def test_a_mistake_is_named_on_every_rank(ranks: Ranks, changes: dict[str, Any], words: str) -> None:
    model = build(tiny(layers=changes.pop("layers", 4)), 0)
    model.requires_grad_(not changes.pop("frozen", False))
    how = changes.pop("method", "pipeline_seco"), changes.pop("others_are_shorter", False)
    for message in ranks.ask(3, tasks.mistake, *how, case(model, **changes)):
        assert words in message


def test_without_a_process_group() -> None:
    with pytest.raises(mc.InputError, match="torchrun"):
        mc.PipelineStage(build(tiny(), 0))


@pytest.mark.parametrize(("lost", "hangs"), [(0, False), (2, False), (1, True)])
def test_a_rank_that_is_lost_ends_the_others(ranks: Ranks, lost: int, hangs: bool) -> None:
    """Those beside it at once, or after the timeout if it hangs, and then those beside them."""
    try:
        ranks.tell(3, tasks.lose_one_in_the_walk, lost, hangs, case(build(tiny(layers=3), 0)))
        for rank in {0, 1, 2} - {lost}:
            failed, text = ranks.answer(rank)
            assert failed and text.startswith(f"RankLost: rank {rank} hears nothing from rank ")
            ranks.processes[rank].join(20)
            assert ranks.processes[rank].exitcode == 1
    finally:
        ranks.replace()


@pytest.mark.parametrize(("layers", "chunk_size"), [("aaa", 2), ("sas", 6)])
def test_the_engine_of_torch_finds_what_one_process_finds(ranks: Ranks, layers: str, chunk_size: int) -> None:
    check(ranks, 2, case(build(tiny_state(layers), 0), 12, chunk_size), tasks.by_torch)


def test_the_engine_of_torch_holds_a_hidden_state_more_for_each_chunk(ranks: Ranks) -> None:
    """On either rank, beyond what grows in ours: it receives each chunk, or its gradient, into a buffer of its own."""
    model = build(tiny_state("sss"), 0)
    few, many = (ranks.ask(2, tasks.peaks, case(model, 16 * chunks, 16)) for chunks in (4, 12))
    hidden = 2 * 16 * 8 * 8  # B, C, E, float64
    for before, after in zip(few, many, strict=True):
        ours, theirs = (after[i] - before[i] for i in range(2))
        assert theirs - ours >= (12 - 4) * hidden


def test_the_engine_of_torch_wants_as_many_chunks_as_ranks(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match="Number of microbatches"):
        ranks.ask(2, tasks.by_torch, case(build(tiny_state("aaa"), 0), 12, 12))
