"""What figures were measured on, and by which command: a results file begins with both."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch


def command() -> str:
    """What was typed."""
    return " ".join(["minichunk", *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """Its processor, and with how many threads what was computed."""
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    found: dict[str, Any] = {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found |= {"python": platform.python_version(), "torch": torch.__version__, "system": platform.system()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found
