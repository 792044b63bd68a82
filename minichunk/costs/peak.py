"""What one training step takes at its peak: the real code, run on meta tensors and counted.
Meta tensors have a shape, a dtype and a storage of so many bytes, but no memory and no arithmetic. Not all chunks have
to be run. Of the fill, those on the longest past are enough. Of the rebuilds, the last chunk sends gradients back, the
one before it also receives some, and the earlier ones do the same on a shorter past."""

from collections import deque
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Batch, shift, widen_gradients
from ..blocks import Hidden, Walk, fill_with_graphs, first_that_learns
from ..chunks import span
from ..full import backpropagate
from ..memory import attention
from ..memory.kernels import kernel_for
from ..memory.window import FULL
from ..models.llama import Attention
from ..models.quantize import Linear4bit, check_bitsandbytes
from ..models.shapes import alike
from ..models.stack import Stack
from ..objective import score
from ..pipeline import pipeline_seco as pipeline
from ..pipeline.links import MOST_ON_THE_WAY, Links
from ..pipeline.stage import PipelineStage
from ..protocol import Options
from ..samplers import Weight
from ..seco import fill, new_memory, rebuild
from ..tree import Tree
from .baselines import tiled_full
from .count import CountBytes
from .setting import CHUNKED, Setting, Share, Way


@dataclass(frozen=True)
class StepBytes:
    """Bytes on the device at the peak of one training step, what they consist of, and bytes in host memory.
    between_blocks: what goes from one block of layers to the next."""

    peak: int
    weights: int
    adapter_and_optimizer: int
    cache: int
    cache_gradients: int
    between_blocks: int
    chunk: int
    host: int = 0


@lru_cache(None)
def step_memory(setting: Setting, tokens: int, share: Share | None = None, way: Way | None = None) -> StepBytes:
    """What a step of `tokens` tokens takes. Raises InputError.
    share: on one rank of a pipeline. way: of a step through blocks of layers, on this part of its way."""
    setting.check()
    if setting.load_in_4bit:  # the library makes the table of its levels once: or the first step would have taken more
        check_bitsandbytes()
        Linear4bit(torch.empty(64, 64, device="meta"), None).weight_as(setting.torch_dtype)
    # Not a function mode: recompute runs layers within the backward pass, where such modes are off.
    with (
        patch.object(F, "scaled_dot_product_attention", _flash),
        patch.object(attention, "pick_kernel", lambda q: kernel_for(setting.device, q.dtype, q.shape[-1])),
        CountBytes() as count,
    ):
        model = setting.meta_model()
        step: Any = _chunked_step if setting.method in CHUNKED else _whole_step
        if way is not None:
            step = partial(_block_step, way=way)
        if share is not None:
            learns_before = any(p.requires_grad for p in model.layers[: share.layers.start].parameters())
            step = partial(_rank_step, learns_before=learns_before)
            model = PipelineStage(model, share.counts, links=LinksToNobody(share))
        states = optimizer_states(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()) if not x.requires_grad)
        adapter = sum(x.nbytes for x in (*trained, *states))
        adapter += sum(p.numel() * max(4, p.itemsize) for p in trained)  # their gradients
        widen_gradients(model)
        if way is not None:  # earlier batches of the step, or blocks above, have left gradients
            for p in trained:
                p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        ids = torch.zeros(setting.rows, tokens, dtype=torch.int64, device="meta")
        labelled = torch.arange(tokens).expand(ids.shape) < tokens - 1  # every token has a label
        batch = Batch(ids, shift(ids), float(tokens), labelled, torch.arange(tokens, device="meta"))
        length, documents = setting.row(tokens)
        if documents.starts:
            tree = Tree(torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool), length)
            row = torch.zeros(1, length, dtype=torch.int64, device="meta")
            batch = Batch(
                row, torch.zeros_like(row), 1.0, torch.ones(1, length, dtype=torch.bool),
                torch.zeros_like(row)[:, None], torch.zeros(1, length, device="meta"), documents=documents, tree=tree,
            )  # fmt: skip
        count.peak = count.live  # making the model took more, for 4 bits much more; loading it does not
        cache, grads, between, host = step(model, batch, setting, count)
    chunk = count.peak - weights - adapter - cache - grads
    return StepBytes(count.peak + between, weights, adapter, cache, grads, between, chunk, host)


# Each step returns bytes: of the memory, of the gradients that have room in it from the start, of what waits between
# blocks of layers on the device, and in host memory.
Parts = tuple[int, int, int, int]


