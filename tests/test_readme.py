"""What the README says of the code is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_loop_is_the_one_of_the_source() -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "reversed(chunks)" in b)
    indented = "".join(f"    {line}\n" if line else "\n" for line in block.splitlines())
    assert indented in (ROOT / "minichunk" / "seco.py").read_text()


def test_every_file_is_in_the_reading_order() -> None:
    rows = re.findall(r"^\| .*\(minichunk/.*$", README, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"\[`(\w+\.py)`\]\(minichunk/\w+\.py\)", row)}
    assert listed == {path.name for path in (ROOT / "minichunk").glob("*.py")} - {"__init__.py", "errors.py"}


def test_no_file_is_over_250_lines() -> None:
    long = [path.name for path in (ROOT / "minichunk").glob("*.py") if len(path.read_text().splitlines()) > 250]
    assert not long


@pytest.mark.parametrize("document", ["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("tutorials/**/*.md"))])
def test_links_lead_somewhere(document: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    missing = [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]
    assert not missing
