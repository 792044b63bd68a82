"""What a rank takes of one process's time and memory: measured, read back, shown; and what the README says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

import minichunk as mc
from minichunk.command.main import main
from minichunk.costs import pipelined as measured
from minichunk.costs.measure import Case, measure
from minichunk.costs.pipelined import Step, measure_rank, measure_ranks
from minichunk.costs.shares import ALONE, Process, Shares, in_words, memory_table, read_shares, time_table
from minichunk.files.atomic import write_json
from minichunk.models.stack import Stack

from .ranks import Ranks
from .strategies import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A model of four layers."""
    write_json(tmp_path / "config.json", tiny(4).to_dict())
    return str(tmp_path)


def test_torchrun_starts_the_ranks_and_what_they_find_is_shown(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pipeline.json"
    measure_ranks(path, 1, True, name=small, chunk_size=4, chunks=(3,))
    written = json.loads(path.read_text())
    assert {"command", "machine", "model"} <= written.keys()
    assert written["machine"]["threads"] == 1
    (one, two) = written["results"]
    assert [one["ranks"], two["ranks"]] == [1, 2]
    (alone,), both = one["rounds"][0], two["rounds"][0]
    assert alone["loss"] == both[0]["loss"] == both[1]["loss"]  # the same model and tokens
    assert [rank["layers"] for rank in both] == [2, 2]
    for found in (alone, *both):
        assert found["peak_bytes"] > 1 << 20
    for rank in both:
        assert 0 < rank["waited"] < rank["walk"] < rank["seconds"]
    assert main(["bench", "--redraw", str(path)]) == 0
    shown = capsys.readouterr().out
    shares = read_shares(path)
    for text in (time_table(shares), memory_table(shares), in_words(shares)):
        assert text in shown
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def by_a_clock(rank: int, step: Step) -> list[dict[str, Any]]:
    """measure_rank, where it takes 10 seconds to run a chunk, 1 until a message is there, and nothing else any time."""
    now = 0.0

    def taking(seconds: float, do: Callable[..., Any]) -> Callable[..., Any]:
        def done(*arguments: Any) -> Any:
            nonlocal now
            now += seconds
            return do(*arguments)

        return done

    with (
        patch.object(measured, "time", SimpleNamespace(perf_counter=lambda: now)),
        patch.object(Stack, "run", taking(10, Stack.run)),
        patch.object(Stack, "fill", taking(10, Stack.fill)),
        patch.object(dist, "recv", taking(1, dist.recv)),
    ):
        return measure_rank(step)


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_rank_knows_how_long_its_walk_is_and_how_long_it_waits_in_it(ranks: Ranks, small: str, chunks: int) -> None:
    step = Step(small, 4, chunks, 2, counts=[3, 1], count=True)
    for answer in ranks.ask(2, by_a_clock, step):
        first, last = answer  # each knows what all have found
        assert [first["layers"], last["layers"]] == [3, 1]
        for found in (first, last):
            assert found["walk"] == 10 * chunks + chunks
            assert found["waited"] == chunks
        assert first["seconds"] == 10 * (2 * chunks - 1) + chunks  # nobody hands it anything in the fill
        assert last["seconds"] == 10 * (2 * chunks - 1) + (2 * chunks - 1)


def test_one_process_counts_what_the_other_presets_count(ranks: Ranks, small: str) -> None:
    (alone,) = ranks.ask(1, by_a_clock, Step(small, 4, 5, 1, count=True))[0]
    other = measure(Case("seco", 20, 4, model=small, count=True))
    assert alone["counted_bytes"] == other["counted_bytes"]
    both = ranks.ask(2, by_a_clock, Step(small, 4, 5, 2, count=True))[0]
    weights = sum(p.nbytes for p in mc.Llama(tiny(4)).parameters())
    for found in both:
        assert weights / 2 < found["counted_bytes"] < alone["counted_bytes"]


def test_all_are_measured_once_before_any_twice_and_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Step] = []
    monkeypatch.setattr(measured, "_run", lambda step: asked.append(step) or [{}] * step.ranks)
    measure_ranks(tmp_path / "r.json", 2, True, name="m", chunk_size=4, chunks=(2, 3))
    assert [(step.chunks, step.ranks) for step in asked] == [(2, 1), (2, 2), (3, 1), (3, 2)] * 2
    assert [step.count for step in asked] == [True] * 4 + [False] * 4
    assert json.loads((tmp_path / "r.json").read_text())["results"][1] == {
        "chunks": 2, "ranks": 2, "rounds": [[{}, {}], [{}, {}]]
    }  # fmt: skip


