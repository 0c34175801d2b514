"""Real input: shards that img2dataset 1.47 itself wrote, from a real web server that serves real photographs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
from conftest import MakeSpec, read
from PIL import Image, ImageOps
from rich.console import Console
from stubs import load_hash
from webserver import Page, WebServer

from capfilt import toyweb
from capfilt.pipelines.curate import curate, in_process
from capfilt.spec import Input
from capfilt.toyweb import Breakage, Encoding

VERSION = "1.47.0"
ROWS_PER_SHARD = 80
PHOTOGRAPHS = ("astronaut", "camera", "cat", "coffee", "coins", "hubble_deep_field", "moon", "rocket")
PHOTOGRAPH_ENCODINGS = (Encoding.JPEG, Encoding.JPEG_ROTATED, Encoding.PNG, Encoding.WEBP)


class Outcome(StrEnum):
    """What a URL's server gave."""

    GOOD = "good"  # a whole picture
    MISSING = "missing"  # no bytes: 404, or the connection closed before the promised length
    BROKEN = "broken"  # bytes with status 200 that are not a whole picture


@dataclass(frozen=True)
class Served:
    """One row of the URL list and the answer of its server.

    Attributes:
        name: what was served, for messages: "astronaut jpeg", "toy gif", "404", "cut", "html", ...
        body: what a download gets; None where it must fail.
        picture: upright (width, height) of a good picture, else None.
    """

    url: str
    caption: str | None
    outcome: Outcome
    name: str
    body: bytes | None
    picture: tuple[int, int] | None


@dataclass(frozen=True)
class Download:
    """Two runs of img2dataset over one URL list. Rows are in order of arrival, not of the list."""

    raw: Path  # disable_all_reencoding: the bytes as served
    resized: Path  # keep_ratio to 256 px, re-encoded as JPEG
    served: dict[str, Served]  # by URL


def _photographs() -> Iterator[tuple[str, Page, Outcome, tuple[int, int] | None]]:
    rng = random.Random(0)
    for name in PHOTOGRAPHS:
        photograph = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        for side in (512, 200):
            picture = ImageOps.contain(photograph, (side, side))
            for encoding in PHOTOGRAPH_ENCODINGS:
                body = toyweb.encode(picture, encoding, rng)
                yield f"{name} {side} {encoding}", _page(body, encoding), Outcome.GOOD, picture.size


def _toys() -> Iterator[tuple[str, Page, Outcome, tuple[int, int] | None]]:
    rng = random.Random(1)
    for number in range(9 * len(Encoding)):
        encoding = list(Encoding)[number % len(Encoding)]
        picture = toyweb.draw(toyweb.scene(rng), rng, rng.randint(64, 96))
        page = _page(toyweb.encode(picture, encoding, rng), encoding, delay=0.2 if number % 10 == 0 else 0)
        yield f"toy {encoding}", page, Outcome.GOOD, picture.size


