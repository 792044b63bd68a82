"""What hybrids save: timed by position, made into steps, counted; and what the README says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minichunk.command.main import main
from minichunk.costs import positions
from minichunk.costs.hybrids import less, remembered, table, times, work
from minichunk.costs.positions import measure_positions
from minichunk.costs.sums import Curves, at, in_words, read_curves, sum_table
from minichunk.files.atomic import write_json
from minichunk.memory.pattern import FULL, Pattern, Strided, Window

from .strategies import tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
HYBRIDS: dict[str, Pattern] = {"window": Window(6, 2), "strided": Strided(2, 2, 2)}


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Any]:
    write_json(tmp_path / "config.json", tiny(3).to_dict())
    return {"name": str(tmp_path), "chunk_size": 4, "positions": (0, 8, 16), "hybrids": HYBRIDS, "quiet": True}


def test_each_model_is_timed_at_each_position_and_what_is_written_is_shown(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "partial.json"
    measure_positions(path, 2, **small)
    written = json.loads(path.read_text())
    assert {"command", "machine", "model"} <= written.keys()
    assert written["hybrids"]["window"] == {"window": 6, "sinks": 2, "full_layers": [1]}
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in written["results"])
    curves = read_curves(path)
    assert list(curves.lines) == ["fill", "rebuild", "prefill", "decode"]
    for lines in curves.lines.values():
        assert len({line[0] for line in lines.values()}) == 1  # the same work
        assert list(lines) == ["full", *HYBRIDS]
        assert all(list(line) == [0, 8, 16] for line in lines.values())
    assert main(["bench", "--redraw", str(path)]) == 0
    shown = capsys.readouterr().out
    assert sum_table(curves) in shown
    assert in_words(curves) in shown
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_a_chunk_is_rebuilt_on_its_models_memory_and_receives_gradients(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, rebuild = [], positions.rebuild

    def watched(model: Any, batch: Any, chunk: Any, memory: Any, options: Any) -> Any:
        loss, written, received = rebuild(model, batch, chunk, memory, options)
        seen.append((chunk, [layer.pattern for layer in memory.layers], [float(g.norm()) for g in received]))
        return loss, written, received

    monkeypatch.setattr(positions, "rebuild", watched)
    measure_positions(tmp_path / "partial.json", 1, **small)
    expected = [(p, pattern) for p in (0, 8, 16) for pattern in (FULL, *HYBRIDS.values())]
    for (chunk, patterns, norms), (position, pattern) in zip(seen[1:], expected, strict=True):  # the first: a warm-up
        assert chunk == (position, position + 4)
        assert patterns == [pattern, FULL, pattern]
        assert len(norms) == 6
        assert min(norms) > 0


def by_hand() -> Curves:
    """Chunks of 2. With full attention a chunk takes a second more for each position, in the hybrid two in all."""
    full, hybrid = {0: 1.0, 4: 5.0, 8: 9.0}, {0: 2.0, 4: 2.0, 8: 2.0}
    return Curves(2, {what: {"full": full, "window": hybrid} for what in ("fill", "rebuild", "prefill", "decode")})


def test_sums_by_hand() -> None:
    curves = by_hand()
    line = {0: 1.0, 4: 2.0, 8: 6.0}
    assert [at(line, p) for p in (0, 2, 4, 6, 8, 10)] == [1.0, 1.5, 2.0, 4.0, 6.0, 8.0]
    assert at({0: 0.0, 1: 0.0, 2: 1.0, 3: 9.0, 4: 3.0}, 6) == 5.0  # through the middle one and the last
    assert curves.seconds("SeCO step", "full", 6) == (1 + 3) + (1 + 3 + 5)
    assert curves.seconds("prefill", "full", 6) == 1 + 3 + 5
    assert curves.seconds("prefill", "full", 12) == 1 + 3 + 5 + 7 + 9 + 11
    assert curves.seconds("decoding a token after", "full", 12) == 13
    assert curves.times_as_fast("prefill", "window", 6) == 9 / 6
    # Prefill: 1 against 2, 4 against 4, 9 against 6. A step has less of the fill: 1 : 2, 5 : 6, 13 : 10.
    assert curves.break_even("prefill", "window") == 6
    assert curves.break_even("SeCO step", "window") == 6
    assert curves.break_even("decoding a token after", "window") == 2
    curves.lines["prefill"]["window"] = {0: 9.0, 8: 9.0}
    assert curves.break_even("prefill", "window") is None


@pytest.mark.parametrize("wrong", ['{"preset": "partial"}', '{"preset": "partial", "results": [{}], "chunk_size": 1}'])
def test_another_file_is_a_mistake(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.json").write_text(wrong)
    assert main(["bench", "--redraw", str(tmp_path / "r.json")]) == 2
    assert "is not a results file of minichunk bench --preset partial" in capsys.readouterr().err


def test_the_readme_has_the_tables_of_the_results() -> None:
    curves = read_curves(ROOT / "tutorials" / "figures" / "bench-partial.json")
    assert sum_table(curves) in README
    assert in_words(curves) in README


@pytest.mark.parametrize(("count", "compare"), [(work, times), (remembered, less)])
def test_the_readme_has_the_counted_tables(count: Any, compare: Any) -> None:
    assert table(count, compare, "llama-3-8b", 131072) in README
