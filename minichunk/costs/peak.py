"""What one training step takes at its peak: the real code, run on meta tensors and counted.
Meta tensors have a shape, a dtype and a storage of so many bytes, but no memory and no arithmetic. Not all chunks have
to be run. Of the fill, those on the longest past are enough. Of the rebuilds, the last chunk sends gradients back, the
one before it also receives some, and the earlier ones do the same on a shorter past."""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Batch, shift, widen_gradients
from ..blocks import Hidden, Walk, fill_with_graphs, first_that_learns
from ..chunks import Chunk, span
from ..full import backpropagate
from ..memory import attention
from ..memory.kernels import kernel_for
from ..memory.window import FULL
from ..models.llama import Attention
from ..models.shapes import alike, memory_of, random_model
from ..models.stack import Stack
from ..objective import Scores, score
from ..pipeline import links
from ..pipeline.links import MOST_ON_THE_WAY
from ..pipeline.pipeline_seco import tied_weight_summed, walk_back
from ..pipeline.stage import PipelineStage
from ..protocol import Options
from ..samplers import Weight
from ..seco import fill, rebuild
from ..training.options import PREFERENCES
from ..training.preferences import distillation
from ..tree import Tree
from .baselines import tiled_full
from .count import CountBytes
from .setting import CHUNKED, TEACHER, Setting, Share, Way


@dataclass(frozen=True)
class StepBytes:
    """What the bytes on the device consist of at the peak of one training step, and bytes in host memory.
    hidden_states: what goes from one block of layers to the next, and a teacher's."""

    weights: int
    adapter_and_optimizer: int
    cache: int
    cache_gradients: int
    hidden_states: int
    chunk: int
    host: int

    @property
    def peak(self) -> int:
        return sum(vars(self).values()) - self.host


@lru_cache(None)
def step_memory(setting: Setting, tokens: int, share: Share | None = None, way: Way | None = None) -> StepBytes:
    """What a step of `tokens` tokens takes. Raises InputError.
    share: on one rank of a pipeline. way: on this part of the step."""
    setting.check()
    # Not a function mode: recompute runs layers within the backward pass, where such modes are off.
    with (
        patch.object(F, "scaled_dot_product_attention", _flash),
        patch.object(links, "dist", _Nobody(share)),
        patch.object(attention, "pick_kernel", lambda q: kernel_for(setting.device, q.dtype, q.shape[-1])),
        CountBytes() as count,
    ):
        model = setting.meta_model()
        step: Any = _chunked_step if setting.method in CHUNKED else _whole_step
        if way is not None and way.block is not None:
            step = partial(_block_step, way=way)
        if share is not None:
            learns_before = any(p.requires_grad for p in model.layers[: share.layers.start].parameters())
            step = partial(_chunked_step, learns_before=learns_before)
            model = PipelineStage(model, share.counts)
        states = optimizer_states(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()) if not x.requires_grad)
        adapter = sum(x.nbytes for x in (*trained, *states)) + sum(p.numel() * max(4, p.itemsize) for p in trained)
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
        if setting.teacher:
            teacher = random_model(setting.teacher, setting.torch_dtype, device="meta")
            teacher.requires_grad_(False)
            weights += sum(x.nbytes for x in (*teacher.parameters(), *teacher.buffers()))
        count.peak = said = count.live  # making the model took more, for 4 bits much more; loading it does not
        if setting.teacher:
            batch = batch._replace(chunk_loss=distillation(teacher, model, batch, setting.chunk_size))
        said = count.live - said
        if way == TEACHER:  # at the end it has all hidden states twice
            cache, grads, hidden, host = int(setting.memory_bytes(tokens, way).sum()), 0, said, 0
        else:
            count.peak = count.live
            cache, grads, hidden, host = step(model, batch, setting, count)
    chunk = count.peak - weights - adapter - cache - grads - hidden - said
    return StepBytes(weights, adapter, cache, grads, hidden + said, chunk, host)


# Each step returns bytes: of the memory, of the gradients that have room in it from the start, of the hidden states
# that wait between blocks of layers on the device, and in host memory.
Parts = tuple[int, int, int, int]


