"""Writes the golden files of this folder: every intermediate of SeCO and SpaCO on tiny models. See README.md.

python -m tests.golden.write [DIRECTORY]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

import minichunk.models.load  # noqa: F401 - configs are written by it
from minichunk.batch import IGNORE, Batch, Objective, prepare, shift
from minichunk.blocks import Hidden
from minichunk.chunks import Chunk, cut
from minichunk.files.atomic import write_tensors
from minichunk.full import full
from minichunk.losses import dpo, log_probs
from minichunk.memory.window import FULL, Window
from minichunk.models.config import LlamaConfig
from minichunk.models.llama import Attention, Layer, Llama, rope_tables
from minichunk.models.lora import adapters, add_lora
from minichunk.models.rope import RopeRule
from minichunk.models.ssm import StateSpace, StateSpaceConfig
from minichunk.objective import weigh
from minichunk.porting.compare import FORMAT
from minichunk.protocol import Options, flat
from minichunk.samplers import Weight
from minichunk.seco import fill, new_memory, rebuild
from minichunk.spaco import spaco

HERE = Path(__file__).parent
BATCH, LENGTH, CHUNK_SIZE = 2, 11, 3  # a ragged last chunk
# A skipped chunk between kept ones, so that something must not pass it (keys and values) or must (an adjoint). Three
# kept ones, so that chunk 0 hears from two of them: to scale all that has arrived so far shows in what it hears. No two
# factors are the same.
DRAW = (Weight(1.5, 2.0), None, Weight(1.25, 3.0), Weight(1.75, 2.5))
LORA = {"rank": 2, "alpha": 3.0, "targets": ("q_proj", "k_proj", "v_proj"), "dropout": 0.25}


class Case(NamedTuple):
    """One file's model and texts.

    seed: of its numbers. rounding: how many units of rounding, relative to its norm, a tensor is moved by one such unit
    in each step: the worst tensor, measured (tests/test_golden.py). spread: of the weights. sinks: which all queries of
    layers with a window see. batches: of one step. layers_at_once: as `seco` has it.
    dpo: beta, and what every label's log-probability is in the reference; the rows are the chosen answer and the other.
    draw: of SpaCO. share: run their prompt once.
    """

    config: LlamaConfig | StateSpaceConfig
    seed: int
    rounding: float
    spread: float = 0.4
    sinks: int = 0
    lora: dict[str, Any] | None = None
    batches: int = 1
    layers_at_once: int | None = None
    dpo: dict[str, float] | None = None
    draw: tuple[Weight | None, ...] = DRAW
    share: bool = False


def llama(**changes: Any) -> LlamaConfig:
    """What the Llamas have in common, and what one of them has of its own."""
    common = {
        "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return LlamaConfig(**{**common, **changes})


RULE = RopeRule("llama3", factor=4.0, high_freq_factor=2.0, original_max_position_embeddings=8)
SCALED = llama(rope_theta=500.0, rope_scaling=RULE)
NORMED = llama(model_type="qwen3", qk_norm=True, head_dim=6, num_key_value_heads=2)
KINDS = ("sliding_attention", "full_attention", "sliding_attention")
WINDOW = llama(model_type="ministral", num_key_value_heads=2, sliding_window=4, layer_types=KINDS)
STATE = StateSpaceConfig(vocab_size=13, hidden_size=8, state_size=5, num_hidden_layers=3, rms_norm_eps=1e-5)
HYBRID = replace(
    STATE, layer_types=("state", "full_attention", "state"), intermediate_size=12, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4,
)  # fmt: skip
CASES = {  # one for each thing that a port can get wrong by itself
    "plain": Case(llama(), seed=2, rounding=100),
    "grouped": Case(llama(num_key_value_heads=2), seed=1, rounding=100),
    "tied": Case(llama(tie_word_embeddings=True), seed=2, rounding=100),
    "llama3-rope": Case(SCALED, seed=0, rounding=100),
    "qkv-bias": Case(llama(model_type="qwen2", attention_bias=True), seed=4, rounding=200),
    "qk-norm": Case(NORMED, seed=3, rounding=100),
    "window": Case(WINDOW, seed=4, rounding=100, sinks=1),
    "lora": Case(llama(), seed=4, rounding=350, lora=LORA),
    "accumulated": Case(llama(num_hidden_layers=2), seed=1, rounding=150, batches=2),
    "calm": Case(llama(num_hidden_layers=2), seed=0, rounding=20, spread=0.1),
    "state": Case(STATE, seed=0, rounding=700),
    "hybrid": Case(HYBRID, seed=0, rounding=120),
    "blocks": Case(llama(num_key_value_heads=2), seed=2, rounding=100, layers_at_once=1),
    "dpo": Case(llama(num_key_value_heads=2), seed=1, rounding=150, dpo={"beta": 0.5, "reference": -2.5}),
}

TREES = {"tree": CASES["dpo"]._replace(share=True, draw=(*DRAW, None, Weight(2.0, 1.5)))}  # in a row of documents


class Step(NamedTuple):
    """What one file is computed from. batches: input_ids and labels, int64 (B, T) each."""

    model: Llama | StateSpace
    batches: list[tuple[Tensor, Tensor]]
    masks: dict[str, Tensor]

    @property
    def num_targets(self) -> int:
        """Of all batches."""
        return sum(int((shift(labels) != IGNORE).sum()) for _, labels in self.batches)


def build(case: Case) -> Step:
    """A float64 model and its batches from NumPy's RandomState, whose numbers never change.

    The weights are numbers that bfloat16 has, so that ports in any precision begin with the same ones.
    """
    random = numpy.random.RandomState(case.seed)
    model = (Llama if isinstance(case.config, LlamaConfig) else StateSpace)(case.config).double()
    for module in model.modules() if case.sinks else ():
        if isinstance(module, Attention) and module.pattern != FULL:
            module.pattern = Window(case.config.sliding_window, case.sinks)
    if case.lora is not None:
        add_lora(model, **case.lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.from_numpy(random.standard_normal(tuple(parameter.shape)))
            parameter.copy_((1 + 0.2 * values if "norm" in name else case.spread * values).bfloat16())
    batches = []
    for n in range(case.batches):
        input_ids = torch.from_numpy(random.randint(0, case.config.vocab_size, (BATCH, LENGTH)))
        labels = input_ids.clone()
        labels[n, 3:5] = IGNORE  # in the middle, across the end of a chunk
        labels[1 - n, 9 - 3 * n :] = IGNORE  # padding on the right, no two batches alike
        if case.dpo is not None:  # the same prompt
            input_ids[1, :4], labels[:, :4] = input_ids[0, :4], IGNORE
        batches.append((input_ids, labels))
    masks = {}
    for name, layer in adapters(model).items():
        kept = random.random_sample((BATCH, LENGTH, layer.in_features)) >= layer.dropout
        masks[name] = torch.from_numpy(kept / (1 - layer.dropout))

    def given(x: Tensor, name: str, rate: float) -> Tensor:
        """In the place of `DropoutMasks.draw`."""
        start = model.masks.chunks[0].start if model.masks.chunks else 0
        return masks[name][:, start : start + x.shape[1]]

    if masks:
        model.masks.draw = given
    return Step(model, batches, masks)


@contextmanager
def looking_inside(model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yields what forward passes within the block compute on their way, (B, C, ·) each, by the files' names."""
    seen: dict[str, Tensor] = {}

    with ExitStack() as ends:

        def keep_input(module: torch.nn.Module, name: str) -> None:
            hook = module.register_forward_pre_hook(lambda _, inputs: seen.update({name: inputs[0].detach().clone()}))
            ends.callback(hook.remove)

        for n, layer in enumerate(model.layers):
            keep_input(layer, f"layer.{n}.hidden")
            if isinstance(layer, Layer):
                keep_input(layer.self_attn.o_proj, f"layer.{n}.attention")
                keep_input(layer.post_attention_layernorm, f"layer.{n}.residual")
        yield seen


