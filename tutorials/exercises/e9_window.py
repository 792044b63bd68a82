"""Exercise 9: a window: a chunk that sees a part of the past.

Many models have layers whose queries see the last few positions only, a *window*, and perhaps the first few of the
text, the *sinks*: query i sees j when j <= i, and i - j < window or j < sinks. The own position counts: with a window
of 1 and no sinks, a query sees itself alone.

The rule knows positions, and nothing of chunks. So any cut of the text gives the same numbers, if every chunk reads
exactly what its queries see, and sends gradients back there and nowhere else. That is what such a layer saves: of a
past of 100,000 positions, a chunk reads the sinks and less than one window before its start. The loop of SeCO stays
what it is.

Positions are counted from 0; a span (a, b) is the positions from a to b - 1.

Check: python -m pytest tutorials/exercises -k window
"""

from __future__ import annotations

import torch  # noqa: F401
from torch import Tensor

from tutorials.exercises.toy_window import Memory


def seen(start: int, stop: int, window: int, sinks: int) -> Tensor:
    """What the queries from start to stop - 1 see: bool (stop - start, stop), one row for each query.

    window: at least 1. sinks: at least 0.

    Hint. Draw it for start = 3, stop = 6, window = 2, sinks = 1: three rows, six columns.
    """
    raise NotImplementedError("seen: the rule as a mask, for the queries of one chunk")


def spans(start: int, stop: int, window: int, sinks: int) -> list[tuple[int, int]]:
    """Which spans of the past, the positions before `start`, the chunk from start to stop - 1 reads.

    In order, none of them empty, no position twice, none that no query of the chunk sees; spans that touch are one.

    Hints. Which of the queries sees furthest back? What if sinks and window meet, or the sinks lie in the chunk itself?
    Up to window + sinks positions there is nothing to leave out.
    """
    raise NotImplementedError("spans: the parts of the past that a chunk reads")


def rebuild(
    q: Tensor, k: Tensor, v: Tensor, memory: Memory, start: int, window: int, sinks: int, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of a chunk to what it sees, forward and backward.

    q, k, v: (C, D), the chunk's own, leaves that require a gradient. grad: (C, D), the gradient of the output.
    Reads from the memory what `spans` says, by memory.read(a, b), and gives the gradients of these keys and values back
    by memory.add(a, b, key_grads, value_grads). Returns the output (C, D) and the gradients of q, k and v.

    A score is the product of a query and a key, divided by sqrt(D).

    Hints. Which columns of `seen` belong to the keys that you have put side by side? torch.autograd.grad(out, tensors,
    grad) returns one gradient for each of the tensors. About ten lines.
    """
    raise NotImplementedError("rebuild: attention over the spans and the chunk, and the gradients sent back")
