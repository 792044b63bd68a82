"""The event log: what is watched is what is computed, and what is written down is so."""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import minichunk as mc
from minichunk.batch import prepare
from minichunk.chunks import cut, span
from minichunk.command.main import main
from minichunk.costs.baselines import Concatenating
from minichunk.costs.count import CountBytes
from minichunk.memory.window import Pattern
from minichunk.protocol import Options
from minichunk.seco import fill, new_memory, rebuild
from minichunk.walk.events import BYTES, NEEDS, check_event, compare, read_events, write_events
from minichunk.walk.listing import LISTINGS, body, find, listing
from minichunk.walk.page import MOST, logs_of, make_page
from minichunk.walk.step import record, title

from .gradients import take_gradients
from .rounding import Exact, measure
from .strategies import Batch, batches, build, examples, models, tiny, tiny_state

COMMITTED = Path(__file__).parents[1] / "tutorials" / "walk.html"
Log = list[dict[str, Any]]


def small(kind: str = "attention") -> tuple[Any, Batch]:
    model = build(tiny(3) if kind == "attention" else tiny_state("sas"), seed=1)
    ids = torch.randint(23, (2, 22), generator=torch.Generator().manual_seed(2))
    return model, Batch(ids, ids)


def pair(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.input_ids, batch.labels


def kinds(log: Log) -> list[str]:
    return [event["kind"] for event in log]


def of(log: Log, kind: str) -> Log:
    return [event for event in log if event["kind"] == kind]


# What is watched is what is computed.


@examples(12)
@given(
    model=models(),
    batch=batches(),
    chunk_size=st.integers(1, 16),
    method=st.sampled_from([mc.seco, mc.spaco, mc.full]),
    recompute=st.booleans(),
    offload=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_watched_step_is_the_step_bit_for_bit(
    model: mc.Llama, batch: Batch, chunk_size: int, method: Any, recompute: bool, offload: bool, seed: int
) -> None:
    def keywords() -> dict[str, Any]:
        if method is mc.full:
            return {"recompute": recompute}
        own = {"sampler": mc.Bernoulli(0.6), "generator": torch.Generator().manual_seed(seed)}
        return {"chunk_size": chunk_size, "recompute": recompute, "offload": offload} | (
            own if method is mc.spaco else {}
        )

    take_gradients(model)
    torch.manual_seed(seed)
    loss = method(model, *pair(batch), **keywords())
    expected = take_gradients(model)
    torch.manual_seed(seed)
    log = mc.trace(method, model, *pair(batch), **keywords())
    got = take_gradients(model)
    assert log[-1]["loss"] == float(loss)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert log[-1]["gradient_norm"] == pytest.approx(float(norm), rel=1e-12)
    losses = [event["loss"] for event in of(log, "loss")]
    sums = [event["loss"] for event in of(log, "done")]
    assert sums == pytest.approx([sum(losses[: i + 1]) for i in range(len(losses))], rel=1e-12)
    for event in log:
        check_event(event, log[0] if event is not log[0] else None)


@pytest.mark.parametrize("kind", ["attention", "state"])
def test_the_events_of_a_step_come_in_the_order_of_the_algorithm(kind: str) -> None:
    model, batch = small(kind)
    order = ["rebuild", "loss", "relay", "backward", "backward", "backward", "done"]
    assert kinds(mc.trace(mc.seco, model, *pair(batch), 9)) == ["begin", "memory", *["fill"] * 2, *order * 3, "end"]
    draw = [mc.Weight(1.5, 2.0), None, mc.Weight(1.0, 1.0)]
    log = mc.trace(mc.spaco, model, *pair(batch), 9, sampler=lambda *_: draw, recompute=True)
    assert kinds(log) == ["begin", "draw", "memory", *["fill"] * 2, *order * 2, "end"]
    assert of(log, "draw")[0]["entries"] == [[1.5, 2.0], None, [1.0, 1.0]]
    assert "rates" not in of(log, "draw")[0], "nothing is known of their chances"
    coins = mc.trace(mc.spaco, model, *pair(batch), 9, sampler=mc.Bernoulli([0.5, 1.0, 1.0]))
    assert of(coins, "draw")[0]["rates"] == [0.5, 1.0, 1.0]
    assert [(e["chunk"], e["layer"]) for e in of(log, "backward")] == [
        (j, layer) for j in (2, 0) for layer in (2, 1, 0)
    ]
    log = mc.trace(mc.seco, model, *pair(batch), 9, fill_size=18)
    assert of(log, "fill")[0]["chunks"] == [0, 1]
    assert kinds(mc.trace(mc.full, model, *pair(batch))) == [
        "begin",
        "forward",
        "loss",
        *["backward"] * 3,
        "done",
        "end",
    ]
    assert kinds(mc.trace(mc.spaco, model, *pair(batch), 9, sampler=lambda *_: [None] * 3)) == ["begin", "draw", "end"]


def test_below_the_first_layer_that_learns_gradients_still_arrive() -> None:
    """With LoRA nothing needs the gradient of layer 0's input: there is no sign that its backward pass is over."""
    model, batch = small()
    mc.add_lora(model, 2, 4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    log = mc.trace(mc.seco, model, *pair(batch), 9)
    sent = {(e["chunk"], e["layer"]) for e in of(log, "backward") if e["sent"]}
    assert sent == {(j, layer) for j in (2, 1) for layer in range(3)}


def test_nothing_is_left_behind_not_even_by_a_step_that_fails() -> None:
    model, batch = small()
    before = torch.autograd.backward

    def failing(number: int, generator: object) -> None:
        raise RuntimeError("the sampler's own")

    with pytest.raises(RuntimeError, match="the sampler's own"):
        mc.trace(mc.spaco, model, *pair(batch), 9, sampler=failing)
    mc.trace(mc.seco, model, *pair(batch), 9)
    assert torch.autograd.backward is before
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("change", [{"chunk_size": 0}, {"labels": torch.zeros(2, 3, dtype=torch.int64)}])
def test_mistakes_are_those_of_the_function(change: dict[str, Any]) -> None:
    model, batch = small()
    with pytest.raises(mc.InputError, match=next(iter(change))):
        mc.trace(mc.seco, model, **{"input_ids": batch.input_ids, "labels": batch.labels, "chunk_size": 9, **change})


# What is written down is so.


@pytest.mark.parametrize("kind", ["attention", "state"])
def test_norms_and_losses_are_those_of_the_step(kind: str) -> None:
    """Against the algorithm's own parts, called one by one; SeCO is the draw that keeps everything."""
    model, batch = small(kind)
    prepared, chunks = prepare(model, *pair(batch), None), cut(22, 6)
    for draw in ([mc.Weight(1.0, 1.0)] * 4, [mc.Weight(1.5, 2.0), None, mc.Weight(1.25, 3.0), mc.Weight(1.75, 2.5)]):
        take_gradients(model)
        log = mc.trace(mc.spaco, model, *pair(batch), 6, sampler=lambda *_, draw=draw: draw)
        kept = [i for i, weight in enumerate(draw) if weight is not None]
        memory = new_memory(model, batch.input_ids, [chunks[i] for i in kept], Options())
        fill(model, batch.input_ids, chunks[:-1], memory, Options())
        events = zip(of(log, "rebuild"), of(log, "loss"), of(log, "relay"), strict=True)
        for i, (rebuilt, lost, relayed) in zip(reversed(kept), events, strict=True):
            weight = draw[i]
            assert weight is not None
            _, made = model.run(batch.input_ids[:, span([chunks[i]])], memory, [chunks[i]])
            assert rebuilt["chunk"] == lost["chunk"] == relayed["chunk"] == i
            assert rebuilt["written"] == [[float(x.detach().norm()) for x in layer] for layer in made]
            assert rebuilt["shapes"] == [[list(x.shape) for x in layer] for layer in made]
            loss, written, received = rebuild(model, prepared, chunks[i], memory, Options())
            assert lost["loss"] == float((weight.loss * loss).detach())
            norms = [norm for layer in relayed["received"] for norm in layer if norm > 0]
            assert norms == [float(g.norm()) for g in received if g.norm() > 0]
            assert (lost["factor"], relayed["factor"]) == weight
            torch.autograd.backward([weight.loss * loss, *written], [None, *(weight.relay * g for g in received)])


def sends(model: Any, batch: Batch, size: int) -> dict[str, Tensor]:
    """What every chunk sends to every earlier one, by autograd's own means: leaves, whose `.grad` is compared."""
    textbook: Any = Concatenating(model)
    prepared, chunks = prepare(model, batch.input_ids, batch.labels, None), cut(batch.input_ids.shape[1], size)
    memory = textbook.new_memory(2, chunks[-1].start, chunks[:-1])
    fill(textbook, batch.input_ids, chunks[:-1], memory, Options())
    out = {}
    for j in reversed(range(len(chunks))):
        leaves = {(n, i): layer.chunks[chunks[i].start] for n, layer in enumerate(memory.layers) for i in range(j)}
        before = {key: [0 if x.grad is None else x.grad.clone() for x in pair] for key, pair in leaves.items()}
        loss, written, received = rebuild(textbook, prepared, chunks[j], memory, Options())
        torch.autograd.backward([loss, *written], [None, *received])
        for (n, i), pair in leaves.items():
            for name, x, b in zip(("key", "value"), pair, before[n, i], strict=True):
                out[f"{j} {n} {i} {name}"] = x.grad - b
    take_gradients(model)
    return out


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("pattern", [None, mc.Window(4, 2), mc.Strided(2, 2, 3)])
def test_what_is_sent_is_what_autograd_finds_at_leaves(pattern: Pattern | None, offload: bool) -> None:
    model, batch = small()
    if pattern is not None:
        mc.partial_context(model, pattern, [0])
    found = measure(lambda: sends(model, batch, 6))
    log = mc.trace(mc.seco, model, *pair(batch), 6, offload=offload)
    got = {
        f"{e['chunk']} {e['layer']} {i} {name}": torch.tensor(norm, dtype=torch.float64)
        for e in of(log, "backward")
        for i, *norms in e["sent"]
        for name, norm in zip(("key", "value"), norms, strict=True)
    }
    nothing = {name: torch.zeros((), dtype=torch.float64) for name in found.values}  # was sent where nothing is told
    Exact({name: x.norm() for name, x in found.values.items()}, found.noise).check({**nothing, **got})
    # The last `held` is the sum of all that was sent: what the chunk receives.
    held = {(i, e["layer"]): norms for e in of(log, "backward") for i, *norms in e["held"]}
    for event in of(log, "relay"):
        for layer, norms in enumerate(event["received"]):
            assert norms == pytest.approx(held[event["chunk"], layer], rel=1e-12)


@pytest.mark.parametrize("kind", ["attention", "state"])
@pytest.mark.parametrize("method", ["seco", "spaco", "full"])
def test_bytes_are_those_that_are_alive(method: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = small(kind)
    made: list[Any] = []
    new_memory = type(model).new_memory

    def kept(self: Any, *arguments: Any) -> Any:
        made.append(new_memory(self, *arguments))
        return made[-1]

    function = getattr(mc, method)
    keywords = {} if method == "full" else {"chunk_size": 9}
    if method == "spaco":
        keywords["sampler"] = lambda *_: [mc.Weight(2.0, 2.0), None, mc.Weight(2.0, 2.0)]
    with CountBytes() as count:
        count.add(*model.parameters(), *model.buffers(), *pair(batch))
        function(model, *pair(batch), **keywords)
    take_gradients(model)
    monkeypatch.setattr(type(model), "new_memory", kept)
    seen = []

    def look(event: dict[str, Any]) -> None:
        held = made[-1].tensors().bytes() if made and event["kind"] != "end" else (0, 0)
        assert (event["bytes"]["memory"], event["bytes"]["memory_gradients"]) == held
        assert event["bytes"]["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        assert min(event["bytes"].values()) >= 0
        seen.append(event["kind"])

    log = mc.trace(function, model, *pair(batch), on_event=look, **keywords)
    assert seen == kinds(log)
    assert {event["bytes"]["weights"] for event in log} == {sum(p.nbytes for p in model.parameters())}
    assert log[0]["bytes"]["activations"] == sum(x.nbytes for x in {batch.input_ids})
    assert all(sum(event["bytes"].values()) <= event["peak"] for event in log)
    assert log[-1]["peak"] < max(event["peak"] for event in log), "since the event before, not since the beginning"
    # But for the numbers that are being recorded, the peak is that of the step alone.
    assert max(event["peak"] for event in log) == count.peak
    if method != "full":
        assert max(sum(of(log, k)[-1]["bytes"].values()) for k in ("done", "end")) < sum(
            of(log, "rebuild")[0]["bytes"].values()
        )
        cache = {"attention": 2 * 3 * 2 * 2 * 18 * 4 * 8}  # keys and values: layers, B, G, positions, D, float64
        assert of(log, "memory")[0]["bytes"]["memory"] == cache.get(kind, of(log, "memory")[0]["bytes"]["memory"])


@pytest.mark.parametrize("kind", ["attention", "state"])
def test_when_the_step_is_over_its_memory_is_gone(kind: str) -> None:
    """At once, not when the garbage collector comes by: nothing holds itself."""
    model, batch = small(kind)
    gc.collect()
    gc.disable()
    try:
        log = mc.trace(mc.seco, model, *pair(batch), 9)
    finally:
        gc.enable()
    loss = 8
    assert log[-1]["bytes"]["activations"] == log[0]["bytes"]["activations"] + loss


# The lines of the code.


@pytest.mark.parametrize("method", ["seco", "spaco", "full"])
def test_the_marked_lines_are_those_that_run(method: str) -> None:
    """At each event the frames of the running functions stand on the lines that the page marks."""
    model, batch = small()
    shown, functions = listing(method), LISTINGS[method]
    codes = {function.__code__: i for i, function in enumerate(functions)}
    checked = []

    def look(event: dict[str, Any]) -> None:
        frame: FrameType | None = sys._getframe()
        stack = []
        while frame is not None:
            if frame.f_code in codes:
                at = codes[frame.f_code]
                stack.insert(0, [at, frame.f_lineno - shown["functions"][at]["first"]])
            frame = frame.f_back
        if stack and event["kind"] not in ("done", "end") and (method, event["kind"]) != ("full", "loss"):
            marked = json.loads(json.dumps(shown["where"][event["kind"]]))
            marked[-1][1] += event["kind"] == "loss"  # seen when the line after it asks the memory
            assert stack == marked, event["kind"]
            checked.append(event["kind"])

    keywords: dict[str, Any] = {} if method == "full" else {"chunk_size": 9}
    if method == "spaco":
        keywords["sampler"] = mc.Bernoulli(1.0)
    mc.trace(getattr(mc, method), model, *pair(batch), on_event=look, **keywords)
    expected = {"forward"} if method == "full" else {"memory", "fill", "rebuild", "loss", "relay"}
    assert shown["also"] == ({} if method == "full" else {"relay": shown["where"]["backward"]})
    assert set(checked) == expected | {"backward"} | ({"draw"} if method == "spaco" else set())


def test_a_line_that_has_gone_is_missed() -> None:
    with pytest.raises(LookupError, match="0 lines of seco begin with 'pass'"):
        find(mc.seco, "pass")
    with pytest.raises(LookupError, match="2 lines of seco begin with '    t'"):
        find(mc.seco, "    t")
    text = (Path(mc.__file__).parent / "seco.py").read_text().splitlines()
    assert all(text[number - 1].strip() == line.strip() for number, line in body(mc.seco))


# The log as an interface.


def test_a_log_can_be_written_and_read(tmp_path: Path) -> None:
    model, batch = small()
    log = mc.trace(mc.seco, model, *pair(batch), 9)
    write_events(tmp_path / "log.jsonl", log)
    assert read_events(tmp_path / "log.jsonl") == log
    assert all(set(event["bytes"]) == set(BYTES) for event in log)


def test_every_kind_and_field_is_described() -> None:
    from minichunk.walk import events

    described = events.__doc__ or ""
    model, batch = small()
    for kind, fields in NEEDS.items():
        assert f"| `{kind}`" in described
        assert all(f"`{field}`" in described for field in fields)
    for log in (mc.trace(mc.seco, model, *pair(batch), 9), mc.trace(mc.full, model, *pair(batch))):
        assert all(f"`{field}`" in described for event in log for field in event)


BEGIN = {"kind": "begin", "format": "minichunk trace 1", "method": "mine", "chunks": [[0, 4], [4, 8]], "layers": 2}


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ([], "'kind' is one of begin"),
        ({"kind": "fil"}, "'kind' is one of begin"),
        ({**BEGIN}, "'begin' is out of place"),
        ({"kind": "relay", "chunk": 0}, "'relay' needs the field 'received', of type list"),
        ({"kind": "loss", "chunk": 0, "loss": "1"}, "needs the field 'loss', of type float"),
        ({"kind": "done", "chunk": 2}, "names the chunks [2], but they go from 0 to 1"),
        ({"kind": "backward", "chunk": 1, "layer": 2, "sent": []}, "'layer' is 2, but layers go from 0 to 1"),
        ({"kind": "backward", "chunk": 1, "layer": 0, "sent": [1]}, "'sent' and 'held' must be lists of"),
        ({"kind": "backward", "chunk": 1, "layer": 0, "sent": [[5, 1.0]]}, "names the chunks [5, 1]"),
        ({"kind": "relay", "chunk": 0, "received": [[1.0]]}, "'received' has 1 entries, but must have 2"),
        ({"kind": "draw", "entries": [None]}, "'entries' has 1 entries, but must have 2"),
        ({"kind": "done", "chunk": 0, "bytes": {"weights": 1}}, "'bytes' must be an object with the integers weights"),
    ],
)
def test_a_foreign_log_that_cannot_be_drawn_is_refused(
    event: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(BEGIN)}\n\n{json.dumps(event)}\n")
    assert main(["walk", "--events", str(path), "--output", str(tmp_path / "page.html")]) == 2
    assert f"{path}, line 3: " in (error := capsys.readouterr().err)
    assert words in error
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no event"),
        ("x", "line 1: not JSON"),
        ('{"kind": "end", "loss": 1.0}', "'end' is out of place"),
        (json.dumps({**BEGIN, "format": "other"}), "the format is 'other'"),
        (json.dumps({**BEGIN, "chunks": [4]}), "'chunks' must be a list of [start, stop]"),
        (json.dumps({**BEGIN, "layers": 0}), "'layers' at least 1"),
    ],
)
def test_a_foreign_log_begins_with_begin(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(text)
    with pytest.raises(mc.InputError) as error:
        read_events(tmp_path / "mine.jsonl")
    assert words in str(error.value)


def changed(log: Log, change: Callable[[dict[str, Any]], None], kind: str, number: int = 0) -> Log:
    copy = json.loads(json.dumps(log))
    change(of(copy, kind)[number])
    return copy


def last_of(log: Log) -> str:
    return f"backward of chunk 0, layer {log[-3]['layer']}"


def test_two_logs_are_compared_up_to_the_first_event_that_differs() -> None:
    model, batch = small()
    log = mc.trace(mc.seco, model, *pair(batch), 9)
    assert compare(log, log) is None
    bare = [{k: v for k, v in e.items() if k in ("kind", *NEEDS[e["kind"]])} for e in log]
    assert compare(log, bare) is None, "optional fields may be absent"
    assert compare(log, [e for e in bare if e["kind"] not in ("memory", "done", "relay")]) is None, "so may kinds"

    def scale(field: str, factor: float) -> Callable[[dict[str, Any]], None]:
        def change(event: dict[str, Any]) -> None:
            value = event[field]
            if isinstance(value, list):
                value[0][-1] *= factor
            else:
                event[field] = value * factor

        return change

    for kind, field in (("fill", "written"), ("relay", "received"), ("backward", "sent"), ("loss", "loss")):
        number = next(i for i, e in enumerate(of(log, kind)) if e[field])
        assert compare(log, changed(log, scale(field, 1 + 1e-6), kind, number)) is None
        found = compare(log, changed(log, scale(field, 1 + 1e-3), kind, number))
        assert found is not None
        event = of(log, kind)[number]
        assert found.startswith(f"event {event['step']}, {kind} of chunk")
        assert f": {field}" in found
        assert compare(log, changed(log, scale(field, float("nan")), kind, number)) is not None
    assert "in the other log event 3 is rebuild of chunk 2" in str(compare(log, [*log[:3], *log[4:]]))
    assert compare(log, log[:-3]) == f"one log ends where the other has event {len(log) - 3}, {last_of(log)}"
    assert compare(log[:-3], log) == compare(log, log[:-3])
    swapped = changed(log, lambda event: event.update(chunk=1), "rebuild")
    assert "rebuild of chunk 2: in the other log event 4 is rebuild of chunk 1" in str(compare(log, swapped))


def test_a_relay_that_is_forgotten_shows_where_it_first_matters() -> None:
    """As a port would find it: everything is alike, until the chunk before last sends too little."""
    model, batch = small()
    right = mc.trace(mc.seco, model, *pair(batch), 6)
    take_gradients(model)
    wrong = mc.trace(mc.spaco, model, *pair(batch), 6, sampler=lambda k, _: [mc.Weight(1.0, 0.0)] * k)
    mine = [{k: v for k, v in event.items() if k != "factor"} for event in wrong]
    found = compare(right, mine)
    assert found is not None
    first = next(e for e in of(right, "backward") if e["chunk"] == 2)  # its last layer needs no relay
    assert found.startswith(f"event {first['step'] + 1}, backward of chunk 2, layer 1: sent")


# The command.


@pytest.fixture
def walk(model_directory: Path, text: Path, tmp_path: Path) -> list[str]:
    return [
        "walk", "--model", str(model_directory), "--data", str(text), "--seq-len", "40", "--device", "cpu",
        "--output", str(tmp_path / "page.html"),
    ]  # fmt: skip


def test_the_command_writes_page_and_logs(walk: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = tmp_path / "logs"
    assert main([*walk, "--chunk-size", "8", "16", "--budget", "2", "--log", str(logs)]) == 0
    assert f"written  {tmp_path / 'page.html'}" in capsys.readouterr().out
    names = ["seco-8", "seco-16", "spaco-8", "spaco-16", "full", "full-recompute"]
    assert {path.stem for path in logs.iterdir()} == set(names)
    found = logs_of((tmp_path / "page.html").read_text())
    assert [title(log) for log in found] == names
    assert found == [read_events(logs / f"{name}.jsonl") for name in names]
    assert len({log[-1]["loss"] for log in found if log[0]["method"] != "spaco"}) >= 1
    assert "".join(found[0][0]["text"])[:10] == text_of(walk)[:10]
    a, b = (str(logs / f"{name}.jsonl") for name in ("seco-8", "spaco-8"))
    assert main(["walk", "--compare", a, a]) == 0
    assert "no event differs by more than 0.0001" in capsys.readouterr().out
    assert main(["walk", "--compare", a, b]) == 2
    assert f"{a} and {b} differ: event" in capsys.readouterr().err
    assert main(["walk", "--events", a, b, "--output", str(tmp_path / "both.html")]) == 0
    assert logs_of((tmp_path / "both.html").read_text()) == [found[0], found[2]]


def text_of(walk: list[str]) -> str:
    return Path(walk[walk.index("--data") + 1]).read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--method naive", "--method is 'naive'"),
        ("--seq-len 1", "--seq-len is 1"),
        ("--chunk-size 0", "--chunk-size is 0"),
        ("--chunk-size 8 0", "--chunk-size is 0"),
        ("--chunk-size 1", "--chunk-size 1 cuts 40 tokens into 40 chunks, but the page has room for 32"),
        ("--budget 0", "--budget is 0"),
        ("--rank -1", "--rank is -1"),
        ("--model nowhere", "nowhere"),
        ("--data nowhere.txt", "nowhere.txt cannot be read"),
        ("--events nowhere.jsonl", "nowhere.jsonl cannot be read"),
        ("--compare a.jsonl", "expected 2 arguments"),
        ("--device tpu", "--device is 'tpu'"),
        ("--output {text}/x.html", "cannot be written"),
        ("--log {text}", "is a file, but must be a directory"),
    ],
)
def test_mistakes(walk: list[str], text: Path, change: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*walk, *change.format(text=text).split()]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_page_is_under_a_megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(mc.InputError, match="take fewer or larger chunks"):
        make_page([[{**BEGIN, "text": ["x" * MOST]}]])


def test_a_text_cannot_end_the_script() -> None:
    hostile = "</script><script>alert(1)</script><!--"
    page = make_page([[{**BEGIN, "text": [hostile, ""]}]])
    assert page.count("</script>") == 2
    assert logs_of(page)[0][0]["text"][0] == hostile


# The page that is committed.


def test_the_committed_page_is_what_the_command_writes() -> None:
    page = COMMITTED.read_text(encoding="utf-8")
    logs = logs_of(page)
    assert page == make_page(logs), "the page or the code has changed: minichunk walk --output tutorials/walk.html"
    assert len(page.encode()) < MOST
    assert set(re.findall(r"\w+://[^\"]+", page)) == {"https://arxiv.org/abs/2505.16710"}, "linked, not loaded"
    for fresh in record(chunk_size=[128], dtype="float32", device="cpu"):
        log = next(log for log in logs if title(log) == title(fresh))
        assert kinds(log) == kinds(fresh)
        assert log[0]["text"] == fresh[0]["text"]
        assert compare(log, fresh, 1e-3) is None
        for one, other in zip(log, fresh, strict=True):  # another PyTorch may keep a little more or less
            assert one["peak"] == pytest.approx(other["peak"], rel=0.05), "minichunk walk --output tutorials/walk.html"
    whole = next(log for log in logs if title(log) == "full")[-1]
    for log in logs:
        if log[0]["method"] == "seco":
            assert log[-1]["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-4)
    starts = [key for key, _ in groupby(title(log) for log in logs)]
    assert starts[0] == "seco-128", "the one that is shown first"


@pytest.mark.parametrize(
    "name", ["01_cache_and_cut", "02_seco_by_hand", "03_where_the_memory_goes", "04_spaco_unbiased"]
)
def test_a_tutorial_links_to_a_step_of_the_kind_that_it_says(name: str) -> None:
    pattern = r"\[the walk, step (\d+): (\w+)\]\(walk\.html#method=(\w+)&chunk=(\d+)&step=(\d+)\)"
    text = (COMMITTED.parent / f"{name}.md").read_text()
    found = re.findall(pattern, text)
    assert len(found) == text.count("walk.html") > 0
    logs = {title(log): log for log in logs_of(COMMITTED.read_text(encoding="utf-8"))}
    for said, kind, method, size, step in found:
        log = logs[f"{method}-{size}"]
        assert said == step
        event = log[int(step)]
        assert event["kind"] == kind
        if kind == "relay":
            assert event["received"], "one that relays something"
        if kind == "loss":
            assert event["peak"] == max(e["peak"] for e in log), "the peak"
        if method == "spaco":
            assert event["chunk"] == 3
            assert of(log, "draw")[0]["entries"][1] is None
            assert 1 in [i for i, *_ in event["sent"]], "what is lost"


def test_the_log_that_a_port_is_shown_can_be_drawn(tmp_path: Path) -> None:
    page = (COMMITTED.parent / "walk.md").read_text()
    lines = re.findall(r"```jsonl\n(.*?)```", page, re.DOTALL)[0]
    (tmp_path / "mine.jsonl").write_text(lines)
    log = read_events(tmp_path / "mine.jsonl")
    assert {event["kind"] for event in log} == NEEDS.keys() - {"draw", "memory", "forward"}
    assert all(set(event) == {"kind", *NEEDS[event["kind"]]} for event in log)
    assert logs_of(make_page([log])) == [log]
