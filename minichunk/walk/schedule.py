"""Who worked when: the schedule of a step on several ranks, from its log, and a drawing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .events import Event
from .merge import about, needed

KINDS = {"fill": "fill", "rebuild": "rebuild", "done": "backward"}  # of the event that ends it
HEIGHT = 0.74
COLORS = {"fill": "#4878b0", "rebuild": "#e0a030", "backward": "#4a9c5d"}


class Work(NamedTuple):
    """What a rank did to a chunk (to several, in a larger fill), and from when to when."""

    rank: int
    what: str
    chunks: tuple[int, ...]
    start: float
    stop: float


def schedule(log: Sequence[Event], equal: bool = False) -> list[Work]:
    """The work in a log of all ranks (see merge.py), in its order, in seconds from the beginning of the first.

    equal: as if every piece of work took one unit of time and every message none, in the order that the log has: which
        part of a rank's time is spent waiting is then a matter of the order alone.
    """
    works = equal_times(log) if equal else clock_times(log)
    begin = min((work.start for work in works), default=0.0)
    return [work._replace(start=work.start - begin, stop=work.stop - begin) for work in works]


def clock_times(log: Sequence[Event]) -> list[Work]:
    return [_work(event, event["time"] - event["took"], event["time"]) for event in log if _is_work(event)]


def equal_times(log: Sequence[Event]) -> list[Work]:
    works, free, ready, done = list[Work](), dict[int, float](), dict[int, float](), dict[Any, float]()
    ranks = len(log[0]["ranks"])
    for event in log:
        rank, kind = event.get("rank", 0), event["kind"]
        need = needed(event, rank, ranks)
        ready[rank] = max(ready.get(rank, 0.0), done.get(need, 0.0))
        if _is_work(event):
            start = max(free.get(rank, 0.0), ready.pop(rank))
            free[rank] = done[rank, kind, about(event)] = start + 1.0
            works.append(_work(event, start, start + 1.0))
    return works


def _is_work(event: Event) -> bool:
    """A chunk of which a rank learns nothing is done without a backward pass, in no time at all."""
    return event["kind"] in KINDS and event.get("took") != 0.0


def _work(event: Event, start: float, stop: float) -> Work:
    chunks = tuple(event["chunks"]) if "chunks" in event else (event["chunk"],)
    return Work(event["rank"], KINDS[event["kind"]], chunks, start, stop)


def draw_schedule(axes: Any, works: Sequence[Work]) -> None:
    """Ranks by time, on a matplotlib Axes: a box for each piece of work, with its chunk; what is blank is waiting."""
    ranks = 1 + max(work.rank for work in works)
    shortest = min(work.stop - work.start for work in works)
    for rank, what, chunks, start, stop in works:
        axes.barh(rank, stop - start, left=start, height=HEIGHT, color=COLORS[what], edgecolor="white", lw=1.2)
        name = str(chunks[0]) if len(chunks) == 1 else f"{chunks[0]}–{chunks[-1]}"
        axes.text((start + stop) / 2, rank, name, ha="center", va="center", color="white", weight="bold", fontsize=9)
    axes.set(yticks=range(ranks), yticklabels=[f"rank {rank}" for rank in range(ranks)], xlim=(-shortest / 4, None))
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
