"""A selective state-space model: that of adjoint sharding (arXiv 2501.00692, section 3), and hybrids of it.
Shapes: B batch, T tokens of this call, P hidden size, N state size."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..memory.layer_memory import MemorySpec, wide
from ..memory.state import Before, Handed, LayerState, scan_chunks
from .config import FULL_ATTENTION, Config, EndTokens, LlamaConfig, check_layer_types
from .llama import Layer, Rope, rope_tables
from .stack import Stack


@dataclass(frozen=True)
class StateSpaceConfig(Config):
    """Shape and constants of a StateSpace; its config.json has the same fields.
    layer_types: "state" or "full_attention" for each layer; empty: all "state". The fields from `intermediate_size` on
    are those of a LlamaConfig, for its attention layers; without one they stay None.
    max_position_embeddings: the length that it was trained at. A state has no bound; rotations, further on, are new."""

    name = "state_space"
    beside: ClassVar = {"model_type": "state_space"}

    vocab_size: int
    hidden_size: int
    state_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...] = ()
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    eos_token_id: EndTokens = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layer_types:
            object.__setattr__(self, "layer_types", ("state",) * self.num_hidden_layers)
        check_layer_types(self.layer_types, ("state", FULL_ATTENTION), self.num_hidden_layers)
        _ = self.attention  # checks its fields

    @property
    def attention(self) -> LlamaConfig | None:
        """The attention layers', if there are any."""
        if FULL_ATTENTION not in self.layer_types:
            return None
        shared = {field.name for field in fields(LlamaConfig)} & {field.name for field in fields(self)}
        return LlamaConfig(**{name: getattr(self, name) for name in shared - {"layer_types"}})

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From a parsed `config.json`. Raises InputError, naming the field."""
        known = {"model_type", "torch_dtype", "dtype", *(field.name for field in fields(cls))}
        if config.get("model_type") == cls.name and (unknown := config.keys() - known):
            raise InputError(f"config: the field {min(unknown)} is not one of a {cls.name} model")
        return super().from_dict(config)


class StateLayer(nn.Module):
    """x + y, where h[t] = A[t] h[t-1] + B[t] u[t], y[t] = C[t] h[t] and u = norm(x).
    The gates A (N numbers in (0, 1), the same for all P channels), B and C (N numbers each) are linear in u."""

    def __init__(self, config: StateSpaceConfig) -> None:
        super().__init__()
        P, self.state_size = config.hidden_size, config.state_size
        self.norm = nn.RMSNorm(P, config.rms_norm_eps)
        self.a_proj, self.b_proj, self.c_proj = (nn.Linear(P, self.state_size) for _ in range(3))

    def forward(self, x: Tensor, past: Before | None, *_: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        if past is None:  # the whole sequence at once
            past = Before((self.nothing(x),), [x.shape[1]])
        y, written = scan_chunks(*self.terms(x), past.states[0], past)
        return x + y.to(x.dtype), tuple(tensor for pair in written for tensor in pair)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the recurrence is made of: u (B, T, P), log A, B and C (B, T, N)."""
        u = self.norm(x)
        a, b, c = (project(u).to(wide(u)) for project in (self.a_proj, self.b_proj, self.c_proj))
        return u.to(b.dtype), F.logsigmoid(a), b, c

    def fill(self, x: Tensor, past: Before | None, *_: Any) -> Any:
        return self(x, past)[1]

    def new_memory(self, spec: MemorySpec) -> LayerState:
        """For the states at the ends of chunks, and their adjoints."""
        zero = self.nothing(spec.like.new_empty(spec.batch, 0, self.norm.weight.shape[0]))
        return LayerState([Handed(zero, zero[:, :1], spec)], spec.options.documents)

    def nothing(self, u: Tensor) -> Tensor:
        """The state (B, P, N) before the first token; float32 at least: products of gates need more than eight bits."""
        return u.new_zeros(u.shape[0], u.shape[2], self.state_size, dtype=wide(u))


class StateSpace(Stack):
    """State-space layers, and attention layers where the config's `layer_types` has them."""

    config_class = StateSpaceConfig
    takes_positions = property(lambda self: self.config.attention is not None)

    def __init__(self, config: StateSpaceConfig) -> None:
        layers = (
            Layer(config.attention) if config.attention and kind == FULL_ATTENTION else StateLayer(config)
            for kind in config.layer_types
        )
        super().__init__(config, layers, nn.RMSNorm(config.hidden_size, config.rms_norm_eps))
        # The untrained gates remember for 1 to 1,000 tokens: 1 / (1 - A) in even steps of its logarithm.
        bias = torch.logspace(0.1, 3, config.state_size, dtype=torch.float64).sub(1).log()
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                layer.a_proj.bias.data.copy_(bias)

    def shared(self, x: Tensor, positions: Tensor, whole: Tensor | None) -> tuple[Rope, ...]:
        attention = self.config.attention
        return (rope_tables(attention, positions, x, whole),) if attention else ()
