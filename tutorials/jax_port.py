"""SeCO and SpaCO in JAX: Llama, Qwen2 and Qwen3, checked against the golden files. jax.md goes through it.

`python tutorials/jax_port.py` compares every number that it computes. It needs jax, numpy and safetensors.

Shapes: B batch, T text, padded to whole chunks, C chunk, E hidden, H heads, G key-value heads, D head size, V
vocabulary, L layers. The memory, and what is sent back to it, are (L, 2, B, G, T, D): keys, then values.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from safetensors import safe_open

jax.config.update("jax_enable_x64", True)  # or float64 would silently become float32

Parameters = dict[str, Array]  # by Hugging Face's names
Config = dict[str, Any]  # Hugging Face's config.json
Kept = dict[int, tuple[float, float]]  # SpaCO's draw: chunks, from 0, and their factors on loss and relay
IGNORE = -100


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE: x (B, H, C, D), cos and sin (C, D/2)."""
    a, b = jnp.split(x, 2, axis=-1)  # dimension i is paired with i + D/2
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


def attention(q: Array, k: Array, v: Array, past: Array, start: Array) -> Array:
    """q (B, H, C, D); k, v (B, G, C, D); past (2, B, G, T, D), of which the positions before `start` are seen."""
    C, T, shared = q.shape[2], past.shape[3], q.shape[1] // k.shape[1]
    keys, values = jnp.concatenate((past[0], k), axis=2), jnp.concatenate((past[1], v), axis=2)
    keys, values = (jnp.repeat(t, shared, axis=1) for t in (keys, values))  # head h uses key head h // shared
    # Every chunk has as many columns, T + C, so that all of them are one compiled program; the mask knows the rest.
    before = jnp.broadcast_to(jnp.arange(T) < start, (C, T))
    seen = jnp.concatenate((before, jnp.tril(jnp.ones((C, C), dtype=bool))), axis=1)
    scores = jnp.where(seen, q @ keys.swapaxes(-1, -2) / q.shape[-1] ** 0.5, -jnp.inf)  # (B, H, C, T + C)
    return jax.nn.softmax(scores, axis=-1) @ values


def layer(config: Config, p: Parameters, x: Array, past: Array, rope: Array, start: Array) -> tuple[Array, Array]:
    """One layer of a chunk: x (B, C, E), rope (2, C, D/2); p by the names within a layer. Returns x, and (2, B, G, "
    "C, D)."""

    def linear(name: str, x: Array) -> Array:
        y = x @ p[f"{name}.weight"].T
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y  # Qwen2

    def heads(name: str, x: Array) -> Array:
        y = linear(f"self_attn.{name}_proj", x)
        y = y.reshape(*y.shape[:2], -1, config["head_dim"]).swapaxes(1, 2)  # (B, C, H * D) -> (B, H, C, D)
        weight = p.get(f"self_attn.{name}_norm.weight")
        return y if weight is None else norm(y, weight, config)  # Qwen3

    h = norm(x, p["input_layernorm.weight"], config)
    q, k, v = rotate(heads("q", h), *rope), rotate(heads("k", h), *rope), heads("v", h)
    y = attention(q, k, v, past, start).swapaxes(1, 2)
    x = x + linear("self_attn.o_proj", y.reshape(*y.shape[:2], -1))
    h = norm(x, p["post_attention_layernorm.weight"], config)
    h = jax.nn.silu(linear("mlp.gate_proj", h)) * linear("mlp.up_proj", h)
    return x + linear("mlp.down_proj", h), jnp.stack((k, v))


def norm(x: Array, weight: Array, config: Config) -> Array:
    """RMSNorm over the last dimension."""
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight


def f(
    config: Config, p: Parameters, memory: Array, ids: Array, targets: Array, rope: Array, start: Array
) -> tuple[Array, Array]:
    """Eq. 1 of the paper: the summed loss of a chunk (B, C), and its keys and values (L, 2, B, G, C, D)."""
    layers = [f"model.layers.{i}." for i in range(config["num_hidden_layers"])]
    names = [name.removeprefix(layers[0]) for name in p if name.startswith(layers[0])]
    stacked = {
        name: jnp.stack([p[prefix + name] for prefix in layers]) for name in names
    }  # better stacked from the start

    def step(x: Array, of_layer: tuple[Parameters, Array]) -> tuple[Array, Array]:
        return layer(config, of_layer[0], x, of_layer[1], rope, start)

    # A loop in the program, not an unrolled one: else the compiler may run all layers again before the first backward.
    step = jax.checkpoint(step) if config.get("recompute") else step
    x, written = lax.scan(step, p["model.embed_tokens.weight"][ids], (stacked, memory))
    head = p.get("lm_head.weight", p["model.embed_tokens.weight"])  # absent: tied
    logits = norm(x, p["model.norm.weight"], config) @ head.T  # (B, C, V)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets == IGNORE, 0, losses).sum(), written


