"""What several checks use."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diagnose import compare, require

RELAY = "did you relay before calling backward?"
SKIPPED = "Chunk {} is to be skipped, its entry is None, but it was rebuilt: that is the work to save."


def random(seed: int, *shapes: Sequence[int]) -> list[Tensor]:
    """Normal float64 tensors, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def check_walk(rebuilt: list[int], kept: list[int]) -> None:
    """Assert that the chunks were rebuilt from the last kept one to the first; both count from 0."""
    require(
        rebuilt != kept or len(kept) < 2,
        f"The walk goes forward: chunk {kept[0]} was rebuilt before the later ones could send anything back to it. "
        "Which chunk has nobody after it?",
    )
    for i in sorted({*kept} - {*rebuilt}):
        raise AssertionError(f"Chunk {i} is never rebuilt: neither its loss nor its memory has a gradient.")
    for i in sorted({*rebuilt} - {*kept}):
        raise AssertionError(SKIPPED.format(i))
    require(rebuilt == kept[::-1], f"The chunks were rebuilt in the order {rebuilt}, but it has to be {kept[::-1]}.")


class Graphs:
    """Which of the rebuilt chunks' graphs live, and how often a backward call has come to each."""

    def __init__(self) -> None:
        self.graphs: dict[int, weakref.ref[Callable[[Tensor], None]]] = {}  # by chunk: dead when its graph is
        self.most: list[int] = []  # the most chunks whose graphs lived at once
        self.backwards: Counter[int] = Counter()

    def see(self, j: int, results: Sequence[Tensor]) -> None:
        """Remember the graph behind what chunk j's rebuild has returned."""

        def mark(grad: Tensor) -> None:  # a graph holds its hooks, so this function lives as long as the graph
            pass

        for result in results:
            if result.requires_grad:
                result.register_hook(mark)
        self.graphs[j] = weakref.ref(mark)
        if sum(graph() is not None for graph in self.graphs.values()) > 2:
            gc.collect()  # what is merely waiting for it does not count
        alive = sorted(i for i, graph in self.graphs.items() if graph() is not None)
        self.most = max(self.most, alive, key=len)

    def check(self) -> None:
        """One backward call for each chunk; one graph, and that of the chunk before, where variables still hold it."""
        for j, times in sorted(self.backwards.items()):
            require(
                times < 2,
                f"The gradient is right, but chunk {j} went through {times} backward calls, one for its loss and one "
                "for what was relayed: in between the graph has to be kept (retain_graph), and all of its work is done "
                "twice. Can both go into one call of torch.autograd.backward?",
            )
        require(
            len(self.most) < 3,
            f"The gradient is right, but when one chunk was rebuilt, the graphs of all of these chunks still lived: "
            f"{self.most}. Something holds their loss, or what they have written, and in the end there are as many of "
            "them as chunks. SeCO has one at a time: what of a chunk is needed after its backward?",
        )


class WatchedModel:
    """f of a toy, which also sees how it is called. check: of the chunk's number, what f is given of the past, and who
    is given it, in words."""

    def __init__(self, f: Any, chunks: Sequence[Tensor], check: Callable[[int, Any, str], None]) -> None:
        self.f, self.chunks, self.check = f, chunks, check
        self.filled: list[int] = []
        self.rebuilt: list[int] = []
        self.graphs = Graphs()

    def __call__(self, chunk: Tensor, past: Any, weights: Tensor) -> Any:
        j = next((j for j, x in enumerate(self.chunks) if torch.equal(x, chunk)), -1)
        require(j >= 0, "f was called with a chunk that is none of x_0, …, x_{k-1}.")
        fills = not torch.is_grad_enabled()
        self.check(j, past, f"In the fill, chunk {j}" if fills else f"Chunk {j}")
        if fills:
            self.filled.append(j)
            return self.f(chunk, past, weights)
        require(
            bool(self.filled),
            f"Chunk {j} is the first to run, and with gradients: if the fill keeps graphs, all k of them are in "
            "memory. What switches them off?",
        )
        require(
            all(m.grad_fn is None and m.requires_grad for m in ([past] if isinstance(past, Tensor) else past)),
            f"When chunk {j} is rebuilt, what lies before it is no leaf that requires a gradient: nothing can be sent "
            "back to it. Who has to say so, and when?",
        )
        self.rebuilt.append(j)
        weights = weights.view_as(weights)  # so that this chunk's backward calls can be told from the others'
        if weights.requires_grad:
            weights.register_hook(lambda grad: self.graphs.backwards.update([j]))
        results = self.f(chunk, past, weights)
        self.graphs.see(j, results)
        return results


def check_loss_value(got: Any, parts: Tensor) -> None:
    """The returned loss must be the sum of its chunks' parts, without a graph."""
    name = "the returned loss"
    words = "The returned loss is that of chunk 0 alone, the last one of the walk. What has to add up?"
    compare({name: got}, {name: parts.sum()}, [(words, {name: parts[0]})])
    require(
        not got.requires_grad,
        "The returned loss has a graph behind it, which keeps every chunk's activations. What cuts it off?",
    )


def check_nothing_kept(loss: Any, grads: Sequence[Tensor | None]) -> None:
    """The loss must be 0, and no gradient must have come."""
    nothing = isinstance(loss, Tensor | float | int) and float(loss) == 0
    require(nothing, f"When no chunk is kept, the returned loss has to be 0, but it is {loss}.")
    touched = any(grad is not None and grad.any() for grad in grads)
    require(not touched, "When no chunk is kept, the gradients must stay as they were.")
