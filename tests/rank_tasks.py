"""What a rank does in the tests of traces, and of PyTorch's own engine; see ranks.py."""

from __future__ import annotations

import copy
import importlib.util
import linecache
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import minichunk as mc
from minichunk.costs.count import CountBytes
from minichunk.pipeline.stage import PipelineStage
from minichunk.walk.listing import LISTINGS

from .gradients import Tensors, take_gradients
from .ranks import TIMEOUT, Case, in_one_process


def traced(rank: int, case: Case) -> tuple[list[dict[str, Any]], Tensors, Tensors]:
    """The log of this rank; the gradients that it finds, and those that it finds alone."""
    stage = PipelineStage(case.model, case.counts, mc.Links(timeout=TIMEOUT))
    function = getattr(mc, f"pipeline_{case.method}")
    torch.manual_seed(case.seed + rank)
    loss = case.run(function, stage)
    alone = take_gradients(stage.model)
    torch.manual_seed(case.seed + rank)
    log = mc.trace(function, stage, case.input_ids, case.labels, case.chunk_size, **case.options)
    return log, {"loss": torch.tensor(log[-1]["loss"]), **take_gradients(stage.model)}, {"loss": loss, **alone}


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


def lines_of_events(rank: int, case: Case) -> list[tuple[str, str]]:
    """The kind of each event that happens within the loop of the pipeline, and the line that is at work."""
    stage, seen = PipelineStage(case.model, case.counts, mc.Links(timeout=TIMEOUT)), list[tuple[str, str]]()
    codes = [function.__code__ for function in LISTINGS["pipeline_seco"]]

    def look(event: dict[str, Any]) -> None:
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code not in codes:
            frame = frame.f_back
        if frame is not None:
            seen.append((event["kind"], linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()))

    mc.trace(mc.pipeline_seco, stage, case.input_ids, case.labels, case.chunk_size, on_event=look)
    return seen