def _failures() -> Iterator[tuple[str, Page, Outcome, tuple[int, int] | None]]:
    rng = random.Random(2)
    for _ in range(12):
        picture = toyweb.draw(toyweb.scene(rng), rng, 80)
        whole = toyweb.encode(picture, Encoding.JPEG, rng)
        yield "404", Page(b"<html>gone</html>", "text/html", status=404), Outcome.MISSING, None
        yield "cut", Page(whole, "image/jpeg", sent=len(whole) // 2), Outcome.MISSING, None
        for breakage in Breakage:
            body = toyweb.spoil(picture, breakage, rng)
            if body is not None:
                yield str(breakage), Page(body, "image/jpeg"), Outcome.BROKEN, None


def _page(body: bytes, encoding: Encoding, delay: float = 0) -> Page:
    return Page(body, f"image/{encoding.split('_')[0]}", delay=delay)


def _caption(number: int, name: str) -> str | None:
    """Captions as the web has them: some null, some empty, some beyond ASCII."""
    return {0: None, 1: "", 2: f"café – {name} 🖼"}.get(number % 20, f"a picture called {name}")


def _img2dataset(url_list: Path, output: Path, **options: Any) -> None:
    """Run img2dataset and fail with what it printed if it fails."""
    arguments: dict[str, Any] = {
        "url_list": str(url_list),
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": str(output),
        "output_format": "parquet",
        "encode_format": "jpg",
        "number_sample_per_shard": ROWS_PER_SHARD,
        "processes_count": 1,
        "thread_count": 8,
        "timeout": 10,
        "enable_wandb": False,
    }
    program = "import json, sys\nfrom img2dataset import download\ndownload(**json.loads(sys.argv[1]))"
    quiet = {
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "WANDB_MODE": "disabled",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    run = subprocess.run(
        [sys.executable, "-c", program, json.dumps(arguments | options)],
        env=inherited | quiet,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]


@pytest.fixture(scope="session")
def download(tmp_path_factory: pytest.TempPathFactory) -> Download:
    pytest.importorskip("img2dataset", reason="img2dataset is not installed: install the extra 'ingest'")
    directory = tmp_path_factory.mktemp("img2dataset")
    answers = [*_photographs(), *_toys(), *_failures()]
    random.Random(3).shuffle(answers)
    pages = {f"/{number}": page for number, (_, page, _, _) in enumerate(answers)}
    with WebServer(pages) as server:
        served = [
            Served(
                url=f"{server.url}/{number}",
                caption=_caption(number, name),
                outcome=outcome,
                name=name,
                body=None if outcome is Outcome.MISSING else page.body,
                picture=size,
            )
            for number, (name, page, outcome, size) in enumerate(answers)
        ]
        url_list = directory / "urls.parquet"
        listed = {"url": [one.url for one in served], "caption": [one.caption for one in served]}
        pq.write_table(pa.table(listed), url_list)
        _img2dataset(url_list, directory / "raw", resize_mode="no", disable_all_reencoding=True)
        _img2dataset(
            url_list,
            directory / "resized",
            resize_mode="keep_ratio",
            image_size=256,
            resize_only_if_bigger=True,
        )
    return Download(directory / "raw", directory / "resized", {one.url: one for one in served})


def shard_rows(directory: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(directory.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_its_version(download: Download) -> None:  # noqa: ARG001 - the fixture skips without img2dataset
    assert version("img2dataset") == VERSION


def test_the_web_holds_all_kinds(download: Download) -> None:
    counts = Counter(one.outcome for one in download.served.values())
    assert counts == {Outcome.GOOD: 217, Outcome.MISSING: 24, Outcome.BROKEN: 72}


@pytest.mark.parametrize("mode", ["raw", "resized"])
def test_every_url_is_a_row_of_toyweb_s_schema(download: Download, mode: str) -> None:
    directory = getattr(download, mode)
    paths = sorted(directory.glob("*.parquet"))
    names = [f"{shard:05d}" for shard in range(4)]
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        [f"{name}.parquet" for name in names] + [f"{name}_stats.json" for name in names]
    )
    assert all(pq.read_schema(path) == toyweb.SHARD_SCHEMA for path in paths)
    assert [pq.ParquetFile(path).metadata.num_rows for path in paths] == [80, 80, 80, 73]
    rows = shard_rows(directory)
    assert sorted(row["url"] for row in rows) == sorted(download.served)
    assert all(row["caption"] == download.served[row["url"]].caption for row in rows)
    stats = [json.loads((directory / f"{name}_stats.json").read_text()) for name in names]
    assert sum(one["count"] for one in stats) == len(rows)
    assert sum(one["successes"] for one in stats) == sum(row["status"] == "success" for row in rows)


def test_raw_rows_hold_what_was_served(download: Download) -> None:
    """Whatever arrives is a success here, HTML and empty bodies too; the sizes are unknown."""
    for row in shard_rows(download.raw):
        served = download.served[row["url"]]
        arrived = served.body is not None
        assert (row["jpg"], row["status"]) == (served.body, "success" if arrived else "failed_to_download")
        assert row["sha256"] == (hashlib.sha256(served.body).hexdigest() if served.body is not None else None)
        assert (row["error_message"] is None, row["exif"] is not None) == (arrived, arrived)
        assert {row[name] for name in ("width", "height", "original_width", "original_height")} == {None}


def test_resized_rows_hold_jpegs_or_the_reason_why_not(download: Download) -> None:
    statuses = {
        Outcome.GOOD: {"success"},
        Outcome.MISSING: {"failed_to_download"},
        Outcome.BROKEN: {"failed_to_resize"},
    }
    for row in shard_rows(download.resized):
        served = download.served[row["url"]]
        assert row["status"] in statuses[served.outcome], served.name
        if served.outcome is Outcome.GOOD:
            image = Image.open(io.BytesIO(row["jpg"]))
            assert (image.format, image.size) == ("JPEG", (row["width"], row["height"]))
            assert served.body is not None
            assert Image.open(io.BytesIO(served.body)).size == (row["original_width"], row["original_height"])
        else:
            assert row["error_message"]
            assert {row[name] for name in ("jpg", "sha256", "exif", "width", "original_width")} == {None}


@pytest.mark.parametrize("mode", ["raw", "resized"])
def test_its_shards_go_through_with_no_conversion(download: Download, mode: str, make_spec: MakeSpec) -> None:
    """Every URL becomes one annotation, and what was served decides which."""
    spec = make_spec(input=Input(paths=(str(getattr(download, mode)),)), max_error_fraction=0.5)
    summary = curate(spec, load=load_hash, execute=in_process, console=Console(file=io.StringIO()))
    rows = read(spec.output)
    assert summary.failures == {}
    assert sorted(row["url"] for row in rows) == sorted(download.served)
    for row in rows:
        served = download.served[row["url"]]
        if served.outcome is Outcome.GOOD:
            assert row["status"] in ("kept", "dropped"), (served.name, row)
            assert row["texts"][0]["text"] == served.caption
            if mode == "raw":
                assert (row["width"], row["height"]) == served.picture, served.name
        elif served.outcome is Outcome.MISSING:
            assert (row["status"], row["reason"]) == ("dropped", "no_image")
            assert row["note"].startswith("failed_to_download: ")
        elif mode == "raw":
            assert row["status"] == "error", (served.name, row)
        else:
            assert (row["status"], row["reason"]) == ("dropped", "no_image"), (served.name, row)
            assert row["note"].startswith("failed_to_resize: ")
