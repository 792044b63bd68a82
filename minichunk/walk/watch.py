"""What stands between an algorithm and its model: it passes on every question as it is, and says what was asked.

So it is the functions of seco.py, spaco.py and full.py themselves that are watched, and they compute what they do
alone, bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..chunks import Chunk
from ..memory.layer_memory import LayerMemory
from ..protocol import DEFAULTS, Memory, Model, Options, Written

# (layer, first position, the one behind the last, a gradient for each tensor that was written there); no positions
# but an end: of what the chunk that ends there has handed on.
Sent = Callable[[int, int, int, Sequence[Tensor]], None]


class Observer(Protocol):
    """Who is told."""

    def made_memory(self, memory: Memory) -> None: ...
    def at_work(self) -> AbstractContextManager[None]: ...
    def filled(self, chunks: Sequence[Chunk], written: Written) -> None: ...
    def ran(self, chunks: Sequence[Chunk], written: Written) -> None: ...
    def asked_for_gradients(self, chunk: Chunk) -> None: ...
    def received(self, chunk: Chunk, received: Written) -> None: ...
    def sent(self, layer: int, start: int, stop: int, gradients: Sequence[Tensor]) -> None: ...
    def left_layer(self, layer: int) -> None: ...


class WatchedModel:
    """A `protocol.Model`, or a rank's part of one: what is not watched is the model's own.

    first_layer: the number of its first layer.
    """

    def __init__(self, model: Model, observer: Observer, first_layer: int = 0) -> None:
        self._model, self._observer, self._first_layer = model, observer, first_layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def new_memory(
        self, batch: int, capacity: int, receiving: Sequence[Chunk] = (), options: Options = DEFAULTS
    ) -> WatchedMemory:
        memory = self._model.new_memory(batch, capacity, receiving, options)
        for i, layer in enumerate(getattr(memory, "layers", ()), self._first_layer):
            watch_layer(layer, i, capacity, self._observer.sent)
        self._observer.made_memory(memory)
        return WatchedMemory(memory, self._observer)

    def run(
        self,
        input_ids: Tensor,
        memory: WatchedMemory | None = None,
        chunks: Sequence[Chunk] = (),
        options: Options = DEFAULTS,
    ) -> tuple[Tensor, Written]:
        with self._observer.at_work():
            hidden, written = self._model.run(input_ids, memory and memory.memory, chunks, options)
        self._observer.ran(chunks, written)
        return hidden, written

    def fill(self, input_ids: Tensor, memory: WatchedMemory, chunks: Sequence[Chunk], options: Options) -> Written:
        with self._observer.at_work():
            return self._model.fill(input_ids, memory.memory, chunks, options)


class WatchedMemory:
    """A `protocol.Memory`."""

    def __init__(self, memory: Memory, observer: Observer) -> None:
        self.memory, self.observer = memory, observer

    def write(self, chunks: Sequence[Chunk], written: Written) -> None:
        self.memory.write(chunks, written)
        self.observer.filled(chunks, written)

    def hand_over(self, chunk: Chunk) -> Written:
        self.observer.asked_for_gradients(chunk)
        received = self.memory.hand_over(chunk)
        self.observer.received(chunk, received)
        return received


def watch_layer(layer: LayerMemory, number: int, capacity: int, sent: Sent) -> None:
    """Be told of every gradient that is sent to a layer's memory. There are two ways in which that happens:

    - Its layer calls a method whose name begins with `add`, with the position where it begins, and a gradient
      (B, G, n, D) for each tensor that is written.
    - It has handed out leaves, by `past`, in whose `.grad` autograd adds it up: what a chunk has been handed on.
    """
    itself = weakref.ref(layer)  # or layer and method would hold each other, and live on when the step is done

    def adding(name: str) -> Callable[..., Any]:
        def add(start: int, *gradients: Tensor) -> Any:
            result = getattr(type(layer_of(itself)), name)(itself(), start, *gradients)
            sent(number, start, start + gradients[0].shape[2], list(gradients))
            return result

        return add

    def past(chunks: Sequence[Chunk], save: bool) -> Any:
        seen = type(layer_of(itself)).past(layer_of(itself), chunks, save)
        for leaf in tree_leaves(seen):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda gradient: sent(number, chunks[0].start, chunks[0].start, [gradient]))
        return seen

    for name in dir(type(layer)):
        if name.startswith("add"):
            setattr(layer, name, adding(name))
    layer.past = past  # type: ignore[method-assign]


def layer_of(reference: weakref.ref[LayerMemory]) -> LayerMemory:
    """What it refers to, which is alive as long as somebody asks it."""
    layer = reference()
    assert layer is not None
    return layer


@contextmanager
def watched_layers(layers: Sequence[nn.Module], left: Callable[[int], None], first: int = 0) -> Iterator[None]:
    """Within the block, be told when a backward pass has left a layer: its input then has its gradient.

    first: the number of the first of these layers.
    """

    def before(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            in_backward = torch._C._current_graph_task_id() != -1  # recompute runs the layer again
            if isinstance(inputs[0], Tensor) and inputs[0].requires_grad and not in_backward:
                inputs[0].register_hook(lambda _: left(number))

        return hook

    handles = [layer.register_forward_pre_hook(before(i)) for i, layer in enumerate(layers, first)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
