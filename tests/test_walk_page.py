"""The page, in a real browser: every number drawn is one of the log's, and the controls lead to the steps they name."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import minichunk as mc
from minichunk.walk.page import make_page
from minichunk.walk.trace import BYTES

from .strategies import build, tiny, tiny_state

sync_api = pytest.importorskip("playwright.sync_api", reason="no driver for a browser: pip install -e '.[browser]'")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRAW = [mc.Weight(2.0, 1.5), None, mc.Weight(2.0, 1.5), mc.Weight(1.0, 1.0)]
READ = """() => {
  const all = (where, take) => [...document.querySelectorAll(where)].map(take);
  const norms = (name) => Object.fromEntries(all(`#grid [data-${name}]`, (x) => [x.dataset[name], Number(x.dataset.norm)]));
  const inside = (line, box) => line.top >= box.top - 1 && line.bottom <= box.bottom + 1;
  return {
    bytes: Object.fromEntries(all('#bytes td', (x) => [x.dataset.part, Number(x.dataset.bytes)])),
    bars: all('#memory g[data-step]', (g) => [...g.querySelectorAll('.bar')].reduce((h, x) => h + x.height.baseVal.value, 0)),
    table: all('#numbers [data-value]', (x) => [Number(x.dataset.value), Number(x.textContent)]),
    sent: norms('sent'), relayed: norms('relayed'), held: norms('held'),
    graphs: all('#grid [data-body=graph], #grid [data-body=input]', (x) => x.dataset.cell.split(',')[1]),
    marked: all('#code .current, #code .also', (x) => inside(x.getBoundingClientRect(), x.closest('#code').getBoundingClientRect())),
    terms: all('#equation .marked', (x) => x.dataset.at).join(' '),
  };
}"""  # noqa: E501


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, dict[str, list[dict[str, Any]]]]]:
    """A page of small steps, and their logs; in the end it has said nothing to the console and asked for nothing."""
    path, heard = next(filter(None, map(shutil.which, NAMES)), None), list[str]()
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    ids = torch.randint(23, (2, 22), generator=torch.Generator().manual_seed(2))
    draw, logs = {"sampler": lambda *_: DRAW}, {}
    for name, function, keywords in (
        ("SeCO", mc.seco, {"chunk_size": 6}), ("SpaCO", mc.spaco, {"chunk_size": 6} | draw), ("full", mc.full, {}),
        ("full, recomputed", mc.full, {"recompute": True}),
        ("SpaCO, recomputed", mc.spaco, {"chunk_size": 6, "recompute": True} | draw),
        ("SeCO, in blocks", mc.seco, {"chunk_size": 6, "layers_at_once": 1}),
    ):  # fmt: skip
        model = build(tiny_state(2) if name == "SpaCO, recomputed" else tiny(3), seed=1)
        logs[name] = mc.trace(function, model, ids, ids, **keywords)
    larger = mc.trace(mc.seco, build(tiny(3), seed=1), ids, ids, 11)
    file = tmp_path_factory.mktemp("walk") / "walk.html"
    file.write_text(make_page([*logs.values(), larger]))
    with sync_api.sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=path, args=["--no-sandbox"]).new_page()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or heard.append(request.url))
        page.goto(file.as_uri())
        yield page, logs
    assert not heard


def table_of(event: dict[str, Any]) -> list[float]:
    """The numbers of the table, but for whole ones, which have no digits to lose."""
    rows = event.get("written") or [[*norms, math.hypot(*norms)] for norms in event.get("received", [])]
    for (_, *norms), (_, *sums) in zip(event.get("sent", []), event.get("held", []), strict=True):
        rows = [*rows, [*norms, math.hypot(*sums)]]
    return [x for row in rows for x in row if x != int(x)]


def test_every_number_on_the_page_is_one_of_the_log(opened: Any) -> None:
    page, logs = opened
    for label, log in logs.items():
        page.get_by_role("button", name=label, exact=True).click()
        page.keyboard.press("Home")
        held: dict[str, float] = {}
        for number, event in enumerate(log):
            found = page.evaluate(READ)
            assert page.locator("#count").inner_text() == f"step {number} of {len(log) - 1}"
            assert {name: found["bytes"][name] for name in BYTES} == event["bytes"]
            assert found["bytes"]["sum"] == sum(event["bytes"].values())
            assert (found["bytes"]["peak-now"], found["bytes"]["peak"]) == (event["peak"], max(e["peak"] for e in log))
            scale = sum(found["bars"]) / sum(sum(e["bytes"].values()) for e in log)
            assert found["bars"] == pytest.approx([sum(e["bytes"].values()) * scale for e in log], abs=0.3)
            assert [x for x, _ in found["table"]] == pytest.approx(table_of(event), rel=1e-12)
            assert [x for _, x in found["table"]] == [float(f"{x:.5g}") for x, _ in found["table"]]
            sent = {str(i): math.hypot(*norms) for i, *norms in event.get("sent", [])}
            block = event.get("block", 0)  # of one layer
            relayed = {str(block + i): math.hypot(*norms) for i, norms in enumerate(event.get("received", []))}
            assert found["sent"] == pytest.approx(sent, rel=1e-12)
            assert found["relayed"] == pytest.approx(relayed, rel=1e-12)
            held = {} if event["kind"] in ("memory", "end") else held
            held |= {f"{event['layer']},{i}": math.hypot(*norms) for i, *norms in event.get("held", [])}
            held |= {f"{layer},{event['chunk']}": x for layer, x in relayed.items()}
            assert found["held"] == pytest.approx({key: x for key, x in held.items() if x}, rel=1e-12)
            assert len(set(found["graphs"])) <= 1, "no two graphs are alive at once"
            assert found["marked"] == [True] * ((event["kind"] not in ("begin", "end")) + (event["kind"] == "relay"))
            assert event["kind"] in ("begin", "draw", "memory", "keep") or event["kind"] in found["terms"]
            page.keyboard.press("ArrowRight")


def test_controls_and_address_lead_to_steps(opened: Any) -> None:
    page, logs = opened
    page.evaluate("location.hash = '#method=seco&chunk=6&step=6'")
    page.locator("#phase", has_text="Loss · chunk 3").wait_for()
    page.get_by_role(
        "button", name="SpaCO", exact=True
    ).click()  # the same place in another run, where the keys lead on
    assert page.locator("#phase").inner_text() == "Loss · chunk 3"
    for key, step in (("PageDown", 8), ("PageDown", 9), ("PageDown", 12), ("PageUp", 9), ("ArrowLeft", 8)):
        page.keyboard.press(key)
        assert page.evaluate("location.hash") == f"#method=spaco&chunk=6&step={step}"
    page.locator("#slider").fill("9")
    thrown = math.hypot(*logs["SpaCO"][9]["sent"][1][1:])
    sentence = page.locator("#sentence")
    assert f"Chunk 1 was skipped: {thrown:.3g} is thrown away, and every chain" in sentence.inner_text()
    assert page.locator("#grid [data-sent='1']").get_attribute("class") == "send dead"
    page.locator("#memory .peak").click()
    assert "Here is the peak: " in sentence.inner_text()
    page.get_by_role("button", name="SeCO", exact=True).click()
    page.get_by_label("Chunks of").select_option("11")
    page.get_by_label("Speed").select_option("fast")
    page.keyboard.press("Home")
    page.keyboard.press("Space")
    page.locator("#play", has_text="Play").wait_for()  # it has played to the end
    assert page.evaluate("location.hash").startswith("#method=seco&chunk=11&step=")
    assert "That is what backpropagation of the whole text has, too" in sentence.inner_text()
    for width in (340, 1000, 1920):  # a phone, a screen, a projector
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
