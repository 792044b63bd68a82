"""A Llama's shape, read from and written to Hugging Face's config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InputError

# What each supported model_type implies where its config.json is silent.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "attention_bias": True, "attention_out_bias": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "qk_norm": True, "head_dim": 128},
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Llama3Rope:
    """The llama3 rule that slows the low frequencies of RoPE down (Llama 3.1 and later)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of a model, with Hugging Face's names.

    Three fields are ours, because `config.json` implies them by `model_type`: `attention_bias` is
    the bias of q, k and v, `attention_out_bias` that of o, `qk_norm` the RMSNorm on each head's
    queries and keys.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"config: {name} is {value!r}, but must be a whole number of at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"config: head_dim is {self.head_dim}, but RoPE needs an even number")

    @classmethod
    def from_dict(cls, hugging_face_config: dict[str, Any]) -> LlamaConfig:
        """Read a parsed `config.json` (the layouts of transformers 4 and 5).

        Raises InputError, naming the field, for whatever this model does not compute.
        """
        c = dict(hugging_face_config)
        model_type = c.get("model_type", "llama")
        if not isinstance(model_type, str) or model_type not in _FAMILIES:
            raise InputError(
                f"config: model_type {model_type!r} is not supported; supported are {', '.join(sorted(_FAMILIES))}"
            )
        family = _FAMILIES[model_type]
        missing = [name for name in _REQUIRED if c.get(name) is None]
        if missing:
            raise InputError(f"config: the field {missing[0]} is missing")
        for name in _REQUIRED:
            _number(c, name)
        _refuse_what_we_do_not_compute(c)
        theta, scaling = _rope(c)
        bias = bool(c.get("attention_bias", False))
        heads = c["num_attention_heads"]
        head_dim = c.get("head_dim") or family.get("head_dim") or c["hidden_size"] // heads
        ends = c.get("eos_token_id")
        ends = tuple(ends) if isinstance(ends, list) else ends
        if not all(isinstance(end, int) for end in (ends if isinstance(ends, tuple) else (ends or 0,))):
            raise InputError(f"config: eos_token_id is {ends!r}, but must be a token id, a list of them, or null")
        return cls(
            **{name: c[name] for name in _REQUIRED},
            num_key_value_heads=c.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_position_embeddings=c.get("max_position_embeddings", 2048),
            rms_norm_eps=_number(c, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(c.get("tie_word_embeddings", False)),
            attention_bias=family.get("attention_bias", bias),
            attention_out_bias=family.get("attention_out_bias", bias),
            mlp_bias=bool(c.get("mlp_bias", False)),
            qk_norm=family.get("qk_norm", False),
            model_type=model_type,
            bos_token_id=c.get("bos_token_id"),
            eos_token_id=ends,
        )

    def first_eos(self) -> int | None:
        """The end token that a written text gets, if there is any; a model may know several."""
        return self.eos_token_id[0] if isinstance(self.eos_token_id, tuple) else self.eos_token_id

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 and `from_dict` read back to the same model."""
        out: dict[str, Any] = {
            "architectures": _FAMILIES[self.model_type]["architectures"],
            "model_type": self.model_type,
            "hidden_act": "silu",
            **{name: getattr(self, name) for name in _REQUIRED},
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
        }
        if self.rope_scaling is not None:
            out["rope_scaling"] = {"rope_type": "llama3", **vars(self.rope_scaling)}
        if self.model_type in ("mistral", "qwen2", "qwen3"):
            out["sliding_window"] = None
        if self.model_type in ("qwen2", "qwen3"):
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


def _rope(c: dict[str, Any]) -> tuple[float, Llama3Rope | None]:
    # transformers 5 keeps rope_theta and the scaling together in rope_parameters.
    field = "rope_parameters" if c.get("rope_parameters") else "rope_scaling"
    rope = c.get(field) or {}
    if not isinstance(rope, dict):
        raise InputError(f"config: {field} is {rope!r}, but must be an object or null")
    theta = _number(rope, "rope_theta", _number(c, "rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f"config: {field}.rope_type {kind!r} is not supported; supported are 'default' and 'llama3'")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for name in names:
        _number(rope, name, where=f"{field}.")
    if rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise InputError(f"config: {field}.high_freq_factor must be larger than {field}.low_freq_factor")
    return theta, Llama3Rope(*(rope[name] for name in names))


def _number(c: dict[str, Any], name: str, default: float | None = None, where: str = "") -> float:
    """A field that must be a finite number above 0; absent: the default, if there is one."""
    value = c.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise InputError(f"config: {where}{name} is {value!r}, but must be a number above 0")
    return float(value)
