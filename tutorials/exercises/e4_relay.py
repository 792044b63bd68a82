"""Exercise 4: SeCO from first principles.

The model is a function f of the paper's equation 1, (J_j, m_j) = f(x_j; m_0, …, m_{j-1}; Θ): from a
chunk, the memories of all earlier chunks and the weights it makes the chunk's loss and the chunk's own
memory. You find one in toy.py; that it has an attention in it does not matter here.

Plain backpropagation of J_0 + … + J_{k-1} would keep the graphs of all k chunks. SeCO, Algorithm 1 of
arXiv 2505.16710, keeps one:

    1-3  fill: run the chunks in order, without gradients, and keep every m'_j
    4    for j = k-1, …, 0:
    5        rebuild: (J_j, m_j) = f(x_j; m'_0, …, m'_{j-1}; Θ), now with its graph
    6        relay: the gradient of m_j is what later chunks have sent back to m'_j
    7        backpropagate J_j and m_j together: Θ gets its share, and so do m'_0, …, m'_{j-1}

Check: python -m pytest tutorials/exercises -k relay
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch  # noqa: F401
from torch import Tensor

Model = Callable[[Tensor, Sequence[Tensor], Tensor], tuple[Tensor, Tensor]]


def seco(f: Model, chunks: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Add the gradient of J_0 + … + J_{k-1} to `weights.grad`; return the sum, detached.

    f: called as f(chunk, memories, weights); returns the loss, a scalar, and the memory of the chunk.
    chunks: x_0 to x_{k-1}, (C, E) each, not all equally long. weights: Θ, a leaf that requires a gradient.

    Hints. A tensor without a graph behind it that requires a gradient is a leaf: whatever is sent back to
    it adds up in its .grad, which is None at first. J_j is a scalar and m_j is not; one call takes both:
    torch.autograd.backward([loss, memory], [None, gradient_of_memory]). About ten lines.
    """
    raise NotImplementedError("seco: fill, then rebuild, relay and backpropagate chunk by chunk, last chunk first")
