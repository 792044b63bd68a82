"""SeCO on several ranks with PyTorch's own engine for pipelines, as tutorial 10 says; not what the package uses.

`torch.distributed.pipelining` runs a schedule known as 1F1B: it goes through micro-batches in one order, forward and
backward. The chunks from last to first are such micro-batches. But the engine calls backward by itself, so what a
chunk's memory has received is put in where the graph passes by, at the output of the rank's layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.microbatch import TensorChunkSpec

import minichunk as mc
from minichunk.batch import Batch, make_batch
from minichunk.chunks import Chunk, cut, span
from minichunk.loss import summed_loss
from minichunk.memory.layer_memory import LayerMemories
from minichunk.protocol import flat


class Relay(torch.autograd.Function):
    """Lets y through; in its backward pass `written` gets the gradients that later chunks have sent back by then."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, memory: LayerMemories, chunk: Chunk, *written: Tensor) -> Tensor:
        ctx.memory, ctx.chunk, ctx.nothing = memory, chunk, [None] * len(written)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None, None, *(flat(ctx.memory.hand_over(ctx.chunk)) or ctx.nothing)


class Layers(nn.Module):
    """A rank's layers, as a module of hidden states (B, C, E) alone: which chunk comes next it has to know itself."""

    def __init__(self, stage: mc.PipelineStage, memory: LayerMemories) -> None:
        super().__init__()
        self.stage, self.memory = stage, memory
        self.order: Iterator[Chunk] = iter(())

    def forward(self, x: Tensor) -> Tensor:
        chunk = next(self.order)
        y, written = self.stage.run(x, self.memory, [chunk])
        if torch.is_grad_enabled():
            return Relay.apply(y, self.memory, chunk, *flat(written))  # lines 5 and 6
        self.memory.write([chunk], written)
        return y


def torch_seco(stage: mc.PipelineStage, input_ids: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    """`mc.pipeline_seco` on the engine: at least as many chunks as ranks, all of the same length."""
    links, batch, chunks = stage.links, make_batch(input_ids, labels, None), cut(input_ids.shape[1], chunk_size)
    assert input_ids.shape[1] % chunk_size == 0, "the engine wants chunks of one length"
    memory = stage.new_memory(input_ids.shape[0], chunks[-1].start, chunks[:-1])
    layers = Layers(stage, memory)
    if len(chunks) > 1:  # lines 1-3
        with torch.no_grad():
            run(ScheduleGPipe, layers, batch, chunks[:-1])
    losses = run(Schedule1F1B, layers, batch, chunks[::-1])  # lines 4-7
    total = torch.zeros((), dtype=stage.like.dtype, device=input_ids.device)
    for loss in losses:
        total = total + loss.detach()
    links.add(total, links.up)  # 0 before the last rank
    return total


def run(kind: Any, layers: Layers, batch: Batch, chunks: Sequence[Chunk]) -> list[Tensor]:
    """Run a schedule of the engine with these chunks, in this order, as micro-batches; the losses, on the last rank."""
    stage, links = layers.stage, layers.stage.links
    layers.order = iter(chunks)
    size = chunks[0].stop - chunks[0].start
    hidden = stage.like.new_empty(batch.input_ids.shape[0], size, stage.hidden_size).requires_grad_()
    ids, targets = (torch.cat([x[:, span([chunk])] for chunk in chunks], 1) for x in (batch.input_ids, batch.targets))
    pipe = PipelineStage(
        layers, links.rank, links.ranks, stage.like.device,
        input_args=ids[:, :size] if links.is_first else hidden, output_args=hidden,
    )  # fmt: skip

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return summed_loss(y, stage.model.lm_head.weight, target) / batch.num_targets

    walk = kind is Schedule1F1B
    how = {"args_chunk_spec": (TensorChunkSpec(1),), "scale_grads": False}
    engine = kind(pipe, len(chunks), loss_fn=loss if walk else None, **how)
    given, losses = (ids,) if links.is_first else (), list[Tensor]()
    if not walk:
        engine.eval(*given)
        return losses
    rows = targets.unflatten(1, (len(chunks), size)).transpose(0, 1).flatten(0, 1)  # the engine cuts it along its rows
    engine.step(*given, target=rows if links.is_last else None, losses=losses, return_outputs=False)
    return losses
