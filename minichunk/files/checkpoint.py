"""Hugging Face checkpoint directories, in and out: config.json and safetensors."""

from __future__ import annotations

import errno
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ..errors import InputError
from ..models.config import LlamaConfig
from ..models.llama import Llama
from ..models.lora import adapters
from ..models.quantize import Linear4bit, check_bitsandbytes, is_in_4bit, is_stored_in_4bit
from ..training.report import human_bytes
from .atomic import open_tensors, read_json, write_json, write_tensors

_INDEX = "model.safetensors.index.json"


def load_pretrained(
    directory: str | Path, dtype: torch.dtype | None, device: str | torch.device, load_in_4bit: bool = False
) -> Llama:
    """See `Llama.from_pretrained`. Tensor by tensor onto the device: the host holds one at a time."""
    if load_in_4bit:
        check_bitsandbytes()
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory with a Hugging Face checkpoint")
    config_path = directory / "config.json"
    try:
        config = LlamaConfig.from_dict(read_json(config_path))
    except InputError as error:
        raise InputError(f"{config_path}: {error}" if str(error).startswith("config:") else str(error)) from None
    with torch.device("meta"):  # shapes without memory
        model = Llama(config)
    wanted = dict(model.named_parameters())  # a tied LM head is named once, as the embedding
    names_by_file = _find_tensors(directory)
    size = sum(path.stat().st_size for path in names_by_file if path.is_file())
    wide = sum(p.numel() for p in wanted.values()) * dtype.itemsize if dtype is not None else size
    ways = [] if dtype is not None and dtype.itemsize == 2 else ["--dtype bfloat16"]
    ways += [] if load_in_4bit else ["--load-in-4bit"]
    advice = "take " + ", ".join([*ways, "a smaller model"]) + ", or free memory"
    check_room(str(directory), wide * 0.3 if load_in_4bit else wide, torch.device(device), advice)
    bar = tqdm(total=size, desc=f"load {directory.name}", unit="B", unit_scale=True, leave=False, disable=size < 10**9)
    found: set[str] = set()
    for path, names in names_by_file.items():
        with open_tensors(path, str(device)) as file:
            for name in names or file.keys():
                if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
                    continue  # derived, or a copy of the embedding
                if name not in wanted:
                    raise InputError(f"{path} has the tensor {name}, which a {config.model_type} of this config lacks")
                if name not in file.keys():  # noqa: SIM118 (not a dict)
                    raise InputError(f"{path} lacks the tensor {name} that {_INDEX} says is in it")
                shape, expected = file.get_slice(name).get_shape(), list(wanted[name].shape)
                if shape != expected:
                    raise InputError(f"{path}: {name} has the shape {shape}, but config.json makes it {expected}")
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point():
                    raise InputError(f"{path}: {name} is {tensor.dtype}, but must be floating point (unquantized)")
                dtype = dtype or tensor.dtype  # one for all: the cache has the model's
                _assign(model, name, tensor.to(dtype), load_in_4bit)
                found.add(name)
                bar.update(tensor.nbytes)
    bar.close()
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(f"{directory}: the tensor {missing[0]} is missing (and {len(missing) - 1} more)")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    return None


def check_room(what: str, needed: float, device: torch.device, advice: str) -> None:
    """Raise InputError unless `needed` bytes are free on the device: before anything is read, not half-way.

    advice: what to do about it, for the message.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        where = f"{what} needs {human_bytes(needed)} on {device}, but only {human_bytes(free)} are free there"
        raise InputError(f"{where}: {advice}")


def _assign(model: nn.Module, name: str, tensor: torch.Tensor, load_in_4bit: bool) -> None:
    module_name, _, child = name.rpartition(".")
    module = model.get_submodule(module_name)
    if load_in_4bit and child == "weight" and isinstance(module, nn.Linear) and is_stored_in_4bit(module_name):
        parent, _, own_name = module_name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, Linear4bit(tensor, module.bias))
    else:
        setattr(module, child, nn.Parameter(tensor, requires_grad=not isinstance(module, Linear4bit)))


def _find_tensors(directory: Path) -> dict[Path, list[str]]:
    """The checkpoint's files and the tensors in each; [] stands for all of a file's."""
    if (directory / "model.safetensors").is_file():
        return {directory / "model.safetensors": []}
    if (directory / _INDEX).is_file():
        weight_map = read_json(directory / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{directory / _INDEX} lacks the object weight_map")
        by_file = defaultdict(list)
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                raise InputError(f"{directory / _INDEX} puts {name} into {file!r}; it must be a file name alone")
            by_file[directory / file].append(name)
        return by_file
    pickled = sorted([*directory.glob("*.bin"), *directory.glob("*.pth"), *directory.glob("*.pt")])
    if pickled:
        raise InputError(
            f"{pickled[0]} is pickled, and unpickling runs whatever code the file holds; convert it where you trust "
            "it, with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise InputError(f"{directory} has neither model.safetensors nor {_INDEX}")


def save_pretrained(model: Llama, directory: str | Path) -> None:
    """See `Llama.save_pretrained`."""
    if adapters(model):
        raise InputError(
            "the model has an unmerged LoRA adapter: call merge_lora(model) first to fold it in, "
            "or save_adapter(model, directory) to save it alone"
        )
    if is_in_4bit(model):
        raise InputError("a model in 4 bits is not written: load it without load_in_4bit first")
    if LlamaConfig.from_dict(model.config.to_dict()) != model.config:
        raise InputError(
            f"no config.json describes this model: a {model.config.model_type} implies other biases or q/k norms "
            "than its config has; choose the model_type that has them"
        )
    directory = make_directory(directory)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    (directory / _INDEX).unlink(missing_ok=True)  # of a sharded checkpoint that was here before
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    write_json(directory / "config.json", {**model.config.to_dict(), "torch_dtype": dtype})


def make_directory(directory: str | Path) -> Path:
    """Create a directory to write into. Raises InputError where that is impossible."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise InputError(f"{directory} or a folder above it is a file, but must be a directory") from None
        raise InputError(f"cannot make the directory {directory}: {error.strerror}") from None
    return directory
