"""Run tutorials and write what they print beside them: `python tutorials/render.py [NAME ...]`.

A tutorial is Python in the percent format, which VS Code and Jupyter open as a notebook: `# %%`
begins a cell of code, `# %% [markdown]` one of text. The rendered file has the same cells, each
followed by what it printed, and a picture wherever it calls `plt.show()`.
"""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # a tutorial may import a module beside it
TUTORIALS = sorted(HERE.glob("[0-9][0-9]_*.py"))


def cells(source: str) -> list[tuple[bool, str, int]]:
    """(is it text, its content, its first line's number) of every cell."""
    found = []
    for match in re.finditer(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", source, re.MULTILINE):
        is_text = "[markdown]" in match[1]
        content = match[2].strip("\n")
        if is_text:
            content = re.sub(r"^# ?", "", content, flags=re.MULTILINE)
        found.append((is_text, content, source.count("\n", 0, match.start(2)) + 1))
    return found


def render(path: Path, figures: Path) -> str:
    """Run the tutorial; return its Markdown and save its pictures in `figures`."""
    parts: list[str] = []
    names = {"__name__": "__main__", "__file__": str(path)}
    pictures = 0

    def show() -> None:
        nonlocal pictures
        pictures += 1
        name = f"{path.stem}-{pictures}.png"
        title = plt.gca().get_title() if plt.gcf().get_suptitle() == "" else plt.gcf().get_suptitle()
        plt.gcf().savefig(figures / name, dpi=110, facecolor="white", bbox_inches="tight", metadata={"Software": None})
        plt.close("all")
        parts.append(f"![{' '.join(title.split())}](figures/{name})")

    original, plt.show = plt.show, show
    try:
        for is_text, content, line in cells(path.read_text(encoding="utf-8")):
            if is_text:
                parts.append(content)
                continue
            parts.append(f"```python\n{content}\n```")
            place, printed = len(parts), StringIO()
            with redirect_stdout(printed):
                exec(compile("\n" * (line - 1) + content, path, "exec"), names)
            if text := printed.getvalue().rstrip():
                parts.insert(place, f"```text\n{text}\n```")
    except SystemExit as stop:  # a tutorial that needs something which is not here says so and ends
        parts.append(str(stop))
    finally:
        plt.show = original
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run tutorials and write NAME.md and figures/NAME-*.png beside them.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(path.stem for path in TUTORIALS)} (default: all)")
    names = parser.parse_args().names
    if unknown := set(names) - {path.stem for path in TUTORIALS}:
        parser.error(f"there is no tutorial {', '.join(sorted(unknown))}")
    for path in TUTORIALS:
        if not names or path.stem in names:
            print(f"running  {path.name}", flush=True)
            path.with_suffix(".md").write_text(render(path, HERE / "figures"), encoding="utf-8")
