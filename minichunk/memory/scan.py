"""The recurrence of a selective state-space layer over one chunk, without a loop over its tokens.

    h[t] = h[t-1] · a[t] + x[t] b[t]ᵀ,    y[t] = h[t] c[t]      (h: P x N; the gates a in (0, 1))

Within a block of L tokens y = scores x, where scores[t, s] sums c[t] (a[s+1] … a[t]) b[s] over the N: attention, with
products of gates in the place of a softmax. From block to block goes the state. A product of gates is the exponential
of a sum that begins where the product begins: nothing overflows, and nothing cancels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # tokens: T · BLOCK · N products of gates in memory, T / BLOCK steps from block to block


def scan(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return y (…, T, P), and the state after the last token, from the state h (…, P, N) before the first.

    x: (…, T, P). log_a: logarithms of the gates (…, T, N), or (…, T, 1), one for all N. b, c: (…, T, N).
    The leading dimensions (batch, heads) broadcast. A gate may be 0: its logarithm is then -inf.
    """
    T, L = x.shape[-2], min(BLOCK, x.shape[-2])
    # A last block that is short is filled up with tokens that keep the state (log_a = 0) and add nothing to it.
    x, log_a, b, c = (F.pad(z, (0, 0, 0, -T % L)).unflatten(-2, (-1, L)) for z in (x, log_a, b, c))  # (…, n, L, ·)
    between = products(log_a)  # (…, n, L, L, N)
    if log_a.shape[-1] == 1:
        scores = c @ b.mT * between[..., 0]  # (…, n, L, L)
    else:
        scores = (c[..., None, :] * between * b[..., None, :, :]).sum(-1)
    added = x.mT @ (b * between[..., -1, :, :])  # (…, n, P, N): what each block adds to the state at its end
    since = log_a.cumsum(-2).exp()  # (…, n, L, N): what is left at t of the state before the block
    left = since[..., -1:, :]  # (…, n, 1, N)
    h, before = torch.broadcast_tensors(h, added[..., 0, :, :])[0], []
    for part, more in zip(left.unbind(-3), added.unbind(-3), strict=True):
        before.append(h)
        h = h * part + more
    y = scores @ x + (c * since) @ torch.stack(before, -3).mT
    return y.flatten(-3, -2)[..., :T, :], h


def products(log_a: Tensor) -> Tensor:
    """(…, L, N) to (…, L, L, N): at [t, s] the product of the gates after s up to t; 0 where t < s."""
    ones = torch.ones(log_a.shape[-2], log_a.shape[-2], dtype=torch.bool, device=log_a.device)
    sums = log_a[..., :, None, :].where(ones.tril(-1)[..., None], 0).cumsum(-3)
    return sums.where(ones.tril()[..., None], -torch.inf).exp()
