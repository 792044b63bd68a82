"""SeCO and SpaCO over several ranks, each of which has a block of the layers (Algorithms 1 and 2).

Every rank goes through the same loop over the same chunks; of a chunk only its hidden state goes up to the next rank,
and the gradient of that comes down again. What the chunk writes, and what later chunks send back to that, stays with
the rank that has the layer: the ranks share no memory.

There is one more thing than in seco.py: a chunk has to wait. Between its rebuild (line 5) and its turn (lines 6, 7)
the ranks above work on it, and this rank rebuilds the chunks before it, as many as there are ranks from here on.
`received` is asked only when the turn comes, for only then have all later chunks sent back their part: the turns go
from the last chunk to the first, as in seco.py, and every sum has the same terms in the same order. (The schedule is
known as 1F1B; PipeDream, arXiv 1806.03377.) seco.py says the same without the waiting, and so remains as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Batch, check_tokens, make_batch, widen_gradients
from ..chunks import Chunk, check_fill_size, cut, groups, span
from ..loss import summed_loss
from ..memory.layer_memory import LayerMemories, wide
from ..protocol import Options, Written
from ..samplers import Weight
from ..seco import flat
from ..spaco import QUARTER, Sampler, check_weights
from .stage import PipelineStage
from .together import Weights, add_up, agree, set_aside


def pipeline_seco(
    stage: PipelineStage,
    input_ids: Tensor,
    labels: Tensor,
    chunk_size: int,
    *,
    fill_size: int | None = None,
    num_targets: float | None = None,
    recompute: bool = False,
    cache_grad_dtype: torch.dtype | None = None,
    offload: bool = False,
) -> Tensor:
    """`seco` of a model whose layers are on several ranks: adds to `.grad` what `seco` would add to these parameters.

    Called on all ranks with the same arguments, which are those of `seco`; returns the loss on all of them. A weight
    that is both embedding and LM head gets its whole gradient on the first and on the last rank.
    Raises InputError also if ranks do not agree on the batch, and RankLost if one of them ends or does not answer.
    """
    options = Options(fill_size, recompute, cache_grad_dtype, offload)
    return _step(stage, input_ids, labels, chunk_size, num_targets, options, lambda k: [Weight(1.0, 1.0)] * k)


def pipeline_spaco(
    stage: PipelineStage,
    input_ids: Tensor,
    labels: Tensor,
    chunk_size: int,
    *,
    sampler: Sampler = QUARTER,
    generator: torch.Generator | None = None,
    fill_size: int | None = None,
    num_targets: float | None = None,
    recompute: bool = False,
    cache_grad_dtype: torch.dtype | None = None,
    offload: bool = False,
) -> Tensor:
    """`spaco` of a model whose layers are on several ranks; see pipeline_seco. The first rank draws for all of them."""
    options = Options(fill_size, recompute, cache_grad_dtype, offload)

    def draw(num_chunks: int) -> Weights:
        return check_weights(sampler(num_chunks, generator), num_chunks)

    return _step(stage, input_ids, labels, chunk_size, num_targets, options, draw)


class Waiting(NamedTuple):
    """A chunk that has been rebuilt and waits for its turn: its input and output (B, C, E), and what it wrote."""

    chunk: Chunk
    weight: Weight
    x: Tensor
    y: Tensor
    written: Written


def _step(
    stage: PipelineStage,
    input_ids: Tensor,
    labels: Tensor,
    chunk_size: int,
    num_targets: float | None,
    options: Options,
    draw: Callable[[int], Weights],
) -> Tensor:
    check_fill_size(options.fill_size, chunk_size)
    check_tokens(input_ids, labels, num_targets, stage.vocab_size)
    widen_gradients(stage)
    batch, chunks, links = make_batch(input_ids, labels, num_targets), cut(input_ids.shape[1], chunk_size), stage.links
    weights, options, below_learns = agree(stage, input_ids, chunks, options, draw)
    kept = [(chunk, weight) for chunk, weight in zip(chunks, weights, strict=True) if weight is not None]
    total = torch.zeros((), dtype=wide(stage.like), device=input_ids.device)
    if not kept:
        return total
    before = set_aside(stage)
    last = kept[-1][0]
    memory = stage.new_memory(input_ids.shape[0], last.start, [chunk for chunk, _ in kept[:-1]], options)
    for group in groups([chunk for chunk in chunks if chunk < last], options.fill_size):  # lines 1-3
        memory.write(group, fill(stage, batch, memory, group, options))
    total = total + walk_back(stage, batch, memory, kept, options, below_learns)
    links.flush()
    del memory  # another copy of a tied weight's gradient is to come
    add_up(stage, before)
    return links.from_last(total)


def fill(
    stage: PipelineStage, batch: Batch, memory: LayerMemories, chunks: Sequence[Chunk], options: Options
) -> Written:
    """Run these chunks without gradients and hand them on; on the last rank only as far as the memory needs it.

    Returns what they write.
    """
    x = stage.take(batch.input_ids[:, span(chunks)])
    if stage.links.is_last:
        return stage.fill(x, memory, chunks, options)
    with torch.no_grad():
        y, written = stage.run(x, memory, chunks, replace(options, recompute=False))
    stage.links.hand_up(y)
    return written


def walk_back(
    stage: PipelineStage,
    batch: Batch,
    memory: LayerMemories,
    kept: Sequence[tuple[Chunk, Weight]],
    options: Options,
    below_learns: bool,
) -> Tensor | float:
    """Lines 4-7; below_learns: whether anything learns on the ranks before. Returns the loss, on the last rank."""
    links, waiting = stage.links, deque[Waiting]()
    total: Tensor | float = 0.0
    for chunk, weight in reversed(kept):  # line 4
        x = stage.take(batch.input_ids[:, span([chunk])]).requires_grad_(below_learns)
        y, written = stage.run(x, memory, [chunk], options)  # line 5
        if not links.is_last:
            links.hand_up(y)
        waiting.append(Waiting(chunk, weight, x, y, written))
        del x, y, written  # or they would live on beside the next chunk's
        if len(waiting) == links.ranks - links.rank:
            total = total + _backward(stage, batch, memory, waiting.popleft())
    while waiting:
        total = total + _backward(stage, batch, memory, waiting.popleft())
    return total


def _backward(stage: PipelineStage, batch: Batch, memory: LayerMemories, chunk: Waiting) -> Tensor | float:
    """Lines 6 and 7, when a chunk's turn has come; returns its share of the loss, on the last rank."""
    end, grad, weight = chunk.y, None, chunk.weight
    if stage.links.is_last:
        targets = batch.targets[:, span([chunk.chunk])]
        loss = summed_loss(chunk.y, stage.model.lm_head.weight, targets) / batch.num_targets
        end = weight.loss * loss
    elif end.requires_grad:
        grad = stage.links.take_down(torch.empty_like(end))
    if end.requires_grad:  # or nothing from the embedding up to here learns
        made, sent = flat(chunk.written), flat(memory.hand_over(chunk.chunk))  # line 6
        if weight.relay != 1.0:  # or it would be a copy
            sent = [weight.relay * g for g in sent]
        relayed = [(m, g) for m, g in zip(made, sent, strict=True) if m.requires_grad] if sent else []
        torch.autograd.backward([end, *(m for m, _ in relayed)], [grad, *(g for _, g in relayed)])  # line 7
    if chunk.x.grad is not None:
        stage.links.hand_down(chunk.x.grad)
    return end.detach() if stage.links.is_last else 0.0
