"""What pipelined.py has measured: which share of one process's time and memory a rank takes, and how long it waits."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files.atomic import human_bytes, read_json
from ..files.figures import new_figure, save_figure
from .results import spread

MIB = 1 << 20


class Process(NamedTuple):
    """One rank of so many."""

    ranks: int
    rank: int


ALONE = Process(1, 0)


@dataclass
class Shares:
    """rounds: by the number of chunks and of ranks, for each round what each of the ranks has found."""

    chunk_size: int
    ranks: int
    rounds: dict[tuple[int, int], list[list[dict[str, Any]]]]

    @property
    def lengths(self) -> list[int]:
        """In chunks, those that have been measured both ways."""
        return sorted({n for n, _ in self.rounds if {(n, 1), (n, self.ranks)} <= self.rounds.keys()})

    @property
    def processes(self) -> list[Process]:
        return [ALONE, *(Process(self.ranks, rank) for rank in range(self.ranks))]

    def name(self, process: Process) -> str:
        if process == ALONE:
            return "one process"
        return f"rank {process.rank}, layers: {self.values('layers', self.lengths[0], process)[0]}"

    def values(self, key: str, chunks: int, process: Process) -> list[float]:
        """What it has found, in each round."""
        return [found[process.rank][key] for found in self.rounds[chunks, process.ranks]]

    def median(self, key: str, chunks: int, process: Process) -> float:
        return statistics.median(self.values(key, chunks, process))

    def seconds(self, chunks: int, ranks: int) -> list[float]:
        """Of the slowest rank, in each round."""
        return [max(rank["seconds"] for rank in found) for found in self.rounds[chunks, ranks]]

    def ratios(self, chunks: int) -> list[float]:
        """Of the time on several ranks to that in one process, in the same round."""
        pairs = zip(self.seconds(chunks, self.ranks), self.seconds(chunks, 1), strict=False)
        return [several / one for several, one in pairs]

    def waits(self, chunks: int) -> list[float]:
        """Which part of its walk the first rank waits, in each round."""
        both = (self.values(key, chunks, Process(self.ranks, 0)) for key in ("waited", "walk"))
        return [waited / walk for waited, walk in zip(*both, strict=True)]

    def bubble(self, chunks: int) -> float:
        """Which part of its walk the first rank has to wait if all ranks compute as long as each other."""
        return (self.ranks - 1) / (chunks + self.ranks - 1)

    def counted(self, chunks: int, process: Process) -> int:
        """Bytes of live tensors at their peak: the same in each round, so that they are counted in the first."""
        found: int = self.rounds[chunks, process.ranks][0][process.rank]["counted_bytes"]
        return found

    def growth(self, process: Process) -> int:
        """Of those bytes, from the shortest to the longest sequence."""
        return self.counted(self.lengths[-1], process) - self.counted(self.lengths[0], process)


def read_shares(path: Path) -> Shares:
    """Read a results file. Raises InputError."""
    try:
        results = read_json(path)
        rounds = {(row["chunks"], row["ranks"]): row["rounds"] for row in results["results"] if row["rounds"]}
        shares = Shares(results["chunk_size"], results["ranks"], rounds)
        time_table(shares), memory_table(shares), in_words(shares)
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path} is not a results file of minichunk bench --preset pipeline: {error}") from None
    return shares


def time_table(shares: Shares) -> str:
    """A Markdown table: the slowest rank's seconds, and how long the first one waits; median and range."""
    lines = [
        f"| tokens | chunks | one process | {shares.ranks} ranks | of one process | rank 0 waits, of its walk "
        "| by the formula |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for chunks in shares.lengths:
        seconds = [spread(shares.seconds(chunks, ranks), "{:.2f} s".format) for ranks in (1, shares.ranks)]
        cells = [*_length(shares, chunks), *seconds, spread(shares.ratios(chunks), "{:.2f}".format)]
        cells += [spread(shares.waits(chunks), "{:.0%}".format), f"{shares.bubble(chunks):.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_table(shares: Shares) -> str:
    """A Markdown table: live tensors at their peak and, in brackets, the process; and how the former grow."""
    lines = ["| tokens | chunks | " + " | ".join(map(shares.name, shares.processes)) + " |"]
    lines += ["|---:|---:|" + "---:|" * len(shares.processes)]
    for chunks in shares.lengths:
        cells = _length(shares, chunks)
        for process in shares.processes:
            whole = shares.median("peak_bytes", chunks, process)
            cells.append(f"{human_bytes(shares.counted(chunks, process))} ({human_bytes(whole)})")
        lines.append("| " + " | ".join(cells) + " |")
    if one := shares.growth(ALONE):
        grown = [f"{human_bytes(g)}, {g / one:.2f} of it" for g in map(shares.growth, shares.processes[1:])]
        lines.append("| growth | | " + " | ".join([human_bytes(one), *grown]) + " |")
    return "\n".join(lines)


def _length(shares: Shares, chunks: int) -> list[str]:
    return [f"{chunks * shares.chunk_size:,}", f"{chunks}"]


def in_words(shares: Shares) -> str:
    """What each rank does in its walk over the longest sequence."""
    said, longest = [], shares.lengths[-1]
    for process in shares.processes[1:]:
        walk, waited = (shares.median(key, longest, process) for key in ("walk", "waited"))
        said.append(f"rank {process.rank} computes for {walk - waited:.1f} s and waits for {waited:.1f} s")
    return f"in the walk over {longest} chunks " + "; ".join(said)


def plot_shares(shares: Shares, path: Path) -> bool:
    """Draw time and memory against length, for one process and the ranks; False if matplotlib is not installed."""
    figure = new_figure(11, 4.6)
    if figure is None:
        return False
    time, memory = figure.subplots(1, 2)
    tokens = [chunks * shares.chunk_size for chunks in shares.lengths]
    for ranks, name in ((1, "one process"), (shares.ranks, f"{shares.ranks} ranks")):
        seconds = [statistics.median(shares.seconds(chunks, ranks)) for chunks in shares.lengths]
        time.plot(tokens, seconds, "o-", label=name)
    for process in shares.processes:
        counted = [shares.counted(chunks, process) / MIB for chunks in shares.lengths]
        memory.plot(tokens, counted, "s--" if process.rank else "o-", label=shares.name(process))
    time.set(ylabel="seconds", title="Time of a step")
    memory.set(ylabel="MiB", title="Live tensors at their peak")
    for axes in (time, memory):
        axes.set(xlabel="tokens", ylim=(0, None))
        axes.set_xticks(tokens, [f"{length:,}" for length in tokens])
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    save_figure(figure, path)
    return True