def program(config: Config, chunk_size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Two compiled functions, for every chunk of every text of one length. `start` is traced: a number, but not a "
    "shape."""

    def cut(x: Array, start: Array, axis: int) -> Array:
        return lax.dynamic_slice_in_dim(x, start, chunk_size, axis)

    def chunk(ids: Array, targets: Array, rope: Array, start: Array) -> tuple[Array, ...]:
        return cut(ids, start, 1), cut(targets, start, 1), cut(rope, start, 1), start

    @partial(jax.jit, donate_argnames="memory")  # written in place: the caller's buffer is given away
    def fill(p: Parameters, memory: Array, *text: Array) -> Array:
        _, m = f(config, p, memory, *chunk(*text))
        return lax.dynamic_update_slice_in_dim(memory, m, text[-1], axis=4)

    @partial(jax.jit, donate_argnames=("sent", "grads"))
    def rebuild(
        p: Parameters, memory: Array, sent: Array, grads: Parameters, factors: Array, *text: Array
    ) -> tuple[Array, Array, Array, Array, Parameters]:
        """Lines 5 to 7. sent: to the whole memory, so far. factors: on the loss, 1/n in it, and on the relay."""
        (loss, m), vjp = jax.vjp(lambda p, memory: f(config, p, memory, *chunk(*text)), p, memory)
        relayed = factors[1] * cut(sent, text[-1], axis=4)
        dp, dmemory = vjp((factors[0], relayed))  # one call for both: from the loss, and from what was written
        return factors[0] * loss, m, relayed, sent + dmemory, jax.tree.map(jnp.add, grads, dp)

    return fill, rebuild


def seco(
    config: Config, p: Parameters, ids: Array, labels: Array, rope: Array, chunk_size: int,
    kept: Kept | None = None, watch: Callable[..., None] = lambda *_: None, compiled: Any = None,
) -> tuple[Array, Parameters]:  # fmt: skip
    """The mean loss and its gradient: Algorithm 1, or with `kept` Algorithm 2. rope: (2, T, D/2). ids, labels: (B, "
    "T)."""
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)  # shifted once, before cutting
    n, k = (targets != IGNORE).sum(), -(-ids.shape[1] // chunk_size)
    short = k * chunk_size - ids.shape[1]  # a ragged last chunk is filled up: seen by nobody, and without targets
    ids, targets = (jnp.pad(x, ((0, 0), (0, short)), constant_values=c) for x, c in ((ids, 0), (targets, IGNORE)))
    rope = jnp.pad(rope, ((0, 0), (0, short), (0, 0)))
    kept = dict.fromkeys(range(k), (1.0, 1.0)) if kept is None else kept
    fill, rebuild = compiled or program(config, chunk_size)
    L, G, D = (config[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    shape = (L, 2, ids.shape[0], G, ids.shape[1], D)
    dtype = p["model.embed_tokens.weight"].dtype
    memory, sent, grads = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jax.tree.map(jnp.zeros_like, p)
    for j in range(max(kept, default=0)):  # lines 1-3, up to the last kept chunk
        memory = fill(p, memory, ids, targets, rope, j * chunk_size)
    total = jnp.zeros((), dtype)
    for j in sorted(kept, reverse=True):  # line 4
        factors = jnp.array([kept[j][0] / n, kept[j][1]], dtype)
        loss, m, relayed, sent, grads = rebuild(p, memory, sent, grads, factors, ids, targets, rope, j * chunk_size)
        watch(j, loss, m, relayed, grads)
        total = total + loss
    return total, grads


def load(path: Path) -> tuple[Config, Parameters, tuple[Array, Array, Array]]:
    """Config, weights, and ids, labels and rope tables of a golden file."""
    with safe_open(str(path), framework="np") as file:
        config, names = json.loads(file.metadata()["config"]), list(file.keys())
        tensors = {name: jnp.asarray(file.get_tensor(name)) for name in names}
    p = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    rope = jnp.stack((tensors["rope.cos"], tensors["rope.sin"]))  # float32 cosines differ by a last bit
    return config, p, (tensors["input_ids"], tensors["labels"], rope)


def compare(path: Path, recompute: bool = False) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Any]:
    """Every number of a golden file that this port computes, here and there; and the two compiled functions."""
    config, p, arguments = load(path)
    with safe_open(str(path), framework="np") as file:
        size, spaco = int(file.metadata()["chunk_size"]), json.loads(file.metadata()["spaco"])
    draw = {j: tuple(weight) for j, weight in enumerate(spaco) if weight is not None}
    got: dict[str, np.ndarray] = {}
    compiled = program({**config, "recompute": recompute}, size)
    for method, kept in (("seco", None), ("spaco", draw)):

        def watch(j: int, loss: Array, m: Array, relayed: Array, grads: Parameters, method: str = method) -> None:
            where, C = f"{method}.chunk.{j}", min(size, arguments[0].shape[1] - j * size)
            got[f"{where}.loss"], m, relayed = np.array(loss), np.array(m), np.array(relayed)
            for i in range(config["num_hidden_layers"]):
                for kind, name in enumerate(("key", "value")):
                    got[f"{where}.layer.{i}.{name}s"] = m[i, kind, :, :, :C]
                    got[f"{where}.layer.{i}.{name}_grads"] = relayed[i, kind, :, :, :C]
            got.update({f"{where}.grad.{name}": np.array(g) for name, g in grads.items()})  # a copy: grads are donated

        loss, grads = seco(config, p, *arguments, size, kept, watch, compiled)
        got[f"{method}.loss"] = np.array(loss)
        if kept is None:  # SeCO's gradient is that of ordinary backpropagation
            got["full.loss"] = np.array(loss)
            got.update({f"full.grad.{name}": np.array(g) for name, g in grads.items()})
    with safe_open(str(path), framework="np") as file:
        return got, {name: file.get_tensor(name) for name in got}, compiled


if __name__ == "__main__":
    for name in sys.argv[1:] or ("plain", "grouped", "tied", "llama3-rope", "qkv-bias", "qk-norm"):
        got, expected, _ = compare(Path(__file__).parents[1] / "tests" / "golden" / f"{name}.safetensors")
        errors = {key: np.abs(got[key] - t).max() / max(np.abs(t).max(), 1e-3) for key, t in expected.items()}
        worst = max(errors, key=lambda key: errors[key])
        print(f"{name:12} {len(got)} tensors, largest relative error {errors[worst]:.0e}, of {worst}")
