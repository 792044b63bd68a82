"""The page, in a real browser: every control does what it says, and every number drawn is one of the log's."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import minichunk as mc
from minichunk.walk.events import BYTES
from minichunk.walk.page import logs_of, write_page
from minichunk.walk.step import METHODS

from .gradients import take_gradients
from .strategies import build, tiny, tiny_state

sync_api = pytest.importorskip("playwright.sync_api", reason="no driver for a browser: pip install -e '.[browser]'")
TUTORIALS = Path(__file__).parents[1] / "tutorials"
COMMITTED = TUTORIALS / "walk.html"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRAW = [mc.Weight(2.0, 1.5), None, mc.Weight(2.0, 1.5), mc.Weight(1.0, 1.0)]
Page = Any


READ = """() => {
  const all = (where, take) => [...document.querySelectorAll(where)].map(take);
  const key = (text) => (isNaN(text) ? text : Number(text));
  const sized = (name) => (x) => [key(x.dataset[name]), Number(x.dataset.norm)];
  return {
    bytes: Object.fromEntries(all('#bytes td', (x) => [x.dataset.part, x.dataset.bytes])),
    table: all('#numbers [data-value]', (x) => Number(x.dataset.value)),
    shown: all('#numbers [data-value]', (x) => Number(x.textContent)),
    sent: all('#grid [data-sent]', sized('sent')),
    relayed: all('#grid [data-relayed]', (x) => Number(x.dataset.norm)),
    held: Object.fromEntries(all('#grid [data-held]', sized('held'))),
    bodies: Object.fromEntries(all('#grid [data-body]', (x) => [x.dataset.cell, x.dataset.body])),
    current: all('#code .current code', (x) => x.textContent),
  };
}"""
UNNAMED = """() => [...document.querySelectorAll('button, input, select, a, svg[role=img], section')].filter((x) =>
  !(x.ariaLabel || x.getAttribute('aria-labelledby') || x.closest('label') || x.textContent.trim())).length"""
INSIDE = """(x) => {
  const line = x.getBoundingClientRect(), box = x.closest('#code').getBoundingClientRect();
  return line.top >= box.top - 1 && line.bottom <= box.bottom + 1;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Opens a file in a window of its own; when the test is over, the page has said nothing and asked for nothing."""
    contexts, heard = [], []

    def opened(path: Path, address: str = "", **how: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **how})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or heard.append(request.url)
        )
        page.goto(path.as_uri() + address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not heard


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, torch.Tensor]:
    """A page of a small step by each method, and the model and the text that it is of."""
    model = build(tiny(3), seed=1)
    ids = torch.randint(23, (2, 22), generator=torch.Generator().manual_seed(2))
    logs = []
    for function, keywords in (
        (mc.seco, {"chunk_size": 6}),
        (mc.seco, {"chunk_size": 11}),
        (mc.spaco, {"chunk_size": 6, "sampler": lambda *_: DRAW}),
        (mc.full, {}),
        (mc.full, {"recompute": True}),
    ):
        take_gradients(model)
        logs.append(mc.trace(function, model, ids, ids, **keywords))
    take_gradients(model)
    path = tmp_path_factory.mktemp("walk") / "walk.html"
    write_page(path, logs)
    return path, model, ids


def step(page: Page) -> int:
    return int(page.locator("#slider").input_value())


def address(page: Page) -> str:
    return page.evaluate("location.hash")


def sentence(page: Page) -> str:
    return page.locator("#sentence").inner_text()


def test_buttons_slider_and_keys_lead_to_the_same_steps(open_page: Any) -> None:
    page, log = open_page(COMMITTED), logs_of(COMMITTED.read_text())[0]
    last = len(log) - 1
    rebuild = next(i for i, e in enumerate(log) if e["kind"] == "rebuild")
    assert step(page) == 0

    def click(name: str) -> None:
        page.get_by_role("button", name=name, exact=True).click()

    for name, key, expected in (
        ("One step on", "ArrowRight", 1),
        ("One step on", "ArrowRight", 2),
        ("One step back", "ArrowLeft", 1),
        ("Next phase", "PageDown", 2),
        ("Last step", "End", last),
        ("One step on", "ArrowRight", last),
        ("Previous phase", "PageUp", last - 1),
        ("First step", "Home", 0),
        ("One step back", "ArrowLeft", 0),
    ):
        before = step(page)
        click(name)
        assert step(page) == expected, name
        page.evaluate(f"location.hash = 'step={before}'")
        page.wait_for_function(f"document.getElementById('slider').value == '{before}'")
        page.locator("h1").click()
        page.keyboard.press(key)
        assert step(page) == expected, key
        assert page.locator("#count").inner_text() == f"step {expected} of {last}"
        assert address(page).endswith(f"step={expected}")
    page.locator("#slider").fill(str(rebuild))
    assert "run again, now with its graph" in sentence(page)
    page.locator("#slider").focus()
    for key, expected in (("ArrowRight", rebuild + 1), ("Home", 0), ("End", last), ("ArrowLeft", last - 1)):
        page.keyboard.press(key)  # the slider's own keys, once
        assert step(page) == expected
    kinds = []
    page.keyboard.press("Home")
    while not kinds or kinds[-1] != "end":
        page.keyboard.press("PageDown")
        kinds.append(log[step(page)]["kind"])
    chunk = ["rebuild", "loss", "relay", "backward", "done"]
    assert kinds == ["memory", *["fill"] * 3, *chunk * 4, "end"], "a phase is all layers of a backward pass, no more"


def test_keys_are_for_the_steps_after_a_method_or_a_size_is_chosen(open_page: Any) -> None:
    page = open_page(COMMITTED, "#step=5")
    for choose in (
        lambda: page.get_by_role("radio", name="SpaCO").click(),
        lambda: page.locator("#methods label").filter(has_text="SeCO").click(position={"x": 40, "y": 8}),
    ):
        choose()
        method = page.locator("#methods input:checked").get_attribute("value")
        last = int(page.locator("#slider").get_attribute("max"))
        for key, expected in (("End", last), ("ArrowLeft", last - 1), ("Home", 0), ("ArrowRight", 1), ("PageDown", 2)):
            page.keyboard.press(key)
            assert step(page) == expected, key
        page.keyboard.press("Space")
        assert page.get_by_role("button", name="Pause", exact=True).is_visible()
        page.keyboard.press("Space")
        assert page.locator("#methods input:checked").get_attribute("value") == method
    for name, value in (("size", "128"), ("speed", "900")):
        page.locator(f"#{name}").focus()
        before = step(page)
        page.keyboard.press("ArrowRight")
        assert (step(page), page.locator(f"#{name}").input_value()) == (before + 1, value)
    page.locator("#size").click()
    page.locator("#size").select_option("64")
    assert page.evaluate("document.activeElement === document.body")


def test_who_comes_to_a_control_by_the_keyboard_can_use_it(open_page: Any) -> None:
    page = open_page(COMMITTED, "#step=5")
    page.get_by_role("radio", name="SeCO").focus()
    for name in ("SpaCO", "full"):
        page.keyboard.press("ArrowRight")
        assert page.get_by_role("radio", name=name, exact=True).is_checked()
    page.keyboard.press("End")
    assert step(page) == int(page.locator("#slider").get_attribute("max"))
    page.locator("#slider").focus()
    page.keyboard.press("Space")
    assert page.get_by_role("button", name="Pause", exact=True).is_visible(), "the slider needs no space"
    page.locator("#ghosts").focus()
    page.keyboard.press("Space")
    assert not page.locator("#ghosts").is_checked()
    page.locator("#intro summary").focus()
    page.keyboard.press("Space")
    assert page.locator("#about").is_visible()


def test_it_plays_at_three_speeds_and_stops(open_page: Any) -> None:
    page = open_page(COMMITTED)
    page.clock.install(time=0)
    page.clock.pause_at(1000)  # from here on time passes only where the test lets it
    page.keyboard.press("Space")
    assert page.get_by_role("button", name="Pause", exact=True).is_visible()
    assert page.locator("#sentence").get_attribute("aria-live") == "off"
    total = 0
    for speed, milliseconds in (("normal", 900), ("slow", 1800), ("fast", 300)):
        page.locator("#speed").select_option(label=speed)
        page.clock.run_for(milliseconds * 3 + 10)
        assert step(page) == (total := total + 3), speed
    page.get_by_role("button", name="Pause", exact=True).click()
    page.clock.run_for(5000)
    assert step(page) == total
    page.get_by_role("button", name="Play", exact=True).click()
    page.clock.run_for(300 * 100)
    assert step(page) == len(logs_of(COMMITTED.read_text())[0]) - 1
    assert page.get_by_role("button", name="Play", exact=True).is_visible(), "at the end it stops"
    assert page.locator("#sentence").get_attribute("aria-live") == "polite"
    page.keyboard.press("Space")  # of the button that has the focus, once
    assert page.get_by_role("button", name="Pause", exact=True).is_visible()
    page.clock.run_for(310)
    assert step(page) == 1, "and begins again"
    page.locator("#on").focus()
    page.keyboard.press("Space")
    assert step(page) == 2, "another button's space is its own"
    assert page.get_by_role("button", name="Play", exact=True).is_visible()


def test_methods_and_sizes_are_chosen_and_the_place_is_kept(open_page: Any, made: Any) -> None:
    page = open_page(made[0], "#step=6")
    assert page.locator("#phase").inner_text() == "Loss · chunk 3"
    page.get_by_role("radio", name="SpaCO").check()
    assert address(page) == "#method=spaco&chunk=6&step=7"
    assert page.locator("#phase").inner_text() == "Loss · chunk 3"
    page.get_by_role("radio", name="full", exact=True).check()
    assert address(page).startswith("#method=full&step=")
    assert page.locator("#size").is_disabled()
    assert page.locator("rect[data-body]").count() == 3
    page.get_by_role("radio", name="SeCO").check()
    page.get_by_label("Chunks of").select_option("11")
    assert address(page).startswith("#method=seco&chunk=11&step=")
    assert page.locator("rect[data-body]").count() == 6
    page.get_by_role("radio", name="full, recomputed").check()
    assert address(page).startswith("#method=full-recompute&step=")
    page.locator("#last").click()
    page.get_by_role("radio", name="SpaCO").check()
    assert address(page) == "#method=spaco&chunk=6&step=7", "where it was left"
    again = open_page(COMMITTED, "#step=27")  # of a chunk that SpaCO skips
    for name in ("full", "SeCO", "SpaCO", "SeCO"):
        again.get_by_role("radio", name=name, exact=True).check()
    assert address(again) == "#method=seco&chunk=128&step=27"
    again = open_page(made[0], "#method=spaco&chunk=6&step=8")
    assert again.locator("#phase").inner_text() == "Relay · chunk 3"
    assert "nobody has sent anything back" in sentence(again)
    assert open_page(made[0], "#method=nonsense&chunk=x&step=-7").locator("#count").inner_text().startswith("step 0")


def test_every_number_on_the_page_is_one_of_the_log(open_page: Any, made: Any) -> None:
    """All steps of all runs: bytes, the table, the arrows, the bars, and the cells."""
    path, _, _ = made
    page, logs = open_page(path), logs_of(path.read_text())
    for log, label, size in zip(
        logs, ("SeCO", "SeCO", "SpaCO", "full", "full, recomputed"), ("6", "11", "6", "6", "6"), strict=True
    ):
        page.get_by_role("radio", name=label, exact=True).check()
        if page.locator("#size").is_enabled():
            page.locator("#size").select_option(size)
        held: dict[str, float] = {}
        page.keyboard.press("Escape")
        page.locator("#first").click()
        for number, event in enumerate(log):
            found = page.evaluate(READ)
            assert step(page) == number
            assert {name: int(found["bytes"][name]) for name in BYTES} == event["bytes"]
            assert int(found["bytes"]["sum"]) == sum(event["bytes"].values())
            assert int(found["bytes"]["peak-now"]) == event["peak"]
            assert int(found["bytes"]["peak"]) == max(e["peak"] for e in log)
            assert [x for row in found["table"] for x in [row]] == table_of(event)
            assert found["shown"] == [float(f"{x:.5g}") for x in found["table"]]
            sent = [[i, math.hypot(*norms)] for i, *norms in event.get("sent", [])]
            assert found["sent"] == [[i, pytest.approx(x, rel=1e-12)] for i, x in sent]
            received = event["received"] if event["kind"] == "relay" else []
            assert found["relayed"] == [pytest.approx(math.hypot(*norms)) for norms in received]
            held = {} if event["kind"] == "end" else held
            held |= {f"{event['layer']},{i}": math.hypot(*norms) for i, *norms in event.get("held", [])}
            assert found["held"] == pytest.approx(held)
            graphs = {cell for cell, body in found["bodies"].items() if body in ("graph", "input")}
            assert len({cell.split(",")[1] for cell in graphs}) <= 1, "no two graphs are alive at once"
            assert len(found["current"]) == 1
            page.locator("#on").click()


def table_of(event: dict[str, Any]) -> list[float]:
    """The numbers of the table, but for whole ones, which have no digits to lose."""
    if event["kind"] == "relay":
        rows = [[*norms, math.hypot(*norms)] for norms in event["received"]]
    elif event["kind"] == "backward":
        rows = [[*norms, math.hypot(*h[1:])] for (_, *norms), h in zip(event["sent"], event["held"], strict=True)]
    elif event["kind"] == "draw":
        rows = [entry for entry in event["entries"] if entry]
    else:
        rows = event.get("written", [])
    return [pytest.approx(x, rel=1e-12) for row in rows for x in row if x != int(x)]


def test_what_is_drawn_is_what_seco_computes(open_page: Any, made: Any) -> None:
    path, model, ids = made
    page = open_page(path, "#method=seco&chunk=6&step=999")
    loss = mc.seco(model, ids, ids, 6)
    norm = torch.cat([g.flatten() for g in take_gradients(model).values()]).norm()
    values = page.locator("#values").inner_text()
    assert float(re.findall(r"loss ([\d.]+)", values)[0]) == float(f"{float(loss):.6g}")
    assert float(re.findall(r"dΘ‖ = ([\d.]+)", values)[0]) == float(f"{float(norm):.6g}")
    assert "That is what backpropagation of the whole text has, too" in sentence(page)
    page.get_by_role("radio", name="SpaCO").check()
    page.keyboard.press("End")
    page.locator("#last").click()
    loss = mc.spaco(model, ids, ids, 6, sampler=lambda *_: DRAW)
    take_gradients(model)
    assert float(re.findall(r"loss ([\d.]+)", page.locator("#values").inner_text())[0]) == float(f"{float(loss):.6g}")


def test_the_memory_is_drawn_to_scale_and_its_peak_marked(open_page: Any, made: Any) -> None:
    page, log = open_page(made[0]), logs_of(made[0].read_text())[0]
    read = """() => [...document.querySelectorAll('#memory g[data-step]')].map((g) =>
      [...g.querySelectorAll('.bar')].map((bar) => ['y', 'height'].map((x) => Number(bar.getAttribute(x)))))"""
    bars = page.evaluate(read)
    heights = [sum(height for _, height in stack) for stack in bars]
    scale = sum(heights) / sum(sum(e["bytes"].values()) for e in log)
    for stack, height, event in zip(bars, heights, log, strict=True):
        assert height == pytest.approx(sum(event["bytes"].values()) * scale, abs=0.3)
        assert [y + h for y, h in stack[1:]] == pytest.approx([y for y, _ in stack[:-1]], abs=0.11), "one on the other"
    peak = max(range(len(log)), key=lambda i: log[i]["peak"])
    assert page.locator("#memory .peak").get_attribute("data-step") == str(peak)
    page.locator("#memory .peak").click()
    assert step(page) == peak
    assert "This is the peak: " in sentence(page)
    page.locator("#first").click()
    page.locator("#peak-note a").click()
    assert step(page) == peak
    page.locator("#memory g[data-step='3'] .hit").click(position={"x": 2, "y": 2})
    assert step(page) == 3
    assert page.locator("#memory path.ghost").count() == 2
    page.get_by_label("other methods behind it").uncheck()
    assert page.locator("#memory path.ghost").count() == 0
    page.get_by_label("weights and their gradients").uncheck()
    assert page.locator("#memory .bar.weights").count() == 0
    assert page.locator("#memory .bar.activations").count() == len(log)


def test_the_marked_line_and_term_follow_the_event(open_page: Any) -> None:
    page, log = open_page(COMMITTED), logs_of(COMMITTED.read_text())[0]
    for kind, line, paper, term in (
        ("fill", "memory.write(", "2, 3: ", "fill"),
        ("rebuild", "hidden, written = model.run(", "5: ", "rebuild"),
        ("relay", "made, sent = flat(written)", "6: ", "relay"),
        ("backward", "torch.autograd.backward(", "7: ", "sum"),
    ):
        number = next(i for i, e in enumerate(log) if e["kind"] == kind)
        page.locator("#slider").fill(str(number))
        current = page.locator("#code [aria-current=step]")
        assert line in current.locator("code").inner_text()
        assert current.locator(".paper").inner_text().startswith(paper)
        assert current.evaluate(INSIDE)
        assert page.locator("#code .also").count() == (kind == "relay")
        if kind == "relay":  # it is handed over by another line: both are seen
            assert "torch.autograd.backward(" in page.locator("#code .also").inner_text()
            assert page.locator("#code .also").evaluate(INSIDE)
        assert term in page.locator("#equation .marked").evaluate_all("(all) => all.map((x) => x.dataset.term)")


def test_chains_that_die_are_seen_to(open_page: Any, made: Any) -> None:
    log = logs_of(made[0].read_text())[2]
    first = next(i for i, e in enumerate(log) if e["kind"] == "backward")
    page = open_page(made[0], f"#method=spaco&chunk=6&step={first}")
    assert page.locator("#grid .skipped").count() == 1
    assert page.locator("#grid [data-sent='1']").get_attribute("class") == "send dead"
    assert page.locator("#grid [data-sent='0']").get_attribute("class") == "send flow"
    thrown = next(math.hypot(*norms) for i, *norms in log[first]["sent"] if i == 1)
    assert f"Chunk 1 was skipped: {thrown:.3g} is thrown away, and every chain through it dies" in sentence(page)
    assert page.locator("#numbers .would-be").count() == 1


def test_what_spaco_draws_weighs_and_estimates_is_said(open_page: Any, made: Any) -> None:
    page = open_page(COMMITTED, "#method=spaco&chunk=128&step=1")
    log = next(log for log in logs_of(COMMITTED.read_text()) if log[0]["method"] == "spaco")
    assert "with probability 0.5: chunks 0, 2 and 3 are kept" in sentence(page)
    assert "Chunk 1 will be run forward, but skipped on the way back." in sentence(page)
    number = next(i for i, e in enumerate(log) if e["kind"] == "loss")
    page.locator("#slider").fill(str(number))
    loss = log[number]["loss"]
    assert f"a·J = 2 × {loss / 2:#.6g} = {loss:#.6g}" in page.locator("#values").inner_text()
    page.locator("#last").click()
    assert "The mean over all draws is exactly the full gradient" in sentence(page)
    assert re.search(r"Peak: [\d.]+ MiB here, [\d.]+ MiB for full\.", sentence(page))
    page = open_page(made[0], "#method=spaco&chunk=6&step=999")
    assert "exactly" not in sentence(page), "nobody knows by what chance these were drawn"


def test_why_the_walk_goes_backwards_is_said_and_norms_are_of_before(open_page: Any) -> None:
    log = logs_of(COMMITTED.read_text())[0]
    page = open_page(COMMITTED, f"#step={next(i for i, e in enumerate(log) if e['kind'] == 'done')}")
    assert "Chunk 2 comes next, not chunk 0, because only now have all its readers reported." in sentence(page)
    assert "so far" in page.locator("#values").inner_text()
    page.locator("#on").click()
    assert "before this chunk" in page.locator("#values").inner_text()
    assert "before this chunk" in page.locator("#grid").text_content()
    page.locator("#last").click()
    assert "would double blue and green" in sentence(page)
    assert "at the loss of every chunk" in page.locator("#peak-note").inner_text()
    begins = {open_page(COMMITTED, f"#method={m}").locator("#sentence").inner_text() for m in METHODS}
    assert len(begins) == len(METHODS)


def test_for_keyboard_and_screen_reader(open_page: Any) -> None:
    page = open_page(COMMITTED, "#step=17")
    assert page.evaluate(UNNAMED) == 0
    assert page.locator("#sentence").get_attribute("aria-live") == "polite"
    assert page.locator("#grid").get_attribute("aria-label").startswith("4 chunks by 6 layers. ")
    assert re.match(
        r"Bytes alive at each of \d+ steps. The peak, ", page.locator("#memory").get_attribute("aria-label")
    )
    assert page.locator("#slider").get_attribute("aria-valuetext") == "step 17 of 45, Relay"
    reached = set()
    page.locator("h1").click()
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.name"))
    assert {
        "method",
        "size",
        "first",
        "play",
        "last",
        "speed",
        "slider",
        "ghosts",
        "constant",
        "code",
        "log",
    } <= reached


def test_where_no_motion_is_wanted_there_is_none(open_page: Any) -> None:
    moving = "() => getComputedStyle(document.querySelector('#grid .flow')).animationName"
    assert open_page(COMMITTED, "#step=18", reduced_motion="no-preference").evaluate(moving) == "flow"
    assert open_page(COMMITTED, "#step=18", reduced_motion="reduce").evaluate(moving) == "none"


CONTRAST = """() => {
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((x) => linear(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = light(getComputedStyle(document.querySelector('#grid-panel')).backgroundColor);
  return ['#sentence', '#about', '#code .paper', '#legend', '#peak-note a', 'code'].map((name) => {
    const ink = light(getComputedStyle(document.querySelector(name)).color);
    return (Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_phone_and_projector_light_and_dark(scheme: str, open_page: Any) -> None:
    page = open_page(COMMITTED, "#method=seco&chunk=64&step=20", color_scheme=scheme)
    assert min(page.evaluate(CONTRAST)) >= 4.5
    for width in (340, 390, 700, 1000, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_function(f"innerWidth === {width}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#on").is_visible()


@pytest.mark.parametrize("step", [17, 45])
def test_all_of_a_step_is_seen_without_scrolling(step: int, open_page: Any) -> None:
    page = open_page(COMMITTED, f"#step={step}")
    for width, height in ((1440, 900), (1920, 1080)):
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_function(f"innerWidth === {width}")
        assert page.evaluate("document.documentElement.scrollHeight") <= height
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("innerWidth === 390")
    low = page.locator("#grid .theta").bounding_box()
    assert low["y"] + low["height"] < page.locator("#transport").bounding_box()["y"], "all layers, on a phone"


def test_the_log_can_be_saved(open_page: Any, made: Any) -> None:
    page = open_page(made[0], "#method=spaco&chunk=6&step=3", accept_downloads=True)
    with page.expect_download() as download:
        page.locator("#log").click()
    assert download.value.suggested_filename == "spaco-6.jsonl"
    lines = Path(download.value.path()).read_text().splitlines()
    assert [json.loads(line) for line in lines] == logs_of(made[0].read_text())[2]


def test_a_state_is_shown_as_one_and_passes_a_skipped_chunk(open_page: Any, tmp_path: Path) -> None:
    model, ids = build(tiny_state(2), seed=3), torch.randint(23, (1, 12))
    log = mc.trace(mc.spaco, model, ids, ids, 3, sampler=lambda *_: DRAW)
    write_page(tmp_path / "state.html", [log])
    page = open_page(tmp_path / "state.html", "#step=999")
    assert "memory (states)" in page.locator("#bytes").inner_text()
    number = next(i for i, e in enumerate(log) if e["kind"] == "backward" and e["chunk"] == 2)
    page.locator("#slider").fill(str(number))
    assert "the gradients of the state that it was handed go into the memory" in sentence(page)
    assert "to chunk 1 (skipped: it passes on to the chunk before, decayed)" in sentence(page)
    assert page.locator("#grid [data-sent]").get_attribute("class") == "send flow"


def test_a_foreign_log_without_bytes_and_with_ranks(open_page: Any, made: Any, tmp_path: Path) -> None:
    """What a port writes at least; and two processes with half of the layers each."""
    log = logs_of(made[0].read_text())[0]
    mine = [{k: v for k, v in event.items() if k not in ("bytes", "peak", "held", "shapes", "step")} for event in log]
    mine = [{**event, "rank": event["layer"] // 2} if "layer" in event else event for event in mine]
    mine[0]["method"] = "jax"
    write_page(tmp_path / "mine.html", [mine], ["mine"])
    page = open_page(tmp_path / "mine.html")
    assert page.get_by_role("radio", name="mine").is_checked()
    assert not page.locator("#memory").is_visible()
    number = next(i for i, e in enumerate(mine) if e.get("rank") == 1)
    page.locator("#slider").fill(str(number))
    assert sentence(page).startswith("Rank 1. The backward pass has left layer 2")
    assert "rank 0: 1" in page.locator("#grid").text_content()
    for _ in mine:
        page.locator("#on").click()


def test_a_step_on_two_ranks_fills_the_rows_of_each_when_it_is_its_turn(
    open_page: Any, made: Any, tmp_path: Path
) -> None:
    log, spans = logs_of(made[0].read_text())[0], [[0, 2], [2, 3]]
    mine: list[dict[str, Any]] = []
    for event in log:
        if event["kind"] in ("begin", "end"):
            mine.append({**event, "ranks": spans} if event["kind"] == "begin" else event)
        elif event["kind"] == "backward":
            mine.append({**event, "rank": int(event["layer"] == 2)})
        else:
            for rank, (start, stop) in enumerate(spans):
                rows = {name: event[name] for name in ("written", "shapes", "received") if event.get(name)}
                own = {name: [x if start <= i < stop else [] for i, x in enumerate(x)] for name, x in rows.items()}
                mine.append({**event, **own, "rank": rank})
    write_page(tmp_path / "ranks.html", [mine])
    page = open_page(tmp_path / "ranks.html")
    assert page.get_by_role("radio", name="SeCO, 2 ranks").is_checked()
    assert all(f"rank {rank}: {layer}" in page.locator("#grid").text_content() for rank, layer in ((0, 1), (1, 2)))
    for number, event in enumerate(mine):
        page.locator("#slider").fill(str(number))
        if "rank" not in event or event["kind"] not in ("fill", "rebuild", "relay"):
            continue
        start, stop = spans[event["rank"]]
        drawn, i = page.evaluate(READ), event.get("chunk", event.get("chunks", [0])[0])
        kind = {"fill": "run", "rebuild": "graph"}.get(event["kind"])
        for layer in range(3):
            body = drawn["bodies"][f"{layer},{i}"]
            if kind is not None and event["rank"] == 0:
                assert (body == kind) == (start <= layer < stop)
        if event.get("received"):
            assert len(drawn["relayed"]) == len([norms for norms in event["received"] if norms])
        if event["kind"] == "rebuild":
            assert ("It goes to rank 1" in sentence(page)) == (event["rank"] == 0)
        assert len(drawn["table"]) in (0, *(n * (stop - start) for n in (2, 3)))
