"""Streams and events that run nothing and remember who waited for whom, to check the order of real work.

A stream is a vector clock: for each stream, how much of its work is certainly done before what comes
next in this one. Numbers are computed on the CPU, in the order in which the program issues them; on a
GPU, only the order found here would hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minichunk.memory import offload


class Race(AssertionError):
    """Two pieces of work touch the same memory, one writes, and nothing orders them."""


class FakeEvent:
    def __init__(self) -> None:
        self.clock: Counter[FakeStream] = Counter()

    def record(self, stream: FakeStream | None = None) -> None:
        self.clock = Counter((stream or FakeStream.current()).clock)

    def wait(self, stream: FakeStream | None = None) -> None:
        stream = stream or FakeStream.current()
        stream.clock |= self.clock  # the later of both, for each stream


class FakeStream:
    # As in CUDA: one stream is current on each device, and one device is current, here not the model's.
    currents: dict[str, FakeStream]

    def __init__(self, device: Any) -> None:
        self.device, self.clock = str(device), Counter[FakeStream]()

    @classmethod
    def current(cls, device: Any = "cuda:0") -> FakeStream:
        return cls.currents.setdefault(str(device), cls(device))

    def wait_event(self, event: FakeEvent) -> None:
        event.wait(self)

    def wait_stream(self, other: FakeStream) -> None:
        self.clock |= other.clock


@dataclass
class Uses:
    """Of one piece of memory: the stream and the time there when it was made, last written, and read since."""

    maker: FakeStream
    written: tuple[FakeStream, int]
    read: dict[FakeStream, int] = field(default_factory=dict)


class Order(TorchDispatchMode):
    """Checks that each operator comes after all whose results it reads, and after all that use what it overwrites.

    A tensor used in another lane than the one that made it must be held there, or be left to `the_end_of`.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.running = device, FakeStream.current(device)
        self.uses: dict[int, Uses] = {}
        self.lent: dict[tuple[int, FakeStream], Any] = {}  # where a hold is due
        self.alive: list[Any] = []  # or another storage would take the place, and the name, of one that is gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        schema, given = func._schema.arguments, {**dict(enumerate(args)), **(kwargs or {})}
        self.running.clock[self.running] += 1
        for i, argument in enumerate(schema):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(given.get(argument.name, given.get(i))):
                if isinstance(tensor, Tensor):
                    self.use(tensor, writes, func)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.use(tensor, True, func)
        return result

    def use(self, tensor: Tensor, writes: bool, what: Any) -> None:
        here, storage = self.running, tensor.untyped_storage()
        if storage._cdata not in self.uses:
            self.alive.append(storage)
            maker = here if writes else FakeStream.current(self.device)  # the model and the text were there before
            self.uses[storage._cdata] = Uses(maker, (maker, maker.clock[maker]))
        uses = self.uses[storage._cdata]
        before = [uses.written, *(uses.read.items() if writes else ())]
        if not all(time <= here.clock[stream] for stream, time in before):
            raise Race(f"{what} {'writes' if writes else 'reads'} {tuple(tensor.shape)} on {here.device}")
        if here is not uses.maker and (storage._cdata, here) not in self.lent:
            self.lent[storage._cdata, here] = what
        if writes:
            uses.written, uses.read = (here, here.clock[here]), {}
        else:
            uses.read[here] = here.clock[here]

    def hold(self, tensor: Tensor, stream: FakeStream) -> None:
        self.lent[tensor.untyped_storage()._cdata, stream] = None

    def the_end_of(self, stage: offload.DeviceBlocks, host: list[Tensor]) -> None:
        """What goes with the step: the buffers, once the main lane may use their memory; the host's, of itself."""
        buffers = [*(slot.buffer for slot in stage.arrivals + stage.departures), stage.sums]
        for buffer in buffers:
            self.use(buffer, True, "whoever gets the memory next")
        ours = {x.untyped_storage()._cdata for x in (*host, *buffers)}
        due = [what for (name, _), what in self.lent.items() if what is not None and name not in ours]
        if due:
            raise Race(f"used beside the lane that frees it, and not held: {due}")


@contextmanager
def fake_cuda(device: str = "cuda:1") -> Iterator[Order]:
    """Within the block, offload orders its work as for this GPU, and each operator's place in the order is checked."""
    FakeStream.currents = {}
    order, stages, host = Order(device), list[offload.DeviceBlocks](), list[Tensor]()

    @contextmanager
    def run_on(stream: FakeStream) -> Iterator[None]:
        before, FakeStream.currents[stream.device] = FakeStream.current(stream.device), stream
        order.running = stream
        try:
            yield
        finally:
            order.running = FakeStream.currents[stream.device] = before

    def new_stage(stage: offload.DeviceBlocks, *args: Any) -> None:
        init(stage, *args)
        stages.append(stage)

    def new_host(*args: Any, **more: Any) -> Tensor:
        host.append(make_host(*args, **more))
        return host[-1]

    init, make_host = offload.DeviceBlocks.__init__, offload.DeviceBlocks.host
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "streams_of", lambda like: torch.device(device))
        patch.setattr(offload.DeviceBlocks, "__init__", new_stage)
        patch.setattr(offload.DeviceBlocks, "host", new_host)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: order.hold(tensor, stream))
        fakes = {"Stream": FakeStream, "Event": FakeEvent, "current_stream": FakeStream.current, "stream": run_on}
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        with order:
            yield order
        for stage in stages:
            order.the_end_of(stage, host)


@contextmanager
def delayed(lane: str, sleep: Callable[[offload.Lane], None]) -> Iterator[None]:
    """Within the block, this lane sleeps each time before it fills or empties a buffer: others could get ahead."""
    original = offload.Slot.wait

    def wait(slot: offload.Slot, which: int, on: offload.Lane) -> None:
        original(slot, which, on)
        if on.name == lane:
            sleep(on)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload.Slot, "wait", wait)
        yield
