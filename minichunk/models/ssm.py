"""A selective state-space model: that of adjoint sharding (arXiv 2501.00692, section 3), and hybrids of it.

Shapes: B batch, T tokens of this call, P hidden size, N state size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..memory.layer_memory import MemorySpec, wide
from ..memory.state import Before, Handed, LayerState, scan_chunks
from .llama import Layer, Rope, rope_tables
from .ssm_config import StateSpaceConfig
from .stack import Decoder, RMSNorm


class StateLayer(nn.Module):
    """x + y, where h[t] = A[t] h[t-1] + B[t] u[t], y[t] = C[t] h[t] and u = norm(x).

    The gates A (N numbers in (0, 1), the same for all P channels), B and C (N numbers each) are linear in u.
    """

    def __init__(self, config: StateSpaceConfig) -> None:
        super().__init__()
        P, self.state_size = config.hidden_size, config.state_size
        self.norm = RMSNorm(P, config.rms_norm_eps)
        self.a_proj, self.b_proj, self.c_proj = (nn.Linear(P, self.state_size) for _ in range(3))

    @torch.no_grad()
    def spread_gates(self) -> None:
        """Let the untrained gates remember for 1 to 1,000 tokens: 1 / (1 - A) in even steps of its logarithm."""
        self.a_proj.bias.copy_(torch.logspace(0.1, 3, self.state_size, dtype=torch.float64).sub(1).log())

    def forward(self, x: Tensor, past: Before | None, *_: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        if past is None:  # the whole sequence at once
            past = Before((self.nothing(x),), [x.shape[1]])
        y, written = scan_chunks(*self.terms(x), past.states[0], past.lengths)
        return x + y.to(x.dtype), tuple(tensor for pair in written for tensor in pair)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the recurrence is made of: u (B, T, P), log A, B and C (B, T, N)."""
        u = self.norm(x)
        a, b, c = (project(u).to(wide(u)) for project in (self.a_proj, self.b_proj, self.c_proj))
        return u.to(b.dtype), F.logsigmoid(a), b, c

    def fill(self, x: Tensor, past: Before | None, *shared: Any) -> tuple[Tensor, ...]:
        """What `forward` writes."""
        written: tuple[Tensor, ...] = self(x, past, *shared)[1]
        return written

    def new_memory(self, spec: MemorySpec) -> LayerState:
        """For the states at the ends of chunks, and their adjoints."""
        zero = self.nothing(spec.like.new_empty(spec.batch, 0, self.norm.weight.shape[0]))
        return LayerState([Handed(zero, zero[:, :1], spec)])

    def nothing(self, u: Tensor) -> Tensor:
        """The state (B, P, N) before the first token, in float32 at least: a product of many gates near 1 has no use
        for eight bits."""
        return u.new_zeros(u.shape[0], u.shape[2], self.state_size, dtype=wide(u))


def make_layer(config: StateSpaceConfig, kind: str) -> nn.Module:
    """A layer of one of the kinds of `layer_types`."""
    if kind == "state":
        return StateLayer(config)
    assert config.attention is not None
    return Layer(config.attention)


class StateSpace(Decoder):
    """State-space layers, and attention layers where the config's `layer_types` has them.

    `StateSpace(config)` has random weights; `StateSpace.from_pretrained(directory)` has trained ones.
    """

    config: StateSpaceConfig
    config_class = StateSpaceConfig

    def __init__(self, config: StateSpaceConfig) -> None:
        super().__init__(config, (make_layer(config, kind) for kind in config.layer_types))
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                layer.spread_gates()

    def shared(self, x: Tensor, start: int) -> tuple[Rope, ...]:
        """The rotation angles, if there is an attention layer."""
        attention = self.config.attention
        return (rope_tables(attention, start, start + x.shape[1], x),) if attention else ()
