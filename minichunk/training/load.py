"""The model that a command is told to use, one rule for device and dtype; and whether the host has room for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from ..chunks import Chunk
from ..files.documents import load_tokenizer
from ..files.room import check_room
from ..files.shipped import SHIPPED_MODEL
from ..models.adapter_files import load_adapter
from ..models.auto import load_model
from ..models.pretrained import Pretrained
from ..models.shapes import memory_bytes
from ..protocol import Options
from .options import DTYPES, check_choice, check_device, default_dtype


def load_as_told(
    directory: str | Path | None,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    load_in_4bit: bool = False,
) -> tuple[Pretrained, Tokenizer]:
    """The model of a checkpoint directory, with an adapter if one is named, and its tokenizer.

    None: the shipped model; no adapter; CUDA where there is one; bfloat16 on CUDA, else float32.
    Raises InputError, for a wrong name before anything is read.
    """
    check_choice("dtype", dtype, DTYPES)
    device = check_device(device)
    directory = directory or SHIPPED_MODEL
    tokenizer = load_tokenizer(directory)
    model = load_model(directory, DTYPES[dtype or default_dtype(device)], device, load_in_4bit)
    if adapter is not None:
        load_adapter(model, adapter)
    return model, tokenizer


def check_host_room(model: Pretrained, batch: int, kept: Sequence[Chunk], grad_dtype: torch.dtype | None) -> None:
    """Raise InputError unless the host has room for the memory of `--offload`.

    batch: sequences at a time. kept: the most chunks that a step backpropagates.
    """
    options = Options(cache_grad_dtype=grad_dtype, offload=True)
    remembered, gradients = memory_bytes(model.config, model.lm_head.weight.dtype, kept, options, batch)
    wide = grad_dtype is None or grad_dtype.itemsize > 2
    ways = ["--cache-grad-dtype bfloat16"] if gradients and wide else []
    ways += ["a smaller --batch-size"] if batch > 1 else []
    what = f"--offload of {kept[-1].start:,} tokens" + (f" in each of {batch} sequences" if batch > 1 else "")
    advice = "take " + ", ".join([*ways, "a shorter --seq-len"]) + ", or free memory"
    check_room(what, remembered + gradients, torch.device("cpu"), advice)
