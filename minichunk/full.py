"""Ordinary backpropagation of the whole sequence: the oracle and the baseline.

Shares nothing with the memory, the chunk attention or the tiled loss, so that it can check them.
"""

import torch.nn.functional as F
from torch import Tensor

from .batch import IGNORE, Batch, prepare
from .protocol import Model, Options


def full(
    model: Model, input_ids: Tensor, labels: Tensor, *, num_targets: float | None = None, recompute: bool = False,
    positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Add the gradient of the mean loss to `.grad`; return the loss, detached.

    The paper's naive parallel training, or gradient checkpointing with `recompute=True`.

    input_ids, labels: int64 (B, T); labels as Hugging Face has them (same positions, -100 ignored).
    num_targets: divides the summed loss instead of the count of valid targets, for gradient accumulation.
    positions: int64 (B, T), for rope alone; None: 0, 1, 2, …
    Raises InputError for a batch that does not fit the model.
    """
    return backpropagate(model, prepare(model, input_ids, labels, num_targets, positions), recompute)


def backpropagate(model: Model, batch: Batch, recompute: bool = False) -> Tensor:
    """What `full` does once the batch is checked."""
    hidden, _ = model.run(batch.input_ids, options=Options(recompute=recompute, positions=batch.positions))
    logits = model.lm_head(hidden).flatten(0, 1)  # (B*T, V)
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    losses = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
    loss = losses / batch.num_targets
    loss.backward()
    return loss.detach()
