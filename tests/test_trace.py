"""The event log: what is watched is what is computed, and what is written down is so."""

from __future__ import annotations

import gc
import json
import re
import traceback
from itertools import accumulate
from pathlib import Path
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
from minichunk.costs.count import CountBytes
from minichunk.protocol import Options
from minichunk.seco import fill, new_memory, rebuild
from minichunk.walk.page import ALGORITHMS, WalkOptions, listing, make_page, record, title
from minichunk.walk.trace import BYTES

from .gradients import take_gradients
from .strategies import CUTS, Batch, batches, build, examples, models, tiny, tiny_state

PACKAGE = Path(mc.__file__).parent
COMMITTED = PACKAGE.parent / "tutorials" / "walk.html"
Log = list[dict[str, Any]]


def small(kind: str = "attention") -> tuple[Any, tuple[Tensor, Tensor]]:
    ids = torch.randint(23, (2, 22), generator=torch.Generator().manual_seed(2))
    return build(tiny(3) if kind == "attention" else tiny_state("sas"), seed=1), (ids, ids)


def kinds(log: Log) -> list[str]:
    return [event["kind"] for event in log]


def of(log: Log, kind: str) -> Log:
    return [event for event in log if event["kind"] == kind]


def logs_of(page: str) -> list[Log]:
    """The logs that a page was made of."""
    (data,) = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    return [run["events"] for run in json.loads(data)["runs"]]


# What is watched is what is computed.


@examples(12)
@given(
    model=models(),
    batch=batches(),
    chunk_size=st.integers(1, 16),
    method=st.sampled_from([mc.seco, mc.spaco, mc.full]),
    recompute=st.booleans(),
    at_once=CUTS,
    seed=st.integers(0, 99),
)
def test_a_watched_step_is_the_step_bit_for_bit(
    model: mc.Llama, batch: Batch, chunk_size: int, method: Any, recompute: bool, at_once: int | None, seed: int
) -> None:
    keywords: dict[str, Any] = {} if method is mc.full else {"chunk_size": chunk_size, "layers_at_once": at_once}
    keywords |= {"sampler": mc.Bernoulli(0.6)} if method is mc.spaco else {}
    take_gradients(model)
    torch.manual_seed(seed)
    loss = method(model, batch.input_ids, batch.labels, recompute=recompute, **keywords)
    expected = take_gradients(model)
    torch.manual_seed(seed)
    log = mc.trace(method, model, batch.input_ids, batch.labels, recompute=recompute, **keywords)
    got = take_gradients(model)
    assert log[-1]["loss"] == float(loss)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert log[-1]["gradient_norm"] == pytest.approx(float(norm), rel=1e-12)
    sums = [*accumulate(event["loss"] for event in of(log, "loss"))]
    done = [event["loss"] for event in of(log, "done")]  # in the lower blocks, which have no loss, the last sum
    assert done == pytest.approx(sums + sums[-1:] * (len(done) - len(sums)), rel=1e-12)


@pytest.mark.parametrize("kind", ["attention", "state"])
def test_the_events_of_a_step_come_in_the_order_of_the_algorithm(kind: str) -> None:
    model, batch = small(kind)
    chunk = ["rebuild", "loss", "relay", *["backward"] * 3, "done"]
    assert kinds(mc.trace(mc.seco, model, *batch, 9)) == ["begin", "memory", *["fill"] * 2, *chunk * 3, "end"]
    draw = [mc.Weight(1.5, 2.0), None, mc.Weight(1.0, 1.0)]
    log = mc.trace(mc.spaco, model, *batch, 9, sampler=lambda *_: draw, recompute=True)
    assert kinds(log) == ["begin", "draw", "memory", *["fill"] * 2, *chunk * 2, "end"]
    assert of(log, "draw")[0]["entries"] == [[1.5, 2.0], None, [1.0, 1.0]]
    assert "rates" not in of(log, "draw")[0], "nothing is known of their chances"
    coins = mc.trace(mc.spaco, model, *batch, 9, sampler=mc.Bernoulli([0.5, 1.0, 1.0]))
    assert of(coins, "draw")[0]["rates"] == [0.5, 1.0, 1.0]
    assert [(e["chunk"], e["layer"]) for e in of(log, "backward")] == [(j, i) for j in (2, 0) for i in (2, 1, 0)]
    assert of(mc.trace(mc.seco, model, *batch, 9, fill_size=18), "fill")[0]["chunks"] == [0, 1]
    log = mc.trace(mc.seco, model, *batch, 9, layers_at_once=2)
    up, filled = ["memory", *["fill", "keep"] * 3], ["memory", *["fill"] * 2]
    upper = ["rebuild", "loss", "relay", "backward", "done", "keep"]
    lower = ["rebuild", "relay", *["backward"] * 2, "done"]
    assert kinds(log) == ["begin", *up, *filled, *upper * 3, *filled, *lower * 3, "end"]
    assert log[0]["blocks"] == [[0, 2], [2, 3]]
    assert [(event["block"], event["up"]) for event in log[1:9:7]] == [(0, True), (1, False)]
    assert kinds(mc.trace(mc.full, model, *batch)) == ["begin", "forward", "loss", *["backward"] * 3, "done", "end"]
    assert kinds(mc.trace(mc.spaco, model, *batch, 9, sampler=lambda *_: [None] * 3)) == ["begin", "draw", "end"]


