"""The shape of a state-space model, or of a hybrid."""

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
)
from .config import LlamaConfig

MODEL_TYPE = "state_space"
KINDS = ("state", "full_attention")
_SIZES = ("vocab_size", "hidden_size", "state_size", "num_hidden_layers", "max_position_embeddings")
_NUMBERS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_ATTENTION = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class StateSpaceConfig:
    """Shape and constants of a StateSpace; its config.json has the same fields.

    layer_types: "state" or "full_attention" for each layer; empty: all "state". The fields from `intermediate_size` on
    are those of a LlamaConfig, for its attention layers; without one they stay None.
    max_position_embeddings: the length that it was trained at. A state has no bound; rotations, further on, are new.
    """

    vocab_size: int
    hidden_size: int
    state_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...] = ()
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    eos_token_id: int | tuple[int, ...] | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        lists_to_tuples(self)
        check_sizes(vars(self), _SIZES)
        if not self.layer_types:
            object.__setattr__(self, "layer_types", ("state",) * self.num_hidden_layers)
        wrong = [kind for kind in self.layer_types if kind not in KINDS]
        if wrong or len(self.layer_types) != self.num_hidden_layers:
            raise InputError(
                f"config: layer_types is {list(self.layer_types)}, but must be {' or '.join(map(repr, KINDS))} for "
                f"each of the {self.num_hidden_layers} layers"
            )
        missing = [name for name in _ATTENTION if getattr(self, name) is None]
        if "full_attention" in self.layer_types and missing:
            raise InputError(f"config: {missing[0]} is missing, which the attention layers need")
        _ = self.attention  # checks its fields

    @property
    def attention(self) -> LlamaConfig | None:
        """The attention layers', if there are any."""
        if "full_attention" not in self.layer_types:
            return None
        names = {field.name for field in fields(LlamaConfig)} & {field.name for field in fields(self)}
        return LlamaConfig(**{name: getattr(self, name) for name in names - {"layer_types"}})

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> StateSpaceConfig:
        """From a parsed `config.json`. Raises InputError, naming the field."""
        check_model_type(config, MODEL_TYPE)
        check_present(config, _SIZES[:-1])
        names = {field.name for field in fields(cls)}
        known: dict[str, Any] = {name: config[name] for name in names if config.get(name) is not None}
        unknown = config.keys() - names - {"model_type", "torch_dtype", "dtype"}
        if unknown:
            raise InputError(f"config: the field {min(unknown)} is not one of a {MODEL_TYPE} model")
        if not isinstance(known.get("layer_types", []), list):
            raise InputError(f"config: layer_types is {known['layer_types']!r}, but must be a list")
        known |= {"layer_types": tuple(known.get("layer_types", ())), "eos_token_id": end_tokens(config)}
        return cls(**known | {name: number(known, name, default) for name, default in _NUMBERS.items()})

    def first_eos(self) -> int | None:
        """The end token that a written text gets, if there is any."""
        return first_eos(self.eos_token_id)

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` that `from_dict` reads back."""
        return {"model_type": MODEL_TYPE, **asdict(self), "layer_types": list(self.layer_types)}
