"""A rank's links to its neighbours: hidden states go up to the next rank, their gradients down to the one before.

Each direction is a process group of its own. In one group NCCL keeps an order: a rank hands the next chunk up before
it takes a gradient, the rank above hands that down before it takes the chunk, and each would wait for the other.

With more processes there are copies of the pipeline, at work on other documents. Adjacent processes are one pipeline.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError

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
