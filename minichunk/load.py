"""The model that a command is told to use: one rule for device and dtype."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from .adapter import load_adapter
from .data import load_tokenizer
from .model import Llama
from .options import DTYPES, SHIPPED_MODEL, check_choice, check_device, default_dtype


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
