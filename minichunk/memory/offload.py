"""The cache in host memory: on the device are two blocks of it, whatever the length.

The algorithm does not change; this is another memory behind the same questions. Keys and values
come to the device block by block, the next one while the one before is at work, and gradients go
back behind the computation. On CUDA the host memory is pinned and the copies run on streams of
their own; on the CPU the same code copies from memory to memory.

Rows are positions: a block is (positions, 2, B, G, D), keys and values together, so that any run of
positions is one piece of memory and one copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..chunks import Chunk
from .attention import BLOCK, Past
from .kernels import Kernel
from .layer_memory import MemoryUse
from .pattern import FULL, Pattern
from .places import places


def streams_of(like: Tensor) -> torch.device | None:
    """The device whose streams order what happens to tensors like this one; None: the CPU, where all is in order."""
    return like.device if like.is_cuda else None


class Lane:
    """Work of the device that runs in the order in which it is issued: a CUDA stream.

    The main lane is whatever stream the computation is on. Between lanes, there is no order but by `follow` and
    by a slot's marks, and these name the lanes' streams: what CUDA takes for granted where a stream
    is not named is one of the *current* device, which is another than the model's unless somebody sets it.
    """

    def __init__(self, name: str, device: torch.device | None) -> None:
        self.name, self.device = name, device
        self._stream = None if name == "main" or device is None else torch.cuda.Stream(device)

    @property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device) if self._stream is None else self._stream

    def __call__(self) -> AbstractContextManager[Any]:
        """What is issued within the block runs in this lane."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def follow(self, other: Lane) -> None:
        """Go on only after all that has been issued in the other lane."""
        if self.device is not None:
            self.stream.wait_stream(other.stream)

    def hold(self, tensor: Tensor) -> None:
        """A tensor made in another lane is at work in this one: its memory is not to be used again before."""
        if self.device is not None:
            tensor.record_stream(self.stream)


FILLED, FREE = 0, 1


class Slot:
    """A device buffer that one lane fills and another empties, and the events that keep them apart."""

    def __init__(self, shape: Sequence[int], like: Tensor) -> None:
        self.buffer = like.new_empty(shape)
        self.events = [torch.cuda.Event(), torch.cuda.Event()] if streams_of(like) is not None else None

    def mark(self, which: int, lane: Lane) -> None:
        """From here on in the lane, the buffer is FILLED, or FREE again."""
        if self.events is not None:
            self.events[which].record(lane.stream)

    def wait(self, which: int, lane: Lane) -> None:
        """Let the lane go on only when the buffer is FILLED, or FREE again; it is FREE until the first mark."""
        if self.events is not None:
            lane.stream.wait_event(self.events[which])


class DeviceBlocks:
    """What the layers share on the device: two blocks of the past, two of gradients to go back, and the lanes.

    The buffers are memory of the main lane: it may have used it for something else before, and uses it
    again as soon as the buffers go. That the other lanes keep between these two rests on two facts:
    - The first arrival comes after a write, in the same lane, and a write follows the main lane.
    - The last thing that is asked of a layer with gradients is what the first kept chunk has `received`. All that
      was sent has been sent by then, and the main lane follows the send lane there.
    """

    def __init__(self, row: tuple[int, ...], like: Tensor, grad_dtype: torch.dtype) -> None:
        self.row, self.like, self.grad_dtype = row, like, grad_dtype  # row: (2, B, G, D)
        self.arrivals = [Slot((BLOCK, *row), like) for _ in range(2)]
        self.departures = [Slot((BLOCK, *row), like) for _ in range(2)]
        self.sums = like.new_empty((BLOCK, *row), dtype=grad_dtype)
        device = streams_of(like)
        self.main, self.bring, self.send = Lane("main", device), Lane("bring", device), Lane("send", device)
        self.turn = self.departure = 0

    def next_arrival(self) -> Slot:
        self.turn += 1
        return self.arrivals[self.turn % 2]

    def next_departure(self) -> Slot:
        self.departure += 1
        return self.departures[self.departure % 2]

    def host(self, rows: int, dtype: torch.dtype, zero: bool = False) -> Tensor:
        """A block (rows, 2, B, G, D) in host memory, pinned where the device is a GPU."""
        make = torch.zeros if zero else torch.empty
        return make((rows, *self.row), dtype=dtype, pin_memory=self.like.is_cuda)


