"""Solution 2: the log-sum-exp merge and its backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def piece(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to one piece of the keys: its output (B, H, C, D) and log-sum-exp (B, H, C). Given."""
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (B, H, C, keys)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to both pieces together, from the output and the log-sum-exp of each."""
    lse = torch.logaddexp(lse_a, lse_b)
    share_a, share_b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]  # they add up to 1
    return share_a * out_a + share_b * out_b, lse


def piece_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through one piece, from the merged output and log-sum-exp."""
    D = q.shape[-1]
    p = (q @ k.mT / D**0.5 - lse[..., None]).exp()  # this piece's part of the whole softmax
    delta = (grad * out).sum(-1, keepdim=True)  # the sum over all pieces of p * dp
    dscores = p * (grad @ v.mT - delta) / D**0.5
    return dscores @ k, dscores.mT @ q, p.mT @ grad


def attend_backward(
    grad: Tensor, q: Tensor, pieces: Sequence[tuple[Tensor, Tensor]], out: Tensor, lse: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Gradients of q and of every piece's keys and values."""
    dq, sent_back = torch.zeros_like(q), []
    for k, v in pieces:
        dq_piece, dk, dv = piece_backward(grad, q, k, v, out, lse)
        dq = dq + dq_piece
        sent_back.append((dk, dv))
    return dq, sent_back
