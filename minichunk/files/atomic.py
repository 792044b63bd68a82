"""Writing a file so that it is either whole or absent, and reading with errors in words."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its place once the block has ended well. Raises InputError."""
    path = Path(path)
    make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes for the owner alone
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # the content is on the disk before the name is
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save_file  # here, because a model with random weights needs PyTorch alone

    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object")
    return value


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

    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from None


def make_directory(directory: str | Path) -> Path:
    """Create a directory to write into. Raises InputError where that is impossible."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the directory {directory} ({error.strerror})") from None
    return Path(directory)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+)", info.read_text()) if device.type == "cpu" and info.exists() else None
    return int(found[1]) * 1024 if found else None


def check_room(what: str, needed: float, device: torch.device, advice: str) -> None:
    """Raise InputError, with advice, unless `needed` bytes are free: before anything is read, not half-way."""
    free = free_memory(device)
    if free is not None and needed > free:
        where = f"on {device}, but only {human_bytes(free)} are free there"
        raise InputError(f"{what} needs {human_bytes(needed)} {where}: {advice}")


def human_bytes(count: float) -> str:
    """Bytes in words: '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
