"""The page is short, stands alone, and computes every number of the golden files and of the package."""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

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
INSIDE = re.compile(r"\.(hidden|attention|residual|logits)$")  # what the page does not hand out


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


def golden(name: str) -> tuple[dict[str, str], dict[str, np.ndarray], tiny.Parameters, tuple[Any, ...]]:
    """Metadata, tensors, parameters, and the arguments that all methods share."""
    metadata, tensors = read(COMMITTED / f"{name}.safetensors")
    p = {
        key.removeprefix("weights."): torch.from_numpy(value).requires_grad_()
        for key, value in tensors.items()
        if key.startswith("weights.")
    }
    ids, labels = torch.from_numpy(tensors["input_ids"]), torch.from_numpy(tensors["labels"])
    return metadata, tensors, p, (p, json.loads(metadata["config"]), ids, shift(labels))


@pytest.mark.parametrize("name", COVERED)
def test_full_backpropagation_is_the_golden_one(name: str) -> None:
    _, expected, p, arguments = golden(name)
    got = {"full.loss": tiny.full(*arguments)} | {f"full.grad.{key}": t.grad for key, t in p.items()}
    check(name, got, {key: value for key, value in expected.items() if key.startswith("full.")})


@pytest.mark.parametrize("method", ["seco", "spaco"])
@pytest.mark.parametrize("name", COVERED)
def test_every_golden_number_of_a_walk(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata, tensors, p, arguments = golden(name)
    size, draw = int(metadata["chunk_size"]), json.loads(metadata["spaco"])
    kept = {j: tuple(weight) for j, weight in enumerate(draw) if weight is not None}
    num_chunks = math.ceil(tensors["input_ids"].shape[1] / size)
    walk = iter(sorted(range(num_chunks) if method == "seco" else kept, reverse=True))
    got: dict[str, Tensor] = {}
    backward = torch.autograd.backward

    def listen(starts: list[Tensor], gradients: list[Tensor | None]) -> None:
        """What each chunk starts from, and what its backward pass leaves in `.grad`."""
        chunk = f"{method}.chunk.{next(walk)}"
        got[f"{chunk}.loss"] = starts[0].detach()
        kinds = itertools.product(range(len(starts) // 2), (("keys", "key_grads"), ("values", "value_grads")))
        for (layer, (numbers, grads)), m, g in zip(kinds, starts[1:], gradients[1:], strict=True):
            assert g is not None
            got[f"{chunk}.layer.{layer}.{numbers}"] = m.detach().clone()
            got[f"{chunk}.layer.{layer}.{grads}"] = g.clone()
        backward(starts, gradients)
        got.update({f"{chunk}.grad.{key}": t.grad.clone() for key, t in p.items() if t.grad is not None})

    monkeypatch.setattr(torch.autograd, "backward", listen)
    loss = tiny.seco(*arguments, size) if method == "seco" else tiny.spaco(*arguments, size, kept)
    got[f"{method}.loss"] = loss
    assert next(walk, None) is None
    starts = (f"{method}.chunk", f"{method}.loss")
    expected = {key: value for key, value in tensors.items() if key.startswith(starts) and not INSIDE.search(key)}
    check(name, got, expected)


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
