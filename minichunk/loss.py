"""Next-token loss in tiles, so that the logits of a chunk never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .chunks import IGNORE

_TILE_ELEMENTS = 1 << 23  # logits alive at once: 32 MiB in float32


class _SummedLoss(torch.autograd.Function):
    """Forward computes the gradient too: the logits are at hand, and are then gone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        for rows in _tiles(hidden, weight):
            h, t = hidden[rows], targets[rows]
            losses, logits, lse = _token_losses(h, weight, t)
            total += losses.sum()
            if dhidden is None and dweight is None:
                continue
            p = logits.sub_(lse[:, None]).exp_()  # softmax, in place of the logits
            p.scatter_add_(1, t.clamp(min=0)[:, None], p.new_full((len(t), 1), -1.0))
            dlogits = p.mul_((t != IGNORE)[:, None]).to(hidden.dtype)  # (tile, V)
            if dhidden is not None:
                dhidden[rows] = dlogits @ weight
            if dweight is not None:
                dweight += dlogits.T @ h
        ctx.save_for_backward(dhidden, dweight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else (dhidden * grad[None]).to(dhidden.dtype),
            None if dweight is None else dweight * grad,
            None,
        )


def _tiles(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, _TILE_ELEMENTS // weight.shape[0])
    return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]


def _token_losses(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each row (0 without a target), the logits (rows, V) and their log-sum-exp."""
    logits = (h @ weight.T).to(torch.promote_types(h.dtype, torch.float32))
    lse = logits.logsumexp(-1)
    picked = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return (lse - picked) * (targets != IGNORE), logits, lse


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against `targets`, summed over the valid ones.

    hidden: (B, C, E). weight: (V, E), the LM head's. targets: int64 (B, C), -100 for none.
    Returns a scalar in float32, or in the model's dtype where that is wider.
    """
    return _SummedLoss.apply(hidden.flatten(0, 1), weight, targets.flatten())


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As `summed_loss`, but each token's own loss (B, C), 0 without a target, and no gradient."""
    flat, t = hidden.flatten(0, 1), targets.flatten()
    losses = [_token_losses(flat[rows], weight, t[rows])[0] for rows in _tiles(flat, weight)]
    return torch.cat(losses).view(targets.shape)
