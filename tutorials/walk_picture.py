"""The README's moving picture: `python tutorials/walk_picture.py` goes through walk.html and writes figures/walk.webp.

Needs a Chromium, and `pip install -e '.[browser,plot]'`. Another page, another picture: `… FILE.html FILE.webp`.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZE = {"width": 1280, "height": 900}
STYLE = """#numbers-panel { display: none !important } #said { min-height: 5.6em !important }
    #code { flex: none !important; height: 340px }"""
SECONDS = {"begin": 3.0, "fill": 1.2, "rebuild": 2.5, "loss": 1.2, "relay": 3.5, "backward": 0.7, "end": 5.0}


def frames(page_file: Path) -> tuple[list[Image.Image], list[int]]:
    """A picture of every step, from the sentence down to the end of the grid, and how many milliseconds it stays."""
    pictures, durations = [], []
    with sync_playwright() as driver:
        path = next(filter(None, map(shutil.which, NAMES)))
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light", reduced_motion="reduce")
        page.goto(page_file.as_uri())
        page.add_style_tag(content=STYLE)
        page.evaluate("document.getElementById('intro').open = false")
        box = page.evaluate(
            "[document.getElementById('said').getBoundingClientRect().top,"
            " document.getElementById('grid').getBoundingClientRect().bottom]"
        )
        clip = {"x": 0, "y": box[0] - 6, "width": SIZE["width"], "height": box[1] - box[0] + 22}
        for _ in range(int(page.locator("#slider").get_attribute("max") or 0) + 1):
            kind = (page.locator("#phase").get_attribute("class") or "").removeprefix("kind-")
            pictures.append(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB"))
            durations.append(round(1000 * SECONDS.get(kind, 0.8)))
            page.locator("#on").click()
        browser.close()
    return pictures, durations


if __name__ == "__main__":
    source, target = (
        map(Path, sys.argv[1:3]) if len(sys.argv) == 3 else (HERE / "walk.html", HERE / "figures" / "walk.webp")
    )
    (first, *others), durations = frames(source.resolve())
    how = {"quality": 60, "method": 6, "minimize_size": True}
    first.save(target, save_all=True, append_images=others, duration=durations, loop=0, **how)
    print(f"written  {target}, {len(durations)} frames, {target.stat().st_size:,} bytes")
