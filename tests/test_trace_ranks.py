"""The log of a step on several ranks: each rank's own, and the one that is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import minichunk as mc
from minichunk.command.main import main
from minichunk.walk.events import check_event, compare, read_events, write_events
from minichunk.walk.listing import listing
from minichunk.walk.merge import about, merge, needed
from minichunk.walk.page import logs_of
from minichunk.walk.schedule import Work, draw_schedule, schedule

from . import rank_tasks as tasks
from .gradients import take_gradients
from .ranks import Case, Ranks
from .strategies import build, tiny, tiny_state

Log = list[dict[str, Any]]


def case(model: Any, length: int = 11, chunk_size: int = 3, **others: Any) -> Case:
    ids = torch.randint(23, (2, length), generator=torch.Generator().manual_seed(0))
    return Case(model, ids, ids, chunk_size, **others)


def of(log: Log, kind: str) -> Log:
    return [event for event in log if event["kind"] == kind]


def by_layers(log: Log) -> list[dict[str, Any]]:
    """The events of a log of one process or of several that name what is in layers, one for each layer."""
    found = {}
    for event in log:
        if event["kind"] in ("fill", "rebuild", "relay"):
            for field in ("written", "received"):
                for layer, norms in enumerate(event.get(field, [])):
                    if norms:
                        found[event["kind"], str(about(event)), layer] = {"kind": event["kind"], "norms": norms}
        elif event["kind"] == "backward":
            key = event["kind"], str(event["chunk"]), event["layer"]
            found[key] = {"kind": "backward", "norms": [event["sent"], event["held"]]}
    return [{"where": key, **found[key]} for key in sorted(found)]


@pytest.mark.parametrize(
    ("number", "layers", "tied", "chunk_size", "method", "recompute", "fill_size"),
    [
        (3, "aaa", False, 3, "seco", False, None),
        (3, "saaa", True, 2, "spaco", False, 11),
        (2, "sas", True, 4, "seco", True, 11),
        (2, "aaaa", False, 11, "spaco", True, None),
        (1, "aas", True, 3, "seco", False, None),
    ],
)
def test_a_watched_step_is_the_step_and_the_logs_of_the_ranks_are_that_of_one_process(
    ranks: Ranks, number: int, layers: str, tied: bool, chunk_size: int, method: str, recompute: bool, fill_size: Any
) -> None:
    model = build(tiny_state(layers, tie_word_embeddings=tied), 0)
    options: dict[str, Any] = {"recompute": recompute, "fill_size": fill_size}
    if method == "spaco":
        options["sampler"] = mc.FixedBudget(2)
    of_one = case(model, chunk_size=chunk_size, method=method, options=options)
    answers = ranks.ask(number, tasks.traced, of_one)
    for log, watched, alone in answers:
        assert all(torch.equal(watched[name], alone[name].to(watched[name].dtype)) for name in alone)
        for event in log:
            check_event(json.loads(json.dumps(event)), log[0] if event is not log[0] else None)
    merged = merge([log for log, *_ in reversed(answers)])
    take_gradients(model)
    torch.manual_seed(of_one.seed)
    log = mc.trace(getattr(mc, method), model, of_one.input_ids, of_one.labels, chunk_size, **options)
    assert by_layers(merged) == by_layers(log)
    for kind in ("draw", "loss"):
        assert compare(of(merged, kind), of(log, kind), 1e-12) is None
    for field in ("chunks", "layers", "tokens", "parameters"):
        assert merged[0][field] == log[0][field]
    assert of(merged, "memory")[:1] == [] or all(
        event["remembers"] == of(log, "memory")[0]["remembers"] for event in of(merged, "memory")
    )
    assert merged[-1]["loss"] == pytest.approx(log[-1]["loss"], rel=1e-12)
    assert merged[-1]["gradient_norm"] == pytest.approx(log[-1]["gradient_norm"], rel=1e-12)
    check_order(merged, number)


def keep_nothing(num_chunks: int, generator: torch.Generator | None) -> list[None]:
    return [None] * num_chunks


def check_order(merged: Log, number: int) -> None:
    """Nothing comes before what it needs, and no rank's work overlaps: what is left of its time is waiting."""
    seen, free = set(), dict.fromkeys(range(number), 0.0)
    assert [event["step"] for event in merged] == list(range(len(merged)))
    assert [event["kind"] for event in merged if "rank" not in event] == ["begin", "end"]
    for event in merged[1:-1]:
        rank, kind = event["rank"], event["kind"]
        assert (need := needed(event, rank, number)) is None or need in seen
        if kind in ("fill", "rebuild") and rank:
            assert (rank - 1, kind, about(event)) in seen, "the hidden state comes from below"
        if kind == "backward" and rank < number - 1:
            assert (rank + 1, "done", event["chunk"]) in seen, "its gradient comes from above"
        seen.add((rank, kind, about(event)))
        if "took" in event:
            assert free[rank] <= event["time"] - event["took"] + 2e-6
            free[rank] = event["time"]


def test_the_order_does_not_rest_on_clocks(ranks: Ranks) -> None:
    """A rank whose clock is an hour slow has not done anything earlier."""
    logs = [log for log, *_ in ranks.ask(3, tasks.traced, case(build(tiny(layers=3), 0)))]
    order = [(event.get("rank"), event["kind"], about(event)) for event in merge(logs)]
    for event in logs[1]:
        event["time"] -= 3600.0
    merged = merge(logs)
    assert sorted(map(str, order)) == sorted(str((e.get("rank"), e["kind"], about(e))) for e in merged)
    seen = set()
    for event in merged[1:-1]:
        assert (need := needed(event, event["rank"], 3)) is None or need in seen
        seen.add((event["rank"], event["kind"], about(event)))
    for event in (event for log in logs for event in log):
        event.pop("time"), event.pop("took", None)
    assert len(merge(logs)) == len(merged), "a port may have no times"


