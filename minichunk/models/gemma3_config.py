"""The shape of a Gemma 3, in Hugging Face's terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..files.config_fields import check_model_type, check_present, check_sizes, end_tokens, number, refuse
from ..files.config_json import FULL, SIZES, SLIDING
from .config import LlamaConfig

MODEL_TYPE = "gemma3_text"
_NEEDED = (*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
           "query_pre_attn_scalar")  # fmt: skip
_ONLY: dict[str, tuple[Any, ...]] = {  # fields, and the values that this model computes; the first one is written
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_dropout": (0.0, None),
    "use_bidirectional_attention": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}
_DEFAULTS = {  # transformers'
    "head_dim": 256, "sliding_window": 4096, "max_position_embeddings": 131072, "query_pre_attn_scalar": 256,
}  # fmt: skip


@dataclass(frozen=True)
class Gemma3Config(LlamaConfig):
    """A LlamaConfig with two fields more.

    rope_local_base_freq: rope_theta of the layers that see a window. query_pre_attn_scalar: the scores are divided by
    its root, not by that of head_dim.
    """

    qk_norm: bool = True
    model_type: str = MODEL_TYPE
    rope_local_base_freq: float = 10000.0
    query_pre_attn_scalar: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(vars(self), ["query_pre_attn_scalar"])

    @classmethod
    def from_dict(cls, hugging_face_config: dict[str, Any]) -> Gemma3Config:
        """From a parsed `config.json`. Raises InputError, naming the field, for what this model does not compute."""
        c = _DEFAULTS | hugging_face_config
        check_model_type(c, MODEL_TYPE)
        check_present(c, _NEEDED)
        check_sizes(c, ["num_hidden_layers"])
        for field, allowed in _ONLY.items():
            if c.get(field, allowed[0]) not in allowed:
                refuse(c, field, f"{allowed[0]!r}")
        far, near = _theta(c, FULL, "rope_theta", 1e6), _theta(c, SLIDING, "rope_local_base_freq", 1e4)
        every = c.get("sliding_window_pattern") or 6  # by which older files say it
        given = c.get("layer_types") or [SLIDING if (i + 1) % every else FULL for i in range(c["num_hidden_layers"])]
        bias = bool(c.get("attention_bias", False))
        same: dict[str, Any] = {name: c[name] for name in _NEEDED}
        return cls(
            **same,
            bos_token_id=c.get("bos_token_id"),
            rms_norm_eps=number(c, "rms_norm_eps", 1e-6),
            rope_theta=far,
            rope_local_base_freq=near,
            tie_word_embeddings=bool(c.get("tie_word_embeddings", True)),
            attention_bias=bias,
            attention_out_bias=bias,
            layer_types=tuple(given),
            eos_token_id=end_tokens(c),
        )

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 and `from_dict` read back to the same model."""
        ends = self.eos_token_id
        names = (*_NEEDED, "rms_norm_eps", "rope_theta", "rope_local_base_freq", "tie_word_embeddings",
                 "attention_bias", "bos_token_id")  # fmt: skip
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": MODEL_TYPE,
            **{field: allowed[0] for field, allowed in _ONLY.items() if field != "quantization_config"},
            **{name: getattr(self, name) for name in names},
            "layer_types": list(self.layer_types) or [FULL] * self.num_hidden_layers,
            "eos_token_id": list(ends) if isinstance(ends, tuple) else ends,
            "pad_token_id": None,  # absent, it is 0, and that token's embedding learns nothing
        }


def _theta(c: dict[str, Any], kind: str, older: str, default: float) -> float:
    """rope_theta of layers of a kind: in `rope_parameters` (transformers 5), or in a field of its own."""
    rope = (c.get("rope_parameters") or {}).get(kind)
    if rope is None:
        return number(c, older, default)
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"config: rope_parameters.{kind}.rope_type is {rope['rope_type']!r}, but must be 'default'")
    return number(rope, "rope_theta", default, f"rope_parameters.{kind}.")
