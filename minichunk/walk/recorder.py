"""Who writes the events of a step down."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import Chunk
from ..memory.layer_memory import wide
from ..memory.state import LayerState
from ..protocol import Memory, Written
from ..samplers import Bernoulli, Weight
from .events import FORMAT, Event
from .meter import Meter
from .watch import WatchedModel, watched_layers

T = TypeVar("T")
Sums = dict[tuple[int, int], list[Tensor]]


class Recorder:
    """Writes the events down; a `watch.Observer`."""

    first_layer = 0  # of those that are here

    def __init__(
        self, model: Any, chunks: Sequence[Chunk], on_event: Callable[[Event], object], *batch: Tensor
    ) -> None:
        self.model = model
        self.events: list[Event] = []
        self.chunks, self.on_event = list(chunks), on_event
        self.meter = Meter(model, *batch)
        self.counted = self.meter.parameters  # in the norm of their gradients
        self.memory: Memory | None = None
        self.factors: list[tuple[float, float]] = [(1.0, 1.0)] * len(chunks)
        self.running: int | None = None  # the chunk whose graph is alive
        self.now: Sums = {}  # what has been sent back, by layer and chunk, since the last event
        self.sums: Sums = {}  # before that
        self.loss = 0.0

    @contextmanager
    def watching(self, given: dict[str, Any]) -> Iterator[None]:
        """Within the block the step is watched; given: the function's arguments, the model the first of them."""
        if "sampler" in given:
            given["sampler"] = self.watched_sampler(given["sampler"])
        given[next(iter(given))] = WatchedModel(self.model, self, self.first_layer)
        backward = self.watched_backward(torch.autograd.backward)
        layers = watched_layers(list(self.model.layers), self.left_layer, self.first_layer)
        with self.meter, layers, patch.object(torch.autograd, "backward", backward):
            yield

    def write(self, kind: str, **fields: Any) -> Event:
        """Write an event down, with the bytes that are alive."""
        held = self.memory.tensors().bytes() if self.memory is not None and hasattr(self.memory, "tensors") else (0, 0)
        sizes, peak = self.meter.read(held)
        event = {"step": len(self.events), "kind": kind, **fields, "bytes": sizes, "peak": peak}
        self.events.append(event)
        self.on_event(event)
        return event

    def begin(self, method: str, input_ids: Tensor, recompute: bool | str) -> None:
        self.write(
            "begin", format=FORMAT, method=method, chunks=[list(chunk) for chunk in self.chunks], **self.layers(),
            batch=input_ids.shape[0], tokens=input_ids.shape[1], recompute=bool(recompute),
            parameters=sum(p.numel() for p in self.counted), torch=torch.__version__,
        )  # fmt: skip

    def layers(self) -> dict[str, Any]:
        """How many there are."""
        return {"layers": len(self.model.layers)}

    def end(self, loss: Tensor) -> None:
        self._finish_chunk()
        self.memory = None
        self.sums.clear()
        self.write("end", loss=float(loss), gradient_norm=self._gradient_norm())

    # What the algorithm does, in its own order.

    def watched_sampler(self, sampler: Callable[..., Any]) -> Callable[..., Any]:
        def draw(num_chunks: int, generator: torch.Generator | None) -> Any:
            entries = sampler(num_chunks, generator)
            rates = {"rates": list(sampler.rates(num_chunks))} if isinstance(sampler, Bernoulli) else {}
            self.drew(entries, **rates)
            return entries

        return draw

    def drew(self, entries: Sequence[Weight | None], **rates: list[float]) -> None:
        self.write("draw", entries=[weight and [float(x) for x in weight] for weight in entries], **rates)
        self.factors = [weight or (0.0, 0.0) for weight in entries]

    def made_memory(self, memory: Memory) -> None:
        self.memory = memory
        layers = getattr(memory, "layers", ())
        names = ["state" if isinstance(layer, LayerState) else "keys and values" for layer in layers]
        self.write("memory", remembers=self.of_all(names, None))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self._finish_chunk()
        yield

    def filled(self, chunks: Sequence[Chunk], written: Written) -> None:
        self.write("fill", chunks=[self.chunks.index(chunk) for chunk in chunks], **self._written(written))

    def ran(self, chunks: Sequence[Chunk], written: Written) -> None:
        if not torch.is_grad_enabled():
            return
        self.running = self.chunks.index(chunks[0]) if chunks else 0
        if chunks:
            self.write("rebuild", chunk=self.running, **self._written(written))
        else:
            self.write("forward", chunk=0)

    def asked_for_gradients(self, chunk: Chunk) -> None:
        self._write_loss()

    def received(self, chunk: Chunk, received: Written) -> None:
        running = self.chunks.index(chunk)
        self.write("relay", chunk=running, received=received and self._norms(received), factor=self.factors[running][1])

    def watched_backward(self, backward: Callable[..., None]) -> Callable[..., None]:
        def watched(tensors: Any, *arguments: Any, **keywords: Any) -> None:
            if self.running is not None:
                if self.events[-1]["kind"] in ("rebuild", "forward"):
                    self._write_loss()
                self._loss_is(tensors if isinstance(tensors, Tensor) else tensors[0])
            backward(tensors, *arguments, **keywords)

        return watched

    def _write_loss(self) -> None:
        self.write("loss", chunk=self.running, loss=0.0, factor=self.factors[self.running or 0][0])

    def _loss_is(self, loss: Tensor) -> None:
        event = next(event for event in reversed(self.events) if event["kind"] == "loss")
        event["loss"] = float(loss.detach())
        self.loss += event["loss"]

    def sent(self, layer: int, start: int, stop: int, gradients: Sequence[Tensor]) -> None:
        """Part of what a layer sends back, see watch.Sent: sorted by the chunks that it is for."""
        with self.meter.paused():
            for i, chunk in enumerate(self.chunks):
                low, high = max(start, chunk.start), min(stop, chunk.stop)
                if start == stop == chunk.stop:
                    self._add(self.now, (layer, i), [g.detach() for g in gradients])
                elif low < high:
                    length = chunk.stop - chunk.start
                    rows = [g.detach()[:, :, low - start : high - start] for g in gradients]
                    placed = [F.pad(g, (0, 0, low - chunk.start, length + chunk.start - high)) for g in rows]
                    self._add(self.now, (layer, i), placed)

    @staticmethod
    def _add(sums: Sums, key: tuple[int, int], tensors: Sequence[Tensor]) -> None:
        before = sums.get(key, [torch.zeros((), device=x.device) for x in tensors])
        sums[key] = [x + y.to(wide(y)) for x, y in zip(before, tensors, strict=True)]

    def left_layer(self, layer: int) -> None:
        """The backward pass of the running chunk has left a layer."""
        with self.meter.paused():
            sent = {i: tensors for (at, i), tensors in sorted(self.now.items()) if at == layer}
            for i, tensors in sent.items():
                self._add(self.sums, (layer, i), tensors)
                del self.now[layer, i]
            rows = [[i, *self._norm_list(tensors)] for i, tensors in sent.items()]
            held = [[i, *self._norm_list(self.sums[layer, i])] for i in sent]
        self.write("backward", chunk=self.running, layer=layer, sent=rows, held=held)

    def _finish_chunk(self) -> None:
        """Its graph is gone. A layer that nothing below it learns from is left without a word: what it sent is here."""
        if self.running is None:
            return
        for layer in sorted({layer for layer, _ in self.now}, reverse=True):
            self.left_layer(layer)
        self.write("done", chunk=self.running, loss=self.loss, gradient_norm=self._gradient_norm())
        self.running = None

    # Numbers.

    def _norm_list(self, tensors: Sequence[Tensor]) -> list[float]:
        with self.meter.paused():
            return [float(torch.linalg.vector_norm(x.detach(), dtype=torch.float64)) for x in tensors]

    def _norms(self, written: Written) -> list[list[float]]:
        return self.of_all([self._norm_list(layer) for layer in written], [])

    def _written(self, written: Written) -> dict[str, Any]:
        shapes = self.of_all([[list(x.shape) for x in layer] for layer in written], [])
        return {"written": self._norms(written), "shapes": shapes}

    def of_all(self, rows: Sequence[T], nothing: T) -> list[T]:
        """One for each layer of the model, where these are of the layers that are here."""
        return list(rows)

    def _gradient_norm(self) -> float:
        return math.hypot(*self._norm_list([p.grad for p in self.counted if p.grad is not None]))
