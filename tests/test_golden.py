"""The golden files are what the code computes, and NumPy by hand computes the same from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from minichunk.cli import main
from minichunk.golden import configs

from . import numpy_llama

COMMITTED = Path(__file__).parent / "golden"
NAMES = list(configs())


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    with safe_open(str(path), framework="np") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check(got: Any, expected: np.ndarray, name: str) -> None:
    bound = 1e-12 * max(1.0, float(np.abs(expected).max(initial=0)))
    error = float(np.abs(got - expected).max(initial=0))
    assert np.shape(got) == expected.shape, name
    assert error <= bound, f"{name} is off by {error:.3e}, allowed {bound:.1e}"


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
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if value.dtype == np.int64:
            assert np.array_equal(got[key], value), key
        else:
            check(got[key], value, key)


def test_nothing_else_is_committed_and_it_is_small() -> None:
    files = list(COMMITTED.glob("*.safetensors"))
    assert {path.stem for path in files} == set(NAMES)
    assert sum(path.stat().st_size for path in files) <= 2_000_000


@pytest.mark.parametrize("method", ["seco", "spaco"])
@pytest.mark.parametrize("name", NAMES)
def test_numpy_reproduces_every_number(name: str, method: str) -> None:
    metadata, golden = read(COMMITTED / f"{name}.safetensors")
    config, ids = json.loads(metadata["config"]), golden["input_ids"]
    weights = {key.removeprefix("weights."): value for key, value in golden.items() if key.startswith("weights.")}
    rope = numpy_llama.rope_tables(config, ids.shape[1])
    for got, key in zip(rope, ("rope.cos", "rope.sin"), strict=True):
        np.testing.assert_allclose(got, golden[key], rtol=0, atol=1e-6)
    model = numpy_llama.Llama(config, weights, (golden["rope.cos"], golden["rope.sin"]))
    size = int(metadata["chunk_size"])
    draw = json.loads(metadata["spaco"]) if method == "spaco" else [(1.0, 1.0)] * -(-ids.shape[1] // size)
    got = numpy_llama.spaco(model, ids, golden["labels"], size, draw)
    expected = {key.removeprefix(f"{method}."): value for key, value in golden.items() if key.startswith(f"{method}.")}
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        check(got[key], value, key)


@pytest.mark.parametrize("name", NAMES)
def test_numpy_in_one_piece_is_full(name: str) -> None:
    metadata, golden = read(COMMITTED / f"{name}.safetensors")
    weights = {key.removeprefix("weights."): value for key, value in golden.items() if key.startswith("weights.")}
    model = numpy_llama.Llama(json.loads(metadata["config"]), weights, (golden["rope.cos"], golden["rope.sin"]))
    ids = golden["input_ids"]
    got = numpy_llama.spaco(model, ids, golden["labels"], ids.shape[1], [(1.0, 1.0)])
    check(got["loss"], golden["full.loss"], "loss")
    for key, value in golden.items():
        if key.startswith("full.grad."):
            check(model.grad[key.removeprefix("full.grad.")], value, key)
            check(golden[key.replace("full.grad", "seco.chunk.0.grad")], value, key)


def test_a_file_in_the_place_of_the_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text("")
    assert main(["golden", str(tmp_path / "x")]) == 2
    assert "is a file; golden files need a directory" in capsys.readouterr().err
