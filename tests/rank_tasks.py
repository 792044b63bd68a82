"""What a rank does in the tests of PyTorch's own engine; see ranks.py."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch

import minichunk as mc
from minichunk.costs.count import CountBytes
from minichunk.pipeline.stage import PipelineStage

from .gradients import Tensors, take_gradients
from .ranks import TIMEOUT, Case, in_one_process


def torch_pipeline() -> Any:
    """The module in tutorials/, which are no package."""
    path = Path(__file__).parents[1] / "tutorials" / "torch_pipeline.py"
    spec = importlib.util.spec_from_file_location("torch_pipeline", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_torch(rank: int, case: Case) -> tuple[Tensors, Tensors]:
    """What this rank finds with PyTorch's own engine; and on the first one, what one process does."""
    expected = in_one_process(case) if rank == 0 else {}
    stage = PipelineStage(case.model, case.counts, mc.Links(timeout=TIMEOUT))
    losses = [case.run(torch_pipeline().torch_seco, stage)]
    return {"loss": torch.stack(losses), **take_gradients(stage.model)}, expected


def peaks(rank: int, case: Case) -> tuple[int, int]:
    """The most bytes that are alive on this rank in a step: ours, and that of PyTorch's own engine."""
    found = []
    for function in (mc.pipeline_seco, torch_pipeline().torch_seco):
        stage = PipelineStage(copy.deepcopy(case.model), case.counts, mc.Links(timeout=TIMEOUT))
        with CountBytes() as count:
            case.run(function, stage)
        found.append(count.peak)
    return found[0], found[1]