def test_nothing_is_left_behind_not_even_by_a_step_that_fails() -> None:
    model, batch = small()
    before = torch.autograd.backward
    with pytest.raises(ZeroDivisionError):
        mc.trace(mc.spaco, model, *batch, 9, sampler=lambda *_: 1 / 0)
    mc.trace(mc.seco, model, *batch, 9)
    assert torch.autograd.backward is before
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(mc.InputError, match="chunk_size"):
        mc.trace(mc.seco, model, *batch, 0)
    with pytest.raises(mc.InputError, match="trace watches seco, spaco or full, but was given pipeline_seco"):
        mc.trace(mc.pipeline_seco, model, *batch, 9)


# What is written down is so.


@pytest.mark.parametrize("kind", ["attention", "state"])
def test_norms_and_losses_are_those_of_the_step(kind: str) -> None:
    """Against the algorithm's own parts, called one by one; SeCO is the draw that keeps everything."""
    model, (ids, labels) = small(kind)
    prepared, chunks = prepare(model, ids, labels, None), cut(22, 6)
    for draw in ([mc.Weight(1.0, 1.0)] * 4, [mc.Weight(1.5, 2.0), None, mc.Weight(1.25, 3.0), mc.Weight(1.75, 2.5)]):
        take_gradients(model)
        log = mc.trace(mc.spaco, model, ids, labels, 6, sampler=lambda *_, draw=draw: draw)
        kept = [i for i, weight in enumerate(draw) if weight is not None]
        memory = new_memory(model, ids, [chunks[i] for i in kept], Options())
        fill(model, ids, chunks[:-1], memory, Options())
        events = zip(of(log, "rebuild"), of(log, "loss"), of(log, "relay"), strict=True)
        for i, (rebuilt, lost, relayed) in zip(reversed(kept), events, strict=True):
            weight = draw[i]
            assert weight is not None
            _, made = model.run(ids[:, span([chunks[i]])], memory, [chunks[i]])
            assert rebuilt["chunk"] == lost["chunk"] == relayed["chunk"] == i
            assert rebuilt["written"] == [[float(x.detach().norm()) for x in layer] for layer in made]
            assert rebuilt["shapes"] == [[list(x.shape) for x in layer] for layer in made]
            loss, written, received = rebuild(model, prepared, chunks[i], memory, Options())
            assert lost["loss"] == float((weight.loss * loss).detach())
            norms = [norm for layer in relayed["received"] for norm in layer if norm > 0]
            assert norms == [float(g.norm()) for g in received if g.norm() > 0]
            assert (lost["factor"], relayed["factor"]) == weight
            torch.autograd.backward([weight.loss * loss, *written], [None, *(weight.relay * g for g in received)])


@pytest.mark.parametrize("at_once", [None, 1])
@pytest.mark.parametrize("pattern", [None, mc.Window(4, 2), mc.Strided(2, 2, 3), "adapter"])
def test_what_is_sent_is_what_a_chunk_receives(pattern: Any, at_once: int | None) -> None:
    """With LoRA nothing needs the gradient of layer 0's input: there is no sign that its backward pass is over."""
    model, (ids, _) = small()
    mc.add_lora(model, 2, 4) if pattern == "adapter" else pattern and mc.partial_context(model, pattern, [0])
    log = mc.trace(mc.seco, model, ids, ids, 6, layers_at_once=at_once)
    assert all(e["sent"] == e["held"] for e in of(log, "backward") if e["chunk"] == 3)
    # The last `held` is the sum of all that was sent: what the chunk receives.
    held = {(i, e["layer"]): norms for e in of(log, "backward") for i, *norms in e["held"]}
    for event in of(log, "relay"):
        for layer, norms in enumerate(event["received"], start=event.get("block", 0)):
            assert norms == pytest.approx(held[event["chunk"], layer], rel=1e-12)


