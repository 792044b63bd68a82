"""A pretrained model made a hybrid: some layers see all of the past, the others a part of it (LongGen, 2410.01485)."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from ..errors import InputError
from ..memory.window import FULL, Pattern, Strided, Window
from .config import FULL_ATTENTION, PARTIAL_ATTENTION, SLIDING_ATTENTION, LlamaConfig
from .load import pattern_of, read_model_config
from .stack import Stack


def partial_context(model: Stack, pattern: Pattern, full_layers: Sequence[int] | None = None) -> None:
    """Let the queries of all layers but `full_layers` see only what `pattern` says: in place, to be trained after.

    The weights stay as they are, an adapter or a 4-bit base too; what is saved of the model says what was done.

    pattern: mc.Window(window, sinks) or mc.Strided(block, local, stride).
    full_layers: numbers of the layers that keep full attention, from 0; empty for none. None: the middle third, that is
    all but a third, rounded down, at either end, as in the paper.
    Raises InputError for wrong numbers, another kind of model, and one that sees a part of its past already."""
    model.config = partial_config(model.config, pattern, full_layers)
    model.partial = {"pattern": asdict(pattern), "full_layers": seen(model.config)[1]}
    for layer, of_layer in zip(model.layers, model.config.patterns(), strict=True):
        layer.self_attn.pattern = of_layer


def partial_config(config: Any, pattern: Pattern, full_layers: Sequence[int] | None = None) -> LlamaConfig:
    """The config of what `partial_context` makes of a model, see there.
    Windows without sinks become Hugging Face's `sliding_window`, a Llama or a Mistral thereby a Ministral. All else is
    `pattern`, under a model_type of our own when it is saved."""
    if type(config) is not LlamaConfig:
        kind = getattr(config, "name", None) or config.model_type
        raise InputError(f"partial_context needs a model of the Llama family, not a {kind}")
    if not isinstance(pattern, Window | Strided):
        raise InputError(f"the pattern is {pattern!r}, but must be a Window or a Strided")
    pattern_of(asdict(pattern))  # checks its numbers
    if already := describe(config):
        raise InputError(f"layers of this model see a part of their past already: {already}")
    L = config.num_hidden_layers
    full = set(range(L // 3, L - L // 3) if full_layers is None else full_layers)
    if not full < set(range(L)):
        raise InputError(f"full layers are {sorted(full)}, but must be some, not all, of 0 to {L - 1}")
    kinds = tuple(FULL_ATTENTION if i in full else PARTIAL_ATTENTION for i in range(L))
    ours = replace(config, pattern=pattern, layer_types=kinds)
    if isinstance(pattern, Strided) or pattern.sinks:
        return ours
    model_type = "ministral" if config.model_type in ("llama", "mistral") else config.model_type
    kinds = tuple(FULL_ATTENTION if i in full else SLIDING_ATTENTION for i in range(L))
    stock = replace(config, model_type=model_type, sliding_window=pattern.window, layer_types=kinds)
    return stock if read_model_config(stock.to_dict()) == stock else ours


def seen(config: Any) -> tuple[Pattern | None, list[int]]:
    """What the layers see that do not see all of the past (None: there are none), and the numbers of the others."""
    patterns = config.patterns() if isinstance(config, LlamaConfig) else []
    part = next((pattern for pattern in patterns if pattern != FULL), None)
    return part, [i for i, pattern in enumerate(patterns) if pattern == FULL]


def describe(config: Any) -> str:
    """What the layers see, in words; empty where that is all of the past, or a state."""
    part, full = seen(config)
    if part is None:
        return ""
    if isinstance(part, Strided):
        words = f"the last {part.local} blocks of {part.block:,} positions and every {part.stride}th before"
    else:
        words = f"the last {part.window:,} positions" + (f" and the first {part.sinks:,}" if part.sinks else "")
    return f"{words}, in all layers" + (f" but {', '.join(map(str, full))}" if full else "")


def apply_saved(model: Stack, saved: Any) -> None:
    """Make of the model what had the attribute `partial`, unless it is that already. Raises InputError."""
    known = isinstance(saved, dict) and saved.keys() == {"pattern", "full_layers"}
    full_layers = saved["full_layers"] if known else None
    if not isinstance(full_layers, list) or not all(isinstance(i, int) for i in full_layers):
        raise InputError(f"partial_context is {saved!r}, but must have a pattern and a list of full_layers")
    pattern = pattern_of(saved["pattern"])
    if seen(model.config) != (pattern, sorted(full_layers)):
        partial_context(model, pattern, full_layers)
