"""A Llama's shape, in Hugging Face's terms."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import InputError
from ..files.config_fields import check_sizes, first_eos, lists_to_tuples
from ..files.config_json import SIZES, check_windows, read_config, write_config
from ..memory.window import FULL, Pattern, Strided, Window


@dataclass(frozen=True)
class Llama3Rope:
    """The llama3 rule that slows the low frequencies of RoPE down (Llama 3.1 and later)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def pattern_of(fields: dict[str, int]) -> Pattern:
    """The pattern that `asdict` made these fields of."""
    return Strided(**fields) if "block" in fields else Window(**fields)


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of a model, with Hugging Face's names.

    Three fields are ours, because `config.json` implies them by `model_type`: `attention_bias` is
    the bias of q, k and v, `attention_out_bias` that of o, `qk_norm` the RMSNorm on each head's
    queries and keys. `layer_types` says for each layer whether it has full_attention or sliding_attention, to the
    last `sliding_window` positions, the own included; or ours, partial_attention: what `pattern` says, then in the
    place of windows. Empty: full_attention for all.
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
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    pattern: Pattern | None = None
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        lists_to_tuples(self)
        check_sizes(vars(self), (*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"))
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"config: head_dim is {self.head_dim}, but RoPE needs an even number")

        check_windows(asdict(self))
        if self.sliding_window is not None and not self.layer_types:
            raise InputError(
                f"config: sliding_window is {self.sliding_window}, but layer_types is empty: it must say which layers "
                "have 'sliding_attention'"
            )

    def patterns(self) -> list[Pattern]:
        """What the queries of each layer see."""
        kinds = self.layer_types or ("full_attention",) * self.num_hidden_layers
        partial = self.pattern or Window(self.sliding_window)
        return [FULL if kind == "full_attention" else partial for kind in kinds]

    @classmethod
    def from_dict(cls, hugging_face_config: dict[str, Any]) -> LlamaConfig:
        """From a parsed `config.json`. Raises InputError, naming the field, for what this model does not compute."""
        fields = read_config(hugging_face_config)
        scaling, pattern = fields["rope_scaling"], fields["pattern"]
        made = {"rope_scaling": scaling and Llama3Rope(**scaling), "pattern": pattern and pattern_of(pattern)}
        return cls(**fields | made)

    def first_eos(self) -> int | None:
        """The end token that a written text gets, if there is any; a model may know several."""
        return first_eos(self.eos_token_id)

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 and `from_dict` read back to the same model."""
        return write_config(asdict(self))
