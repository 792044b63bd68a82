"""Solution 5: SeCO and SpaCO on a real Llama."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minichunk import Llama, Weight
from minichunk.batch import prepare
from minichunk.chunks import cut
from minichunk.protocol import Options
from minichunk.seco import fill, new_memory, rebuild

OPTIONS = Options()


def seco(model: Llama, input_ids: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    """Add the exact gradient of the mean loss to `.grad`; return the loss, detached (Algorithm 1)."""
    batch = prepare(model, input_ids, labels, None)
    chunks = cut(input_ids.shape[1], chunk_size)
    memory = new_memory(model, input_ids, chunks, OPTIONS)
    fill(model, input_ids, chunks[:-1], memory, OPTIONS)  # the walk starts with the last chunk: nobody reads it
    total = torch.zeros(())
    for chunk in reversed(chunks):
        loss, written, received = rebuild(model, batch, chunk, memory, OPTIONS)
        torch.autograd.backward([loss, *written], [None, *received])
        total = total + loss.detach()
    return total


def spaco(model: Llama, input_ids: Tensor, labels: Tensor, chunk_size: int, entries: Sequence[Weight | None]) -> Tensor:
    """Add an estimate of the gradient to `.grad`; return one of the loss, detached (Algorithm 2)."""
    batch = prepare(model, input_ids, labels, None)
    chunks = cut(input_ids.shape[1], chunk_size)
    kept = [(chunk, weight) for chunk, weight in zip(chunks, entries, strict=True) if weight is not None]
    total = torch.zeros(())
    if not kept:
        return total
    memory = new_memory(model, input_ids, [chunk for chunk, _ in kept], OPTIONS)
    before_last = chunks[: chunks.index(kept[-1][0])]
    fill(model, input_ids, before_last, memory, OPTIONS)  # skipped chunks too: later ones look at what they wrote
    for chunk, weight in reversed(kept):
        loss, written, received = rebuild(model, batch, chunk, memory, OPTIONS)
        loss = weight.loss * loss
        torch.autograd.backward([loss, *written], [None, *(weight.relay * g for g in received)])
        total = total + loss.detach()
    return total
