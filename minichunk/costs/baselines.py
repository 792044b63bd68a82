"""What minichunk is measured against: checkpointing as other trainers have it."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from ..batch import Batch
from ..blocks import host_like
from ..chunks import Chunk
from ..loss import loss_of_chunk
from ..models.stack import Stack
from ..protocol import Options


def tiled_full(
    model: Stack, batch: Batch, *, offload: bool = False, room: Callable[[Tensor], Tensor] = host_like
) -> Tensor:
    """Gradient checkpointing with the loss in tiles: what long texts are trained with today, without chunks.
    As `full(..., recompute=True)`, but the logits never exist at once. offload: the layers' inputs (B, T, E) wait in
    host memory, as with transformers' `gradient_checkpointing_kwargs={"offload": True}`. room: makes a tensor there
    like another one."""
    shape = (*batch.input_ids.shape, model.lm_head.weight.shape[1])

    def pack(x: Tensor) -> tuple[torch.device | None, Tensor]:
        moves = x.shape == shape and x.is_floating_point()
        return (x.device, room(x).copy_(x, non_blocking=True)) if moves else (None, x)

    def unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
        device, x = packed
        return x if device is None else x.to(device, non_blocking=True, copy=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack) if offload else nullcontext():
        hidden = model.run(batch.input_ids, options=Options(recompute=True))[0]
    loss = loss_of_chunk(hidden, model.lm_head.weight, batch, Chunk(0, batch.input_ids.shape[1]))
    loss.backward()
    return loss.detach()
