"""The tiny models, texts and draws of the golden files, one for each thing that a port can get wrong by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from ..batch import IGNORE, shift
from ..memory.pattern import FULL, Window
from ..models.config import Llama3Rope, LlamaConfig
from ..models.llama import Attention, Llama
from ..models.lora import DropoutMasks, adapters, add_lora
from ..models.ssm import StateSpace
from ..models.ssm_config import StateSpaceConfig
from ..models.stack import Stack
from ..samplers import Weight

BATCH, LENGTH = 2, 11  # a ragged last chunk
# A skipped chunk between kept ones, so that something must not pass it (keys and values) or must (an adjoint). Three
# kept ones, so that chunk 0 hears from two of them: to scale all that has arrived so far shows in what it hears.
DRAW = (Weight(1.5, 2.0), None, Weight(1.25, 3.0), Weight(1.75, 2.5))


class Lora(NamedTuple):
    """The arguments of `add_lora`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float


class Case(NamedTuple):
    """A model, how its texts are cut, and one draw of SpaCO's; no two of its factors are the same.

    seed: of its numbers.
    rounding: how many units of rounding, relative to its norm, a tensor is moved by one such unit in each step: the
        worst tensor, measured (tests/test_golden.py).
    spread: of the weights. sinks: which all queries of layers with a window see. batches: of one step.
    """

    config: LlamaConfig | StateSpaceConfig
    seed: int
    rounding: float
    chunk_size: int = 3
    spaco: tuple[Weight | None, ...] = DRAW
    spread: float = 0.4
    sinks: int = 0
    lora: Lora | None = None
    batches: int = 1

    @property
    def attention(self) -> LlamaConfig | None:
        """The config of the layers that have attention, if there are any."""
        return self.config if isinstance(self.config, LlamaConfig) else self.config.attention

    def written(self, layer: int) -> Sequence[tuple[str, str]]:
        """The names of what a layer writes, and of what is relayed to it; "": nothing is."""
        if isinstance(self.config, StateSpaceConfig) and self.config.layer_types[layer] == "state":
            return ("state", "adjoint"), ("decay", "")
        return ("keys", "key_grads"), ("values", "value_grads")


def cases() -> dict[str, Case]:
    """One for each file: what the Llamas have in common, and what each has of its own; a state, and a hybrid."""

    def llama(**changes: Any) -> LlamaConfig:
        common = {
            "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4, "rms_norm_eps": 1e-5,
        }  # fmt: skip
        return LlamaConfig(**{**common, **changes})

    window = llama(
        model_type="ministral", num_key_value_heads=2, sliding_window=4,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    )  # fmt: skip
    state = StateSpaceConfig(vocab_size=13, hidden_size=8, state_size=5, num_hidden_layers=3, rms_norm_eps=1e-5)
    hybrid = replace(
        state, layer_types=("state", "full_attention", "state"), intermediate_size=12, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    return {
        "plain": Case(llama(), seed=2, rounding=100),
        "grouped": Case(llama(num_key_value_heads=2), seed=1, rounding=100),
        "tied": Case(llama(tie_word_embeddings=True), seed=2, rounding=100),
        "llama3-rope": Case(llama(rope_theta=500.0, rope_scaling=Llama3Rope(4.0, 1.0, 2.0, 8)), seed=0, rounding=100),
        "qkv-bias": Case(llama(model_type="qwen2", attention_bias=True), seed=4, rounding=200),
        "qk-norm": Case(
            llama(model_type="qwen3", qk_norm=True, head_dim=6, num_key_value_heads=2), seed=3, rounding=100
        ),
        "window": Case(window, seed=4, rounding=100, sinks=1),
        "lora": Case(llama(), seed=4, rounding=350, lora=Lora(2, 3.0, ("q_proj", "k_proj", "v_proj"), 0.25)),
        "accumulated": Case(llama(num_hidden_layers=2), seed=1, rounding=150, batches=2),
        "calm": Case(llama(num_hidden_layers=2), seed=0, rounding=20, spread=0.1),
        "state": Case(state, seed=0, rounding=700),
        "hybrid": Case(hybrid, seed=0, rounding=120),
    }


class GivenMasks(DropoutMasks):
    """Dropout by masks that are given, (B, T, ·) for each adapter by its name; 0, or 1 over the chance to be kept."""

    def __init__(self, masks: dict[str, Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def draw(self, x: Tensor, module: str, rate: float) -> Tensor:
        start = self.chunks[0].start if self.chunks else 0
        return self.masks[module][:, start : start + x.shape[1]]


class Step(NamedTuple):
    """What one file is computed from. batches: input_ids and labels, int64 (B, T) each."""

    model: Stack
    batches: list[tuple[Tensor, Tensor]]
    masks: dict[str, Tensor]

    @property
    def num_targets(self) -> int:
        """Of all batches."""
        return sum(int((shift(labels) != IGNORE).sum()) for _, labels in self.batches)


def build(case: Case) -> Step:
    """A float64 model and its batches from NumPy's RandomState, whose numbers never change.

    The weights are numbers that bfloat16 has, so that ports in any precision begin with the same ones.
    """
    random = numpy.random.RandomState(case.seed)
    llama = isinstance(case.config, LlamaConfig)
    model = (Llama(case.config) if llama else StateSpace(case.config)).double()  # type: ignore[arg-type]
    for module in model.modules() if case.sinks else ():
        if isinstance(module, Attention) and module.pattern != FULL:
            module.pattern = Window(case.config.sliding_window, case.sinks)  # type: ignore[union-attr]
    if case.lora is not None:
        add_lora(model, *case.lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.from_numpy(random.standard_normal(tuple(parameter.shape)))
            parameter.copy_((1 + 0.2 * values if "norm" in name else case.spread * values).bfloat16())
    batches = []
    for n in range(case.batches):
        input_ids = torch.from_numpy(random.randint(0, case.config.vocab_size, (BATCH, LENGTH)))
        labels = input_ids.clone()
        labels[n, 3:5] = IGNORE  # in the middle, across the end of a chunk
        labels[1 - n, 9 - 3 * n :] = IGNORE  # padding on the right, no two batches alike
        batches.append((input_ids, labels))
    return Step(model, batches, _give_masks(model, random))


def _give_masks(model: Stack, random: numpy.random.RandomState) -> dict[str, Tensor]:
    masks = {}
    for name, layer in adapters(model).items():
        kept = random.random_sample((BATCH, LENGTH, layer.in_features)) >= layer.dropout
        masks[name] = torch.from_numpy(kept / (1 - layer.dropout))
    if masks:
        model.masks = given = GivenMasks(masks)
        for layer in adapters(model).values():
            layer.masks = given
    return masks
