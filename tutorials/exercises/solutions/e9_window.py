"""Solution 9: a window."""

from __future__ import annotations

import torch
from torch import Tensor

from tutorials.exercises.toy_window import Memory


def seen(start: int, stop: int, window: int, sinks: int) -> Tensor:
    """What the queries from start to stop - 1 see: bool (stop - start, stop)."""
    i, j = torch.arange(start, stop)[:, None], torch.arange(stop)
    return (j <= i) & ((i - j < window) | (j < sinks))


def spans(start: int, stop: int, window: int, sinks: int) -> list[tuple[int, int]]:
    """Which spans of the past the chunk from start to stop - 1 reads."""
    low = max(0, start - window + 1)  # the first query of the chunk sees furthest back
    both = [(0, start)] if low <= sinks else [(0, sinks), (low, start)]  # where sinks and window meet, they are one
    return [(a, b) for a, b in both if a < b]


def rebuild(
    q: Tensor, k: Tensor, v: Tensor, memory: Memory, start: int, window: int, sinks: int, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of a chunk to what it sees, forward and backward."""
    stop = start + len(q)
    pieces = spans(start, stop, window, sinks)
    read = [memory.read(a, b) for a, b in pieces]
    keys, values = torch.cat([*(past_k for past_k, _ in read), k]), torch.cat([*(past_v for _, past_v in read), v])
    columns = torch.cat([torch.arange(a, b) for a, b in [*pieces, (start, stop)]])
    scores = q @ keys.T / q.shape[-1] ** 0.5
    out = scores.masked_fill(~seen(start, stop, window, sinks)[:, columns], -torch.inf).softmax(-1) @ values
    dq, dk, dv, *sent = torch.autograd.grad(out, [q, k, v, *(x for pair in read for x in pair)], grad)
    for (a, b), past_dk, past_dv in zip(pieces, sent[::2], sent[1::2], strict=True):
        memory.add(a, b, past_dk, past_dv)
    return out.detach(), dq, dk, dv
