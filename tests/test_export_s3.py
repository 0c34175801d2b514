"""Exports from and to a real S3-speaking server, smooth and failing: whole or not there, and of one version."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from botocore.retries.standard import ExponentialBackoff
from conftest import read, write_shard
from rich.console import Console
from s3 import PASSING, S3, Fault, Seeded, Struck
from viewing import make_dataset, make_spec
from viewing import run as curate

from capfilt.dataset import CuratedDataset
from capfilt.errors import CapfiltError, StoreError
from capfilt.export.driver import ExportSummary, export
from capfilt.spec import ExportSpec, Thresholds

FORMATS = ("webdataset", "parquet", "huggingface", "authors", "mds", "litdata")
SHARD_ROWS = 20
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients and capfilt wait a moment before they try again."""
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.03)
    monkeypatch.setattr("capfilt.stores.random", SimpleNamespace(uniform=lambda *_: 0.02))


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset on this machine."""
    return make_dataset(tmp_path_factory.mktemp("curated"), report=False).output


@pytest.fixture(scope="module")
def dataset(curated: str, s3_server: S3) -> str:
    """The same on S3."""
    s3_server.files().put(curated, "data/curated", recursive=True)
    return "s3://data/curated"


def run(spec: ExportSpec) -> ExportSummary:
    return export(spec, Console(file=io.StringIO()))


Make = Callable[..., ExportSpec]


@pytest.fixture
def make(dataset: str, s3: S3, request: pytest.FixtureRequest) -> Make:
    """Exports from S3 to S3, to a place of the test's own."""
    place = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]

    def make_export(form: str, **fields: Any) -> ExportSpec:
        if form == "litdata":
            pytest.importorskip("litdata")
        defaults: dict[str, Any] = {"dataset": dataset, "output": f"s3://data/{place}/out", "shard_rows": SHARD_ROWS}
        options = {"storage_options": s3.options, "output_options": s3.options}
        return ExportSpec(kind="export", format=form, **{**defaults, **options, **fields})  # type: ignore[arg-type]

    return make_export


