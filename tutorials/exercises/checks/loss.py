"""What is known about mistakes in exercise 3, the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..diagnose import Mistakes, Values, compare, count, hint, require, take, within
from .common import IGNORE, random


def check_loss(module: ModuleType) -> None:
    """targets_by_chunk, loss_and_gradients (also its memory) and SummedLoss.backward."""
    _check_targets(module)
    hidden, weight = random(1, (14, 3), (17, 3))
    targets = torch.randint(17, (14,), generator=torch.Generator().manual_seed(2))
    targets[[1, 6, 7]] = IGNORE
    _check_tiles(module, hidden, weight, targets, tile=4)
    _check_summed_loss(module, hidden, weight, targets, tile=4)


@within("targets_by_chunk")
def _check_targets(module: ModuleType) -> None:
    labels = torch.arange(20, 42).view(2, 11)
    labels[0, 5] = IGNORE
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    got = module.targets_by_chunk(labels, 4)
    require(isinstance(got, list | tuple), "The result has to be a list, with the targets of each chunk.")
    require(
        len(got) == 3,
        f"11 labels in chunks of 4 make 3 chunks of targets, but {count(len(got), 'chunk', 'chunks')} came back. Along "
        "which dimension are the positions, is what you give a length or a number of pieces, and who takes the rest?",
    )
    names = [f"the targets of chunk {i}" for i in range(3)]
    short = {
        "The targets are one position shorter than the ids: the last position has nothing to predict, but it is there, "
        "and has a row of logits. No target is written IGNORE, that is -100: where does one belong?": (
            labels[:, 1:].split(4, dim=1)
        ),
        "The labels were cut first and shifted within each chunk: the last position of every chunk lost its target, "
        "and its place. It predicts the first label of the next one: which has to come first, the shift or the cut?": [
            part[:, 1:] for part in labels.split(4, dim=1)
        ],
    }
    for words, parts in short.items():
        require(not all(isinstance(x, Tensor) and torch.equal(x, y) for x, y in zip(got, parts, strict=True)), words)
    wrongs = {
        "The labels were cut first and shifted within each chunk: the last position of every chunk lost its target. "
        "It predicts the first label of the next chunk: which has to come first, the shift or the cut?": [
            F.pad(part[:, 1:], (0, 1), value=IGNORE) for part in labels.split(4, dim=1)
        ],
        "The labels were cut, but not shifted: each position would predict itself.": labels.split(4, dim=1),
        "The last position predicts the first label. Nothing follows it: what is the label of no target?": (
            labels.roll(-1, dims=1).split(4, dim=1)
        ),
        "A position was added at the front instead of the end: the first label is gone, and each position would "
        "predict itself. Which label has nobody before it to predict it, and which position has nothing to predict?": (
            F.pad(labels[:, 1:], (1, 0), value=IGNORE).split(4, dim=1)
        ),
        "The labels were shifted by two: each position would predict the one after the next.": (
            F.pad(labels[:, 2:], (0, 2), value=IGNORE).split(4, dim=1)
        ),
        "The last position's target is 0, which is a token. How is no target written?": (
            F.pad(labels[:, 1:], (0, 1), value=0).split(4, dim=1)
        ),
        "The labels were shifted the wrong way: each position would predict the one before it.": (
            F.pad(labels[:, :-1], (1, 0), value=IGNORE).split(4, dim=1)
        ),
    }
    mistakes = ((words, dict(zip(names, parts, strict=True))) for words, parts in wrongs.items())
    expected = dict(zip(names, targets.split(4, dim=1), strict=True))
    compare(dict(zip(names, got, strict=True)), expected, mistakes, "row position")


SIZES = {  # what PyTorch says, and what it means here
    "must match the size of tensor": (
        "A tile has its own rows, of the targets as well; and dweight is (V, E), as the weight is: what you add to "
        "it, too?"
    ),
    "must match the existing size": (
        "Each tile's rows of dhidden stand where the tile's rows of hidden do. Which are they?"
    ),
}


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: Sequence[int] = ()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() > self.size:
                self.shape, self.size = list(leaf.shape), leaf.numel()
        return result


def _tiles(hidden: Tensor, weight: Tensor, targets: Tensor, tile: int, ragged: bool = True) -> Iterator[slice]:
    stop = len(hidden) if ragged else len(hidden) - len(hidden) % tile
    return (slice(start, start + tile) for start in range(0, stop, tile))


@within("loss_and_gradients")
def _check_tiles(module: ModuleType, hidden: Tensor, weight: Tensor, targets: Tensor, tile: int) -> None:
    N, V, valid = len(hidden), len(weight), int((targets != IGNORE).sum())
    logits = hidden @ weight.T
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    p, onehot = logits.softmax(-1), F.one_hot(targets.clamp(min=0), V)
    dlogits = (p - onehot) * (targets != IGNORE)[:, None]
    with ExitStack() as stack:
        largest = stack.enter_context(_LargestTensor())
        for symptom, words in SIZES.items():
            stack.enter_context(hint(symptom, words))
        result = module.loss_and_gradients(hidden, weight, targets, tile)
    loss, dhidden, dweight = take(result, "loss", "dhidden", "dweight")
    swapped = isinstance(dhidden, Tensor) and dhidden.shape == weight.shape
    require(not swapped, "The two gradients are swapped: what has to be returned is the loss, dhidden, then dweight.")
    tiles, whole = list(_tiles(hidden, weight, targets, tile)), slice(0, N - N % tile)

    def loss_mistakes() -> Iterator[tuple[str, Tensor]]:
        means = torch.stack([losses[rows].sum() / (targets[rows] != IGNORE).sum() for rows in tiles])
        yield (
            "The loss is the sum of the tiles' means. Tiles have unequally many targets: what has to add up?",
            means.sum(),
        )
        yield "The loss is the mean of the tiles' means. What was asked for is the sum over the targets.", means.mean()
        yield f"The loss is the mean over the {valid} targets. What was asked for is the sum.", losses.sum() / valid
        words = "The loss is divided by the number of rows. What was asked for is the sum, over the rows with a target."
        yield words, losses.sum() / N
        clamped = F.cross_entropy(logits, targets.clamp(min=0), reduction="sum")
        yield "Rows with the label -100 count as if their target was token 0. Which rows have a loss?", clamped
        yield "The last rows are missing: the tile size does not divide N. Who takes the rest?", losses[whole].sum()
        yield "The loss is that of the last tile only. What has to add up?", losses[tiles[-1]].sum()

    name = "the loss"
    compare({name: loss}, {name: losses.sum()}, ((words, {name: wrong}) for words, wrong in loss_mistakes()))

    def gradients(dlogits: Tensor) -> Values:
        return {"dhidden": dlogits @ weight, "dweight": dlogits.T @ hidden}

    def gradient_mistakes() -> Mistakes:
        right = gradients(dlogits)
        yield (
            "The rows with the label -100 have a gradient. Their loss is 0: what is its gradient?",
            gradients(p - onehot),
        )
        unhot = gradients(p * (targets != IGNORE)[:, None])
        yield "The gradient is softmax(logits) alone. The loss is lse - logits[target]: what of its second term?", unhot
        yield "Both gradients have the wrong sign: onehot - softmax.", gradients(-dlogits)
        mask = (targets != IGNORE)[:, None]
        question = "The loss is lse - logits[target]: what is the derivative of lse by a logit?"
        yield (
            f"The gradient is made from the logits instead of their softmax. {question}",
            gradients((logits - onehot) * mask),
        )
        words = f"The gradient is made from the logarithm of the softmax. {question}"
        yield words, gradients((p.log() - onehot) * mask)
        over_rows = torch.cat([logits[rows].softmax(0) for rows in tiles])
        words = "The softmax runs over the rows of a tile. Among what does a position choose?"
        yield words, gradients((over_rows - onehot) * mask)
        yield (
            "dhidden is zero: every tile has its rows of it. Where are they filled in?",
            {**right, "dhidden": 0 * hidden},
        )
        means = torch.cat([dlogits[rows] / (targets[rows] != IGNORE).sum() for rows in tiles])
        yield "The gradient is that of the tiles' means, but the loss is a sum.", gradients(means)
        yield "The gradient is that of the mean loss, but the loss is a sum.", gradients(dlogits / valid)
        last = dlogits[tiles[-1]].T @ hidden[tiles[-1]]
        words = "dweight is that of the last tile only. Every tile contributes: what has to add up?"
        yield words, {**right, "dweight": last}
        rest = torch.cat([dlogits[whole], torch.zeros_like(dlogits[whole.stop :])])
        yield "The last rows have no gradient: the tile size does not divide N. Who takes the rest?", gradients(rest)

    got = {"dhidden": dhidden, "dweight": dweight}
    compare(got, gradients(dlogits), gradient_mistakes(), "row column")
    require(
        largest.size <= tile * V,
        f"The result is right, but on the way there was a tensor of shape {largest.shape}: the logits of the whole "
        f"chunk at once, or something as large. With tile = {tile} and V = {V} none needs more than {tile} x {V} "
        "numbers. Which rows of hidden does one turn of the loop need?",
    )


@within("SummedLoss")
def _check_summed_loss(module: ModuleType, hidden: Tensor, weight: Tensor, targets: Tensor, tile: int) -> None:
    expected: Values = {}
    got: dict[str, Any] = {}
    for ours, values in ((True, expected), (False, got)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            loss = F.cross_entropy(h @ w.T, targets, ignore_index=IGNORE, reduction="sum")
        else:
            loss = module.SummedLoss.apply(h, w, targets, tile)
        (3 * loss).backward()  # as a loss that is divided by the number of targets, or weighted by a sampler
        values.update({"the gradient of hidden": h.grad, "the gradient of weight": w.grad})
    for name, value in got.items():
        require(value is not None, f"{name} is None: backward has returned None in its place. Which inputs need one?")
    words = (
        "backward ignores the gradient that it is given: 3 times the loss has the gradient of the loss. "
        "What does the chain rule do with it?"
    )
    mistakes = [
        (words, {name: value / 3 for name, value in expected.items()}),
        ("backward divides by the gradient that it is given. What does the chain rule do with it?", {
            name: value / 9 for name, value in expected.items()
        }),
        ("backward adds the gradient that it is given. What does the chain rule do with it?", {
            name: value / 3 + 3 for name, value in expected.items()
        }),
    ]  # fmt: skip
    compare(got, expected, mistakes, "row column")
