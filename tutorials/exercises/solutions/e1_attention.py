"""Solution 1: causal attention of one chunk over a KV cache."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    """Attention of a chunk (B, H, C, D) to everything before it and, causally, to itself."""
    H, C, D = q.shape[1:]
    G, P = past_k.shape[1:3]
    keys = torch.cat([past_k, k], dim=2).repeat_interleave(H // G, dim=1)  # (B, H, P + C, D)
    values = torch.cat([past_v, v], dim=2).repeat_interleave(H // G, dim=1)
    scores = q @ keys.mT / D**0.5  # (B, H, C, P + C)
    future = torch.ones(C, P + C, dtype=torch.bool).triu(P + 1)  # query i stands at position P + i
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ values
