"""One log of the logs of all ranks of a pipeline."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import InputError
from .events import Event

Log = Sequence[Event]


def merge(logs: Sequence[Log]) -> list[Event]:
    """The logs of all ranks of one step, in any order, as one log, in which events have the `rank` that they are of.

    It has one `begin` and one `end`, without a rank: there the parameters are those of all ranks. So is
    `gradient_norm` everywhere. `time` counts from the beginning of the step. Raises InputError where logs are missing,
    or not of one step.
    """
    logs = whole(logs)
    begins, ends = [log[0] for log in logs], [log[-1] for log in logs]
    start = min((begin["time"] for begin in begins if "time" in begin), default=0.0)
    kinds = [event.get("remembers") for log in logs for event in log if event["kind"] == "memory"]
    remembers = [next(filter(None, layer), None) for layer in zip(*filter(None, kinds), strict=True)]
    parameters = {"parameters": sum(x["parameters"] for x in begins)} if all("parameters" in x for x in begins) else {}
    merged: list[Event] = [{**begins[0], "ranks": [begin["ranks"][begin["rank"]] for begin in begins], **parameters}]
    norms = dict.fromkeys(range(len(logs)), 0.0)
    for rank, event in in_order(logs):
        if event["kind"] in ("begin", "end") or (event["kind"] == "draw" and rank):
            continue
        event = {**event, "rank": rank}
        if "gradient_norm" in event:
            norms[rank] = event["gradient_norm"]
            event["gradient_norm"] = math.hypot(*norms.values())
        if event["kind"] == "memory" and remembers:
            event["remembers"] = remembers
        merged.append(event)
    merged.append(dict(ends[0]))
    if all("gradient_norm" in end for end in ends):
        merged[-1]["gradient_norm"] = math.hypot(*(end["gradient_norm"] for end in ends))
    del merged[0]["rank"], merged[-1]["rank"]
    for number, event in enumerate(merged):
        event["step"] = number
        if "time" in event:
            event["time"] = round(event["time"] - start, 6)
    return merged


def whole(logs: Sequence[Log]) -> list[Log]:
    """These logs, the first rank's first. Raises InputError unless they are those of all ranks of one step."""
    begins = [log[0] for log in logs]
    if not all(isinstance(begin.get("rank"), int) and isinstance(begin.get("ranks"), list) for begin in begins):
        raise InputError("a log of one rank of several must have the number 'rank' and the list 'ranks' in its 'begin'")
    for name in ("method", "chunks", "layers"):
        if any(begin[name] != begins[0][name] for begin in begins):
            raise InputError(f"the logs of the ranks are of different steps: their {name!r} differ")
    found, wanted = sorted(begin["rank"] for begin in begins), list(range(len(begins[0]["ranks"])))
    if found != wanted:
        raise InputError(f"there are the logs of the ranks {found}, but must be those of {wanted}, one of each")
    if not all(
        len(begin["ranks"]) == len(logs) and isinstance(begin["ranks"][begin["rank"]], list) for begin in begins
    ):
        raise InputError(
            "'ranks' must have an entry for each rank, and [first layer, behind the last] for the log's own"
        )
    if any(log[-1]["kind"] != "end" for log in logs):
        raise InputError("the log of a rank has no 'end': the step has failed")
    return sorted(logs, key=lambda log: log[0]["rank"])


def in_order(logs: Sequence[Log]) -> Iterator[tuple[int, Event]]:
    """(rank, event) of all logs, the first rank's first: each after what it needed from its neighbours, and of those
    that may come next the earliest by their clocks, which need not agree.

    Raises InputError if none may come next.
    """
    left, done = [deque(log) for log in logs], set[Any]()
    while any(left):
        ready = [
            (log[0].get("time", 0.0), rank)
            for rank, log in enumerate(left)
            if log and ((need := needed(log[0], rank, len(left))) is None or need in done)
        ]
        if not ready:
            raise InputError("the logs of the ranks are of different steps: each waits for another")
        _, rank = min(ready)
        event = left[rank].popleft()
        done.add((rank, event["kind"], about(event)))
        yield rank, event


def needed(event: Event, rank: int, ranks: int) -> tuple[int, str, Any] | None:
    """What must have happened on another rank before: (rank, kind, chunks). A hidden state has come up from it, or the
    gradient of one down."""
    if event["kind"] in ("fill", "rebuild") and rank > 0:
        return rank - 1, event["kind"], about(event)
    if event["kind"] == "relay" and rank < ranks - 1:
        return rank + 1, "done", about(event)
    return None


def about(event: Event) -> Any:
    """Of which chunk or chunks it is."""
    return tuple(event["chunks"]) if event["kind"] == "fill" else event.get("chunk")
