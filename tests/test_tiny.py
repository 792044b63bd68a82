"""The page is short, stands alone, and computes the losses and gradients of the golden files and of the package."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minichunk as mc
from minichunk import tiny
from minichunk.batch import shift
from minichunk.chunks import cut

from .gradients import oracle
from .rounding import exactly, outcome
from .strategies import build, examples
from .strategies import tiny as tiny_config
from .test_golden import COMMITTED, check, read

PAGE = Path(tiny.__file__)
COVERED = ("plain", "grouped", "tied", "qkv-bias", "calm")  # no qk-norm, no llama3 rope, no windows, no LoRA


def test_it_is_one_page_that_stands_alone() -> None:
    assert len(PAGE.read_text().splitlines()) <= 170
    imported: set[str] = set()
    for node in ast.walk(ast.parse(PAGE.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
    assert "torch" in imported
    assert imported - {"torch"} <= set(sys.stdlib_module_names)


def test_it_shows_what_it_says() -> None:
    done = subprocess.run([sys.executable, "-m", "minichunk.tiny"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = re.findall(r"^(\w+).* loss (\S+)  gradient off by (\S+)$", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in lines] == ["full", "SeCO", "SpaCO", "SpaCO"]
    assert len(done.stdout.splitlines()) == 4
    assert len({loss for _, loss, _ in lines}) == 1
    full, seco, coins, published = (float(error) for _, _, error in lines)
    assert full == 0
    assert max(seco, coins) < 1e-13
    assert published > 0.01  # the bias is there to be seen


@pytest.mark.parametrize("method", ["full", "seco", "spaco"])
@pytest.mark.parametrize("name", COVERED)
def test_losses_and_gradients_are_the_golden_ones(name: str, method: str) -> None:
    """In `.grad` is what the chunk that a walk comes to last has found there."""
    metadata, tensors = read(COMMITTED / f"{name}.safetensors")
    given = {key: torch.from_numpy(value) for key, value in tensors.items()}
    p = {key.removeprefix("weights."): t.requires_grad_() for key, t in given.items() if key.startswith("weights.")}
    arguments = p, json.loads(metadata["config"]), given["input_ids"], shift(given["labels"])
    size, draw = int(metadata["chunk_size"]), json.loads(metadata["spaco"])
    kept = {j: tuple(weight) for j, weight in enumerate(draw) if weight is not None}
    more = {"full": (), "seco": (size,), "spaco": (size, kept)}[method]
    got = {f"{method}.loss": getattr(tiny, method)(*arguments, *more)}
    grads = {"full": "full", "seco": "seco.chunk.0", "spaco": f"spaco.chunk.{min(kept)}"}[method]
    got |= {f"{grads}.grad.{key}": t.grad for key, t in p.items()}
    starts = (f"{method}.loss", f"{grads}.grad.")
    check(name, got, {key: value for key, value in tensors.items() if key.startswith(starts)})


@examples(20)
@given(st.integers(2, 14), st.integers(1, 16), st.lists(st.none() | st.tuples(*[st.floats(0.5, 2)] * 2), max_size=14))
def test_it_is_the_package(length: int, chunk_size: int, entries: list[tuple[float, float] | None]) -> None:
    config = tiny_config(rope_theta=100.0, rms_norm_eps=1e-3)
    model = build(config, seed=length)
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(chunk_size))
    k = math.ceil(length / chunk_size)
    weights = [mc.Weight(*entry) if entry is not None else None for entry in (entries + [(1.0, 2.0)] * k)[:k]]
    kept = {j: tuple(weight) for j, weight in enumerate(weights) if weight is not None}
    p = dict(model.named_parameters())
    arguments = (p, config.to_dict(), ids, shift(ids))
    every = [mc.Weight(1.0, 1.0)] * k
    for draw, ours, theirs in [
        (every, lambda: tiny.full(*arguments), lambda: mc.full(model, ids, ids)),
        (every, lambda: tiny.seco(*arguments, chunk_size), lambda: mc.seco(model, ids, ids, chunk_size)),
        (
            weights,
            lambda: tiny.spaco(*arguments, chunk_size, kept),
            lambda: mc.spaco(model, ids, ids, chunk_size, sampler=lambda k, generator: weights),
        ),
    ]:
        exact = exactly(model, lambda draw=draw: oracle(model, ids, ids, cut(length, chunk_size), draw))
        exact.check(outcome(model, ours))
        exact.check(outcome(model, theirs))
