"""Gemma 3's text model: a Llama whose layers have norms at both ends, and a rope for each kind of layer."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..memory.attention import Past
from ..memory.layer_memory import wide
from ..memory.window import FULL, Pattern
from .config import FULL_ATTENTION, SLIDING_ATTENTION, Config, LlamaConfig, checked, needed
from .llama import Layer, Rope, rope_tables
from .stack import Stack

_DEFAULTS = {"head_dim": 256, "sliding_window": 4096, "max_position_embeddings": 131072, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Gemma3Config(LlamaConfig):
    """A LlamaConfig with two fields more.

    rope_local_base_freq: rope_theta of the layers that see a window. query_pre_attn_scalar: the scores are divided by
    its root, not by that of head_dim.
    """

    name = "gemma3_text"
    only: ClassVar = {
        "hidden_activation": ("gelu_pytorch_tanh",), "attention_dropout": (0, None), "rope_scaling": (None,),
        "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    }  # fmt: skip
    # No `pad_token_id` would be 0, and that token's embedding would learn nothing.
    beside: ClassVar = {"architectures": ["Gemma3ForCausalLM"], "pad_token_id": None}
    not_written: ClassVar[Any] = ("attention_out_bias", "mlp_bias", "qk_norm", "pattern")
    to_dict = Config.to_dict

    qk_norm: bool = True
    model_type: str = "gemma3_text"
    rope_local_base_freq: float = 10000.0
    query_pre_attn_scalar: int = 256

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a parsed `config.json`. Raises InputError, naming the field, for what this model does not compute."""
        c = _DEFAULTS | config  # transformers' defaults
        bias = c.get("attention_bias", False)
        c |= {"qk_norm": True, "attention_bias": bias, "attention_out_bias": bias, "mlp_bias": False, "pattern": None}
        c["rope_theta"] = _theta(c, FULL_ATTENTION, "rope_theta", 1e6)
        c["rope_local_base_freq"] = _theta(c, SLIDING_ATTENTION, "rope_local_base_freq", 1e4)
        every = c.get("sliding_window_pattern") or 6  # by which older files say it
        num_layers = checked(int, "num_hidden_layers", needed(c, "num_hidden_layers"))
        implied = tuple(SLIDING_ATTENTION if (i + 1) % every else FULL_ATTENTION for i in range(num_layers))
        c["layer_types"] = checked(tuple[str, ...], "layer_types", c.get("layer_types")) or implied
        return super(LlamaConfig, cls).from_dict(c)


def _theta(c: dict[str, Any], kind: str, older: str, default: float) -> float:
    """rope_theta of layers of a kind: in `rope_parameters` (transformers 5), or in a field of its own."""
    rope = (c.get("rope_parameters") or {}).get(kind)
    if rope is None:
        return checked(float, older, c.get(older, default))
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"config: rope_parameters.{kind}.rope_type is {rope['rope_type']!r}, but must be 'default'")
    return checked(float, f"rope_parameters.{kind}.rope_theta", rope.get("rope_theta", default))


class Norm(nn.RMSNorm):
    """Scales by `factor` times one more than its weight, in float32 or wider."""

    def __init__(self, size: int, eps: float, factor: float = 1.0) -> None:
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        scale = (1 + self.weight.to(wide(x))) * self.factor
        return F.rms_norm(x.to(wide(x)), scale.shape, scale, self.eps).to(x.dtype)


class Embedding(nn.Embedding):
    """Times the root of its size, rounded as its weight is."""

    def forward(self, input_ids: Tensor) -> Tensor:
        root = torch.tensor(math.sqrt(self.embedding_dim), dtype=self.weight.dtype, device=self.weight.device)
        return super().forward(input_ids) * root


class Gemma3Layer(Layer):
    """Called with two ropes: of layers that see all of the past, and of those that see a window."""

    def __init__(self, config: Gemma3Config, pattern: Pattern) -> None:
        super().__init__(config, pattern)
        E, D, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        self.self_attn.q_norm = Norm(D, eps, math.sqrt(D / config.query_pre_attn_scalar))
        self.self_attn.k_norm = Norm(D, eps)
        self.mlp.activation = partial(F.gelu, approximate="tanh")
        self.input_layernorm, self.post_attention_layernorm = Norm(E, eps), Norm(E, eps)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = Norm(E, eps), Norm(E, eps)
        self.which = 0 if pattern == FULL else 1

    def forward(self, x: Tensor, past: Past | None, *ropes: Rope) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, written = self.self_attn(self.input_layernorm(x), past, ropes[self.which])
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), written


class Gemma3(Stack):
    """Gemma 3's text model (`model_type` gemma3_text).

    `Gemma3(config)` has random weights; `Gemma3.from_pretrained(directory)` has trained ones.
    """

    config_class = Gemma3Config
    embedding_class = Embedding
    takes_positions = True

    def __init__(self, config: Gemma3Config) -> None:
        layers = (Gemma3Layer(config, pattern) for pattern in config.patterns())
        super().__init__(config, layers, Norm(config.hidden_size, config.rms_norm_eps))

    def shared(self, x: Tensor, positions: Tensor, whole: Tensor | None) -> tuple[Rope, ...]:
        near = replace(self.config, rope_theta=self.config.rope_local_base_freq)
        return tuple(rope_tables(config, positions, x, whole) for config in (self.config, near))
