"""The pages in a real Chromium without a window: what they ask for, how they fit, whether they can be read and used."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from finetune.report.iterations import compared
from finetune.report.page.compare_page import compare_page
from finetune.report.page.run_page import run_page
from finetune.report.page.without_rows import without_rows
from tests.unit.finished_runs import answers, evaluation, finished
from tests.unit.test_page import HOSTILE, a_run, a_suite, an_analysis, close, report_json, value_at

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
LONG = "Donaudampfschifffahrtselektrizitaetenhauptbetriebswerkbauunterbeamtengesellschaft" * 4


def odd_run() -> Any:
    """Labels, texts and names that break lines nowhere, and some that would like to be markup."""
    labels = [LONG, *HOSTILE[:4], *(f"label number {i}" for i in range(7))]
    expected = [labels[i % 12] for i in range(72)]
    prompts = [f"{LONG} {HOSTILE[i % len(HOSTILE)]} {i}" for i in range(72)]
    tuned = evaluation(expected, expected[:60] + [labels[0]] * 12, labels, prompts)
    base = evaluation(expected, [labels[3]] * 72, labels, prompts)
    return finished(
        tuned, base, LONG, an_analysis((LONG, HOSTILE[0]), LONG), suite=a_suite(LONG), prompt={"system": LONG}
    )


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    later = finished(
        answers([i % 9 != 0 for i in range(60)]), answers([i % 2 == 0 for i in range(60)]), "later", seed=4
    )
    plain = a_run(analysis=an_analysis(), suite=a_suite())
    return {
        "run": run_page(plain),
        "odd": run_page(odd_run()),
        "bare": run_page(without_rows(odd_run()), rows=False),
        "compare": compare_page(compared([a_run(), later, a_run(name="last", lora={"rank": 32})])),
        "odd compare": compare_page(compared([odd_run(), odd_run()])),
    }


@pytest.fixture(scope="module")
def served(pages: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """An address that gives the pages, and all that is asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = pages[self.path.strip("/").replace("%20", " ")].encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    with browser.new_page(viewport={"width": 1440, "height": 900}) as page:
        yield page


WHICH = pytest.mark.parametrize("which", ["run", "odd", "bare", "compare", "odd compare"])
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BEYOND = """[...document.querySelectorAll("section *")].filter((one) => !one.closest(".scroll, .unseen") &&
  one.getBoundingClientRect().right > one.closest("section").getBoundingClientRect().right).map((one) => one.outerHTML)
"""

# Every text with its contrast to what lies behind it, where that is too little (WCAG 2: AA).
FAINT = """() => {
  const ctx = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => { ctx.clearRect(0, 0, 1, 1); ctx.fillStyle = colour; ctx.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = ctx.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3]));
  const light = (colour) => { const [r, g, b] = colour.map((c) => { c /= 255;
    return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (node) => { if (!node) return [255, 255, 255];
    return over(rgba(getComputedStyle(node).backgroundColor), behind(node.parentElement)); };
  const faint = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) { const node = walker.currentNode.parentElement, style = getComputedStyle(node);
    if (!walker.currentNode.data.trim() || ["SCRIPT", "STYLE", "TITLE"].includes(node.tagName.toUpperCase())) continue;
    const back = behind(node), ink = over(rgba(node instanceof SVGElement ? style.fill : style.color), back);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) faint.push([walker.currentNode.data.trim().slice(0, 40), ratio]); }
  return faint; }"""


@WHICH
def test_a_page_asks_for_nothing_and_no_error_is_reported(tab: Any, served: tuple[str, list[str]], which: str) -> None:
    address, asked = served
    told: list[str] = []
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("dialog", lambda dialog: told.append(dialog.message))
    asked.clear()
    tab.goto(f"{address}/{which}")
    tab.mouse.wheel(0, 20_000)
    tab.wait_for_timeout(100)
    assert (asked, told) == ([f"/{which.replace(' ', '%20')}"], [])


@WHICH
def test_a_page_fits_and_can_be_read_at_every_width_and_scheme(tab: Any, pages: dict[str, str], which: str) -> None:
    tab.set_content(pages[which])
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        for width in (390, 1440):
            tab.set_viewport_size({"width": width, "height": 900})
            assert tab.evaluate(WIDER) <= 0, (width, scheme)
            assert tab.evaluate(BEYOND) == [], (width, scheme)
        assert tab.evaluate(FAINT) == [], scheme
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = tab.evaluate(ground)
    tab.emulate_media(color_scheme="light")
    assert tab.evaluate(ground) != dark


def test_text_that_is_too_faint_and_pages_that_are_too_wide_are_found(tab: Any) -> None:
    tab.set_content('<body><p style="color:#999">faint</p><p style="width:3000px">wide</p>')
    assert [text for text, _ in tab.evaluate(FAINT)] == ["faint"]
    assert tab.evaluate(WIDER) > 0


def test_pointing_at_the_curves_shows_their_figures(tab: Any, pages: dict[str, str]) -> None:
    tab.set_content(pages["run"])
    seen = "filter(t => getComputedStyle(t).visibility == 'visible').map(t => t.textContent)"
    shown = f"[...document.querySelectorAll('.wide .band text')].{seen}"
    assert tab.evaluate(shown) == []
    tab.locator(".wide .band rect").nth(20).hover()
    assert tab.evaluate(shown) == ["step 20 \u00b7 epoch 1.00", "training 0.2250, mean 0.2256 \u00b7 validation 0.3200"]


def test_the_keyboard_reads_the_curves(tab: Any, pages: dict[str, str]) -> None:
    tab.set_content(pages["run"])
    chart = tab.locator(".wide svg.chart")
    chart.focus()
    for key, says in (
        ("ArrowRight", "step 0 "),
        ("ArrowRight", "step 1 "),
        ("End", "step 40 "),
        ("ArrowLeft", "step 39 "),
    ):
        chart.press(key)
        assert tab.locator(".wide output").text_content().startswith(says)


def test_a_page_is_for_screen_readers_too(tab: Any, pages: dict[str, str]) -> None:
    for html in pages.values():
        tab.set_content(html)
        levels = tab.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        for unnamed in ("[role=img]:not([aria-label])", "[role=region]:not([aria-label])", "th:not([scope])"):
            assert tab.locator(unnamed).count() == 0
        assert tab.locator("html").get_attribute("lang") == "en"


def test_on_paper_nothing_is_folded_away(tab: Any, pages: dict[str, str]) -> None:
    tab.set_content(pages["run"])
    row = tab.locator("#recipe details td").first
    assert not row.is_visible()
    tab.emulate_media(media="print")
    assert row.bounding_box()["height"] > 0
    assert tab.pdf()[:4] == b"%PDF"


def test_what_is_seen_is_the_report(tab: Any, pages: dict[str, str]) -> None:
    tab.set_content(pages["run"])
    figures = tab.evaluate(
        "() => [...document.querySelectorAll('[data-of]')].map(e => [e.dataset.of, e.value, e.textContent])"
    )
    values = report_json(a_run(analysis=an_analysis(), suite=a_suite()))
    assert len(figures) > 60
    for key, value, shown in figures:
        assert value_at(values, key) == json.loads(value) and close(key, shown, json.loads(value))


def test_a_page_opens_from_the_disk(tab: Any, pages: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(pages["run"])
    tab.goto((tmp_path / "report.html").as_uri())
    assert tab.locator("#verdict-word").text_content() == "Better"
