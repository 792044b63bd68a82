"""LoRA adapters in PEFT's files, both ways: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..models.llama import Llama
from ..models.lora import PROJECTIONS, adapters, add_lora
from ..models.quantize import Linear4bit
from .atomic import open_tensors, read_json, write_json, write_tensors
from .checkpoint import make_directory

_PREFIX = "base_model.model."  # PEFT's wrapping of the base model's names
# What adapter_config.json may say beyond rank, alpha, dropout and targets without changing what an
# adapter computes; whatever else is set to something is a variant of LoRA that we do not have.
_NEUTRAL = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules",
    "inference_mode", "revision", "auto_mapping", "peft_version", "exclude_modules", "layers_to_transform",
    "layers_pattern", "megatron_config", "qalora_group_size", "megatron_core", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {"init_lora_weights": (True, False, "gaussian"), "bias": ("none",)}


def save_adapter(model: Llama, directory: str | Path, base_model: str | Path = "") -> None:
    """Write the model's adapter as PEFT's `adapter_model.safetensors` and `adapter_config.json`.

    base_model: path or hub name of the base model, which PEFT reads from the config.
    Raises InputError if there is no adapter.
    """
    layers = adapters(model)
    if not layers:
        raise InputError("the model has no adapter to save: call add_lora(model) first")
    directory = make_directory(directory)
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": first.lora_A.out_features,
        "lora_alpha": first.scale * first.lora_A.out_features,
        "lora_dropout": first.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "inference_mode": True,
        "bias": "none",
    }
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.weight.detach()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.weight.detach()
    write_tensors(directory / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(directory / "adapter_config.json", config)


def load_adapter(model: Llama, directory: str | Path) -> None:
    """Read an adapter that `save_adapter` or PEFT wrote, adding it to the model if it has none.

    Raises InputError, naming the file, for a damaged one, one of another model, and for variants of
    LoRA that are not supported.
    """
    directory = Path(directory)
    config_path, path = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    rank, alpha, dropout = _read_config(config_path)
    if not path.is_file() and (directory / "adapter_model.bin").is_file():
        raise InputError(
            f"{directory / 'adapter_model.bin'} is pickled, and unpickling runs whatever code the file holds; convert "
            "it where you trust it: load it with PEFT and save_pretrained(NEW_DIR)"
        )
    with open_tensors(path) as file:
        tensors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = {name.removesuffix(f".lora_{x}.weight") for name in tensors for x in "AB"}
    targets = sorted({name.rpartition(".")[2] for name in names} & set(PROJECTIONS))
    if not targets:
        raise InputError(f"{path} has no LoRA weights of {', '.join(PROJECTIONS)}")
    _check_shapes(model, targets, rank, tensors, path)
    if not adapters(model):
        add_lora(model, rank, alpha, targets, dropout)
    with torch.no_grad():
        for name, layer in adapters(model).items():
            layer.scale = alpha / rank
            layer.lora_A.weight.copy_(tensors[f"{name}.lora_A.weight"])
            layer.lora_B.weight.copy_(tensors[f"{name}.lora_B.weight"])


def _read_config(path: Path) -> tuple[int, float, float]:
    """Rank, alpha and dropout of an adapter_config.json."""
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}, but must be 'LORA'")
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
    return rank, alpha, dropout


def _check_shapes(model: Llama, targets: list[str], rank: int, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Raise InputError unless the tensors are those of the model's adapter, or of one it would get."""
    expected: dict[str, list[int]] = {}
    present = adapters(model)
    for name, module in model.named_modules():
        if name in present or (not present and name.rpartition(".")[2] in targets):
            assert isinstance(module, torch.nn.Linear | Linear4bit)
            own = present[name].lora_A.out_features if present else rank
            expected[f"{name}.lora_A.weight"] = [own, module.in_features]
            expected[f"{name}.lora_B.weight"] = [module.out_features, own]
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())[0]
        raise InputError(f"{path} {'lacks' if odd in expected else 'has'} {odd}, unlike the model's adapter")
    for name, tensor in tensors.items():
        if list(tensor.shape) != expected[name]:
            raise InputError(f"{path}: {name} has the shape {list(tensor.shape)}, but the model needs {expected[name]}")
