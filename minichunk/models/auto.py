"""Which model a checkpoint is: its config.json's `model_type` says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..files.atomic import read_json
from .gemma3 import Gemma3
from .gemma3_config import MODEL_TYPE as GEMMA3
from .llama import Llama
from .mamba2 import Mamba2
from .mamba2_config import MODEL_TYPE as MAMBA2
from .pretrained import Pretrained
from .ssm import StateSpace
from .ssm_config import MODEL_TYPE as STATE_SPACE

OTHERS: dict[str, type[Pretrained]] = {STATE_SPACE: StateSpace, MAMBA2: Mamba2, GEMMA3: Gemma3}


def model_class(config: dict[str, Any]) -> type[Pretrained]:
    """The class of a parsed config.json; a Llama, which says what it does not know, unless it is another's."""
    return OTHERS.get(str(config.get("model_type")), Llama)


def class_of(config: Any) -> type[Pretrained]:
    """The class of a config object."""
    kinds: list[type[Pretrained]] = [*OTHERS.values(), Llama]  # a Gemma's config is a kind of Llama's
    return next(kind for kind in kinds if isinstance(config, kind.config_class))


def read_model_config(config: dict[str, Any]) -> Any:
    """The config object of a parsed config.json. Raises InputError."""
    return model_class(config).config_class.from_dict(config)


def load_model(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    load_in_4bit: bool = False,
    prepare: Callable[[Pretrained], object] = lambda model: None,
) -> Pretrained:
    """As `from_pretrained` of the checkpoint's own class, see there. Raises InputError."""
    path = Path(directory) / "config.json"
    if Path(directory).is_dir() and not path.is_file():
        raise InputError(f"{directory} has no config.json: it is not a Hugging Face checkpoint")
    kind = model_class(read_json(path)) if path.is_file() else Llama
    return kind.from_pretrained(directory, dtype, device, load_in_4bit, prepare)
