"""The event log: one training step, written down as it happens. `trace` writes it, a port may, the page shows it.

An event is a JSON object, a log is a list of them, a file has one to a line. Chunks and layers count from 0, a norm is
that of all numbers of one tensor. `kind` says what has just happened, in this order:

| kind       | when                                   | fields                                    | and perhaps |
|------------|----------------------------------------|-------------------------------------------|-------------|
| `begin`    | first                                  | `format`, `method`, `chunks`, `layers`    | see below   |
| `draw`     | SpaCO has drawn its chunks             | `entries`                                 | `rates`     |
| `memory`   | there is room for what chunks write    |                                           | `remembers` |
| `fill`     | chunks have been run without gradients | `chunks`, `written`                       | `shapes`    |
| `rebuild`  | a chunk has been run with its graph    | `chunk`, `written`                        | `shapes`    |
| `forward`  | `full`: the whole text has             | `chunk`: 0                                |             |
| `loss`     | it has its loss                        | `chunk`, `loss`, times its factor         | `factor`    |
| `relay`    | it has what later chunks sent to it    | `chunk`, `received`, not times its factor | `factor`    |
| `backward` | the backward pass has left a layer     | `chunk`, `layer`, `sent`                  | `held`      |
| `done`     | its backward pass is over              | `chunk`                                   | see below   |
| `end`      | the step is over                       | `loss`                                    | see below   |

`begin`: perhaps also the numbers `tokens`, `batch` and `parameters`, `recompute` (true, false), the names `model` and
`torch`, and `text`, what each chunk says. `entries`: for each chunk null, or [loss factor, relay factor]. `rates`: for
each chunk the chance of its own coin, where factors of 1/chance make the estimate unbiased. `remembers`: for each layer
"keys and values" or "state". `done` and `end`: perhaps `gradient_norm`, of all parameters so far, and `done` the `loss`
so far.

`method`: "full", "seco", "spaco" or a name of your own. `chunks` of `begin`: [start, stop) of each. `layers`: how many.
`written`, `received`: for each layer the norms of its tensors (keys, values; a state, its decay); [] where there is
nothing. `shapes`: those of what was written. `sent`: [earlier chunk, norms …] of what this layer has sent to the memory
just now, also to chunks that will never take it (SpaCO's skipped ones). `held`: the same for the sums so far.

Any event may have `step`, its number; `bytes`, an object of what is alive now: `weights`, `gradients` (the
parameters'), `memory` (keys and values, states), `memory_gradients` (sent back to them) and `activations` (all else);
`peak`, the most that was alive at once since the event before.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files.atomic import json_lines, write_text

Event = dict[str, Any]
FORMAT = "minichunk trace 1"
NEEDS: dict[str, dict[str, type]] = {
    "begin": {"format": str, "method": str, "chunks": list, "layers": int},
    "draw": {"entries": list},
    "memory": {},
    "fill": {"chunks": list, "written": list},
    "rebuild": {"chunk": int, "written": list},
    "forward": {"chunk": int},
    "loss": {"chunk": int, "loss": float},
    "relay": {"chunk": int, "received": list},
    "backward": {"chunk": int, "layer": int, "sent": list},
    "done": {"chunk": int},
    "end": {"loss": float},
}
BYTES = ("weights", "gradients", "memory", "memory_gradients", "activations")


def write_events(path: str | Path, events: Iterable[Event]) -> None:
    """Write a log, one event to a line."""
    write_text(path, "".join(json.dumps(event) + "\n" for event in events))


def read_events(path: str | Path) -> list[Event]:
    """Read a log. Raises InputError, naming file, line and field, for anything that the page could not draw."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    events: list[Event] = []
    for where, event in json_lines(path, text):
        try:
            check_event(event, events[0] if events else None)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        events.append(event)
    if not events:
        raise InputError(f"{path} holds no event")
    return events


def check_event(event: Any, begin: Event | None) -> None:
    """Raise InputError unless it has the fields of its kind; begin: the first event, None if this is it."""
    kind = event.get("kind") if isinstance(event, dict) else None
    if kind not in NEEDS:
        raise InputError(f"an event must be an object whose 'kind' is one of {', '.join(NEEDS)}")
    if (begin is None) != (kind == "begin"):
        raise InputError(f"'{kind}' is out of place: a log has one 'begin', and it comes first")
    for name, wanted in NEEDS[kind].items():
        value = event.get(name)
        if not isinstance(value, (int, float) if wanted is float else wanted) or isinstance(value, bool):
            raise InputError(f"'{kind}' needs the field '{name}', of type {wanted.__name__}")
    sizes = event.get("bytes")
    if sizes is not None and not (isinstance(sizes, dict) and all(isinstance(sizes.get(x), int) for x in BYTES)):
        raise InputError(f"'bytes' must be an object with the integers {', '.join(BYTES)}")
    if begin is None:
        if event["format"] != FORMAT:
            raise InputError(f"the format is {event['format']!r}, but must be {FORMAT!r}")
        spans = [isinstance(chunk, list) and [type(x) for x in chunk] == [int, int] for chunk in event["chunks"]]
        if not spans or not all(spans) or event["layers"] < 1:
            raise InputError("'chunks' must be a list of [start, stop] and 'layers' at least 1")
        return
    num_chunks, num_layers = len(begin["chunks"]), begin["layers"]
    sent = [*event.get("sent", []), *event.get("held", [])]
    if not all(isinstance(row, list) and row and isinstance(row[0], int) for row in sent):
        raise InputError("'sent' and 'held' must be lists of [chunk, norm, …]")
    chunks = [*event.get("chunks", []), *(row[0] for row in sent), *([event["chunk"]] if "chunk" in event else [])]
    if not all(isinstance(chunk, int) and 0 <= chunk < num_chunks for chunk in chunks):
        raise InputError(f"it names the chunks {chunks}, but they go from 0 to {num_chunks - 1}")
    if not 0 <= event.get("layer", 0) < num_layers:
        raise InputError(f"'layer' is {event['layer']}, but layers go from 0 to {num_layers - 1}")
    for name, length in (("entries", num_chunks), ("written", num_layers), ("received", num_layers)):
        if name in event and len(event[name]) not in (length, 0 if name == "received" else length):
            raise InputError(f"'{name}' has {len(event[name])} entries, but must have {length}")
