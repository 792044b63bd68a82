"""Solution 10: a loss of one's own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the label of a position without a target


def focal(log_probs: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """The focal loss: -(1 - p)^gamma log p, on average over all tokens that have a label."""
    losses = -((1 - log_probs.exp()) ** gamma) * log_probs  # 0 without a label: there log_probs is 0
    return losses.sum() / (labels != IGNORE).sum()


def preference(log_probs: Tensor, reference: Tensor, beta: float, margin: float) -> Tensor:
    """DPO with a margin, on average over the pairs."""
    chosen, rejected = (log_probs - reference).sum(1).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected) - margin).mean()
