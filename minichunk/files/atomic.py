"""Writing a file so that it is either whole or absent, and reading safetensors with errors in words.

The library of safetensors is imported where it is used: a model with random weights needs PyTorch alone.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its place once the block has ended well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # the content is on the disk before the name is
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object")
    return value


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


def json_lines(path: str | Path, text: str) -> Iterator[tuple[str, Any]]:
    """Of each line of a JSONL file's text that is not empty: its place, in words, and its value. Raises InputError."""
    # Not splitlines(): JSON strings may hold the other line separators of Unicode.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not JSON: {error}") from None


@contextmanager
def open_tensors(path: str | Path, device: str = "cpu") -> Iterator[Any]:
    """Open a safetensors file to read tensor by tensor. Raises InputError if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"{path} is missing")
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file (get it again): {error}") from None


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


def human_bytes(count: float) -> str:
    """Bytes in words: '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
