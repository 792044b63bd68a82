"""Models from Hugging Face checkpoint directories, and into them: config.json and safetensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files.atomic import read_json
from ..files.checkpoint import checkpoint_bytes, read_checkpoint, write_checkpoint
from ..files.room import check_room
from .lora import adapters
from .quantize import Linear4bit, check_bitsandbytes, is_in_4bit, is_stored_in_4bit
from .stack import Stack


class Pretrained(Stack):
    """A model that comes from a Hugging Face checkpoint and can be written as one."""

    config_class: Any  # of `config`
    partial: dict[str, Any] | None = None  # what `partial_context` changed since the checkpoint was loaded

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        load_in_4bit: bool = False,
        prepare: Callable[[Self], object] = lambda model: None,
    ) -> Self:
        """Load a Hugging Face checkpoint directory (`config.json` and safetensors).

        dtype: of all parameters; None takes that of the first tensor in the files.
        load_in_4bit: store the linear layers' weights in 4 bits, for LoRA; see quantize.py. Raises InputError.
        prepare: called with the model before it has its tensors; those of what it takes out are not read.
        Tensor by tensor onto the device: the host holds one at a time.
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
                model = cls(cls.config_class.from_dict(config))
        except InputError as error:
            raise InputError(f"{config_path}: {error}" if str(error).startswith("config:") else str(error)) from None
        wanted = dict(model.named_parameters())  # a tied LM head is named once, as the embedding
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - wanted.keys()
        in_file = {parameter: name for name, parameter in wanted.items()}
        prepare(model)
        here = {in_file[parameter]: name for name, parameter in model.named_parameters()}
        size = checkpoint_bytes(directory)
        wide = sum(wanted[name].numel() for name in here) * dtype.itemsize if dtype is not None else size
        ways = [] if dtype is not None and dtype.itemsize == 2 else ["--dtype bfloat16"]
        ways += [] if load_in_4bit else ["--load-in-4bit"]
        advice = "take " + ", ".join([*ways, "a smaller model"]) + ", or free memory"
        check_room(str(directory), wide * 0.3 if load_in_4bit else wide, torch.device(device), advice)
        shapes = {name: p.shape for name, p in wanted.items()}
        for name, tensor in read_checkpoint(directory, shapes, tied, here.keys(), device):
            dtype = dtype or tensor.dtype  # one for all: the memory has the model's
            _assign(model, here[name], tensor.to(dtype), load_in_4bit)
        if len(here) == len(wanted):
            model.tie_weights()
        return model

    def save_pretrained(
        self,
        directory: str | Path,
        whole: Callable[[dict[str, Tensor]], dict[str, Tensor] | None] = lambda tensors: tensors,
    ) -> None:
        """Write `config.json` and `model.safetensors`. Raises InputError for an adapter or a 4-bit base.

        whole: makes all tensors by name of those that are here, or None where nothing is to be written.
        """
        if adapters(self):
            raise InputError(
                "the model has an unmerged LoRA adapter: call merge_lora(model) first to fold it in, "
                "or save_adapter(model, directory) to save it alone"
            )
        if is_in_4bit(self):
            raise InputError("a model in 4 bits is not written: load it without load_in_4bit first")
        if self.config_class.from_dict(self.config.to_dict()) != self.config:
            raise InputError(
                f"no config.json describes this model: a {self.config.model_type} implies other biases or q/k norms "
                "than its config has; choose the model_type that has them"
            )
        tensors = whole({name: parameter.detach() for name, parameter in self.named_parameters()})
        dtype = str(next(self.parameters()).dtype).removeprefix("torch.")
        if tensors is not None:
            write_checkpoint(directory, {**self.config.to_dict(), "torch_dtype": dtype}, tensors)


def _assign(model: nn.Module, name: str, tensor: torch.Tensor, load_in_4bit: bool) -> None:
    module_name, _, child = name.rpartition(".")
    module = model.get_submodule(module_name)
    if load_in_4bit and child == "weight" and isinstance(module, nn.Linear) and is_stored_in_4bit(module_name):
        parent, _, own_name = module_name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, Linear4bit(tensor, module.bias))
    else:
        setattr(module, child, nn.Parameter(tensor, requires_grad=not isinstance(module, Linear4bit)))
