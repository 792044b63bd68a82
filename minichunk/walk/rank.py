"""Who writes down what one rank of a pipeline does, in a log of its own. merge.py makes one log of those of all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from ..chunks import Chunk
from ..pipeline import pipeline_seco as step
from ..pipeline.pipeline_seco import agree
from ..pipeline.stage import PipelineStage
from ..protocol import Written
from .events import Event
from .recorder import Recorder

T = TypeVar("T")
WORK = ("fill", "rebuild", "done")  # what takes the time of a step; all else is waiting


class RankRecorder(Recorder):
    """Several chunks have a graph at a time; the running one is that whose turn it is."""

    def __init__(
        self, stage: PipelineStage, chunks: Sequence[Chunk], on_event: Callable[[Event], object], *batch: Tensor
    ) -> None:
        super().__init__(stage, chunks, on_event, *batch)
        self.links, self.held, self.num_layers = stage.links, stage.layer_range, len(stage.model.layers)
        self.first_layer = stage.layer_range.start
        twice = None if stage.links.is_first else stage.tied_weight  # counts on the first rank
        self.counted = [p for p in self.counted if p is not twice]
        self.began = self.ended = time.time()  # the last work

    @contextmanager
    def watching(self, given: dict[str, Any]) -> Iterator[None]:
        turn = step._backward

        def watched_agree(*arguments: Any) -> Any:
            weights, *others = agree(*arguments)
            if "sampler" in given and not self.links.is_first:
                self.drew(weights)
            return weights, *others

        def watched_turn(stage: Any, batch: Any, memory: Any, waiting: step.Rebuilt) -> Any:
            self.running, self.began = self.chunks.index(waiting.chunk), time.time()
            self.ended = self.began  # where nothing learns there is no backward pass
            share = turn(stage, batch, memory, waiting)
            self._finish_chunk()
            return share

        with super().watching(given), patch.multiple(step, agree=watched_agree, _backward=watched_turn):
            yield

    def layers(self) -> dict[str, Any]:
        """How many there are on all ranks, and which of them on this one."""
        mine = [self.held.start, self.held.stop]
        return {
            "layers": self.num_layers,
            "ranks": [mine if i == self.links.rank else None for i in range(self.links.ranks)],
        }

    def write(self, kind: str, **fields: Any) -> Event:
        if kind == "done" and not self.links.is_last:
            del fields["loss"]
        times = {"time": self.ended, "took": self.ended - self.began} if kind in WORK else {"time": time.time()}
        return super().write(kind, **fields, rank=self.links.rank, **times)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self.began = time.time()
        yield
        self.ended = time.time()

    def ran(self, chunks: Sequence[Chunk], written: Written) -> None:
        if torch.is_grad_enabled():
            self.write("rebuild", chunk=self.chunks.index(chunks[0]), **self._written(written))

    def asked_for_gradients(self, chunk: Chunk) -> None:
        if self.links.is_last:
            self._write_loss()

    def watched_backward(self, backward: Callable[..., None]) -> Callable[..., None]:
        def watched(tensors: Sequence[Tensor], *arguments: Any) -> None:
            if self.links.is_last:
                self._loss_is(tensors[0])
            with self.at_work():
                backward(tensors, *arguments)

        return watched

    def of_all(self, rows: Sequence[T], nothing: T) -> list[T]:
        return [nothing] * self.held.start + list(rows) + [nothing] * (self.num_layers - self.held.stop)
