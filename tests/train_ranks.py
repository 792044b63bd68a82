"""What the processes of `minichunk train` under torchrun do, as tasks of the pool in ranks.py."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from safetensors.torch import load_file

from minichunk.errors import InputError
from minichunk.pipeline.links import started
from minichunk.training import loop, run_directory
from minichunk.training.loop import NonFiniteLoss
from minichunk.training.options import TrainOptions, options_of
from minichunk.training.train import train

STEADY = ("step", "loss", "grad_norm", "lr", "tokens")  # does not depend on the clock


def files(directory: Path) -> dict[str, Any]:
    """What a run has written, by name, without clock and memory, and what it was told."""
    found: dict[str, Any] = {}
    for path in directory.rglob("*"):
        name = str(path.relative_to(directory))
        if path.suffix == ".safetensors":
            found[name] = {key: (str(x.dtype), x.tolist()) for key, x in load_file(path).items()}
        elif name == "metrics.jsonl":
            found[name] = [{key: json.loads(line)[key] for key in STEADY} for line in path.read_text().splitlines()]
        elif path.suffix == ".json" and name != "run.json":
            found[name] = json.loads(path.read_text())
    return found


@contextmanager
def under_torchrun(rank: int, world: int) -> Iterator[None]:
    """With the variables that torchrun sets; one process alone has none."""
    said = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 1}
    told = {name: str(value) for name, value in said.items()} | {"MASTER_ADDR": "localhost"}
    with patch.dict(os.environ, told if world > 1 else {}):
        yield


def train_here(
    rank: int, world: int, values: dict[str, Any], resume: bool = False, interrupt: int | None = None
) -> tuple[list[str], str]:
    """What this process says, and the error that it ends with. interrupt: Ctrl-C in this step, on the last rank."""
    lines: list[str] = []
    step = loop.Trainer.run_step

    def run_step(trainer: loop.Trainer) -> dict[str, float]:
        if trainer.step + 1 == interrupt and started().rank == world - 1:
            signal.raise_signal(signal.SIGINT)
        return step(trainer)

    plot = patch.object(run_directory, "plot_run", lambda *_: True)  # drawing takes longer than training
    with under_torchrun(rank, world), patch.object(loop.Trainer, "run_step", run_step), plot:
        try:
            train(options_of(TrainOptions, {**values, "resume": resume}), lines.append)
        except (InputError, NonFiniteLoss, KeyboardInterrupt) as error:
            return lines, f"{type(error).__name__}: {error}"
    return lines, ""


def run_script(rank: int, code: str) -> str:
    """What it prints, in the process group that is there already."""
    printed, nothing = StringIO(), lambda *_: None
    with patch.multiple(dist, init_process_group=nothing, destroy_process_group=nothing), redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()
