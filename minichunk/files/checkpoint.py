"""The tensors of a Hugging Face checkpoint directory, in and out: safetensors, in one file or in shards."""

import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .atomic import make_directory, open_tensors, read_json, write_json, write_tensors

_INDEX = "model.safetensors.index.json"
BESIDE = ("tokenizer*", "special_tokens_map.json", "*chat_template*", "*chat_template*/*", "generation_config.json")


def advice(name: str | Path) -> str:
    """What to do where a directory is needed and there is a name as on the Hugging Face hub."""
    how = f"; if a model on the hub is meant: hf download {name} --local-dir {Path(name).name}"
    return how if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) else ""


def checkpoint_directory(directory: str | Path) -> Path:
    if not Path(directory).is_dir():
        raise InputError(f"{directory} is not a directory{advice(directory)}")
    return Path(directory)


def digest(path: Path) -> str:
    """Of a file's size and bytes: of a safetensors file of more than 64 MiB those of 256 blocks; "" of no file."""
    if not path.is_file():
        return ""
    size, block = path.stat().st_size, 2**18
    found = blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if path.suffix != ".safetensors" or size <= 256 * block:
            return file_digest(file, lambda: found).hexdigest()
        for i in range(256):
            file.seek(i * (size - block) // 255)
            found.update(file.read(block))
    return found.hexdigest()


def checkpoint_bytes(directory: Path) -> int:
    """Size of the files that hold the tensors. Raises InputError if there are none."""
    return sum(path.stat().st_size for path in _find_tensors(directory) if path.is_file())


def read_checkpoint(
    directory: Path, shapes: Mapping[str, Sequence[int]], tied: Mapping[str, str], here: Collection[str],
    device: str | torch.device,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Yield the tensors one by one, on the device; the host holds one at a time.

    shapes: what the model needs, by name. tied: names of copies, each with what it must equal if it is there.
    here: which of `shapes` this process needs; the others have to be there, and are not read.
    Raises InputError, naming the file and the tensor, for one that is missing, unknown or of another shape.
    """
    from tqdm import tqdm

    quiet = checkpoint_bytes(directory) < 10**9 or os.environ.get("RANK", "0") != "0"
    bar = tqdm(total=len(here), desc=f"load {directory.name}", unit="tensor", leave=False, disable=quiet)
    found: dict[str, Path] = {}
    for path, names in _find_tensors(directory).items():
        with open_tensors(path, str(device)) as file:
            for name in names or file.keys():
                found[name] = path
                if name in tied or name.endswith("rotary_emb.inv_freq"):  # a copy, or derived from the config
                    continue
                if name not in shapes:
                    raise InputError(f"{path} has the tensor {name}, which a model of this config.json lacks")
                shape, expected = file.get_slice(name).get_shape(), list(shapes[name])
                if shape != expected:
                    raise InputError(f"{path}: {name} has the shape {shape}, but config.json makes it {expected}")
                if name in here:
                    tensor = file.get_tensor(name)
                    if not tensor.is_floating_point():
                        raise InputError(f"{path}: {name} is {tensor.dtype}, but must be floating point (unquantized)")
                    bar.update()
                    yield name, tensor
    bar.close()
    if missing := [name for name in shapes if name not in found]:
        raise InputError(f"{directory}: the tensor {missing[0]} is missing (and {len(missing) - 1} more)")
    for copy in tied.keys() & found.keys():
        with open_tensors(found[copy]) as a, open_tensors(found[tied[copy]]) as b:
            if not torch.equal(a.get_tensor(copy), b.get_tensor(tied[copy])):
                what = f"{copy} differs from {tied[copy]}, but config.json says tie_word_embeddings"
                raise InputError(f"{found[copy]}: {what}: write false there, or take the tensor out")


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
        raise InputError(f"{pickled[0]} is pickled, and may run any code: convert it by transformers' save_pretrained")
    raise InputError(f"{directory} has neither model.safetensors nor {_INDEX}")


def copy_beside(origin: Path | None, directory: str | Path) -> None:
    """What `origin` has beside config and tensors, and `directory` has not."""
    for path in [path for pattern in BESIDE for path in (origin.glob(pattern) if origin else ())]:
        target = Path(directory) / path.relative_to(origin or "")
        if path.is_file() and not target.exists():
            shutil.copy(path, make_directory(target.parent))


def write_checkpoint(
    directory: str | Path, config: dict[str, Any], tensors: dict[str, Tensor], origin: Path | None = None
) -> None:
    """Write `model.safetensors`, then `config.json`, and what `origin` has beside them and `directory` has not."""
    directory = Path(directory)
    copy_beside(origin, directory)
    write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    (directory / _INDEX).unlink(missing_ok=True)  # of a sharded checkpoint that was here before
    write_json(directory / "config.json", config)