@pytest.mark.parametrize("kind", ["attention", "state"])
@pytest.mark.parametrize("method", ["seco", "spaco", "seco-blocks", "full"])
def test_bytes_are_those_that_are_alive(method: str, kind: str) -> None:
    model, batch = small(kind)
    function, chunks, at_once = ALGORITHMS[method.partition("-")[0]], cut(22, 9), 2 if "blocks" in method else None
    keywords: dict[str, Any] = {"chunk_size": 9, "recompute": method == "seco", "layers_at_once": at_once}
    keywords = {} if method == "full" else keywords
    if method == "spaco":
        keywords["sampler"] = lambda *_: [mc.Weight(2.0, 2.0), None, mc.Weight(2.0, 2.0)]
    with CountBytes() as count:
        count.add(*model.parameters(), *model.buffers(), *batch)
        function(model, *batch, **keywords)
    take_gradients(model)
    receiving, blocks = chunks[:1] if method == "spaco" else chunks[:2], model.blocks(at_once or 3)
    rooms = {
        (block, up): blocks[block].new_memory(2, *([22, ()] if up else [18, receiving])).tensors().bytes()
        for block in range(len(blocks))
        for up in (False, True)
    }

    def look(event: dict[str, Any]) -> None:
        there = method != "full" and event["kind"] not in ("begin", "draw", "end")
        room = rooms[event.get("block", 0), event.get("up", False)]
        assert (event["bytes"]["memory"], event["bytes"]["memory_gradients"]) == (room if there else (0, 0))
        assert event["bytes"]["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        assert set(event["bytes"]) == set(BYTES)
        assert min(event["bytes"].values()) >= 0

    gc.collect()
    gc.disable()  # the memory is gone at once, not when the garbage collector comes by: nothing holds itself
    try:
        log = mc.trace(function, model, *batch, on_event=look, **keywords)
    finally:
        gc.enable()
    assert {event["bytes"]["weights"] for event in log} == {sum(p.nbytes for p in model.parameters())}
    assert log[0]["bytes"]["activations"] == batch[0].nbytes == log[-1]["bytes"]["activations"] - 8, "and the loss"
    assert all(sum(event["bytes"].values()) <= event["peak"] for event in log)
    assert log[-1]["peak"] < max(event["peak"] for event in log), "since the event before, not since the beginning"
    # But for the numbers that are being recorded, the peak is that of the step alone.
    assert max(event["peak"] for event in log) == count.peak
    alive = {event["kind"]: event["bytes"]["activations"] for event in log}
    assert alive["done"] < alive["forward" if method == "full" else "rebuild"], "the graph is gone"


@pytest.mark.parametrize("method", ["seco", "spaco", "seco-blocks", "full"])
def test_the_marked_lines_are_those_that_run(method: str) -> None:
    """At each event of a step of another size, the functions that run are at the lines that the page marks."""
    model, batch = small()
    torch.manual_seed(1)  # some chunks are kept
    shown, seen = listing(method), set()

    def look(event: dict[str, Any]) -> None:
        stack = [(Path(frame.f_code.co_filename), number) for frame, number in traceback.walk_stack(None)]
        running = [(path.name, number) for path, number in reversed(stack) if path.parent == PACKAGE]
        running = [(name, number) for name, number in running if name in {file["file"] for file in shown["functions"]}]
        key = event["kind"] + (" up" if event.get("up") else "")
        marked = [(shown["functions"][at], line) for at, line in shown["where"][key]]
        assert running == [(function["file"], function["first"] + line) for function, line in marked]
        for function, line in marked:
            text = (PACKAGE / function["file"]).read_text().splitlines()[function["first"] + line - 1]
            assert text.strip() == function["lines"][line].strip()
        seen.add((key, bool(marked)))

    told: dict[str, Any] = {} if method == "full" else {"chunk_size": 9}
    told |= {"layers_at_once": 2} if "blocks" in method else {}
    mc.trace(ALGORITHMS[method.partition("-")[0]], model, *batch, on_event=look, **told)
    assert seen == {(kind, kind not in ("begin", "end")) for kind in shown["where"]}
    assert seen >= {("forward" if method == "full" else "relay", True), ("loss", True), ("backward", True)}


def test_a_log_is_described() -> None:
    words, (model, batch) = COMMITTED.with_name("walk.md").read_text(), small()
    for log in (mc.trace(mc.seco, model, *batch, 9, layers_at_once=2), mc.trace(mc.full, model, *batch)):
        assert all(f"`{name}`" in words for event in log for name in (event["kind"], *event))


# The command, and the page that is committed.


def test_the_command_writes_page_and_logs(
    model_directory: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs, output = tmp_path / "logs", ["--output", str(tmp_path / "page.html")]
    walk = ["walk", "--model", str(model_directory), "--data", str(text), "--seq-len", "40", "--device", "cpu", *output]
    assert main([*walk, "--chunk-size", "8", "16", "--budget", "2", "--log", str(logs)]) == 0
    assert f"written  {tmp_path / 'page.html'}" in capsys.readouterr().out
    names = [f"{name}-{size}" for name in ("seco", "spaco", "seco-blocks") for size in (8, 16)]
    names += ["full", "full-recompute"]
    found = logs_of((tmp_path / "page.html").read_text())
    assert [title(log) for log in found] == names
    assert found == [[*map(json.loads, (logs / f"{name}.jsonl").read_text().splitlines())] for name in names]
    assert "".join(found[0][0]["text"])[:10] == text.read_text()[:10]


def test_no_text_ends_the_script_of_a_page() -> None:
    hostile = "</script><script>alert(1)</script><!--"
    page = make_page([[{"method": "seco", "text": [hostile, ""]}]])
    assert page.count("</script>") == 2
    assert logs_of(page)[0][0]["text"][0] == hostile


def numbers(event: dict[str, Any]) -> list[float]:
    """All numbers in an event but those of bytes, in order."""
    text = json.dumps({name: value for name, value in event.items() if name not in ("bytes", "peak", "torch", "text")})
    return [float(x) for x in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text)]


def test_the_committed_page_is_what_the_command_writes() -> None:
    page = COMMITTED.read_text(encoding="utf-8")
    logs = {title(log): log for log in logs_of(page)}
    again = "minichunk walk --output tutorials/walk.html"
    assert page == make_page(list(logs.values())), f"the page or the code has changed: {again}"
    assert set(re.findall(r"\w+://[^\"]+", page)) == {"https://arxiv.org/abs/2505.16710"}, "linked, not loaded"
    for fresh in record(WalkOptions(chunk_size=(128,), dtype="float32", device="cpu")):
        log = logs[title(fresh)]
        assert kinds(log) == kinds(fresh)
        assert log[0]["text"] == fresh[0]["text"]
        for one, other in zip(log, fresh, strict=True):
            assert numbers(one) == pytest.approx(numbers(other), rel=1e-3), again
            assert one["peak"] == pytest.approx(other["peak"], rel=0.05), again  # another PyTorch may keep a bit more
    for name in ("seco-64", "seco-128", "seco-256"):
        assert logs[name][-1]["gradient_norm"] == pytest.approx(logs["full"][-1]["gradient_norm"], rel=1e-4)
    assert next(iter(logs)) == "seco-128", "the one that is shown first"


def test_a_tutorial_links_to_a_step_of_the_kind_that_it_says() -> None:
    pattern = r"\[the walk, step (\d+): (\w+)\]\(walk\.html#method=(\w+)&chunk=(\d+)&step=(\d+)\)"
    logs = {title(log): log for log in logs_of(COMMITTED.read_text(encoding="utf-8"))}
    for path in COMMITTED.parent.glob("0[1-4]_*.md"):
        ((said, kind, method, size, step),) = re.findall(pattern, path.read_text())
        log, event = logs[f"{method}-{size}"], logs[f"{method}-{size}"][int(step)]
        assert (said, event["kind"]) == (step, kind)
        assert kind != "relay" or event["received"], "one that relays something"
        assert kind != "loss" or event["peak"] == max(e["peak"] for e in log), "the peak"
        assert method != "spaco" or of(log, "draw")[0]["entries"][event["sent"][1][0]] is None, "what is lost"
