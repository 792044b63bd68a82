"""What the README and the pages say of the code is so."""

import importlib.util
import re
from pathlib import Path

import pytest

from minichunk.command.main import main
from minichunk.models.shapes import shape

from .test_house import DOORS, PACKAGE, size

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.md") if ".venv" not in path.parts]


def test_the_loop_is_the_one_of_the_source() -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "reversed(chunks)" in b)
    indented = "".join(f"    {line}\n" if line else "\n" for line in block.splitlines())
    assert indented in (ROOT / "minichunk" / "seco.py").read_text()


def test_every_file_at_the_top_and_every_wing_has_its_place() -> None:
    listed = re.findall(r"\[`([\w./]+)`\]\(minichunk/\w", README)
    files = {path.name for path in PACKAGE.glob("*.py")} - {*DOORS}
    wings = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(listed) == sorted(files | wings)


def test_the_numbers_of_lines_are_so() -> None:
    found = re.search(
        r"are ([\d,]+) lines of code in (\d+) files; with the Llama[^;]*, ([\d,]+) lines in\s(\d+) files", README
    )
    assert found is not None
    counted = []
    for starts in (["seco.py"], ["seco.py", "models/llama.py"]):
        files, lines = size(*map(Path, starts))
        counted += [lines, files]
    assert [int(number.replace(",", "")) for number in found.groups()] == counted


def test_the_forecast_is_what_plan_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """And the first table says the same of the default, and of all chunked methods what a token remembers."""
    (block,) = re.findall(r"```\n(\S+, seco: the longest sequence that fits .*?)```", README, re.DOTALL)
    assert main(["plan"]) == 0
    assert capsys.readouterr().out.startswith(block)
    (longest,) = re.findall(r"that fits has ([\d,]+) tokens", block)
    rows = re.findall(r"^\| ((?:SeCO|SpaCO).*?) \| .*? \| (\d+) KiB \| ([\d,]+) \|", README, re.MULTILINE)
    assert [tokens for method, _, tokens in rows if "(the default)" in method] == [longest]
    config = shape("llama-3-8b")
    numbers = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers  # keys and values of a token
    hidden = 3 * 2 * config.hidden_size  # between 4 blocks of layers
    found = {
        "SeCO, sums in float32": numbers * 6,
        "SeCO, sums in bfloat16": numbers * 4,
        "SeCO, sums in bfloat16, 8 of 32 layers at once": numbers * 4 * 8 // 32 + hidden,
        "SeCO, sums in bfloat16, 2 of 32, the rest in host memory": numbers * 4 * 2 // 32,
        "SpaCO, 8 chunks kept, sums in bfloat16": numbers * 2,
    }
    expected = [(method, str(size // 2**10)) for method, size in found.items()]
    assert [(method.removesuffix(" (the default)"), per_token) for method, per_token, _ in rows] == expected


@pytest.mark.parametrize("document", PAGES)
def test_links_lead_somewhere(document: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    for link, part in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", text):
        target = (ROOT / document).parent / link if link else ROOT / document
        assert target.exists(), link
        if part and target.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert part[1:] in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], (
                link + part
            )


@pytest.mark.parametrize("document", PAGES)
def test_modules_that_are_to_be_run_exist(document: str) -> None:
    named = re.findall(r"python -m (minichunk(?:\.\w+)*)", (ROOT / document).read_text())
    assert not [name for name in named if importlib.util.find_spec(name) is None]
