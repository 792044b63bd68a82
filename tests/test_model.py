"""The model against transformers, for every supported architecture; and its config."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import minichunk as mc
from minichunk.models.config import EndTokens
from minichunk.models.load import read_model_config
from minichunk.models.partial import partial_config
from minichunk.models.rope import RopeRule

from .gradients import Tensors, take_gradients
from .rounding import exactly, measure, outcome
from .strategies import build, tiny, tiny_state

ROOT = Path(__file__).parents[1]
BASE: dict[str, Any] = {
    "vocab_size": 23, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.3,
    "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "rope_theta": 500.0,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 1.2, 1.5, 2], "long_factor": [1.0, 3.0, 5.5, 8.0],
    "original_max_position_embeddings": 32,
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWS = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9}
MIXED = [SLIDING, FULL, SLIDING]
MAMBA = {"model_type": "mamba2", "state_size": 3, "num_heads": 12, "head_dim": 4, "n_groups": 2, "eos_token_id": None}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama 3.1": {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "llama, linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama, dynamic": {  # a text longer than the model's context
        "model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 40,
    },
    "qwen2, yarn": {"model_type": "qwen2", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "qwen3, yarn with all its fields": {"model_type": "qwen3", "head_dim": 8, "rope_parameters": YARN},
    "mistral, longrope": {"model_type": "mistral", "sliding_window": None, "head_dim": 8, "rope_parameters": LONG},
    "mistral, longrope, short": {
        "model_type": "mistral", "sliding_window": 9, "head_dim": 8,
        "rope_scaling": {**LONG, "original_max_position_embeddings": 60, "attention_factor": 1.3},
    },
    "llama, proportional": {
        "model_type": "llama", "head_dim": 8,
        "rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
    },
    "llama, one head group": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen3, biases": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    "mistral, window": {"model_type": "mistral", "sliding_window": 7},
    "mistral, window of one": {"model_type": "mistral", "sliding_window": 1},
    "ministral": {"model_type": "ministral", "head_dim": 4, "sliding_window": 9, "layer_types": MIXED},
    "ministral, all alike": {"model_type": "ministral", "head_dim": 4, "sliding_window": 12},
    "qwen2, windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen2, windows by layer": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 10, "layer_types": MIXED,
    },
    "qwen3, windows": {
        "model_type": "qwen3", "head_dim": 8, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0,
    },
    "mamba2": {**MAMBA, "pad_token_id": None, "bos_token_id": 5},
    "mamba2, tied": {
        **MAMBA, "tie_word_embeddings": True, "use_conv_bias": False, "use_bias": True, "conv_kernel": 3,
        "residual_in_fp32": False, "time_step_limit": (0.1, float("inf")), "eos_token_id": (3, 4),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parity_with_transformers(name: str, tmp_path: Path) -> None:
    """Our checkpoint in their model and theirs in ours: same logits, loss and gradients, in float64."""
    transformers = pytest.importorskip("transformers")
    ours = build(read_model_config({**BASE, **ARCHITECTURES[name]}), seed=0)
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float64, attn_implementation="eager"
    )
    ids = torch.randint(23, (2, 50), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 5:9] = -100

    def expected() -> Tensors:
        logits = ours(ids)
        return {"logits": logits.detach(), **outcome(ours, lambda: mc.full(ours, ids, labels))}

    exact = measure(expected)
    found = theirs(input_ids=ids, labels=labels)
    found.loss.backward()
    got = {"logits": found.logits, "loss": found.loss.detach(), **take_gradients(theirs)}
    exact.check(got, unit=2.0**-24)  # their norms and rotary tables work in float32, whatever the model's dtype
    exact.check({"logits": ours(ids), **outcome(ours, lambda: mc.seco(ours, ids, labels, 7))})

    prompt = ids[:, :12]
    keywords = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    # With their cache, a window of one keeps everything, and time_step_limit is left out.
    keywords["use_cache"] = name not in ("mistral, window of one", "mamba2, tied")
    written = theirs.eval().generate(prompt, max_new_tokens=20, **keywords)
    assert torch.equal(mc.generate(ours, prompt, 20, temperature=0, chunk_size=5), written)

    # Their files, whole and in shards; config.json in the layout of transformers 5 and in the older one.
    for name, keywords in (("theirs", {}), ("sharded", {"max_shard_size": "8KB"})):
        theirs.save_pretrained(tmp_path / name, **keywords)
        again = mc.load_model(tmp_path / name)
        assert again.config == ours.config
        assert (again.lm_head.weight is again.embedding.weight) == again.config.tie_word_embeddings
        torch.testing.assert_close(again(ids), ours(ids), rtol=0, atol=0)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    old, new = (json.loads((tmp_path / which / "config.json").read_text()) for which in ("ours", "sharded"))
    assert not isinstance(ours, mc.Llama) or ("rope_theta" in old and "rope_parameters" in new)


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": BASE, "state": tiny_state("sas").to_dict(),
    "mamba2": {**read_model_config({**BASE, **MAMBA}).to_dict(), "chunk_size": 256, "rms_norm": True},
    "partial": partial_config(tiny(3), mc.Window(4, 3)).to_dict(),
}  # fmt: skip
WRONG: dict[Any, tuple[Any, ...]] = {  # by the type of a field
    int: (-1, 2.5, "8", True), float: (0, "x", None), bool: ("yes", 2), tuple[str, ...]: (5, "state"), EndTokens: ("x",)
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_of_a_config_is_checked_and_named(kind: str) -> None:
    config = read_model_config(CONFIGS[kind])
    types = get_type_hints(type(config))
    for name in CONFIGS[kind].keys() & types.keys() - {*config.not_written}:
        for wrong in WRONG.get(types[name], ()):
            with pytest.raises(mc.InputError, match=f"{name} is {wrong!r}, but must be"):
                read_model_config({**CONFIGS[kind], name: wrong})
    with pytest.raises(mc.InputError, match=r"model_type (is )?'gpt2'"):
        type(config).from_dict({**CONFIGS[kind], "model_type": "gpt2"})


UNSUPPORTED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "llama": [
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "ministral", "sliding_window": None, "layer_types": [SLIDING] * 3}, "sliding_window is None"),
        ({"model_type": "qwen2", "layer_types": [SLIDING] * 3}, "sliding_window is None"),
        ({"model_type": "mistral", "layer_types": [SLIDING, FULL, FULL]}, "'mistral'; take 'ministral'"),
        ({"use_sliding_window": True, "sliding_window": 9}, "sliding_window = 9"),
        ({"model_type": "qwen3", "layer_types": [FULL, SLIDING]}, "layer_types is .* for each of the 3 layers"),
        ({"layer_types": [FULL, FULL, SLIDING], "sliding_window": 3}, "not supported for model_type 'llama'"),
        ({"model_type": "qwen3", "layer_types": [FULL, FULL, "chunked_attention"]}, "layer_types is .*chunked"),
        ({**WINDOWS, "max_window_layers": "2"}, "max_window_layers is '2'"),
        ({"rope_scaling": {"rope_type": "axial"}}, "rope_scaling.rope_type 'axial' is not supported; .*yarn, longrope"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, r"rope_parameters.rope_type \['linear'\]"),
        ({"rope_parameters": {"rope_type": "linear"}}, "the field factor is missing"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "high_freq_factor is 4.0, but must be above low_freq"),
        ({"rope_scaling": {**LONG, "long_factor": [1.0, 2.0]}}, "short_factor has 4 numbers, but must have 2"),
        ({"rope_scaling": {**LONG, "long_factor": [1.0, "x"]}}, r"long_factor is \[1.0, 'x'\]"),
        ({"rope_scaling": {**YARN, "attention_factor": "x"}}, "attention_factor is 'x'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim 2, .* turn 4 numbers"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "su"}}, "rope_scaling.rope_type 'su'"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": LLAMA3}, "rope_scaling and rope_parameters do not"),
        ({"rope_parameters": {FULL: {"rope_theta": 5e5}}}, "rope_parameters is .* the same for all layers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "rotary_factor is 0.25 and head_dim 4, .* turn 4"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5 .* must be at most 1"),
        ({"is_causal": False}, "is_causal = False"),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) must be a multiple of num_key_value_heads \(4\)"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"rope_scaling": {**LLAMA3, "factor": 0}}, "factor is 0, but must be a number"),
        ({"layer_types": 5}, "layer_types"),
    ],
    "state": [
        ({"state_size": None}, "the field state_size is missing"),
        ({"layer_types": ["state"]}, r"layer_types is \['state'\], but must be .* for each of the 3 layers"),
        ({"layer_types": ["state", "state", "conv"]}, "layer_types is .*'conv'.*'state' or 'full_attention'"),
        ({"head_dim": None}, "head_dim is None, but must be a whole number"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple"),
        ({"state_sise": 4}, "the field state_sise is not one of a state_space model"),
    ],
    "mamba2": [
        ({"n_groups": 5}, r"num_heads \(12\) must be a multiple of n_groups \(5\)"),
        ({"head_dim": 5}, r"num_heads \(12\) times head_dim \(5\) must be expand \(2\) times hidden_size \(24\)"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; it must be 'silu'"),
        ({"rms_norm": False}, "rms_norm = False is not supported; it must be True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* must be absent"),
        ({"time_step_limit": [0.3, 0.1]}, r"time_step_limit is \[0.3, 0.1\], but must be .least, greatest."),
        ({"time_step_limit": 3}, "time_step_limit is 3, but must be .least, greatest."),
    ],
    "partial": [
        ({"base_model_type": None}, "base_model_type None is not supported"),
        ({"pattern": None}, "the field pattern is missing"),
        ({"layer_types": None}, "the field layer_types is missing"),
        ({"pattern": {"window": 4}}, "must have window and sinks, or block, local and stride"),
        ({"pattern": {"window": 0, "sinks": 1}}, "window is 0"),
        ({"pattern": {"window": 4, "sinks": -1}}, "sinks is -1"),
        ({"pattern": {"block": 4, "local": 2, "stride": "2"}}, "stride is '2'"),
        ({"layer_types": [FULL, SLIDING, FULL]}, "or 'partial_attention'"),
        ({"layer_types": []}, r"layer_types is \[\], but must be .* or 'partial_attention' for each of the 3 layers"),
        ({"layer_types": [FULL] * 3}, "without any 'partial_attention'"),
        ({"model_type": "ministral"}, "or 'sliding_attention'"),
    ],
}


@pytest.mark.parametrize(("kind", "row"), [(kind, row) for kind, rows in UNSUPPORTED.items() for row in rows])
def test_unsupported_configs_name_the_field(kind: str, row: tuple[dict[str, Any], str]) -> None:
    with pytest.raises(mc.InputError, match=row[1]):
        read_model_config({**CONFIGS[kind], **row[0]})


@pytest.mark.parametrize("rope", [LLAMA3, YARN, LONG, {"rope_type": "default", "partial_rotary_factor": 0.5}])
def test_the_two_layouts_of_rope_are_the_same(rope: dict[str, Any]) -> None:
    old = {**BASE, "head_dim": 8, "rope_theta": 500.0, "rope_scaling": rope}
    new = {**BASE, "head_dim": 8, "rope_parameters": {"rope_theta": 500.0, **rope}}
    older = {**old, "rope_scaling": {**rope, "type": rope["rope_type"], "rope_type": rope["rope_type"]}}
    read = mc.LlamaConfig.from_dict(old)
    assert read == mc.LlamaConfig.from_dict(new) == mc.LlamaConfig.from_dict(older)
    assert mc.LlamaConfig.from_dict(read.to_dict()) == read != mc.LlamaConfig.from_dict({**BASE, "head_dim": 8})


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, YARN])
def test_a_part_of_a_head_is_turned_as_in_their_phi3(rope: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And positions are theirs. Their Llama's own rotation overlooks the part, or breaks; Phi-3 has the same angles."""
    phi3 = pytest.importorskip("transformers.models.phi3.modeling_phi3")
    theirs = pytest.importorskip("transformers.models.llama.modeling_llama")
    monkeypatch.setattr(theirs, "apply_rotary_pos_emb", phi3.apply_rotary_pos_emb)
    monkeypatch.setattr(theirs, "LlamaRotaryEmbedding", phi3.Phi3RotaryEmbedding)
    config = {**BASE, "head_dim": 8, "rope_parameters": {"rope_theta": 50.0, **rope, "partial_rotary_factor": 0.5}}
    ours = build(read_model_config({**config, "model_type": "llama"}), seed=0)
    model = theirs.LlamaForCausalLM(theirs.LlamaConfig(**config, attn_implementation="eager")).double()
    model.load_state_dict(ours.state_dict())
    ids = torch.randint(23, (2, 30), generator=torch.Generator().manual_seed(0))
    positions = torch.randint(0, 5, (2, 30), generator=torch.Generator().manual_seed(1)).cumsum(1)
    exact = exactly(ours, lambda: mc.full(ours, ids, ids, positions=positions))
    loss = model(input_ids=ids, labels=ids, position_ids=positions).loss
    loss.backward()
    exact.check({"loss": loss.detach(), **take_gradients(model)}, unit=2.0**-24)


