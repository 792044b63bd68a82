"""A model's shape, in Hugging Face's terms: fields, each checked by its type, read from and written as config.json."""

from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Self, get_type_hints

from ..errors import InputError
from ..memory.window import FULL, Pattern, Window

EndTokens = int | tuple[int, ...] | None


def several(ends: Any) -> tuple[Any, ...]:
    """End tokens, however a config says them."""
    return tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)


def is_number(x: Any) -> bool:
    return type(x) in (int, float) and 0 < x < float("inf")


# By the type of a field: what it must be, whether it is that, and what is made of it. null is false, or an empty list;
# a negative end token is none: no model writes it.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool], Callable[[Any], Any]]] = {
    int: ("a whole number of at least 1", lambda x: type(x) is int and x >= 1, int),
    float: ("a number above 0", is_number, float),
    bool: ("true or false", lambda x: x in (True, False, None), bool),
    float | None: ("a number above 0, or null", lambda x: x is None or is_number(x), lambda x: x),
    tuple[float, ...]: (
        "a list of numbers above 0",
        lambda x: isinstance(x, list | tuple) and all(map(is_number, x)),
        tuple,
    ),
    tuple[str, ...]: ("a list", lambda x: isinstance(x, list | tuple | None), lambda x: tuple(x or ())),
    EndTokens: (
        "a token id, a list of them, or null",
        lambda x: all(isinstance(end, int) for end in several(x)),
        lambda x: x if x is None or (isinstance(x, int) and x >= 0) else tuple(end for end in several(x) if end >= 0),
    ),
}


def checked(kind: Any, name: str, value: Any) -> Any:
    """The value as a field of this kind, a key of _KINDS, has it. Raises InputError if it is none."""
    must, fits, made = _KINDS[kind]
    if not fits(value):
        raise InputError(f"config: {name} is {value!r}, but must be {must}")
    return made(value)


def check_layer_types(kinds: tuple[str, ...], known: tuple[str, ...], num_layers: int) -> None:
    """Raise InputError unless there is one of the known kinds for each layer."""
    if len(kinds) != num_layers or not set(kinds) <= set(known):
        words = f"{' or '.join(map(repr, known))} for each of the {num_layers} layers"
        raise InputError(f"config: layer_types is {list(kinds)}, but must be {words}")


def needed(config: dict[str, Any], name: str) -> Any:
    """A field of a parsed config.json. Raises InputError if it is absent or null."""
    if config.get(name) is None:
        raise InputError(f"config: the field {name} is missing")
    return config[name]


@dataclass(frozen=True)
class Config:
    """What configs have in common. A field of one of the types in _KINDS is checked by it.
    only: values that the model computes, of more fields of a config.json. beside: what is written beside the fields.
    not_written: fields that are not in it."""

    name: ClassVar[str] = ""  # the `model_type`, where there is but one
    only: ClassVar[dict[str, tuple[Any, ...]]] = {}
    beside: ClassVar[dict[str, Any]] = {}
    not_written: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if kind in _KINDS:
                object.__setattr__(self, name, checked(kind, name, getattr(self, name)))

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a parsed `config.json`. Raises InputError, naming the field, for what the model does not compute."""
        if cls.name and config.get("model_type") != cls.name:
            raise InputError(f"config: model_type is {config.get('model_type')!r}, but must be {cls.name!r}")
        for field in fields(cls):
            if field.default is MISSING:
                needed(config, field.name)
        for name, values in {"quantization_config": (None, {}), "is_causal": (True, None), **cls.only}.items():
            if config.get(name, values[0]) not in values:
                wanted = "absent: load the unquantized checkpoint" if name == "quantization_config" else repr(values[0])
                raise InputError(f"config: {name} = {config[name]!r} is not supported; it must be {wanted}")
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` and, for models of theirs, transformers 4 and 5 read back to the same."""
        values = {name: value for name, value in asdict(self).items() if name not in self.not_written}
        return self.beside | {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}


def first_eos(config: Any) -> int | None:
    """The end token that a written text gets, if there is any; a model may know several."""
    return next(iter(several(getattr(config, "eos_token_id", None))), None)


FULL_ATTENTION, SLIDING_ATTENTION, PARTIAL_ATTENTION = "full_attention", "sliding_attention", "partial_attention"


@dataclass(frozen=True)
class LlamaConfig(Config):
    """Shape and constants of a model, with Hugging Face's names.

    `model_type` implies in a `config.json` what three fields say: `attention_bias` is that of q, k and v, and
    `attention_out_bias` of o; `qk_norm` an RMSNorm on each head's queries and keys. `layer_types` has for each layer
    full_attention, sliding_attention (the last `sliding_window` positions, the own included) or ours in its place,
    partial_attention (what `pattern` says); empty: full_attention for all. `rope_scaling` is a RopeRule of rope.py;
    None: RoPE as first published."""

    only: ClassVar = {"hidden_act": ("silu", "swish"), "attention_dropout": (0, None)}
    not_written = ("attention_out_bias", "qk_norm", "sliding_window", "layer_types", "pattern", "model_type")

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
    rope_scaling: Any = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    pattern: Pattern | None = None
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: EndTokens = None

    def __post_init__(self) -> None:
        super().__post_init__()
        H, G = self.num_attention_heads, self.num_key_value_heads
        if H % G:
            raise InputError(f"config: num_attention_heads ({H}) must be a multiple of num_key_value_heads ({G})")
        if self.head_dim % 2:
            raise InputError(f"config: head_dim is {self.head_dim}, but RoPE needs an even number")
        if self.rope_scaling is not None:
            self.rope_scaling.check(self)
        kinds, other = self.layer_types, SLIDING_ATTENTION if self.pattern is None else PARTIAL_ATTENTION
        if kinds or self.pattern is not None or self.sliding_window is not None:
            check_layer_types(kinds, (FULL_ATTENTION, other), self.num_hidden_layers)
        if self.sliding_window is not None or SLIDING_ATTENTION in kinds:
            checked(int, "sliding_window", self.sliding_window)
        if self.pattern is not None and other not in kinds:
            raise InputError(f"config: there is a pattern, but layer_types is {list(kinds)}, without any {other!r}")

    def patterns(self) -> list[Pattern]:
        """What the queries of each layer see."""
        kinds = self.layer_types or (FULL_ATTENTION,) * self.num_hidden_layers
        partial = self.pattern or Window(self.sliding_window)
        return [FULL if kind == FULL_ATTENTION else partial for kind in kinds]
