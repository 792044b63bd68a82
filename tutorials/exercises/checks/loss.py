"""What is known about mistakes in exercise 3, the loss."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..diagnose import Mistakes, Values, compare, require, take, within
from ..toy_llama import IGNORE
from .common import random

TILE = 4


def check_loss(module: ModuleType) -> None:
    """targets_by_chunk, loss_and_gradients (also its memory) and SummedLoss.backward."""
    _check_targets(module)
    hidden, weight = random(1, (14, 3), (17, 3))
    targets = torch.randint(17, (14,), generator=torch.Generator().manual_seed(2))
    targets[[1, 6, 7]] = IGNORE
    _check_tiles(module, hidden, weight, targets)
    _check_summed_loss(module, hidden, weight, targets)


@within("targets_by_chunk")
def _check_targets(module: ModuleType) -> None:
    labels = torch.arange(20, 42).view(2, 11)
    labels[0, 5] = IGNORE
    got = take(module.targets_by_chunk(labels, 4), *["the targets of a chunk of 4, of 11 positions"] * 3)
    wrongs = {
        "The labels were cut first and shifted within each chunk: the last position of every chunk lost its target. "
        "It predicts the first label of the next chunk: which has to come first, the shift or the cut?": [
            F.pad(part[:, 1:], (0, 1), value=IGNORE) for part in labels.split(4, dim=1)
        ],
        "The labels were cut, but not shifted: each position would predict itself.": labels.split(4, dim=1),
    }
    names = [f"the targets of chunk {i}" for i in range(3)]
    mistakes = ((words, dict(zip(names, parts, strict=True))) for words, parts in wrongs.items())
    expected = dict(zip(names, F.pad(labels[:, 1:], (0, 1), value=IGNORE).split(4, dim=1), strict=True))
    compare(dict(zip(names, got, strict=True)), expected, mistakes, "row position")


class _LargestTensor(TorchDispatchMode):
    """Remembers the shape of the largest tensor that any operation makes."""

    shape = torch.Size()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        shapes = [leaf.shape for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.shape = max(self.shape, *shapes, key=torch.Size.numel) if shapes else self.shape
        return result


@within("loss_and_gradients")
def _check_tiles(module: ModuleType, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    N, V, rows_with = len(hidden), len(weight), targets != IGNORE
    logits = hidden @ weight.T
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    p, onehot = logits.softmax(-1), F.one_hot(targets.clamp(min=0), V)
    dlogits = (p - onehot) * rows_with[:, None]
    with _LargestTensor() as largest:
        result = module.loss_and_gradients(hidden, weight, targets, TILE)
    loss, dhidden, dweight = take(result, "loss", "dhidden", "dweight")
    tiles, whole = [slice(start, start + TILE) for start in range(0, N, TILE)], N - N % TILE
    means = torch.stack([losses[tile].sum() / rows_with[tile].sum() for tile in tiles])
    name = "the loss"
    compare({name: loss}, {name: losses.sum()}, [
        ("The loss is the sum of the tiles' means. Tiles have unequally many targets: what has to add up?",
         {name: means.sum()}),
        ("The last rows are missing: the tile size does not divide N. Who takes the rest?",
         {name: losses[:whole].sum()}),
    ])  # fmt: skip

    def gradients(dlogits: Tensor) -> Values:
        return {"dhidden": dlogits @ weight, "dweight": dlogits.T @ hidden}

    def mistakes() -> Mistakes:
        words = "The rows with the label -100 have a gradient. Their loss is 0: what is its gradient?"
        yield words, gradients(p - onehot)
        words = "dweight is that of the last tile only. Every tile contributes: what has to add up?"
        yield words, {**gradients(dlogits), "dweight": dlogits[tiles[-1]].T @ hidden[tiles[-1]]}

    compare({"dhidden": dhidden, "dweight": dweight}, gradients(dlogits), mistakes(), "row column")
    require(
        largest.shape.numel() <= TILE * V,
        f"The result is right, but on the way there was a tensor of shape {list(largest.shape)}: the logits of the "
        f"whole chunk at once, or something as large. With tile = {TILE} and V = {V} none needs more than {TILE} x {V} "
        "numbers. Which rows of hidden does one turn of the loop need?",
    )


@within("SummedLoss")
def _check_summed_loss(module: ModuleType, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    def gradients(loss_of: Any) -> dict[str, Any]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        (3 * loss_of(h, w)).backward()  # as a loss that is divided by the number of targets, or weighted by a sampler
        return {"the gradient of hidden": h.grad, "the gradient of weight": w.grad}

    expected = gradients(lambda h, w: F.cross_entropy(h @ w.T, targets, ignore_index=IGNORE, reduction="sum"))
    got = gradients(lambda h, w: module.SummedLoss.apply(h, w, targets, TILE))
    for name, value in got.items():
        require(value is not None, f"{name} is None: backward has returned None in its place. Which inputs need one?")
    words = (
        "backward ignores the gradient that it is given: 3 times the loss has the gradient of the loss. "
        "What does the chain rule do with it?"
    )
    compare(got, expected, [(words, {name: value / 3 for name, value in expected.items()})], "row column")
