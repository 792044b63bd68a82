"""`minichunk golden`: every intermediate of SeCO and SpaCO on tiny models, for ports to compare with.

tests/golden/README.md is the page that describes the files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from ..models.pretrained import Pretrained
from ..models.rope import rope_tables
from ..models.ssm import StateSpace
from ..models.ssm_config import StateSpaceConfig
from ..protocol import Options
from ..samplers import Weight
from ..seco import fill, flat, new_memory, rebuild

FORMAT = "minichunk golden 1"
BATCH, LENGTH = 2, 11  # a ragged last chunk


class Case(NamedTuple):
    """A model, how the text is cut, and one draw of SpaCO's; no two of its factors are the same."""

    config: LlamaConfig | StateSpaceConfig
    chunk_size: int = 4
    spaco: tuple[Weight | None, ...] = (None, Weight(1.5, 2.0), Weight(1.25, 3.0))

    def model(self) -> Pretrained:
        return Llama(self.config) if isinstance(self.config, LlamaConfig) else StateSpace(self.config)

    @property
    def written(self) -> Sequence[tuple[str, str]]:
        """The names of what each layer writes, and of what is relayed to it; "": nothing is."""
        if isinstance(self.config, LlamaConfig):
            return ("keys", "key_grads"), ("values", "value_grads")
        return ("state", "adjoint"), ("decay", "")


# A skipped chunk between kept ones, and a kept one after it that relays: the adjoint passes both on its way.
STATE = Case(
    StateSpaceConfig(vocab_size=13, hidden_size=8, state_size=5, num_hidden_layers=3, rms_norm_eps=1e-5),
    chunk_size=3,
    spaco=(Weight(1.5, 2.0), None, Weight(1.25, 3.0), Weight(1.75, 2.5)),
)


def cases() -> dict[str, Case]:
    """One for each file: what the Llamas have in common, and what each has of its own; and a state."""

    def llama(**changes: object) -> Case:
        common = {
            "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4, "rms_norm_eps": 1e-5,
        }  # fmt: skip
        return Case(LlamaConfig(**{**common, **changes}))  # type: ignore[arg-type]

    return {
        "plain": llama(),
        "grouped": llama(num_key_value_heads=2),
        "tied": llama(tie_word_embeddings=True),
        "llama3-rope": llama(rope_theta=500.0, rope_scaling=Llama3Rope(4.0, 1.0, 2.0, 8)),
        "qkv-bias": llama(model_type="qwen2", attention_bias=True),
        "qk-norm": llama(model_type="qwen3", qk_norm=True, head_dim=6, num_key_value_heads=2),
        "state": STATE,
    }


def build(case: Case, seed: int) -> tuple[Pretrained, Tensor, Tensor]:
    """A float64 model, input_ids and labels from NumPy's RandomState, whose numbers never change."""
    random = numpy.random.RandomState(seed)
    model = case.model().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.from_numpy(random.standard_normal(tuple(parameter.shape)))
            parameter.copy_(1 + 0.2 * values if "norm" in name else 0.4 * values)
    input_ids = torch.from_numpy(random.randint(0, case.config.vocab_size, (BATCH, LENGTH)))
    labels = input_ids.clone()
    labels[0, 3:5] = -100  # in the middle, across the end of a chunk
    labels[1, 9:] = -100  # padding on the right
    return model, input_ids, labels


def record(
    case: Case, model: Pretrained, input_ids: Tensor, labels: Tensor, weights: Sequence[Weight | None], prefix: str
) -> dict[str, Tensor]:
    """Algorithms 1 and 2 as in seco.py and spaco.py, keeping every intermediate; leaves `.grad` empty."""
    batch, chunks = prepare(model, input_ids, labels, None), cut(input_ids.shape[1], case.chunk_size)
    options = Options()
    kept = [(i, chunks[i], weight) for i, weight in enumerate(weights) if weight is not None]
    memory: Any = new_memory(model, input_ids, [chunk for _, chunk, _ in kept], options)
    fill(model, input_ids, chunks[: kept[-1][0]], memory, options)
    out: dict[str, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64)
    for i, chunk, weight in reversed(kept):
        with torch.no_grad():  # the last chunk's too
            made = flat(model.run(input_ids[:, span([chunk])], memory, [chunk])[1])
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        received = [weight.relay * grad for grad in received]
        names = [(f"{prefix}.chunk.{i}.layer.{n}", *pair) for n in range(len(model.layers)) for pair in case.written]
        out |= {f"{where}.{name}": tensor for (where, name, _), tensor in zip(names, made, strict=True)}
        passed = [(f"{where}.{name}", m) for (where, _, name), m in zip(names, made, strict=True) if name]
        relayed = received or [torch.zeros_like(tensor) for _, tensor in passed]
        out |= {name: grad.clone() for (name, _), grad in zip(passed, relayed, strict=True)}
        torch.autograd.backward([weight.loss * loss, *written], [None, *received])
        total += weight.loss * loss.detach()
        out[f"{prefix}.chunk.{i}.loss"] = weight.loss * loss.detach()
        out |= {f"{prefix}.chunk.{i}.grad.{name}": grad for name, grad in _gradients(model).items()}
    out[f"{prefix}.loss"] = total
    model.zero_grad(set_to_none=True)
    return out


def _gradients(model: Pretrained) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def golden(case: Case, seed: int) -> dict[str, Tensor]:
    """All tensors of one file, by name."""
    model, input_ids, labels = build(case, seed)
    out = {"input_ids": input_ids, "labels": labels}
    if isinstance(case.config, LlamaConfig):
        out["rope.cos"], out["rope.sin"] = rope_tables(case.config, 0, LENGTH, next(model.parameters()))
    out |= {f"weights.{name}": p.detach().clone() for name, p in model.named_parameters()}
    out["full.loss"] = full(model, input_ids, labels)
    out |= {f"full.grad.{name}": grad for name, grad in _gradients(model).items()}
    model.zero_grad(set_to_none=True)
    all_chunks = [Weight(1.0, 1.0)] * len(cut(LENGTH, case.chunk_size))
    out |= record(case, model, input_ids, labels, all_chunks, "seco")
    return out | record(case, model, input_ids, labels, case.spaco, "spaco")


def write_golden(directory: str | Path) -> list[Path]:
    """Write one safetensors file per model into `directory`; returns their paths. Raises InputError."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; golden files need a directory")
    written = []
    for seed, (name, case) in enumerate(cases().items()):
        draw = [list(weight) if weight is not None else None for weight in case.spaco]
        metadata = {
            "format": FORMAT,
            "config": json.dumps(case.config.to_dict()),
            "chunk_size": str(case.chunk_size),
            "spaco": json.dumps(draw),
        }
        path = directory / f"{name}.safetensors"
        write_tensors(path, golden(case, seed), metadata)
        written.append(path)
    return written
