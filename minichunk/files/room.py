"""Is there room for it? Asked before anything large is read, not half-way."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import InputError


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
