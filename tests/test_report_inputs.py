"""What a report has of the input: pictures of dropped rows, whatever its files are; its paths, its truth."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import MakeSpec, jpeg, read, write_shard
from curated_web import curate_web
from fsspec.implementations.memory import MemoryFileSystem
from test_report import Parsed

from capfilt import toyweb
from capfilt.dataset import CuratedDataset
from capfilt.report import make_report
from capfilt.report.judged import find_truth
from capfilt.report.pictures import Budget, Pictures
from capfilt.spec import CurateSpec, Input, ThresholdsOverride, Truth

ROWS = 50
NOTHING = ThresholdsOverride(web=1.0, synthetic=1.0)
"""What next to no text reaches."""


def tar(folder: Path) -> None:
    """A WebDataset tar."""
    with tarfile.open(folder / "web.tar", "w") as out:
        for n in range(ROWS):
            for name, data in ((f"{n:03d}.jpg", jpeg(n)), (f"{n:03d}.txt", f"text {n}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))


def arrow(folder: Path) -> None:
    """A stream in several record batches, as Hugging Face's `save_to_disk` writes it."""
    images = [{"bytes": jpeg(n), "path": None} for n in range(ROWS)]
    table = pa.table({"image": images, "text": [f"text {n}" for n in range(ROWS)]})
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as out:
        out.write_table(table, max_chunksize=20)


def found_of(spec: CurateSpec, **budget: int) -> dict[int, str]:
    """The picture of every row, or why there is none."""
    dataset = CuratedDataset.for_reading(spec.output, {})
    limits = Budget(**{"bytes": 10**9, "files": 99} | budget)
    rows = read(spec.output)
    assert [row["reason"] for row in rows] == ["no_match"] * ROWS
    found = Pictures(dataset, dataset.versions()["annotations"], spec, {}, limits).find(rows)
    return {row: picture for (_, row), picture in found.items()}


@pytest.mark.parametrize("write", [tar, arrow])
def test_dropped_rows_of_any_input_have_their_pictures(tmp_path: Path, write: object) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    spec, _ = curate_web(tmp_path, thresholds=NOTHING, report=False)
    found = found_of(spec)
    assert found.keys() == set(range(ROWS))
    assert {picture[:23] for picture in found.values()} == {"data:image/webp;base64,"}
    assert len(set(found.values())) == ROWS
    assert set(found_of(spec, bytes=100).values()) == {"not read: enough bytes were"}


@pytest.fixture
def bucket() -> Iterator[MemoryFileSystem]:
    fs = MemoryFileSystem()
    fs.mkdir("/report-inputs")
    yield fs
    fs.rm("/report-inputs", recursive=True)


def test_a_tar_in_a_store_is_looked_through_only_where_that_may_be_read(
    tmp_path: Path, bucket: MemoryFileSystem
) -> None:
    """To find its samples is to read it all: a store hands out no less than blocks of several images."""
    tar(tmp_path)
    size = (tmp_path / "web.tar").stat().st_size
    bucket.put_file(str(tmp_path / "web.tar"), "/report-inputs/web.tar")
    source = Input(paths=("memory://report-inputs",))
    spec, _ = curate_web(tmp_path, thresholds=NOTHING, report=False, input=source)
    assert {picture[:5] for picture in found_of(spec, bytes=3 * size).values()} == {"data:"}
    assert set(found_of(spec, bytes=size - 1).values()) == {"not read: enough bytes were"}


@pytest.mark.parametrize("path", ["shards", "shards/", "shards/*.parquet", "shard?/*.parquet", "shards/00000.parquet"])
def test_the_truth_of_a_toy_web_is_found_however_its_shards_are_named(
    make_spec: MakeSpec, tmp_path: Path, path: str
) -> None:
    web = toyweb.render(tmp_path / "web", images=20, shards=1)
    (shard,) = web.shards
    named = str(web.directory / path.replace("00000.parquet", shard.name))
    found = find_truth(make_spec(input=Input(paths=(named,))))
    assert found == Truth(toyweb=str(web.directory))
    assert find_truth(make_spec(input=Input(paths=(str(tmp_path),)))) is None


def test_a_page_names_some_of_many_paths(tmp_path: Path) -> None:
    paths = tuple(str(write_shard(tmp_path / "in" / f"{n:03d}.parquet", [jpeg(n)])) for n in range(30))
    spec, _ = curate_web(tmp_path, input=Input(paths=paths), report=False)
    page = Parsed(make_report(CuratedDataset.for_reading(spec.output, {}), {}).html)
    text = " ".join(" ".join(page.text).split())
    assert f"{paths[19]} , and 10 more" in text
    assert paths[20] not in text


def test_where_no_row_is_judged_there_is_no_empty_chart(tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [None] * 5)
    spec, _ = curate_web(tmp_path, report=False)
    page = Parsed(make_report(CuratedDataset.for_reading(spec.output, {}), {}).html)
    charts = {about["id"] for tag, about in page.elements if tag == "figure"}
    assert "chart-lengths" in charts
    assert not charts & {"chart-kept", "chart-itm"}
    assert "No row was decided by the scores of its texts" in " ".join(page.text)
