"""The golden files are what the code computes, and NumPy by hand computes the same from them."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from minichunk.porting.compare import GIVEN, read_mistakes
from minichunk.samplers import Bernoulli, FixedBudget, PaperBudget

from . import numpy_llama, numpy_state
from .golden.write import CASES, TREES, golden, metadata
from .mutants import MUTANTS
from .rounding import Exact, measure

COMMITTED = Path(__file__).parent / "golden"
PAGE = (COMMITTED / "README.md").read_text()


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    with safe_open(str(path), framework="np") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@cache
def measured(name: str) -> Exact:
    """Every tensor of one file, with its noise."""
    return measure(lambda: golden((CASES | TREES)[name]))


def check(name: str, got: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    """By the rule of rounding.py, for tensors of the file `name`."""
    values = {key: torch.from_numpy(value) for key, value in expected.items()}
    Exact(values, measured(name).noise).check({key: torch.as_tensor(value) for key, value in got.items()})


@pytest.mark.parametrize("name", CASES | TREES)
def test_rounding_is_what_the_file_says(name: str) -> None:
    """By three random runs, of which the worst of 24 moved a hybrid 7 times as far as the best: a factor of four."""
    exact = measured(name)
    sizes = {key: float(value.norm()) for key, value in exact.values.items() if value.is_floating_point()}
    worst = max(exact.noise[key] / size for key, size in sizes.items() if size > 0)
    assert worst / 4 <= (CASES | TREES)[name].rounding <= 4 * worst


@pytest.mark.parametrize("name", CASES | TREES)
def test_the_committed_files_are_what_is_written(name: str) -> None:
    """What is given to the last bit, and what is computed up to rounding: processors add up in other orders."""
    assert {path.stem for path in COMMITTED.glob("*.safetensors")} == (CASES | TREES).keys()
    committed, expected = read(COMMITTED / f"{name}.safetensors")
    got = measured(name).values
    assert metadata(name, (CASES | TREES)[name]) == committed and expected.keys() == got.keys()
    assert all(np.array_equal(got[key], value) for key, value in expected.items() if GIVEN.search(key))
    check(name, got, expected)


class Numpy:
    """A golden file, and the model in NumPy that is made of its config, weights and masks alone."""

    def __init__(self, name: str, llama: Any = numpy_llama, state: Any = numpy_state) -> None:
        self.metadata, self.tensors = read(COMMITTED / f"{name}.safetensors")
        config, weights, masks = json.loads(self.metadata["config"]), self.under("weights."), self.under("masks.")
        rope = (self.tensors.get("rope.cos"), self.tensors.get("rope.sin"))
        sinks, lora = (json.loads(self.metadata.get(key, default)) for key, default in (("sinks", "0"), ("lora", "{}")))
        kind = state.StateSpace if "state_size" in config else llama.Llama
        self.model, self.method = kind(config, weights, rope, sinks, lora, masks), llama.spaco

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    def walk(self, chunk_size: int, draw: Any, of: str = "") -> dict[str, Any]:
        """One batch, the first or the "second.": what the file has of it, without the method's name."""
        ids, labels = self.tensors[f"{of}input_ids"], self.tensors[f"{of}labels"]
        divisor, dpo = (json.loads(self.metadata.get(key, "null")) for key in ("num_targets", "dpo"))
        return self.method(self.model, ids, labels, chunk_size, draw, divisor, dpo)

    def walks(self, method: str) -> dict[str, Any]:
        """All batches by `seco` or `spaco`, by the file's names.

        The walk takes all layers at once, where the file's may have taken one at a time: the numbers are the same.
        """
        size, length = int(self.metadata["chunk_size"]), self.tensors["input_ids"].shape[1]
        draw = json.loads(self.metadata["spaco"]) if method == "spaco" else [(1.0, 1.0)] * -(-length // size)
        self.model.grad.clear()
        of = ["", *(["second."] if "second.input_ids" in self.tensors else [])]
        found = {f"{n}{method}.{key}": value for n in of for key, value in self.walk(size, draw, n).items()}
        return {key: value for key, value in found.items() if key in self.tensors or not key.endswith("hidden_grad")}


@pytest.mark.parametrize("method", ["seco", "spaco"])
@pytest.mark.parametrize("name", CASES)
def test_numpy_reproduces_every_number(name: str, method: str) -> None:
    port = Numpy(name)
    expected = {key: value for key, value in port.tensors.items() if f"{method}." in key}
    check(name, port.walks(method), expected)
    if "rope.cos" in port.tensors:  # which the walk was given
        rope = numpy_llama.rope_tables(json.loads(port.metadata["config"]), port.tensors["input_ids"].shape[1])
        for got, key in zip(rope, ("rope.cos", "rope.sin"), strict=True):
            np.testing.assert_allclose(got, port.tensors[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_numpy_in_one_piece_is_full(name: str) -> None:
    port = Numpy(name)
    of = ["", "second."] if "second.input_ids" in port.tensors else [""]
    losses = [port.walk(port.tensors["input_ids"].shape[1], [(1.0, 1.0)], n)["loss"] for n in of]
    expected = {key: value for key, value in port.tensors.items() if key.startswith("full.")}
    grads = {f"full.grad.{key}": value for key, value in port.model.grad.items()}
    check(name, {"full.loss": sum(losses), **grads}, expected)
    last = {key: port.tensors[key.replace("full.grad", f"{of[-1]}seco.chunk.0.grad")] for key in grads}
    check(name, {"full.loss": sum(port.tensors[f"{n}seco.loss"] for n in of), **last}, expected)


def test_a_tree_has_the_numbers_of_its_rows() -> None:
    """Of SeCO: all of the forward pass, what both answers send back to chunk 0, and the gradient."""
    (metadata, tree), (_, rows) = (read(COMMITTED / f"{name}.safetensors") for name in ("tree", "dpo"))
    starts, trunk, chunks = (json.loads(metadata[key]) for key in ("starts", "trunk", "chunks"))
    ends = [*starts[2:], chunks[-1][1]]
    own = [(n, trunk + t) for n in (0, 1) for t in range(ends[n] - starts[n + 1])]
    row, position = np.array([*((0, t) for t in range(trunk)), *own]).T  # of each place of the one row
    assert np.array_equal(rows["input_ids"][row, position], tree["row.input_ids"][0])
    same = re.compile(r"seco\.(log_probs|token_weights|loss|chunk\.0\.grad\..+)")
    expected = {name: rows[name] for name in tree if same.fullmatch(name)}
    for name in tree:
        if match := re.fullmatch(r"seco\.chunk\.(\d)\.(.*(hidden|attention|residual|keys|values|logits))", name):
            axis, here = 2 if match[3] in ("keys", "values") else 1, slice(*chunks[int(match[1])])
            whole = np.concatenate([rows[f"seco.chunk.{i}.{match[2]}"] for i in range(4)], axis).swapaxes(1, axis)
            expected[name] = whole[row[here], position[here]][None].swapaxes(1, axis)
        elif re.fullmatch(r"seco\.chunk\.0\.layer\.\d\.(key|value)_grads", name):
            expected[name] = rows[name].sum(0, keepdims=True)
    check("tree", {name: tree[name] for name in expected}, expected)


def bias(sampler: Any, modules: tuple[Any, Any] | tuple[()] = ()) -> float:
    """Of the mean gradient over all draws of four chunks, relative to the exact gradient, on the plain file."""
    port, mean = Numpy("plain", *modules), defaultdict(float)
    for probability, draw in sampler.outcomes(4):
        port.model.grad.clear()
        port.walk(3, draw)
        for name, grad in port.model.grad.items():
            mean[name] = mean[name] + probability * grad
    exact = port.under("full.grad.")
    error = sum(float(((mean[name] - grad) ** 2).sum()) for name, grad in exact.items())
    return math.sqrt(error / sum(float((grad**2).sum()) for grad in exact.values()))


def test_the_page_says_what_enumeration_gives() -> None:
    rates = [0.4, 0.5, 0.6, 0.7]
    assert bias(Bernoulli(rates)) < 1e-13
    expected = {f"`FixedBudget({t})`": bias(FixedBudget(t)) for t in (2, 3)}
    expected |= {f"`PaperBudget({t})`": bias(PaperBudget(t)) for t in (1, 2, 3)}
    for key in ("all that arrived", "skipped chunks relay", "no relay factor", "the sender's factor"):
        mutant = next(mutant for mutant in MUTANTS if mutant.key == key)
        words = next(mistake.words for mistake in read_mistakes() if mistake.key == key)
        expected[words] = bias(Bernoulli(rates), mutant.modules())
    rows = dict(re.findall(r"^\| (.+?) \| (0\.\d{3}) \|$", PAGE, re.MULTILINE))
    assert rows == {words: f"{value:.3f}" for words, value in expected.items()}
