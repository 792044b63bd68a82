"""Labels into targets: what each position has to predict."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # Hugging Face's label of a position without a target


def shift(labels: Tensor) -> Tensor:
    """Targets (B, T): what position t has to predict is the label of t + 1, and nothing at the end.

    Done once and before cutting, so that no target is lost where one chunk ends and the next begins.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)
