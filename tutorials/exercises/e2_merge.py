"""Exercise 2: the log-sum-exp merge and its backward.

In exercise 1 the past was copied: `torch.cat` put it before the chunk, in every layer. Here
attention takes the keys in pieces, where they lie, and the results are merged. All that a piece
must tell beside its output is the log-sum-exp of its scores, one number for each query.

Shapes: q (B, H, C, D); k and v of a piece (B, H, keys, D); out (B, H, C, D); lse (B, H, C).
There is no mask here: a causal piece is one whose masked scores are -inf, and nothing else changes.

Check: python -m pytest tutorials/exercises -k merge
"""

from __future__ import annotations

from collections.abc import Sequence

import torch  # noqa: F401
from torch import Tensor


def piece(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to one piece of the keys: its output (B, H, C, D) and log-sum-exp (B, H, C). Given."""
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (B, H, C, keys)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to both pieces together, from the output and the log-sum-exp of each.

    out_a, out_b: (B, H, C, D). lse_a, lse_b: (B, H, C). Returns the merged output and log-sum-exp.

    Hints. exp(lse_a) is the sum of exp(score) over the keys of piece a: the weight that piece a has
    in the whole. The two shares must add up to 1. Scores may be large, and exp(800) is infinite:
    subtract before you take exp. There is a `torch.logaddexp`.
    """
    raise NotImplementedError("merge: the output and log-sum-exp over two pieces, from those of each")


def piece_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through one piece of the keys. Write it out, without autograd.

    grad: (B, H, C, D), the gradient of the merged output. k, v: this piece's.
    out (B, H, C, D), lse (B, H, C): the *merged* ones, over all pieces.
    Returns dq (B, H, C, D), this piece's share of it, and dk, dv (B, H, keys, D).

    With s the scores and p = exp(s - lse) the probabilities, the chain rule through out = p v says
    dv = pᵀ grad, dp = grad vᵀ, and through the softmax ds = p · (dp - delta), where delta is, for
    each query, the sum of p · dp over the keys of *all* pieces.

    Hints. This piece does not know the others' p, but delta is also the sum over D of grad · out:
    show it. Scores are q · k / sqrt(D): ds goes back through that, too.
    """
    raise NotImplementedError("piece_backward: the gradients of q, k and v through one piece of the keys")


def attend_backward(
    grad: Tensor, q: Tensor, pieces: Sequence[tuple[Tensor, Tensor]], out: Tensor, lse: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Gradients of q and of every piece's keys and values.

    pieces: (k, v) of each piece. grad, out, lse: as for `piece_backward`.
    Returns dq (B, H, C, D), and one (dk, dv) for each piece, in their order. For a piece in the
    KV cache, these are what the chunk sends back to earlier chunks.
    """
    raise NotImplementedError("attend_backward: the gradients of q and of all pieces, by piece_backward")
