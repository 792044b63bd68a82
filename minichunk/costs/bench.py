"""`minichunk bench`: what each method costs in time and memory, side by side in one run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..errors import InputError
from ..files.atomic import read_json, write_json
from . import pipelined, positions, shares
from .forecast import forecast
from .machine import command, machine
from .measure import METHODS, Case
from .results import GIB, Result, plot, ratios, read_results, table
from .setting import Setting
from .sums import chunk_table, in_words, plot_curves, read_curves, sum_table


def cpu_cases() -> list[Case]:
    """Up to 4,096 tokens of the 47M model in float32."""
    cases = []
    for tokens in (1024, 2048, 4096):
        methods = [m for m in METHODS if "concatenating" not in m and m != "seco-parts"]
        methods += ["concatenating-seco"] if tokens == 4096 else []
        cases += [Case(method, tokens, 512) for method in methods if method != "spaco"]
        cases += [Case("spaco", tokens, 512, budget=tokens // 512 // part) for part in (4, 2) if tokens // 512 >= part]
    return cases + [Case("seco", 2048, chunk_size) for chunk_size in (64, 128, 256, 1024)]


def target_cases() -> list[Case]:
    """16,384 tokens, and the lengths between which the growth of memory is measured."""
    cases = [Case(method, tokens, 512) for tokens in (8192, 16384) for method in ("seco", "forward")]
    cases += [Case("spaco", 8192, 512, budget=4), Case("spaco", 16384, 512, budget=4)]
    return [*cases, Case("concatenating-seco", 16384, 512), Case("concatenating-spaco", 16384, 512, budget=4)]


def cuda_cases() -> list[Case]:
    """An 8B-shaped Llama in bfloat16 with LoRA under a cap of 24 GiB, the host's memory for 128K tokens."""
    common = Case("seco", 16384, 512, model="llama-3-8b", dtype="bfloat16", device="cuda", rank=8, recompute=True)
    common = replace(common, memory_cap=24 * GIB, cache_grad_dtype="bfloat16", fill_size=2048)
    longest = forecast(Setting(cache_grad_dtype=torch.bfloat16)).longest(23 * GIB, 512)
    cases = [replace(common, tokens=tokens) for tokens in (1024, 4096, 16384, 28672, longest)]
    cases += [replace(common, method="spaco", tokens=tokens, budget=8) for tokens in (16384, 53248)]
    cases += [replace(common, method=m, tokens=n) for m in ("full", "full-recompute") for n in (1024, 4096)]
    cases += [replace(common, method=f"full-recompute{which}") for which in ("", "-tiled", "-offload")]
    cases += [replace(common, method="forward")]
    cases += [replace(common, tokens=16384, offload=True, chunk_size=size) for size in (512, 1024, 2048)]
    cases += [replace(common, tokens=16384, chunk_size=size) for size in (1024, 2048)]
    return [*cases, replace(common, method="seco-parts", tokens=131072, chunk_size=2048, offload=True)]


PRESETS: dict[str, tuple[Callable[[], list[Case]], int]] = {
    "cpu": (cpu_cases, 2),
    "targets": (lambda: [*cpu_cases(), *target_cases()], 2),
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
    command = [sys.executable, "-m", "minichunk.costs.measure", json.dumps(asdict(case))]
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
    write_json(output, {"command": command(), "machine": machine(), "results": rows})


def run_bench(
    preset: str | None, device: str | None, repeats: int | None, output: Path | None, redraw: Path | None, json: bool
) -> None:
    """`minichunk bench`. Raises InputError."""
    from ..training.checks import check_device

    preset = preset or device or "cpu"
    if device not in (None, "cuda" if preset == "cuda" else "cpu"):
        raise InputError(f"--preset {preset} does not run on --device {device}")
    if repeats is not None and repeats < 1:
        raise InputError(f"--repeats is {repeats}, but must be at least 1")
    path = redraw or output or Path(f"bench-{preset}.json")
    if redraw is None:
        check_device("cuda" if preset == "cuda" else "cpu")
        if preset in OWN:
            measure, default_repeats, _ = OWN[preset]
            measure(path, repeats or default_repeats, quiet=json)
        else:
            cases, default_repeats = PRESETS[preset]
            bench(cases(), repeats or default_repeats, path, quiet=json)
    written_by = str(read_json(path).get("preset"))
    drawn, shown = (OWN[written_by][2] if written_by in OWN else _show)(path)
    if json:
        print(path.read_text(), end="")
        return
    print("\n\n".join(shown))
    print(f"\nwritten  {path}" + (f" and {path.with_suffix('.png')}" if drawn else ""))


def _show(path: Path) -> tuple[bool, list[str]]:
    """Draw the plot of a results file, if that can be; and what to print of it."""
    results = read_results(path)
    return plot(results, path.with_suffix(".png")), [text for text in (table(results), ratios(results)) if text]


def _show_positions(path: Path) -> tuple[bool, list[str]]:
    curves = read_curves(path)
    shown = ["milliseconds of a chunk, and of a token", chunk_table(curves), sum_table(curves), in_words(curves)]
    return plot_curves(curves, path.with_suffix(".png")), shown


def _show_ranks(path: Path) -> tuple[bool, list[str]]:
    found = shares.read_shares(path)
    shown = ["seconds of a step", shares.time_table(found)]
    shown += ["live tensors at their peak (and the process)", shares.memory_table(found), shares.in_words(found)]
    return shares.plot_shares(found, path.with_suffix(".png")), shown


# Presets that measure something else than one case after the other: how, how often, and what to show of it.
OWN: dict[str, tuple[Callable[..., None], int, Callable[[Path], tuple[bool, list[str]]]]] = {
    "partial": (positions.measure_positions, positions.REPEATS, _show_positions),
    "pipeline": (pipelined.measure_ranks, pipelined.REPEATS, _show_ranks),
}
