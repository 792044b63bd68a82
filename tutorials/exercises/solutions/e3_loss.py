"""Solution 3: next-token loss in tiles."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the label of a position without a target


def targets_by_chunk(labels: Tensor, chunk_size: int) -> list[Tensor]:
    """The targets of each chunk: shifted once, then cut."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # what position t predicts is the label of t + 1
    return list(targets.split(chunk_size, dim=1))


def loss_and_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, and its gradients with respect to `hidden` and `weight`."""
    loss, dhidden, dweight = hidden.new_zeros(()), torch.zeros_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), tile):
        rows = slice(start, start + tile)
        h, t = hidden[rows], targets[rows]
        logits = h @ weight.T  # (tile, V): the only logits in memory
        loss += F.cross_entropy(logits, t, ignore_index=IGNORE, reduction="sum")
        dlogits = logits.softmax(-1) - F.one_hot(t.clamp(min=0), len(weight))
        dlogits[t == IGNORE] = 0
        dhidden[rows] = dlogits @ weight
        dweight += dlogits.T @ h
    return loss, dhidden, dweight


class SummedLoss(torch.autograd.Function):
    """The loss for autograd: forward computes the gradients too, and backward hands them out."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, tile: int) -> Tensor:
        loss, dhidden, dweight = loss_and_gradients(hidden, weight, targets, tile)
        ctx.save_for_backward(dhidden, dweight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        dhidden, dweight = ctx.saved_tensors
        return grad * dhidden, grad * dweight, None, None
