"""SeCO and SpaCO over several ranks, each of which has a block of the layers (Algorithms 1 and 2).

Every rank goes through the same loop over the same chunks. Of a chunk only its hidden state goes up to the next rank,
and only the gradient of that comes down. What it writes, and what later chunks send back to it, stays on the rank.

One thing is added to seco.py: a chunk waits. Between its rebuild (line 5) and its backward pass (lines 6 and 7) the
ranks above work on it, and this rank rebuilds the chunks before it, as many as there are ranks above. Turns go from the
last chunk to the first, so every sum has the same terms in the same order as in seco.py. (1F1B; arXiv 1806.03377.)
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, ChunkLoss, Objective, check_loss, lay_out, widen_gradients
from ..chunks import Chunk, check_fill_size, cut, span
from ..errors import InputError
from ..loss import loss_of_chunk
from ..memory.layer_memory import LayerMemories, wide
from ..objective import Scores, outputs, weigh
from ..protocol import Options, Written, relay
from ..samplers import Weight
from ..seco import fill, new_memory
from ..spaco import QUARTER, Sampler, check_weights
from .stage import PipelineStage


def pipeline_seco(stage: PipelineStage, input_ids: Tensor, labels: Tensor, chunk_size: int, **options: Any) -> Tensor:
    """`seco` of a model whose layers are on several ranks: adds to `.grad` what `seco` would add to these parameters.

    Called on all ranks with the same arguments; returns the loss on all of them. A tied weight gets its whole gradient
    on the first and on the last rank.
    options: the keywords of `seco`, but for `layers_at_once`, `offload` and `graphs`.
    Raises InputError also if ranks do not agree on the batch, and RankLost if one of them ends or does not answer.
    """
    return pipeline_spaco(
        stage, input_ids, labels, chunk_size, sampler=lambda num_chunks, _: [Weight(1.0, 1.0)] * num_chunks, **options
    )


def pipeline_spaco(
    stage: PipelineStage, input_ids: Tensor, labels: Tensor, chunk_size: int, *, objective: Objective | None = None,
    chunk_loss: ChunkLoss | None = None, sampler: Sampler = QUARTER, generator: torch.Generator | None = None,
    fill_size: int | None = None, num_targets: float | None = None, recompute: bool = False,
    cache_grad_dtype: torch.dtype | None = None, layers_at_once: int | None = None, offload: bool = False,
    positions: Tensor | None = None, starts: Sequence[int] = (), share: bool = False,
) -> Tensor:  # fmt: skip
    """`spaco` of a model whose layers are on several ranks; see pipeline_seco.

    The first rank draws for all of them, and the last one alone calls `objective` or `chunk_loss`.
    """
    if layers_at_once is not None or offload:  # a rank's next block could only begin when the ranks above are all done
        raise InputError("layers_at_once and offload are for one process: ranks that cut their layers would take turns")
    check_fill_size(fill_size, chunk_size)
    check_loss(num_targets, objective, chunk_loss, share)
    batch = lay_out(stage, stage.vocab_size, input_ids, labels, num_targets, positions, starts, share, chunk_size)
    widen_gradients(stage)
    batch, input_ids, documents = batch._replace(chunk_loss=chunk_loss), batch.input_ids, batch.documents
    chunks, links = cut(input_ids.shape[1], chunk_size, documents), stage.links
    options = Options(fill_size, recompute, cache_grad_dtype, positions=batch.positions, documents=documents)
    drawn = check_weights(sampler(len(chunks), generator), len(chunks)) if links.is_first else []
    weights, options, below_learns = agree(stage, input_ids, chunks, options, drawn, objective is not None)
    kept = [(chunk, weight) for chunk, weight in zip(chunks, weights, strict=True) if weight is not None]
    if not kept and objective is None:
        return torch.zeros((), dtype=wide(stage.like), device=input_ids.device)
    model: Any = stage  # no LM head is asked for
    run_again = [chunk for chunk, _ in kept]
    memory: Any
    if objective is None:
        memory = new_memory(model, input_ids, run_again, options)
        fill(model, input_ids, [chunk for chunk in chunks if chunk < kept[-1][0]], memory, options)  # lines 1-3
    else:
        memory = new_memory(model, input_ids, sorted({*run_again, chunks[-1]}), options)
        batch, value = weigh_on_the_last(stage, objective, batch, chunks, memory, options)
    with tied_weight_summed(stage):
        total = walk_back(stage, batch, memory, kept, options, below_learns)
        links.flush()
        del memory  # before room is needed for a tied weight's sum
    if objective is not None:
        total = value.to(total)
    links.add(total, links.up)  # 0 before the last rank
    return total


def weigh_on_the_last(
    stage: PipelineStage, objective: Objective, batch: Batch, chunks: Sequence[Chunk], memory: LayerMemories,
    options: Options,
) -> tuple[Batch, Tensor]:  # fmt: skip
    """See `weigh`, with the memory filled on the way; on other ranks the batch is as it was, and the loss is 0."""

    def run(input_ids: Tensor, *others: Any) -> tuple[Tensor, Written]:
        return stage.run_and_hand(stage.take(input_ids), *others)

    scores = Scores(stage.model, batch)
    for group, hidden in outputs(run, batch, chunks, memory, options):
        if stage.links.is_last:
            scores.keep(group, hidden)
        del hidden
    return weigh(objective, batch, scores.log_probs()) if stage.links.is_last else (batch, torch.zeros(()))


def agree(
    stage: PipelineStage, input_ids: Tensor, chunks: Sequence[Chunk], options: Options, drawn: Sequence[Weight | None],
    has_objective: bool,
) -> tuple[Sequence[Weight | None], Options, bool]:  # fmt: skip
    """The first rank's draw and its seed of the dropouts, for all; and whether anything learns on the ranks before.

    Raises InputError unless all ranks are about to do the same, and some parameter learns.
    """
    step = f"a batch of shape {list(input_ids.shape)}, a first chunk of {chunks[0].stop} and {options}"
    step += ", with an objective" if has_objective else ""
    learns = any(parameter.requires_grad for parameter in stage.parameters())
    said = stage.links.everyones((step, drawn, stage.dropout_seed(), learns))
    steps, draws, seeds, learning = zip(*said, strict=True)
    for rank, other in enumerate(steps):
        if other != steps[0]:
            raise InputError(f"rank {rank} was called with {other}, but rank 0 with {steps[0]}; all must do the same")
    if not any(learning):
        raise InputError("no parameter of the model requires a gradient: nothing to train")
    return draws[0], replace(options, dropout_seed=seeds[0]), any(learning[: stage.links.rank])


def walk_back(
    stage: PipelineStage, batch: Batch, memory: LayerMemories, kept: Sequence[tuple[Chunk, Weight]], options: Options,
    below_learns: bool,
) -> Tensor:  # fmt: skip
    """Lines 4-7. Returns the loss on the last rank, 0 on others. below_learns: whether a rank before learns."""
    links, waiting = stage.links, deque[Any]()
    total = torch.zeros((), dtype=wide(stage.like), device=batch.input_ids.device)
    for chunk, weight in reversed(kept):  # line 4
        x = stage.take(batch.input_ids[:, span([chunk])]).requires_grad_(below_learns)
        y, written = stage.run_and_hand(x, memory, [chunk], options)  # line 5
        waiting.append((chunk, weight, x, y, written))  # x, y (B, C, E): with the graph between
        del x, y, written  # or they would live on beside the next chunk's
        if len(waiting) == links.ranks - links.rank:
            total += _backward(stage, batch, memory, *waiting.popleft())
    while waiting:
        total += _backward(stage, batch, memory, *waiting.popleft())
    return total


def _backward(
    stage: PipelineStage, batch: Batch, memory: LayerMemories, chunk: Chunk, weight: Weight, x: Tensor, end: Tensor,
    written: Written,
) -> Tensor | float:  # fmt: skip
    """Lines 6 and 7, when a chunk's turn has come. Returns its share of the loss on the last rank, 0 on others."""
    links, grad = stage.links, None
    if links.is_last:
        end = weight.loss * loss_of_chunk(end, stage.model.lm_head.weight, batch, chunk)
    elif end.requires_grad:
        grad = links.take(torch.empty_like(end), links.rank + 1)
    if end.requires_grad:  # or nothing from the embedding up to here learns
        made, received = relay(written, memory.hand_over(chunk))
        if weight.relay != 1.0:  # or it would be a copy
            received = [weight.relay * g for g in received]
        torch.autograd.backward([end, *made], [grad, *received])  # line 7
    if x.grad is not None:
        links.hand(x.grad, links.rank - 1)
    return end.detach() if links.is_last else 0.0


@contextmanager
def tied_weight_summed(stage: PipelineStage) -> Iterator[None]:
    """A tied weight gets, on both ranks, the sum of what they find in the block and the gradient of earlier steps."""
    weight = stage.tied_weight
    if weight is None:
        yield
        return
    earlier, weight.grad = weight.grad, None
    yield
    if weight.grad is not None:
        stage.links.add(weight.grad, stage.links.ends)
        if earlier is not None:
            weight.grad += earlier
