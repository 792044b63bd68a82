"""A rank's links to its neighbours: hidden states go up to the next rank, their gradients down to the one before.

Each direction is a process group of its own. Within one group, NCCL runs what two ranks say to each other in the order
in which each of them issues it. Here a rank hands the next chunk up before it takes a gradient, while the rank above,
which has fewer chunks in flight, hands that gradient down before it takes the chunk: each would wait for the other.

With more processes than a pipeline needs there are copies of it, at work on other documents: adjacent processes are one
pipeline, and those with the same layers a group, in which the gradients of the copies are added up.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError

MOST_ON_THE_WAY = 2  # sends that nobody has taken yet: or the fill would pile up at a slow rank
T = TypeVar("T")


class RankLost(RuntimeError):
    """Another rank has ended, or did not answer in time."""


class Links:
    """Of the process that is `rank` of the `ranks` of a pipeline, `copy` of `copies`; made on all of them at a time.

    ranks: processes that share the layers; None: all of the default process group, so that there is one copy.
    timeout: for every single message; None: PyTorch's own.
    Raises InputError without a process group, and for ranks that do not divide the number of processes.
    """

    def __init__(self, ranks: int | None = None, timeout: timedelta | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise InputError(
                "there is no process group: start the script by torchrun, and call "
                "torch.distributed.init_process_group() in it first"
            )
        world = dist.get_world_size()
        self.ranks = check_ranks(world if ranks is None else ranks, world)
        self.copy, self.rank = divmod(dist.get_rank(), self.ranks)
        self.copies = world // self.ranks
        self.is_first, self.is_last = self.rank == 0, self.rank == self.ranks - 1
        pipelines = [range(start, start + self.ranks) for start in range(0, world, self.ranks)]
        alike = [range(rank, world, self.ranks) for rank in range(self.ranks)]
        self.up, self.down = (_groups(pipelines, timeout)[self.copy] for _ in range(2))
        self.copies_of_me = _groups(alike, timeout)[self.rank]
        self.world = dist.new_group(timeout=timeout)
        self.on_the_way = deque[tuple[Any, Tensor, int]]()

    def take_up(self, x: Tensor) -> Tensor:
        """Fill x with the hidden state that comes from the rank before."""
        return self._take(x, self.rank - 1, self.up)

    def hand_up(self, x: Tensor) -> None:
        """A hidden state for the next rank."""
        self._hand(x, self.rank + 1, self.up)

    def take_down(self, x: Tensor) -> Tensor:
        """Fill x with the gradient that comes back from the next rank."""
        return self._take(x, self.rank + 1, self.down)

    def hand_down(self, x: Tensor) -> None:
        """A gradient for the rank before."""
        self._hand(x, self.rank - 1, self.down)

    def flush(self) -> None:
        """Until all that was handed over has been taken."""
        while self.on_the_way:
            self._wait()

    def everyones(self, mine: T, of_all: bool = False) -> list[T]:
        """What each rank says, a picklable object, in the order of the ranks; `of_all` copies, one after the other."""
        said: list[Any] = [None] * self.ranks * (self.copies if of_all else 1)
        with self._hears("the other ranks"):
            dist.all_gather_object(said, mine, self.world if of_all else self.up)
        return said

    def from_last(self, x: Tensor) -> Tensor:
        """Fill x with that of the last rank."""
        with self._hears("the other ranks"):
            dist.broadcast(x, self._process(self.ranks - 1), self.up)
        return x

    def to_first(self, mine: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """On the first rank the tensors of all ranks of this pipeline, by name, on the CPU; None on the others."""
        of_all = self.everyones({name: (x.shape, x.dtype) for name, x in mine.items()})
        found = {name: x.detach().cpu() for name, x in mine.items()}
        if not self.is_first:
            for x in found.values():
                self._hand(x, 0, self.down)
            self.flush()
            return None
        for rank, theirs in enumerate(of_all[1:], 1):
            for name, (shape, dtype) in theirs.items():
                found[name] = self._take(torch.empty(shape, dtype=dtype), rank, self.down)
        return found

    def add_copies(self, x: Tensor) -> None:
        """Add to x those of the same rank in all other copies, in place."""
        if self.copies > 1:
            with self._hears("the other copies"):
                dist.all_reduce(x, group=self.copies_of_me)

    def add_all(self, x: Tensor) -> None:
        """Add to x those of all processes, in place."""
        with self._hears("the other ranks"):
            dist.all_reduce(x, group=self.world)

    def swap_ends(self, x: Tensor) -> Tensor:
        """On the first and the last rank: the other's x."""
        other = torch.empty_like(x)
        if self.is_first:
            self._hand(x, self.ranks - 1, self.up)
            self._take(other, self.ranks - 1, self.down)
        else:  # in the order of the first rank, or under NCCL each would wait for the other
            self._take(other, 0, self.up)
            self._hand(x, 0, self.down)
        self.flush()
        return other

    def _take(self, x: Tensor, source: int, group: Any) -> Tensor:
        with self._hears(f"rank {self._process(source)}"):
            self._receive(x, self._process(source), group)
        return x

    def _hand(self, x: Tensor, to: int, group: Any) -> None:
        x = x.detach().contiguous()
        with self._hears(f"rank {self._process(to)}"):
            work = self._send(x, self._process(to), group)
        self.on_the_way.append((work, x, to))
        if len(self.on_the_way) > MOST_ON_THE_WAY:
            self._wait()

    def _receive(self, x: Tensor, source: int, group: Any) -> None:
        dist.recv(x, source, group)

    def _send(self, x: Tensor, to: int, group: Any) -> Any:
        return dist.isend(x, to, group)

    def _wait(self) -> None:
        work, _, to = self.on_the_way.popleft()
        with self._hears(f"rank {self._process(to)}"):
            work.wait()

    def _process(self, rank: int) -> int:
        """Which process is that rank of this pipeline."""
        return self.copy * self.ranks + rank

    @contextmanager
    def _hears(self, other: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            said = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip())  # where in PyTorch's own code
            reason = re.split(r"\. |\n", said)[0] or type(error).__name__
            raise RankLost(
                f"rank {dist.get_rank()} hears nothing from {other}, which ended or did not answer in time ({reason})"
            ) from error


def check_ranks(ranks: int, processes: int) -> int:
    """`ranks`. Raises InputError unless so many processes are whole pipelines of them."""
    if ranks < 1 or processes % ranks:
        raise InputError(
            f"a pipeline of {ranks} ranks needs {ranks} processes, or a multiple of it for copies, but there "
            f"{'is' if processes == 1 else 'are'} {processes}: torchrun --nproc-per-node says how many"
        )
    return ranks


def _groups(of: Sequence[range], timeout: timedelta | None) -> list[Any]:
    """A process group for each of these; every process has to ask for all of them."""
    return [dist.new_group(list(processes), timeout=timeout) for processes in of]
