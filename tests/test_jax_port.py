"""The port to JAX computes every number of the golden files that it knows of, with one compiled program."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from safetensors import safe_open

jax = pytest.importorskip("jax", reason="needs JAX: pip install -e '.[jax]'")

from tutorials import jax_port  # noqa: E402

jax.config.update("jax_disable_most_optimizations", True)  # the programs are compiled once and run a few times

from .test_golden import COMMITTED, check  # noqa: E402

# "plain" and "grouped" below; a llama3 rope is another table, read from the file
LLAMAS = ("tied", "qkv-bias", "qk-norm")
KINDS = ("full.loss", "full.grad.", "seco.loss", "seco.chunk.", "spaco.loss", "spaco.chunk.")


@pytest.mark.parametrize("name", LLAMAS)
def test_every_golden_number(name: str) -> None:
    got, expected, (fill, rebuild) = jax_port.compare(COMMITTED / f"{name}.safetensors")
    with safe_open(str(COMMITTED / f"{name}.safetensors"), framework="np") as file:
        losses = [key for key in file.keys() if key.startswith(KINDS) and key.endswith(".loss")]  # noqa: SIM118
        grads = [key for key in file.keys() if key.startswith(KINDS) and ".grad." in key]  # noqa: SIM118
        draw = json.loads(file.metadata()["spaco"])
    assert {*losses, *grads} <= got.keys()
    assert any(weight is None for weight in draw)
    check(name, got, expected)
    assert (fill._cache_size(), rebuild._cache_size()) == (1, 1)  # all chunks, the ragged one too, and both methods


@pytest.fixture(scope="module")
def recomputed() -> Any:
    return jax_port.compare(COMMITTED / "grouped.safetensors", recompute=True)


def test_layers_that_are_run_again_change_nothing(recomputed: Any) -> None:
    got, expected, _ = recomputed
    check("grouped", got, expected)


def test_the_buffers_are_given_away(recomputed: Any) -> None:
    """What is written, sent back and summed goes into the buffers that were there: those that went in are gone."""
    jnp = jax.numpy
    config, weights, arguments = jax_port.load(COMMITTED / "grouped.safetensors")
    fill, rebuild = recomputed[2]
    given: list[Any] = []

    def spied_fill(p: Any, memory: Any, *rest: Any) -> Any:
        given.append(memory)
        return fill(p, memory, *rest)

    def spied_rebuild(p: Any, memory: Any, sent: Any, grads: Any, *rest: Any) -> Any:
        given.extend([sent, *grads.values()])
        return rebuild(p, memory, sent, grads, *rest)

    loss, _ = jax_port.seco(config, weights, *arguments, 4, compiled=(spied_fill, spied_rebuild))
    assert jnp.isfinite(loss)
    assert len(given) > 3 and all(buffer.is_deleted() for buffer in given)


def test_a_draw_that_keeps_nothing() -> None:
    config, weights, arguments = jax_port.load(COMMITTED / "plain.safetensors")
    loss, grads = jax_port.seco(config, weights, *arguments, 4, kept={})
    assert loss == 0
    assert not any(g.any() for g in grads.values())


def test_as_a_command_it_says_how_far_off_it_is() -> None:
    done = subprocess.run([sys.executable, jax_port.__file__, "plain"], capture_output=True, text=True, check=True)
    found = re.fullmatch(r"plain +\d+ tensors, largest relative error (\S+), of \S+\n", done.stdout)
    assert found is not None and float(found[1]) < 1e-12
