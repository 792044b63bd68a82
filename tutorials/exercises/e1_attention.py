"""Exercise 1: causal attention of one chunk over a KV cache.

The chunk at hand has queries, keys and values. The keys and values of everything before it are in
the cache: the past. A query may look at the whole past and, in its own chunk, at its own position
and the positions before it.

Check: python -m pytest tutorials/exercises -k attention
"""

from __future__ import annotations

import torch  # noqa: F401
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    """Attention of a chunk to everything before it and, causally, to itself.

    q: (B, H, C, D), the chunk's queries. k, v: (B, G, C, D), its own keys and values.
    past_k, past_v: (B, G, P, D), those of the P positions before the chunk; P may be 0.
    Returns (B, H, C, D), in the dtype of q.

    A score is the product of a query and a key, divided by sqrt(D). The H query heads share the G
    key heads in blocks: the first H / G query heads use key head 0, the next H / G key head 1, …

    Hints. Draw the mask for C = 2 and P = 3: two rows, five columns. Where does the last row end,
    and where the first? (`is_causal=True` of PyTorch's attention draws another one.) The function
    that repeats 0 1 as 0 0 1 1 is `repeat_interleave`. In this exercise the past may be copied.
    """
    raise NotImplementedError("attend: attention of a chunk to the whole past and, causally, to itself")
