"""The page: one HTML file with everything in it, made of logs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..files.atomic import write_text
from .events import Event
from .listing import LISTINGS, listing

FILES = Path(__file__).parent / "page"
SCRIPTS = ("state.js", "words.js", "grid.js", "memory.js", "panels.js", "controls.js")
MOST = 1_000_000  # bytes


def make_page(logs: Sequence[Sequence[Event]], names: Sequence[str | None] | None = None) -> str:
    """A page that shows these logs: as one run each, by `names` (None: the method's). The first is shown first.

    Logs of `full` are also drawn behind the others, where bytes are counted. Raises InputError for a page of a
    megabyte or more.
    """
    runs = [{"name": name, "events": log} for name, log in zip(names or [None] * len(logs), logs, strict=True)]
    known = sorted({"seco", *(log[0]["method"] for log in logs)} & LISTINGS.keys())
    data = json.dumps({"runs": runs, "code": {method: listing(method) for method in known}}, separators=(",", ":"))
    script = "\n".join((FILES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    page = (FILES / "page.html").read_text(encoding="utf-8")
    for place, content in (
        ("/*CSS*/", (FILES / "page.css").read_text(encoding="utf-8")),
        ("/*JS*/", f'"use strict";\n(() => {{\n{script}}})();'),
        ("/*DATA*/", data.replace("<", "\\u003c")),  # no text of a user's ends the script
    ):
        page = page.replace(place, content, 1)
    if (size := len(page.encode())) >= MOST:
        raise InputError(
            f"the page would have {size:,} bytes, but must have fewer than {MOST:,}: take fewer or larger chunks, or "
            "fewer methods (--chunk-size, --method)"
        )
    return page


def write_page(path: str | Path, logs: Sequence[Sequence[Event]], names: Sequence[str | None] | None = None) -> None:
    """Write the page, whole or not at all. Raises InputError."""
    page = make_page(logs, names)
    try:
        write_text(path, page)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def logs_of(page: str) -> list[list[Event]]:
    """The logs that a page was made of."""
    start = page.index('id="data">') + len('id="data">')
    return [run["events"] for run in json.loads(page[start : page.index("</script>", start)])["runs"]]
