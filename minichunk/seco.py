"""SeCO: the exact gradient with the activations of one chunk in memory (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import Cache
from .chunks import Chunk, check_batch, check_fill_size, cut
from .loss import summed_loss
from .model import Llama, Recompute


def seco(
    model: Llama,
    input_ids: Tensor,
    labels: Tensor,
    chunk_size: int,
    *,
    fill_size: int | None = None,
    num_targets: float | None = None,
    recompute: Recompute = False,
    cache_grad_dtype: torch.dtype | None = None,
    offload: bool = False,
) -> Tensor:
    """Add the exact gradient of the mean loss to `.grad`; return the loss, detached.

    Sequential Chunk-wise Optimization, Algorithm 1 of arXiv 2505.16710.

    input_ids, labels: int64 (B, T); labels as Hugging Face has them (same positions, -100 ignored).
    chunk_size: tokens whose activations are in memory at once; any number from 1.
    fill_size: tokens per forward pass of the fill, rounded down to whole chunks; None: one chunk.
    num_targets: divides the summed loss instead of the count of valid targets, for gradient accumulation.
    recompute: within a chunk, keep only the layers' inputs and what attention returned, and run the rest of each
        layer again for its backward; "all": run attention over the whole past again too.
    cache_grad_dtype: of the sum of gradients sent back to keys and values; None: float32, or the model's if wider.
    offload: keep keys, values and their gradients in host memory; the device holds two blocks of them at a time.
    Raises InputError for a batch or a size that does not fit.
    """
    targets, divisor = check_batch(model, input_ids, labels, num_targets)
    check_fill_size(fill_size, chunk_size)
    chunks = cut(input_ids.shape[1], chunk_size)
    cache = new_cache(model, input_ids, chunks, cache_grad_dtype, offload)
    fill(model, input_ids, chunks[:-1], cache, fill_size)  # lines 1-3; line 5 starts with the last chunk
    total = torch.zeros((), device=input_ids.device)
    for chunk in reversed(chunks):  # line 4
        loss, written, received = rebuild(model, input_ids, targets, chunk, cache, recompute)  # lines 5, 6
        torch.autograd.backward([loss / divisor, *written], [None, *received])  # line 7
        total = total + loss.detach() / divisor
        del loss, written, received  # or they would live on beside the next chunk's
    return total


def new_cache(
    model: Llama,
    input_ids: Tensor,
    kept: Sequence[Chunk],
    grad_dtype: torch.dtype | None = None,
    offload: bool = False,
) -> Cache:
    """A cache for all that lies before the last kept chunk, with gradients for the other kept ones."""
    seed = None if model.dropout_masks is None else int(torch.randint(2**62, ()))
    like, (*others, last) = model.model.norm.weight, kept
    return Cache(model.config, input_ids.shape[0], last.start, like, others, grad_dtype, seed, offload)


def fill(model: Llama, input_ids: Tensor, chunks: Sequence[Chunk], cache: Cache, fill_size: int | None = None) -> None:
    """Lines 1-3: write the keys and values of `chunks` into the cache, without gradients.

    fill_size: as many whole chunks as fit in it run at a time; what ends up in the cache is the same.
    """
    group = 1 if fill_size is None or not chunks else fill_size // (chunks[0].stop - chunks[0].start)
    for i in range(0, len(chunks), group):
        run = chunks[i : i + group]
        ids = input_ids[:, run[0].start : run[-1].stop]
        cache.write(run[0].start, model.write(ids, cache, run))


def rebuild(
    model: Llama, input_ids: Tensor, targets: Tensor, chunk: Chunk, cache: Cache, recompute: Recompute = False
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Lines 5 and 6: one chunk again, with its graph, on top of the cache.

    Returns the summed loss of its targets; its keys and values, those that need a gradient; and the
    gradients that later chunks have sent back to them. Both lists are empty for the last chunk.
    """
    rows = slice(chunk.start, chunk.stop)
    hidden, written = model.run(input_ids[:, rows], cache, [chunk], recompute)
    loss = summed_loss(hidden, model.lm_head.weight, targets[:, rows])
    relayed = [(m, g) for m, g in zip(written, cache.received(chunk, written), strict=False) if m.requires_grad]
    return loss, [m for m, _ in relayed], [g for _, g in relayed]
