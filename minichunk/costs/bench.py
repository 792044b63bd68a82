"""`minichunk bench`: time and peak memory of a training step, a row for each length and method."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from json import dumps
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..batch import prepare
from ..chunks import check_fill_size, cut
from ..errors import InputError
from ..files.atomic import human_bytes
from ..full import full
from ..models.shapes import random_model, shape
from ..samplers import FixedBudget
from ..seco import seco
from ..spaco import spaco
from ..training.checks import check_choice, check_device, check_least
from ..training.options import DTYPES, default_dtype
from ..training.report import new_figure, peak_memory, save_figure
from .baselines import concatenating, tiled_full, transformers_llama

WHOLE = ("full", "full-recompute", "full-recompute-tiled", "full-recompute-offload", "transformers")
KINDS = ("", "-recompute", "-offload", "-recompute-offload")
CHUNKED = tuple(f"{method}{kind}" for method in ("seco", "spaco") for kind in KINDS)
METHODS = (*WHOLE, *CHUNKED, "seco-concatenating")
SHOWN = ("full", "full-recompute", "full-recompute-offload", "seco", "spaco")


@dataclass(frozen=True)
class Case:
    """A training step that is measured: of a model with random weights, on one random text of `seq_len` tokens.

    model: as for `shape`. budget: chunks that SpaCO keeps. rank: of LoRA; 0 trains all parameters.
    """

    method: str
    seq_len: int
    model: str = "llama-47m"
    chunk_size: int = 512
    fill_size: int | None = None
    budget: int = 1
    rank: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


@dataclass
class Row:
    """The samples of a case, one for each repeat; or why there are none."""

    case: Case
    seconds: list[float]
    peak_bytes: list[int]
    error: str | None = None

    def against(self, first: Row, name: str) -> float | None:
        """The median relative to that of another row; None if one of the two has failed."""
        if self.error or first.error:
            return None
        return statistics.median(getattr(self, name)) / statistics.median(getattr(first, name))


def measure(case: Case) -> tuple[float, int, float]:
    """Run the step after a short warm-up; returns its seconds, the peak memory in bytes, and the loss.

    The memory is that of the device's allocator on CUDA, else that of this process.
    """
    device = torch.device(case.device)
    torch.manual_seed(0)
    model = random_model(case.model, DTYPES[case.dtype], case.rank, device=case.device)
    step = step_of(case, model)
    ids = torch.randint(shape(case.model).vocab_size, (1, case.seq_len), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    step(ids[:, : min(case.seq_len, 2 * min(case.chunk_size, 64))])
    model.zero_grad(set_to_none=True)
    _synchronize(device)
    began = time.perf_counter()
    loss = step(ids)
    _synchronize(device)
    return time.perf_counter() - began, peak_memory(device), float(loss)


def step_of(case: Case, model: Any) -> Callable[[Tensor], Tensor]:
    """A function of token ids (1, T) that adds to the gradients by the method of this case, and returns the loss."""
    name, _, suffix = case.method.partition("-")
    size = case.chunk_size
    if case.method == "full-recompute-tiled":
        return lambda ids: tiled_full(model, prepare(model, ids, ids, None))
    if case.method == "full-recompute-offload":
        return lambda ids: tiled_full(model, prepare(model, ids, ids, None), offload=True)
    if name == "full":
        return lambda ids: full(model, ids, ids, recompute=bool(suffix))
    if case.method == "transformers":
        return _step_of_transformers(model)
    if case.method == "seco-concatenating":
        return lambda ids: concatenating(model, ids, ids, size)
    options: dict[str, Any] = {"recompute": "recompute" in suffix, "offload": "offload" in suffix}
    options["fill_size"] = case.fill_size
    if name == "seco":
        return lambda ids: seco(model, ids, ids, size, **options)

    def spaco_step(ids: Tensor) -> Tensor:
        coins = torch.Generator().manual_seed(case.seed)
        return spaco(model, ids, ids, size, sampler=FixedBudget(case.budget), generator=coins, **options)

    return spaco_step


def _step_of_transformers(model: Any) -> Callable[[Tensor], Tensor]:
    theirs = transformers_llama(model)
    model.requires_grad_(False).to("meta")  # one copy of the weights is enough

    def step(ids: Tensor) -> Tensor:
        theirs.zero_grad(set_to_none=True)
        loss: Tensor = theirs(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench(cases: Sequence[Case], repeats: int, quiet: bool = False) -> list[Row]:
    """Measure each case `repeats` times, all of them once before any twice; each time in a process of its own.

    So the memory of one does not count for another. Repeat r draws SpaCO's chunks with seed r. A case that fails is
    not repeated.
    """
    rows = [Row(case, [], []) for case in cases]
    with tqdm(total=repeats * len(cases), desc="bench", unit="step", leave=False, disable=quiet) as bar:
        for seed in range(repeats):
            for row in rows:
                bar.set_postfix_str(f"{row.case.method}, {row.case.seq_len:,} tokens")
                if row.error is None:
                    _measure_in_process(row, seed)
                bar.update()
    return rows


def _measure_in_process(row: Row, seed: int) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            seconds, peak, _ = process.submit(measure, replace(row.case, seed=seed)).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):  # the kernel ends a process that takes too much
            row.error = "out of memory"
        except Exception as error:
            row.error = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            row.seconds.append(seconds)
            row.peak_bytes.append(peak)


def table(rows: Sequence[Row]) -> str:
    """Markdown: the median and, of several repeats, the range; relative to the first method of the same length."""
    first = rows[0].case.method
    lines = [f"| tokens | method | seconds | / {first} | peak memory | / {first} |", "|---:|---|---:|---:|---:|---:|"]
    for row in rows:
        beside = next(r for r in rows if r.case.seq_len == row.case.seq_len)
        begin = f"| {row.case.seq_len:,} | {row.case.method} |"
        if row.error is not None:
            lines.append(f"{begin} {row.error} | | | |")
            continue
        ratios = [row.against(beside, name) for name in ("seconds", "peak_bytes")]
        time_ratio, memory_ratio = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        seconds, peak = _spread(row.seconds, lambda x: f"{x:.2f}"), _spread(row.peak_bytes, human_bytes)
        lines.append(f"{begin} {seconds} | {time_ratio} | {peak} | {memory_ratio} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Median and range; the median alone where they are shown alike."""
    low, middle, high = show(min(values)), show(statistics.median(values)), show(max(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw time and peak memory against the length, a line for each method. Raises InputError without matplotlib."""
    figure = new_figure(11, 5)
    if figure is None:
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    panels = figure.subplots(1, 2)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.error is None:
            lines.setdefault(row.case.method, []).append(row)
    lengths = sorted({row.case.seq_len for row in rows})
    for axes, name, unit, title in zip(
        panels, ("seconds", "peak_bytes"), (1, 2**30), ("Seconds of a step", "Peak memory, GiB"), strict=True
    ):
        for method, points in lines.items():
            heights = [statistics.median(getattr(row, name)) / unit for row in points]
            axes.plot([row.case.seq_len for row in points], heights, "o-", label=method)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(xlabel="tokens", title=title)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5)
    save_figure(figure, path)


def describe_machine() -> dict[str, Any]:
    """What the figures are measured on: processor, threads, versions, GPU."""
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    found: dict[str, Any] = {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found |= {"python": platform.python_version(), "torch": torch.__version__, "system": platform.system()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def run_bench(
    methods: Sequence[str],
    seq_len: Sequence[int],
    model: str,
    chunk_size: int,
    fill_size: int | None,
    budget: int | None,
    rank: int,
    device: str,
    dtype: str | None,
    repeats: int,
    plot: Path | None,
    json: bool,
) -> None:
    """`minichunk bench`: print the table, or all samples as JSON. Raises InputError."""
    for method in methods:
        check_choice("methods", method, METHODS)
    check_choice("dtype", dtype, DTYPES)
    check_least({"seq_len": (min(seq_len), 2), "chunk_size": (chunk_size, 1), "budget": (budget, 1), "rank": (rank, 0)})
    check_least({"repeats": (repeats, 1)})
    check_fill_size(fill_size, chunk_size)
    shape(model)
    device = check_device(device)
    if plot is not None and new_figure(1, 1) is None:
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    cases = [
        Case(method, tokens, model, chunk_size, fill_size, budget or max(1, len(cut(tokens, chunk_size)) // 4), rank,
             device, dtype or default_dtype(device))
        for tokens in seq_len for method in methods
    ]  # fmt: skip
    rows = bench(cases, repeats, quiet=json)
    if plot is not None:
        draw(rows, plot)
    if json:
        results = [
            {"method": row.case.method, "seq_len": row.case.seq_len, "seconds": row.seconds,
             "peak_bytes": row.peak_bytes, "error": row.error}
            for row in rows
        ]  # fmt: skip
        command = " ".join(["minichunk", *sys.argv[1:]])
        print(dumps({"command": command, "machine": describe_machine(), "results": results}, indent=2))
    else:
        print(table(rows))