def written_by(case: Case, layer: int) -> Sequence[tuple[str, str]]:
    """The names of what a layer writes, and of what is relayed to it; "": nothing is."""
    if isinstance(case.config, StateSpaceConfig) and case.config.layer_types[layer] == "state":
        return ("state", "adjoint"), ("decay", "")
    return ("keys", "key_grads"), ("values", "value_grads")


def objective(case: Case, labels: Tensor) -> Objective | None:
    return dpo(case.dpo["reference"] * (labels != IGNORE), case.dpo["beta"]) if case.dpo else None


def laid_out(case: Case, step: Step, n: int) -> tuple[Batch, list[Chunk]]:
    """Batch n as it is run, and its chunks."""
    batch = prepare(step.model, *step.batches[n], step.num_targets, share=case.share, chunk_size=CHUNK_SIZE)
    return batch, cut(batch.input_ids.shape[1], CHUNK_SIZE, batch.documents)


def record(case: Case, step: Step, n: int, weights: Sequence[Weight | None], prefix: str) -> dict[str, Tensor]:
    """Algorithms 1 and 2 as in seco.py and spaco.py on batch n, keeping every intermediate; adds to `.grad`."""
    model, (input_ids, labels) = step.model, step.batches[n]
    batch, chunks = laid_out(case, step, n)
    options = Options(positions=batch.positions if case.share else None, documents=batch.documents)
    kept = [(i, chunks[i], weight) for i, weight in enumerate(weights) if weight is not None]
    memory = new_memory(model, batch.input_ids, [chunk for _, chunk, _ in kept], options)
    fill(model, batch.input_ids, chunks[: kept[-1][0]], memory, options)
    out: dict[str, Tensor] = {}
    total = torch.zeros((), dtype=torch.float64)
    if (function := objective(case, labels)) is not None:
        out[f"{prefix}.log_probs"] = log_probs(model, input_ids, labels, CHUNK_SIZE, share=case.share)
        batch, total = weigh(function, batch, out[f"{prefix}.log_probs"])
        factors = batch.factors if batch.tree is None else batch.tree.rows(batch.factors)
        out[f"{prefix}.token_weights"] = F.pad(-factors[:, :-1], (1, 0)) * (labels != IGNORE)
    for i, chunk, weight in reversed(kept):
        where = f"{prefix}.chunk.{i}"
        with torch.no_grad(), looking_inside(model) as seen:
            hidden, all_written = model.run(batch.part([chunk]).input_ids, memory, [chunk], options)
            out[f"{where}.logits"] = model.lm_head(hidden)
        out |= {f"{where}.{name}": tensor for name, tensor in seen.items()}
        made = flat(all_written)  # the last chunk's too, which `rebuild` leaves out, because nothing is relayed to it
        names = [
            (f"{where}.layer.{layer}", *pair) for layer in range(len(model.layers)) for pair in written_by(case, layer)
        ]
        out |= {f"{layer}.{name}": tensor for (layer, name, _), tensor in zip(names, made, strict=True)}
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        received = [weight.relay * grad for grad in received]
        passed = [(f"{layer}.{name}", m) for (layer, _, name), m in zip(names, made, strict=True) if name]
        relayed = received or [torch.zeros_like(tensor) for _, tensor in passed]
        out |= {name: grad.clone() for (name, _), grad in zip(passed, relayed, strict=True)}
        torch.autograd.backward([weight.loss * loss, *written], [None, *received])
        total = total if case.dpo else total + weight.loss * loss.detach()
        out[f"{where}.loss"] = weight.loss * loss.detach()
        out |= {f"{where}.grad.{name}": grad for name, grad in gradients(model).items()}
    return out | {f"{prefix}.loss": total}


