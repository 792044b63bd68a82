"""A model whose chunks hand on a state, small enough to hold in the head: f of the exercise on the state."""

from __future__ import annotations

import torch
from torch import Tensor


def f(chunk: Tensor, h: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two recurrent layers, one on top of the other, and a guess.

    chunk, x_j: (C, E). h: the states of both layers before the chunk (2, E). weights, Θ: (3, E, E).
    Returns the chunk's loss J_j, a scalar; the states after the chunk (2, E); and the decay (2, E), by which what was
    in each of them before has been multiplied on the way.

    Two ways lead from a state before the chunk to a state after it: the decay, in the same layer; and the outputs of
    the first layer, from which the second one's gates and additions are made.
    """
    to_gate, to_state, to_guess = weights
    x, ends, decays = chunk, [], []
    for state in h:
        gates = (x @ to_gate).sigmoid()  # (C, E)
        seen = []
        for gate, new in zip(gates, x @ to_state, strict=True):
            state = gate * state + new
            seen.append(state)
        x = x + torch.stack(seen).tanh()
        ends.append(state)
        decays.append(gates.prod(0))
    loss = (x @ to_guess - chunk).square().sum()
    return loss, torch.stack(ends), torch.stack(decays)
