"""What torchrun tells each process that it starts, in its environment."""

from __future__ import annotations

import os
from typing import NamedTuple

from ..errors import InputError


class Started(NamedTuple):
    """rank, of `world` processes; and as which of how many on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


HOW = "start with torchrun --nproc-per-node N -m minichunk train --pipeline N"
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def started() -> Started:
    """The only process, unless torchrun has started several. Raises InputError if its variables are not whole."""
    if not is_one_of_several():
        return Started()
    found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    missing = [name for name in (*_VARIABLES, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(f"torchrun's variable {missing[0]} is missing, though {next(iter(found))} is there: {HOW}")
    wrong = [name for name, value in found.items() if not value.isdecimal()]
    if wrong:
        raise InputError(f"torchrun's variable {wrong[0]} is {found[wrong[0]]!r}, but must be a number: {HOW}")
    return Started(*(int(found[name]) for name in _VARIABLES))


def is_first() -> bool:
    """Whether this process speaks for all that torchrun has started."""
    return not is_one_of_several() or os.environ["RANK"] == "0"


def is_one_of_several() -> bool:
    """Whether torchrun has started others beside this one."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
