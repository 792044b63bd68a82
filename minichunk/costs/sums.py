"""What positions.py has measured, made into whole steps: by straight lines between measured chunks, because what
attention costs is a straight line in the position; beyond the last one by the line through it and the middle one, which
are far enough apart that what disturbs a measurement weighs little.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files.atomic import read_json
from ..files.figures import new_figure, save_figure

Line = dict[int, float]  # seconds by position
LENGTHS = (4096, 16384, 32768, 131072)
SUMS = {"SeCO step": LENGTHS, "prefill": LENGTHS, "decoding a token after": LENGTHS}
COLORS = {"window": "#4878b0", "strided": "#d95f4b"}


def at(line: Line, position: float) -> float:
    """Seconds at that position."""
    positions = sorted(line)
    i = bisect(positions, position)
    a, b = positions[i - 1 : i + 1] if i < len(positions) else (positions[(i - 1) // 2], positions[-1])
    return line[a] + (line[b] - line[a]) * (position - a) / (b - a)


@dataclass
class Curves:
    """The fastest of all repeats, by what was timed and in which model."""

    chunk_size: int
    lines: dict[str, dict[str, Line]]

    @property
    def hybrids(self) -> list[str]:
        return [which for which in self.lines["fill"] if which != "full"]

    @property
    def last(self) -> int:
        """The length up to which a step consists of measured chunks and of those between them."""
        return max(self.lines["fill"]["full"])

    def seconds(self, what: str, which: str, tokens: int) -> float:
        """Of a SeCO step of so many tokens, of their prefill, or of a token after them."""
        starts = range(0, tokens, self.chunk_size)
        of = {kind: lines[which] for kind, lines in self.lines.items()}
        if what == "SeCO step":  # the fill stops before the last chunk
            return sum(at(of["fill"], p) for p in starts[:-1]) + sum(at(of["rebuild"], p) for p in starts)
        if what == "prefill":
            return sum(at(of["prefill"], p) for p in starts)
        return at(of["decode"], tokens)

    def times_as_fast(self, what: str, which: str, tokens: int) -> float:
        """As with full attention."""
        return self.seconds(what, "full", tokens) / self.seconds(what, which, tokens)

    def break_even(self, what: str, which: str) -> int | None:
        """The shortest of the measured lengths, in whole chunks, from which on it is faster."""
        slower = 0
        for tokens in range(self.chunk_size, self.last + 1, self.chunk_size):
            if self.times_as_fast(what, which, tokens) <= 1:
                slower = tokens
        return slower + self.chunk_size if slower < self.last else None


def read_curves(path: Path) -> Curves:
    """Read a results file. Raises InputError."""
    found: dict[str, dict[str, Line]] = {}
    try:
        results = read_json(path)
        for row in results["results"]:
            line = found.setdefault(row["what"], {}).setdefault(row["layers"], {})
            line[row["position"]] = min(row["seconds"])
        for lines in found.values():  # where there is no past, all do the same work
            first = min(line[0] for line in lines.values())
            for line in lines.values():
                line[0] = first
        return Curves(results["chunk_size"], found)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a results file of minichunk bench --preset partial: {error}") from None


def chunk_table(curves: Curves) -> str:
    """A Markdown table: what was measured, in milliseconds."""
    columns = [(what, which) for what in curves.lines for which in curves.lines[what]]
    lines = ["| position | " + " | ".join(f"{what}, {which}" for what, which in columns) + " |"]
    lines += ["|---:|" + "---:|" * len(columns)]
    for position in sorted(curves.lines["fill"]["full"]):
        cells = [f"{curves.lines[what][which][position] * 1000:,.0f}" for what, which in columns]
        lines.append(f"| {position:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sum_table(curves: Curves) -> str:
    """A Markdown table: seconds with full attention, and how many times as fast the hybrids are."""
    lines = ["| | full | " + " | ".join(curves.hybrids) + " |", "|---|---:|" + "---:|" * len(curves.hybrids)]
    for what, lengths in SUMS.items():
        for tokens in lengths:
            far = " *" if tokens > curves.last else ""
            ratios = [f"{curves.times_as_fast(what, which, tokens):.2f}" for which in curves.hybrids]
            cells = [f"{what} {tokens:,}{far}", _time(curves.seconds(what, "full", tokens)), *ratios]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s" if seconds < 100 else f"{seconds:,.0f} s"


def in_words(curves: Curves) -> str:
    """From which length on the hybrids are faster."""
    said = []
    for which in curves.hybrids:
        found = [(what, curves.break_even(what, which)) for what in SUMS]
        parts = [f"{what} from {n:,} tokens on" if n else f"{what} never" for what, n in found]
        said.append(f"{which}: faster than full attention in {', '.join(parts)}")
    return "\n".join([*said, f"* beyond {curves.last:,}: not measured, but on a straight line through what was"])


def plot_curves(curves: Curves, path: Path) -> bool:
    """Draw a chunk's time against its position, and how many times as fast; False if matplotlib is not installed."""
    figure = new_figure(11, 4.6)
    if figure is None:
        return False
    chunks, ratios = figure.subplots(1, 2)
    for what, style in (("rebuild", "o-"), ("fill", "o--")):
        for which, line in curves.lines[what].items():
            label = f"{which}, {'rebuild and backward' if what == 'rebuild' else what}"
            chunks.plot(list(line), list(line.values()), style, ms=4, color=COLORS.get(which, "gray"), label=label)
    chunks.set(xlabel="position of the chunk", ylabel="seconds", ylim=(0, None))
    chunks.set_title(f"Time of a chunk of {curves.chunk_size:,}")
    _draw_ratios(ratios, curves)
    for axes in (chunks, ratios):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    save_figure(figure, path)
    return True


def _draw_ratios(axes: Any, curves: Curves) -> None:
    lengths: Sequence[int] = [curves.chunk_size << i for i in range(20) if curves.chunk_size << i <= 131072]
    for which in curves.hybrids:
        for (what, _), style in zip(SUMS.items(), ("-", "--", ":"), strict=True):
            drawn = [curves.times_as_fast(what, which, tokens) for tokens in lengths]
            axes.plot(lengths, drawn, style, color=COLORS.get(which), label=f"{which}, {what.replace(' after', '')}")
    axes.axvspan(curves.last, lengths[-1], color="gray", alpha=0.1, lw=0, label="not measured, by straight lines")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths[::2], [f"{tokens:,}" for tokens in lengths[::2]])
    axes.set(xlabel="tokens", ylabel="times as fast")
    axes.set_title("A hybrid beside full attention")
