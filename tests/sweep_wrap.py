"""All decoders of transformers through `mc.wrap`, tiny and random: python -m tests.sweep_wrap [TYPE ...]

Without a type, it writes tutorials/wrapped_models.md. Each runs in a process of its own: some take all memory, or die.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ALL

import minichunk as mc

from .gradients import Tensors
from .rounding import outcome
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
WAYS: list[dict[str, Any]] = [
    {"chunk_size": 5},
    {"chunk_size": 5, "recompute": True, "fill_size": 12},
    {"chunk_size": 1},
]
NOTES = {"states": "has states", "layers": "no recompute"}
HEAD = """# Models of transformers that `mc.wrap` takes

`python -m tests.sweep_wrap` writes this page. It makes a tiny random model of each type of causal language model that
transformers {version} knows, in float64, and compares loss and all gradients of `mc.seco(mc.wrap(model), ...)` with the
model's own full backpropagation in eager attention: ragged chunks, with and without recompute and a longer fill, and
chunks of a single token. The figure is the largest error of a parameter's gradient, relative to its norm; some models
compute a part in float32 whatever they are told, and have around 1e-7.

"""
STATES = """
A type that has states hands them on from chunk to chunk. SeCO is exact for them, and pays nothing for it. SpaCO stays
unbiased, but what it learns of what lies far before a chunk has to pass a coin at each chunk in between: the states of
our own models carry it past them, those of wrapped models do not. With a rate of 1/4 and far recall the relative
deviation of the gradient was 36 to 55 in trained toys with Gated DeltaNet, where carrying it by the gates had 3. So
take `seco` for them, or a high rate.
"""


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
    ways = [way for way in WAYS if wrapped.layers or "recompute" not in way]
    with exact():
        errors = [off(outcome(model, lambda way=way: mc.seco(wrapped, ids, labels, **way)), expected) for way in ways]
    found = {"states": wrapped.states, "layers": not wrapped.layers}
    notes = [name for name, is_so in found.items() if is_so]
    return {"kind": "right" if max(errors) < 1e-6 else "WRONG", "off": max(errors), "notes": notes}


def in_a_process(model_type: str) -> dict[str, Any]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        signal.alarm(150)
        try:
            said = verdict(model_type)
        except BaseException as error:
            said = {"kind": "WRONG", "why": f"{type(error).__name__}: {error}"}
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else {"kind": "not tried", "why": "its tiny model takes minutes"}


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
        lines += [STATES] if kind == "right" else []
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
