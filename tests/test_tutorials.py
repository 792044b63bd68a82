"""Every tutorial runs, and prints what its rendered file says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[1] / "tutorials"
SOURCES = sorted(TUTORIALS.glob("[0-9][0-9]_*.py"))


def load_render():
    spec = importlib.util.spec_from_file_location("render", TUTORIALS / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")  # of libraries, which a reader may see
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_tutorial_prints_what_its_rendering_says(path: Path, tmp_path: Path) -> None:
    rendered = load_render().render(path, tmp_path)
    assert rendered == path.with_suffix(".md").read_text(encoding="utf-8")
    figures = {figure.name for figure in tmp_path.iterdir()}
    assert figures == {figure.name for figure in (TUTORIALS / "figures").glob(f"{path.stem}-*.png")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_tutorial_prints_no_claim_that_does_not_hold(path: Path) -> None:
    page = path.with_suffix(".md").read_text()
    printed = re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert printed
    assert not any(re.search(r"\bFalse\b", text) for text in printed)
    assert "PLACEHOLDER" not in page


@pytest.mark.parametrize("path", [*SOURCES, TUTORIALS / "jax.md"], ids=lambda path: path.stem)
def test_every_question_at_the_end_has_an_answer(path: Path) -> None:
    page = path.with_suffix(".md").read_text()
    title = page[: page.index("\n")].removeprefix("# ")
    answers = (TUTORIALS / "answers.md").read_text()
    assert f"\n## {title}\n" in answers
    answered = answers.split(f"\n## {title}\n")[1].split("\n## ")[0]
    questions = page.split("\n## Exercises\n")[1]
    numbers = re.compile(r"^(\d+)\. ", re.MULTILINE)
    assert numbers.findall(questions)
    assert numbers.findall(answered) == numbers.findall(questions)


@pytest.mark.parametrize("name", ["01_cache_and_cut.md", "02_seco_by_hand.md", "exercises/README.md"])
def test_the_page_to_begin_with_is_named_at_the_beginning(name: str) -> None:
    assert "minichunk/tiny.py)" in " ".join((TUTORIALS / name).read_text().splitlines()[:10])


@pytest.mark.parametrize("path", sorted(TUTORIALS.glob("**/*.md")), ids=lambda path: path.stem)
def test_every_file_that_is_named_exists(path: Path) -> None:
    files = [str(file) for folder in (TUTORIALS, TUTORIALS.parent / "minichunk") for file in folder.rglob("*.py")]
    for name in {*re.findall(r"`([\w/]+\.py)`", path.read_text())} - {"several.py"}:  # which the reader is to make
        assert any(file.endswith(f"/{name}") for file in files), name


def test_the_page_for_jax_quotes_the_port() -> None:
    quoted = re.findall(r"^```python\n(.*?)^```", (TUTORIALS / "jax.md").read_text(), re.DOTALL | re.MULTILINE)
    port = (TUTORIALS / "jax_port.py").read_text()
    assert len(quoted) == 5
    assert all(block in port for block in quoted)


def test_the_seventh_port_is_at_most_60_lines() -> None:
    text = (TUTORIALS / "07_porting.py").read_text()
    port = text[text.index("def run_chunk") : text.index("# %% [markdown]\n# ## The check")]
    assert len(port.rstrip().splitlines()) <= 60


def test_without_the_model_the_sixth_says_how_to_get_it(tmp_path: Path) -> None:
    found = load_render().cells((TUTORIALS / "06_a_real_model.py").read_text())
    (cell,) = [code for is_text, code, _ in found if not is_text and "raise SystemExit" in code]
    with pytest.raises(SystemExit, match=r"Get it with `python tutorials/get_smollm2.py smollm2`"):
        exec(cell, {"RESULTS": tmp_path / "none.json", "SMOLLM2": tmp_path / "none"})
