"""A model's LoRA adapter saved and loaded, as the two files that PEFT reads and writes too.
An adapter that was trained on a changed base, made to see a part of its past or with another rope, is none that PEFT
could use: on the base as it is stored, it would be part of another function. Its `peft_type` is one that PEFT refuses.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files.atomic import make_directory, open_tensors, read_json, write_json, write_tensors
from ..files.checkpoint import checkpoint_directory
from .load import change_rope
from .lora import Lora, adapters, add_lora, default_targets, is_target, linear_layers
from .partial import apply_saved
from .stack import Stack

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's wrapping of the base model's names
# What of the base was changed, by the field of adapter_config.json that says it, and the `peft_type` that it makes.
_CHANGES = {"partial_context": "PARTIAL_CONTEXT_LORA", "rope_parameters": "OTHER_ROPE_LORA"}
# What adapter_config.json may say beyond rank, alpha, dropout and targets without changing what an adapter computes
# (where it is put, the tensors tell); whatever else is set to something is a variant of LoRA that we do not have.
_NEUTRAL = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules",
    "inference_mode", "revision", "auto_mapping", "peft_version", "exclude_modules", "layers_to_transform",
    "layers_pattern", "megatron_config", "qalora_group_size", "megatron_core", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {"init_lora_weights": (True, False, "gaussian"), "bias": ("none",)}


def save_adapter(
    model: Stack, directory: str | Path, base_model: str | Path = "",
    whole: Callable[[dict[str, Tensor]], dict[str, Tensor] | None] = lambda tensors: tensors,
) -> None:  # fmt: skip
    """Write the model's adapter as PEFT's `adapter_model.safetensors` and `adapter_config.json`.
    base_model: path or hub name of the base model, which PEFT reads from the config.
    whole: makes all tensors by name of those that are here, or None where nothing is to be written.
    If `partial_context` or `change_rope` changed the base, the config says so, and PEFT refuses it.
    Raises InputError if there is no adapter."""
    if model.lora is None:
        raise InputError("the model has no adapter to save: call add_lora(model) first")
    tensors = whole({name: p.detach() for name, p in model.named_parameters() if ".lora_" in name})
    if tensors is None:
        return
    changes = {"partial_context": model.partial, "rope_parameters": model.rope}
    # Whole names for a wrapped model: PEFT takes some ends for what else is called so, an MLP's for those of experts.
    targets = model.lora.targets if isinstance(model, Stack) else {name.partition(".lora_")[0] for name in tensors}
    config: dict[str, Any] = {
        "peft_type": _peft_type(changes), "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_model),
        "r": model.lora.rank, "lora_alpha": model.lora.alpha, "lora_dropout": model.lora.dropout,
        "target_modules": sorted(targets), "inference_mode": True, "bias": "none",
    }  # fmt: skip
    config |= {name: change for name, change in changes.items() if change is not None}
    directory = make_directory(directory)
    write_tensors(directory / _TENSORS, {_PREFIX + name: x for name, x in tensors.items()}, {"format": "pt"})
    write_json(directory / _CONFIG, config)


def load_adapter(model: Stack, directory: str | Path) -> None:
    """Read an adapter that `save_adapter` or PEFT wrote, adding it to the model if it has none.
    If it was trained on a base that `partial_context` or `change_rope` had changed, the model is changed so too.
    Its mode stays.
    Raises InputError, naming the file, for a damaged one, one of another model, and an unsupported variant of LoRA."""
    config_path, path = checkpoint_directory(directory) / _CONFIG, Path(directory) / _TENSORS
    lora, changes = _read_config(config_path)
    pickled = path.with_name("adapter_model.bin")
    if pickled.is_file() and not path.is_file():
        raise InputError(f"{pickled} is pickled, and may run any code; load it with PEFT and save_pretrained(NEW_DIR)")
    with open_tensors(path) as file:
        tensors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    known = linear_layers(model)
    named = sorted({name.rpartition(".lora_")[0] for name in tensors} & known.keys())
    if not named:
        raise InputError(f"{path} has no LoRA weights of {', '.join(default_targets(model))}")
    targets = [target for target in lora.targets if any(is_target(name, [target]) for name in known)] or named
    wanted = adapters(model) or {name: layer for name, layer in known.items() if is_target(name, targets)}
    expected = {}
    for name, layer in wanted.items():
        expected[f"{name}.lora_A.weight"] = [lora.rank, layer.in_features]
        expected[f"{name}.lora_B.weight"] = [layer.out_features, lora.rank]
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise InputError(f"{path} {'lacks' if odd[0] in expected else 'has'} {odd[0]}, unlike the model's adapter")
    for name, tensor in tensors.items():
        if list(tensor.shape) != expected[name]:
            raise InputError(f"{path}: {name} has the shape {list(tensor.shape)}, but the model needs {expected[name]}")
    if model.lora is not None and model.lora.rank != lora.rank:
        raise InputError(f"{path} has rank {lora.rank}, but the model's adapter {model.lora.rank}")
    try:
        for name, apply in (("partial_context", apply_saved), ("rope_parameters", change_rope)):
            if changes[name] is not None:
                apply(model, changes[name])
    except InputError as error:
        raise InputError(f"{config_path}: {error}") from None
    if not adapters(model):
        training = model.training
        add_lora(model, lora.rank, lora.alpha, targets, lora.dropout)
        model.train(training)
    model.lora = replace(model.lora, alpha=lora.alpha)
    with torch.no_grad():
        for name, layer in adapters(model).items():
            layer.scale = lora.alpha / lora.rank
            layer.lora_A.weight.copy_(tensors[f"{name}.lora_A.weight"])
            layer.lora_B.weight.copy_(tensors[f"{name}.lora_B.weight"])


def _peft_type(changes: dict[str, Any]) -> str:
    return next((_CHANGES[name] for name, change in changes.items() if change is not None), "LORA")


def _read_config(path: Path) -> tuple[Lora, dict[str, Any]]:
    """The adapter, without targets where they are not simply names; and what the base was made, see `_CHANGES`."""
    config = read_json(path)
    changes, stabilized = {name: config.pop(name, None) for name in _CHANGES}, config.pop("use_rslora", False)
    if config.get("peft_type") != (wanted := _peft_type(changes)):
        raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}, but must be {wanted!r}")
    for field, value in config.items():
        if field not in _NEUTRAL and value and value not in _NEUTRAL_VALUES.get(field, ()):
            raise InputError(f"{path}: {field} = {value!r} is not supported; train the adapter without it")
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    by_name = not isinstance(targets, str) and not config.get("exclude_modules") and layers in (None, [])
    named = tuple(targets or ()) if by_name else ()
    try:
        lora = Lora(config.get("r", 0), config.get("lora_alpha", 0), config.get("lora_dropout") or 0.0, named)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return (replace(lora, alpha=lora.alpha * lora.rank**0.5) if stabilized else lora), changes
