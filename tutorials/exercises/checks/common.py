"""What several checks use."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import minichunk as mc

from ..diagnose import Mistakes, compare, require

RELAY = "did you relay before calling backward?"
IGNORE = -100
TWICE = (
    "The gradient is right, but chunk {} went through {} backward calls, one for its loss and one for what was "
    "relayed: in between the graph has to be kept (retain_graph), and all of its work is done twice. Can both go "
    "into one call of torch.autograd.backward?"
)
SKIPPED = "Chunk {} is to be skipped, its entry is None, but it was rebuilt: that is the work to save."
CHUNK_SIZE = 3  # of the batches for a Llama
Edges = set[tuple[int, int]]  # (i, j): what chunk j sends back to chunk i arrives


def random(seed: int, *shapes: Sequence[int]) -> list[Tensor]:
    """Normal float64 tensors, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def all_edges(k: int) -> Edges:
    """Every (i, j) with i before j."""
    return {(i, j) for j in range(k) for i in range(j)}


def check_walk(rebuilt: list[int], kept: list[int]) -> None:
    """Assert that the chunks were rebuilt from the last kept one to the first; both count from 0."""
    wanted = kept[::-1]
    require(
        rebuilt != kept or len(kept) < 2,
        f"The walk goes forward: chunk {kept[0]} was rebuilt before the later ones could send anything back to it. "
        "Which chunk has nobody after it?",
    )
    for i in sorted({*kept} - {*rebuilt}):
        raise AssertionError(f"Chunk {i} is never rebuilt: neither its loss nor its memory has a gradient.")
    for i in sorted({*rebuilt} - {*kept}):
        raise AssertionError(SKIPPED.format(i))
    found, right = (" ".join(str(i) for i in order) for order in (rebuilt, wanted))
    require(rebuilt == wanted, f"The chunks were rebuilt in the order {found}, but it has to be {right}.")


class Graphs:
    """Which of the rebuilt chunks' graphs live, and how often a backward call has come to each."""

    def __init__(self) -> None:
        self.graphs: dict[int, weakref.ref[Callable[[Tensor], None]]] = {}  # by chunk: dead when its graph is
        self.most: list[int] = []  # the most chunks whose graphs lived at once
        self.backwards: dict[int, int] = {}

    def see(self, j: int, results: Sequence[Tensor]) -> None:
        """Remember the graph behind what chunk j's rebuild has returned."""

        def mark(grad: Tensor) -> None:  # a graph holds its hooks, so this function lives as long as the graph
            pass

        for result in results:
            if result.requires_grad:
                result.register_hook(mark)
        self.graphs[j] = weakref.ref(mark)
        alive = self._alive()
        if len(alive) > 2:
            gc.collect()  # what is merely waiting for it does not count
            alive = self._alive()
        if len(alive) > len(self.most):
            self.most = alive

    def _alive(self) -> list[int]:
        return sorted(i for i, graph in self.graphs.items() if graph() is not None)

    def see_backward(self, j: int) -> None:
        self.backwards[j] = self.backwards.get(j, 0) + 1

    def own(self, j: int, weights: Tensor) -> Tensor:
        """A view of the weights for chunk j, so that its backward calls can be told from the others'."""
        weights = weights.view_as(weights)
        if weights.requires_grad:
            weights.register_hook(lambda grad: self.see_backward(j))
        return weights

    def check_backwards(self) -> None:
        for j, times in sorted(self.backwards.items()):
            require(times < 2, TWICE.format(j, times))

    def check(self) -> None:
        """One chunk's graph, and that of the chunk before it in the walk, where variables still hold it."""
        if len(self.most) < 3:
            return
        now, *others, last = (str(i) for i in self.most)
        raise AssertionError(
            f"The gradient is right, but when chunk {now} was rebuilt, the graphs of the chunks "
            f"{', '.join(others)} and {last} still lived: something holds their loss, or what they have "
            "written, and in the end there are as many of them as chunks. SeCO has one at a time: what of a chunk is "
            "needed after its backward, and who holds the rest?",
        )


def check_loss_value(got: Any, parts: Tensor, extra: Mistakes = ()) -> None:
    """The returned loss must be the sum of its chunks' parts, without a graph."""
    name = "the returned loss"
    known = [
        ("The returned loss is that of chunk 0 alone, the last one of the walk. What has to add up?", {name: parts[0]}),
        ("The returned loss is that of the last chunk alone, the first one of the walk.", {name: parts[-1]}),
        ("The returned loss is the mean over the chunks, but it has to be their sum.", {name: parts.mean()}),
    ]
    compare({name: got}, {name: parts.sum()}, [*extra, *known])
    require(
        not got.requires_grad,
        "The returned loss has a graph behind it, which keeps every chunk's activations. What cuts it off?",
    )


def tiny_llama(layers: int = 3) -> mc.Llama:
    """A tiny float64 Llama whose attention is far from uniform."""
    config = mc.LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
    )
    model = mc.Llama(config).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * (1.0 if "embed" in name else 0.25) + ("norm" in name))
    return model


def batch(T: int) -> tuple[Tensor, Tensor]:
    """input_ids and labels (2, T): some labels ignored, so that the chunks have unequally many targets."""
    input_ids = torch.randint(13, (2, T), generator=torch.Generator().manual_seed(T))
    labels = input_ids.clone()
    labels[0, :4] = IGNORE
    labels[1, -2:] = IGNORE
    return input_ids, labels
