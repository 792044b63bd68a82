"""Ordinary backpropagation of the whole sequence: the oracle and the baseline.

Shares nothing with the memory, the chunk attention or the tiled loss, so that it can check them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import IGNORE, Batch, ChunkLoss, Objective, prepare
from .chunks import Chunk
from .protocol import Model, Options


def full(
    model: Model, input_ids: Tensor, labels: Tensor, *, objective: Objective | None = None,
    chunk_loss: ChunkLoss | None = None, num_targets: float | None = None, recompute: bool = False,
    positions: Tensor | None = None, starts: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """Add the gradient of the mean loss to `.grad`; return the loss, detached.

    The paper's naive parallel training, or gradient checkpointing with `recompute=True`.

    input_ids, labels: int64 (B, T); labels as Hugging Face has them (same positions, -100 ignored).
    objective, chunk_loss: see `seco`; the whole text is one chunk.
    num_targets: divides the summed loss instead of the count of valid targets, for gradient accumulation.
    positions: int64 (B, T), for rope alone; None: 0, 1, 2, … in each document.
    starts: where documents begin in a single row; each is run by itself.
    Raises InputError for a batch that does not fit the model.
    """
    batch = prepare(model, input_ids, labels, num_targets, positions, objective, chunk_loss, starts)
    return backpropagate(model, batch, recompute, objective)


def backpropagate(model: Model, batch: Batch, recompute: bool = False, objective: Objective | None = None) -> Tensor:
    """What `full` does once the batch is checked."""
    texts = []
    for begin, end in batch.documents.between(0, batch.input_ids.shape[1]):
        places = None if batch.positions is None else batch.positions[..., begin:end]
        how = Options(recompute=recompute, positions=places)
        texts.append(model.run(batch.input_ids[:, begin:end], options=how)[0])
    hidden = texts[0] if len(texts) == 1 else torch.cat(texts, 1)
    if batch.chunk_loss is not None:
        loss = batch.chunk_loss(hidden, Chunk(0, batch.input_ids.shape[1]))
    else:
        logits = model.lm_head(hidden).flatten(0, 1)  # (B*T, V)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        reduction = "sum" if objective is None else "none"
        losses = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE, reduction=reduction)
        if objective is None:
            loss = losses / batch.num_targets
        else:
            loss = objective(-F.pad(losses.view_as(batch.targets)[:, :-1], (1, 0)))
    loss.backward()
    return loss.detach()
