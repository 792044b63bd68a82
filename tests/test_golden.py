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
from minichunk.porting.golden import cases, golden

from . import numpy_llama, numpy_state
from .rounding import Exact, Noise, measure

COMMITTED = Path(__file__).parent / "golden"
NAMES = list(cases())
LLAMAS = [name for name in NAMES if name != "state"]


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    with safe_open(str(path), framework="np") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@cache
def noise(name: str) -> Noise:
    """Of every tensor of one file."""
    return measure(lambda: golden(cases()[name], seed=NAMES.index(name))).noise


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


@pytest.mark.parametrize("name", LLAMAS)
def test_numpy_rotates_by_the_same_angles(name: str) -> None:
    metadata, tensors = read(COMMITTED / f"{name}.safetensors")
    rope = numpy_llama.rope_tables(json.loads(metadata["config"]), tensors["input_ids"].shape[1])
    for got, key in zip(rope, ("rope.cos", "rope.sin"), strict=True):
        np.testing.assert_allclose(got, tensors[key], rtol=0, atol=1e-6)


def numpy_model(name: str) -> tuple[Any, Any, dict[str, str], dict[str, np.ndarray]]:
    """A model in NumPy, `spaco` for it, and its file's metadata and tensors."""
    metadata, tensors = read(COMMITTED / f"{name}.safetensors")
    config = json.loads(metadata["config"])
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    if name == "state":
        return numpy_state.StateSpace(config, weights), numpy_state.spaco, metadata, tensors
    rope = (tensors["rope.cos"], tensors["rope.sin"])
    return numpy_llama.Llama(config, weights, rope), numpy_llama.spaco, metadata, tensors


@pytest.mark.parametrize("method", ["seco", "spaco"])
@pytest.mark.parametrize("name", NAMES)
def test_numpy_reproduces_every_number(name: str, method: str) -> None:
    model, spaco, metadata, tensors = numpy_model(name)
    ids, size = tensors["input_ids"], int(metadata["chunk_size"])
    draw = json.loads(metadata["spaco"]) if method == "spaco" else [(1.0, 1.0)] * -(-ids.shape[1] // size)
    got = spaco(model, ids, tensors["labels"], size, draw)
    expected = {key: value for key, value in tensors.items() if key.startswith(f"{method}.")}
    check(name, {f"{method}.{key}": value for key, value in got.items()}, expected)


@pytest.mark.parametrize("name", NAMES)
def test_numpy_in_one_piece_is_full(name: str) -> None:
    model, spaco, _, tensors = numpy_model(name)
    ids = tensors["input_ids"]
    got = spaco(model, ids, tensors["labels"], ids.shape[1], [(1.0, 1.0)])
    expected = {key: value for key, value in tensors.items() if key.startswith("full.")}
    grads = {f"full.grad.{key}": value for key, value in model.grad.items()}
    check(name, {"full.loss": got["loss"], **grads}, expected)
    last = {key: tensors[key.replace("full.grad", "seco.chunk.0.grad")] for key in grads}
    check(name, {"full.loss": tensors["seco.loss"], **last}, expected)


def test_the_draw_for_a_state_shows_what_passes_through_a_skipped_and_through_a_kept_chunk() -> None:
    """Without either, or with the relay's factor on it, what chunk 0 is given would be something else."""
    _, tensors = read(COMMITTED / "state.safetensors")
    for layer in range(3):
        assert np.abs(tensors[f"spaco.chunk.0.layer.{layer}.adjoint"]).max() > 1e-4


def test_a_file_in_the_place_of_the_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text("")
    assert main(["golden", str(tmp_path / "x")]) == 2
    assert "is a file; golden files need a directory" in capsys.readouterr().err
