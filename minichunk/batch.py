"""What comes before the first chunk: a batch is checked, its labels become targets, gradients become wide enough."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chunks import ONE, Chunk, Documents, span
from .errors import InputError
from .protocol import Model
from .tree import Tree, grow

IGNORE = -100  # Hugging Face's label of a position without a target
Objective = Callable[[Tensor], Tensor]  # see objective.py
ChunkLoss = Callable[[Tensor, Chunk], Tensor]  # of what the LM head is given for a chunk, (B, C, E), and its place


class Batch(NamedTuple):
    """input_ids and targets, int64 (B, T), the number that the summed loss is divided by, and `Options.positions`.

    labelled: bool (B, T) on the CPU, whatever the device: where there is a target. There alone the LM head is run.
    factors: (B, T), of the loss of each target; None: 1. chunk_loss: a loss of the caller's in its place.
    documents: see `Options`. tree: where this is one row, made of the caller's (B, T).
    """

    input_ids: Tensor
    targets: Tensor
    num_targets: Tensor | float
    labelled: Tensor
    positions: Tensor | None = None
    factors: Tensor | None = None
    chunk_loss: ChunkLoss | None = None
    documents: Documents = ONE
    tree: Tree | None = None

    def part(self, chunks: Sequence[Chunk]) -> "Batch":
        """What belongs to these adjacent chunks; positions are those of the whole."""
        here = span(chunks)
        factors = None if self.factors is None else self.factors[:, here]
        ids, targets, labelled = (x[:, here] for x in (self.input_ids, self.targets, self.labelled))
        return self._replace(input_ids=ids, targets=targets, labelled=labelled, factors=factors)


def shift(labels: Tensor) -> Tensor:
    """Targets (B, T): position t has to predict the label of t + 1. Done before cutting, so that none is lost."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def prepare(
    model: Model, input_ids: Tensor, labels: Tensor, num_targets: float | None, positions: Tensor | None = None,
    objective: Objective | None = None, chunk_loss: ChunkLoss | None = None, starts: Sequence[int] = (),
    share: bool = False, chunk_size: int = 0,
) -> Batch:  # fmt: skip
    """Check a batch, see `seco`, and let the model's gradients be summed in float32. Raises InputError."""
    vocab_size = model.lm_head.weight.shape[0]
    batch = lay_out(model, vocab_size, input_ids, labels, num_targets, positions, starts, share, chunk_size)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("no parameter of the model requires a gradient: nothing to train")
    check_loss(num_targets, objective, chunk_loss, share)
    widen_gradients(model)
    return batch._replace(chunk_loss=chunk_loss)


def lay_out(
    model: object, vocab_size: int, input_ids: Tensor, labels: Tensor, num_targets: float | None,
    positions: Tensor | None, starts: Sequence[int], share: bool, chunk_size: int,
) -> Batch:  # fmt: skip
    """What `prepare` does with the batch alone: the rows and documents that are run."""
    starts = tuple(map(int, starts))
    if starts and labels.shape == input_ids.shape:
        labels = apart(input_ids, labels, starts)
    check_tokens(input_ids, labels, num_targets, vocab_size)
    positions = check_positions(model, positions, input_ids, starts)
    batch = make_batch(input_ids, labels, num_targets, positions)
    share = share and len(input_ids) > 1  # else there is nothing to share
    if not starts and not share:
        return batch
    if chunk_size and not getattr(model, "takes_documents", False):  # without chunks, each is run by itself
        raise InputError(f"starts and share are not for a {type(model).__name__}: leave them out")
    if not share:
        return batch._replace(documents=Documents(starts, 0, chunk_size))
    each = positions.view(-1, input_ids.shape[1]).expand(input_ids.shape)
    tree, documents, ids, targets, places = grow(input_ids, batch.targets, each, IGNORE)
    if not tree.length:  # nothing is shared, and nothing is to be learnt
        return batch
    factors = tree.row(torch.ones(labels.shape, device=labels.device))  # of what is shared, one for each row
    return batch._replace(
        input_ids=ids, targets=targets, labelled=(targets != IGNORE).cpu(), positions=places[:, None], factors=factors,
        documents=documents._replace(chunk_size=chunk_size), tree=tree,
    )  # fmt: skip


