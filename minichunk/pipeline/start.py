"""Into a pipeline and out of it, for a command that torchrun has started several times."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..errors import InputError
from .links import Links, RankLost

HOW = "start with torchrun --nproc-per-node N -m minichunk train --pipeline N"


class Started(NamedTuple):
    """What torchrun tells each process: its rank, of `world` processes; and as which of how many on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def started() -> Started:
    """The only process, unless torchrun has started several. Raises InputError if its variables are not whole."""
    if not is_one_of_several():
        return Started()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name)
        if not value or (name in names and not value.isdecimal()):
            raise InputError(f"torchrun's variable {name} is {value!r}, though RANK is there: {HOW}")
    return Started(*(int(os.environ[name]) for name in names))


def is_one_of_several() -> bool:
    """Whether torchrun has started other processes beside this one."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def local_device(device: str) -> str:
    """The device of this process: under torchrun each has its own GPU. Raises InputError if there are too few."""
    process = started()
    if process.world == 1 or device == "cpu":
        return device
    if process.local_world > (count := torch.cuda.device_count()):
        raise InputError(f"torchrun has started {process.local_world} processes here, but PyTorch sees {count} GPUs")
    return f"cuda:{process.local_rank}"


@contextmanager
def linked(ranks: int, device: str, seconds: float) -> Iterator[Links | None]:
    """Within the block: the links of this process; None where it is alone. ranks: processes that share the layers.
    device: as `local_device` says. seconds: that every message may take."""
    if started().world == 1:
        yield None
        return
    timeout, ours = timedelta(seconds=seconds), not dist.is_initialized()
    if ours:
        signal.signal(signal.SIGTERM, _end)  # what torchrun sends to all once one has ended
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        # What is on the CPU, like a checkpoint that is gathered, goes by Gloo on GPUs too.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=timeout)
    yield Links(ranks, timeout)
    if ours:  # and not after an error: the others may never come here
        dist.destroy_process_group()


def _end(number: int, frame: object) -> None:
    raise RankLost(f"rank {started().rank} was told to end (SIGTERM), as all are when one of them has ended")


def speaks_first() -> bool:
    """Whether this process, which ends, is the first of all to do so: its error names the cause. To be asked once."""
    if not is_one_of_several():
        return True
    try:  # torchrun's own store outlives the ranks
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store: Any = dist.TCPStore(address, port, None, False, timedelta(seconds=5))  # type: ignore[attr-defined]
        return bool(store.add(f"minichunk ended {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1)
    except (RuntimeError, ValueError, KeyError):
        return os.environ["RANK"] == "0"
