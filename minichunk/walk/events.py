"""The event log: one training step, written down as it happens. `trace` writes it, a port may, the page shows it.
tutorials/walk.md describes every kind of event and every field. An event is a JSON object; a file has one to a line."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files.atomic import json_lines, write_text

Event = dict[str, Any]
FORMAT = "minichunk trace 1"
NEEDS = {
    "begin": ("format", "method", "chunks", "layers"), "draw": ("entries",), "memory": (),
    "fill": ("chunks", "written"), "rebuild": ("chunk", "written"), "forward": ("chunk",), "loss": ("chunk", "loss"),
    "relay": ("chunk", "received"), "backward": ("chunk", "layer", "sent"), "done": ("chunk",),
    "keep": ("chunks", "layer", "norms"), "end": ("loss",),
}  # fmt: skip
BYTES = ("weights", "gradients", "memory", "memory_gradients", "activations")


def write_events(path: str | Path, events: Iterable[Event]) -> None:
    write_text(path, "".join(json.dumps(event) + "\n" for event in events))


def read_events(path: str | Path) -> list[Event]:
    """Read a log. Raises InputError, naming file and line, for an event without what the page needs of it."""
    events: list[Event] = []
    for where, event in json_lines(path, Path(path).read_text(encoding="utf-8", errors="replace")):
        try:
            check_event(event, events[0] if events else event)
        except (TypeError, ValueError, LookupError, AttributeError) as error:  # of another type than events.py says
            raise InputError(f"{where}: {error}") from None
        events.append(event)
    if not events:
        raise InputError(f"{path} holds no event")
    return events


def check_event(event: Event, begin: Event) -> None:
    """Raise InputError unless it has the fields of its kind; its chunks and layers must be among those of `begin`."""
    kind = event.get("kind")
    if kind not in NEEDS or (event is begin) != (kind == "begin"):
        raise InputError(f"the kind {kind!r} is none of {', '.join(NEEDS)}, of which 'begin' comes first, and once")
    if missing := [name for name in NEEDS[kind] if name not in event]:
        raise InputError(f"{kind!r} needs the field {missing[0]!r}")
    if begin["format"] != FORMAT:
        raise InputError(f"the format is {begin['format']!r}, but must be {FORMAT!r}")
    num_chunks, num_layers = len(begin["chunks"]), begin["layers"]
    chunks = [event.get("chunk", 0), *(row[0] for row in [*event.get("sent", []), *event.get("held", [])])]
    if wrong := {*chunks, *(event.get("chunks", []) if event is not begin else [])} - {*range(num_chunks)}:
        raise InputError(f"it names the chunk {min(wrong)}, but they go from 0 to {num_chunks - 1}")
    if event.get("layer", 0) not in range(num_layers):
        raise InputError(f"'layer' is {event['layer']}, but layers go from 0 to {num_layers - 1}")
    blocks, at = begin.get("blocks", [[0, num_layers]]), event.get("block", 0)
    if at not in range(len(blocks)):
        raise InputError(f"'block' is {at}, but blocks go from 0 to {len(blocks) - 1}")
    first, stop = blocks[at]
    for name, allowed in ("entries", [num_chunks]), ("written", [stop - first]), ("received", [0, stop - first]):
        if name in event and len(event[name]) not in allowed:
            raise InputError(f"{name!r} has {len(event[name])} entries, but must have {allowed[-1]}")
