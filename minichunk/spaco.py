"""SpaCO: backpropagate through a random few of the chunks (Algorithm 2)."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .batch import ChunkLoss, Objective, prepare
from .blocks import through_blocks
from .chunks import check_fill_size, cut
from .errors import InputError
from .objective import score, weigh
from .protocol import Model, Options
from .samplers import Bernoulli, Weight
from .seco import fill, new_memory, rebuild

QUARTER = Bernoulli(1 / 4)
Sampler = Callable[[int, torch.Generator | None], Sequence[Weight | None]]


def spaco(
    model: Model, input_ids: Tensor, labels: Tensor, chunk_size: int, *, objective: Objective | None = None,
    chunk_loss: ChunkLoss | None = None, sampler: Sampler = QUARTER, generator: torch.Generator | None = None,
    fill_size: int | None = None, num_targets: float | None = None, recompute: bool = False,
    cache_grad_dtype: torch.dtype | None = None, offload: bool = False, layers_at_once: int | None = None,
    positions: Tensor | None = None, starts: Sequence[int] = (), share: bool = False,
) -> Tensor:  # fmt: skip
    """Add an estimate of the gradient of the mean loss to `.grad`; return an estimate of the loss.

    Sparse Chunk-wise Optimization, Algorithm 2 of arXiv 2505.16710, with the factors that its
    sampler gives. `Bernoulli` makes both estimates exactly unbiased; see samplers.py.

    sampler: called as `sampler(num_chunks, generator)`; returns for each chunk None (skip) or a Weight. By default
        each chunk is kept with a chance of 1/4.
    generator: a CPU generator for the sampler; None: PyTorch's default one.
    The other arguments are those of `seco`.

    With an objective the fill goes to the end of the text, and what is returned is the loss itself, no estimate.
    A draw that keeps nothing leaves `.grad` as it was and returns 0, or the objective's loss.
    Raises InputError for a batch, a size or a sampler's answer that does not fit.
    """
    check_fill_size(fill_size, chunk_size)
    batch = prepare(model, input_ids, labels, num_targets, positions, objective, chunk_loss, starts, share, chunk_size)
    input_ids, documents = batch.input_ids, batch.documents
    chunks = cut(input_ids.shape[1], chunk_size, documents)
    weights = check_weights(sampler(len(chunks), generator), len(chunks))  # which chunks are kept
    kept = [(chunk, weight) for chunk, weight in zip(chunks, weights, strict=True) if weight is not None]
    total = torch.zeros((), device=input_ids.device)
    if not kept and objective is None:
        return total
    options = Options(fill_size, recompute, cache_grad_dtype, model.dropout_seed(), batch.positions, documents, True)
    if layers_at_once is not None or offload:
        return through_blocks(model, batch, chunks, kept, options, layers_at_once, offload, objective)
    run_again = [chunk for chunk, _ in kept]
    if objective is None:
        memory = new_memory(model, input_ids, run_again, options)
        fill(model, input_ids, [chunk for chunk in chunks if chunk < kept[-1][0]], memory, options)
    else:  # of all tokens: the fill runs the last chunk too, whether or not it is kept
        memory = new_memory(model, input_ids, sorted({*run_again, chunks[-1]}), options)
        batch, value = weigh(objective, batch, score(model, batch, chunks, memory, options))
    for chunk, weight in reversed(kept):  # not all of them, as in line 4 of Algorithm 1
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        loss, received = weight.loss * loss, [weight.relay * g for g in received]  # makes up for the chunks not kept
        torch.autograd.backward([loss, *written], [None, *received])
        total = total + loss.detach()
        del loss, written, received  # or they would live on beside the next chunk's
    return total if objective is None else value


def check_weights(weights: Sequence[Weight | None], num_chunks: int) -> Sequence[Weight | None]:
    """Return a sampler's answer; raises InputError if it is not one finite Weight or None per chunk."""
    if not isinstance(weights, Sequence) or len(weights) != num_chunks:
        found = f"{len(weights)} entries" if isinstance(weights, Sequence) else repr(weights)
        raise InputError(f"the sampler returned {found}, but there are {num_chunks} chunks")
    for i, weight in enumerate(weights):
        finite = isinstance(weight, Weight) and all(isinstance(x, int | float) and math.isfinite(x) for x in weight)
        if weight is not None and not finite:
            raise InputError(
                f"the sampler gave chunk {i} {weight!r}; it must be None or a Weight, which must be finite"
            )
    return weights
