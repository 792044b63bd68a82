"""The Llama, leaf to root. Its memory of earlier chunks is an argument; see stack.py for how layers are run.

Shapes: B batch, T tokens of this call, H query heads, G key-value heads, D head size,
E hidden size, V vocabulary. Parameter names are Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..chunks import Chunk
from ..memory.attention import Past
from ..memory.cache import LayerCache
from ..memory.layers import LayerMemories, LayerMemory
from ..memory.offload import OffloadedLayer, Stage
from ..protocol import DEFAULTS, Options
from .config import LlamaConfig
from .pretrained import Pretrained
from .rope import Rope, rope_tables, rotate


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        E, D = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        self.q_proj = nn.Linear(E, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(E, G * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(E, G * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, E, bias=config.attention_out_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, H*D) -> (B, H, T, D)

    def keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """What this chunk puts into the cache: keys and values, each (B, G, T, D)."""
        k, v = self.heads(self.k_proj(x)), self.heads(self.v_proj(x))
        if self.qk_norm:
            k = self.k_norm(k)
        return rotate(k, rope), v

    def forward(self, x: Tensor, past: Past | None, rope: Rope) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q = self.heads(self.q_proj(x))  # (B, H, T, D)
        if self.qk_norm:
            q = self.q_norm(q)
        q = rotate(q, rope)
        k, v = self.keys_values(x, rope)
        if past is None:  # the whole sequence at once: ordinary attention, nothing of ours
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = past.attend(q, k, v)
        y = y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H*D)
        return self.o_proj(y), (k, v)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        E, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(E, inner, bias=bias)
        self.up_proj = nn.Linear(E, inner, bias=bias)
        self.down_proj = nn.Linear(inner, E, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, past: Past | None, rope: Rope) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, written = self.self_attn(self.input_layernorm(x), past, rope)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), written

    def writes(self, x: Tensor, past: Past | None, rope: Rope) -> tuple[Tensor, Tensor]:
        """What `forward` writes, and no more."""
        return self.self_attn.keys_values(self.input_layernorm(x), rope)


class Decoder(nn.Module):
    """Everything but the LM head; the name and its parts' names are Hugging Face's."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(Pretrained):
    """A decoder-only transformer: Llama 1-3, Mistral without a window, Qwen2, Qwen3.

    `Llama(config)` has random weights; `Llama.from_pretrained(directory)` has trained ones.
    """

    config: LlamaConfig
    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let embedding and LM head be one parameter, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embed_tokens

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def norm(self) -> RMSNorm:
        return self.model.norm

    def shared(self, x: Tensor, start: int) -> tuple[Rope]:
        return (rope_tables(self.config, start, start + x.shape[1], x),)

    def new_memory(
        self, batch: int, capacity: int, kept: Sequence[Chunk] = (), options: Options = DEFAULTS
    ) -> LayerMemories:
        """Keys and values for `batch` sequences of up to `capacity` positions, and gradients for the kept chunks."""
        G, D, like = self.config.num_key_value_heads, self.config.head_dim, self.norm.weight
        grad_dtype = options.cache_grad_dtype or torch.promote_types(like.dtype, torch.float32)
        layers: list[LayerMemory]
        if options.offload:
            stage = Stage((2, batch, G, D), like, grad_dtype)
            layers = [OffloadedLayer(stage, capacity, kept) for _ in self.layers]
        else:
            layers = [LayerCache((batch, G, capacity, D), kept, like, grad_dtype) for _ in self.layers]
        return LayerMemories(layers, kept)
