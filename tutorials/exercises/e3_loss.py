"""Exercise 3: next-token loss in tiles.

A vocabulary has 128,000 tokens: the logits of a chunk are larger than all of its activations in a
layer. So they must never exist at once. Take some rows at a time, a tile, and keep of it only what is
small: its loss and its gradients.

Check: python -m pytest tutorials/exercises -k loss
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100  # the label of a position without a target


def targets_by_chunk(labels: Tensor, chunk_size: int) -> list[Tensor]:
    """What each position has to predict, chunk by chunk.

    labels: int64 (B, T). Position t has to predict the label of position t + 1; the last position
    of all predicts nothing: IGNORE.
    Returns int64 (B, C) for each chunk, first chunk first; the last one may be short.

    Hint. What does the last position of the first chunk predict?
    """
    raise NotImplementedError("targets_by_chunk: the labels, shifted by one and cut into chunks")


def loss_and_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, and its gradients with respect to `hidden` and `weight`.

    hidden: (N, E), all positions of a chunk. weight: (V, E), the LM head's. targets: int64 (N).
    tile: at most so many rows of logits, (tile, V), may exist at a time; it need not divide N.
    Returns the cross-entropy of `hidden @ weight.T` against `targets`, *summed* over the rows
    whose target is not IGNORE (a scalar); its gradients (N, E) and (V, E). All in the dtype of hidden.

    Hints. The gradient of one row's loss with respect to its logits is softmax(logits) - onehot(target),
    and zero where the target is IGNORE. From logits = h Wᵀ follow dh and dW; every tile contributes to dW.
    """
    raise NotImplementedError("loss_and_gradients: the summed loss and its gradients, tile by tile")


class SummedLoss(torch.autograd.Function):
    """The loss for autograd: forward computes the gradients too, and backward hands them out."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, tile: int) -> Tensor:
        loss, dhidden, dweight = loss_and_gradients(hidden, weight, targets, tile)
        ctx.save_for_backward(dhidden, dweight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # grads holds one tensor: the gradient of the loss that forward returned. The saved tensors are in
        # ctx.saved_tensors. Return one gradient for each argument of forward, None where there is none.
        raise NotImplementedError("SummedLoss.backward: the saved gradients, by the chain rule")
