"""PyTorch's own engine for pipelines finds what one process finds; why it is not ours, counted."""

import pytest

from . import ranks as tasks
from .ranks import Ranks
from .strategies import build, tiny_state
from .test_pipeline import case, check


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
