"""The view's page in headless Chromium: what a person sees and does. Debian's chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from viewing import HOSTILE, Served, make_dataset, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

QUIET = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    spec = make_dataset(folder)
    with serving(spec.output, folder / "marks.parquet", folder / "index.duckdb", against=1) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, "--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, view: Served) -> Iterator[Any]:
    """The page, loaded; at the end nothing was complained of, and nothing was asked of anyone else."""
    opened = browser.new_page()
    said, elsewhere = [], []
    opened.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
    home = f"http://127.0.0.1:{view.server.port}/"
    opened.on(
        "request", lambda asked: None if asked.url.startswith((home, "blob:", "data:")) else elsewhere.append(asked.url)
    )
    opened.goto(view.server.url)
    opened.wait_for_selector("article")
    yield opened
    opened.close()
    assert [text for text in said if "Failed to load resource" not in text] == []  # as of a row without an image
    assert elsewhere == []


def until(page: Any, condition: str) -> None:
    """Wait; Playwright's own way would have the page evaluate a string, which its policy forbids."""
    deadline = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)


def found(page: Any) -> str:
    until(page, "!document.body.hasAttribute('aria-busy')")
    text: str = page.text_content("#found")
    return text


def web_texts(page: Any) -> list[str]:
    """Of the newer version's rows."""
    return [element.text_content() for element in page.query_selector_all(".sides > :last-child li:first-child .words")]


def show(page: Any, name: str) -> None:
    """Leave a screenshot, where someone wants to look at it."""
    if folder := os.environ.get("CAPFILT_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_hostile_texts_are_shown_as_text(page: Any) -> None:
    words = [
        element.text_content() for element in page.query_selector_all(".sides > :last-child li:first-child .words")
    ]
    assert words[0] == HOSTILE[0]
    assert words[1] == HOSTILE[1].replace("\u202e", "U+202E").replace("\u202c", "U+202C").replace(
        "\u200b", "U+200B"
    ).replace("\u2066", "U+2066").replace("\u2069", "U+2069")
    assert words[2] == HOSTILE[2]
    assert page.title() == "capfilt view: out"
    assert page.query_selector("article script, article img[src='x']") is None
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.query_selector("article:nth-child(3) li .words").bounding_box()["height"] < 260
    page.wait_for_selector("figure img")
    show(page, "hostile")


def test_searching_filtering_and_turning_pages(page: Any) -> None:
    assert found(page) == "rows 1 to 25 of 85"
    page.keyboard.press("]")
    until(page, "document.querySelector('#found').textContent === 'rows 26 to 50 of 85'")
    page.keyboard.press("[")
    until(page, "document.querySelector('#found').textContent === 'rows 1 to 25 of 85'")
    page.keyboard.press("/")
    page.keyboard.type("house red")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('article').length < 25")
    texts = [
        element.text_content() for element in page.query_selector_all(".sides > :last-child li:first-child .words")
    ]
    assert texts
    assert all("red house" in text for text in texts)
    page.click("summary")
    page.select_option("select[name=status]", "kept")
    until(page, "[...document.querySelectorAll('.sides > :last-child .status')].every(e => e.textContent === 'kept')")
    assert page.query_selector_all("article")
    page.select_option("select[name=sort]", "web")
    page.check("input[name=descending]")
    page.fill("input[name=web_min]", "0.9")
    page.press("input[name=web_min]", "Enter")
    until(page, "location.hash.includes('web_min=0.9')")
    found(page)
    show(page, "filters")
    page.reload()
    page.wait_for_selector("#found:not(:empty)")
    assert page.input_value("input[name=web_min]") == "0.9"
    assert page.input_value("#text") == "house red"
    page.click("summary")
    page.click("#clear")
    until(page, "document.querySelector('#found').textContent === 'rows 1 to 25 of 85'")


def test_marking_by_keyboard_and_mouse(page: Any, view: Served) -> None:
    path = Path(view.explorer.marks.path)
    page.keyboard.press("j")
    page.keyboard.press("y")
    until(page, "document.querySelector('#marks').textContent === 'marked: 1 right, 0 wrong'")
    page.keyboard.press("j")
    page.keyboard.press("n")
    until(page, "document.querySelector('#marks').textContent === 'marked: 1 right, 1 wrong'")
    marks = pq.read_table(path).to_pylist()
    assert [(mark["text"] == HOSTILE[0], mark["true"], mark["source"]) for mark in marks] == [
        (True, True, "web"),
        (False, False, "synthetic"),
    ]
    page.keyboard.press("u")
    until(page, "document.querySelector('#marks').textContent === 'marked: 1 right, 0 wrong'")
    wrong = page.query_selector_all("button[data-verdict=wrong]")[4]
    wrong.click()
    until(page, "document.querySelector('#marks').textContent === 'marked: 1 right, 1 wrong'")
    assert wrong.get_attribute("aria-pressed") == "true"
    page.reload()
    page.wait_for_selector("article")
    assert len(page.query_selector_all("button[aria-pressed=true]")) >= 2  # of a changed row on both sides
    show(page, "marked")


def test_two_versions_side_by_side_in_the_dark_and_on_a_phone(page: Any, view: Served) -> None:
    page.click("summary")
    page.check("input[name=changed]")
    page.wait_for_selector(".sides.two")
    titles = [element.text_content() for element in page.query_selector_all(".sides.two .outcome .soft")]
    assert titles[:2] == ["version 1: ", f"version {view.explorer.version}: "]
    page.emulate_media(color_scheme="dark")
    show(page, "versions-dark")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    show(page, "phone-dark")
    page.emulate_media(color_scheme="light")
    page.evaluate("document.querySelector('article').scrollIntoView()")
    show(page, "phone-light")


def test_help_and_a_server_that_is_gone(page: Any) -> None:
    page.keyboard.press("?")
    assert page.is_visible("#help")
    page.keyboard.press("Escape")
    page.evaluate("location.hash = location.hash.replace(/token=[^&]*/, 'token=wrong')")
    until(page, "document.querySelector('#notice').textContent.includes('no token')")
