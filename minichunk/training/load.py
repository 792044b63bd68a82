"""The model that a command is told to use, one rule for device and dtype; and whether the host has room for it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from ..files.documents import load_tokenizer
from ..files.room import check_room
from ..files.shipped import SHIPPED_MODEL
from ..models.adapter_files import load_adapter
from ..models.llama import Llama
from ..models.shapes import cache_bytes
from .options import DTYPES, check_choice, check_device, default_dtype


def load_as_told(
    directory: str | Path | None,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    load_in_4bit: bool = False,
) -> tuple[Llama, Tokenizer]:
    """The model of a checkpoint directory, with an adapter if one is named, and its tokenizer.

    None: the shipped model; no adapter; CUDA where there is one; bfloat16 on CUDA, else float32.
    Raises InputError, for a wrong name before anything is read.
    """
    check_choice("dtype", dtype, DTYPES)
    device = check_device(device)
    directory = directory or SHIPPED_MODEL
    tokenizer = load_tokenizer(directory)
    model = Llama.from_pretrained(directory, DTYPES[dtype or default_dtype(device)], device, load_in_4bit)
    if adapter is not None:
        load_adapter(model, adapter)
    return model, tokenizer


def check_host_room(model: Llama, batch: int, tokens: int, rows: int, grad_dtype: torch.dtype | None) -> None:
    """Raise InputError unless the host has room for the cache of `--offload`.

    batch: sequences at a time. tokens: positions with keys and values. rows: those with gradients.
    """
    cache, grads = cache_bytes(model.config, model.norm.weight.dtype, grad_dtype)
    ways = [] if grad_dtype is not None and grad_dtype.itemsize == 2 else ["--cache-grad-dtype bfloat16"]
    ways += ["a smaller --batch-size"] if batch > 1 else []
    what = f"--offload of {tokens:,} tokens" + (f" in each of {batch} sequences" if batch > 1 else "")
    advice = "take " + ", ".join([*ways, "a shorter --seq-len"]) + ", or free memory"
    check_room(what, batch * (cache * tokens + grads * rows), torch.device("cpu"), advice)
