"""A pretrained model made a hybrid: some layers see all of the past, the others a part of it (LongGen, 2410.01485)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ..errors import InputError
from ..memory.window import FULL, Pattern, Strided, Window
from .config import FULL_ATTENTION, PARTIAL_ATTENTION, SLIDING_ATTENTION, LlamaConfig
from .llama import Llama
from .load import pattern_of, read_model_config
from .stack import Stack


def partial_context(model: Stack, pattern: Pattern, full_layers: Sequence[int] | None = None) -> None:
    """Let the queries of all layers but `full_layers` see only what `pattern` says: in place, to be trained after.

    The weights stay as they are, an adapter or a 4-bit base too, but the model computes another function, for which it
    was not trained. Its config says so, `save_pretrained` writes it, and `save_adapter` writes it beside the adapter.

    pattern: mc.Window(window, sinks) or mc.Strided(block, local, stride).
    full_layers: numbers of the layers that keep full attention, from 0; empty for none. None: the middle third, that is
    all but a third, rounded down, at either end, as in the paper.

    Raises InputError for wrong numbers, for a model without attention or with states, and for one that sees a part
    of its past already.
    """
    if not isinstance(model, Llama):
        raise InputError(f"partial_context needs a model of the Llama family, not {type(model).__name__}")
    model.config = partial_config(model.config, pattern, full_layers)
    model.partial = {"pattern": asdict(pattern), "full_layers": full_layers_of(model.config)}
    for layer, seen in zip(model.layers, model.config.patterns(), strict=True):
        layer.self_attn.pattern = seen  # type: ignore[union-attr]


def partial_config(config: Any, pattern: Pattern, full_layers: Sequence[int] | None = None) -> LlamaConfig:
    """The config of what `partial_context` makes of a model, see there.

    Windows without sinks are what Hugging Face's models have too: those become its `sliding_window`, a Llama or a
    Mistral thereby a Ministral. All else is `pattern`, under a model_type of our own when it is saved.
    """
    if not isinstance(config, LlamaConfig):
        raise InputError(f"a {config.model_type} has states: only a model of full attention can see a part of its past")
    if not isinstance(pattern, Window | Strided):
        raise InputError(f"the pattern is {pattern!r}, but must be a Window or a Strided")
    pattern_of(asdict(pattern))  # checks its numbers
    if any(one != FULL for one in config.patterns()):
        raise InputError(
            f"layers of this model see a part of their past already ({describe(config)}): "
            "partial context is for a model of full attention"
        )
    L = config.num_hidden_layers
    if isinstance(full_layers, int):
        raise InputError(f"full layers: {full_layers!r} is a number, but must be a list of layer numbers")
    full = set(range(L // 3, L - L // 3) if full_layers is None else full_layers)
    if wrong := sorted(full - set(range(L))):
        raise InputError(f"full layers: there is no layer {wrong[0]}; this model has 0 to {L - 1}")
    if len(full) == L:
        named = "these are" if full_layers is not None else "none are named, and the middle third is"
        raise InputError(f"full layers: {named} all {L} of the model; none would be left to see a part of its past")

    def kinds(other: str) -> tuple[str, ...]:
        return tuple(FULL_ATTENTION if i in full else other for i in range(L))

    ours = replace(config, pattern=pattern, layer_types=kinds(PARTIAL_ATTENTION))
    if isinstance(pattern, Strided) or pattern.sinks:
        return ours
    model_type = "ministral" if config.model_type in ("llama", "mistral") else config.model_type
    stock = replace(config, model_type=model_type, sliding_window=pattern.window, layer_types=kinds(SLIDING_ATTENTION))
    return stock if read_model_config(stock.to_dict()) == stock else ours


def full_layers_of(config: LlamaConfig) -> list[int]:
    """The layers that see all of the past."""
    return [i for i, pattern in enumerate(config.patterns()) if pattern == FULL]


def describe(config: Any) -> str:
    """What the layers see, in words; empty where that is all of the past, or a state."""
    patterns = config.patterns() if isinstance(config, LlamaConfig) else []
    parts = []
    for pattern in dict.fromkeys(patterns):
        layers = _ranges([i for i, one in enumerate(patterns) if one == pattern])
        who = f"layer {layers} sees" if layers.isdecimal() else f"layers {layers} see"
        parts.append(f"{who} {_words(pattern)}")
    return ", ".join(parts) if {*patterns} - {FULL} else ""


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as 0-2, 5."""
    runs: list[list[int]] = []
    for i in numbers:
        runs = [*runs[:-1], [runs[-1][0], i]] if runs and runs[-1][-1] == i - 1 else [*runs, [i]]
    return ", ".join("-".join(map(str, run)) for run in runs)


def _words(pattern: Pattern) -> str:
    if isinstance(pattern, Strided):
        return f"the last {pattern.local} blocks of {pattern.block:,} positions and every {pattern.stride}th before"
    if pattern.window is None:
        return "all of the past"
    return f"the last {pattern.window:,} positions" + (f" and the first {pattern.sinks:,}" if pattern.sinks else "")


def apply_saved(model: Stack, saved: Any) -> None:
    """Make of the model what had the attribute `partial`, unless it is that already. Raises InputError."""
    if not isinstance(saved, dict) or saved.keys() != {"pattern", "full_layers"}:
        raise InputError(f"partial_context is {saved!r}, but must have pattern and full_layers")
    pattern, full_layers = pattern_of(saved["pattern"]), saved["full_layers"]
    if not isinstance(full_layers, list) or not all(isinstance(i, int) for i in full_layers):
        raise InputError(f"partial_context: full_layers is {full_layers!r}, but must be a list of layer numbers")
    config = model.config
    if not (
        isinstance(config, LlamaConfig)
        and {*config.patterns()} - {FULL} == {pattern}
        and full_layers_of(config) == sorted(full_layers)
    ):
        partial_context(model, pattern, full_layers)
