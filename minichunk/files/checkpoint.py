"""The tensors of a Hugging Face checkpoint directory, in and out: safetensors, in one file or in shards."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .atomic import open_tensors, read_json, write_json, write_tensors

_INDEX = "model.safetensors.index.json"


def checkpoint_bytes(directory: Path) -> int:
    """Size of the files that hold the tensors. Raises InputError if there are none."""
    return sum(path.stat().st_size for path in _find_tensors(directory) if path.is_file())


def read_checkpoint(
    directory: Path, shapes: Mapping[str, Sequence[int]], tied: Collection[str], here: Collection[str],
    device: str | torch.device,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Yield the tensors one by one, on the device; the host holds one at a time.

    shapes: what the model needs, by name. tied: names of copies of those, which are not read.
    here: which of `shapes` this process needs; the others have to be there, and are not read.
    Raises InputError, naming the file and the tensor, for one that is missing, unknown or of another shape.
    """
    from tqdm import tqdm

    quiet = checkpoint_bytes(directory) < 10**9 or os.environ.get("RANK", "0") != "0"
    bar = tqdm(total=len(here), desc=f"load {directory.name}", unit="tensor", leave=False, disable=quiet)
    found = set[str]()
    for path, names in _find_tensors(directory).items():
        with open_tensors(path, str(device)) as file:
            for name in names or file.keys():
                if name in tied or name.endswith("rotary_emb.inv_freq"):
                    continue  # a copy, or derived from the config
                if name not in shapes:
                    raise InputError(f"{path} has the tensor {name}, which a model of this config.json lacks")
                shape, expected = file.get_slice(name).get_shape(), list(shapes[name])
                if shape != expected:
                    raise InputError(f"{path}: {name} has the shape {shape}, but config.json makes it {expected}")
                found.add(name)
                if name in here:
                    tensor = file.get_tensor(name)
                    if not tensor.is_floating_point():
                        raise InputError(f"{path}: {name} is {tensor.dtype}, but must be floating point (unquantized)")
                    bar.update()
                    yield name, tensor
    bar.close()
    if missing := [name for name in shapes if name not in found]:
        raise InputError(f"{directory}: the tensor {missing[0]} is missing (and {len(missing) - 1} more)")


def _find_tensors(directory: Path) -> dict[Path, list[str]]:
    """The checkpoint's files and the tensors in each; [] stands for all of a file's."""
    if (directory / "model.safetensors").is_file():
        return {directory / "model.safetensors": []}
    if (directory / _INDEX).is_file():
        weight_map = read_json(directory / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{directory / _INDEX} lacks the object weight_map")
        by_file: dict[Path, list[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                raise InputError(f"{directory / _INDEX} puts {name} into {file!r}; it must be a file name alone")
            by_file.setdefault(directory / file, []).append(name)
        return by_file
    if pickled := [path for path in directory.iterdir() if path.suffix in (".bin", ".pth", ".pt")]:
        how = "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        raise InputError(f"{pickled[0]} is pickled, and may run any code; convert it with transformers: {how}")
    raise InputError(f"{directory} has neither model.safetensors nor {_INDEX}")


def write_checkpoint(directory: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write `model.safetensors` and, once that is there, `config.json`. Raises InputError."""
    directory = Path(directory)
    write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    (directory / _INDEX).unlink(missing_ok=True)  # of a sharded checkpoint that was here before
    write_json(directory / "config.json", config)
