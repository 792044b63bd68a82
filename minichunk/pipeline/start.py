"""Into a pipeline and out of it, for a command that torchrun has started several times."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import InputError
from ..files.torchrun import is_first, is_one_of_several, started
from .links import Links, RankLost


@contextmanager
def linked(ranks: int, device: str, timeout: timedelta) -> Iterator[Links | None]:
    """Within the block: the links of this process, one of several that torchrun has started; None where it is alone.

    ranks: processes that share the layers. device: as `local_device` says. timeout: for every message.
    """
    if started().world == 1:
        yield None
        return
    here = dist.is_initialized()
    if not here:
        signal.signal(signal.SIGTERM, _end)  # what torchrun sends to all once one has ended
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        # What is on the CPU, like a checkpoint that is gathered, goes by Gloo on GPUs too.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=timeout)
    yield Links(ranks, timeout)
    if not here:  # after an error the others may never come to it
        dist.destroy_process_group()


def _end(number: int, frame: object) -> None:
    raise RankLost(f"rank {started().rank} was told to end (SIGTERM), as all are when one of them has ended")


def local_device(device: str) -> str:
    """The device of this one of several processes: each its own GPU. Raises InputError if there are too few."""
    process = started()
    if process.world == 1 or device == "cpu":
        return device
    if process.local_world > (count := torch.cuda.device_count()):
        raise InputError(
            f"torchrun has started {process.local_world} processes on this machine, but PyTorch sees {count} "
            f"GPU{'' if count == 1 else 's'} here: each needs its own (or take --device cpu)"
        )
    return f"cuda:{process.local_rank}"


def speaks_first() -> bool:
    """Whether this process is the first of all to say how the run has ended: asked once, by one that ends early.

    When a rank ends, those beside it do too, each with an error; the first one names the cause.
    """
    if not is_one_of_several():
        return True
    try:  # torchrun's own store outlives the ranks
        store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5)
        )
        return bool(store.add(f"minichunk ended {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1)
    except (RuntimeError, ValueError, KeyError):
        return is_first()
