"""The heaviest parts of a step, which are all that has to be counted of it.

Of the fill, the chunks on the longest past are enough. Of the rebuilds, the last chunk sends gradients back, the one
before it also receives some, and the further ones do the same on a shorter past.

A function here is given a model on meta tensors, a batch, and what counts. It returns the bytes of the memory and of
the gradients that have room in it from the start, both on the device, and what is in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import Batch
from ..chunks import Chunk, cut, span
from ..full import backpropagate
from ..memory.cache import LayerCache
from ..memory.kernels import kernel_for
from ..memory.layer_memory import LayerMemories, LayerMemory
from ..memory.offload import OffloadedLayer
from ..memory.window import FULL, WindowCache
from ..models.llama import Attention
from ..models.stack import Stack
from ..pipeline import pipeline_seco as pipeline
from ..pipeline.links import MOST_ON_THE_WAY
from ..pipeline.stage import PipelineStage
from ..protocol import Written
from ..samplers import Weight
from ..seco import fill, new_memory, rebuild
from .alike import Trace
from .baselines import tiled_full
from .setting import Setting

Bytes = tuple[int, int, int]


def chunked_step(model: Stack, batch: Batch, setting: Setting, count: Trace) -> Bytes:
    """Of SeCO or SpaCO: what seco.py and spaco.py call."""
    chunks, kept = _chunks(batch, setting)
    options = setting.options()
    memory, held = _new_memory(model, batch, kept, setting, count)
    group = (setting.fill_size or setting.chunk_size) // setting.chunk_size
    count.next_part()
    fill(model, batch.input_ids, chunks[:-1][-group:], memory, options)
    for chunk in kept[:-3:-1]:
        count.next_part()
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        if setting.method == "spaco":
            count.next_part()
            received = [1.0 * g for g in received]
        torch.autograd.backward([loss, *written], [None, *received])
        del loss, written, received
    return held


def rank_step(stage: PipelineStage, below_learns: bool, batch: Batch, setting: Setting, count: Trace) -> Bytes:
    """Of a rank of a pipeline: what pipeline_seco.py calls, until the pipeline is full."""
    chunks, kept = _chunks(batch, setting)
    options, links = setting.options(), stage.links
    memory, held = _new_memory(stage, batch, kept, setting, count)
    group = (setting.fill_size or setting.chunk_size) // setting.chunk_size
    groups = [chunks[:-1][max(0, stop - group) : stop] for stop in range(len(chunks) - 1, 0, -group)]
    for some in reversed(groups[: MOST_ON_THE_WAY + 1]):  # what they have handed on lives on
        count.next_part()
        memory.write(some, stage.fill(batch.input_ids[:, span(some)], memory, some, options))
    count.next_part()
    weight = Weight(1.0, 2.0 if setting.method == "spaco" else 1.0)
    walk = [(chunk, weight) for chunk in kept[-1 - max(links.ranks - links.rank, MOST_ON_THE_WAY) :]]
    with pipeline.tied_weight_summed(stage):
        pipeline.walk_back(stage, batch, memory, walk, options, below_learns)
        links.flush()
        del memory
    return held


def _chunks(batch: Batch, setting: Setting) -> tuple[list[Chunk], list[Chunk]]:
    """All of them, and those that are kept: the last ones."""
    chunks = cut(batch.input_ids.shape[1], setting.chunk_size)
    return chunks, chunks[-setting.kept(len(chunks)) :]


def _new_memory(
    model: Stack, batch: Batch, kept: Sequence[Chunk], setting: Setting, count: Trace
) -> tuple[LayerMemories, Bytes]:
    """The memory of a step, and what it takes; that which is not on the device is not counted."""
    with torch.device("meta"):  # the host's part too
        made = count.without(
            lambda: new_memory(model, batch.input_ids, kept, setting.options()),
            lambda memory: [x for held in memory.tensors() for x in held] if setting.offload else [],
        )
    cache, grads = made.tensors().bytes()  # and not what comes later and goes: that is a chunk's
    for layer in made.layers:
        if isinstance(layer, LayerCache | WindowCache | OffloadedLayer):
            layer.kernel = kernel_for(setting.device, setting.dtype, model.config.head_dim)
    held = (0, 0, cache + grads) if setting.offload else (cache, grads, 0)
    return _InParts(made.layers, kept[:-1], count), held


class _InParts(LayerMemories):
    """Goes through the layers for itself, not within the model's forward pass."""

    def __init__(self, layers: Sequence[LayerMemory], kept: Sequence[Chunk], count: Trace) -> None:
        super().__init__(layers, kept)
        self.count = count

    def write(self, chunks: Sequence[Chunk], written: Written) -> None:
        self.count.next_part()
        super().write(chunks, written)

    def hand_over(self, chunk: Chunk) -> Written:
        self.count.next_part()
        return super().hand_over(chunk)


def whole_step(model: Stack, batch: Batch, setting: Setting, count: Trace) -> tuple[int, int, int]:
    """A step without chunks; see above."""
    for layer in model.modules():
        if isinstance(layer, Attention):  # or each made a mask of (tokens, tokens), as no trainer of long texts does
            layer.pattern = FULL
    if setting.method in ("full", "full-recompute"):
        backpropagate(model, batch, recompute=setting.method == "full-recompute")
        return 0, 0, 0
    host = 0

    def room(x: Tensor) -> Tensor:
        nonlocal host
        host += x.numel() * x.element_size()
        made: Tensor = count.without(lambda: torch.empty_like(x), lambda y: [y])
        return made

    tiled_full(model, batch, offload=setting.method.endswith("offload"), room=room)
    return 0, 0, host
