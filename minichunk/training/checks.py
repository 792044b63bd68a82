"""Values of options that several commands have, checked before anything is read."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ..errors import InputError


def check_device(name: str | None) -> str:
    """The device of `--device`; None: CUDA where there is one. Raises InputError for one that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return "cuda" if count else "cpu"
    here = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in here:
        raise InputError(f"--device is {name!r}, but PyTorch sees only {', '.join(here)} here")
    return name


def check_least(options: dict[str, tuple[float | None, float]]) -> None:
    """Each option's value and its bound, None allowed. Raises InputError for one that is below."""
    for name, (value, bound) in options.items():
        if value is not None and value < bound:
            raise InputError(f"--{name.replace('_', '-')} is {value}, but must be at least {bound}")


def check_choice(name: str, value: str | None, allowed: Collection[str]) -> None:
    """Raises InputError unless the option `name` has one of these values, or none."""
    if value is not None and value not in allowed:
        raise InputError(f"--{name.replace('_', '-')} is {value!r}, but must be one of {', '.join(allowed)}")


def check_4bit(load_in_4bit: bool, rank: int) -> None:
    """Raises InputError for a base in 4 bits without an adapter to train."""
    if load_in_4bit and rank == 0:
        raise InputError("--load-in-4bit freezes the base: it needs an adapter, --rank of at least 1")
