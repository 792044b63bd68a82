"""The model that a command is told to use, one rule for device and dtype; and whether the host has room for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer

from ..chunks import Chunk
from ..files.atomic import check_room
from ..files.documents import load_tokenizer
from ..files.shipped import SHIPPED_MODEL
from ..models.adapter_files import load_adapter
from ..models.load import load_model
from ..models.shapes import memory_bytes
from ..models.stack import Stack
from ..pipeline.start import started
from ..protocol import Options
from .options import DTYPES, ModelOptions, check_device, default_dtype


def load_as_told(
    options: ModelOptions, prepare: Callable[[Stack], object] = lambda model: None
) -> tuple[Stack, Tokenizer]:
    """The model of a checkpoint directory, with the adapter and the 4 bits that the options may name; its tokenizer.

    prepare: see `from_pretrained`. Raises InputError, for a wrong device before anything is read.
    """
    device = check_device(options.device)
    dtype, in_4bit = DTYPES[options.dtype or default_dtype(device)], getattr(options, "load_in_4bit", False)
    directory = options.model or SHIPPED_MODEL
    tokenizer = load_tokenizer(directory)
    model = load_model(directory, dtype, device, in_4bit, prepare)
    if (adapter := getattr(options, "adapter", None)) is not None:
        load_adapter(model, adapter)
    return model, tokenizer


def check_host_room(model: Stack, batch: int, kept: Sequence[Chunk], grad_dtype: torch.dtype | None) -> None:
    """Raise InputError unless the host has room for the memory of `--offload`.

    model: or this rank's part of it, where all ranks of this machine are taken to have as many layers.
    batch: sequences at a time. kept: the most chunks that a step backpropagates.
    """
    options = Options(cache_grad_dtype=grad_dtype, offload=True)
    remembered, gradients = memory_bytes(model.config, model.like.dtype, kept, options, batch)
    wide = grad_dtype is None or grad_dtype.itemsize > 2
    ways = ["--cache-grad-dtype bfloat16"] if gradients and wide else []
    ways += ["a smaller --batch-size"] if batch > 1 else []
    what = f"--offload of {kept[-1].start:,} tokens" + (f" in each of {batch} sequences" if batch > 1 else "")
    advice = "take " + ", ".join([*ways, "a shorter --seq-len"]) + ", or free memory"
    of_machine = len(model.layers) / model.config.num_hidden_layers * started().local_world
    check_room(what, (remembered + gradients) * of_machine, torch.device("cpu"), advice)