def apart(input_ids: Tensor, labels: Tensor, starts: Sequence[int]) -> Tensor:
    """Labels by which no document has to predict the next one's first token. Raises InputError."""
    edges = [*starts, input_ids.shape[-1]]
    if len(input_ids) != 1 or input_ids.ndim != 2 or starts[0] != 0 or not all(a < b for a, b in pairwise(edges)):
        raise InputError(f"starts is {list(starts)}, but must go up from 0, within a single row")
    return labels.index_fill(1, torch.tensor(starts, device=labels.device), IGNORE)


def make_batch(input_ids: Tensor, labels: Tensor, num_targets: float | None, positions: Tensor | None = None) -> Batch:
    """Of tensors that have been checked."""
    targets = shift(labels)
    labelled = targets != IGNORE
    divisor = labelled.sum() if num_targets is None else num_targets
    return Batch(input_ids, targets, divisor, labelled.cpu(), positions)


def check_positions(model: object, positions: Tensor | None, input_ids: Tensor, starts: Sequence[int] = ()) -> Tensor:
    """What `Options.positions` is for these tokens. Raises InputError for positions that cannot be."""
    if positions is None:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        begins = torch.zeros_like(places)
        begins[list(starts)] = places[list(starts)]
        return places - begins.cummax(0).values
    if not getattr(model, "takes_positions", False):
        raise InputError("positions are for a model with rope, which this one is not: leave them out")
    fits = positions.shape == input_ids.shape and positions.device == input_ids.device
    if not fits or positions.dtype != torch.int64 or int(positions.min()) < 0:
        given = f"{positions.dtype} of shape {list(positions.shape)} on {positions.device}"
        raise InputError(f"positions is {given}, but must be int64 from 0 on, shaped as input_ids and on its device")
    return positions[:, None]  # the same for all heads


def check_tokens(input_ids: Tensor, labels: Tensor, num_targets: float | None, vocab_size: int) -> None:
    """Raise InputError for a batch that no model of this vocabulary can be trained on."""
    for name, tensor in (("input_ids", input_ids), ("labels", labels)):
        if tensor.ndim != 2 or tensor.dtype != torch.int64 or tensor.shape[0] == 0:
            raise InputError(
                f"{name} is {tensor.dtype} of shape {list(tensor.shape)}, but must be int64 [B, T], B >= 1"
            )
    if labels.shape != input_ids.shape:
        raise InputError(f"labels has shape {list(labels.shape)}, but input_ids has {list(input_ids.shape)}")
    if input_ids.shape[1] < 2:
        raise InputError(f"input_ids has {input_ids.shape[1]} token, but a next-token loss needs at least 2")
    if num_targets is not None and not num_targets > 0:
        raise InputError(f"num_targets is {num_targets}, but must be above 0")
    for name, ids in (("input_ids", input_ids), ("labels", labels.where(labels != IGNORE, 0))):
        wrong = [bound for bound in map(int, ids.aminmax()) if not 0 <= bound < vocab_size]
        if wrong:
            raise InputError(f"{name} has the token id {wrong[0]}, but the vocabulary goes from 0 to {vocab_size - 1}")
    if num_targets is None and not (labels[:, 1:] != IGNORE).any():
        raise InputError(f"labels has no valid target: after the shift every label is {IGNORE}")


def check_loss(
    num_targets: float | None, objective: Objective | None, chunk_loss: ChunkLoss | None, share: bool = False
) -> None:
    """Raise InputError where more than one of these is given: a loss of the caller's normalises by itself."""
    if chunk_loss is not None and share:
        raise InputError(
            "chunk_loss is given what the caller's rows have, and share makes one row of them: leave it out"
        )
    named = {"num_targets": num_targets, "objective": objective, "chunk_loss": chunk_loss}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} were given, but only one of them can say what the loss is")


def widen_gradients(model: Model | nn.Module) -> None:
    """Let the gradients of half-precision parameters be float32: a sum over many chunks would lose the small terms."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype.itemsize < 4 and parameter.grad is None:
            parameter.grad_dtype = torch.float32
