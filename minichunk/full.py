"""Ordinary backpropagation of the whole sequence: the oracle and the baseline.

Shares nothing with the memory, the chunk attention or the tiled loss, so that it can check them.
"""

import torch.nn.functional as F
from torch import Tensor

from .batch import IGNORE, Batch, ChunkLoss, Objective, prepare
from .chunks import Chunk
from .protocol import Model, Options


def full(
    model: Model, input_ids: Tensor, labels: Tensor, *, objective: Objective | None = None,
    chunk_loss: ChunkLoss | None = None, num_targets: float | None = None, recompute: bool = False,
    positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Add the gradient of the mean loss to `.grad`; return the loss, detached.

    The paper's naive parallel training, or gradient checkpointing with `recompute=True`.

    input_ids, labels: int64 (B, T); labels as Hugging Face has them (same positions, -100 ignored).
    objective, chunk_loss: see `seco`; the whole text is one chunk.
    num_targets: divides the summed loss instead of the count of valid targets, for gradient accumulation.
    positions: int64 (B, T), for rope alone; None: 0, 1, 2, …
    Raises InputError for a batch that does not fit the model.
    """
    batch = prepare(model, input_ids, labels, num_targets, positions, objective, chunk_loss)
    return backpropagate(model, batch, recompute, objective)


def backpropagate(model: Model, batch: Batch, recompute: bool = False, objective: Objective | None = None) -> Tensor:
    """What `full` does once the batch is checked."""
    hidden, _ = model.run(batch.input_ids, options=Options(recompute=recompute, positions=batch.positions))
    if batch.chunk_loss is not None:
        loss = batch.chunk_loss(hidden, Chunk(0, batch.input_ids.shape[1]))
    else:
        logits = model.lm_head(hidden).flatten(0, 1)  # (B*T, V)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        how = "sum" if objective is None else "none"
        losses = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE, reduction=how)
        if objective is None:
            loss = losses / batch.num_targets
        else:
            loss = objective(-F.pad(losses.view_as(batch.targets)[:, :-1], (1, 0)))
    loss.backward()
    return loss.detach()
