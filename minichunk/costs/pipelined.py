"""`minichunk bench --preset pipeline`: a step of SeCO on two ranks beside one process, each with one thread of the CPU.

torchrun starts the ranks, and each of them measures itself: how long it takes, how much memory, and how long it waits
for the other one. shares.py says what came of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..files.atomic import write_json
from ..models.shapes import random_model, shape
from ..pipeline.links import Links
from ..pipeline.pipeline_seco import pipeline_seco
from ..pipeline.stage import PipelineStage
from ..protocol import Written
from ..seco import seco
from ..training.report import peak_memory
from .count import CountBytes
from .machine import command, machine

REPEATS = 2
RANKS = 2
CHUNKS = (8, 16, 32)
FOUND, FAILED = "found: ", "failed: "  # a line of a process that measures begins so


@dataclass(frozen=True)
class Step:
    """A step of SeCO that trains all parameters, in float32.

    ranks: 1 is `seco` itself, without a process group. counts: how many layers each rank gets; None: as PipelineStage
    deals them. count: do it once more, and count the bytes of live tensors.
    """

    model: str
    chunk_size: int
    chunks: int
    ranks: int
    counts: Sequence[int] | None = None
    count: bool = False


def measure_ranks(
    output: Path,
    repeats: int = REPEATS,
    quiet: bool = False,
    *,
    name: str = "llama-47m",
    chunk_size: int = 128,
    chunks: Sequence[int] = CHUNKS,
) -> None:
    """Measure a step of each number of chunks `repeats` times, all of them once before any twice, and write that.

    Each measurement is one process, or one of each rank, with a memory of its own; in the first round it counts too.
    Raises InputError without Gloo, if a measurement fails, and if the output cannot be written.
    """
    if not (dist.is_available() and dist.is_gloo_available()):
        raise InputError("--preset pipeline needs a PyTorch with Gloo, by which processes talk to each other on a CPU")
    about = {"preset": "pipeline", "model": name, "dtype": "float32", "chunk_size": chunk_size, "ranks": RANKS}
    rounds: dict[tuple[int, int], list[Any]] = {(n, ranks): [] for n in chunks for ranks in (1, RANKS)}
    with tqdm(total=repeats * len(rounds), desc="bench", unit="run", disable=quiet) as bar:
        for turn in range(repeats):
            for (n, ranks), found in rounds.items():
                bar.set_postfix_str(f"{n} chunks, {ranks} rank{'s' * (ranks > 1)}")
                found.append(_run(Step(name, chunk_size, n, ranks, count=turn == 0)))
                bar.update()
                rows = [{"chunks": n, "ranks": ranks, "rounds": each} for (n, ranks), each in rounds.items()]
                on = {"command": command(), "machine": machine() | {"threads": 1}}
                write_json(output, {**on, **about, "results": rows})


def _run(step: Step) -> list[dict[str, Any]]:
    """What each rank has found, each a process of its own. Raises InputError."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={step.ranks}", "-m"]
    run = [sys.executable, "-m", *(torchrun if step.ranks > 1 else []), "minichunk.costs.pipelined"]
    process = subprocess.run(
        [*run, json.dumps(asdict(step))], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if process.returncode:
        said = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        reason = next((line.removeprefix(FAILED) for line in said if line.startswith(FAILED)), said[-1])
        raise InputError(
            f"a step of {step.chunks} chunks on {step.ranks} rank{'s' * (step.ranks > 1)} failed: {reason}"
        )
    said = [line for line in process.stdout.splitlines() if line.startswith(FOUND)]  # Gloo says something too
    found: list[dict[str, Any]] = json.loads(said[0].removeprefix(FOUND))
    return found


class TimedLinks(Links):
    """They know how many seconds they have waited for other ranks."""

    waited = 0.0

    @contextmanager
    def _hears(self, other: str) -> Iterator[None]:
        began = time.perf_counter()
        with super()._hears(other):
            yield
        self.waited += time.perf_counter() - began


class TimedStage(PipelineStage):
    """It knows when it has gone over from the fill to the walk, and how long it had waited until then."""

    links: TimedLinks
    walk_began = waited_before = 0.0

    def begin_walk(self) -> None:
        """Unless more of the fill comes."""
        self.walk_began, self.waited_before = time.perf_counter(), self.links.waited

    def run(self, *arguments: Any) -> tuple[Tensor, Written]:
        result = super().run(*arguments)
        if not torch.is_grad_enabled():
            self.begin_walk()
        return result

    def fill(self, *arguments: Any) -> Written:
        written = super().fill(*arguments)
        self.begin_walk()
        return written


def measure_rank(step: Step) -> list[dict[str, Any]]:
    """What each rank has found: run on all of them at once, in a process group if there are several."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same model and tokens on all ranks
    model = random_model(step.model, torch.float32)
    ids = torch.randint(shape(step.model).vocab_size, (1, step.chunks * step.chunk_size))
    stage = TimedStage(model, step.counts, links=TimedLinks()) if step.ranks > 1 else None

    def run(ids: Tensor) -> tuple[Tensor, float, float]:
        """The loss, and when it began and ended."""
        model.zero_grad(set_to_none=True)
        if stage is not None:
            stage.links.everyones(None)
            stage.begin_walk()  # with a single chunk there is nothing to fill
        began = time.perf_counter()
        size = step.chunk_size
        loss = seco(model, ids, ids, size) if stage is None else pipeline_seco(stage, ids, ids, size)
        return loss, began, time.perf_counter()

    run(ids[:, : 2 * min(step.chunk_size, 64)])  # a first time
    loss, began, ended = run(ids)
    found = {"loss": float(loss), "seconds": ended - began, "peak_bytes": peak_memory(ids.device)}
    if stage is not None:
        walk, waited = ended - stage.walk_began, stage.links.waited - stage.waited_before
        found |= {"layers": len(stage.layers), "walk": walk, "waited": waited}
    if step.count:
        with CountBytes() as counted:
            counted.add(*model.parameters(), *model.buffers(), ids)
            run(ids)
        found["counted_bytes"] = counted.peak
    return [found] if stage is None else stage.links.everyones(found)


def main(step: Step) -> None:
    """Print what all ranks have found, as one line; or exit with a line that says what went wrong."""
    try:
        if step.ranks > 1:
            dist.init_process_group("gloo")
        found = measure_rank(step)
        if step.ranks == 1 or dist.get_rank() == 0:
            print(FOUND + json.dumps(found))
        if step.ranks > 1:
            dist.destroy_process_group()
    except Exception as error:
        sys.exit(f"{FAILED}{error}")


if __name__ == "__main__":  # as _run starts it
    main(Step(**json.loads(sys.argv[1])))
