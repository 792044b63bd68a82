"""Fields of a config.json, checked one by one: what all kinds of models ask of theirs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from ..errors import InputError


def lists_to_tuples(config: Any) -> None:
    """Let a frozen config be a value, also where it was given a list, as JSON has them."""
    for name, value in vars(config).items():
        if isinstance(value, list):
            object.__setattr__(config, name, tuple(value))


def check_sizes(values: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise InputError unless each of these fields is a whole number of at least 1."""
    for name in names:
        value = values[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"config: {name} is {value!r}, but must be a whole number of at least 1")


def check_model_type(config: Mapping[str, Any], model_type: str) -> None:
    """Raise InputError for another one's config."""
    if config.get("model_type") != model_type:
        raise InputError(f"config: model_type is {config.get('model_type')!r}, but must be {model_type!r}")


def check_present(config: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise InputError for the first of these fields that is absent or null."""
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise InputError(f"config: the field {missing[0]} is missing")


def refuse(config: Mapping[str, Any], field: str, wanted: str) -> NoReturn:
    """Raise InputError for a value that no model here computes."""
    raise InputError(f"config: {field} = {config[field]!r} is not supported; it must be {wanted}")


def refuse_what_no_model_computes(config: Mapping[str, Any]) -> None:
    """Raise InputError for another activation than SiLU, and for quantized weights."""
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse(config, "hidden_act", "'silu'")
    if config.get("quantization_config"):
        refuse(config, "quantization_config", "absent: load the unquantized checkpoint")


def number(config: Mapping[str, Any], name: str, default: float | None = None, where: str = "") -> float:
    """A field that must be a finite number above 0; absent: the default, if there is one."""
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise InputError(f"config: {where}{name} is {value!r}, but must be a number above 0")
    return float(value)


def end_tokens(config: Mapping[str, Any]) -> int | tuple[int, ...] | None:
    """`eos_token_id`: a token id, several, or none."""
    ends = config.get("eos_token_id")
    ends = tuple(ends) if isinstance(ends, list) else ends
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, tuple) else (ends or 0,))):
        raise InputError(f"config: eos_token_id is {ends!r}, but must be a token id, a list of them, or null")
    return ends


def first_eos(eos_token_id: int | tuple[int, ...] | None) -> int | None:
    """The end token that a written text gets, if there is any; a model may know several."""
    return eos_token_id[0] if isinstance(eos_token_id, tuple) else eos_token_id
