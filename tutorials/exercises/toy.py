"""A model small enough to hold in the head: f of the paper's equation 1, for the exercise on the relay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def f(chunk: Tensor, memories: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """(J_j, m_j) = f(x_j; m_0, …, m_{j-1}; Θ): one attention over the memories, and a guess.

    chunk, x_j: (C, E). memories, m_0 to m_{j-1}: (their C, E) each. weights, Θ: (3, E, E).
    Returns the chunk's loss J_j, a scalar, and its memory m_j (C, E).

    m_j depends on the chunk, on the weights and, by the attention, on every earlier memory: so a
    gradient that arrives at m_2 goes on to m_1 and, from there, on to m_0.
    """
    to_query, to_memory, to_guess = weights
    seen = torch.cat([*memories, chunk])  # (positions so far, E)
    mixed = chunk + (chunk @ to_query @ seen.T).softmax(-1) @ seen
    loss = (mixed @ to_guess - chunk).square().sum()
    return loss, (mixed @ to_memory).tanh()
