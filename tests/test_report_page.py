"""The report in a browser: it works, offline, and obeys no caption."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import read
from curated_web import HOSTILE, cards, curate_web, make_web
from test_report_models import curate_with

from capfilt.schema import Status
from capfilt.spec import KeepOut

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (on Debian and Ubuntu: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run's report, and the rows that it is about."""
    root = tmp_path_factory.mktemp("page")
    make_web(root)
    spec, summary = curate_web(root)
    return Path(spec.output) / "_runs" / summary.run / "report.html", read(spec.output)


class Watched:
    """A page, and all that it asked for or complained of."""

    def __init__(self, browser: Any, file: Path, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog: {dialog.message}"))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-ready]")

    def frames(self) -> None:
        """Wait until what was asked for is drawn."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


@pytest.fixture(scope="module")
def watched(browser: Any, report: tuple[Path, list[dict[str, Any]]]) -> Iterator[Watched]:
    watched = Watched(browser, report[0], viewport={"width": 1280, "height": 900})
    yield watched
    loaded = [url for url in watched.asked if not url.startswith("data:")]
    assert loaded == [report[0].as_uri()], "the page asked for more than itself"
    assert watched.said == []
    watched.context.close()


@pytest.fixture
def page(watched: Watched) -> Iterator[Any]:
    """The page as it is when opened."""
    yield watched.page
    watched.page.evaluate(
        """() => {
          document.getElementById("filters").reset();
          document.getElementById("find").dispatchEvent(new Event("input", { bubbles: true }));
          document.getElementById("reset").click();
        }"""
    )
    watched.frames()


def slide(page: Any, source: str, to: float) -> None:
    """Move a slider, and wait until the next frame is drawn."""
    page.evaluate(
        """async ([source, to]) => {
          const slider = document.getElementById(`slide-${source}`);
          slider.value = to;
          slider.dispatchEvent(new Event("input", { bubbles: true }));
          await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
        }""",
        [source, to],
    )


def kept_at(rows: list[dict[str, Any]], web: float, synthetic: float) -> int:
    kept = 0
    for row in rows:
        best = {"web": -1.0, "synthetic": -1.0}
        for text in row["texts"]:
            if text["itm"] is not None:
                best[text["source"]] = max(best[text["source"]], text["itm"])
        kept += best["web"] >= web or best["synthetic"] >= synthetic
    return kept


def test_the_sliders_move_the_counts(page: Any, report: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = report[1]
    counted = page.locator("#would-keep")
    assert int(counted.inner_text()) == sum(row["status"] == Status.KEPT for row in rows) == kept_at(rows, 0.5, 0.5)
    assert page.locator("#together").is_checked()
    for threshold in (0.0, 0.23, 0.9, 1.0):
        slide(page, "web", threshold)
        assert int(counted.inner_text()) == kept_at(rows, threshold, threshold)
        assert page.locator("#at-synthetic").inner_text() == f"{threshold:.2f}"
    page.locator("#together").uncheck()
    slide(page, "synthetic", 0.3)
    assert int(counted.inner_text()) == kept_at(rows, 1.0, 0.3)
    page.locator("#reset").click()
    page.wait_for_function("() => document.getElementById('would-differ').textContent === 'the thresholds in force'")
    assert int(counted.inner_text()) == kept_at(rows, 0.5, 0.5)


def test_the_sliders_move_the_gallery(page: Any, report: tuple[Path, list[dict[str, Any]]]) -> None:
    def verdicts() -> set[str]:
        return set(page.locator(".pair").evaluate_all("(all) => all.map((one) => one.dataset.verdict)"))

    def found() -> tuple[int, ...]:
        """Examples that are kept, dropped and errors."""
        (*_, kept, dropped, errors) = re.findall(r"\d+", page.locator("#found").inner_text())
        return int(kept), int(dropped), int(errors)

    page.select_option("#order", "borderline")
    kept, dropped, errors = found()
    judged = len([row for row in report[1] if row["reason"] == "no_match"])
    assert 0 < judged <= dropped  # others have no text to judge
    slide(page, "web", 0.0)
    assert found() == (kept + judged, dropped - judged, errors)
    slide(page, "web", 1.0)
    assert found() == (0, kept + dropped, errors)
    page.select_option("#verdict", "kept")
    page.wait_for_function("() => document.querySelectorAll('.pair').length === 0")
    slide(page, "web", 0.7)
    page.wait_for_function("() => document.querySelectorAll('.pair').length > 0")
    assert verdicts() == {"kept"}
    scores = page.locator(".pair").evaluate_all(
        """(all) => all.map((one) =>
          Math.max(...[...one.querySelectorAll(".about b")].map((score) => Number(score.textContent))))"""
    )
    assert all(score >= 0.6995 for score in scores)
    assert scores == sorted(scores)  # borderline first


def test_a_text_with_a_word_that_is_kept_out_never_matches(browser: Any, tmp_path: Path) -> None:
    make_web(tmp_path)
    spec, summary = curate_web(tmp_path, keep_out=KeepOut(words=("shard",)))
    watched = Watched(browser, Path(spec.output) / "_runs" / summary.run / "report.html")
    watched.page.select_option("#verdict", "kept")
    slide(watched.page, "web", 0.0)
    watched.page.wait_for_function("() => document.querySelectorAll('.pair').length === 24")
    texts = watched.page.locator(".pair .text").evaluate_all(
        "(all) => all.map((one) => [one.querySelector('.about').textContent, one.classList.contains('match')])"
    )
    assert {match for said, match in texts if "kept out word" in said} == {False}
    assert {match for said, match in texts if "kept out word" not in said} == {True}
    assert watched.said == []
    watched.context.close()


def test_filters_and_search(page: Any) -> None:
    def settle(words: str) -> None:
        page.wait_for_function("(words) => document.getElementById('found').textContent.includes(words)", arg=words)

    page.fill("#find", "KILLS nothing")
    settle("0 of")
    page.fill("#find", "Owned fetch")
    settle("1 of")
    assert HOSTILE["script"] in page.locator(".pair .said").first.inner_text()
    page.fill("#find", "")
    page.select_option("#verdict", "error")
    settle("0 kept, 0 dropped")
    assert set(page.locator(".pair .tag").all_inner_texts()) == {"error"}
    page.select_option("#verdict", "")
    page.select_option("#reason", "no_image")
    settle("3 of")
    assert set(page.locator(".pair .why").all_inner_texts()) == {"no image"}
    page.select_option("#reason", "")
    page.select_option("#which", "web")
    settle("0 errors")
    for texts in page.locator(".pair").evaluate_all(
        "(all) => all.map((one) => [...one.querySelectorAll('.text')].map((text) => text.classList.contains('match')))"
    ):
        assert texts == [True, False]
    page.select_option("#which", "")
    more = page.locator("#more")
    before = page.locator(".pair").count()
    more.click()
    assert page.locator(".pair").count() > before


def test_hostile_captions_are_inert(page: Any) -> None:
    assert page.title().endswith("capfilt report")
    for words, shown in (
        ("onerror", HOSTILE["markup"]),
        ("svg onload", HOSTILE["ends"]),
        ("gnp.exe", "a cat \\u202egnp.exe\\u202c on \\u2066the\\u2069 mat\\u200b"),
    ):
        page.fill("#find", words)
        first = "(shown) => document.querySelector('.pair .said')?.textContent === shown"
        page.wait_for_function(first, arg=shown)  # the search waits for the keyboard to rest
        page.wait_for_function("() => document.getElementById('found').textContent.startsWith('1 of')")
        assert page.locator(".pair .said *").count() == 0
    page.fill("#find", "endless")
    page.wait_for_function("() => document.querySelector('.pair .said')?.textContent.includes('endless')")
    said = page.locator(".pair .said").first
    assert said.bounding_box()["height"] < 100
    page.get_by_role("button", name="all of it").first.click()
    assert said.evaluate("(one) => one.textContent.length") == 10_000
    assert said.bounding_box()["height"] <= 330
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_every_chart_is_drawn_and_has_its_numbers(page: Any) -> None:
    charts = page.locator("figure.chart")
    assert charts.count() >= 8
    for figure in charts.all():
        name = figure.get_attribute("id")
        assert figure.locator("svg[role=img][aria-label]").count() == 1, name
        figure.locator("summary").click()
        figure.locator("tbody tr").first.wait_for()
        assert figure.locator("thead th").count() >= 2, name
        figure.locator("summary").click()


def test_cosines_have_axes_and_sliders_of_their_own(browser: Any, tmp_path: Path) -> None:
    """Of CLIP none is above 0.4 here: what lies beyond is no part of an axis."""
    make_web(tmp_path)
    spec, summary = curate_with(tmp_path, ["writer"], ["clip"])
    watched = Watched(browser, Path(spec.output) / "_runs" / summary.run / "report.html")
    page, rows = watched.page, read(spec.output)
    assert page.locator("#slide-web").get_attribute("max") == "0.4"
    assert page.locator("#at-web").inner_text() == "0.30"
    slide(page, "web", 0.2)
    assert int(page.locator("#would-keep").inner_text()) == kept_at(rows, 0.2, 0.2)
    for chart, label in (("kept", "threshold"), ("itm", "cosine similarity")):
        drawn = page.locator(f"#chart-{chart} svg[role=img]")
        assert label in drawn.text_content()
        ticks = drawn.locator("[aria-label='x-axis tick label'] text").all_text_contents()
        assert ticks[-1] in ("0.40", "0.4")
    assert "P(match)" not in page.locator("main").inner_text()
    assert watched.said == []
    watched.context.close()


def test_what_only_the_version_before_has_is_drawn_in_a_colour_of_its_own(browser: Any, tmp_path: Path) -> None:
    make_web(tmp_path)
    curate_web(tmp_path, report=False)
    newer = cards(tmp_path)["captioners"][0].model_copy(update={"name": "newer", "prompt": "a photo of "})
    spec, summary = curate_web(tmp_path, captioners=(newer,))
    watched = Watched(browser, Path(spec.output) / "_runs" / summary.run / "report.html")
    drawn = watched.page.locator("#chart-drift .legend li").evaluate_all(
        """(all) => all.map((one) => {
          const line = one.querySelector("line");
          return [one.textContent, line.getAttribute("stroke"), line.hasAttribute("stroke-dasharray")];
        })"""
    )
    assert drawn == [
        ["web texts", "var(--origin-0)", False],
        ["newer", "var(--origin-1)", False],
        ["web texts before", "var(--origin-0)", True],
        ["writer before", "var(--origin-2)", True],
    ]
    watched.context.close()


def test_by_keyboard_alone(page: Any) -> None:
    page.evaluate(
        "() => { document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex') }"
    )
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Skip to the report"
    page.focus("#slide-web")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.getElementById('at-web').value === '0.51'")
    page.keyboard.press("End")
    page.wait_for_function("() => document.getElementById('at-web').value === '1.00'")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, summary, a")]
          .filter((one) => !one.hidden)
          .filter((one) => !(one.textContent.trim() || one.labels?.[0]?.textContent.trim() || one.ariaLabel))
          .map((one) => one.outerHTML)"""
    )
    assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_on_a_phone_in_light_and_dark(browser: Any, report: tuple[Path, list[dict[str, Any]]], scheme: str) -> None:
    watched = Watched(browser, report[0], viewport={"width": 375, "height": 740}, color_scheme=scheme)
    assert watched.page.evaluate("() => document.documentElement.scrollWidth") == 375
    contrasts = watched.page.evaluate(CONTRASTS)
    assert min(contrasts.values()) >= 4.5, contrasts
    watched.page.locator("#theme").click()
    assert watched.page.locator("html").get_attribute("class") == {"light": "dark", "dark": "light"}[scheme]
    contrasts = watched.page.evaluate(CONTRASTS)
    assert min(contrasts.values()) >= 4.5, contrasts
    assert watched.said == []
    watched.context.close()


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((one) => {
      const value = one / 255;
      return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = {};
  const pairs = { ".lede": "html", ".tile dt": ".tile", ".tile.kept strong": ".tile", ".tile.errors strong": ".tile",
                  ".pair .place": ".pair", "thead th": ".card", ".top a": ".top" };
  for (const [text, ground] of Object.entries(pairs)) {
    const a = luminance(getComputedStyle(document.querySelector(text)).color);
    const b = luminance(getComputedStyle(document.querySelector(ground)).backgroundColor);
    found[text] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return found;
}"""
