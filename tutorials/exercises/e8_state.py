"""Exercise 8: a state instead of keys and values, and what a coin does to it.

The model is a function f again, in toy_state.py, but a chunk hands on a *state*: (J_j, h_{j+1}, d_j) = f(x_j; h_j; Θ).
h_j is read by chunk j alone, and what comes back to it is its *adjoint*: the gradient by h_j of the losses from chunk j
on. d_j is the decay: the part d_j · h_j of h_{j+1} is what chunk j has left of the state before it.

SpaCO tosses a coin for every chunk, and a message from chunk 9 to chunk 1 would have to survive all coins in between.
But the way by the decay is known without running any chunk again: the adjoint of h_j has d_j times the adjoint of
h_{j+1} in it, whatever else the chunk does. So the walk carries this part itself, past kept and skipped chunks alike,
and a chunk that is rebuilt must not send it a second time:

    1-3  fill: run the chunks in order, without gradients, and keep every h'_j and d_j
    4    for j = k-1, …, 0:
    5        chunk j is kept: rebuild it on top of h'_j, and backpropagate
                 loss factor · J_j, and what it hands on, with relay factor · adjoint
    6        adjoint = d_j · adjoint + what was sent back to h'_j (nothing, if chunk j is skipped)

Check: python -m pytest tutorials/exercises -k state
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch  # noqa: F401
from torch import Tensor

from minichunk import Weight

Model = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
Entries = Sequence[Weight | None]


def hand_on(h: Tensor, end: Tensor, decay: Tensor) -> Tensor:
    """What a rebuilt chunk hands on: `end`, to the last bit, but without the way by the decay in its gradient.

    h: the states before the chunk (2, E), a leaf. end, decay: the states after it, and the decay, as f returned them.

    Hints. decay · h is in `end`, and its derivative by h is the decay. Which expression is zero, and has the
    derivative 1? One line.
    """
    raise NotImplementedError("hand_on: the states after the chunk, without the way by the decay in their gradient")


def spaco(f: Model, chunks: Sequence[Tensor], start: Tensor, weights: Tensor, entries: Entries) -> Tensor:
    """Add an estimate of the gradient of J_0 + … + J_{k-1} to `weights.grad`; return one of the sum, detached.

    f: called as f(chunk, h, weights); returns the loss, the states after the chunk and the decay. start: h_0 (2, E).
    entries: one for each chunk. None: it is skipped, that is never rebuilt. Weight(loss, relay): its factors.
    With Weight(1, 1) for every chunk the gradient is exact: that is SeCO.

    Hints. Which adjoint does the last chunk get? What of an adjoint is to be multiplied by the relay factor, and
    what not? About 15 lines.
    """
    raise NotImplementedError("spaco: fill, then walk from the last chunk to the first with the adjoint")
