"""The house keeps its size: a student reads all of it. Imports go one way, between files and between wings."""

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
ROOT = PACKAGE.parent
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


def test_the_package_is_small() -> None:
    paths = list(PACKAGE.rglob("*.py"))
    assert len(paths) <= 75
    assert sum(lines(path) for path in paths) <= 9436
    assert sum(lines(path) for path in PACKAGE.rglob("*.js")) <= 500


def test_what_is_around_it_is_small() -> None:
    assert sum(lines(path) for path in (ROOT / "tests").rglob("*.py")) <= 10_100
    assert len((ROOT / "README.md").read_bytes()) <= 15_000


def test_the_algorithm_and_what_it_stands_on() -> None:
    """All that `seco.py` and a Llama import, and what those import; the README names these numbers."""
    assert size(Path("seco.py"))[0] <= 9
    counted, code = size(Path("seco.py"), Path("models/llama.py"))
    assert counted <= 18
    assert code <= 1342


def size(*start: Path) -> tuple[int, int]:
    """The import closure of some files: how many they are, and their lines of code.

    Docstrings, comments and blank lines are for the reader, and not counted.
    """
    closure, waiting = set[Path](), set(start)
    while waiting:
        closure |= waiting
        waiting = {target for path in waiting for target in imports(path)} - closure
    return len(closure), sum(lines_of_code(PACKAGE / path) for path in closure)


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
    return len(path.read_text().splitlines())


if __name__ == "__main__":
    for start in (["seco.py"], ["seco.py", "models/llama.py"]):
        print(*start, *size(*map(Path, start)))
    print("package", sum(lines(path) for path in PACKAGE.rglob("*.py")), len(list(PACKAGE.rglob("*.py"))))
