"""All decoders of transformers through `mc.wrap`, tiny and random: python -m tests.sweep_wrap [TYPE ...]

Without a type, it writes tutorials/wrapped_models.md. Each runs in a process of its own: some take all memory, or die.
"""

from __future__ import annotations

import resource
import sys
from functools import partial
from multiprocessing import TimeoutError, get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ALL

import minichunk as mc
from minichunk.models.transformers_cache import Run

from .gradients import Tensors
from .rounding import outcome
from .test_wrap import WAYS
from .tiny_transformers import batch, exact, own, tiny_transformer

PAGE = Path(__file__).parents[1] / "tutorials" / "wrapped_models.md"
# Encoders, and what needs more than text; their decoders of text are tried by names of their own.
ELSE = """
bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra ernie
marian mbart megatron-bert mvp pegasus plbart prophetnet rembert roberta roberta-prelayernorm roc_bert roformer xlm
xlm-roberta xlm-roberta-xl xlnet xmod whisper trocr musicgen musicgen_melody moshi reformer emu3 fuyu gemma3 gemma3n
gemma4 gemma4_unified git got_ocr2 mllama llama4 blt phi4_multimodal moss_transcribe_diarize qwen3_5 qwen3_5_moe
dots3_note qwen4_exp gemma4_assistant gemma4_unified_assistant modernbert-decoder
""".split()  # noqa: SIM905
LATENT = {"head_dim": 4, "num_key_value_heads": 4}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 16}
MORE: dict[str, dict[str, Any]] = {
    "axk1": LATENT, "axk2": LATENT, "deepseek_v2": LATENT, "deepseek_v3": LATENT, "deepseek_v32": LATENT,
    "glm4_moe_lite": LATENT, "longcat_flash": LATENT, "youtu": LATENT, "sarvam_mla": LATENT,
    "minicpm3": {**LATENT, "logits_scaling": ...}, "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6}, "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8, "n_groups": 1, "chunk_size": 4},
    "xlstm": {"v_head_dim": ...}, "zamba2": {"num_hidden_layers": 54},
    "gemma4_text": MIXED, "gemma4_unified_text": MIXED, "dots3_note_text": {"num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
}  # fmt: skip
NOTES = {"states": "has states", "layers": "no recompute", "documents": "one document in a row"}
HEAD = """# Models of transformers that `mc.wrap` takes

`python -m tests.sweep_wrap` writes this page. It makes a tiny random model of each type of causal language model that
transformers {version} knows, in float64, and compares loss and all gradients of `mc.seco(mc.wrap(model), ...)` with the
model's own full backpropagation in eager attention: ragged chunks, with and without recompute and a longer fill, and
chunks of a single token. The figure is the largest error of a parameter's gradient, relative to its norm; some models
compute a part in float32 whatever they are told, and have around 1e-7.

"""
STATES = """
A type that has states hands them on from chunk to chunk. SeCO is exact for them. So that what SpaCO learns of what lies
far before a chunk need not pass a coin at each chunk in between, the memory carries the adjoint of a state past them,
as far as a chunk leaves the state as it is: for Gated DeltaNet, Mamba-2 or any other layer that is the share that its
fill finds by autograd, a number for each head, which SeCO does not pay for. Any number keeps SpaCO unbiased. In a toy,
two layers of Gated DeltaNet with gates near 0.998, 6 chunks of 12 tokens and labels in the last one alone, the relative
deviation of the gradient at a rate of 1/4, over all draws, is {0:.1f} without that and {1:.1f} with it. The last inputs
of a short convolution are not carried, and of a state of which nothing is left there is nothing to carry.

Several documents in a row (`starts`) are for types without states that count by the positions that they are told.
"""


