"""What is known about mistakes in exercise 10, a loss of one's own."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diagnose import Values, compare, require, within
from ..toy_llama import IGNORE
from .common import random

Loss = Callable[[Tensor], Any]


def check_objective(module: ModuleType) -> None:
    """The value of both losses, and the numbers w_t that autograd makes of them."""
    labels = torch.arange(28).view(4, 7)
    for row, prompt in enumerate((2, 3, 1, 2)):
        labels[row, :prompt] = IGNORE
    mask = labels != IGNORE
    log_probs, reference = (-x.abs() * mask for x in random(10, (4, 7), (4, 7)))
    _check_focal(module, log_probs, labels, mask)
    _check_preference(module, log_probs, reference, mask)


def results(loss: Loss, log_probs: Tensor, mask: Tensor) -> Values:
    """What a loss says of these log-probabilities, and dJ/dl of each label."""
    leaf = log_probs.clone().requires_grad_()
    value = loss(leaf)
    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    require(shape == [], f"An objective has to return a scalar tensor, but {shape} came back: what makes one number?")
    (weights,) = torch.autograd.grad(value, leaf)
    return {"the loss": value.detach(), "its gradient": weights.where(mask, 0)}


def check_one(right: Loss, given: Loss, wrongs: dict[str, Loss], log_probs: Tensor, mask: Tensor) -> None:
    """wrongs: by what the mistake is, the loss that it leads to."""
    mistakes = ((words, results(wrong, log_probs, mask)) for words, wrong in wrongs.items())
    compare(results(given, log_probs, mask), results(right, log_probs, mask), mistakes)


@within("focal")
def _check_focal(module: ModuleType, log_probs: Tensor, labels: Tensor, mask: Tensor) -> None:
    def focal(x: Tensor) -> Tensor:
        return (-((1 - x.exp()) ** 3) * x).sum() / mask.sum()

    wrongs: dict[str, Loss] = {
        "The sign: this loss falls when the labels become less probable.": lambda x: -focal(x),
        "The losses are added up. By how many tokens has the sum to be divided?": lambda x: focal(x) * mask.sum(),
        "The mean is over all positions, those without a label included: the longer the prompt, the smaller the loss.":
            lambda x: focal(x) * mask.sum() / mask.numel(),
        "log_probs stands where p has to: what makes a probability of its logarithm?":
            lambda x: (-((1 - x) ** 3) * x).sum() / mask.sum(),
        "The factor is p^gamma: it is largest where the model knows the answer. Whom should the loss teach?":
            lambda x: (-(x.exp() ** 3) * x).sum() / mask.sum(),
        "The loss is right, but its gradient is not: the factor (1 - p)^gamma depends on the model, too. What cuts it "
        "off?": lambda x: (-((1 - x.detach().exp()) ** 3) * x).sum() / mask.sum() + 0 * x.sum(),
    }  # fmt: skip
    check_one(focal, lambda x: module.focal(x, labels, 3.0), wrongs, log_probs, mask)


@within("preference")
def _check_preference(module: ModuleType, log_probs: Tensor, reference: Tensor, mask: Tensor) -> None:
    beta, margin = 0.5, 0.3

    def dpo(rows: Tensor, margin: float = margin) -> Tensor:
        chosen, rejected = rows.chunk(2)
        return -F.logsigmoid(beta * (chosen - rejected) - margin).mean()

    wrongs: dict[str, Loss] = {
        "The rejected answers win: which half of the rows has the chosen ones?": lambda x: dpo((reference - x).sum(1)),
        "The rows were paired as neighbours, 0 with 1 and 2 with 3. Who is the rejected answer of row 0?":
            lambda x: dpo((x - reference).sum(1)[[0, 2, 1, 3]]),
        "The reference is left out: the loss rewards answers that were probable to begin with.":
            lambda x: dpo(x.sum(1)),
        "The answers count by their mean over positions. DPO has the sum: an answer is as probable as all of its "
        "tokens together.": lambda x: dpo((x - reference).mean(1)),
        "The answers count by their mean over tokens. DPO has the sum: an answer is as probable as all of its tokens "
        "together.": lambda x: dpo((x - reference).sum(1) / mask.sum(1)),
        "The margin makes it easier: it is added, so that the chosen answer may even lose by it.":
            lambda x: dpo((x - reference).sum(1), -margin),
        "The margin is multiplied by beta. Which bracket does it stand in?":
            lambda x: dpo((x - reference).sum(1), beta * margin),
        "The margin is missing: this is plain DPO.": lambda x: dpo((x - reference).sum(1), 0.0),
        "The losses of the pairs are added up. Of two batches of other sizes, which would move the model further?":
            lambda x: 2 * dpo((x - reference).sum(1)),
    }  # fmt: skip
    told = reference, beta, margin
    check_one(lambda x: dpo((x - reference).sum(1)), lambda x: module.preference(x, *told), wrongs, log_probs, mask)
    far = results(
        lambda x: module.preference(x, *told), log_probs - 2000.0 * mask * torch.tensor([[1], [1], [0], [0]]), mask
    )
    require(
        all(bool(torch.isfinite(x).all()) for x in far.values()),
        "Where the rejected answer is far ahead, as in long texts, the loss or its gradient is not finite: the sigmoid "
        "is 0 in floating point, and its logarithm infinite. Which function computes both at once?",
    )