def test_the_command_makes_one_page_of_the_logs_of_all_ranks(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = [log for log, *_ in ranks.ask(2, tasks.traced, case(build(tiny(layers=3), 0)))]
    paths = [str(tmp_path / f"rank-{rank}.jsonl") for rank in range(2)]
    for path, log in zip(paths, logs, strict=True):
        write_events(path, log)
    page = tmp_path / "page.html"
    assert main(["walk", "--events", *paths, "--output", str(page)]) == 0
    (merged,) = logs_of(page.read_text())
    assert merged == json.loads(json.dumps(merge(logs)))
    assert merged[0]["ranks"] == [[0, 2], [2, 3]]
    write_events(tmp_path / "all.jsonl", merged)
    assert read_events(tmp_path / "all.jsonl") == merged
    assert main(["walk", "--events", paths[1], "--output", str(page)]) == 2
    words = f"{paths[1]}: there are the logs of the ranks [1], but must be those of [0, 1], one of each"
    assert words in capsys.readouterr().err


def test_logs_that_are_not_of_one_step_are_refused(ranks: Ranks) -> None:
    model = build(tiny(layers=3), 0)
    first, other = (
        [log for log, *_ in ranks.ask(2, tasks.traced, case(model, chunk_size=size, method=method))]
        for size, method in ((3, "seco"), (6, "seco"))
    )
    for logs, words in (
        ([first[0], other[1]], "their 'chunks' differ"),
        ([first[0], first[0]], r"ranks \[0, 0\]"),
        ([first[0], first[1][:-1]], "no 'end'"),
        ([first[0], [e for e in first[1] if e["kind"] != "done"]], "each waits for another"),
        (
            [[{k: v for k, v in first[0][0].items() if k != "ranks"}, *first[0][1:]], first[1]],
            "must have the number 'rank'",
        ),
        ([first[0], [{**first[1][0], "ranks": [[0, 2], None]}, *first[1][1:]]], "an entry for each rank"),
    ):
        with pytest.raises(mc.InputError, match=words):
            merge(logs)


@pytest.mark.parametrize(("number", "chunks"), [(3, 6), (2, 4), (3, 2)])
def test_the_schedule_is_that_of_the_readme_and_its_bubble_that_of_the_formula(
    ranks: Ranks, number: int, chunks: int
) -> None:
    logs = ranks.ask(number, tasks.traced, case(build(tiny(layers=3), 0), 2 * chunks, 2))
    log = merge([log for log, *_ in logs])
    works = schedule(log, equal=True)
    walk = [work for work in works if work.rank == 0 and work.what != "fill"]
    span = walk[-1].stop - walk[0].start
    assert (span - len(walk)) / span == (number - 1) / (chunks + number - 1)
    if (number, chunks) == (3, 6):
        rows = []
        for rank in range(number):
            at = {int(work.start): f"{work.what[0]}{work.chunks[0]}" for work in works if work.rank == rank}
            rows.append(f"rank {rank}  " + " ".join(at.get(time, " .") for time in range(max(at) + 1)))
        assert "\n".join(rows) in (Path(__file__).parents[1] / "README.md").read_text()
    measured = schedule(log)
    assert [work[:3] for work in measured] == [work[:3] for work in works]
    assert min(work.start for work in measured) == 0.0
    assert all(work.start < work.stop for work in measured)


def test_the_schedule_is_drawn_box_by_box() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    draw_schedule(axes, [Work(0, "fill", (0, 1), 0.0, 2.0), Work(1, "rebuild", (2,), 2.5, 4.0)])
    boxes = [(box.get_x(), box.get_width(), box.get_y() + box.get_height() / 2) for box in axes.patches]
    assert boxes == [(0.0, 2.0, 0.0), (2.5, 1.5, 1.0)]
    assert [text.get_text() for text in axes.texts] == ["0–1", "2"]


def test_the_marked_lines_are_those_that_run(ranks: Ranks) -> None:
    shown = listing("pipeline_seco")
    inner = {kind: stack[-1] for kind, stack in shown["where"].items()}
    marked = {kind: shown["functions"][at]["lines"][line][0].strip() for kind, (at, line) in inner.items()}
    seen = {pair for found in ranks.ask(2, tasks.lines_of_events, case(build(tiny(layers=3), 0))) for pair in found}
    exact = {pair for pair in seen if pair[0] not in ("loss", "done")}  # a loss is written down when its relay is asked
    assert {kind for kind, _ in exact} == {"memory", "fill", "rebuild", "relay", "backward"}
    assert exact == {(kind, marked[kind]) for kind, _ in exact}


def test_what_does_not_happen_is_in_no_log(ranks: Ranks) -> None:
    """A rank without anything that learns goes back through no chunk, and a draw may keep none."""
    model = build(tiny(layers=3), 0)
    mc.add_lora(model, 2, 4)
    for name, parameter in model.named_parameters():
        if "layers.2." not in name:
            parameter.requires_grad_(False)
    log = merge([log for log, *_ in ranks.ask(2, tasks.traced, case(model, counts=[2, 1]))])
    assert {event["rank"] for event in of(log, "relay")} == {event["rank"] for event in of(log, "backward")} == {1}
    assert {work.rank for work in schedule(log, equal=True) if work.what == "backward"} == {1}
    assert [event["chunk"] for event in of(log, "done") if event["rank"] == 0] == [3, 2, 1, 0]
    kept = case(build(tiny(layers=3), 0), method="spaco", options={"sampler": keep_nothing})
    log = merge([log for log, *_ in ranks.ask(2, tasks.traced, kept)])
    assert [event["kind"] for event in log] == ["begin", "draw", "end"]
