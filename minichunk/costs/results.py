"""What `minichunk bench` found: read back, as a table, as ratios, and drawn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files.atomic import human_bytes, read_json
from ..files.figures import new_figure, save_figure
from .measure import Case

GIB = 1 << 30


@dataclass
class Result:
    """All samples of one case; a sample is what `measure` returned."""

    case: Case
    samples: list[dict[str, Any]]

    def values(self, key: str) -> list[float]:
        return [sample[key] for sample in self.samples if sample.get(key) is not None]

    def median(self, key: str) -> float | None:
        values = self.values(key)
        return statistics.median(values) if values else None

    def cell(self, key: str, show: Callable[[float], str]) -> str:
        """Median and range, or why there is none."""
        values = self.values(key)
        if not values:
            return "out of memory" if any(s.get("out_of_memory") for s in self.samples) else "failed"
        return spread(values, show)


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Median and range; one of them where they are shown alike."""
    low, middle, high = show(min(values)), show(statistics.median(values)), show(max(values))
    return middle if low == high else f"{middle} ({low} to {high})"


def read_results(path: Path) -> list[Result]:
    """Read a results file. Raises InputError."""
    try:
        return [Result(Case(**row["case"]), row["samples"]) for row in read_json(path)["results"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not a results file of minichunk bench: {error}") from None


def table(results: Sequence[Result]) -> str:
    """A Markdown table: a row per case, shortest sequences first; ratios to `full` at the same length."""
    counted = any(r.values("peak_operations_per_second") for r in results)
    lines = ["| tokens | chunk | method | seconds per step | / full | peak memory |", "|---:|---:|---|---:|---:|---:|"]
    if counted:
        lines = [lines[0] + " tokens/s | share of the peak |", lines[1] + "---:|---:|"]
    full = {r.case.tokens: r.median("seconds") for r in results if r.case.method == "full"}
    for r in sorted(results, key=lambda r: r.case.tokens):
        seconds, whole = r.median("seconds"), full.get(r.case.tokens)
        ratio = f"{seconds / whole:.2f}" if seconds and whole else ""
        chunk = f"{r.case.chunk_size:,}" if not r.case.method.startswith(("full", "transformers")) else ""
        cells = [f"{r.case.tokens:,}", chunk, r.case.label, r.cell("seconds", lambda x: f"{x:.2f}"), ratio]
        cells.append(r.cell("peak_bytes", human_bytes))
        if counted:
            speed, peak = r.median("operations_per_second"), r.median("peak_operations_per_second")
            cells += [
                f"{r.case.tokens / seconds:,.0f}" if seconds else "",
                f"{speed / peak:.0%}" if speed and peak else "",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios(results: Sequence[Result]) -> str:
    """The comparisons that matter, as a Markdown table, of those cases that were measured; may be empty."""
    found = {(r.case.method, r.case.tokens, r.case.chunk_size): r for r in results}
    lines = []
    for method, other, tokens in (
        ("seco", "full", 4096),
        ("seco", "concatenating-seco", 16384),
        ("spaco", "concatenating-spaco", 16384),
        ("spaco", "forward", 16384),
    ):
        a, b = (found.get((m, tokens, 512)) for m in (method, other))
        if a and b and (pairs := list(zip(a.values("seconds"), b.values("seconds"), strict=False))):
            each = [x / y for x, y in pairs]
            spread = f" ({min(each):.2f} to {max(each):.2f})" if len(each) > 1 else ""
            what = f"{a.case.label} / {b.case.label}, {tokens:,} tokens"
            lines.append(f"| time, {what} | {statistics.median(each):.2f}{spread} |")
    for method in ("seco", "spaco"):
        a, b = (found.get((method, tokens, 512)) for tokens in (8192, 16384))
        if a and b and a.values("peak_bytes") and b.values("peak_bytes"):
            peaks = zip(a.values("peak_bytes"), b.values("peak_bytes"), strict=False)
            caches = zip(a.values("cache_bytes"), b.values("cache_bytes"), strict=False)
            each = [(y - x) / (v - u) for (x, y), (u, v) in zip(peaks, caches, strict=False)]
            lines.append(f"| growth of the peak / growth of the cache, {method}, 8,192 to 16,384 tokens "
                         f"| {statistics.median(each):.2f} |")  # fmt: skip
    return "\n".join(["| what | median (range) |", "|---|---:|", *lines]) if lines else ""


def plot(results: Sequence[Result], path: Path) -> bool:
    """Draw time per step and peak memory against length; False if matplotlib is not installed."""
    figure = new_figure(11, 5)
    if figure is None:
        return False
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
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5)
    save_figure(figure, path)
    return True
