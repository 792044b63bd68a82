"""Mamba-2 (arXiv 2405.21060), leaf to root: a scan with one gate per head, behind a short convolution.
Two tensors go from chunk to chunk: the state, and the convolution's last inputs, its *tail*.
Shapes: B batch, T tokens of this call, K kernel of the convolution, E hidden size; H heads of P channels each, in
G groups that share the N numbers of b and of c. Parameter names are Hugging Face's."""

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..memory.layer_memory import MemorySpec, wide
from ..memory.state import Before, Handed, LayerState, scan_chunks
from .config import Config, EndTokens
from .stack import Stack


@dataclass(frozen=True)
class Mamba2Config(Config):
    """Shape and constants of a Mamba2; its config.json has the same fields, and transformers' defaults.
    time_step_limit: the least and the greatest time step. max_position_embeddings: the length that it was trained at,
    a field of ours: a state has no bound."""

    name = "mamba2"
    only: ClassVar = {"hidden_act": ("silu", "swish"), "rms_norm": (True,)}  # each mixer ends with a gated norm
    beside: ClassVar = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "hidden_act": "silu"}

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
    eos_token_id: EndTokens = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        E, H, D, G = self.hidden_size, self.num_heads, self.head_dim, self.n_groups
        if self.expand * E != H * D:
            product = f"expand ({self.expand}) times hidden_size ({E})"
            raise InputError(f"config: num_heads ({H}) times head_dim ({D}) must be {product}")
        if H % G:
            raise InputError(f"config: num_heads ({H}) must be a multiple of n_groups ({G})")
        given: Any = self.time_step_limit
        try:  # JSON has no infinity, which transformers 5 spells {"__float__": "Infinity"}
            limits = tuple(float(limit["__float__"] if isinstance(limit, dict) else limit) for limit in given)
        except (TypeError, ValueError, KeyError):
            limits = ()
        if len(limits) != 2 or not 0 <= limits[0] <= limits[1]:
            raise InputError(f"config: time_step_limit is {given!r}, but must be [least, greatest], from 0 on")
        object.__setattr__(self, "time_step_limit", limits)


