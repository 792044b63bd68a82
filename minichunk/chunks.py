"""Cutting: a sequence into chunks, labels into targets, and the checks that come first."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from .model import Llama

IGNORE = -100  # Hugging Face's label of a position without a target


class Chunk(NamedTuple):
    """The positions from `start` up to, not including, `stop`: the paper's x_j."""

    start: int
    stop: int


def cut(length: int, chunk_size: int) -> list[Chunk]:
    """Cut `length` positions into chunks; the last one may be short. Raises InputError."""
    if chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size}, but must be at least 1")
    return [Chunk(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size)]


def check_fill_size(fill_size: int | None, chunk_size: int) -> None:
    """Raise InputError unless at least one chunk fits into a pass of the fill."""
    if fill_size is not None and fill_size < chunk_size:
        raise InputError(f"fill_size is {fill_size}, but must be at least the chunk size, {chunk_size}")


def shift(labels: Tensor) -> Tensor:
    """Targets (B, T): what position t has to predict is the label of t + 1, and nothing at the end.

    Done once and before cutting, so that no target is lost where one chunk ends and the next begins.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def check_batch(
    model: Llama, input_ids: Tensor, labels: Tensor, num_targets: float | None
) -> tuple[Tensor, Tensor | float]:
    """Check a batch and return its targets (B, T) and the number to divide the summed loss by.

    num_targets: the divisor to use; None counts the valid targets. Also lets the gradients of
    half-precision parameters be summed in float32. Raises InputError.
    """
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
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise InputError("no parameter of the model requires a gradient: nothing to train")

    targets = shift(labels)
    if not input_ids.is_meta:  # meta tensors (memory forecasts) hold no values to check
        _check_ids("input_ids", input_ids, model.config.vocab_size)
        _check_ids("labels", labels.where(labels != IGNORE, 0), model.config.vocab_size)
    divisor = (targets != IGNORE).sum() if num_targets is None else num_targets
    if not input_ids.is_meta and divisor == 0:
        raise InputError(f"labels has no valid target: after the shift every label is {IGNORE}")
    for parameter in trainable:
        # A sum over many chunks in half precision would lose the small terms.
        if parameter.dtype.itemsize < 4 and parameter.grad is None and hasattr(parameter, "grad_dtype"):
            parameter.grad_dtype = torch.float32
    return targets, divisor


def _check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InputError(f"{name} has the token id {wrong}, but the vocabulary goes from 0 to {vocab_size - 1}")
