"""`minichunk golden`: every intermediate of SeCO and SpaCO on tiny models, for ports to compare with.

tests/golden/README.md is the page that describes the files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ..batch import prepare
from ..chunks import cut, span
from ..errors import InputError
from ..files.atomic import write_tensors
from ..full import full
from ..models.config import Llama3Rope, LlamaConfig
from ..models.llama import Llama
from ..models.rope import rope_tables
from ..protocol import Options
from ..samplers import Weight
from ..seco import fill, flat, new_memory, rebuild

FORMAT = "minichunk golden 1"
CHUNK_SIZE = 4
BATCH, LENGTH = 2, 11  # a ragged last chunk
SPACO = (None, Weight(1.5, 2.0), Weight(1.25, 3.0))  # one draw; no two factors are the same


def configs() -> dict[str, LlamaConfig]:
    """The models: what they have in common, and what each has of its own."""

    def config(**changes: object) -> LlamaConfig:
        common = {
            "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4, "rms_norm_eps": 1e-5,
        }  # fmt: skip
        return LlamaConfig(**{**common, **changes})  # type: ignore[arg-type]

    return {
        "plain": config(),
        "grouped": config(num_key_value_heads=2),
        "tied": config(tie_word_embeddings=True),
        "llama3-rope": config(rope_theta=500.0, rope_scaling=Llama3Rope(4.0, 1.0, 2.0, 8)),
        "qkv-bias": config(model_type="qwen2", attention_bias=True),
        "qk-norm": config(model_type="qwen3", qk_norm=True, head_dim=6, num_key_value_heads=2),
    }


def build(config: LlamaConfig, seed: int) -> tuple[Llama, Tensor, Tensor]:
    """A float64 model, input_ids and labels from NumPy's RandomState, whose numbers never change."""
    random = numpy.random.RandomState(seed)
    model = Llama(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.from_numpy(random.standard_normal(tuple(parameter.shape)))
            parameter.copy_(1 + 0.2 * values if "norm" in name else 0.4 * values)
    input_ids = torch.from_numpy(random.randint(0, config.vocab_size, (BATCH, LENGTH)))
    labels = input_ids.clone()
    labels[0, 3:5] = -100  # in the middle, across the end of a chunk
    labels[1, 9:] = -100  # padding on the right
    return model, input_ids, labels


def record(
    model: Llama, input_ids: Tensor, labels: Tensor, weights: Sequence[Weight | None], prefix: str
) -> dict[str, Tensor]:
    """Algorithms 1 and 2 as in seco.py and spaco.py, keeping every intermediate; leaves `.grad` empty."""
    batch, chunks, options = prepare(model, input_ids, labels, None), cut(input_ids.shape[1], CHUNK_SIZE), Options()
    kept = [(i, chunks[i], weight) for i, weight in enumerate(weights) if weight is not None]
    memory: Any = new_memory(model, input_ids, [chunk for _, chunk, _ in kept], options)
    fill(model, input_ids, chunks[: kept[-1][0]], memory, options)
    out: dict[str, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64)
    for i, chunk, weight in reversed(kept):
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        made = flat(model.run(input_ids[:, span([chunk])], memory, [chunk])[1])  # the last chunk's too
        for n, tensor in enumerate(made):
            where, name = f"{prefix}.chunk.{i}.layer.{n // 2}", ("key", "value")[n % 2]
            relayed = weight.relay * received[n] if received else torch.zeros_like(tensor)
            out[f"{where}.{name}s"], out[f"{where}.{name}_grads"] = tensor.detach().clone(), relayed.clone()
        torch.autograd.backward([weight.loss * loss, *written], [None, *(weight.relay * grad for grad in received)])
        total += weight.loss * loss.detach()
        out[f"{prefix}.chunk.{i}.loss"] = weight.loss * loss.detach()
        out |= {f"{prefix}.chunk.{i}.grad.{name}": grad for name, grad in _gradients(model).items()}
    out[f"{prefix}.loss"] = total
    model.zero_grad(set_to_none=True)
    return out


def _gradients(model: Llama) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def golden(config: LlamaConfig, seed: int) -> dict[str, Tensor]:
    """All tensors of one file, by name."""
    model, input_ids, labels = build(config, seed)
    cos, sin = rope_tables(config, 0, LENGTH, model.model.norm.weight)
    out = {"input_ids": input_ids, "labels": labels, "rope.cos": cos, "rope.sin": sin}
    out |= {f"weights.{name}": p.detach().clone() for name, p in model.named_parameters()}
    out["full.loss"] = full(model, input_ids, labels)
    out |= {f"full.grad.{name}": grad for name, grad in _gradients(model).items()}
    model.zero_grad(set_to_none=True)
    all_chunks = [Weight(1.0, 1.0)] * len(cut(LENGTH, CHUNK_SIZE))
    out |= record(model, input_ids, labels, all_chunks, "seco")
    return out | record(model, input_ids, labels, SPACO, "spaco")


def write_golden(directory: str | Path) -> list[Path]:
    """Write one safetensors file per model into `directory`; returns their paths. Raises InputError."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; golden files need a directory")
    spaco = json.dumps([list(weight) if weight is not None else None for weight in SPACO])
    written = []
    for seed, (name, config) in enumerate(configs().items()):
        metadata = {"format": FORMAT, "config": json.dumps(config.to_dict()), "chunk_size": str(CHUNK_SIZE)}
        path = directory / f"{name}.safetensors"
        write_tensors(path, golden(config, seed), metadata | {"spaco": spaco})
        written.append(path)
    return written
