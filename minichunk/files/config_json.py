"""Hugging Face's config.json of the Llama family, read into the fields of a LlamaConfig and written from them."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from .config_fields import check_present, check_sizes, end_tokens, number, refuse, refuse_what_no_model_computes

_NO_BIAS = {"attention_bias": False, "attention_out_bias": False, "mlp_bias": False}
# What each supported model_type implies, whatever its config.json says, and where it is silent (head_dim).
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"], **_NO_BIAS},
    "ministral": {"architectures": ["MinistralForCausalLM"], **_NO_BIAS},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], **_NO_BIAS, "attention_bias": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "mlp_bias": False, "qk_norm": True, "head_dim": 128},
}
# Of a model that no other library computes: its base's config.json, with `base_model_type`, `pattern` and layers of
# `partial_attention`, which transformers refuses even where it is told to overlook the type.
PARTIAL_CONTEXT = "partial_context"
_OTHERS = ("gemma3_text", "mamba2", "state_space")  # which have a config of their own
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
    partial = c.get("model_type") == PARTIAL_CONTEXT
    field = "base_model_type" if partial else "model_type"
    model_type = c["model_type"] = c.get(field, None if partial else "llama")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise InputError(
            f"config: {field} {model_type!r} is not supported; supported are {', '.join(sorted(_FAMILIES))}, and "
            f"by minichunk.load_model also {', '.join(_OTHERS)}"
        )
    family = _FAMILIES[model_type]
    check_present(c, (*SIZES, *(("pattern", "layer_types") if partial else ())))
    for name in SIZES:
        number(c, name)
    _refuse_what_we_do_not_compute(c)
    if partial:
        window, kinds = None, _layer_types(c)
        check_windows(c | {"sliding_window": window, "layer_types": kinds})
    else:
        window, kinds = _windows(c)
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
        mlp_bias=family.get("mlp_bias", bool(c.get("mlp_bias", False))),
        qk_norm=family.get("qk_norm", False),
        sliding_window=window,
        layer_types=kinds,
        pattern=c.get("pattern") if partial else None,
        model_type=model_type,
        bos_token_id=c.get("bos_token_id"),
        eos_token_id=end_tokens(c),
    )


def write_config(fields: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` that `read_config` and, unless it has a pattern, transformers 4 and 5 read back to the same."""
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
    if fields["pattern"] is None:
        return out | _written_windows(fields)
    ours = {"model_type": PARTIAL_CONTEXT, "architectures": ["PartialContextForCausalLM"]}
    kinds = list(fields["layer_types"])
    return out | ours | {"base_model_type": fields["model_type"], "pattern": fields["pattern"], "layer_types": kinds}


def _refuse_what_we_do_not_compute(c: dict[str, Any]) -> None:
    refuse_what_no_model_computes(c)
    if c.get("attention_dropout"):
        refuse(c, "attention_dropout", "0")
    if c.get("partial_rotary_factor", 1.0) != 1.0:
        refuse(c, "partial_rotary_factor", "1.0")


FULL, SLIDING, PARTIAL = "full_attention", "sliding_attention", "partial_attention"  # the last one is ours
_WINDOW_FIELDS, _STRIDED_FIELDS = {"window", "sinks"}, {"block", "local", "stride"}
_WINDOW = 4096  # what transformers takes an absent `sliding_window` for


def check_windows(fields: dict[str, Any]) -> None:
    """Raises InputError unless `layer_types` names each layer's attention, and what it needs is there.

    That is `sliding_window`, where it names sliding attention, or the fields of `pattern`.
    """
    window, kinds, pattern = fields["sliding_window"], fields["layer_types"], fields["pattern"]
    other = SLIDING if pattern is None else PARTIAL
    if kinds and (len(kinds) != fields["num_hidden_layers"] or not set(kinds) <= {FULL, other}):
        raise InputError(
            f"config: layer_types is {list(kinds)!r}, but must name {FULL!r} or {other!r} for each of the "
            f"{fields['num_hidden_layers']} layers"
        )
    if pattern is not None:
        check_pattern(pattern)
        if PARTIAL not in kinds:
            raise InputError(f"config: there is a pattern, but layer_types is {list(kinds)!r}, without any {PARTIAL!r}")
    if SLIDING in kinds or window is not None:
        check_sizes({"sliding_window": window}, ["sliding_window"])


def check_pattern(pattern: Any) -> None:
    """Raises InputError unless these are the fields of a pattern."""
    if not isinstance(pattern, dict) or set(pattern) not in (_WINDOW_FIELDS, _STRIDED_FIELDS):
        raise InputError(f"config: pattern is {pattern!r}, but must have window and sinks, or block, local and stride")
    check_sizes(pattern, pattern.keys() - {"sinks"})
    if pattern.get("sinks") != 0:
        check_sizes(pattern, pattern.keys() & {"sinks"})


def _windows(c: dict[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    """`sliding_window` and `layer_types`, as transformers reads them; (None, ()) if no layer has a window."""
    model_type, num_layers, first = c.get("model_type", "llama"), c["num_hidden_layers"], 0
    window = c.get("sliding_window", None if model_type == "llama" else _WINDOW)
    if model_type not in ("mistral", "ministral"):
        window = window if c.get("use_sliding_window") else None
    if model_type in ("qwen2", "qwen3") and window is not None:
        first = c.get("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise InputError(f"config: max_window_layers is {first!r}, but must be a whole number of at least 0")
    implied = tuple(SLIDING if window is not None and i >= first else FULL for i in range(num_layers))
    kinds = _layer_types(c) or implied
    check_windows(c | {"sliding_window": window, "layer_types": kinds, "pattern": None})
    if SLIDING in kinds and model_type == "llama":
        raise InputError(
            f"config: sliding_window = {window!r}, layer_types = {list(kinds)!r}: model_type 'llama' is not supported "
            "with windows; 'ministral' is the same model with them"
        )
    if kinds != implied and model_type == "mistral":
        raise InputError(
            f"config: layer_types = {list(kinds)!r} with sliding_window = {window!r} is not supported for model_type "
            "'mistral', whose layers are alike; 'ministral' is the same model with layers of both kinds"
        )
    return (window, kinds) if SLIDING in kinds else (None, ())


def _layer_types(c: dict[str, Any]) -> tuple[str, ...]:
    given = c.get("layer_types") or ()
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def _written_windows(fields: dict[str, Any]) -> dict[str, Any]:
    """What `_windows` and transformers read back."""
    window, kinds = fields["sliding_window"], list(fields["layer_types"])
    if fields["model_type"] == "llama":
        return {}
    out: dict[str, Any] = {"sliding_window": window}
    if fields["model_type"] != "mistral" and kinds:
        out["layer_types"] = kinds
    if fields["model_type"] in ("qwen2", "qwen3"):
        out["use_sliding_window"] = window is not None
        if window is not None:  # for releases before `layer_types`
            out["max_window_layers"] = kinds.index(SLIDING)
    return out


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
