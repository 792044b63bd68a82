"""What is known about mistakes in exercise 4, the relay."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import toy
from ..diagnose import Mistakes, Values, close, compare, count, hint, require
from .common import RELAY, Edges, all_edges, check_loss_value, check_walk, random


def _toy() -> tuple[list[Tensor], Tensor]:
    *chunks, weights = random(3, (3, 4), (2, 4), (3, 4), (1, 4), (3, 4, 4))
    return chunks, 0.5 * weights


def _toy_gradient(edges: Edges, memory_gradient: float = 0.0) -> Values:
    """The gradient by plain autograd, where only `edges` hand anything on.

    memory_gradient: what every entry of every memory receives beside.
    """
    chunks, weights = _toy()
    weights.requires_grad_()
    memories: list[Tensor] = []
    total = torch.zeros(())
    for j, chunk in enumerate(chunks):
        seen = [m if (i, j) in edges else m.detach() for i, m in enumerate(memories)]
        loss, memory = toy.f(chunk, seen, weights)
        total = total + loss + memory_gradient * memory.sum()
        memories.append(memory)
    (grad,) = torch.autograd.grad(total, weights)
    return {"the gradient of the weights": grad}


def _toy_gradient_of_short_chains() -> Values:
    """Chains through one and two chunks only: a memory passes a gradient on to the weights, not to other memories."""
    chunks, weights = _toy()
    weights.requires_grad_()
    values: list[Tensor] = []
    memories: list[Tensor] = []
    total = torch.zeros(())
    for chunk in chunks:
        total = total + toy.f(chunk, memories, weights)[0]
        memories.append(toy.f(chunk, values, weights)[1])
        values.append(memories[-1].detach())
    (grad,) = torch.autograd.grad(total, weights)
    return {"the gradient of the weights": grad}


def _relay_mistakes(k: int) -> Mistakes:
    edges = all_edges(k)
    yield (
        "The gradient of every chunk is missing what later chunks sent back, as if the memories were constants: "
        f"{RELAY} What have later chunks left in the .grad of m'_j, and to whom does it belong?",
        _toy_gradient(set()),
    )
    yield (
        "Every chunk receives only what the very next chunk sent back. All later chunks have looked at it: "
        "do their gradients add up, or does each replace the last?",
        _toy_gradient({(i, j) for i, j in edges if j == i + 1}),
    )
    yield (
        "Chains through three chunks and more are missing: what chunk 2 sends to m_1 has to go on, from m_1 to m'_0. "
        "Does the backward of m_j reach the earlier memories, or the weights only?",
        _toy_gradient_of_short_chains(),
    )
    for i, j in sorted(edges):
        words = f"The gradient of chunk {i} is missing what chunk {j} sent back: {RELAY}"
        yield words, _toy_gradient(edges - {(i, j)})
    for i in range(k):
        words = f"The gradient of chunk {i} is missing all that later chunks sent back: {RELAY}"
        yield words, _toy_gradient({edge for edge in edges if edge[0] != i})
    yield (
        "The memories were given ones as their gradient, as in m_j.sum(). What have later chunks sent back to m'_j?",
        _toy_gradient(set(), 1.0),
    )


class _ToySpy:
    """f, which also sees how it is called."""

    def __init__(self, chunks: Sequence[Tensor]) -> None:
        self.chunks = chunks
        self.filled: list[int] = []
        self.rebuilt: list[int] = []
        self.backwards = [0] * len(chunks)  # how often a backward has come to each chunk's weights

    def __call__(self, chunk: Tensor, memories: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        j = next((j for j, x in enumerate(self.chunks) if torch.equal(x, chunk)), None)
        if j is None:
            raise AssertionError("f was called with a chunk that is none of x_0, …, x_{k-1}.")
        fills = not torch.is_grad_enabled()
        who = f"In the fill, chunk {j}" if fills else f"Chunk {j}"
        there_are = "there is" if j == 1 else "there are"
        question = (
            "What has the fill kept by then, and does f get to see it?"
            if fills
            else "Which slice of the memories is m'_0, …, m'_{j-1}?"
        )
        require(
            len(memories) == j,
            f"{who} was run with {count(len(memories), 'memory', 'memories')}, but {there_are} "
            f"{count(j, 'chunk', 'chunks')} before it. {question}",
        )
        if fills:
            self.filled.append(j)
            return toy.f(chunk, memories, weights)
        require(
            bool(self.filled),
            f"Chunk {j} is the first to run, and with gradients: if the fill keeps graphs, all k of them are in "
            "memory. What switches them off?",
        )
        self.rebuilt.append(j)
        for i, m in enumerate(memories):
            require(
                m.grad_fn is None,
                f"When chunk {j} is rebuilt, m'_{i} has a graph behind it: backward would run through chunk "
                f"{i} as well. Where is the fill's result, a leaf?",
            )
            require(
                m.requires_grad,
                f"When chunk {j} is rebuilt, m'_{i} does not require a gradient: nothing can be sent back to "
                "it. Who has to say so, and when?",
            )
        weights = weights.view_as(weights)  # this chunk's own, so that its backward can be told from the others'
        if weights.requires_grad:
            weights.register_hook(lambda grad: self._see_backward(j))
        return toy.f(chunk, memories, weights)

    def _see_backward(self, j: int) -> None:
        self.backwards[j] += 1


def check_relay(module: ModuleType) -> None:
    """seco on the toy model: how f is called, then the gradient, then the loss."""
    chunks, weights = _toy()
    k = len(chunks)
    weights.requires_grad_()
    spy = _ToySpy(chunks)
    words = (
        "m'_j.grad is None until something is sent back to it, and nobody looks at m_{k-1}: what is its gradient then?"
    )
    with hint("can be implicitly created only for scalar outputs", words):
        total = module.seco(spy, chunks, weights)
    require(
        spy.filled in (list(range(k)), list(range(k - 1))),
        f"The fill ran the chunks {spy.filled}; it has to run them in order, each once.",
    )
    check_walk(spy.rebuilt, list(range(k)))
    require(weights.grad is not None, "weights.grad is None: nothing has been backpropagated to the weights.")
    name = "the gradient of the weights"
    right = _toy_gradient(all_edges(k))
    compare({name: weights.grad}, right, _relay_mistakes(k), "matrix row column")
    for j, times in enumerate(spy.backwards):
        require(
            times < 2,
            f"The gradient is right, but chunk {j} went through {times} backward calls, one for its loss and one "
            "for what was relayed: in between the graph has to be kept (retain_graph), and all of its work is done "
            "twice. Can both go into one call of torch.autograd.backward?",
        )
    with torch.no_grad():
        memories: list[Tensor] = []
        losses = []
        for chunk in chunks:
            loss, memory = toy.f(chunk, memories, weights)
            losses.append(loss)
            memories.append(memory)
    check_loss_value(total, torch.stack(losses))

    module.seco(toy.f, chunks, weights)
    assert weights.grad is not None
    require(
        close(weights.grad, 2 * right[name]),
        "A second step must add its gradient to weights.grad, as backward() does. Is it overwritten?",
    )
