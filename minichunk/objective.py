"""Losses that are a function of the log-probabilities of all labels: preferences, rewards, whatever a user writes.

Such a loss J = f(l_1 .. l_T), where l_t is the log-probability of label t, reaches the model through the l_t alone:

    dJ/dΘ = Σ_t w_t dl_t/dΘ,        w_t = dJ/dl_t

The fill can yield the l_t, if the last chunk and the LM head join it. From them autograd gives the w_t, one number for
each label, and with these the walk back is the ordinary one, over a weighted sum of the labels' losses. So it is with
SpaCO: its fill goes through all chunks then, or the w_t would be biased, and so would all that they multiply.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import Batch, Objective
from .chunks import Chunk, groups
from .errors import InputError
from .loss import token_losses
from .protocol import Memory, Model, Options


def weigh(objective: Objective, batch: Batch, log_probs: Tensor) -> tuple[Batch, Tensor]:
    """The batch with a factor on the loss of each target, and what the objective says, detached.

    log_probs: (B, T), see `log_probs`. Raises InputError unless the objective makes a scalar of them.
    """
    leaf = log_probs.detach().requires_grad_()
    with torch.enable_grad():
        value = objective(leaf)
    if not isinstance(value, Tensor) or value.shape != () or not value.requires_grad:
        found = f"{type(value).__name__} {list(value.shape) if isinstance(value, Tensor) else value!r}"
        raise InputError(f"the objective returned {found}, but must return a scalar made of the log-probabilities")
    (weights,) = torch.autograd.grad(value, leaf)
    factors = -F.pad(weights[:, 1:], (0, 1))
    factors = factors if batch.tree is None else batch.tree.row(factors)
    return batch._replace(num_targets=1, factors=factors), value.detach()


class Scores:
    """Gathers the losses of a batch's targets, chunk by chunk, from what the LM head of `model` is given, (B, C, E)."""

    def __init__(self, model: Any, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.losses: list[Tensor] = []

    def keep(self, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        part = self.batch.part(chunks)
        self.losses.append(token_losses(hidden, self.model.lm_head.weight, part.targets, part.labelled))

    def log_probs(self) -> Tensor:
        losses, tree = torch.cat(self.losses, 1), self.batch.tree
        return -F.pad((losses if tree is None else tree.rows(losses))[:, :-1], (1, 0))


@torch.no_grad()
def outputs(run: Any, batch: Batch, chunks: Sequence[Chunk], memory: Memory, options: Options) -> Iterator[Any]:
    """Lines 1-3 of Algorithm 1, and the last chunk too, which is not written. run: the model's. Yields each pass's
    chunks, and what `run` returns for them."""
    for group in [*groups(chunks[:-1], options.fill_size), chunks[-1:]]:
        hidden, written = run(batch.part(group).input_ids, memory, group, options)
        if group[-1] != chunks[-1]:
            memory.write(group, written)
        yield group, hidden
        del hidden, written  # or they would live on beside the next pass's


def score(model: Model, batch: Batch, chunks: Sequence[Chunk], memory: Memory, options: Options) -> Tensor:
    """The log-probabilities of a batch, see `log_probs`, with the memory filled on the way."""
    scores = Scores(model, batch)
    for group, hidden in outputs(model.run, batch, chunks, memory, options):
        scores.keep(group, hidden)
        del hidden
    return scores.log_probs()
