"""The golden files are what the code computes, and NumPy by hand computes the same from them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from minichunk.command.main import main
from minichunk.porting.golden import configs, golden

from . import numpy_llama
from .rounding import Exact, Noise, measure

COMMITTED = Path(__file__).parent / "golden"
NAMES = list(configs())


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    with safe_open(str(path), framework="np") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@cache
def noise(name: str) -> Noise:
    """Of every tensor of one file."""
    return measure(lambda: golden(configs()[name], seed=NAMES.index(name))).noise


def check(name: str, got: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    """By the rule of rounding.py, for tensors of the file `name`."""
    values = {key: torch.from_numpy(value) for key, value in expected.items()}
    Exact(values, noise(name)).check({key: torch.as_tensor(value) for key, value in got.items()})


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("golden")
    assert main(["golden", str(directory)]) == 0
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_files_are_what_the_command_writes(name: str, fresh: Path) -> None:
    metadata, expected = read(COMMITTED / f"{name}.safetensors")
    new_metadata, got = read(fresh / f"{name}.safetensors")
    assert metadata == new_metadata
    check(name, got, expected)


def test_nothing_else_is_committed_and_it_is_small() -> None:
    files = list(COMMITTED.glob("*.safetensors"))
    assert {path.stem for path in files} == set(NAMES)
    assert sum(path.stat().st_size for path in files) <= 2_000_000


@pytest.mark.parametrize("method", ["seco", "spaco"])
@pytest.mark.parametrize("name", NAMES)
def test_numpy_reproduces_every_number(name: str, method: str) -> None:
    metadata, tensors = read(COMMITTED / f"{name}.safetensors")
    config, ids = json.loads(metadata["config"]), tensors["input_ids"]
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    rope = numpy_llama.rope_tables(config, ids.shape[1])
    for got, key in zip(rope, ("rope.cos", "rope.sin"), strict=True):
        np.testing.assert_allclose(got, tensors[key], rtol=0, atol=1e-6)
    model = numpy_llama.Llama(config, weights, (tensors["rope.cos"], tensors["rope.sin"]))
    size = int(metadata["chunk_size"])
    draw = json.loads(metadata["spaco"]) if method == "spaco" else [(1.0, 1.0)] * -(-ids.shape[1] // size)
    got = numpy_llama.spaco(model, ids, tensors["labels"], size, draw)
    expected = {key: value for key, value in tensors.items() if key.startswith(f"{method}.")}
    check(name, {f"{method}.{key}": value for key, value in got.items()}, expected)


@pytest.mark.parametrize("name", NAMES)
def test_numpy_in_one_piece_is_full(name: str) -> None:
    metadata, tensors = read(COMMITTED / f"{name}.safetensors")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    model = numpy_llama.Llama(json.loads(metadata["config"]), weights, (tensors["rope.cos"], tensors["rope.sin"]))
    ids = tensors["input_ids"]
    got = numpy_llama.spaco(model, ids, tensors["labels"], ids.shape[1], [(1.0, 1.0)])
    expected = {key: value for key, value in tensors.items() if key.startswith("full.")}
    grads = {f"full.grad.{key}": value for key, value in model.grad.items()}
    check(name, {"full.loss": got["loss"], **grads}, expected)
    last = {key: tensors[key.replace("full.grad", "seco.chunk.0.grad")] for key in grads}
    check(name, {"full.loss": tensors["seco.loss"], **last}, expected)


def test_a_file_in_the_place_of_the_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text("")
    assert main(["golden", str(tmp_path / "x")]) == 2
    assert "is a file; golden files need a directory" in capsys.readouterr().err
