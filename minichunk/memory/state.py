"""States: what chunks hand on in recurrent layers, and the adjoints that come back.

Where keys and values stay to be read by all later chunks, a state is read by the next one, which hands on a state of
its own. So what is sent back to a state, the loss's derivative by it, is the adjoint state of adjoint sharding
(arXiv 2501.00692), and a memory of one state per chunk is all that grows with the length.

Part of a state passes through a chunk as it is, decayed by a factor that the fill knows. The adjoint passes back by
the same factor, whatever else the chunk does with the state: so the memory carries this part itself, and a chunk that
is run again leaves it out. For SeCO it is all the same. For SpaCO the far past is no longer at the mercy of a coin
for every chunk on the way.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..chunks import Chunk
from .layer_memory import MemorySpec, MemoryUse
from .scan import scan


class Before(NamedTuple):
    """What a recurrent layer sees of its memory: what was handed on to these chunks, and how long each of them is."""

    states: tuple[Tensor, ...]
    lengths: Sequence[int]


def scan_chunks(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, h: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """`scan` over adjacent chunks: y, and for each chunk the state after it and what is left in it of the one before.

    The state's gradient does not pass through a chunk by that decay: the memory carries it.
    """
    outputs, written = [], []
    parts = (z.split(list(lengths), dim=-2) for z in (x, log_a, b, c))
    for x, log_a, b, c in zip(*parts, strict=True):
        y, end = scan(x, log_a, b, c, h)
        decay = log_a.detach().sum(-2, keepdim=True).exp()  # (…, 1, N)
        outputs.append(y)
        written.append((end - decay * (h - h.detach()), decay))
        h = end
    return torch.cat(outputs, dim=-2), written


def starts_of(spec: MemorySpec) -> tuple[list[int], dict[int, int]]:
    """Where a state will be asked for, and the rows of these: where kept chunks begin, also the last, which is not
    among `spec.receiving`."""
    starts = sorted({spec.capacity, *(chunk.start for chunk in spec.receiving)})
    return starts, {start: row for row, start in enumerate(starts)}


class Handed:
    """One tensor that chunks hand on: where kept chunks begin, and its gradient on the way back through all of them.

    zero: before position 0. decay: a tensor of the shape of the decays, which broadcast against it.
    With `offload` it waits in host memory; the layer gets it on its own device.
    """

    def __init__(self, zero: Tensor, decay: Tensor, spec: MemorySpec) -> None:
        self.starts, self.rows = spec.common(Handed, lambda: starts_of(spec))
        self.end, self.last = 0, zero  # what the last chunk that was written has handed on
        self.decay = torch.ones_like(decay)  # over all chunks since the last kept one
        self.offload = spec.options.offload
        home = torch.device("cpu") if self.offload and zero.is_cuda else zero.device

        def room(like: Tensor) -> Tensor:
            return like.new_empty((len(self.rows), *like.shape), device=home, pin_memory=home != like.device)

        self.states, self.through, self.skipped = room(zero), room(decay), room(decay)
        self.states[self.rows.get(0, slice(0))] = 0  # the first chunk has no other before it
        self.read: dict[int, Tensor] = {}  # leaves, by row: autograd adds up in `.grad` what is sent back
        self.adjoint = zero  # of what the last chunk that was backpropagated had been handed

    def before(self, start: int) -> Tensor:
        row = self.rows.get(start)
        h = self.last if row is None or start == self.end else self._here(self.states[row])
        h = h.detach()
        if row is not None and torch.is_grad_enabled():
            self._gather(row)  # of a chunk that is done, all but the gradient can go
            if row:  # not the first row: there is a kept chunk before it
                self.read[row] = h.requires_grad_()
        return h

    def _gather(self, row: int) -> None:
        """Add what came back from the chunk after this row's, if that is done: it may still wait for its turn."""
        later = self.read.get(row + 1)
        if later is not None and later.grad is not None:
            self.adjoint = self.adjoint + later.grad
            del self.read[row + 1]

    def _here(self, stored: Tensor) -> Tensor:
        return stored.to(self.last.device, non_blocking=True, copy=self.offload)

    def write(self, chunk: Chunk, value: Tensor, decay: Tensor) -> None:
        row = bisect_right(self.starts, chunk.start) - 1  # of the last kept chunk so far
        if row >= 0:
            kept = self.starts[row] == chunk.start
            self.decay = torch.ones_like(decay) if kept else self.decay * decay
            self.skipped[row].copy_(self.decay, non_blocking=True)
            if kept:
                self.through[row].copy_(decay, non_blocking=True)
        self.end, self.last = chunk.stop, value
        if chunk.stop in self.rows:
            stored = self.states[self.rows[chunk.stop]].copy_(value, non_blocking=True)
            self.last = value if self.offload else stored

    def hand_over(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        row = self.rows[chunk.start]
        self._gather(row)
        adjoint = self.adjoint * self._here(self.skipped[row])
        self.adjoint = adjoint * self._here(self.through[row])
        return adjoint, torch.zeros_like(self.decay)


class LayerState:
    """A recurrent layer's memory: all that one chunk hands on to the next. See layers.LayerMemory.

    What is written are, for each chunk, pairs of a tensor and its decay.
    """

    def __init__(self, handed: Sequence[Handed]) -> None:
        self.handed = handed

    def past(self, chunks: Sequence[Chunk], save: bool) -> Before:
        lengths = [stop - start for start, stop in chunks]
        return Before(tuple(part.before(chunks[0].start) for part in self.handed), lengths)

    def write(self, chunks: Sequence[Chunk], written: tuple[Tensor, ...]) -> None:
        pairs = iter(zip(written[::2], written[1::2], strict=True))
        for chunk in chunks:
            for part in self.handed:
                part.write(chunk, *next(pairs))

    def hand_over(self, chunk: Chunk) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.handed for tensor in part.hand_over(chunk))

    def tensors(self) -> MemoryUse:
        return MemoryUse([x for part in self.handed for x in (part.states, part.through, part.skipped)], [])
