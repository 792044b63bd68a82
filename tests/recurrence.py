"""The recurrence of a state, written out token by token: the oracle of everything that does without that loop."""

from __future__ import annotations

import torch
from torch import Tensor


def loop(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y (…, T, P), and the states (…, P, N) after each token; the arguments are those of `scan`."""
    outputs, states = [], []
    for t in range(x.shape[-2]):
        h = h * log_a[..., t, None, :].exp() + x[..., t, :, None] * b[..., t, None, :]
        states.append(h)
        outputs.append((h * c[..., t, None, :]).sum(-1))
    return torch.stack(outputs, -2), states
