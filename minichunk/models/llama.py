"""The Llama, leaf to root. Its memory of earlier chunks is an argument; see stack.py for how layers are run.
Shapes: B batch, T tokens of this call, H query heads, G key-value heads, D head size,
E hidden size, V vocabulary. Parameter names are Hugging Face's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory.attention import Past
from ..memory.cache import LayerCache
from ..memory.layer_memory import LayerMemory, MemorySpec, wide
from ..memory.window import FULL, Pattern
from .config import LlamaConfig
from .stack import Stack

Rope = tuple[Tensor, Tensor]  # cos and sin of the angles, (T, D/2) each, or (B, 1, T, D/2)


def periods(size: int, theta: float | Tensor, like: Tensor) -> Tensor:
    """Positions to a radian of each pair of a head of so many numbers: float32 (size / 2), RoPE as first published.
    The power is float64's, rounded: float32's differ in the last bit from machine to machine, and far into a text that
    is an angle. So with sine and cosine."""
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=like.device) / size
    return (theta ** exponents.double()).float()


def rope_tables(config: LlamaConfig, positions: Tensor, like: Tensor, whole: Tensor | None = None) -> Rope:
    """cos and sin of the rotation angles at these positions, int64 (…, T): two (…, T, D/2), or for a part of D.
    whole: the positions of the whole text, for the rules of rope.py that depend on its length; None: nobody told them.
    Angles and results are float32 numbers, found in Hugging Face's order, whatever the model's dtype."""
    if config.rope_scaling is None:
        frequencies, scale = 1.0 / periods(config.head_dim, config.rope_theta, like), 1.0
    else:
        frequencies, scale = config.rope_scaling.frequencies(config, like, whole)
    angles = (positions[..., None].float() * frequencies).double()
    return (angles.cos().float() * scale).to(like.dtype), (angles.sin().float() * scale).to(like.dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """RoPE in Hugging Face's layout: of the first numbers that are turned, i is paired with i + half of them."""
    cos, sin = rope
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)  # (B, H, T, D/2) twice, and D = 0
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class Attention(nn.Module):
    """pattern: what a query sees."""

    def __init__(self, config: LlamaConfig, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern
        E, D = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.groups = D, G
        self.q_proj = nn.Linear(E, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(E, G * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(E, G * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, E, bias=config.attention_out_bias)
        norm = nn.RMSNorm if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(D, config.rms_norm_eps), norm(D, config.rms_norm_eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, H*D) -> (B, H, T, D)

    def keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """What this chunk puts into the cache: keys and values, each (B, G, T, D)."""
        return rotate(self.k_norm(self.heads(self.k_proj(x))), rope), self.heads(self.v_proj(x))

    def forward(self, x: Tensor, past: Past | None, rope: Rope) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q = rotate(self.q_norm(self.heads(self.q_proj(x))), rope)  # (B, H, T, D)
        k, v = self.keys_values(x, rope)
        if past is None:  # the whole sequence at once: ordinary attention, nothing of ours
            mask = self.pattern.mask(q.shape[2], device=q.device)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        else:
            y = past.attend(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2)), (k, v)  # (B, H, T, D) -> (B, T, H*D)


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
    def __init__(self, config: LlamaConfig, pattern: Pattern = FULL) -> None:
        super().__init__()
        self.self_attn = Attention(config, pattern)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, past: Past | None, rope: Rope) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, written = self.self_attn(self.input_layernorm(x), past, rope)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), written

    def fill(self, x: Tensor, past: Past | None, rope: Rope) -> tuple[Tensor, Tensor]:
        """What `forward` writes, and no more."""
        return self.self_attn.keys_values(self.input_layernorm(x), rope)

    def new_memory(self, spec: MemorySpec) -> LayerMemory:
        """For keys and values, as far as the pattern needs them, and the gradients that are sent back to them."""
        attention, grad_dtype = self.self_attn, spec.options.cache_grad_dtype or wide(spec.like)
        shape = (spec.batch, attention.groups, spec.capacity, attention.head_dim)
        what = attention.pattern, spec.options.documents
        return LayerCache(shape, spec.receiving, spec.like, grad_dtype, *what)


class Llama(Stack):
    """A decoder-only transformer: Llama 1-3, Mistral, Ministral, Qwen2, Qwen3; layers may see a part of the past."""

    config_class = LlamaConfig
    takes_positions = True

    def __init__(self, config: LlamaConfig) -> None:
        norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        super().__init__(config, (Layer(config, pattern) for pattern in config.patterns()), norm)

    def shared(self, x: Tensor, positions: Tensor, whole: Tensor | None) -> tuple[Rope]:
        return (rope_tables(self.config, positions, x, whole),)
