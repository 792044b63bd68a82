"""What is known about mistakes in exercise 4, the relay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import toy
from ..diagnose import Mistakes, Values, close, compare, count, require
from .common import RELAY, Edges, Graphs, all_edges, check_loss_value, check_walk, random


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


def _toy_walk(relay: Callable[[int, Tensor, Tensor], Tensor], with_loss: bool = True) -> Values:
    """The gradient when chunk j is given relay(j, what was sent back to it, its memory)."""
    chunks, weights = _toy()
    weights.requires_grad_()
    with torch.no_grad():
        values: list[Tensor] = []
        for chunk in chunks:
            values.append(toy.f(chunk, values, weights)[1])
    leaves = [value.requires_grad_() for value in values]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    for j, chunk in reversed(list(enumerate(chunks))):
        loss, memory = toy.f(chunk, leaves[:j], weights)
        sent = leaves[j].grad
        assert sent is not None
        torch.autograd.backward([loss * with_loss, memory], [None, relay(j, sent, memory.detach())])
    assert weights.grad is not None
    return {"the gradient of the weights": weights.grad}


def _toy_gradient_of_chunk_0() -> Values:
    """What the backward of chunk 0, the last one of the walk, brings to the weights."""
    chunks, weights = _toy()
    weights.requires_grad_()
    memories: list[Tensor] = []
    total = torch.zeros(())
    for j, chunk in enumerate(chunks):
        loss, memory = toy.f(chunk, memories, weights if j == 0 else weights.detach())
        total = total + loss
        memories.append(memory)
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
    yield (
        "What was relayed counts twice. How often does m_j stand in the list that backward starts from, and is there a "
        "factor on its gradient?",
        _toy_walk(lambda j, sent, memory: 2 * sent),
    )
    yield (
        "The gradient of every chunk is twice what it has to be, as if its loss had been backpropagated twice: once by "
        "itself, and once more together with the memory.",
        {name: 2 * grad for name, grad in _toy_gradient(edges).items()},
    )
    yield (
        "The memory was given itself as its gradient. What later chunks have sent back to m'_j is not its value: where "
        "has autograd put it?",
        _toy_walk(lambda j, sent, memory: memory),
    )
    yield (
        "What was relayed is divided by how many numbers it has, as by a mean. A gradient that arrives at m_j goes on "
        "through the *sum* of products.",
        _toy_walk(lambda j, sent, memory: sent / sent.numel()),
    )
    yield (
        "What was relayed has the wrong sign.",
        _toy_walk(lambda j, sent, memory: -sent),
    )
    yield (
        "The gradient is zero: backward started from the memories alone, and without a loss nobody sends anything back "
        "to them. Where do the losses come in?",
        _toy_walk(lambda j, sent, memory: sent, with_loss=False),
    )
    yield (
        "The gradient is that of chunk 0 alone, the last one of the walk. Has weights.grad been overwritten or emptied "
        "on the way? All chunks add to it.",
        _toy_gradient_of_chunk_0(),
    )


class _ToySpy:
    """f, which also sees how it is called."""

    def __init__(self, chunks: Sequence[Tensor]) -> None:
        self.chunks = chunks
        self.filled: list[int] = []
        self.values: list[Tensor] = []  # what each chunk leaves behind
        self.rebuilt: list[int] = []
        self.leaves: list[list[Tensor]] = []  # that each rebuild was given
        self.graphs = Graphs()
        weights = _toy()[1]
        with torch.no_grad():
            for chunk in chunks:
                self.values.append(toy.f(chunk, self.values, weights)[1])

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
        for i, m in enumerate(memories):
            wrong = next((n for n, value in enumerate(self.values) if n != i and close(m, value)), None)
            require(
                wrong is None or close(m, self.values[i]),
                f"{who} was given m'_{wrong} in the place of m'_{i}. In which order do the memories stand?",
            )
            require(
                close(m, self.values[i]),
                f"{who} was given something else in the place of m'_{i}: f returns the loss, then the memory. Which of "
                "the two do later chunks see?",
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
        self.leaves.append(list(memories))
        loss, memory = toy.f(chunk, memories, self.graphs.own(j, weights))
        self.graphs.see(j, [loss, memory])
        return loss, memory

    def fresh_leaves(self) -> bool:
        """Whether two rebuilds were given different leaves for one memory."""
        return any(len({id(leaf) for leaf in same}) > 1 for same in zip(*(x for x in self.leaves if x), strict=False))

    def why_no_gradient(self) -> str:
        """For a memory that was given no gradient: what may be behind it."""
        k = len(self.chunks)
        if self.rebuilt[0] == 0:
            return (
                "The walk goes forward: chunk 0 was rebuilt before the later ones could send anything back to it. "
                "Which chunk has nobody after it?"
            )
        if self.rebuilt[0] < k - 1:
            return (
                f"The walk starts with chunk {self.rebuilt[0]}, but the last chunk is chunk {k - 1}. Nobody looks at "
                "*its* memory, but has it no loss?"
            )
        if self.fresh_leaves() or (len(self.rebuilt) > 1 and self.leaves[0][-1].grad is not None):
            return f"{FRESH} (m'_j.grad is None because nothing has ever arrived there.)"
        return (
            "m'_j.grad is None until something is sent back to it, and nobody looks at m_{k-1}: "
            "what is its gradient then?"
        )


FRESH = (
    "What a chunk sends back arrives in the .grad of the very tensors that f was given. They were fresh leaves, made "
    "for this call alone, and nobody has read their .grad: who adds it up, and hands it to the chunk that it belongs "
    "to?"
)


def check_relay(module: ModuleType) -> None:
    """seco on the toy model: how f is called, then the gradient, then the loss."""
    chunks, weights = _toy()
    k = len(chunks)
    weights.requires_grad_()
    spy = _ToySpy(chunks)
    try:
        total = module.seco(spy, chunks, weights)
    except RuntimeError as error:
        if "can be implicitly created only for scalar outputs" in str(error) and spy.rebuilt:
            error.add_note(spy.why_no_gradient())
        raise
    require(
        spy.filled in (list(range(k)), list(range(k - 1))),
        f"The fill ran the chunks {spy.filled}; it has to run them in order, each once.",
    )
    check_walk(spy.rebuilt, list(range(k)))
    require(weights.grad is not None, "weights.grad is None: nothing has been backpropagated to the weights.")
    name = "the gradient of the weights"
    right = _toy_gradient(all_edges(k))
    without = _toy_gradient(set())[name]
    require(not (spy.fresh_leaves() and close(weights.grad, without)), f"Nothing has been relayed. {FRESH}")
    compare({name: weights.grad}, right, _relay_mistakes(k), "matrix row column")
    spy.graphs.check_backwards()
    with torch.no_grad():
        memories: list[Tensor] = []
        losses = []
        for chunk in chunks:
            loss, memory = toy.f(chunk, memories, weights)
            losses.append(loss)
            memories.append(memory)
    check_loss_value(total, torch.stack(losses))
    spy.graphs.check()

    module.seco(toy.f, chunks, weights)
    assert weights.grad is not None
    require(
        close(weights.grad, 2 * right[name]),
        "A second step must add its gradient to weights.grad, as backward() does. Is it overwritten?",
    )
