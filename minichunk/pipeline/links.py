"""The processes that torchrun has started, and a rank's links to its neighbours: hidden states go up to the next rank,
their gradients down to the one before.

Each direction is a process group of its own. In one group NCCL keeps an order: a rank hands the next chunk up before
it takes a gradient, the rank above hands that down before it takes the chunk, and each would wait for the other.

With more processes there are copies of the pipeline, at work on other documents. Adjacent processes are one pipeline.
"""

import os
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError

HOW = "start with torchrun --nproc-per-node N -m minichunk train --pipeline N"
MOST_ON_THE_WAY = 2  # messages that nobody has taken yet: without a limit the fill would pile up before a slow rank


class RankLost(RuntimeError):
    """Another rank has ended, or did not answer in time."""


class Links:
    """Of the process that is `rank` of the `ranks` of a pipeline, `copy` of `copies`; made on all of them at a time.

    ranks: processes that share the layers; None: all. timeout: for every message; None: PyTorch's own.
    Raises InputError without a process group, and for ranks that do not divide the number of processes.
    """

    def __init__(self, ranks: int | None = None, timeout: timedelta | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise InputError("start the script with torchrun, and call torch.distributed.init_process_group() first")
        world = dist.get_world_size()
        self.ranks = ranks = world if ranks is None else ranks
        if ranks < 1 or world % ranks:
            raise InputError(f"a pipeline of {ranks} ranks needs a multiple of {ranks} processes, not {world}")
        self.copy, self.rank = divmod(dist.get_rank(), ranks)
        self.copies, self.first = world // ranks, self.copy * ranks  # the process that is its pipeline's first rank
        self.is_first, self.is_last = self.rank == 0, self.rank == ranks - 1
        pipelines = [list(range(first, first + ranks)) for first in range(0, world, ranks)]
        ends = [sorted({pipeline[0], pipeline[-1]}) for pipeline in pipelines]
        alike = [list(processes) for processes in zip(*pipelines, strict=True)]
        groups = [dist.new_subgroups_by_enumeration(of, timeout)[0] for of in (pipelines, pipelines, ends, alike)]
        self.up, self.down, self.ends, self.copies_of_me = groups
        self.on_the_way = deque[tuple[Any, Tensor, int]]()

    def take(self, x: Tensor, source: int) -> Tensor:
        """Fill x with what the rank `source` hands to this one."""
        with self._hears(source):
            dist.recv(x, self.first + source, self.up if source < self.rank else self.down)
        return x

    def hand(self, x: Tensor, to: int) -> None:
        """Send x to the rank `to`. Waits only if too many messages have not been taken yet."""
        x = x.detach().contiguous()
        with self._hears(to):
            work = dist.isend(x, self.first + to, self.up if to > self.rank else self.down)
        self.on_the_way.append((work, x, to))
        self.flush(MOST_ON_THE_WAY)

    def flush(self, left: int = 0) -> None:
        """Wait until at most that many of the messages handed over have not been taken yet."""
        while len(self.on_the_way) > left:
            work, _, to = self.on_the_way.popleft()
            with self._hears(to):
                work.wait()

    def everyones(self, mine: Any, of_all: bool = False) -> list[Any]:
        """What each rank says, a picklable object, in the order of the ranks; `of_all` copies, one after the other."""
        said: list[Any] = [None] * self.ranks * (self.copies if of_all else 1)
        with self._hears():
            dist.all_gather_object(said, mine, None if of_all else self.up)
        return said

    def to_first(self, mine: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """On the first rank the tensors of all ranks of this pipeline, by name, on the CPU; None on the others."""
        of_all = self.everyones({name: (x.shape, x.dtype) for name, x in mine.items()})
        found = {name: x.detach().cpu() for name, x in mine.items()}
        if not self.is_first:
            for x in found.values():
                self.hand(x, 0)
            self.flush()
            return None
        for rank, theirs in enumerate(of_all[1:], 1):
            for name, (shape, dtype) in theirs.items():
                found[name] = self.take(torch.empty(shape, dtype=dtype), rank)
        return found

    def add(self, x: Tensor, group: Any = None) -> None:
        """Add to x those of the other processes of `ends`, `copies_of_me` or `up`; None: of all processes."""
        with self._hears():
            dist.all_reduce(x, group=group)

    @contextmanager
    def _hears(self, rank: int | None = None) -> Iterator[None]:
        """PyTorch's errors become RankLost, which names the rank of this pipeline; None: any other process."""
        try:
            yield
        except RuntimeError as error:
            other = "the other ranks" if rank is None else f"rank {self.first + rank}"
            why = f"which ended or did not answer in time ({str(error).strip().partition(chr(10))[0]})"
            raise RankLost(f"rank {dist.get_rank()} hears nothing from {other}, {why}") from error


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