class StreamNorm(nn.RMSNorm):
    """RMSNorm of the residual stream, which may be wider than the weights: the result has their dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


class Mixer(nn.Module):
    """h[t] = exp(-A dt[t]) h[t-1] + dt[t] x[t] b[t]ᵀ, y[t] = h[t] c[t] + D x[t] for each head; then a norm, gated by z.
    z, x, b, c and the time step dt are linear in the input; x, b and c go through the convolution."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        E, H, G, N = config.hidden_size, config.num_heads, config.n_groups, config.state_size
        self.heads, self.state_shape = (G, H // G), (G, H // G, config.head_dim, N)
        self.limits, self.kernel = config.time_step_limit, config.conv_kernel
        self.inner, self.outer = H * config.head_dim, G * N  # sizes of x; of b and of c
        channels = self.inner + 2 * self.outer
        self.in_proj = nn.Linear(E, self.inner + channels + H, bias=config.use_bias)
        self.conv1d = nn.Conv1d(channels, channels, self.kernel, groups=channels, bias=config.use_conv_bias)
        # Heads that decay by 1 to H, and time steps of 0.001 to 0.1, which softplus makes of dt_bias.
        self.A_log, self.D = nn.Parameter(torch.arange(1, H + 1).log()), nn.Parameter(torch.ones(H))
        self.dt_bias = nn.Parameter(torch.empty(H).uniform_(math.log(0.001), math.log(0.1)).exp().expm1().log())
        self.norm = nn.RMSNorm(self.inner, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(self.inner, E, bias=config.use_bias)

    def forward(self, u: Tensor, past: Before | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        z, convolved, dt = self.in_proj(u).split([self.inner, self.conv1d.in_channels, self.dt_bias.numel()], dim=-1)
        if past is None:  # the whole sequence at once
            past = Before(self.nothing(u), [u.shape[1]])
        ends, places = list(accumulate(past.lengths)), None
        if past.begins:  # before each document there are K-1 zeros
            places = torch.ones(u.shape[1], dtype=torch.int64)
            places[past.begins] += self.kernel - 1
            places = (places.cumsum(0) - 1).to(u.device)
            ends = [end + (self.kernel - 1) * bisect_left(past.begins, end) for end in ends]
            room = convolved.new_zeros(len(u), ends[-1], convolved.shape[2])
            convolved = room.index_copy(1, places, convolved)
        convolved = torch.cat([past.states[1], convolved], dim=1)  # (B, K-1+T, C), or more
        # The tail at each chunk's end, a copy, for a slice would keep all of them in memory. Its decay is 0: what a
        # short chunk passes on of the tail before it is in its graph, and nothing is left for the memory.
        tails = [(convolved[:, end : end + self.kernel - 1].clone(), u.new_zeros(())) for end in ends]
        convolved = self.conv1d(convolved.mT).mT
        convolved = convolved if places is None else convolved.index_select(1, places)
        y, states = self.scan(F.silu(convolved), dt, past)
        written = tuple(tensor for pairs in zip(states, tails, strict=True) for pair in pairs for tensor in pair)
        gated = (y * F.silu(z.to(y.dtype))).unflatten(-1, (self.heads[0], -1))  # (B, T, G, H/G·P): each has a norm
        y = F.rms_norm(gated, gated.shape[-1:], eps=self.norm.eps).flatten(-2) * self.norm.weight
        return self.out_proj(y.to(u.dtype)), written

    def scan(self, convolved: Tensor, dt: Tensor, past: Before) -> tuple[Tensor, list[Any]]:
        """y (B, T, H·P), and for each chunk the state (B, G, H/G, P, N) at its end with its decay (B, G, H/G, 1, 1)."""
        h = past.states[0]
        x, b, c = convolved.to(h.dtype).split([self.inner, self.outer, self.outer], dim=-1)
        dt = F.softplus(dt.to(h.dtype) + self.dt_bias).clamp(*self.limits)
        x, dt = by_head(x, self.heads), by_head(dt, self.heads)  # (B, G, H/G, T, P) and (B, G, H/G, T, 1)
        b, c = by_head(b, (self.heads[0], 1)), by_head(c, (self.heads[0], 1))  # (B, G, 1, T, N)
        A_log, D = (parameter.to(h.dtype).view(*self.heads, 1, 1) for parameter in (self.A_log, self.D))
        y, states = scan_chunks(x * dt, -A_log.exp() * dt, b, c, h, past)
        return (y + D * x).movedim(-2, 1).flatten(2), states

    def nothing(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Before the first token: the state, float32 at least, and the tail."""
        state = u.new_zeros(u.shape[0], *self.state_shape, dtype=wide(u))
        return state, u.new_zeros(u.shape[0], self.kernel - 1, self.conv1d.in_channels)


def by_head(x: Tensor, heads: tuple[int, int]) -> Tensor:
    """(B, T, C) to (B, *heads, T, C / heads)."""
    return x.unflatten(-1, (*heads, -1)).movedim(1, -2)


class Mamba2Layer(nn.Module):
    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.norm, self.mixer = StreamNorm(config.hidden_size, config.layer_norm_epsilon), Mixer(config)
        self.wide = config.residual_in_fp32

    def forward(self, x: Tensor, past: Before | None, *_: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, written = self.mixer(self.norm(x), past)
        x = x.to(wide(x)) if self.wide else x
        return x + y, written

    def fill(self, x: Tensor, past: Before | None, *_: Any) -> Any:
        return self(x, past)[1]

    def new_memory(self, spec: MemorySpec) -> LayerState:
        """For states and tails at the ends of chunks, and what is sent back to them."""
        state, tail = self.mixer.nothing(spec.like.new_empty(spec.batch, 0, 0))
        handed = [Handed(state, state[..., :1, :1], spec), Handed(tail, tail.new_empty(()), spec)]
        return LayerState(handed, spec.options.documents)


class Mamba2(Stack):
    """A Mamba-2 with the weights' names of Hugging Face's `Mamba2ForCausalLM`."""

    config_class = Mamba2Config
    names = ("backbone", "embeddings", "norm_f")
    unadapted = ("out_proj",)  # PEFT refuses it: transformers' kernels take its weight past the adapter

    def __init__(self, config: Mamba2Config) -> None:
        layers = (Mamba2Layer(config) for _ in range(config.num_hidden_layers))
        super().__init__(config, layers, StreamNorm(config.hidden_size, config.layer_norm_epsilon))
