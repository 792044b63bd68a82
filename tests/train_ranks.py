"""What the processes of `minichunk train` under torchrun do, as tasks of the pool in ranks.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from minichunk.errors import InputError
from minichunk.pipeline.start import started
from minichunk.training import loop, report
from minichunk.training.loop import NonFiniteLoss
from minichunk.training.options import TrainOptions, options_of
from minichunk.training.train import Interrupted, train


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

    plot = patch.object(report, "plot_run", lambda *_: True)  # drawing takes longer than training
    with under_torchrun(rank, world), patch.object(loop.Trainer, "run_step", run_step), plot:
        try:
            train(options_of(TrainOptions, {**values, "resume": resume}), lines.append)
        except (InputError, NonFiniteLoss, Interrupted) as error:
            return lines, f"{type(error).__name__}: {error}"
    return lines, ""


def read_here(rank: int, world: int, values: dict[str, Any]) -> tuple[list[str], int]:
    """The names of the tensors that this process reads of a checkpoint, and how many parameters it has in the end."""
    from minichunk.files import checkpoint
    from minichunk.pipeline.links import Links
    from minichunk.training.load import load_to_train

    names: list[str] = []
    opened = checkpoint.open_tensors

    class Seen:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            names.append(name)
            tensor: torch.Tensor = self.file.get_tensor(name)
            return tensor

    @contextmanager
    def seen(*arguments: Any) -> Iterator[Any]:
        with opened(*arguments) as file:
            yield Seen(file)

    with under_torchrun(rank, world), patch.object(checkpoint, "open_tensors", seen):
        stage, _ = load_to_train(options_of(TrainOptions, values).resolved(), Links())
    return names, len(list(stage.named_parameters()))
