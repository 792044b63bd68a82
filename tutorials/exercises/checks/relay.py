"""What is known about mistakes in exercise 4, the relay."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import toy
from ..diagnose import Mistakes, Values, close, compare, count, hint, require
from .common import RELAY, WatchedModel, check_loss_value, check_walk, random

NAME = "the gradient of the weights"


def _toy() -> tuple[list[Tensor], Tensor]:
    *chunks, weights = random(3, (3, 4), (2, 4), (3, 4), (1, 4), (3, 4, 4))
    return chunks, 0.5 * weights


def _values() -> list[Tensor]:
    """What each chunk leaves behind."""
    chunks, weights = _toy()
    values: list[Tensor] = []
    for chunk in chunks:
        values.append(toy.f(chunk, values, weights)[1])
    return values


def _walk(relay: float = 1.0, one_back: bool = False) -> Values:
    """The gradient of the walk; as it stands, the right one.

    relay: multiplies what is relayed. one_back: only what the very next chunk has sent back is.
    """
    chunks, weights = _toy()
    weights.requires_grad_()
    leaves = [value.requires_grad_() for value in _values()]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    for j, chunk in reversed(list(enumerate(chunks))):
        loss, memory = toy.f(chunk, leaves[:j], weights)
        sent = relay * leaves[j].grad
        for leaf in leaves[:j] if one_back else []:
            leaf.grad.zero_()
        torch.autograd.backward([loss, memory], [None, sent])
    return {NAME: weights.grad}


def _mistakes() -> Mistakes:
    yield (
        "The gradient of every chunk is missing what later chunks sent back, as if the memories were constants: "
        f"{RELAY} What have later chunks left in the .grad of m'_j, and to whom does it belong? (It arrives in the "
        "very tensors that f was given: are they the same leaves in all turns?)",
        _walk(relay=0.0),
    )
    yield (
        "Every chunk receives only what the very next chunk sent back. All later chunks have looked at it: "
        "do their gradients add up, or does each replace the last?",
        _walk(one_back=True),
    )


def _check_memories(j: int, memories: Sequence[Tensor], who: str) -> None:
    require(
        len(memories) == j,
        f"{who} was run with {count(len(memories), 'memory', 'memories')}, but there are {j} before it. What has the "
        "fill kept by then, and which slice of the memories is m'_0, …, m'_{j-1}?",
    )
    for i, (m, value) in enumerate(zip(memories, _values(), strict=False)):
        require(
            close(m, value),
            f"{who} was given something else in the place of m'_{i}: f returns the loss, then the memory, and the "
            "memories stand in the order of the chunks.",
        )


NOBODY = (
    "can be implicitly created only for scalar outputs",
    "m'_j.grad is None until something is sent back to it, and nobody looks at m_{k-1}: what is its gradient then? (If "
    "it is None for another chunk: which chunk has nobody after it, and does the walk begin there?)",
)


def check_relay(module: ModuleType) -> None:
    """seco on the toy model: how f is called, then the gradient, then the loss."""
    chunks, weights = _toy()
    k = len(chunks)
    weights.requires_grad_()
    model = WatchedModel(toy.f, chunks, _check_memories)
    with hint(*NOBODY):
        total = module.seco(model, chunks, weights)
    require(
        model.filled in (list(range(k)), list(range(k - 1))),
        f"The fill ran the chunks {model.filled}; it has to run them in order, each once.",
    )
    check_walk(model.rebuilt, list(range(k)))
    require(weights.grad is not None, "weights.grad is None: nothing has been backpropagated to the weights.")
    once = weights.grad.clone()
    plain = weights.detach().requires_grad_()
    memories: list[Tensor] = []
    losses = []
    for chunk in chunks:
        loss, memory = toy.f(chunk, memories, plain)
        losses.append(loss)
        memories.append(memory)
    torch.stack(losses).sum().backward()
    compare({NAME: once}, {NAME: plain.grad}, _mistakes(), "matrix row column")
    check_loss_value(total, torch.stack(losses).detach())
    model.graphs.check()

    module.seco(toy.f, chunks, weights)
    require(
        close(weights.grad, 2 * once),
        "A second step must add its gradient to weights.grad, as backward() does. Is it overwritten?",
    )
