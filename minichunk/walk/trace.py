"""`trace`: take one real step and write down what happens in it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import check_batch
from ..chunks import Chunk, cut
from ..memory.layers import wide
from ..memory.state import LayerState
from ..protocol import Memory, Written
from ..samplers import Bernoulli
from .events import FORMAT, Event
from .meter import Meter
from .watch import WatchedModel, watched_layers

Sums = dict[tuple[int, int], list[Tensor]]


def trace(
    function: Callable[..., Tensor],
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    *arguments: Any,
    on_event: Callable[[Event], object] = lambda event: None,
    **keywords: Any,
) -> list[Event]:
    """Call `function(model, input_ids, labels, …)`, one of `seco`, `spaco` and `full`; return the log of its events.

    The function is run as it is and adds to `.grad` what it adds alone, bit for bit; events.py describes the log. The
    arguments after `labels` are the function's own.

    model: a `protocol.Model` with its `layers`, as all of ours are.
    on_event: called with each event as it happens, within the function; a loss is written into its event only when
        the backward pass begins.
    Slower than the step alone, and for one at a time: it puts itself in the place of `torch.autograd.backward`.
    Raises InputError as the function does.
    """
    check_batch(model, input_ids, labels, None)
    bound = inspect.signature(function).bind(model, input_ids, labels, *arguments, **keywords)
    bound.apply_defaults()
    given, tokens = bound.arguments, input_ids.shape[1]
    recorder = Recorder(model, cut(tokens, given.get("chunk_size", tokens)), on_event, input_ids, labels)
    if "sampler" in given:
        given["sampler"] = recorder.watched_sampler(given["sampler"])
    backward = recorder.watched_backward(torch.autograd.backward)
    layers = list(model.layers)
    recorder.begin(function.__name__, input_ids, len(layers), given.get("recompute", False))
    watching = watched_layers(layers, recorder.left_layer)
    with recorder.meter, watching, patch.object(torch.autograd, "backward", backward):
        given[next(iter(given))] = WatchedModel(model, recorder)
        loss = function(*bound.args, **bound.kwargs)
    recorder.end(loss)
    return recorder.events


class Recorder:
    """Writes the events down; a `watch.Observer`."""

    def __init__(
        self, model: Any, chunks: Sequence[Chunk], on_event: Callable[[Event], object], *batch: Tensor
    ) -> None:
        self.events: list[Event] = []
        self.chunks, self.on_event = list(chunks), on_event
        self.meter = Meter(model, *batch)
        self.memory: Memory | None = None
        self.factors: list[tuple[float, float]] = [(1.0, 1.0)] * len(chunks)
        self.running: int | None = None  # the chunk whose graph is alive
        self.now: Sums = {}  # what has been sent back, by layer and chunk, since the last event
        self.sums: Sums = {}  # before that
        self.loss = 0.0

    def write(self, kind: str, **fields: Any) -> Event:
        """Write an event down, with the bytes that are alive."""
        held = self.memory.tensors().bytes() if self.memory is not None and hasattr(self.memory, "tensors") else (0, 0)
        sizes, peak = self.meter.read(held)
        event = {"step": len(self.events), "kind": kind, **fields, "bytes": sizes, "peak": peak}
        self.events.append(event)
        self.on_event(event)
        return event

    def begin(self, method: str, input_ids: Tensor, layers: int, recompute: bool | str) -> None:
        self.write(
            "begin", format=FORMAT, method=method, chunks=[list(chunk) for chunk in self.chunks], layers=layers,
            batch=input_ids.shape[0], tokens=input_ids.shape[1], recompute=bool(recompute),
            parameters=sum(p.numel() for p in self.meter.parameters), torch=torch.__version__,
        )  # fmt: skip

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
            self.write("draw", entries=[weight and [float(x) for x in weight] for weight in entries], **rates)
            self.factors = [weight or (0.0, 0.0) for weight in entries]
            return entries

        return draw

    def made_memory(self, memory: Memory) -> None:
        self.memory = memory
        layers = getattr(memory, "layers", ())
        names = ["state" if isinstance(layer, LayerState) else "keys and values" for layer in layers]
        self.write("memory", remembers=names)

    def will_run(self) -> None:
        self._finish_chunk()

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
        self.write("relay", chunk=running, received=self._norms(received), factor=self.factors[running][1])

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
        return [self._norm_list(layer) for layer in written]

    def _written(self, written: Written) -> dict[str, Any]:
        return {"written": self._norms(written), "shapes": [[list(x.shape) for x in layer] for layer in written]}

    def _gradient_norm(self) -> float:
        return math.hypot(*self._norm_list([p.grad for p in self.meter.parameters if p.grad is not None]))
