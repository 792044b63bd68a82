"""Hypothesis strategies: tiny models of every supported kind, and batches for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import minichunk as mc
from minichunk.batch import IGNORE, shift
from minichunk.memory import attention
from minichunk.memory.attention import BLOCK
from minichunk.memory.kernels import Plain
from minichunk.memory.window import FULL, Pattern, Strided, Window
from minichunk.models.load import class_of
from minichunk.models.rope import RopeRule
from minichunk.models.ssm import StateLayer

VOCAB = 23
WEIGHTS = st.none() | st.builds(mc.Weight, st.floats(-2, 2), st.floats(-2, 2))  # what a sampler gives a chunk
CUTS = st.none() | st.integers(1, 4)  # layers_at_once
HOW = st.fixed_dictionaries({"recompute": st.booleans(), "offload": st.booleans(), "layers_at_once": CUTS})
SECO_HOW = HOW | st.fixed_dictionaries({"recompute": st.booleans(), "graphs": st.integers(0, 4)})
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def examples(count: int) -> settings:
    """As many random examples, or as small a part of them as the profile's max_examples is of 100; see conftest.py."""
    return settings(max_examples=max(1, count * settings().max_examples // 100))


@dataclass(frozen=True)
class Drawn:
    """An objective that is no sum over tokens, or one that is no mean."""

    kind: str
    seed: int

    def __call__(self, log_probs: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        a, b = (torch.randn(shape, generator=generator, dtype=log_probs.dtype) for shape in (log_probs.shape, 4))
        if self.kind == "rows":  # compared with each other and with a reference, as DPO does
            return -torch.nn.functional.logsigmoid(b[0] * (a[:, 0] @ (log_probs - a).sum(1)))
        return -(a.sigmoid() * (1 - log_probs.exp()) ** 2 * log_probs).sum()  # focal loss, with rewards


OBJECTIVES = st.none() | st.builds(Drawn, st.sampled_from(["rows", "tokens"]), st.integers(0, 99))


@contextmanager
def blocks_of(size: int) -> Iterator[None]:
    """Within the block the past is cut into pieces of `size` positions, in every module that has the constant, and so
    are a band's queries."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("minichunk.") and getattr(module, "BLOCK", None) == BLOCK:
                patch.setattr(module, "BLOCK", size)
        patch.setattr(Plain, "block", size)
        patch.setattr(attention, "TILE", size)
        yield


def build(config: Any, seed: int, scale: float = 0.25) -> Any:
    """A float64 model whose attention is far from uniform; the larger `scale`, the worse its conditioning."""
    torch.manual_seed(seed)
    model = class_of(config)(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm, is_embedding = "norm" in name, "embed" in name
            parameter.copy_(torch.randn_like(parameter) * (1.0 if is_embedding else scale) + is_norm)
    return model


def with_adapter(
    model: Any, rank: int = 3, alpha: float = 6, targets: Sequence[str] | None = PROJECTIONS, dropout: float = 0.0
) -> Any:
    """The model, with an adapter that changes what it computes: no B is zero, which would hide the gradient of A."""
    mc.add_lora(model, rank, alpha, targets, dropout)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model


def tiny(layers: int = 2, **changes: object) -> mc.LlamaConfig:
    """A fixed tiny config for tests that do not vary it."""
    fields = {
        "vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    }  # fmt: skip
    return mc.LlamaConfig(**{**fields, **changes})  # type: ignore[arg-type]


def tiny_state(layers: int | str = 2, **changes: object) -> mc.StateSpaceConfig:
    """The same for states: a number of layers, or a letter for each of them, s for a state or a for attention."""
    letters = "s" * layers if isinstance(layers, int) else layers
    kinds = tuple({"s": "state", "a": "full_attention"}[letter] for letter in letters)
    attention = {"intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    fields = {
        "vocab_size": VOCAB, "hidden_size": 8, "state_size": 3, "num_hidden_layers": len(letters),
        "layer_types": kinds, **(attention if "a" in letters else {}),
    }  # fmt: skip
    return mc.StateSpaceConfig(**{**fields, **changes})  # type: ignore[arg-type]


def windows(longest: int, sinks: int = 0) -> st.SearchStrategy[Window]:
    return st.builds(Window, st.integers(1, longest), st.integers(0, sinks))


def strided(block: int = 4) -> st.SearchStrategy[Strided]:
    return st.builds(Strided, st.integers(1, block), st.integers(1, 3), st.none() | st.integers(1, 4))


def ropes(head_dim: int) -> st.SearchStrategy[RopeRule | None]:
    """Rules that stretch rope, also by the length of the whole text, for heads of so many numbers."""
    short, long = tuple(1.0 + i for i in range(head_dim // 2)), tuple(2.0 + 3 * i for i in range(head_dim // 2))
    rules = [
        RopeRule("llama3", factor=4.0, high_freq_factor=2.0, original_max_position_embeddings=16),
        RopeRule("yarn", factor=4.0, original_max_position_embeddings=16),
        RopeRule("longrope", short_factor=short, long_factor=long, factor=3.0, original_max_position_embeddings=6),
        RopeRule("dynamic", factor=2.0),
    ]
    wide = [RopeRule(name, partial_rotary_factor=0.5) for name in ("default", "proportional") if head_dim == 8]
    return st.none() | st.sampled_from([*rules, *wide]) if head_dim > 2 else st.none()


@st.composite
def configs(draw: st.DrawFn) -> mc.LlamaConfig:
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 4))
    rope = draw(ropes(head_dim))
    layers = draw(st.integers(1, 4))
    kinds = draw(st.just(()) | st.tuples(*[st.sampled_from(["full_attention", "sliding_attention"])] * layers))
    return mc.LlamaConfig(
        vocab_size=VOCAB, hidden_size=draw(st.integers(4, 12)), intermediate_size=draw(st.integers(3, 10)),
        num_hidden_layers=layers, num_attention_heads=groups * per_group, num_key_value_heads=groups,
        head_dim=head_dim, max_position_embeddings=draw(st.integers(4, 20)),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])), rope_theta=draw(st.sampled_from([100.0, 10000.0])),
        rope_scaling=rope, layer_types=kinds, tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()), attention_out_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        sliding_window=draw(st.integers(1, 9)) if "sliding_attention" in kinds else None,
    )  # fmt: skip


@st.composite
def models(draw: st.DrawFn, lora: bool = True) -> mc.Llama:
    model = build(draw(configs()), draw(st.integers(0, 2**31)), draw(st.sampled_from([0.25, 1.0])))
    give_pattern(model, draw(windows(9, 4) | strided()))
    kind = draw(st.sampled_from(["all", "lora", "dropout"])) if lora else "all"
    if kind != "all":
        targets = draw(st.lists(st.sampled_from(PROJECTIONS), min_size=1, max_size=7, unique=True))
        dropout = 0.3 if kind == "dropout" else 0.0
        with_adapter(model, draw(st.integers(1, 3)), 4, targets, dropout)
    return model


def give_pattern(model: mc.Llama, pattern: Pattern) -> None:
    """Let the layers that have a window see by this pattern, for which a config.json may have no field."""
    for layer in model.layers:
        if layer.self_attn.pattern != FULL:
            layer.self_attn.pattern = pattern


@st.composite
def state_models(draw: st.DrawFn, letters: str = "sa", max_layers: int = 4) -> mc.StateSpace:
    """State-space models and hybrids, that forget at once or remember for hundreds of tokens."""
    layers = "".join(draw(st.lists(st.sampled_from(letters), min_size=1, max_size=max_layers)))
    config = tiny_state(
        layers, hidden_size=draw(st.integers(4, 12)), state_size=draw(st.integers(1, 4)),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-3])), tie_word_embeddings=draw(st.booleans()),
    )  # fmt: skip
    model = build(config, draw(st.integers(0, 2**31)), draw(st.sampled_from([0.25, 1.0])))
    remember(model, draw(st.sampled_from([-4.0, 0.0, 2.0, 6.0])))
    return model


def remember(model: mc.StateSpace, logit: float) -> None:
    """Move the gates: the larger `logit`, the longer the states remember."""
    for layer in model.layers:
        if isinstance(layer, StateLayer):
            layer.a_proj.bias.data += logit


@dataclass
class Batch:
    input_ids: Tensor
    labels: Tensor
    positions: Tensor | None = None

    @property
    def num_targets(self) -> int:
        return int((shift(self.labels) != IGNORE).sum())


@st.composite
def batches(draw: st.DrawFn, max_length: int = 14, positions: bool = False) -> Batch:
    B, T = draw(st.integers(1, 3)), draw(st.integers(2, max_length))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    input_ids = torch.randint(VOCAB, (B, T), generator=generator)
    labels = input_ids.clone()
    masking = draw(st.sampled_from(["none", "some", "span", "all but one"]))
    if masking == "some":
        labels[torch.rand(B, T, generator=generator) < 0.4] = IGNORE
    elif masking == "span":  # whole chunks without a target, as a prompt has
        start = draw(st.integers(0, T - 1))
        labels[:, start : start + draw(st.integers(1, T))] = IGNORE
    elif masking == "all but one":
        labels[:] = IGNORE
    row, position = draw(st.integers(0, B - 1)), draw(st.integers(1, T - 1))
    labels[row, position] = input_ids[row, position]  # at least one target
    if not positions or draw(st.booleans()):
        return Batch(input_ids, labels)
    steps = torch.randint(0, 7, (B, T), generator=generator)  # some positions are left out, others come twice
    return Batch(input_ids, labels, steps.cumsum(1) if draw(st.booleans()) else steps)
