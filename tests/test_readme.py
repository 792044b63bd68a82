"""What the README says of the code is so."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from .test_house import lines_of_core

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_loop_is_the_one_of_the_source() -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "reversed(chunks)" in b)
    indented = "".join(f"    {line}\n" if line else "\n" for line in block.splitlines())
    assert indented in (ROOT / "minichunk" / "seco.py").read_text()


def test_the_map_is_the_house() -> None:
    """Each file at the top, and each wing, has its place; what the package's doors are needs none."""
    house = README[README.index("## The house") : README.index("## What is tested")]
    listed = set(re.findall(r"\[`([\w./]+)`\]\(minichunk/\w", house))
    package = ROOT / "minichunk"
    files = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    wings = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert listed == files | wings


def test_the_number_of_lines_is_so() -> None:
    found = re.search(r"are ([\d,]+) lines of code", README)
    assert found is not None
    assert int(found[1].replace(",", "")) == lines_of_core()


@pytest.mark.parametrize("document", ["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("tutorials/**/*.md"))])
def test_links_lead_somewhere(document: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    missing = [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.parametrize("document", [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.md") if ".venv" not in p.parts])
def test_modules_that_are_to_be_run_exist(document: str) -> None:
    named = re.findall(r"python -m (minichunk(?:\.\w+)*)", (ROOT / document).read_text())
    assert not [name for name in named if importlib.util.find_spec(name) is None]
