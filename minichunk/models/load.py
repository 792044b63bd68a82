"""Models from Hugging Face checkpoint directories, and into them: config.json and safetensors.

A model knows no files. This module gives every model `from_pretrained` and `save_pretrained`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files.atomic import check_room, read_json
from ..files.checkpoint import checkpoint_bytes, read_checkpoint, write_checkpoint
from .gemma3 import Gemma3
from .llama import Llama
from .lora import adapters
from .mamba2 import Mamba2
from .quantize import Linear4bit, check_bitsandbytes, is_in_4bit, is_stored_in_4bit
from .ssm import StateSpace
from .stack import Stack

M = TypeVar("M", bound=Stack)
KINDS: tuple[type[Stack], ...] = (Llama, Gemma3, Mamba2, StateSpace)
_BY_MODEL_TYPE: dict[Any, type[Stack]] = {"gemma3_text": Gemma3, "mamba2": Mamba2, "state_space": StateSpace}


def class_of(config: Any) -> type[Stack]:
    """The model's class of a config object."""
    return {kind.config_class: kind for kind in KINDS}[type(config)]


def model_class(config: dict[str, Any]) -> type[Stack]:
    """The class of a parsed config.json; a Llama, which says what it does not know, unless it is another's."""
    return _BY_MODEL_TYPE.get(str(config.get("model_type")), Llama)


def read_model_config(config: dict[str, Any]) -> Any:
    """The config object of a parsed config.json. Raises InputError."""
    return model_class(config).config_class.from_dict(config)


def load_model(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    load_in_4bit: bool = False,
    prepare: Callable[[Any], object] = lambda model: None,
) -> Stack:
    """A checkpoint as a model of the class that its `model_type` names; otherwise as `load`. Raises InputError."""
    path = Path(directory) / "config.json"
    if Path(directory).is_dir() and not path.is_file():
        raise InputError(f"{directory} has no config.json: it is not a Hugging Face checkpoint")
    kind = model_class(read_json(path)) if path.is_file() else Llama
    return kind.from_pretrained(directory, dtype, device, load_in_4bit, prepare)


def load(
    kind: type[M],
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    load_in_4bit: bool = False,
    prepare: Callable[[M], object] = lambda model: None,
) -> M:
    """`kind.from_pretrained`: a Hugging Face checkpoint directory (`config.json` and safetensors) as such a model.

    dtype: of all parameters; None takes that of the first tensor in the files.
    load_in_4bit: store the linear layers' weights in 4 bits, for LoRA; see quantize.py.
    prepare: called with the model before it has its tensors; those of what it takes out are not read.
    Tensor by tensor onto the device: the host holds one at a time. Raises InputError.
    """
    if load_in_4bit:
        check_bitsandbytes()
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory with a Hugging Face checkpoint")
    config_path = directory / "config.json"
    config = read_json(config_path)
    try:
        with torch.device("meta"):  # shapes without memory
            model = kind(kind.config_class.from_dict(config))
    except InputError as error:
        raise InputError(f"{config_path}: {error}" if str(error).startswith("config:") else str(error)) from None
    wanted = dict(model.named_parameters())  # a tied LM head is named once, as the embedding
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - wanted.keys()
    in_file = {parameter: name for name, parameter in wanted.items()}
    prepare(model)
    here = {in_file[parameter]: name for name, parameter in model.named_parameters()}
    _check_room(directory, sum(wanted[name].numel() for name in here), dtype, device, load_in_4bit)
    shapes = {name: p.shape for name, p in wanted.items()}
    for name, tensor in read_checkpoint(directory, shapes, tied, here.keys(), device):
        dtype = dtype or tensor.dtype  # one for all: the memory has the model's
        _assign(model, here[name], tensor.to(dtype), load_in_4bit)
    if len(here) == len(wanted):
        model.tie_weights()
    return model


def _check_room(
    directory: Path, numbers: int, dtype: torch.dtype | None, device: str | torch.device, load_in_4bit: bool
) -> None:
    size = checkpoint_bytes(directory)
    size = size if dtype is None else numbers * dtype.itemsize
    ways = [] if dtype is not None and dtype.itemsize == 2 else ["--dtype bfloat16"]
    ways += [] if load_in_4bit else ["--load-in-4bit"]
    advice = "take " + ", ".join([*ways, "a smaller model"]) + ", or free memory"
    check_room(str(directory), size * 0.3 if load_in_4bit else size, torch.device(device), advice)


def _assign(model: nn.Module, name: str, tensor: Tensor, load_in_4bit: bool) -> None:
    module_name, _, child = name.rpartition(".")
    module = model.get_submodule(module_name)
    if load_in_4bit and child == "weight" and isinstance(module, nn.Linear) and is_stored_in_4bit(module_name):
        parent, _, own_name = module_name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, Linear4bit(tensor, module.bias))
    else:
        setattr(module, child, nn.Parameter(tensor, requires_grad=not isinstance(module, Linear4bit)))


def save(
    model: Stack,
    directory: str | Path,
    whole: Callable[[dict[str, Tensor]], dict[str, Tensor] | None] = lambda tensors: tensors,
) -> None:
    """`model.save_pretrained`: write `config.json` and `model.safetensors`.

    whole: makes all tensors by name of those that are here, or None where nothing is to be written.
    Raises InputError for an adapter or a 4-bit base.
    """
    if adapters(model):
        raise InputError(
            "the model has an unmerged LoRA adapter: call merge_lora(model) first to fold it in, "
            "or save_adapter(model, directory) to save it alone"
        )
    if is_in_4bit(model):
        raise InputError("a model in 4 bits is not written: load it without load_in_4bit first")
    if model.config_class.from_dict(model.config.to_dict()) != model.config:
        raise InputError(
            f"no config.json describes this model: a {model.config.model_type} implies other biases or q/k norms "
            "than its config has; choose the model_type that has them"
        )
    tensors = whole({name: parameter.detach() for name, parameter in model.named_parameters()})
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if tensors is not None:
        write_checkpoint(directory, {**model.config.to_dict(), "torch_dtype": dtype}, tensors)


Stack.from_pretrained = classmethod(load)  # type: ignore[assignment,method-assign]
Stack.save_pretrained = save  # type: ignore[assignment,method-assign]
