"""A model's LoRA adapter saved and loaded, as files that PEFT reads and writes too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..files.peft import LoraConfig, read_adapter, write_adapter
from .lora import adapters, add_lora, linear_layers
from .partial import apply_saved
from .pretrained import Pretrained
from .quantize import Linear4bit
from .stack import Stack


def save_adapter(
    model: Pretrained,
    directory: str | Path,
    base_model: str | Path = "",
    whole: Callable[[dict[str, Tensor]], dict[str, Tensor] | None] = lambda tensors: tensors,
) -> None:
    """Write the model's adapter as PEFT's `adapter_model.safetensors` and `adapter_config.json`.

    base_model: path or hub name of the base model, which PEFT reads from the config.
    whole: makes all tensors by name of those that are here, or None where nothing is to be written.
    If `partial_context` changed the base, the config says so, and PEFT refuses it.
    Raises InputError if there is no adapter.
    """
    if model.lora is None:
        raise InputError("the model has no adapter to save: call add_lora(model) first")
    here = {}
    for name, layer in adapters(model).items():
        here[f"{name}.lora_A.weight"] = layer.lora_A.weight.detach()
        here[f"{name}.lora_B.weight"] = layer.lora_B.weight.detach()
    if (tensors := whole(here)) is not None:
        targets = sorted({name.split(".")[-3] for name in tensors})
        rank, alpha, dropout = model.lora
        config = LoraConfig(rank, alpha, dropout, model.partial)
        write_adapter(directory, config, targets, tensors, str(base_model))


def load_adapter(model: Pretrained, directory: str | Path) -> None:
    """Read an adapter that `save_adapter` or PEFT wrote, adding it to the model if it has none.

    If it was trained on a base that `partial_context` had changed, the model is changed so too.
    Raises InputError, naming the file, for a damaged one, one of another model, and for variants of
    LoRA that are not supported.
    """
    (rank, alpha, dropout, partial), path, tensors = read_adapter(directory)
    names = {name.removesuffix(f".lora_{x}.weight") for name in tensors for x in "AB"}
    targets = sorted({name.rpartition(".")[2] for name in names} & set(linear_layers(model)))
    if not targets:
        raise InputError(f"{path} has no LoRA weights of {', '.join(linear_layers(model))}")
    _check_shapes(model, targets, rank, tensors, path)
    if partial is not None:
        try:
            apply_saved(model, partial)
        except InputError as error:
            raise InputError(f"{path.parent / 'adapter_config.json'}: {error}") from None
    if not adapters(model):
        add_lora(model, rank, alpha, targets, dropout)
    assert model.lora is not None
    model.lora = model.lora._replace(alpha=alpha)
    with torch.no_grad():
        for name, layer in adapters(model).items():
            layer.scale = alpha / rank
            layer.lora_A.weight.copy_(tensors[f"{name}.lora_A.weight"])
            layer.lora_B.weight.copy_(tensors[f"{name}.lora_B.weight"])


def _check_shapes(model: Stack, targets: list[str], rank: int, tensors: dict[str, torch.Tensor], path: Path) -> None:
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