def deviation(carries: bool) -> float:
    """Of SpaCO's gradient, relative to the exact one: root mean square over all draws, see STATES."""
    layers = ["linear_attention"] * 2
    model = tiny_transformer("qwen3_next", num_hidden_layers=2, layer_types=layers, mlp_only_layers=[0, 1])
    for layer in model.model.layers:
        net = layer.linear_attn
        net.A_log.data.zero_(), net.dt_bias.data.fill_(-6.2), net.in_proj_ba.weight.data.mul_(0.1)
    (ids, _), wrapped = batch(1, 72), mc.wrap(model)
    labels = ids.index_fill(1, torch.arange(60), -100)
    expected = outcome(model, lambda: mc.seco(wrapped, ids, labels, 12))
    total = {name: x for name, x in expected.items() if name != "loss"}
    got = []
    with patch.object(Run, "carries", Run.carries if carries else lambda *_: False):
        for chance, draw in mc.Bernoulli(1 / 4).outcomes(6):
            step = partial(mc.spaco, wrapped, ids, labels, 12, sampler=lambda *_, draw=draw: draw)
            got.append((chance, outcome(model, step)))
    off = sum(p * float((x[name] - y).norm()) ** 2 for p, x in got for name, y in total.items())
    return (off / sum(float(y.norm()) ** 2 for y in total.values())) ** 0.5


def off(got: Tensors, expected: Tensors) -> float:
    total = sum(float(g.norm()) ** 2 for name, g in expected.items() if name != "loss") ** 0.5
    return max(float((got[name] - x).norm()) / max(float(x.norm()), 1e-6 * total) for name, x in expected.items())


def verdict(model_type: str) -> dict[str, Any]:
    """What is said of the type: `kind`, and an error or a reason."""
    try:
        model, (ids, labels) = tiny_transformer(model_type, **MORE.get(model_type, {})), batch()
        with exact():
            expected = outcome(model, lambda: own(model, ids, labels))
    except Exception as error:  # of whatever library
        return {"kind": "not tried", "why": f"{type(error).__name__}: {error}"}
    try:
        with exact():
            wrapped = mc.wrap(model)
    except mc.InputError as error:
        return {"kind": "refused", "why": str(error).partition("cannot be run in chunks: ")[2]}
    ways = [way for way in [*WAYS, {"chunk_size": 1}] if wrapped.layers or "recompute" not in way]
    with exact():
        errors = [off(outcome(model, lambda way=way: mc.seco(wrapped, ids, labels, **way)), expected) for way in ways]
    one = not wrapped.takes_documents and not wrapped.states
    found = {"states": wrapped.states, "layers": not wrapped.layers, "documents": one}
    notes = [name for name, is_so in found.items() if is_so]
    return {"kind": "right" if max(errors) < 1e-6 else "WRONG", "off": max(errors), "notes": notes}


def in_a_process(model_type: str) -> dict[str, Any]:
    with get_context("fork").Pool(1, resource.setrlimit, (resource.RLIMIT_AS, (8 << 30, 8 << 30))) as pool:
        try:
            return pool.apply_async(verdict, [model_type]).get(400)
        except TimeoutError:  # it may have died, too
            return {"kind": "not tried", "why": "its tiny model takes minutes"}
        except Exception as error:
            return {"kind": "WRONG", "why": f"{type(error).__name__}: {error}"}


def page(found: dict[str, dict[str, Any]]) -> str:
    kinds = {
        kind: [name for name in found if found[name]["kind"] == kind] for kind in ("right", "refused", "not tried")
    }
    lines = [HEAD.format(version=transformers.__version__)]
    for kind, columns in (("right", "off by | remarks"), ("refused", "because")):
        bars = "|---" * (columns.count("|") + 2)
        lines += [f"## {kind.capitalize()}: {len(kinds[kind])}\n", f"| type | {columns} |", f"{bars}|"]
        for name in kinds[kind]:
            notes = "; ".join(NOTES[note] for note in found[name].get("notes", ()))
            said = found[name]["why"] if kind == "refused" else f"{found[name]['off']:.0e} | {notes}"
            lines.append(f"| {name} | {said} |")
        lines += [STATES.format(deviation(False), deviation(True))] if kind == "right" else []
    lines += [f"\n## Not tried: {len(kinds['not tried'])}\n", "The script makes no tiny model in float64 of them:"]
    return "\n".join([*lines, ", ".join(kinds["not tried"]) + ".\n"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    said = {}
    for name in sys.argv[1:] or [name for name in sorted(ALL) if name not in ELSE]:
        said[name] = in_a_process(name)
        print(name, said[name], flush=True)
    if wrong := [name for name in said if said[name]["kind"] == "WRONG"]:
        sys.exit(f"silently wrong, or broken: {', '.join(wrong)}")
    if not sys.argv[1:]:
        PAGE.write_text(page(said))
