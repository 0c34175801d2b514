"""The documentation site: it builds, without a broken link; it asks no other host; the reference leaves nothing out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import typer.main
from pydantic import BaseModel

import capfilt
from capfilt import errors, schema, spec
from capfilt.cli import app
from capfilt.pipelines.metrics import METRICS
from capfilt.spec import RunSpec

pytest.importorskip("mkdocs", reason="no MkDocs: pip install 'capfilt[docs]'")

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KINDS = {one.model_fields["kind"].annotation.__args__[0]: one for one in get_args(RunSpec)}  # type: ignore[union-attr]
CARDS = {one.__name__ for one in (*get_args(spec.AnyCard), spec.ClassifierCard)}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


class Reader(HTMLParser):
    """What a page of HTML has: ids, links, words, and what it loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.cells: list[str] = []
        self.words = ""
        self._cell = False
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        if name := own.get("id"):
            self.ids.add(name)
        if tag == "link" and own.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(own.get("href") or "")
        elif tag != "a":
            self.loads += [own[name] or "" for name in ("src", "srcset", "data", "poster", "action") if name in own]
        if tag == "td":
            self._cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag != "td"

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._cell:
            self.cells[-1] += data


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    loaded = {url for page in pages for url in Reader(page).loads}
    assert loaded
    assert [url for url in loaded if re.match(r"([a-z]+:)?//", url)] == []
    styles = [*site.rglob("*.css"), *pages]
    asked = {
        url for style in styles for url in re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)", style.read_text())
    }
    assert [url for url in asked if re.match(r"([a-z]+:)?//", url)] == []


def held(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str, BaseModel]]:
    """(path, name, field) of every field of a model and of those that it holds, but for cards."""
    for name, field in model.model_fields.items():
        full = f"{path}.{name}" if path else name
        yield full, name, field  # type: ignore[misc]
        for inner in models(field.annotation):
            if inner.__name__ not in CARDS:
                yield from held(inner, full)


def models(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for inner in get_args(annotation) for model in models(inner)}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_field_of_a_kind_of_run_is_in_the_reference(site: Path, kind: str) -> None:
    page = Reader(site / "reference" / f"{kind}.html")
    paths = {path for path, _, _ in held(KINDS[kind])}
    assert {path.replace(".", "-").lower() for path in paths} - {"kind"} <= {
        re.sub(r"-(hub|local)checkpoint$", "", name) for name in page.ids
    }
    assert "" not in page.cells, "a field without a type, a default or a meaning"


def test_every_field_of_a_card_is_in_the_reference(site: Path) -> None:
    page = Reader(site / "reference" / "cards.html")
    for card in CARDS:
        assert card.lower() in page.ids
        for path, _, _ in held(getattr(spec, card)):
            assert f"{card}-{path}".replace(".", "-").lower() in page.ids
    assert "" not in page.cells


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group) or hasattr(command, "commands"):
        for inner, own in command.commands.items():
            yield from commands(own, f"{name} {inner}")
    else:
        yield name, command


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "commands.html").read_text()
    found = dict(commands(typer.main.get_command(app), "capfilt"))
    assert {"capfilt run", "capfilt job stop"} <= found.keys()
    for name, command in found.items():
        assert f'id="{name.replace(" ", "-")}"' in page, name
        section = page.partition(f'id="{name.replace(" ", "-")}"')[2].partition("<h2")[0]
        for parameter in command.params:
            assert all(option in section for option in parameter.opts if option.startswith("--")), (name, parameter)


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    ids = Reader(site / "reference" / "python.html").ids
    assert {f"capfilt.{name}" for name in capfilt.__all__} <= ids
    tree = {one.__name__ for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception)}
    assert {f"capfilt.errors.{name}" for name in tree} <= ids
    assert {f"capfilt.dataset.CuratedDataset.{name}" for name in ("annotations", "pairs", "runs", "versions")} <= ids
    codes = Reader(site / "reference" / "exit-codes.html").cells
    assert tree <= set(codes)
    assert {str(getattr(errors, name).exit_code) for name in tree} | {"0"} <= set(codes)


def test_every_column_reason_and_metric_is_in_the_reference(site: Path) -> None:
    page = Reader(site / "reference" / "tables.html")
    columns = {field.name for table in schema.FILE_SCHEMAS.values() for field in table}
    structs = [own for name, own in vars(schema).items() if name.endswith("_STRUCT")]
    columns |= {field.name for struct in structs for field in struct}
    assert {*columns, *map(str, schema.Reason)} <= set(page.cells)
    assert "" not in page.cells, "a column or a reason without a meaning"
    suffix = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
    exported = {f"ray_{name}{suffix[metric.kind]}" for name, metric in METRICS.items()}
    shown = Reader(site / "reference" / "metrics.html").cells
    assert {cell for cell in shown if cell.startswith("ray_")} == exported


def test_the_benchmarks_page_has_every_command_that_is_measured(site: Path) -> None:
    words = " ".join(Reader(site / "benchmarks.html").words.split())
    for document in ("README.md", "benchmarks/README.md"):
        measured = re.findall(r"`((?:PYTHONPATH=\. )?python benchmarks/[^`]+)`", (ROOT / document).read_text())
        assert measured
        assert [command for command in measured if command not in words] == []


def slug(heading: str) -> str:
    """As a code host makes an anchor of it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def documents() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split()]


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_work_on_a_code_host(document: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "`", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file = (document.parent / target).resolve() if target else document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{target}#{anchor}"


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The site's address on a real web server."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Silent: the browser complains of what is missing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (on Debian and Ubuntu: apt-get install chromium)"
)
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_pages_and_search_work_in_a_browser(served: str, scheme: str, width: int) -> None:
    from playwright.sync_api import sync_playwright

    said, asked = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        for name in ("index", "tutorial", "reference/curate", "reference/python", "benchmarks"):
            page.goto(f"{served}/{name}.html")
            assert page.evaluate("document.body.dataset.mdColorScheme") == {"light": "default", "dark": "slate"}[scheme]
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than the window"
            if folder := os.environ.get("CAPFILT_SCREENSHOTS"):
                page.screenshot(path=f"{folder}/{scheme}-{name.replace('/', '-')}.png")
        page.goto(f"{served}/index.html?q=lease_seconds")
        page.wait_for_selector(".md-search-result__item a[href*='reference/curate.html']")
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith((served, "data:", "blob:"))] == []
