"""`minichunk golden`: every intermediate of SeCO and SpaCO on tiny models, for ports to compare with.

tests/golden/README.md is the page that describes the files, cases.py has the models, compare.py compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch import prepare
from ..chunks import cut, span
from ..errors import InputError
from ..files.atomic import write_tensors
from ..full import full
from ..models.llama import Layer, rope_tables
from ..models.stack import Stack
from ..protocol import Options
from ..samplers import Weight
from ..seco import fill, flat, new_memory, rebuild
from .cases import LENGTH, Case, Step, build, cases

FORMAT = "minichunk golden 2"


@contextmanager
def looking_inside(model: Stack) -> Iterator[dict[str, Tensor]]:
    """Yields what forward passes within the block compute on their way, (B, C, ·) each, by the files' names."""
    seen: dict[str, Tensor] = {}

    def keep_input(module: torch.nn.Module, name: str) -> Any:
        return module.register_forward_pre_hook(lambda _, inputs: seen.update({name: inputs[0].detach().clone()}))

    hooks = []
    for n, layer in enumerate(model.layers):
        hooks.append(keep_input(layer, f"layer.{n}.hidden"))
        if isinstance(layer, Layer):
            hooks.append(keep_input(layer.self_attn.o_proj, f"layer.{n}.attention"))
            hooks.append(keep_input(layer.post_attention_layernorm, f"layer.{n}.residual"))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def record(case: Case, step: Step, n: int, weights: Sequence[Weight | None], prefix: str) -> dict[str, Tensor]:
    """Algorithms 1 and 2 as in seco.py and spaco.py on batch n, keeping every intermediate; adds to `.grad`."""
    model, (input_ids, labels) = step.model, step.batches[n]
    batch, chunks = prepare(model, input_ids, labels, step.num_targets), cut(input_ids.shape[1], case.chunk_size)
    options = Options()
    kept = [(i, chunks[i], weight) for i, weight in enumerate(weights) if weight is not None]
    memory: Any = new_memory(model, input_ids, [chunk for _, chunk, _ in kept], options)
    fill(model, input_ids, chunks[: kept[-1][0]], memory, options)
    out: dict[str, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64)
    for i, chunk, weight in reversed(kept):
        where = f"{prefix}.chunk.{i}"
        with torch.no_grad(), looking_inside(model) as seen:
            hidden, all_written = model.run(input_ids[:, span([chunk])], memory, [chunk])
            out[f"{where}.logits"] = model.lm_head(hidden)
        out |= {f"{where}.{name}": tensor for name, tensor in seen.items()}
        made = flat(all_written)  # the last chunk's too, which `rebuild` leaves out, because nothing is relayed to it
        names = [
            (f"{where}.layer.{layer}", *pair) for layer in range(len(model.layers)) for pair in case.written(layer)
        ]
        out |= {f"{layer}.{name}": tensor for (layer, name, _), tensor in zip(names, made, strict=True)}
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        received = [weight.relay * grad for grad in received]
        passed = [(f"{layer}.{name}", m) for (layer, _, name), m in zip(names, made, strict=True) if name]
        relayed = received or [torch.zeros_like(tensor) for _, tensor in passed]
        out |= {name: grad.clone() for (name, _), grad in zip(passed, relayed, strict=True)}
        torch.autograd.backward([weight.loss * loss, *written], [None, *received])
        total += weight.loss * loss.detach()
        out[f"{where}.loss"] = weight.loss * loss.detach()
        out |= {f"{where}.grad.{name}": grad for name, grad in _gradients(model).items()}
    return out | {f"{prefix}.loss": total}


def _gradients(model: Stack) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def golden(case: Case) -> dict[str, Tensor]:
    """All tensors of one file, by name."""
    step = build(case)
    model, numbers = step.model, range(len(step.batches))
    out = {f"masks.{name}": mask for name, mask in step.masks.items()}
    for n, (input_ids, labels) in enumerate(step.batches):
        out |= {f"{_of(n)}input_ids": input_ids, f"{_of(n)}labels": labels}
    if case.attention is not None:
        out["rope.cos"], out["rope.sin"] = rope_tables(case.attention, 0, LENGTH, next(model.parameters()))
    out |= {f"weights.{name}": p.detach().clone() for name, p in model.named_parameters()}
    losses = [full(model, *batch, num_targets=step.num_targets) for batch in step.batches]
    out["full.loss"] = torch.stack(losses).sum()
    out |= {f"full.grad.{name}": grad for name, grad in _gradients(model).items()}
    every_chunk = [Weight(1.0, 1.0)] * len(cut(LENGTH, case.chunk_size))
    for method, weights in (("seco", every_chunk), ("spaco", case.spaco)):
        model.zero_grad(set_to_none=True)
        for n in numbers:
            out |= record(case, step, n, weights, f"{_of(n)}{method}")
    return out


def _of(n: int) -> str:
    """The prefix of the names of batch n."""
    return "second." * n


def metadata(name: str, case: Case) -> dict[str, str]:
    """What a port must know beside the tensors; numbers and lists as JSON."""
    out = {
        "format": FORMAT,
        "case": name,
        "config": case.config.to_dict(),
        "chunk_size": case.chunk_size,
        "num_targets": build(case).num_targets,
        "spaco": [list(weight) if weight is not None else None for weight in case.spaco],
        "rounding": case.rounding,
    }
    out |= {"sinks": case.sinks} if case.sinks else {}
    out |= {"lora": case.lora._asdict()} if case.lora is not None else {}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in out.items()}


def write_golden(directory: str | Path) -> list[Path]:
    """Write one safetensors file per model into `directory`; returns their paths. Raises InputError."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; golden files need a directory")
    written = []
    for name, case in cases().items():
        path = directory / f"{name}.safetensors"
        write_tensors(path, golden(case), metadata(name, case))
        written.append(path)
    return written