class OffloadedLayer:
    """One layer's keys, values and gradients of the kept chunks, in host memory; a LayerMemory.

    capacity: positions. kept: the chunks that will receive a gradient, first to last. Gradients have room from the
    start, a tensor for each chunk: of its pinned positions, and then of those in reach of the next.
    """

    kernel: Kernel | None = None

    def __init__(self, stage: DeviceBlocks, capacity: int, kept: Sequence[Chunk], pattern: Pattern = FULL) -> None:
        self.stage, self.pattern = stage, pattern
        self.places = where = places(pattern, capacity, tuple(kept))
        sizes = [min(BLOCK, where.rows - start) for start in range(0, where.rows, BLOCK)]
        self.blocks = [stage.host(size, stage.like.dtype) for size in sizes]
        self.grads, self.pinned_rows = {}, {}
        for chunk, pinned, near in zip(where.kept, where.pinned_of, where.near_of, strict=True):
            self.pinned_rows[chunk] = pinned[1] - pinned[0]
            rows = self.pinned_rows[chunk] + max(0, near[1] - near[0])
            self.grads[chunk] = stage.host(rows, stage.grad_dtype, zero=True)

    def past(self, chunks: Sequence[Chunk], save: bool) -> Past:
        return Past(self, chunks[0].start, save, self.kernel)

    def write(self, chunks: Sequence[Chunk], written: tuple[Tensor, ...]) -> None:
        keys, values = written  # (B, G, C, D)
        rows = torch.stack((keys, values)).permute(3, 0, 1, 2, 4).contiguous()  # (C, 2, B, G, D)
        bring, start, stop = self.stage.bring, chunks[0].start, chunks[-1].stop
        bring.follow(self.stage.main)  # also for the arrivals to come, see DeviceBlocks
        with bring():
            for to, part in self.places.writes(start, stop):
                for at, low, high in by_block(part.start, to):
                    block = self.blocks[low // BLOCK][low % BLOCK :][: high - low]
                    block.copy_(rows[at : at + high - low], non_blocking=True)
            bring.hold(rows)

    def pinned(self, count: int, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Up to the ends of BLOCKs, whatever `size` is; a piece is gone when the next one is asked for."""
        return self._pieces(list(by_block(0, slice(0, count))))

    def near(self, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """As for `pinned`."""
        return self._pieces([piece for run in self.places.near(start, stop) for piece in by_block(*run)])

    def _pieces(self, parts: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The rows (place, start, stop), each within a block, one after the other on the device."""
        main = self.stage.main
        coming = self._bring(parts[0]) if parts else None
        for i, (at, low, high) in enumerate(parts):
            assert coming is not None
            slot, coming = coming, self._bring(parts[i + 1]) if i + 1 < len(parts) else None
            slot.wait(FILLED, main)
            keys, values = slot.buffer[: high - low].permute(1, 2, 3, 0, 4)  # (B, G, n, D) each
            yield at, keys, values
            slot.mark(FREE, main)

    def _bring(self, part: tuple[int, int, int]) -> Slot:
        """Start to copy these rows to the device."""
        slot, bring, (_, low, high) = self.stage.next_arrival(), self.stage.bring, part
        with bring():
            slot.wait(FREE, bring)
            rows = self.blocks[low // BLOCK][low % BLOCK :][: high - low]
            slot.buffer[: high - low].copy_(rows, non_blocking=True)
            slot.mark(FILLED, bring)
        return slot

    def add_pinned_grads(self, index: int, key_grads: Tensor, value_grads: Tensor) -> None:
        stop = index + key_grads.shape[2]
        for chunk, low, high, row in self.places.by_chunk(self.places.pinned_of, index, stop):
            sent = slice(low - index, high - index)
            self._send(self.grads[chunk][row : row + high - low], key_grads[:, :, sent], value_grads[:, :, sent])

    def add_near_grads(self, position: int, key_grads: Tensor, value_grads: Tensor) -> None:
        stop = position + key_grads.shape[2]
        for chunk, low, high, row in self.places.by_chunk(self.places.near_of, position, stop):
            rows, sent = self.grads[chunk][self.pinned_rows[chunk] + row :], slice(low - position, high - position)
            self._send(rows[: high - low], key_grads[:, :, sent], value_grads[:, :, sent])

    def _send(self, total: Tensor, key_grads: Tensor, value_grads: Tensor) -> None:
        """Start to add gradients (B, G, n, D) to rows in host memory."""
        main, send = self.stage.main, self.stage.send
        for low in range(0, len(total), BLOCK):  # a chunk may be longer than a block
            rows, slot = total[low : low + BLOCK], self.stage.next_departure()
            n, part = len(rows), slice(low, low + len(rows))
            slot.wait(FREE, main)
            slot.buffer[:n, 0] = key_grads[:, :, part].permute(2, 0, 1, 3)
            slot.buffer[:n, 1] = value_grads[:, :, part].permute(2, 0, 1, 3)
            slot.mark(FILLED, main)
            with send():
                slot.wait(FILLED, send)
                sums = self.stage.sums[:n]
                sums.copy_(rows, non_blocking=True)
                sums += slot.buffer[:n]
                slot.mark(FREE, send)
                rows.copy_(sums, non_blocking=True)

    def hand_over(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        total, main, send = self.grads[chunk], self.stage.main, self.stage.send
        with send():  # after all that was sent before
            here = total.to(self.stage.like.device, non_blocking=True, copy=True)
        main.follow(send)  # also before the buffers go, see DeviceBlocks
        main.hold(here)
        keys, values = self.spread(chunk, here).to(self.stage.like.dtype).permute(1, 2, 3, 0, 4)
        return keys, values

    def spread(self, chunk: Chunk, grads: Tensor) -> Tensor:
        """What a chunk received, (positions, 2, B, G, D), from that of its pinned and of its near positions."""
        if len(grads) == self.pinned_rows[chunk] == chunk.stop - chunk.start:
            return grads
        total = grads.new_zeros((chunk.stop - chunk.start, *grads.shape[1:]))
        row = 0
        for low, high in self.pattern.pinned(*chunk):
            total[low - chunk.start : high - chunk.start] = grads[row : row + high - low]
            row += high - low
        total[len(total) - (len(grads) - row) :] += grads[row:]
        return total

    def tensors(self) -> MemoryUse:
        return MemoryUse(self.blocks, list(self.grads.values()))


def by_block(at: int, rows: slice) -> Iterator[tuple[int, int, int]]:
    """(place, start, stop) of some rows, cut where blocks end; `at`: the place of the first."""
    for low in range(rows.start // BLOCK * BLOCK, rows.stop, BLOCK):
        start, stop = max(low, rows.start), min(low + BLOCK, rows.stop)
        yield at + start - rows.start, start, stop
