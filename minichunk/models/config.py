"""A model's shape, in Hugging Face's terms: checked fields. load.py reads and writes them as config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, get_type_hints

from ..errors import InputError
from ..memory.window import FULL, Pattern, Window


def size(name: str, value: Any) -> int:
    """Raise InputError unless it is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config: {name} is {value!r}, but must be a whole number of at least 1")
    return value


def number(name: str, value: Any) -> float:
    """Raise InputError unless it is a finite number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise InputError(f"config: {name} is {value!r}, but must be a number above 0")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Raise InputError unless it is true or false; null is false."""
    if value not in (True, False, None):
        raise InputError(f"config: {name} is {value!r}, but must be true or false")
    return bool(value)


def names(name: str, value: Any) -> tuple[str, ...]:
    """A list, as JSON has them, or a tuple; null is an empty one."""
    if not isinstance(value, list | tuple | type(None)):
        raise InputError(f"config: {name} is {value!r}, but must be a list")
    return tuple(value or ())


def end_tokens(name: str, value: Any) -> int | tuple[int, ...] | None:
    """Raise InputError unless it is a token id, several, or null."""
    several = value if isinstance(value, list | tuple) else (value or 0,)
    if not all(isinstance(end, int) for end in several):
        raise InputError(f"config: {name} is {value!r}, but must be a token id, a list of them, or null")
    return tuple(value) if isinstance(value, list) else value


# The types of a config's fields, each with its check.
Size = Annotated[int, size]
Number = Annotated[float, number]
Flag = Annotated[bool, flag]
Names = Annotated[tuple[str, ...], names]
EndTokens = Annotated[int | tuple[int, ...] | None, end_tokens]


def check_layer_types(kinds: tuple[str, ...], known: tuple[str, ...], num_layers: int) -> None:
    """Raise InputError unless there is one of the known kinds for each layer."""
    if len(kinds) != num_layers or not set(kinds) <= set(known):
        words = " or ".join(map(repr, known))
        raise InputError(
            f"config: layer_types is {list(kinds)}, but must be {words} for each of the {num_layers} layers"
        )


@dataclass(frozen=True)
class Config:
    """What configs have in common: each field is checked by its type.

    Of the config.json: `only` has more of its fields, and the values of them that the model computes, `beside` what is
    written beside the fields, and `not_written` the fields that it lacks.
    """

    name: ClassVar[str] = ""  # the `model_type`
    only: ClassVar[dict[str, tuple[Any, ...]]] = {}
    beside: ClassVar[dict[str, Any]] = {}
    not_written: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            for check in getattr(kind, "__metadata__", ()):
                object.__setattr__(self, name, check(name, getattr(self, name)))

    if TYPE_CHECKING:  # load.py sets these two: a config knows no files

        @classmethod
        def from_dict(cls, config: dict[str, Any]) -> Self: ...
        def to_dict(self) -> dict[str, Any]: ...

    def first_eos(self) -> int | None:
        """The end token that a written text gets, if there is any; a model may know several."""
        ends = getattr(self, "eos_token_id", None)
        return ends[0] if isinstance(ends, tuple) else ends


@dataclass(frozen=True)
class Llama3Rope:
    """The llama3 rule that slows the low frequencies of RoPE down (Llama 3.1 and later)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


FULL_ATTENTION, SLIDING_ATTENTION, PARTIAL_ATTENTION = "full_attention", "sliding_attention", "partial_attention"


@dataclass(frozen=True)
class LlamaConfig(Config):
    """Shape and constants of a model, with Hugging Face's names.

    Three fields are ours, because `config.json` implies them by `model_type`: `attention_bias` is
    the bias of q, k and v, `attention_out_bias` that of o, `qk_norm` the RMSNorm on each head's
    queries and keys. `layer_types` says for each layer whether it has full_attention or sliding_attention, to the
    last `sliding_window` positions, the own included; or ours, partial_attention: what `pattern` says, then in the
    place of windows. Empty: full_attention for all.
    """

    only: ClassVar = {
        "hidden_act": ("silu", "swish"),
        "attention_dropout": (0, None),
        "partial_rotary_factor": (1.0, None),
    }
    not_written: ClassVar[tuple[str, ...]] = (
        "attention_out_bias",
        "qk_norm",
        "sliding_window",
        "layer_types",
        "pattern",
        "model_type",
    )

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    max_position_embeddings: Size = 2048
    rms_norm_eps: Number = 1e-6
    rope_theta: Number = 10000.0
    rope_scaling: Llama3Rope | None = None
    tie_word_embeddings: Flag = False
    attention_bias: Flag = False
    attention_out_bias: Flag = False
    mlp_bias: Flag = False
    qk_norm: Flag = False
    sliding_window: int | None = None
    layer_types: Names = ()
    pattern: Pattern | None = None
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: EndTokens = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"config: head_dim is {self.head_dim}, but RoPE needs an even number")
        kinds, other = self.layer_types, SLIDING_ATTENTION if self.pattern is None else PARTIAL_ATTENTION
        if kinds or self.pattern is not None or self.sliding_window is not None:
            check_layer_types(kinds, (FULL_ATTENTION, other), self.num_hidden_layers)
        if self.sliding_window is not None or SLIDING_ATTENTION in kinds:
            size("sliding_window", self.sliding_window)
        if self.pattern is not None and other not in kinds:
            raise InputError(f"config: there is a pattern, but layer_types is {list(kinds)}, without any {other!r}")

    def patterns(self) -> list[Pattern]:
        """What the queries of each layer see."""
        kinds = self.layer_types or (FULL_ATTENTION,) * self.num_hidden_layers
        partial = self.pattern or Window(self.sliding_window)
        return [FULL if kind == FULL_ATTENTION else partial for kind in kinds]