def record_blocks(case: Case, step: Step, weights: Sequence[Weight | None], prefix: str) -> dict[str, Tensor]:
    """What a walk through blocks of layers has beside that, watched in blocks.py itself; adds to `.grad`.

    On the way down a gradient takes the place of each block's input: block after block, chunk after chunk, last first.
    """
    model, size, kept = step.model, case.layers_at_once, [i for i, weight in enumerate(weights) if weight is not None]
    grads, keep = list[Tensor](), Hidden.keep

    def watched(hidden: Hidden, chunks: Sequence[Chunk], x: Tensor) -> None:
        if chunks[0] in hidden.parts:
            grads.append(x.clone())
        keep(hidden, chunks, x)

    with patch.object(Hidden, "keep", watched):
        spaco(model, *step.batches[0], CHUNK_SIZE, sampler=lambda *_: weights, layers_at_once=size)
    firsts = range(size, len(model.layers), size)
    names = [f"{prefix}.chunk.{i}.layer.{layer}.hidden_grad" for layer in reversed(firsts) for i in reversed(kept)]
    return dict(zip(names, grads, strict=True))


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def golden(case: Case, step: Step | None = None) -> dict[str, Tensor]:
    """All tensors of one file, by name. step: instead of `build(case)`, in another precision."""
    step = step or build(case)
    model, prefixes = step.model, ["", "second."][: case.batches]
    out = {f"masks.{name}": mask for name, mask in step.masks.items()}
    for of, (input_ids, labels) in zip(prefixes, step.batches, strict=True):
        out |= {f"{of}input_ids": input_ids, f"{of}labels": labels}
    attention = case.config if isinstance(case.config, LlamaConfig) else case.config.attention
    if attention is not None:
        out["rope.cos"], out["rope.sin"] = rope_tables(attention, torch.arange(LENGTH), next(model.parameters()))
    out |= {f"weights.{name}": p.detach().clone() for name, p in model.named_parameters()}
    divisor = None if case.dpo else step.num_targets
    losses = [full(model, *b, num_targets=divisor, objective=objective(case, b[1])) for b in step.batches]
    out["full.loss"] = torch.stack(losses).sum()
    out |= {f"full.grad.{name}": grad for name, grad in gradients(model).items()}
    if case.share:
        row, _ = laid_out(case, step, 0)
        out |= {"row.input_ids": row.input_ids, "row.labels": F.pad(row.targets[:, :-1], (1, 0), value=IGNORE)}
    for method, weights in (("seco", [Weight(1.0, 1.0)] * len(case.draw)), ("spaco", case.draw)):
        model.zero_grad(set_to_none=True)
        for n, of in enumerate(prefixes):
            out |= record(case, step, n, weights, f"{of}{method}")
        out |= record_blocks(case, step, weights, method) if case.layers_at_once else {}
    return out


def metadata(name: str, case: Case) -> dict[str, str]:
    """What a port must know beside the tensors; numbers and lists as JSON."""
    out = {"format": FORMAT, "case": name, "config": case.config.to_dict(), "chunk_size": CHUNK_SIZE}
    out |= {"spaco": [weight and list(weight) for weight in case.draw], "rounding": case.rounding}
    out |= {"num_targets": 1 if case.dpo else build(case).num_targets}
    out |= {"sinks": case.sinks} if case.sinks else {}
    out |= {"layers_at_once": case.layers_at_once} if case.layers_at_once else {}
    out |= {"dpo": case.dpo} if case.dpo else {}
    if case.share:
        row, chunks = laid_out(case, build(case), 0)
        out |= {"starts": row.documents.starts, "trunk": row.documents.trunk, "chunks": chunks}
    out |= {"lora": case.lora} if case.lora is not None else {}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in out.items()}


def write(directory: Path) -> None:
    """Write one safetensors file for each case."""
    for name, case in (CASES | TREES).items():
        write_tensors(directory / f"{name}.safetensors", golden(case), metadata(name, case))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