def test_a_changed_rope_keeps_what_it_does_not_say() -> None:
    model = build(read_model_config({**BASE, **ARCHITECTURES["llama 3.1"]}), seed=0)
    before = model.config
    mc.change_rope(model, {"rope_theta": 8e6})
    assert model.config == replace(before, rope_theta=8e6)
    mc.change_rope(model, {"rope_type": "yarn", "factor": 16})  # of the length that it was first trained on
    assert model.config == replace(
        before, rope_theta=8e6, rope_scaling=RopeRule("yarn", factor=16.0, original_max_position_embeddings=32)
    )
    mc.change_rope(model, {"rope_type": "default"})
    assert model.config == replace(before, rope_theta=8e6, rope_scaling=None)
    again = build(before, seed=0)
    mc.change_rope(again, model.rope)
    assert again.config == model.config
    for wrong, words in ((3, "rope_parameters is 3"), ({"rope_type": "linear"}, "the field factor is missing")):
        with pytest.raises(mc.InputError, match=words):
            mc.change_rope(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(mc.InputError, match="another rope needs a model of the Llama family, not a state_space"):
        mc.change_rope(build(tiny_state(), seed=0), {"rope_theta": 8e6})


def test_a_rope_by_the_length_of_the_text_is_told_it_or_refused() -> None:
    """A chunk alone does not know the length; a loss by position, a text that is written and a whole text do."""
    model = build(read_model_config({**BASE, **ARCHITECTURES["llama, dynamic"]}), seed=0)
    ids = torch.randint(23, (1, 50), generator=torch.Generator().manual_seed(0))
    losses = [losses for _, losses in model.chunk_losses(ids, ids, 8)]
    whole = torch.nn.functional.cross_entropy(model(ids)[0], ids[0], reduction="none")
    torch.testing.assert_close(torch.cat(losses, 1)[0], whole)
    assert mc.generate(model, ids, 2, chunk_size=8).shape == (1, 52)
    with pytest.raises(mc.InputError, match="depends on the length of the whole text"):
        next(model.run_chunks(ids, model.new_memory(1, 50), 8))


@pytest.mark.parametrize(
    ("fields", "window", "kinds"),
    [
        ({"model_type": "mistral"}, 4096, (SLIDING,) * 3),  # absent
        ({"model_type": "mistral", "use_sliding_window": False}, 4096, (SLIDING,) * 3),  # a field that it does not know
        ({"model_type": "mistral", "sliding_window": None}, None, ()),
        ({"model_type": "ministral"}, 4096, (SLIDING,) * 3),
        ({"model_type": "llama", "sliding_window": 9}, None, ()),
        ({"model_type": "qwen2", "sliding_window": 9}, None, ()),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, 4096, (FULL, SLIDING, SLIDING)),
        (WINDOWS, None, ()),  # max_window_layers is 28 where it is absent
        ({**WINDOWS, "layer_types": [FULL, SLIDING, FULL], "max_window_layers": 0}, 9, (FULL, SLIDING, FULL)),
    ],
)
def test_windows_are_read_as_transformers_does(
    fields: dict[str, Any], window: int | None, kinds: tuple[str, ...]
) -> None:
    config = read_model_config({**BASE, **fields})
    assert (config.sliding_window, config.layer_types) == (window, kinds)
    assert read_model_config(config.to_dict()) == config
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**{**BASE, **fields})
    if fields["model_type"] not in ("llama", "mistral"):  # which have no such field
        assert tuple(theirs.layer_types) == (kinds or (FULL,) * 3)
    if fields["model_type"] != "llama":
        assert window in (theirs.sliding_window, None)


def test_pytorch_alone_is_enough_for_tiny_and_for_random_weights() -> None:
    """In a process that has none of the other libraries."""
    script = """
import runpy, sys
import torch
for name in ("numpy", "safetensors", "tokenizers", "tqdm", "transformers"):
    sys.modules[name] = None
runpy.run_module("minichunk.tiny", run_name="__main__")
import minichunk as mc
model = mc.Llama(mc.LlamaConfig(23, 8, 16, 2, 2, 1, 4))
mc.add_lora(model, rank=2)
ids = torch.randint(23, (1, 12))
assert float(mc.seco(model, ids, ids, 4)) > 0 < float(mc.spaco(model, ids, ids, 4, sampler=mc.FixedBudget(2)))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_every_name_of_the_package_is_there() -> None:
    assert set(dir(mc)) == set(mc.__all__)
    assert all(getattr(mc, name) is not None for name in mc.__all__)
    assert callable(mc.seco) and callable(mc.full) and callable(mc.spaco)  # not the modules of these names
    with pytest.raises(AttributeError, match="nothing"):
        _ = mc.nothing
