"""`--partial-context` and what belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..memory.window import Pattern
from ..models.config import pattern_of
from .checks import check_choice, check_least

# Each kind's options, with their default and their least value.
PARTIAL_CONTEXT = {
    "window": {"window": (1024, 1), "sinks": (64, 0)},
    "strided": {"block": (64, 1), "local": (16, 1), "stride": (16, 1)},
}


def pattern_options(kind: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `--partial-context` by name, with their defaults for None; those of the other kind are None.

    given: these and others, by name. Raises InputError.
    """
    check_choice("partial_context", kind, PARTIAL_CONTEXT)
    values: dict[str, Any] = {}
    for other, options in PARTIAL_CONTEXT.items():
        for name, (default, least) in options.items():
            if other != kind and given[name] is not None:
                raise InputError(f"--{name} belongs to --partial-context {other}")
            check_least({name: (given[name], least)})
            values[name] = default if other == kind and given[name] is None else given[name]
    if kind is None and given["full_layers"] is not None:
        raise InputError("--full-layers belongs to --partial-context")
    return values


def make_pattern(kind: str | None, given: Mapping[str, Any]) -> Pattern | None:
    """The pattern of `--partial-context`; None: none. Raises InputError."""
    values = {name: value for name, value in pattern_options(kind, given).items() if value is not None}
    if kind is None:
        return None
    return pattern_of(values)