@pytest.fixture(scope="module")
def whole(curated: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """What an export of a format has in its files, made on this machine; the manifest and README.md aside."""
    found: dict[str, dict[str, bytes]] = {}

    def content(form: str) -> dict[str, bytes]:
        if form not in found:
            output = tmp_path_factory.mktemp("whole") / form
            run(ExportSpec(kind="export", dataset=curated, output=str(output), format=form, shard_rows=SHARD_ROWS))  # type: ignore[arg-type]
            files = {str(file.relative_to(output)): file for file in output.rglob("*") if file.is_file()}
            found[form] = {name: file.read_bytes() for name, file in files.items() if name not in ABOUT}
        return found[form]

    return content


ABOUT = ("manifest.json", "README.md")


def objects(s3: S3, url: str) -> dict[str, bytes]:
    """What lies there, by its path."""
    root = url.removeprefix("s3://")
    files = s3.files()
    return {name.removeprefix(f"{root}/"): files.cat_file(name) for name in files.find(root)}


def has_all(there: dict[str, bytes]) -> dict[str, Any]:
    """The manifest of what lies there, which has every file that it lists."""
    manifest: dict[str, Any] = json.loads(there["manifest.json"])
    for file in manifest["files"]:
        data = there[file["path"]]
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    return manifest


def check(s3: S3, spec: ExportSpec, expected: dict[str, bytes], rows: int) -> None:
    """The export is whole, is what the manifest says, and nothing else is left."""
    there = objects(s3, spec.output)
    manifest = has_all(there)
    assert sum(file.get("rows", 0) for file in manifest["files"]) == rows
    assert {name: data for name, data in there.items() if name not in ABOUT} == expected
    assert not s3.files().exists(f"{spec.output}.incomplete")
    assert run(spec).nothing


@pytest.mark.parametrize("form", ["webdataset", *(slow(form) for form in FORMATS[1:])])
def test_every_format_from_and_to_a_store(
    make: Make, s3: S3, curated: str, whole: Callable[[str], dict[str, bytes]], form: str
) -> None:
    spec, rows = make(form), len(read(curated, "pairs"))
    assert run(spec).rows == rows
    check(s3, spec, whole(form), rows)


FAULTS = [
    *((form, kind) for form in FORMATS for kind in (Fault.ERROR_500, Fault.SLOW_DOWN, Fault.UPLOAD_RESET)),
    *(("webdataset", kind) for kind in (Fault.DOWNLOAD_RESET, Fault.TRUNCATED, Fault.LOST, Fault.LATE_500)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "kind"), FAULTS)
def test_faults_of_a_kind_change_nothing(
    make: Make, s3: S3, curated: str, whole: Callable[[str], dict[str, bytes]], form: str, kind: Fault
) -> None:
    """A tenth of all requests fails: it is sent again, and the export comes out as if none had."""
    spec = make(form)
    with s3.faulty(Seeded(7, 0.1, [kind])):
        run(spec)
        assert {fault for fault, _ in s3.injected} == {kind}
    check(s3, spec, whole(form), len(read(curated, "pairs")))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_bad_store_delays_an_export_and_spoils_none(
    make: Make, s3: S3, curated: str, whole: Callable[[str], dict[str, bytes]], form: str, seed: int
) -> None:
    """A third of all requests fails, of every kind: an export gives up, and is run again until it is done."""
    spec = make(form)
    for tries in range(40):
        done = False
        with s3.faulty(Seeded(100 * seed + tries, 0.33, PASSING)), contextlib.suppress(CapfiltError):
            run(spec)
            done = True
        if done:
            break
        there = objects(s3, spec.output)
        if "manifest.json" in there:  # it was copied, and could not be removed from where it was
            has_all(there)
    check(s3, spec, whole(form), len(read(curated, "pairs")))


def test_a_store_that_refuses_one_file(
    make: Make, s3: S3, curated: str, whole: Callable[[str], dict[str, bytes]]
) -> None:
    spec = make("webdataset", writers=1)
    with s3.faulty(Struck(Fault.DENIED, r"^PUT .*/00002\.tar")), pytest.raises(StoreError, match=r"00002\.tar cannot"):
        run(spec)
    assert not s3.files().exists(spec.output)
    left = objects(s3, f"{spec.output}.incomplete")
    assert {name: data for name, data in left.items() if name.endswith(".tar")} == {
        name: whole("webdataset")[name] for name in ("00000.tar", "00001.tar")
    }
    assert run(spec).resumed == 2
    check(s3, spec, whole("webdataset"), len(read(curated, "pairs")))


# --- kills ---


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_killed_exports_come_to_the_same_objects(
    make: Make, s3: S3, curated: str, whole: Callable[[str], dict[str, bytes]], form: str
) -> None:
    """Killed as the kernel kills: as shards are written, and at each step of putting them in their place."""
    spec = make(form, writers=2)
    kill_at(s3, spec, r"^PUT \S*/_export/0")
    kill_at(s3, spec, r"^PUT \S*/_export/0")  # of the shards that the one before did not write
    kill_at(s3, spec, r"^PUT \S*/out\.incomplete/manifest\.json")
    assert not objects(s3, spec.output)
    kill_at(s3, spec, r"^PUT \S*/out/", skip=1)  # copied, and still where it was
    assert objects(s3, spec.output)
    kill_at(s3, spec, r"^POST \S*\?delete")  # removed from where it was
    assert "manifest.json" not in objects(s3, spec.output)
    kill_at(s3, spec, r"^PUT \S*/out/manifest\.json")
    has_all(objects(s3, spec.output))
    assert list(objects(s3, f"{spec.output}.incomplete")) == ["manifest.json"]
    assert run(spec).nothing
    check(s3, spec, whole(form), len(read(curated, "pairs")))


def kill_at(s3: S3, spec: ExportSpec, pattern: str, skip: int = 0) -> None:
    """Export in a process that is killed once the store has done such a request, and not answered it."""
    given, before = spec.model_dump(exclude_unset=True), len(s3.silent)
    code = f"import capfilt; from capfilt.spec import ExportSpec; capfilt.run(ExportSpec(**{given!r}))"
    with s3.faulty(Struck(Fault.SILENT, pattern, skip=skip)):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        while process.poll() is None and len(s3.silent) == before:
            time.sleep(0.05)
        process.kill()
        _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    left = objects(s3, f"{spec.output}.incomplete")
    for name, data in left.items():  # what is on record is whole
        if name.startswith("_export/0"):
            for file in json.loads(data)["files"]:
                assert hashlib.sha256(left[file["path"]]).hexdigest() == file["sha256"]


@pytest.mark.slow
def test_files_that_are_sent_in_parts(s3: S3, tmp_path: Path) -> None:
    """Tars of several parts: one whose upload breaks off is not there, and its parts are given up."""
    write_shard(tmp_path / "in" / "0.parquet", [noise(n) for n in range(14)], row_group=4)
    spec = make_spec(tmp_path, thresholds=Thresholds(web=0.0, synthetic=0.0), report=False)
    curate(spec)
    about: dict[str, Any] = {
        "kind": "export",
        "dataset": spec.output,
        "format": "webdataset",
        "shard_bytes": 25 * 2**20,
    }
    run(ExportSpec(**about, output=str(tmp_path / "whole")))
    tars = {file.name: file.read_bytes() for file in (tmp_path / "whole").glob("*.tar")}
    assert min(map(len, tars.values())) > 16 * 2**20
    to_s3 = ExportSpec(**about, output="s3://data/parts/out", output_options=s3.options)
    with s3.faulty(Struck(Fault.DENIED, r"^PUT .*00000\.tar.*partNumber=2")), pytest.raises(StoreError):
        run(to_s3)
    assert not s3.files().exists("s3://data/parts/out.incomplete/00000.tar")
    uploads = s3.files().call_s3("list_multipart_uploads", Bucket="data").get("Uploads", [])
    assert not [one for one in uploads if one["Key"].startswith("parts/")]
    with s3.faulty(Seeded(3, 0.1, [Fault.ERROR_500, Fault.SLOW_DOWN, Fault.UPLOAD_RESET])):
        run(to_s3)
    check(s3, to_s3, tars, 14)


def noise(seed: int) -> bytes:
    """A JPEG of about 3.5 MB."""
    import simplejpeg

    pixels = np.random.default_rng(seed).integers(0, 255, (1200, 1200, 3), np.uint8)
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality=95)
    return encoded


