"""`minichunk bench`: time and peak memory of a training step, a row for each length and method."""

import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import product
from json import dumps
from multiprocessing import get_context
from pathlib import Path
from statistics import median
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
from ..training.evaluate import new_figure, save_figure
from ..training.options import DTYPES, StepOptions, changed, check_device, check_options, default_dtype, option
from ..training.run_directory import peak_memory
from .baselines import tiled_full
from .setting import Setting

CHUNKED = tuple(map("".join, product(("seco", "spaco"), ("", "-blocks"), ("", "-recompute"), ("", "-offload"))))
METHODS = ("full", "full-recompute", "full-recompute-tiled", "full-recompute-offload", *CHUNKED)
SHOWN = ("full", "full-recompute", "full-recompute-offload", "seco", "spaco")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Measure what each method costs.

    Time and peak memory of one training step by each method at each length, and both relative to the
    first method. Weights and tokens are random; every measurement is a process of its own.

    full-recompute is gradient checkpointing; -tiled with the loss in tiles; -offload also with the
    layers' inputs in host memory. Of seco and spaco, see --recompute, --offload and, with -blocks,
    --layers-at-once of train.

      minichunk bench --methods full-recompute seco seco-recompute --seq-len 4096 16384 --plot bench.png
      minichunk bench --device cuda --model llama-3-8b --rank 8 --methods full-recompute-offload seco-recompute"""

    methods: tuple[str, ...] = option(SHOWN, f"of {', '.join(METHODS)}", metavar="M", choices=METHODS)
    seq_len: tuple[int, ...] = option((1024, 2048, 4096), "tokens", metavar="N", least=2)
    model: str = changed(Setting, "model", default="llama-47m", group="")
    chunk_size: int = changed(Setting, "chunk_size")
    layers_at_once: int = option(4, "layers in a block, of -blocks", metavar="N", least=1)
    fill_size: int | None = changed(Setting, "fill_size")
    budget: int | None = changed(StepOptions, "budget", help="spaco: chunks kept")
    rank: int = changed(Setting, "rank", default=0, group="")
    dtype: str | None = changed(Setting, "dtype", default=None, absent="bfloat16 on CUDA, else float32")
    device: str = option("cpu", "cpu, cuda or cuda:N")
    repeats: int = option(2, "measurements of each", metavar="N", least=1)
    plot: str | None = option(None, "draw time and memory against the length, as a PNG", metavar="FILE")
    json: bool = option(False, "print all samples as one JSON object")


@dataclass
class Row:
    """The samples of a method at a length, one for each repeat; or why there are none."""

    method: str
    seq_len: int
    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    error: str | None = None


def measure(options: BenchOptions, method: str, seq_len: int, seed: int = 0) -> tuple[float, int, float]:
    """Run a step after a short warm-up; returns its seconds, `peak_memory`, and the loss. seed: of SpaCO's draw."""
    torch.manual_seed(0)
    model = random_model(options.model, DTYPES[options.dtype or "float32"], options.rank, device=options.device)
    ids = torch.randint(model.lm_head.weight.shape[0], (1, seq_len)).to(options.device)
    run_step(model, options, method, ids[:, : 2 * min(options.chunk_size, 64)], seed)
    model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    loss = run_step(model, options, method, ids, seed)
    return time.perf_counter() - began, peak_memory(ids.device), loss


