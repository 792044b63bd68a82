"""The house: imports go one way only, between files and between wings, and no file outgrows its idea."""

from __future__ import annotations

import ast
import io
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import minichunk

PACKAGE = Path(minichunk.__file__).parent
# A wing may import those before it. "" is the top of the package: the algorithm.
WINGS = ("", "files", "memory", "models", "pipeline", "training", "costs", "porting", "walk", "command")
DOORS = ("__init__.py", "__main__.py")  # what the package offers, made of all of it
# The algorithm and what it stands on, the Llama.
CORE = (
    "*.py", "memory/*.py", "models/stack.py", "models/decoder.py", "models/llama.py", "models/rope.py",
    "models/config.py",
)  # fmt: skip
# The idea by itself; speed, to be read later; the other kinds of memory: a state, a part of the past.
BESIDE = (
    "tiny.py", "memory/kernels.py", "memory/band.py", "memory/offload.py", "memory/state.py", "memory/scan.py",
    "memory/pattern.py", "memory/places.py",
)  # fmt: skip

NO_CODE = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
)  # fmt: skip


def files() -> list[Path]:
    found = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    return sorted(path for path in found if path.name != "__init__.py" and str(path) not in DOORS)


def imports(path: Path) -> set[Path]:
    """The files of the package that a file imports, anywhere in it: also for types alone, also within functions."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("minichunk") for alias in node.names), f"{path}: import relatively"
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            target = base.joinpath(*(node.module or "").split("."))
            names = (
                [target / alias.name for alias in node.names] if not (PACKAGE / f"{target}.py").exists() else [target]
            )
            found |= {name.with_suffix(".py") for name in names}
    return found


def test_imports_go_one_way_between_files() -> None:
    graph = {path: imports(path) for path in files()}
    unknown = {target for targets in graph.values() for target in targets} - graph.keys()
    assert not {target for target in unknown if str(target) not in DOORS}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, and names the circle


def test_imports_go_one_way_between_wings() -> None:
    def wing(path: Path) -> str:
        return path.parts[0] if len(path.parts) > 1 else ""

    assert {wing(path) for path in files()} == set(WINGS)
    upward = [
        f"{path} imports {target}"
        for path in files()
        for target in imports(path)
        if WINGS.index(wing(target)) > WINGS.index(wing(path))
    ]
    assert not upward


def test_no_file_is_over_250_lines() -> None:
    assert not [str(path) for path in files() if lines(path) > 250]


def test_the_algorithm_and_what_it_stands_on_are_at_most_1000_lines() -> None:
    assert lines_of_core() <= 1000


def lines_of_core() -> int:
    """Of code: docstrings, comments and blank lines are for the reader, and not counted."""
    core = {path for pattern in CORE for path in PACKAGE.glob(pattern)} - {PACKAGE / name for name in BESIDE}
    return sum(lines_of_code(path) for path in core if path.name not in DOORS)


def lines_of_code(path: Path) -> int:
    text = path.read_text()
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            code -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(code)


def lines(path: Path) -> int:
    return len((PACKAGE / path).read_text().splitlines())


if __name__ == "__main__":
    print(lines_of_core())