def _chunked_step(model: Any, batch: Batch, setting: Setting, count: CountBytes, learns_before: bool = False) -> Parts:
    """SeCO or SpaCO: what seco.py and spaco.py call, or of a rank pipeline_seco.py, until the pipeline is full.
    What of the memory comes later and goes counts as a chunk's."""
    (chunks, kept), options = _chunks(batch, setting)
    memory, on_a_rank = memory_of(model, len(batch.input_ids), kept, options), isinstance(model, PipelineStage)
    (cache, grads), scale = memory.tensors().bytes(), 2.0 if setting.method == "spaco" else 1.0
    last = setting.pass_chunks() * (MOST_ON_THE_WAY + 1 if on_a_rank else 1)  # what a rank has handed on lives on
    if setting.objective in PREFERENCES:
        score(model, batch, chunks[max(0, (len(chunks) - 1) // last - 2) * last :], memory, options)  # whole passes
    else:
        fill(model, batch.input_ids, chunks[:-1][-last:], memory, options)
    if on_a_rank:
        above = max(model.links.ranks - model.links.rank, MOST_ON_THE_WAY)
        with tied_weight_summed(model):
            walk = [(chunk, Weight(1.0, scale)) for chunk in kept[-1 - above :]]
            walk_back(model, batch, memory, walk, options, learns_before)
            model.links.flush()
            del memory
        return cache, grads, 0, 0
    if setting.graphs:
        model = fill_with_graphs(model, batch.input_ids, kept[:-1][-setting.graphs :], memory, options)
    for chunk in kept[: -3 - setting.rows // 2 : -1]:  # a third one of pairs, where a prompt's end may be short
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        received = received if scale == 1.0 else [scale * g for g in received]
        torch.autograd.backward([loss, *written], [None, *received])
        del loss, written, received
    return cache, grads, 0, 0


def _block_step(model: Stack, batch: Batch, setting: Setting, count: CountBytes, way: Way) -> Parts:
    """Up or down through one block: what blocks.py calls, for the last chunks. What waits of others is computed."""
    (rows, length), first = batch.input_ids.shape, first_that_learns(blocks := setting.blocks(model))
    (chunks, kept), options = _chunks(batch, setting)
    # At the peak a pass of the fill is at work, and the next one is there. A prompt's last pass may be short.
    tail = chunks[-1 - setting.rows - 2 * setting.pass_chunks() :]
    weight = (1.0, 2.0 if setting.method == "spaco" else 1.0)
    walk = Walk(model, batch, tail, [(chunk, weight) for chunk in kept if chunk in tail], options)
    number, block, here = way.block or 0, blocks[way.block or 0], span(tail)
    x, y = (Hidden(batch.input_ids.device, offload=False, copies=None) for _ in range(2))
    x.room = y.room = count.room if setting.offload else torch.empty_like
    size = rows, here.stop - here.start, model.config.hidden_size
    hidden = torch.zeros(size, dtype=model.hidden_dtype, device="meta")
    x.keep(tail, hidden if number > 0 else batch.input_ids[:, here])
    if way.down and block is not blocks[-1]:
        y.keep(tail, hidden)
    del hidden
    capacity, receiving = (kept[-1].start, kept[:-1]) if way.down else (chunks[-1].stop, ())
    memory = block.new_memory(rows, capacity, receiving, options)
    cache, grads = memory.tensors().bytes()
    if way.down:
        walk.go_down(block, memory, x, y if block is not blocks[-1] else None, learns_below=number > first)
    else:
        walk.go_up(block, memory, x, y if block is not blocks[-1] else Scores(model, batch))
    wide = model.config.hidden_size * model.hidden_dtype.itemsize
    widths = {i: rows * (wide if i > 0 else torch.int64.itemsize) for i in range(len(blocks))}  # of the blocks' inputs
    waiting = range(min(number, first), min(number + 2, len(blocks)))
    between = length * sum(widths[i] for i in waiting)
    if setting.offload:
        return cache, grads, 0, between
    count.peak += between - size[1] * sum(widths[i] for i in waiting if i >= number)
    return cache, grads, between, 0


@lru_cache(None)
def ways(setting: Setting) -> list[Way]:
    """Those of a step that may need most: of one in blocks whose layers are alike, those of the last two."""
    found = [TEACHER] if setting.teacher else []
    if not setting.in_blocks:
        return [*found, Way(None, True)]
    blocks = setting.blocks(setting.meta_model())
    last, first, scores = len(blocks) - 1, first_that_learns(blocks), setting.objective in PREFERENCES
    start = max(0, last - 1) if alike(setting.config()) else 0
    found += [Way(i, False) for i in range(start, last + scores)]
    return found + [Way(i, True) for i in range(max(start, first), last + 1)]


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


def _chunks(batch: Batch, setting: Setting) -> tuple[tuple[list[Chunk], list[Chunk]], Options]:
    """Those of a batch, and those that are kept; and how they are computed."""
    tokens = (batch.input_ids if batch.tree is None else batch.tree.place).shape[1]
    options = replace(setting.options(), positions=batch.positions, documents=batch.documents)
    return setting.chunks(tokens), options


class _Nobody:
    """`torch.distributed` for a rank that is counted without the others: messages never travel, and nobody waits."""

    def __init__(self, share: Any) -> None:
        self.get_world_size, self.get_rank = lambda: len(share.counts), lambda: share.rank

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self

    def __getitem__(self, index: int) -> Any:
        return self


def optimizer_states(model: nn.Module) -> list[Tensor]:
    """AdamW's two moments of every trained parameter, and the float32 copies of those in half precision."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [torch.zeros_like(p, dtype=torch.float32) for p in trained for _ in range(3 if p.dtype.itemsize < 4 else 2)]


def _flash(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Ordinary causal attention as CPU and CUDA compute it; on meta tensors PyTorch would write out all scores."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal=True)[0]
    return out