def run_step(model: Any, options: BenchOptions, method: str, ids: Tensor, seed: int) -> float:
    """Add to the gradients by this method, of token ids (1, T). Returns the loss, when the device has done it all."""
    name, *words = method.split("-")
    told: dict[str, Any] = {"recompute": "recompute" in words}
    if name == "spaco":
        budget = options.budget or max(1, len(cut(ids.shape[1], options.chunk_size)) // 4)
        told |= {"sampler": FixedBudget(budget), "generator": torch.Generator().manual_seed(seed)}
    if name != "full":
        blocks = options.layers_at_once if "blocks" in words else None
        told |= {"fill_size": options.fill_size, "offload": "offload" in words, "layers_at_once": blocks}
        loss = (seco if name == "seco" else spaco)(model, ids, ids, options.chunk_size, **told)
    elif {*words} & {"tiled", "offload"}:
        loss = tiled_full(model, prepare(model, ids, ids, None), offload="offload" in words)
    else:
        loss = full(model, ids, ids, **told)
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return float(loss)


def bench(options: BenchOptions) -> list[Row]:
    """Measure each method at each length, all of them once before any twice; each time in a process of its own.
    So the memory of one does not count for another. Repeat r draws SpaCO's chunks with seed r. What fails is not
    repeated. Raises InputError."""
    check_options(options)
    check_fill_size(options.fill_size, options.chunk_size)
    shape(options.model)
    device = check_device(options.device)
    options = replace(options, device=device, dtype=options.dtype or default_dtype(device))
    rows = [Row(method, seq_len) for seq_len in options.seq_len for method in options.methods]
    bar = tqdm(list(product(range(options.repeats), rows)), "bench", leave=False, disable=options.json)
    for seed, row in bar:
        bar.set_postfix_str(f"{row.method}, {row.seq_len:,} tokens")
        if row.error is not None:
            continue
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            try:
                seconds, peak, _ = process.submit(measure, options, row.method, row.seq_len, seed).result()
                row.seconds.append(seconds)
                row.peak_bytes.append(peak)
            except (BrokenProcessPool, torch.OutOfMemoryError):  # the kernel ends a process that takes too much
                row.error = "out of memory"
            except Exception as error:
                row.error = f"{type(error).__name__}: {error}".splitlines()[0]
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: the median and, of several repeats, the range; relative to the first method of the same length."""
    first = rows[0].method
    lines = [f"| tokens | method | seconds | / {first} | peak memory | / {first} |", "|---:|---|---:|---:|---:|---:|"]
    for row in rows:
        beside = next(r for r in rows if r.seq_len == row.seq_len)
        cells = [row.error or "", "", "", ""]
        if row.error is None:
            cells = _cells(row.seconds, beside.seconds, lambda x: f"{x:.2f}")
            cells += _cells(row.peak_bytes, beside.peak_bytes, human_bytes)
        lines.append(f"| {row.seq_len:,} | {row.method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(values: Sequence[float], first: Sequence[float], show: Callable[[float], str]) -> list[str]:
    """Median and range, the median alone where they are shown alike; and the median relative to the first method's."""
    low, middle, high = show(min(values)), show(median(values)), show(max(values))
    spread = middle if low == high else f"{middle} ({low} to {high})"
    return [spread, f"{median(values) / median(first):.2f}" if first else ""]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw time and peak memory against the length, a line for each method."""
    figure, lengths = new_figure(11, 5), sorted({row.seq_len for row in rows})
    panels = figure.subplots(1, 2)
    for axes, name, unit in zip(panels, ("seconds", "peak_bytes"), (1, 2**30), strict=True):
        for method in dict.fromkeys(row.method for row in rows):
            points = [row for row in rows if row.method == method and row.error is None]
            heights = [median(getattr(row, name)) / unit for row in points]
            axes.semilogx([row.seq_len for row in points], heights, "o-", base=2, label=method)
        axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
        axes.set(xlabel="tokens", title="Seconds of a step" if unit == 1 else "Peak memory, GiB", ylim=(0, None))
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5)
    save_figure(figure, path)


def describe_machine() -> dict[str, Any]:
    """What the figures are measured on."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    gpu, threads = torch.cuda.get_device_name() if torch.cuda.is_available() else None, torch.get_num_threads()
    return {"cpu": cpu[1] if cpu else platform.machine(), "threads": threads, "gpu": gpu, "torch": torch.__version__}


def run_bench(options: BenchOptions) -> None:
    """`minichunk bench`: print the table, or all samples as JSON. Raises InputError."""
    if options.plot is not None and new_figure(1, 1) is None:
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    rows = bench(options)
    if options.plot is not None:
        draw(rows, Path(options.plot))
    if not options.json:
        print(table(rows))
        return
    command = " ".join(["minichunk", *sys.argv[1:]])
    print(dumps({"command": command, "machine": describe_machine(), "results": [vars(row) for row in rows]}, indent=2))
