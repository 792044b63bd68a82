"""`minichunk bench`: what each method costs in time and memory, side by side in one run."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .errors import InputError
from .files import replacing, write_json
from .measure import METHODS, Case
from .report import human_bytes

GIB = 1 << 30


@dataclass
class Result:
    """All samples of one case; a sample is what `measure` returned."""

    case: Case
    samples: list[dict[str, Any]]

    def values(self, key: str) -> list[float]:
        return [sample[key] for sample in self.samples if key in sample]

    def median(self, key: str) -> float | None:
        values = self.values(key)
        return statistics.median(values) if values else None

    def cell(self, key: str, show: Callable[[float], str]) -> str:
        """Median and range, or why there is none."""
        values = self.values(key)
        if not values:
            return "out of memory" if any(s.get("out_of_memory") for s in self.samples) else "failed"
        text = show(statistics.median(values))
        return text if min(values) == max(values) else f"{text} ({show(min(values))} to {show(max(values))})"


def cpu_cases() -> list[Case]:
    """Up to 4,096 tokens of the 47M model in float32."""
    cases = []
    for tokens in (1024, 2048, 4096):
        common = Case("full", tokens, 512)
        cases += [replace(common, method=m) for m in METHODS if "spaco" not in m]
        cases += [
            replace(common, method="spaco", budget=tokens // 512 // part) for part in (4, 2) if tokens // 512 >= part
        ]
    return [*cases, Case("seco", 4096, 256)]


def target_cases() -> list[Case]:
    """16,384 tokens, and the lengths between which the growth of memory is measured."""
    cases = [Case(method, tokens, 512) for tokens in (8192, 16384) for method in ("seco", "forward")]
    cases += [Case("spaco", 8192, 512, budget=4), Case("spaco", 16384, 512, budget=4)]
    return [*cases, Case("concatenating-seco", 16384, 512), Case("concatenating-spaco", 16384, 512, budget=4)]


def cuda_cases() -> list[Case]:
    """An 8B-shaped Llama in bfloat16 with LoRA under a cap of 24 GiB."""
    common = Case("seco", 16384, 512, model="llama-3-8b", dtype="bfloat16", device="cuda", rank=8, recompute=True)
    common = replace(common, memory_cap=24 * GIB)
    cases = [replace(common, tokens=tokens) for tokens in (1024, 4096, 16384, 28672)]
    cases += [replace(common, method="spaco", tokens=tokens, budget=8) for tokens in (16384, 53248)]
    cases += [replace(common, method=m, tokens=n) for m in ("full", "full-recompute") for n in (1024, 4096)]
    return [*cases, replace(common, method="forward"), replace(common, method="full-recompute")]


PRESETS: dict[str, tuple[Callable[[], list[Case]], int]] = {
    "cpu": (cpu_cases, 1),
    "targets": (lambda: [*cpu_cases(), *target_cases()], 1),
    "cuda": (cuda_cases, 1),
}


def bench(cases: Sequence[Case], repeats: int, output: Path, quiet: bool = False) -> list[Result]:
    """Measure every case `repeats` times, all of them once before any twice; write results and plots.

    Each measurement is a process of its own. Round r draws SpaCO's chunks with seed r, the same ones
    for every method. Raises InputError if the output cannot be written.
    """
    results = [Result(case, []) for case in cases]
    with tqdm(total=repeats * len(cases), desc="bench", unit="run", disable=quiet) as bar:
        for seed in range(repeats):
            for result in results:
                bar.set_postfix_str(f"{result.case.label}, {result.case.tokens:,} tokens")
                result.samples.append(_run(replace(result.case, seed=seed)))
                bar.update()
                _write(results, output)
    return results


def _run(case: Case) -> dict[str, Any]:
    command = [sys.executable, "-m", "minichunk.measure", json.dumps(asdict(case))]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode == 0:
        sample: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
        del sample["case"]
        return sample
    if process.returncode == -9:  # the kernel's out-of-memory killer
        return {"out_of_memory": True}
    return {"error": (process.stderr.strip().splitlines() or ["no message"])[-1]}


def _write(results: Sequence[Result], output: Path) -> None:
    rows = [{"case": asdict(r.case), "label": r.case.label, "samples": r.samples} for r in results]
    write_json(output, {"command": _command(), "machine": machine(), "results": rows})


def _command() -> str:
    return " ".join(["minichunk", *sys.argv[1:]])


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    found: dict[str, Any] = {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found |= {"python": platform.python_version(), "torch": torch.__version__, "system": platform.system()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def read_results(path: Path) -> list[Result]:
    """Read a results file. Raises InputError."""
    from .files import read_json

    try:
        return [Result(Case(**row["case"]), row["samples"]) for row in read_json(path)["results"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not a results file of minichunk bench: {error}") from None


def table(results: Sequence[Result]) -> str:
    """A Markdown table: a row per case, shortest sequences first; ratios to `full` at the same length."""
    lines = ["| tokens | chunk | method | seconds per step | / full | peak memory |", "|---:|---:|---|---:|---:|---:|"]
    full = {r.case.tokens: r.median("seconds") for r in results if r.case.method == "full"}
    for r in sorted(results, key=lambda r: r.case.tokens):
        seconds, whole = r.median("seconds"), full.get(r.case.tokens)
        ratio = f"{seconds / whole:.2f}" if seconds and whole else ""
        chunk = f"{r.case.chunk_size:,}" if r.case.method not in ("full", "full-recompute", "transformers") else ""
        cells = [f"{r.case.tokens:,}", chunk, r.case.label, r.cell("seconds", lambda x: f"{x:.2f}"), ratio]
        lines.append("| " + " | ".join([*cells, r.cell("peak_bytes", human_bytes)]) + " |")
    return "\n".join(lines)


def plot(results: Sequence[Result], path: Path) -> bool:
    """Draw time per step and peak memory against length; False if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    chunk_size = results[0].case.chunk_size
    lines: dict[str, list[Result]] = {}
    for r in sorted(results, key=lambda r: r.case.tokens):
        if r.case.chunk_size == chunk_size and r.median("seconds") is not None:
            part = (
                "" if r.case.budget is None else f", 1 of {r.case.tokens // r.case.chunk_size // r.case.budget} chunks"
            )
            lines.setdefault(r.case.method + part, []).append(r)
    for axes, key, scale, unit in ((panels[0], "seconds", 1, "seconds"), (panels[1], "peak_bytes", GIB, "GiB")):
        for name, points in lines.items():
            axes.plot([r.case.tokens for r in points], [(r.median(key) or 0) / scale for r in points], "o-", label=name)
        ticks = sorted({r.case.tokens for r in results})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(xlabel="tokens", ylabel=unit)
        axes.grid(alpha=0.3)
    panels[0].set_title("Time per step")
    panels[1].set_title("Peak memory of the process")
    panels[1].legend(fontsize=8, loc="upper left")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True


def run_bench(
    preset: str | None, device: str | None, repeats: int | None, output: Path | None, redraw: Path | None, json: bool
) -> None:
    """`minichunk bench`. Raises InputError."""
    from .options import check_device

    preset = preset or device or "cpu"
    if device not in (None, "cuda" if preset == "cuda" else "cpu"):
        raise InputError(f"--preset {preset} does not run on --device {device}")
    if repeats is not None and repeats < 1:
        raise InputError(f"--repeats is {repeats}, but must be at least 1")
    cases, default_repeats = PRESETS[preset]
    if redraw is not None:
        path, results = redraw, read_results(redraw)
    else:
        check_device("cuda" if preset == "cuda" else "cpu")
        path = output or Path(f"bench-{preset}.json")
        results = bench(cases(), repeats or default_repeats, path, quiet=json)
    drawn = plot(results, path.with_suffix(".png"))
    if json:
        print(path.read_text(), end="")
        return
    print(table(results))
    print(f"\nwritten  {path}" + (f" and {path.with_suffix('.png')}" if drawn else ""))
