"""The cache in host memory: on the device are two blocks of it, whatever the length. This has never run on a GPU.

The tests check the order of all copies with streams that only take notes (tests/fake_cuda.py), and the numbers on the
CPU. The algorithm does not change; this is another place for the rows of window.WindowCache. Keys and values
come to the device block by block, the next one while the one before is at work, and gradients go
back behind the computation. On CUDA the host memory is pinned and the copies run on streams of
their own; on the CPU the same code copies from memory to memory.

Rows are positions: a block is (positions, 2, B, G, D), keys and values together, so that any run of
positions is one piece of memory and one copy.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from .attention import BLOCK
from .window import DeviceStore


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

    def follow(self, other: "Lane") -> None:
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
    - The last thing that is asked of a layer with gradients is to hand over those of the first chunk. All that was
      sent has been sent by then, and the main lane follows the send lane there.
    """

    def __init__(self, row: tuple[int, int, int, int], like: Tensor, grad_dtype: torch.dtype) -> None:
        self.row, self.like, self.grad_dtype = row, like, grad_dtype  # row: (2, B, G, D)
        self.arrivals = [Slot((BLOCK, *row), like) for _ in range(2)]
        self.departures = [Slot((BLOCK, *row), like) for _ in range(2)]
        self.sums = like.new_empty((BLOCK, *row), dtype=grad_dtype)
        device = streams_of(like)
        self.main, self.bring, self.send = Lane("main", device), Lane("bring", device), Lane("send", device)
        self.coming, self.going = cycle(self.arrivals), cycle(self.departures)  # in turn

    def host(self, rows: int, dtype: torch.dtype, zero: bool = False) -> Tensor:
        """A block (rows, 2, B, G, D) in host memory, pinned where the device is a GPU."""
        make = torch.zeros if zero else torch.empty
        return make((rows, *self.row), dtype=dtype, pin_memory=self.like.is_cuda)


class HostStore(DeviceStore):
    """Rows in host memory, in blocks, and sums of gradients; see DeviceStore for what is asked of it."""

    early = True

    def __init__(self, device: DeviceBlocks, rows: int) -> None:
        self.device, self.heads, self.like = device, device.row[1:], device.like
        sizes = [min(BLOCK, rows - start) for start in range(0, rows, BLOCK)]
        self.blocks = [device.host(size, device.like.dtype) for size in sizes]

    def write(self, row: int, keys: Tensor, values: Tensor) -> None:
        rows = torch.stack((keys, values)).permute(3, 0, 1, 2, 4).contiguous()  # (C, 2, B, G, D)
        bring = self.device.bring
        bring.follow(self.device.main)  # also for the arrivals to come, see DeviceBlocks
        with bring():
            for at, low, high in by_block(0, row, len(rows)):
                block = self.blocks[low // BLOCK][low % BLOCK :][: high - low]
                block.copy_(rows[at : at + high - low], non_blocking=True)
            bring.hold(rows)

    def pieces(self, runs: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Up to the ends of blocks, one after the other on the device: the next one comes while one is at work."""
        main = self.device.main
        parts = [part for start, stop, row in runs for part in by_block(start, row, stop - start)]
        slots = map(self._bring, parts)  # each is brought when it is asked for
        coming = next(slots, None)
        for at, low, high in parts:
            slot, coming = coming, next(slots, None)
            assert slot is not None
            slot.wait(FILLED, main)
            keys, values = slot.buffer[: high - low].permute(1, 2, 3, 0, 4)  # (B, G, n, D) each
            yield at, keys, values
            slot.mark(FREE, main)

    def _bring(self, part: tuple[int, int, int]) -> Slot:
        """Start to copy these rows to the device."""
        slot, bring, (_, low, high) = next(self.device.coming), self.device.bring, part
        with bring():
            slot.wait(FREE, bring)
            rows = self.blocks[low // BLOCK][low % BLOCK :][: high - low]
            slot.buffer[: high - low].copy_(rows, non_blocking=True)
            slot.mark(FILLED, bring)
        return slot

    def new_sums(self, count: int) -> list[Tensor]:
        return [self.device.host(count, self.device.grad_dtype, zero=True)]

    def add(self, sums: list[Tensor], row: int, key_grads: Tensor, value_grads: Tensor) -> None:
        """Start to add them."""
        main, send = self.device.main, self.device.send
        for low in range(0, key_grads.shape[2], BLOCK):
            part = slice(low, low + BLOCK)
            slot, n = next(self.device.going), min(BLOCK, key_grads.shape[2] - low)
            slot.wait(FREE, main)
            slot.buffer[:n, 0] = key_grads[:, :, part].permute(2, 0, 1, 3)
            slot.buffer[:n, 1] = value_grads[:, :, part].permute(2, 0, 1, 3)
            slot.mark(FILLED, main)
            with send():
                slot.wait(FILLED, send)
                rows, total = sums[0][row + low :][:n], self.device.sums[:n]
                total.copy_(rows, non_blocking=True)
                total += slot.buffer[:n]
                slot.mark(FREE, send)
                rows.copy_(total, non_blocking=True)

    def take(self, sums: list[Tensor]) -> Any:
        main, send = self.device.main, self.device.send
        with send():  # after all that was sent before
            here = sums[0].to(self.like.device, non_blocking=True, copy=True)
        main.follow(send)  # also before the buffers go, see DeviceBlocks
        main.hold(here)
        return here.to(self.like.dtype).permute(1, 2, 3, 0, 4).unbind()  # (B, G, n, D) each

    def tensors(self) -> list[Tensor]:
        return self.blocks


def by_block(at: int, row: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(place, first row, row after the last) of so many rows, cut where blocks end; `at`: the place of the first."""
    for low in range(row // BLOCK * BLOCK, row + count, BLOCK):
        start, stop = max(low, row), min(low + BLOCK, row + count)
        yield at + start - row, start, stop
