"""Next-token loss in tiles, so that the logits of a chunk never exist at once.

A tile is all tokens by a part of the vocabulary. The softmax needs all of a row, so the tiles are computed twice: first
for the log-sum-exp, then, last one first, for the gradient. Positions without a target have no logits at all.

Shapes: N tokens with a target (of B*C), E hidden size, V vocabulary; hidden (N, E), weight (V, E), targets int64 (N).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .batch import IGNORE, Batch
from .chunks import Chunk, cut

TILE_ELEMENTS = 1 << 24  # logits alive at once: 64 MiB in float32


class _SummedLoss(torch.autograd.Function):
    """Forward computes the gradient too: the last tile's logits are at hand, and none are saved."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, factors: Any, cap: float | None) -> Tensor:
        losses, lse, logits = _token_losses(hidden, weight, targets, cap)
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        dhidden = torch.zeros_like(hidden, dtype=lse.dtype) if needs_hidden else None
        dweight = torch.zeros_like(weight, dtype=lse.dtype) if needs_weight else None
        tiles = list(_tiles(hidden, weight, targets)) if needs_hidden or needs_weight else []
        for columns, index, inside in reversed(tiles):
            logits = logits_of(hidden, weight[columns], cap) if logits is None else logits
            slope = None if cap is None else 1 - (logits / cap).square()  # of the cap
            p = logits.sub_(lse[:, None]).exp_()  # softmax, in place of the logits
            p.scatter_add_(1, index, -inside.to(p.dtype))
            p = p if factors is None else p.mul_(factors[:, None])
            dlogits = (p if slope is None else p.mul_(slope)).to(hidden.dtype)  # (N, columns)
            if dhidden is not None:
                dhidden += dlogits @ weight[columns]
            if dweight is not None:
                dweight[columns] = dlogits.T @ hidden
            del p, dlogits
            logits = None
        ctx.save_for_backward(dhidden if dhidden is None else dhidden.to(hidden.dtype), dweight)
        return (losses if factors is None else losses * factors).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # [None]: in float32
        dhidden, dweight = (x if x is None else (x * grads[0][None]).to(x.dtype) for x in ctx.saved_tensors)
        return dhidden, dweight, None, None, None


def _tiles(hidden: Tensor, weight: Tensor, targets: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each tile its columns, the column of each target in it (N, 1), and whether the target is in it (N, 1)."""
    for start, stop in cut(len(weight), max(1, TILE_ELEMENTS // max(1, len(hidden)))):
        inside = (targets >= start) & (targets < stop)
        yield slice(start, stop), (targets - start).clamp(0, stop - start - 1)[:, None], inside[:, None]


def logits_of(hidden: Tensor, weight: Tensor, cap: float | None) -> Tensor:
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits if cap is None else cap * (logits / cap).tanh()


def _token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> tuple[Tensor, Tensor, Any]:
    """Loss of each token (N); the log-sum-exps (N); and the last tile's logits."""
    lse = hidden.new_full(targets.shape, -torch.inf, dtype=torch.promote_types(hidden.dtype, torch.float32))
    picked, logits = torch.zeros_like(lse), None
    for columns, index, inside in _tiles(hidden, weight, targets):
        del logits  # so that the next tile takes the place of this one
        logits = logits_of(hidden, weight[columns], cap)
        lse = torch.logaddexp(lse, logits.logsumexp(-1))
        picked += logits.gather(1, index).where(inside, 0)[:, 0]
    return lse - picked, lse, logits


def loss_of_chunk(hidden: Tensor, weight: Tensor, batch: Batch, chunk: Chunk) -> Tensor:
    """A chunk's share of the loss of a batch; hidden: (B, C, E), what the LM head is given for it."""
    if batch.chunk_loss is not None:
        return batch.chunk_loss(hidden, chunk)
    part = batch.part([chunk])
    return summed_loss(hidden, weight, part.targets, part.labelled, part.factors) / part.num_targets


def summed_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, labelled: Tensor | None = None, factors: Tensor | None = None
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against `targets`, summed over the valid ones.

    hidden: (B, C, E). weight: (V, E), the LM head's. targets: int64 (B, C), -100 for none.
    labelled: bool (B, C), where there is a target; on the CPU, or a GPU would be waited for. None: found from them.
    factors: (B, C), which each target's loss is multiplied by, in float32 or wider; None: 1.
    Where the weight has an attribute `softcap`, logits x become softcap · tanh(x / softcap), as in Gemma 2.
    Returns a scalar in float32, or in the model's dtype where that is wider.
    """
    labelled = targets != IGNORE if labelled is None else labelled
    factors = None if factors is None else rows_of(factors, labelled)  # without what an objective may leave as NaN
    cap = getattr(weight, "softcap", None)
    return _SummedLoss.apply(rows_of(hidden, labelled), weight, rows_of(targets, labelled), factors, cap)


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, labelled: Tensor | None = None) -> Tensor:
    """As `summed_loss`, but each token's own loss (B, C), 0 without a target, and no gradient."""
    labelled = targets != IGNORE if labelled is None else labelled
    cap = getattr(weight, "softcap", None)
    losses, _, _ = _token_losses(rows_of(hidden, labelled), weight, rows_of(targets, labelled), cap)
    return losses.new_zeros(targets.shape).masked_scatter_(labelled.to(losses.device), losses)


def rows_of(x: Tensor, labelled: Tensor) -> Tensor:
    """Of x (B, C, ·) what has a target: (N, ·)."""
    x = x.flatten(0, 1)
    return x if labelled.all() else x.index_select(0, labelled.flatten().nonzero()[:, 0].to(x.device))
