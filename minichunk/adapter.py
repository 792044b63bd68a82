"""LoRA adapters in PEFT's files, both ways: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .errors import InputError
from .files import open_tensors, read_json, write_json, write_tensors
from .lora import PROJECTIONS, LoraLinear, adapters, add_lora
from .model import Llama
from .weights import make_directory

_PREFIX = "base_model.model."  # PEFT's wrapping of the base model's names
# Variants of LoRA that change what an adapter computes, and the value that switches each off.
_VARIANTS: dict[str, Any] = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
    "fan_in_fan_out": False,
}


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
        **_VARIANTS,
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
    config = read_json(config_path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{config_path}: peft_type is {config.get('peft_type')!r}, but must be 'LORA'")
    for field, off in _VARIANTS.items():
        if config.get(field) not in (off, None, [], {}):
            raise InputError(f"{config_path}: {field} = {config[field]!r} is not supported; it must be {off!r}")
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), int | float):
            raise InputError(f"{config_path}: {field} is {config.get(field)!r}, but must be a number")
    with open_tensors(path) as file:
        tensors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    targets = sorted({name.removesuffix(f".lora_{x}.weight").rpartition(".")[2] for name in tensors for x in "AB"}
                     & set(PROJECTIONS))  # fmt: skip
    if not targets:
        raise InputError(f"{path} has no LoRA weights of {', '.join(PROJECTIONS)}")
    if not adapters(model):
        add_lora(model, int(config["r"]), config["lora_alpha"], targets, float(config.get("lora_dropout") or 0.0))
    _copy_in(adapters(model), tensors, path)


@torch.no_grad()
def _copy_in(layers: dict[str, LoraLinear], tensors: dict[str, torch.Tensor], path: Path) -> None:
    parameters = {f"{name}.lora_{x}.weight": getattr(layer, f"lora_{x}").weight
                  for name, layer in layers.items() for x in "AB"}  # fmt: skip
    if parameters.keys() != tensors.keys():
        odd = sorted(parameters.keys() ^ tensors.keys())[0]
        raise InputError(f"{path} {'lacks' if odd in parameters else 'has'} {odd}, unlike the model's adapter")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            shape, expected = list(tensors[name].shape), list(parameter.shape)
            raise InputError(f"{path}: {name} has the shape {shape}, but the model's adapter has {expected}")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
