"""Models of transformers in chunks against their own full backpropagation; `python -m tests.sweep_wrap` tries all."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

import minichunk as mc

from .rounding import exactly, outcome
from .tiny_transformers import batch, exact, own, tiny_transformer

TYPES = [
    "llama", "gemma2", "gemma3_text", "gemma3n_text", "gpt2", "phi", "granite", "mixtral", "gpt_oss", "llama4_text",
    "qwen3_next", "bamba", "lfm2",
]  # fmt: skip
WAYS: list[dict[str, Any]] = [{"chunk_size": 5}, {"chunk_size": 4, "recompute": True, "fill_size": 12}]


@pytest.mark.parametrize("model_type", TYPES)
def test_seco_is_its_own_full_backpropagation(model_type: str) -> None:
    (ids, labels), model = batch(), tiny_transformer(model_type)
    with exact():
        expected = exactly(model, lambda: own(model, ids, labels))
        wrapped = mc.wrap(model)
        expected.check(outcome(model, lambda: mc.full(wrapped, ids, labels)))
        for way in WAYS:
            expected.check(outcome(model, partial(mc.seco, wrapped, ids, labels, **way)))
