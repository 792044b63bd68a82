"""SeCO: the exact gradient with the activations of one chunk in memory (Algorithm 1).

One thing cannot be seen here by a reader who knows only autograd: where `received` comes from. When a chunk is
backpropagated, what it read of earlier chunks are numbers without a graph, and autograd stops there. So whatever reads
the memory adds, in its own backward pass, the gradients of what it has read *to the memory* (for keys and values:
memory/attention.py, which hands them to memory/cache.py). Once all later chunks are done, they are complete.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Batch, ChunkLoss, Objective, prepare
from .blocks import check_graphs, fill_with_graphs, through_blocks
from .chunks import Chunk, check_fill_size, cut, groups, span
from .loss import loss_of_chunk
from .objective import score, weigh
from .protocol import Memory, Model, Options, relay


def seco(
    model: Model, input_ids: Tensor, labels: Tensor, chunk_size: int, *, objective: Objective | None = None,
    chunk_loss: ChunkLoss | None = None, fill_size: int | None = None, num_targets: float | None = None,
    recompute: bool = False, cache_grad_dtype: torch.dtype | None = None, offload: bool = False,
    layers_at_once: int | None = None, graphs: int = 0, positions: Tensor | None = None, starts: Sequence[int] = (),
    share: bool = False,
) -> Tensor:  # fmt: skip
    """Add the exact gradient of the mean loss to `.grad`; return the loss, detached.

    Sequential Chunk-wise Optimization, Algorithm 1 of arXiv 2505.16710.

    input_ids, labels: int64 (B, T); labels as Hugging Face has them (same positions, -100 ignored).
    chunk_size: tokens whose activations are in memory at once; any number from 1.
    objective: another loss than the mean: a function of the log-probabilities (B, T) of the labels, each at its label's
        own position and 0 where there is none, that returns a scalar. See objective.py.
    chunk_loss: another loss that is a sum over chunks, for what takes more than those: a function of what the LM head
        is given for a chunk, (B, C, E), and the chunk, that returns the chunk's share. It is called in the walk back.
    fill_size: tokens per forward pass of the fill, rounded down to whole chunks; None: one chunk.
    num_targets: divides the summed loss instead of the count of valid targets, for gradient accumulation.
    recompute: within a chunk, keep only the layers' inputs and what attention returned, and run the rest of each
        layer again for its backward.
    cache_grad_dtype: of the sum of gradients sent back to keys and values; None: float32, or the model's if wider.
    offload: let the inputs of blocks of layers wait in host memory, one layer a block unless `layers_at_once` says
        otherwise: on the device only the memory of one block grows.
    layers_at_once: go through the text with a block of so many adjacent layers at a time, up and down again. What grows
        is then the memory of one block, and a hidden state of each token for every block; see blocks.py. None: all
        layers are one block.
    graphs: where memory is left, of the last so many chunks of the fill the graphs are kept, and not built again.
    positions: int64 (B, T), for rope alone: what a chunk sees stays the text before it; None: 0, 1, 2, … in a document.
    starts: where documents begin in a single row, the first one at 0, each of which is as if alone: it sees itself,
        counts from 0, hands no state on, and does not predict the next one's first token; (): one document.
    share: run once what all rows begin with, a prompt, up to where they predict different tokens; see tree.py. Dropout
        draws one mask for it. Of a single row there is nothing to share.
    Raises InputError for a batch or a size that does not fit.
    """
    check_fill_size(fill_size, chunk_size)
    check_graphs(graphs, objective=objective, layers_at_once=layers_at_once, offload=offload)
    batch = prepare(model, input_ids, labels, num_targets, positions, objective, chunk_loss, starts, share, chunk_size)
    input_ids, documents = batch.input_ids, batch.documents
    chunks = cut(input_ids.shape[1], chunk_size, documents)
    options = Options(fill_size, recompute, cache_grad_dtype, model.dropout_seed(), batch.positions, documents)
    if layers_at_once is not None or offload:
        kept = [(chunk, (1.0, 1.0)) for chunk in chunks]
        return through_blocks(model, batch, chunks, kept, options, layers_at_once, offload, objective)
    memory = new_memory(model, input_ids, chunks, options)
    if objective is None:
        early, late = chunks[: -1 - graphs], chunks[-1 - graphs : -1]
        fill(model, input_ids, early, memory, options)  # lines 1-3; no chunk reads the last one
        model = fill_with_graphs(model, input_ids, late, memory, options) if late else model
    else:
        batch, value = weigh(objective, batch, score(model, batch, chunks, memory, options))
    total = torch.zeros((), device=input_ids.device)
    for chunk in reversed(chunks):  # line 4
        loss, written, received = rebuild(model, batch, chunk, memory, options)  # lines 5, 6
        torch.autograd.backward([loss, *written], [None, *received])  # line 7
        total = total + loss.detach()
        del loss, written, received  # or they would live on beside the next chunk's
    return total if objective is None else value


def new_memory(model: Model, input_ids: Tensor, kept: Sequence[Chunk], options: Options) -> Memory:
    """A memory of what lies before the last kept chunk, which no chunk reads; those before it receive gradients."""
    return model.new_memory(input_ids.shape[0], kept[-1].start, kept[:-1], options)


def fill(model: Model, input_ids: Tensor, chunks: Sequence[Chunk], memory: Memory, options: Options) -> None:
    """Lines 1-3: run the chunks without gradients and write what they leave behind into the memory; but those of which
    no later chunk sees anything, where a document ends with them.

    With a fill size as many whole chunks as fit into it run at a time; what ends up in the memory is the same.
    """
    for group in groups([*filter(options.documents.remembered, chunks)], options.fill_size):
        memory.write(group, model.fill(input_ids[:, span(group)], memory, group, options))  # lines 2, 3


def rebuild(
    model: Model, batch: Batch, chunk: Chunk, memory: Memory, options: Options
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Lines 5 and 6: one chunk again, with its graph, on top of the memory.

    Returns its share of the mean loss; what it wrote; and the gradients that later chunks have sent back to that. See
    `relay` for what both leave out.
    """
    hidden, written = model.run(batch.input_ids[:, span([chunk])], memory, [chunk], options)  # line 5
    loss = loss_of_chunk(hidden, model.lm_head.weight, batch, chunk)
    return loss, *relay(written, memory.hand_over(chunk))  # line 6
