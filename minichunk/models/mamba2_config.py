"""The shape of a Mamba-2, in Hugging Face's terms."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import InputError
from ..files.config_fields import (
    check_model_type,
    check_present,
    check_sizes,
    end_tokens,
    first_eos,
    lists_to_tuples,
    number,
    refuse,
    refuse_what_no_model_computes,
)

MODEL_TYPE = "mamba2"
_NEEDED = ("vocab_size", "hidden_size", "state_size", "num_hidden_layers", "num_heads", "head_dim")
_SIZES = (*_NEEDED, "n_groups", "expand", "conv_kernel", "max_position_embeddings")
_NUMBERS = ("layer_norm_epsilon", "initializer_range", "time_step_min", "time_step_max", "time_step_floor")
_FLAGS = ("use_bias", "use_conv_bias", "residual_in_fp32", "rescale_prenorm_residual", "tie_word_embeddings")


@dataclass(frozen=True)
class Mamba2Config:
    """Shape and constants of a Mamba2; its config.json has the same fields, and transformers' defaults.

    time_step_limit: the least and the greatest time step. max_position_embeddings: the length that it was trained at,
    a field of ours: a state has no bound. From `initializer_range` on: how random weights are drawn.
    """

    vocab_size: int
    hidden_size: int
    state_size: int
    num_hidden_layers: int
    num_heads: int
    head_dim: int
    n_groups: int = 8
    expand: int = 2
    conv_kernel: int = 4
    max_position_embeddings: int = 2048
    layer_norm_epsilon: float = 1e-5
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    use_bias: bool = False
    use_conv_bias: bool = True
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2
    initializer_range: float = 0.1
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    rescale_prenorm_residual: bool = False

    def __post_init__(self) -> None:
        lists_to_tuples(self)
        check_sizes(vars(self), _SIZES)
        if self.num_heads * self.head_dim != self.inner_size:
            raise InputError(
                f"config: num_heads ({self.num_heads}) times head_dim ({self.head_dim}) must be expand "
                f"({self.expand}) times hidden_size ({self.hidden_size})"
            )
        if self.num_heads % self.n_groups:
            raise InputError(f"config: num_heads ({self.num_heads}) must be a multiple of n_groups ({self.n_groups})")
        low, high = self.time_step_limit
        if not 0 <= low <= high:
            raise InputError(f"config: time_step_limit is {[low, high]}, but must be [least, greatest], both from 0 on")
        if self.time_step_min > self.time_step_max:
            raise InputError(
                f"config: time_step_min ({self.time_step_min}) must not be above time_step_max ({self.time_step_max})"
            )

    @property
    def inner_size(self) -> int:
        """Of a mixer: that of all heads."""
        return self.expand * self.hidden_size

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Mamba2Config:
        """From a parsed `config.json`. Raises InputError, naming the field, for what this model does not compute."""
        check_model_type(config, MODEL_TYPE)
        check_present(config, _NEEDED)
        refuse_what_no_model_computes(config)
        if not config.get("rms_norm", True):
            refuse(config, "rms_norm", "true: each mixer ends with a gated norm")
        ours = [field for field in fields(cls) if field.name in config]
        known: dict[str, Any] = {field.name: config[field.name] for field in ours}
        for name in _FLAGS:
            if not isinstance(known.get(name, False), bool):
                raise InputError(f"config: {name} is {known[name]!r}, but must be true or false")
        known |= {name: number(known, name) for name in _NUMBERS if name in known}
        if "time_step_limit" in known:
            known["time_step_limit"] = _limits(known["time_step_limit"])
        if "eos_token_id" in known:
            known["eos_token_id"] = end_tokens(config)
        return cls(**known)

    def first_eos(self) -> int | None:
        """The end token that a written text gets, if there is any; a model may know several."""
        return first_eos(self.eos_token_id)

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 and `from_dict` read back to the same model."""
        ends = self.eos_token_id
        return {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": MODEL_TYPE,
            "hidden_act": "silu",
            **asdict(self),
            "time_step_limit": list(self.time_step_limit),
            "eos_token_id": list(ends) if isinstance(ends, tuple) else ends,
        }


def _limits(value: Any) -> tuple[float, float]:
    """`time_step_limit`; JSON has no infinity, which transformers 5 spells {"__float__": "Infinity"}."""
    try:
        low, high = (float(limit["__float__"] if isinstance(limit, dict) else limit) for limit in value)
    except (TypeError, ValueError, KeyError):
        raise InputError(f"config: time_step_limit is {value!r}, but must be a list of two numbers") from None
    return low, high
