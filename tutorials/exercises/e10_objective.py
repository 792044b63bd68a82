"""Exercise 10: a loss of your own.

Whatever a loss J makes of the labels' log-probabilities l_t, it reaches the model through them alone: by one number for
each token, w_t = dJ/dl_t, which autograd gives. So J need not be a sum over chunks, and `mc.seco` trains it exactly:

    mc.seco(model, input_ids, labels, chunk_size=512, objective=lambda log_probs: focal(log_probs, labels, 2.0))

Both functions here get log_probs, (B, T), each label's log-probability at the label's own position and 0 where there is
none, and return a scalar. Three lines each are enough.

Check: python -m pytest tutorials/exercises -k objective
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: F401
from torch import Tensor

IGNORE = -100  # the label of a position without a target


def focal(log_probs: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """The focal loss (arXiv 1708.02002): -(1 - p)^gamma log p, on average over all tokens that have a label.

    labels: int64 (B, T), IGNORE where there is none. p is the label's probability: what the model knows already, it is
    hardly taught again.

    Hint. What does a position without a label add to the sum, and what does it add to the count?
    """
    raise NotImplementedError("focal: the mean focal loss of the labels")


def preference(log_probs: Tensor, reference: Tensor, beta: float, margin: float) -> Tensor:
    """DPO with a margin: -log sigmoid(beta · (chosen - rejected) - margin), on average over the pairs.

    The first half of the rows are the chosen answers, the second half, in the same order, the rejected ones. An answer
    counts by how much more probable it is than in the reference: the sum over its tokens of log_probs - reference.
    reference: (B, T), as log_probs.

    Hint. What is the sigmoid of -1000, and what its logarithm?
    """
    raise NotImplementedError("preference: the mean loss of the pairs")
