"""Hugging Face's config.json of the Llama family, read into the fields of a LlamaConfig and written from them."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from .config_fields import check_present, end_tokens, number

# What each supported model_type implies where its config.json is silent.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "attention_bias": True, "attention_out_bias": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "qk_norm": True, "head_dim": 128},
}
_OTHERS = ("mamba2", "state_space")  # which have a config of their own
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

_WRITTEN = (
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "bos_token_id",
)  # fmt: skip


def read_config(hugging_face_config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a LlamaConfig, by name, from a parsed `config.json` (the layouts of transformers 4 and 5).

    Raises InputError, naming the field, for whatever the model does not compute.
    """
    c = dict(hugging_face_config)
    model_type = c.get("model_type", "llama")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise InputError(
            f"config: model_type {model_type!r} is not supported; supported are {', '.join(sorted(_FAMILIES))}, and "
            f"by minichunk.load_model also {' and '.join(_OTHERS)}"
        )
    family = _FAMILIES[model_type]
    check_present(c, SIZES)
    for name in SIZES:
        number(c, name)
    _refuse_what_we_do_not_compute(c)
    theta, scaling = _rope(c)
    bias = bool(c.get("attention_bias", False))
    heads = c["num_attention_heads"]
    head_dim = c.get("head_dim") or family.get("head_dim") or c["hidden_size"] // heads
    return dict(
        **{name: c[name] for name in SIZES},
        num_key_value_heads=c.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_position_embeddings=c.get("max_position_embeddings", 2048),
        rms_norm_eps=number(c, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(c.get("tie_word_embeddings", False)),
        attention_bias=family.get("attention_bias", bias),
        attention_out_bias=family.get("attention_out_bias", bias),
        mlp_bias=bool(c.get("mlp_bias", False)),
        qk_norm=family.get("qk_norm", False),
        model_type=model_type,
        bos_token_id=c.get("bos_token_id"),
        eos_token_id=end_tokens(c),
    )


def write_config(fields: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` that transformers 4 and 5 and `read_config` read back to the same fields."""
    ends = fields["eos_token_id"]
    out: dict[str, Any] = {
        "architectures": _FAMILIES[fields["model_type"]]["architectures"],
        "model_type": fields["model_type"],
        "hidden_act": "silu",
        **{name: fields[name] for name in (*SIZES, *_WRITTEN)},
        "eos_token_id": list(ends) if isinstance(ends, tuple) else ends,
    }
    if fields["rope_scaling"] is not None:
        out["rope_scaling"] = {"rope_type": "llama3", **fields["rope_scaling"]}
    if fields["model_type"] in ("mistral", "qwen2", "qwen3"):
        out["sliding_window"] = None
    if fields["model_type"] in ("qwen2", "qwen3"):
        out["use_sliding_window"] = False
    return out


def _refuse_what_we_do_not_compute(c: dict[str, Any]) -> None:
    def refuse(field: str, wanted: str) -> None:
        raise InputError(f"config: {field} = {c[field]!r} is not supported; it must be {wanted}")

    if c.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "'silu'")
    if c.get("quantization_config"):
        refuse("quantization_config", "absent: load the unquantized checkpoint")
    if c.get("attention_dropout"):
        refuse("attention_dropout", "0")
    if c.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("partial_rotary_factor", "1.0")
    if c.get("model_type") == "mistral":  # transformers takes an absent window as one of 4096
        c.setdefault("sliding_window", 4096)
    if c.get("use_sliding_window", c.get("model_type") == "mistral") and c.get("sliding_window") is not None:
        refuse("sliding_window", "null: every layer here attends to the whole past")
    kinds = c.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        refuse("layer_types", "'full_attention' for every layer")


def _rope(c: dict[str, Any]) -> tuple[float, dict[str, float] | None]:
    # transformers 5 keeps rope_theta and the scaling together in rope_parameters.
    field = "rope_parameters" if c.get("rope_parameters") else "rope_scaling"
    rope = c.get(field) or {}
    if not isinstance(rope, dict):
        raise InputError(f"config: {field} is {rope!r}, but must be an object or null")
    theta = number(rope, "rope_theta", number(c, "rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f"config: {field}.rope_type {kind!r} is not supported; supported are 'default' and 'llama3'")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for name in names:
        number(rope, name, where=f"{field}.")
    if rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise InputError(f"config: {field}.high_freq_factor must be larger than {field}.low_freq_factor")
    return theta, {name: rope[name] for name in names}