# --- one version ---


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[int, list[tuple[str, int]]]]:
    """A dataset of two versions of its pairs, the newest with far fewer rows; and the rows of each."""
    folder = tmp_path_factory.mktemp("growing")
    make_dataset(folder, report=False)
    spec = make_spec(folder, thresholds=Thresholds(web=0.9, synthetic=0.95), report=False)
    before = CuratedDataset.for_reading(spec.output, {}).versions()["pairs"]
    curate(spec)
    found = CuratedDataset.for_reading(spec.output, {})
    rows = {}
    for version in (before, found.versions()["pairs"]):
        table = found.pairs(version).to_table(columns=["shard", "row"]).to_pylist()
        rows[version] = sorted((row["shard"], row["row"]) for row in table)
    return spec.output, rows


@pytest.mark.parametrize("broken", [r"^PUT \S*/_export/0", r"^PUT \S*/out/"], ids=["written", "put-in-place"])
@pytest.mark.parametrize("form", ["webdataset", slow("authors")])
def test_an_interrupted_export_is_of_one_version_in_the_end(
    growing: tuple[str, dict[int, list[tuple[str, int]]]], make: Make, s3: S3, form: str, broken: str
) -> None:
    """An export breaks off as it is written, or put in its place; then the dataset's newest version is asked for."""
    dataset, rows = growing
    old, new = rows
    assert len(rows[new]) < len(rows[old]) - 10
    spec = make(form, dataset=dataset, storage_options={}, shard_rows=5, version=old, writers=1)
    with s3.faulty(Struck(Fault.DENIED, broken, skip=5)), pytest.raises(StoreError):
        run(spec)
    assert not s3.files().exists(f"{spec.output}/manifest.json")
    summary = run(spec.model_copy(update={"version": None}))
    assert (summary.version, summary.rows, summary.resumed) == (new, len(rows[new]), 0)
    there = objects(s3, spec.output)
    assert has_all(there)["asked"]["version"] == new
    assert exported(there) == rows[new]
    assert not objects(s3, f"{spec.output}.incomplete")


def exported(there: dict[str, bytes]) -> list[tuple[str, int]]:
    """(shard, row) of every row of tars, or of the authors' lists."""
    lists = [json.loads(data) for name, data in sorted(there.items()) if name.startswith("pairs-")]
    assert sum("images/" in name for name in there) == sum(map(len, lists))
    tars = [data for name, data in sorted(there.items()) if name.endswith(".tar")]
    return tar_rows(tars) + [(entry["shard"], entry["row"]) for one in lists for entry in one]


def tar_rows(tars: list[bytes]) -> list[tuple[str, int]]:
    """(shard, row) of every row of tars."""
    found = []
    for data in tars:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    about = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                    found.append((about["shard"], about["row"]))
    return found
