"""PyTorch's own engine for pipelines finds what one process finds; why it is not ours, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import rank_tasks as tasks
from .ranks import Case, Ranks
from .strategies import build, tiny_state


def case(layers: str, length: int, chunk_size: int, batch: int = 2) -> Case:
    ids = torch.randint(23, (batch, length), generator=torch.Generator().manual_seed(0))
    return Case(build(tiny_state(layers), 0), ids, ids, chunk_size)


@pytest.mark.parametrize("layers", ["aaa", "sas"])
@pytest.mark.parametrize("chunk_size", [2, 6])
def test_the_engine_of_torch_finds_what_one_process_finds(ranks: Ranks, layers: str, chunk_size: int) -> None:
    answers = ranks.ask(2, tasks.by_torch, case(layers, 12, chunk_size))
    expected: dict[str, Any] = answers[0][1]
    found = {name: tensor for got, _ in answers for name, tensor in got.items()}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_the_engine_of_torch_holds_a_hidden_state_more_for_each_chunk(ranks: Ranks) -> None:
    """On either rank, beyond what grows in ours: it receives each chunk, or its gradient, into a buffer of its own."""
    few, many = (ranks.ask(2, tasks.peaks, case("sss", 16 * chunks, 16)) for chunks in (4, 12))
    hidden = 2 * 16 * 8 * 8  # B, C, E, float64
    for before, after in zip(few, many, strict=True):
        ours, theirs = (after[i] - before[i] for i in range(2))
        assert theirs - ours >= (12 - 4) * hidden


def test_the_engine_of_torch_wants_as_many_chunks_as_ranks(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match="Number of microbatches"):
        ranks.ask(2, tasks.by_torch, case("aaa", 12, 12))