def by_hand() -> dict[str, Any]:
    """Two lengths, two rounds of the first one. The second rank is the slower one."""

    def alone(seconds: float, counted: int) -> list[dict[str, Any]]:
        return [{"seconds": seconds, "peak_bytes": 300 << 20, "counted_bytes": counted << 20}]

    def both(seconds: float, waited: float, *counted: int) -> list[dict[str, Any]]:
        common = {"walk": 8.0, "peak_bytes": 200 << 20}
        return [
            common | {"seconds": 1.0, "waited": waited, "layers": 3, "counted_bytes": counted[0] << 20},
            common | {"seconds": seconds, "waited": 1.5, "layers": 1, "counted_bytes": counted[1] << 20},
        ]

    rows = [
        {"chunks": 3, "ranks": 1, "rounds": [alone(10, 100), alone(20, 100)]},
        {"chunks": 3, "ranks": 2, "rounds": [both(7, 2, 60, 50), both(12, 4, 60, 50)]},
        {"chunks": 9, "ranks": 1, "rounds": [alone(30, 180)]},
        {"chunks": 9, "ranks": 2, "rounds": [both(18, 2, 120, 70)]},
        {"chunks": 27, "ranks": 1, "rounds": [alone(90, 300)]},  # ended before the ranks
        {"chunks": 27, "ranks": 2, "rounds": []},
    ]
    return {"preset": "pipeline", "chunk_size": 512, "ranks": 2, "results": rows}


def shares_of(results: dict[str, Any], path: Path) -> Shares:
    write_json(path / "r.json", results)
    return read_shares(path / "r.json")


def test_tables_by_hand(tmp_path: Path) -> None:
    shares = shares_of(by_hand(), tmp_path)
    assert time_table(shares).splitlines()[2:] == [
        "| 1,536 | 3 | 15.00 s (10.00 s to 20.00 s) | 9.50 s (7.00 s to 12.00 s) | 0.65 (0.60 to 0.70) "
        "| 38% (25% to 50%) | 25% |",
        "| 4,608 | 9 | 30.00 s | 18.00 s | 0.60 | 25% | 10% |",
    ]
    assert memory_table(shares).splitlines() == [
        "| tokens | chunks | one process | rank 0, layers: 3 | rank 1, layers: 1 |",
        "|---:|---:|---:|---:|---:|",
        "| 1,536 | 3 | 100 MiB (300 MiB) | 60 MiB (200 MiB) | 50 MiB (200 MiB) |",
        "| 4,608 | 9 | 180 MiB (300 MiB) | 120 MiB (200 MiB) | 70 MiB (200 MiB) |",
        "| growth | | 80 MiB | 60 MiB, 0.75 of it | 20 MiB, 0.25 of it |",
    ]
    assert in_words(shares) == (
        "in the walk over 9 chunks rank 0 computes for 6.0 s and waits for 2.0 s; "
        "rank 1 computes for 6.5 s and waits for 1.5 s"
    )


@pytest.mark.parametrize("wrong", [{"results": []}, {"results": [{}]}, {"ranks": 3}, {"chunk_size": None}])
def test_another_file_is_a_mistake(wrong: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "r.json", by_hand() | wrong)
    assert main(["bench", "--redraw", str(tmp_path / "r.json")]) == 2
    assert "is not a results file of minichunk bench --preset pipeline" in capsys.readouterr().err


def test_it_needs_gloo_and_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--preset", "pipeline", "--device", "cuda"]) == 2
    assert "--preset pipeline does not run on --device cuda" in capsys.readouterr().err
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    monkeypatch.setattr(measured, "_run", lambda step: pytest.fail("it began to measure"))
    assert main(["bench", "--preset", "pipeline"]) == 2
    assert "needs a PyTorch with Gloo" in capsys.readouterr().err


def test_what_a_rank_fails_with_is_said(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", tiny(1).to_dict())
    with pytest.raises(mc.InputError, match=r"3 chunks on 2 ranks failed: the model has 1 layers, too few for 2 ranks"):
        measured._run(Step(str(tmp_path), 4, 3, 2))


def test_the_readme_has_the_tables_of_the_results() -> None:
    shares = read_shares(ROOT / "tutorials" / "figures" / "bench-pipeline.json")
    readme = (ROOT / "README.md").read_text()
    assert time_table(shares) in readme
    assert memory_table(shares) in readme
    assert in_words(shares) in readme
    assert shares.growth(Process(2, 0)) + shares.growth(Process(2, 1)) < 1.01 * shares.growth(ALONE)
