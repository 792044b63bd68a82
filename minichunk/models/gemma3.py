"""Gemma 3's text model: a Llama whose layers have norms at both ends, and a rope for each kind of layer.

Parameter names are Hugging Face's.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory.attention import Past
from ..memory.layer_memory import wide
from ..memory.window import FULL, Pattern
from .gemma3_config import Gemma3Config
from .llama import MLP, Attention, Layer, Rope, rope_tables
from .stack import Decoder, RMSNorm


class Norm(RMSNorm):
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


class GeluMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Gemma3Layer(Layer):
    """Called with two ropes: of layers that see all of the past, and of those that see a window."""

    def __init__(self, config: Gemma3Config, pattern: Pattern) -> None:
        nn.Module.__init__(self)
        E, D, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        self.self_attn = Attention(config, pattern)
        self.self_attn.q_norm = Norm(D, eps, math.sqrt(D / config.query_pre_attn_scalar))
        self.self_attn.k_norm = Norm(D, eps)
        self.mlp = GeluMLP(config)
        self.input_layernorm, self.post_attention_layernorm = Norm(E, eps), Norm(E, eps)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = Norm(E, eps), Norm(E, eps)
        self.which = 0 if pattern == FULL else 1

    def forward(self, x: Tensor, past: Past | None, *ropes: Rope) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, written = self.self_attn(self.input_layernorm(x), past, ropes[self.which])
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), written

    def fill(self, x: Tensor, past: Past | None, *ropes: Rope) -> tuple[Tensor, Tensor]:
        return super().fill(x, past, ropes[self.which])


class Gemma3(Decoder):
    """Gemma 3's text model (`model_type` gemma3_text).

    `Gemma3(config)` has random weights; `Gemma3.from_pretrained(directory)` has trained ones.
    """

    config: Gemma3Config
    config_class = Gemma3Config

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__(config, (Gemma3Layer(config, pattern) for pattern in config.patterns()))
        body = self.model
        body.embed_tokens = Embedding(config.vocab_size, config.hidden_size, _weight=body.embed_tokens.weight)
        body.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.tie_weights()

    def shared(self, x: Tensor, start: int) -> tuple[Rope, ...]:
        near = replace(self.config, rope_theta=self.config.rope_local_base_freq)
        return tuple(rope_tables(config, start, start + x.shape[1], x) for config in (self.config, near))
