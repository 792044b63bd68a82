"""PEFT's two files of a LoRA adapter: adapter_config.json and adapter_model.safetensors.

An adapter that was trained on a base made to see a part of its past is none that PEFT could use: on the base as it is
stored, it would be part of another function. Its `peft_type` is therefore one that PEFT refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import InputError
from .atomic import make_directory, open_tensors, read_json, write_json, write_tensors

_PREFIX = "base_model.model."  # PEFT's wrapping of the base model's names
# What adapter_config.json may say beyond rank, alpha, dropout and targets without changing what an
# adapter computes; whatever else is set to something is a variant of LoRA that we do not have.
_NEUTRAL = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules",
    "inference_mode", "revision", "auto_mapping", "peft_version", "exclude_modules", "layers_to_transform",
    "layers_pattern", "megatron_config", "qalora_group_size", "megatron_core", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
_PARTIAL_CONTEXT = "PARTIAL_CONTEXT_LORA"
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {"init_lora_weights": (True, False, "gaussian"), "bias": ("none",)}


class LoraConfig(NamedTuple):
    """What adapter_config.json says of an adapter.

    partial: what its base was made, see models/partial.py; None: it is as it is stored.
    """

    rank: int
    alpha: float
    dropout: float
    partial: Any = None


def write_adapter(
    directory: str | Path, config: LoraConfig, targets: Sequence[str], tensors: dict[str, Tensor], base_model: str
) -> None:
    """Write both files. tensors: by the names of the model's parameters. Raises InputError."""
    directory = make_directory(directory)
    named = {_PREFIX + name: tensor for name, tensor in tensors.items()}
    write_tensors(directory / "adapter_model.safetensors", named, {"format": "pt"})
    write_json(
        directory / "adapter_config.json",
        {
            "peft_type": "LORA" if config.partial is None else _PARTIAL_CONTEXT,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "target_modules": list(targets),
            "inference_mode": True,
            "bias": "none",
            **({} if config.partial is None else {"partial_context": config.partial}),
        },
    )


def read_adapter(directory: str | Path) -> tuple[LoraConfig, Path, dict[str, Tensor]]:
    """The config, the path of the tensors and the tensors, by the names of the model's parameters.

    Raises InputError, naming the file, for a damaged one and for variants of LoRA that are not supported.
    """
    directory = Path(directory)
    config = _read_config(directory / "adapter_config.json")
    path = directory / "adapter_model.safetensors"
    if not path.is_file() and (directory / "adapter_model.bin").is_file():
        raise InputError(
            f"{directory / 'adapter_model.bin'} is pickled, and unpickling runs whatever code the file holds; convert "
            "it where you trust it: load it with PEFT and save_pretrained(NEW_DIR)"
        )
    with open_tensors(path) as file:
        return config, path, {name.removeprefix(_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_config(path: Path) -> LoraConfig:
    config = read_json(path)
    partial = config.pop("partial_context", None)
    if config.get("peft_type") != (wanted := "LORA" if partial is None else _PARTIAL_CONTEXT):
        raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}, but must be {wanted!r}")
    for field, value in config.items():
        if field not in _NEUTRAL and value and value not in _NEUTRAL_VALUES.get(field, ()):
            raise InputError(f"{path}: {field} = {value!r} is not supported; train the adapter without it")
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout") or 0.0
    if not isinstance(rank, int) or rank < 1:
        raise InputError(f"{path}: r is {rank!r}, but must be a whole number of at least 1")
    if not isinstance(alpha, int | float) or not alpha > 0:
        raise InputError(f"{path}: lora_alpha is {alpha!r}, but must be a number above 0")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(f"{path}: lora_dropout is {dropout!r}, but must be a number from 0 up to, not including, 1")
    return LoraConfig(rank, alpha, dropout, partial)