def _chunked_step(model: Any, batch: Batch, setting: Setting, count: CountBytes) -> Parts:
    """SeCO or SpaCO: what seco.py and spaco.py call."""
    kept, memory, options, (cache, grads) = _filled(model, batch, setting)
    if setting.graphs:
        model = fill_with_graphs(model, batch.input_ids, kept[:-1][-setting.graphs :], memory, options)
    for chunk in kept[: -3 - setting.rows // 2 : -1]:  # a third one of pairs, where a prompt's end may be short
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        if setting.method == "spaco":
            received = [1.0 * g for g in received]
        torch.autograd.backward([loss, *written], [None, *received])
        del loss, written, received
    return cache, grads, 0, 0


def _block_step(model: Stack, batch: Batch, setting: Setting, count: CountBytes, way: Way) -> Parts:
    """Up or down through one block: what blocks.py calls, for the last chunks; what waits between blocks left out."""
    tokens, wide = batch.input_ids.shape[1], model.config.hidden_size * model.hidden_dtype.itemsize
    (chunks, kept), options, blocks = setting.chunks(tokens), setting.options(), setting.blocks(model)
    options = replace(options, positions=batch.positions)
    # At the peak a pass of the fill is at work, and the next one is there. Or, where results pile up on the device, the
    # last pass, and the last chunk is there, and all results but of these.
    block, piles_up = blocks[way.block], not way.down and not setting.offload
    tail = chunks[-1 - setting.pass_chunks() * (1 if piles_up else 2) :]
    weight = (1.0, 2.0 if setting.method == "spaco" else 1.0)
    walk = Walk(model, batch, tail, [(chunk, weight) for chunk in kept if chunk in tail], options)
    x, y = (Hidden(batch.input_ids.device, offload=False, copies=None) for _ in range(2))
    x.room = y.room = count.room
    size = span(tail).stop - tail[0].start, model.config.hidden_size
    hidden = torch.zeros(1, *size, dtype=model.hidden_dtype, device="meta")
    x.keep(tail, hidden if way.block > 0 else batch.input_ids[:, span(tail)])
    y.keep(tail, hidden)
    not_yet = hidden.nbytes if piles_up else 0
    del hidden
    capacity, receiving = (kept[-1].start, kept[:-1]) if way.down else (chunks[-1].stop, ())
    memory = block.new_memory(1, capacity, receiving, options)
    cache, grads = memory.tensors().bytes()
    first = first_that_learns(blocks)
    if way.down:
        walk.go_down(block, memory, x, y if block is not blocks[-1] else None, learns_below=way.block > first)
    else:
        walk.go_up(block, memory, x, y)
    count.peak -= not_yet
    waiting = range(min(way.block, first), min(way.block + 2, len(blocks)))  # the inputs of these
    between = tokens * sum(wide if i > 0 else torch.int64.itemsize for i in waiting)
    return (cache, grads, 0, between) if setting.offload else (cache, grads, between, 0)


@lru_cache(None)
def ways(setting: Setting) -> list[Way]:
    """Those of a step in blocks that may need most. Where layers are alike: of the last two blocks."""
    blocks = setting.blocks(setting.meta_model())
    last, first = len(blocks) - 1, first_that_learns(blocks)
    start = max(0, last - 1) if alike(setting.config()) else 0
    return [Way(i, False) for i in range(start, last)] + [Way(i, True) for i in range(max(start, first), last + 1)]


def _rank_step(stage: PipelineStage, batch: Batch, setting: Setting, count: CountBytes, learns_before: bool) -> Parts:
    """One rank of a pipeline: what pipeline_seco.py calls, until the pipeline is full."""
    links, passes = stage.links, MOST_ON_THE_WAY + 1  # what passes of the fill have handed on lives on
    kept, memory, options, (cache, grads) = _filled(stage, batch, setting, passes)
    weight = Weight(1.0, 2.0 if setting.method == "spaco" else 1.0)
    walk = [(chunk, weight) for chunk in kept[-1 - max(links.ranks - links.rank, MOST_ON_THE_WAY) :]]
    with pipeline.tied_weight_summed(stage):
        pipeline.walk_back(stage, batch, memory, walk, options, learns_before)
        links.flush()
        del memory
    return cache, grads, 0, 0


def _whole_step(model: Stack, batch: Batch, setting: Setting, count: CountBytes) -> Parts:
    """A step without chunks."""
    for layer in model.modules():
        if isinstance(layer, Attention):  # or each made a mask of (tokens, tokens), as no trainer of long texts does
            layer.pattern = FULL
    if setting.method in ("full", "full-recompute"):
        backpropagate(model, batch, recompute=setting.method == "full-recompute")
    else:
        tiled_full(model, batch, offload=setting.method.endswith("offload"), room=count.room)
    return 0, 0, 0, count.left_out


def _filled(model: Any, batch: Batch, setting: Setting, passes: int = 1) -> tuple[Any, Any, Options, tuple[int, int]]:
    """The chunks that a step keeps, its memory after the last passes of the fill, its options, and the memory's bytes
    but for what comes later and goes: that is a chunk's."""
    tokens = (batch.input_ids if batch.tree is None else batch.tree.place).shape[1]
    (chunks, kept), options = setting.chunks(tokens), setting.options()
    options = replace(options, positions=batch.positions, documents=batch.documents)
    memory: Any = new_memory(model, batch.input_ids, kept, options)
    found = memory.tensors().bytes()
    last = passes * setting.pass_chunks()
    if setting.objective:
        score(model, batch, chunks[max(0, (len(chunks) - 1) // last - 2) * last :], memory, options)  # whole passes
    else:
        fill(model, batch.input_ids, chunks[:-1][-last:], memory, options)
    return kept, memory, options, found


class LinksToNobody(Links):
    """The links of one rank that is counted without the others: messages are sent and received, and never travel."""

    def __init__(self, share: Share) -> None:
        self.ranks, self.rank, self.copies, self.copy = len(share.counts), share.rank, 1, 0
        self.is_first, self.is_last = self.rank == 0, self.rank == self.ranks - 1
        self.ends = None
        self.on_the_way = deque()

    def take(self, x: Tensor, source: int) -> Tensor:
        return x

    def hand(self, x: Tensor, to: int) -> None:
        self.on_the_way.append((self, x.detach().contiguous(), to))
        self.flush(MOST_ON_THE_WAY)

    def wait(self) -> None:
        """A message has been taken."""

    def add(self, x: Tensor, group: Any = None) -> None:
        """Nothing comes from others."""


def optimizer_states(model: nn.Module) -> list[Tensor]:
    """AdamW's two moments of every trained parameter, and the float32 copies of those in half precision."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [torch.zeros_like(p, dtype=torch.float32) for p in trained for _ in range(3 if p.dtype.itemsize < 4 else 2)]


def _flash(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Ordinary causal attention as CPU and CUDA compute it; on meta tensors PyTorch would write out all scores."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal=True)[0]
    return out
