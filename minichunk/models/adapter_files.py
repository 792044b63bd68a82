"""A model's LoRA adapter saved and loaded, as files that PEFT reads and writes too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..files.atomic import make_directory, open_tensors, read_json, write_json, write_tensors
from .lora import adapters, add_lora, linear_layers
from .partial import apply_saved
from .quantize import Linear4bit
from .stack import Stack

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


def save_adapter(
    model: Stack,
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


def load_adapter(model: Stack, directory: str | Path) -> None:
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
