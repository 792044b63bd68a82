"""Layers are alike: what a model of many layers takes, from two models of few.

A step consists of parts that go through the layers once, like a forward or a backward pass. What is alive at an
operator grows evenly with the number of layers, whether the operator is counted from the beginning of its part or from
the end. From one layer to the next, too, what is alive changes evenly, so that it is most at one of the two ends.

The peak may be at another operator with many layers than with few. So each operator has its own line, and the peak is
where the highest of them ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .count import CountBytes

Part = list[tuple[Any, int]]


class Trace(CountBytes):
    """Also writes down each operator, with the bytes that were alive when it was done, part by part."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Part] = [[]]
        self._in_backward = False
        self._operator: Any = None

    def start(self) -> None:
        """Forget what has been; all that is alive stays so to the end."""
        self.settle()
        self.lasting()
        self.peak, self.parts = self.live, [[(None, self.live)]]

    def next_part(self) -> None:
        """What follows is another part. Forward and backward passes are parts by themselves."""
        self.parts.append([])

    def add(self, *tensors: Tensor, workspace: int = 0) -> None:
        super().add(*tensors, workspace=workspace)
        self.settle()
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward != self._in_backward:
            self._in_backward = in_backward
            self.next_part()
        sizes = tuple(tensor.untyped_storage().nbytes() for tensor in tensors)
        self.parts[-1].append(((self._operator, sizes), self.live + workspace))

    def without(self, make: Callable[[], Any], tensors: Callable[[Any], list[Tensor]]) -> Any:
        """What `make` returns, of which `tensors` are host memory, which only meta tensors place on the device."""
        peak, length = self.peak, len(self.parts[-1])
        made = make()
        self.leave_out(*tensors(made))
        self.peak = max(peak, self.live)
        del self.parts[-1][length:]
        self.parts[-1].append((None, self.live))
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operator = func
        return super().__torch_dispatch__(func, types, args, kwargs)


def peak_of(few: Trace, more: Trace, further: int) -> int | None:
    """The peak with `further` layers more than `few` has; `more` has one more. None: they are not alike."""
    if len(few.parts) != len(more.parts):
        return None
    peak = 0
    for a, b in zip(few.parts, more.parts, strict=True):
        ahead = _alike(a, b, further)
        behind = _alike(a[::-1], b[::-1], further)
        if len(ahead) + len(behind) < len(a):
            return None
        peak = max([peak, *ahead, *behind])
    return peak


def _alike(few: Part, more: Part, further: int) -> list[int]:
    """The bytes alive at the operators that both begin with, `further` layers on."""
    found = []
    for (operator, at_few), (other, at_more) in zip(few, more, strict=False):
        if operator != other:
            break
        found.append(at_few + further * (at_more - at_few))
    return found
