"""Exports, read back by the readers they are for."""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import jpeg, read, write_shard
from deltalake import DeltaTable
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from stubs import load_hash
from typer.testing import CliRunner

from capfilt.cli import app
from capfilt.dataset import CuratedDataset
from capfilt.errors import DatasetError, InputError, LeaseHeldError, LeaseLostError, SpecError
from capfilt.export import driver
from capfilt.export.card import _way
from capfilt.export.choice import Caption, Choice, draw
from capfilt.export.driver import ExportSummary, export
from capfilt.export.folder import LEASE, Folder
from capfilt.export.shards import RowGroup, Shard, cut
from capfilt.lease import Lease
from capfilt.pipelines.curate import curate, in_process
from capfilt.spec import (
    CaptionerCard,
    ClassifierCard,
    CurateSpec,
    Duplicates,
    EndpointCard,
    ExportSpec,
    FilterCard,
    HubCheckpoint,
    Input,
    KeepOut,
    LocalCheckpoint,
    SamplingOverride,
    Thresholds,
    ThresholdsOverride,
    load_spec,
)

LEAVES_FILES_OPEN = pytest.mark.filterwarnings(  # webdataset, to the garbage collector
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
ROWS = 30
FORMATS = ("webdataset", "parquet", "huggingface", "authors", "mds", "litdata")


def image_bytes(number: int) -> bytes:
    """JPEG mostly; PNG and WebP, too."""
    kind = {3: "PNG", 4: "WEBP"}.get(number % 10)
    if kind is None:
        return jpeg(number)
    out = io.BytesIO()
    Image.open(io.BytesIO(jpeg(number))).save(out, kind)
    return out.getvalue()


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A curated dataset: two shards of 30 rows in several files and, as a later version, with other thresholds."""
    folder = tmp_path_factory.mktemp("export")
    for shard in ("a", "b"):
        start = 100 * ord(shard)
        write_shard(folder / "in" / f"{shard}.parquet", [image_bytes(start + n) for n in range(ROWS)], row_group=10)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        (checkpoint / name).write_text("{}")
    about: dict[str, Any] = {"checkpoint": LocalCheckpoint(path=str(checkpoint)), "image_size": 16, "batch_size": 8}
    spec = CurateSpec(
        kind="curate",
        input=Input(paths=(str(folder / "in"),)),
        output=str(folder / "out"),
        captioners=(CaptionerCard(role="captioner", name="writes", licence="BSD-3-Clause", **about),),
        filters=(FilterCard(role="filter", name="judges", licence="apache-2.0", **about),),
        thresholds=ThresholdsOverride(web=0.3, synthetic=0.25),
        fragment_rows=10,
    )
    for web in (0.3, 0.6):
        spec = spec.model_copy(update={"thresholds": ThresholdsOverride(web=web, synthetic=0.25)})
        curate(spec, load=load_hash, execute=in_process, console=Console(file=io.StringIO()))
    return spec.output


MakeExport = Callable[..., ExportSpec]


@pytest.fixture
def make(curated: str, tmp_path: Path) -> MakeExport:
    def make_export(form: str = "webdataset", **fields: Any) -> ExportSpec:
        defaults = {"dataset": curated, "output": str(tmp_path / "out"), "shard_rows": 14}
        return ExportSpec(kind="export", format=form, **{**defaults, **fields})

    return make_export


def run(spec: ExportSpec) -> ExportSummary:
    return export(spec, Console(file=io.StringIO()))


def pairs(curated: str) -> list[dict[str, Any]]:
    return read(curated, "pairs")


# --- each format by its reader ---


@LEAVES_FILES_OPEN
def test_webdataset_as_openclip_reads_it(make: MakeExport, curated: str) -> None:
    import webdataset as wds

    spec, expected = make(), pairs(curated)
    summary = run(spec)
    last = -(-len(expected) // 14) - 1
    assert summary.rows == len(expected)
    stages = [
        wds.SimpleShardList(f"{spec.output}/{{00000..{last:05d}}}.tar"),
        wds.tarfile_to_samples(),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt", about="json"),
    ]
    samples = list(wds.DataPipeline(*stages))
    assert [sample["text"] for sample in samples] == [pair["text"] for pair in expected]
    for sample, pair in zip(samples, expected, strict=True):
        assert sample["image"].size == (pair["width"], pair["height"])
        assert (sample["about"]["shard"], sample["about"]["row"]) == (pair["shard"], pair["row"])
        assert sample["about"]["sha256"] == pair["image_sha256"]
        assert sample["about"]["caption"] == sample["text"]
    assert len({sample["__key__"] for sample in samples}) == len(expected)
    assert len(list(Path(spec.output).glob("*.tar"))) == last + 1
    gc.collect()  # while the warning is looked away from


def test_tars_are_the_same_to_the_byte(make: MakeExport, tmp_path: Path) -> None:
    hashes = []
    for name, writers in (("one", 1), ("two", 3)):
        spec = make(output=str(tmp_path / name), writers=writers)
        run(spec)
        hashes.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in Path(spec.output).iterdir()})
    assert hashes[0] == hashes[1]
    with tarfile.open(tmp_path / "one" / "00000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_hugging_face_loads_the_directory(make: MakeExport, curated: str, tmp_path: Path) -> None:
    import datasets

    spec, expected = make("huggingface", text="all"), pairs(curated)
    run(spec)
    loaded = datasets.load_dataset(spec.output, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded["text"][:] == [pair["text"] for pair in expected]
    assert loaded[4]["image"].size == (expected[4]["width"], expected[4]["height"])
    assert loaded[3]["captions"] == expected[3]["captions"]
    streamed = datasets.load_dataset(spec.output, split="train", streaming=True)
    assert [row["text"] for row in streamed] == [pair["text"] for pair in expected]
    raw = loaded.cast_column("image", datasets.Image(decode=False))
    assert [row["image"]["bytes"] for row in raw] == [pair["image"] for pair in expected]


def test_flat_parquet(make: MakeExport, curated: str) -> None:
    spec, expected = make("parquet"), pairs(curated)
    run(spec)
    rows = pq.read_table(f"{spec.output}/data").to_pylist()
    for name in ("image", "text", "key", "url", "shard", "row", "width", "height", "format"):
        assert [row[name] for row in rows] == [pair[name] for pair in expected]
    assert [hashlib.sha256(row["image"]).hexdigest() for row in rows] == [row["sha256"] for row in rows]


def test_the_authors_json(make: MakeExport, curated: str) -> None:
    spec, expected = make("authors", text="all"), pairs(curated)
    run(spec)
    lists = sorted(Path(spec.output).glob("pairs-*.json"))
    entries = [entry for path in lists for entry in json.loads(path.read_text())]
    texts = [(caption["text"], caption["source"]) for pair in expected for caption in pair["captions"]]
    assert [(entry["caption"], entry["source"]) for entry in entries] == texts
    for entry in entries:  # what data/pretrain_dataset.py does, from the export's directory
        assert Image.open(Path(spec.output) / entry["image"]).convert("RGB").size == (24, 24)
    by_id = {entry["image_id"]: entry["image"] for entry in entries}
    assert [(Path(spec.output) / by_id[n]).read_bytes() for n in range(len(expected))] == [p["image"] for p in expected]


def test_mds_by_its_layout(make: MakeExport, curated: str) -> None:
    """What streaming's MDSReader does (test_mds_by_its_own_reader runs that one where it is installed)."""
    import numpy as np

    spec, expected = make("mds", text="all"), pairs(curated)
    run(spec)
    index = json.loads(Path(spec.output, "index.json").read_text())
    found = []
    for shard in index["shards"]:
        data = Path(spec.output, shard["raw_data"]["basename"]).read_bytes()
        assert len(data) == shard["raw_data"]["bytes"]
        assert int.from_bytes(data[:4], "little") == shard["samples"]
        places = np.frombuffer(data[4 : 8 + 4 * shard["samples"]], "<u4")
        for begin, end in itertools.pairwise(places):
            sizes = np.frombuffer(data[begin : begin + 12], "<u4")
            ends = begin + 12 + np.cumsum(sizes)
            assert ends[-1] == end
            about, image, text = (data[e - s : e] for s, e in zip(sizes, ends, strict=True))
            found.append((image, text.decode(), [one["text"] for one in json.loads(about)["captions"]]))
    assert found == [(p["image"], p["text"], [one["text"] for one in p["captions"]]) for p in expected]


def test_mds_by_its_own_reader(make: MakeExport, curated: str) -> None:
    streaming = pytest.importorskip("streaming", reason="tests/test_export_readers.py runs this one")
    spec, expected = make("mds"), pairs(curated)
    run(spec)
    read_back = streaming.StreamingDataset(local=spec.output, batch_size=1, shuffle=False)
    rows = [read_back[n] for n in range(len(expected))]
    assert [(row["image"], row["text"]) for row in rows] == [(pair["image"], pair["text"]) for pair in expected]
    assert [row["about"]["row"] for row in rows] == [pair["row"] for pair in expected]


def test_litdata(make: MakeExport, curated: str) -> None:
    litdata = pytest.importorskip("litdata", reason="tests/test_export_readers.py runs this one")
    spec, expected = make("litdata"), pairs(curated)
    run(spec)
    loaded = litdata.StreamingDataset(spec.output)
    rows = [loaded[n] for n in range(len(loaded))]
    assert [(row["image"], row["text"]) for row in rows] == [(pair["image"], pair["text"]) for pair in expected]
    assert [json.loads(row["about"])["row"] for row in rows] == [pair["row"] for pair in expected]


# --- which text ---

WEB = Caption("web", "web", None, 0.9)
LOW, HIGH = Caption("low", "synthetic", "one", 0.6), Caption("high", "synthetic", "two", 0.95)
GRAY = "0" * 64  # draw(0, GRAY) is 0.16...


@pytest.mark.parametrize(
    ("rule", "captions", "probability", "chosen"),
    [
        ("best", (WEB, LOW, HIGH), 0.5, "high"),
        ("all", (WEB, LOW, HIGH), 0.5, "high"),
        ("web-first", (WEB, LOW, HIGH), 0.5, "web"),
        ("web-first", (LOW, HIGH), 0.5, "high"),
        ("mixture", (WEB, LOW, HIGH), 1.0, "web"),
        ("mixture", (WEB, LOW, HIGH), 0.0, "high"),
        ("mixture", (LOW, HIGH), 1.0, "high"),
        ("mixture", (WEB,), 0.0, "web"),
    ],
)
def test_choice(rule: Any, captions: tuple[Caption, ...], probability: float, chosen: str) -> None:
    best = max(captions, key=lambda caption: caption.itm).text
    assert Choice(rule, probability, 0).of(captions, best, GRAY).text == chosen


def test_a_mixture_is_drawn_by_seed_and_image_alone() -> None:
    images = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(4000)]
    for p in (0.2, 0.7):
        texts = [Choice("mixture", p, 1).of((WEB, HIGH), "high", image).text for image in images]
        assert abs(texts.count("web") / 4000 - p) < 0.025  # 3 standard deviations
    assert draw(1, images[0]) == draw(1, images[0]) != draw(2, images[0])
    few = {image for image in images if draw(1, image) < 0.2}
    assert few < {image for image in images if draw(1, image) < 0.7}  # more of the web is more of the same


@pytest.mark.parametrize(("rule", "more"), [("web-first", {}), ("mixture", {"web_probability": 0.5, "seed": 7})])
def test_text_rules_of_a_dataset(make: MakeExport, curated: str, rule: str, more: dict[str, Any]) -> None:
    spec = make("parquet", text=rule, **more)
    summary = run(spec)
    rows = pq.read_table(f"{spec.output}/data").to_pylist()
    assert len({row["source"] for row in rows}) == 2
    assert summary.sources == {name: [row["source"] for row in rows].count(name) for name in ("synthetic", "web")}
    for row, pair in zip(rows, pairs(curated), strict=True):
        kept = {(caption["text"], caption["source"]) for caption in pair["captions"]}
        assert (row["text"], row["source"]) in kept
        both = len({source for _, source in kept}) == 2
        web = rule == "web-first" or draw(7, row["sha256"]) < 0.5
        assert row["source"] == (("web" if web else "synthetic") if both else pair["captions"][0]["source"])


# --- which rows ---


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5000)), max_size=12),
    st.integers(1, 8000),
    st.none() | st.integers(1, 50),
)
def test_cutting_covers_every_row_once_in_order(
    sizes: list[tuple[int, int]], max_bytes: int, max_rows: int | None
) -> None:
    groups = [RowGroup(f"{n}", 0, rows, size) for n, (rows, size) in enumerate(sizes)]
    shards = cut(groups, max_bytes, max_rows)
    rows = [(one.url, row) for shard in shards for one in shard.slices for row in range(one.start, one.stop)]
    assert rows == [(group.url, row) for group in groups for row in range(group.rows)]
    first = 0
    for number, shard in enumerate(shards):
        assert (shard.number, shard.first) == (number, first)
        first += shard.rows
        assert shard.rows <= (max_rows or shard.rows)
        size = sum(
            (one.stop - one.start) * groups[int(one.url)].size / groups[int(one.url)].rows for one in shard.slices
        )
        assert shard.rows == 1 or size <= max_bytes + 1e-6


def test_an_earlier_version_has_its_rows_and_thresholds(make: MakeExport, curated: str) -> None:
    dataset = CuratedDataset.for_reading(curated, {})
    newest = dataset.versions()["pairs"]
    before = next(v for v in range(newest - 1, 0, -1) if dataset.pairs(v).count_rows() != dataset.pairs().count_rows())
    spec = make("parquet", version=before)
    summary = run(spec)
    old = dataset.pairs(before).to_table(columns=["shard", "row"]).to_pylist()
    rows = pq.read_table(f"{spec.output}/data").to_pylist()
    assert [(row["shard"], row["row"]) for row in rows] == sorted((row["shard"], row["row"]) for row in old)
    assert (summary.version, summary.rows) == (before, len(old))
    assert "| judges | 0.3 | 0.25 |" in Path(spec.output, "README.md").read_text()
    with pytest.raises(DatasetError, match="no version 99"):
        run(make(version=99))


def test_a_dataset_in_a_folder_of_any_name(make: MakeExport, curated: str, tmp_path: Path) -> None:
    """Delta Lake's URIs of files say %20 for a space; no file is named so."""
    folder = tmp_path / "was für ein Ort"
    shutil.copytree(curated, folder / "curated")
    spec = make("mds", dataset=str(folder / "curated"), output=str(folder / "aus"))
    assert run(spec).rows == len(pairs(curated))


def test_rows_out_of_order_are_refused(make: MakeExport, curated: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(curated, copy)
    table = DeltaTable(f"{copy}/pairs")
    table.optimize.z_order(["image_sha256"])
    spec = make(dataset=str(copy))
    with pytest.raises(DatasetError, match=r"comes after row .* Export an earlier version"):
        run(spec)
    assert not Path(spec.output).exists()
    summary = run(make(dataset=str(copy), version=table.version() - 1))
    assert summary.rows == len(pairs(curated))


# --- whole or not there ---


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_that_breaks_off_resumes(
    make: MakeExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    if form == "litdata":
        pytest.importorskip("litdata", reason="tests/test_export_readers.py runs this one")
    whole = make(form, output=str(tmp_path / "whole"), writers=1)
    run(whole)
    spec = make(form, writers=1)
    written: list[int] = []
    real = driver._write_shard

    def until_the_third(spec: ExportSpec, shard: Shard, *others: Any) -> Any:
        written.append(shard.number)
        if len(written) == 3:
            part = Path(f"{spec.output}.incomplete") / "half.part"
            part.write_bytes(b"what a kill leaves")
            raise KeyboardInterrupt
        return real(spec, shard, *others)

    monkeypatch.setattr(driver, "_write_shard", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(spec)
    assert not Path(spec.output).exists()
    summary = run(spec)
    assert summary.resumed == 2
    assert written == [0, 1, 2, *range(2, summary_shards(spec))]
    assert not Path(f"{spec.output}.incomplete").exists()
    assert content(spec.output) == content(whole.output)
    assert run(spec).nothing


def content(root: str) -> dict[str, bytes]:
    files = (path for path in Path(root).rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def summary_shards(spec: ExportSpec) -> int:
    shards: int = json.loads(Path(spec.output, "manifest.json").read_text())["asked"]["shards"]
    return shards


@pytest.mark.slow
@pytest.mark.parametrize("form", ["webdataset", "authors", "mds"])
def test_killed_exports_come_to_the_same_bytes(curated: str, tmp_path: Path, form: str) -> None:
    """Killed as the kernel kills, again and again: as files get their names, and at last as the directory would."""
    about = {"kind": "export", "dataset": curated, "format": form, "shard_rows": 1, "writers": 2}
    run(ExportSpec(**about, output=str(tmp_path / "whole")))  # type: ignore[arg-type]
    output = tmp_path / "out"
    for number in (1, 12, 25, None):
        child = [sys.executable, "-c", KILLED, json.dumps({**about, "output": str(output)}), json.dumps(number)]
        done = subprocess.run(child, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not output.exists()
    assert Path(f"{output}.incomplete", "manifest.json").exists()
    spec = ExportSpec(**about, output=str(output))  # type: ignore[arg-type]
    assert run(spec).rows == len(pairs(curated))
    assert content(spec.output) == content(str(tmp_path / "whole"))


KILLED = """
import itertools, json, os, signal, sys
import capfilt
from capfilt.spec import ExportSpec

about, number = map(json.loads, sys.argv[1:])
renamed = itertools.count(1)

def look(event, given):  # before it is done
    if event == "os.rename" and (str(given[1]) == about["output"] or next(renamed) == number):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(look)
capfilt.run(ExportSpec(**about))
"""


def test_files_that_were_removed_meanwhile_are_not_taken_to_be_there(
    make: MakeExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make(output=str(tmp_path / "whole")))
    spec, real = make(), Path.replace

    def but_the_manifest(path: Path, target: str) -> Path:
        if Path(target).name == "manifest.json":
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "replace", but_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        run(spec)
    monkeypatch.undo()
    Path(f"{spec.output}.incomplete", "00001.tar").unlink()
    with pytest.raises(DatasetError, match=r"out\.incomplete: 00001\.tar was written and is gone"):
        run(spec)
    assert not Path(spec.output).exists()
    assert run(spec).resumed == 0
    assert content(spec.output) == content(str(tmp_path / "whole"))


def test_another_export_does_not_take_up_what_one_left(make: MakeExport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(make())
    monkeypatch.undo()
    spec = make("parquet")
    assert run(spec).resumed == 0
    assert not list(Path(spec.output).glob("*.tar"))


# --- two at once ---


def test_an_output_that_another_export_writes_is_left_alone(make: MakeExport, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(spec)
    half = content(f"{spec.output}.incomplete")
    assert half
    with Lease(spec.output, {}, "other", 600, at=LEASE):
        for form in ("webdataset", "parquet"):
            with pytest.raises(LeaseHeldError, match=r"/out: held by run other on .* Nothing was done"):
                run(make(form))
    assert content(f"{spec.output}.incomplete") == half
    assert not run(spec).nothing  # the lease was given back
    with Lease(spec.output, {}, "other", 600, at=LEASE):
        assert run(spec).nothing  # which asks for none


def test_of_exports_to_one_output_at_once_one_is_made_whole(make: MakeExport, tmp_path: Path) -> None:
    wholes = {form: make(form, output=str(tmp_path / form)) for form in ("webdataset", "parquet", "mds")}
    for spec in wholes.values():
        run(spec)
    for number in range(3):
        specs = {form: make(form, output=str(tmp_path / "at-once" / str(number))) for form in wholes}
        gate, ended = threading.Barrier(len(specs)), dict[str, Any]()

        def race(form: str, spec: ExportSpec, gate: Any = gate, ended: dict[str, Any] = ended) -> None:
            gate.wait()
            try:
                ended[form] = run(spec)
            except DatasetError as error:
                ended[form] = error

        threads = [threading.Thread(target=race, args=pair) for pair in specs.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [form for form, outcome in ended.items() if isinstance(outcome, ExportSummary)]
        assert content(specs[winner].output) == content(wholes[winner].output)
        others = [str(outcome) for form, outcome in ended.items() if form != winner]
        assert all("held by run export on" in one or "holds another export" in one for one in others)
        assert os.listdir(tmp_path / "at-once").count(str(number)) == 1
    assert sorted(os.listdir(tmp_path / "at-once")) == ["0", "1", "2"]  # no lease, nothing incomplete


def test_an_export_that_was_taken_over_gives_no_file_its_name(tmp_path: Path) -> None:
    def taken() -> None:
        raise LeaseLostError("taken over")

    mine, output = Folder(str(tmp_path / "out"), {}, taken), tmp_path / "out"
    Folder(str(output), {}).put("00000.tar", b"another's")
    manifest = {"files": [], "asked": {"format": "mds"}}
    for act in (lambda: mine.put("00000.tar", b"mine"), lambda: mine.publish(manifest), mine.discard):
        with pytest.raises(LeaseLostError):
            act()
    assert content(f"{output}.incomplete") == {"00000.tar": b"another's"}
    assert not output.exists()


def test_what_is_there_is_not_overwritten(make: MakeExport, tmp_path: Path) -> None:
    spec = make()
    Path(spec.output).mkdir()
    assert run(spec).rows  # an empty directory is as good as none
    with pytest.raises(DatasetError, match=r"holds another export \(text 'best', now 'web-first'\)"):
        run(make(text="web-first"))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(DatasetError, match="not empty, and no export"):
        run(make(output=str(foreign)))
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


def test_a_file_of_the_dataset_that_is_gone_is_named(make: MakeExport, curated: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(curated, copy)
    dataset = CuratedDataset.for_reading(str(copy), {})
    victim = Path(dataset.pair_files()[1][-1])
    spec = make(dataset=str(copy), writers=2)
    victim.unlink()
    with pytest.raises(InputError, match=victim.name):
        run(spec)
    assert not Path(spec.output).exists()


def test_the_manifest_tells_the_truth(make: MakeExport) -> None:
    spec = make("huggingface")
    summary = run(spec)
    manifest = json.loads(Path(spec.output, "manifest.json").read_text())
    for file in manifest["files"]:
        data = Path(spec.output, file["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    there = {str(path.relative_to(spec.output)) for path in Path(spec.output).rglob("*") if path.is_file()}
    assert there == {file["path"] for file in manifest["files"]} | {"manifest.json"}
    assert sum(file.get("rows", 0) for file in manifest["files"]) == summary.rows == manifest["asked"]["rows"]
    assert manifest["formats"].keys() == {"JPEG", "PNG", "WEBP"}


# --- the dataset card ---


def how(**fields: Any) -> str:
    """What a dataset card says of a run whose spec has these fields."""
    at = HubCheckpoint(hub="org/blip", revision="0123456789abcdef" * 2 + "01234567")
    about: dict[str, Any] = {"checkpoint": at, "image_size": 16}
    defaults: dict[str, Any] = {
        **{"kind": "curate", "input": Input(paths=("in",)), "output": "out"},
        "captioners": (CaptionerCard(role="captioner", name="writes", licence="BSD-3-Clause", **about),),
        "filters": tuple(
            FilterCard(role="filter", name=f"judge-{n}", thresholds=Thresholds(web=own, synthetic=own), **about)
            for n, own in enumerate((0.3, 0.4))
        ),
    }
    return "\n".join(_way(CurateSpec(**{**defaults, **fields})))


def test_the_card_names_what_an_endpoint_served() -> None:
    served = {"base_url": "http://10.0.0.7:8000/v1", "served_model": "llava-7b", "revision": "of May"}
    captioner = EndpointCard(
        **{"role": "captioner", "name": "remote", "model": "openai", "prompt": "Describe.", "licence": "llama2"},
        **served,
        sampling=SamplingOverride(max_tokens=60),
    )
    said = how(captioners=(captioner,))
    assert "| captioner | remote | llava-7b, revision of May, behind an endpoint | llama2 |" in said
    assert "Of remote: max_tokens 60." in said
    assert "10.0.0.7" not in said
    assert "| filter | judge-0 | [org/blip](https://huggingface.co/org/blip) at 0123456789ab | unknown |" in said


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({"decision": "mean"}, ["| mean of judge-0, judge-1 | 0.35 | 0.35 | probability |"]),
        (
            {"decision": "mean", "thresholds": ThresholdsOverride(web=0.6)},
            ["| mean of judge-0, judge-1 | 0.6 | 0.35 | probability |"],
        ),
        ({"decision": "vote"}, ["| judge-0 | 0.3 | 0.3 | probability |", "| judge-1 | 0.4 | 0.4 | probability |"]),
    ],
)
def test_the_card_has_the_thresholds_that_decided(fields: dict[str, Any], rows: list[str]) -> None:
    table = how(**fields).partition("| filter | threshold")[2].partition("\n\n")[0]
    assert table.splitlines()[2:] == rows


def test_the_card_says_what_was_left_out() -> None:
    classifier = ClassifierCard(
        **{"role": "classifier", "name": "unsafe", "image_size": 16, "labels": ("nsfw",), "licence": "apache-2.0"},
        checkpoint=LocalCheckpoint(path="/models/unsafe"),
    )
    said = how(
        keep_out=KeepOut(domains=("bad.example", "worse.example"), words=("slur",), classifier=classifier),
        duplicates=Duplicates(near_bits=16, max_per_url=3),
    )
    assert "| classifier | unsafe | local | apache-2.0 |" in said
    assert (
        "Kept out: domains (2 on the list); words in texts (1 on the list); images that unsafe takes for `nsfw` with a "
        "probability of 0.5 or more." in said
    )
    assert "slur" not in said
    assert (
        "Of copies (the same bytes, or hashes that differ in at most 16 bits) 1 of an image may stay, and 3 of a URL."
        in said
    )
    assert "Kept out" not in how() + how(keep_out=KeepOut())
    assert "copies" not in how()


def test_the_card_says_which_runs_it_knows_nothing_of(make: MakeExport, curated: str, tmp_path: Path) -> None:
    """The rows are the last run's, whose record another version wrote."""
    copy = tmp_path / "copy"
    shutil.copytree(curated, copy)
    for record in copy.glob("_runs/*/run.json"):
        held = json.loads(record.read_text())
        held["spec"]["of_tomorrow"] = True
        record.write_text(json.dumps(held))
    spec = make(dataset=str(copy))
    run(spec)
    readme = Path(spec.output, "README.md").read_text()
    assert "Settings of 1 of 1 runs are not on record, or of another version of capfilt." in readme


# --- stores ---


@pytest.fixture
def bucket() -> Iterator[MemoryFileSystem]:
    """A store in memory, where the test's bucket is `/bucket`."""
    fs = MemoryFileSystem()
    yield fs
    if fs.exists("/bucket"):
        fs.rm("/bucket", recursive=True)


def break_off(spec: ExportSpec, monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    """Export to the store, until so many of its files are in their place."""
    real, number = MemoryFileSystem.mv, itertools.count()

    def up_to(fs: MemoryFileSystem, *given: Any) -> None:
        if next(number) >= moves:
            raise KeyboardInterrupt
        real(fs, *given)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "mv", up_to)
        with pytest.raises(KeyboardInterrupt):
            run(spec)
    assert not MemoryFileSystem().exists("/bucket/export/manifest.json")


def check_store(bucket: MemoryFileSystem, spec: ExportSpec) -> None:
    """All that the manifest lists is there, and nothing is left of the tries before."""
    manifest = json.loads(bucket.cat_file("/bucket/export/manifest.json"))
    assert manifest["asked"]["format"] == spec.format
    for file in manifest["files"]:
        assert hashlib.sha256(bucket.cat_file(f"/bucket/export/{file['path']}")).hexdigest() == file["sha256"]
    if spec.format == "authors":
        assert len(bucket.glob("/bucket/export/images/00*/*")) == manifest["asked"]["rows"]
    assert not bucket.find("/bucket/export.incomplete")
    assert not bucket.find(f"/bucket/export{LEASE}")
    assert run(spec).nothing


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_to_a_store_that_breaks_off_while_it_is_put_in_place(
    make: MakeExport, bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    if form == "litdata":
        pytest.importorskip("litdata", reason="tests/test_export_readers.py runs this one")
    spec = make(form, output="memory://bucket/export")
    break_off(spec, monkeypatch, moves=3)
    assert len(bucket.find("/bucket/export")) == 3
    real = MemoryFileSystem._open

    def but_the_lease(fs: MemoryFileSystem, path: str, *given: Any, **more: Any) -> Any:
        assert path.startswith(f"/bucket/export{LEASE}/"), "it is written again"
        return real(fs, path, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "_open", but_the_lease)
        run(spec)
    check_store(bucket, spec)


@pytest.mark.parametrize(("form", "removed"), [("webdataset", "export"), ("authors", "export/images")])
def test_what_was_put_in_place_and_then_removed_is_written_anew(
    make: MakeExport, bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, form: str, removed: str
) -> None:
    """Someone sees half an export after a kill, and clears it away."""
    spec = make(form, output="memory://bucket/export")
    break_off(spec, monkeypatch, moves=3)
    bucket.rm(f"/bucket/{removed}", recursive=True)
    run(spec)
    check_store(bucket, spec)


def test_a_manifest_that_was_copied_and_not_removed(
    make: MakeExport, bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last move broke off in between: the export is complete, and what is left goes with the next try."""
    spec = make(output="memory://bucket/export")
    real = MemoryFileSystem.rm

    def but_the_manifest(fs: MemoryFileSystem, path: Any, *given: Any, **more: Any) -> None:
        if "manifest.json" in str(path):
            raise KeyboardInterrupt
        real(fs, path, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "rm", but_the_manifest)
        with pytest.raises(KeyboardInterrupt):
            run(spec)
    assert bucket.find("/bucket/export.incomplete") == ["/bucket/export.incomplete/manifest.json"]
    assert run(spec).nothing
    check_store(bucket, spec)


def test_what_broke_off_as_it_was_removed_is_not_taken_up(
    make: MakeExport, bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an export, which another one's try was removing: the first is asked for again."""
    spec = make("authors", output="memory://bucket/export")
    opened, removed = MemoryFileSystem._open, MemoryFileSystem.rm_file

    def but_the_last(fs: MemoryFileSystem, path: str, *given: Any, **more: Any) -> Any:
        if path.endswith("README.md"):
            raise KeyboardInterrupt
        return opened(fs, path, *given, **more)

    def up_to_a_list(fs: MemoryFileSystem, path: str) -> None:
        removed(fs, path)
        if "/pairs-" in path:
            raise KeyboardInterrupt

    for name, fault, tried in (
        ("_open", but_the_last, spec),
        ("rm_file", up_to_a_list, make("mds", output=spec.output)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, name, fault)
            with pytest.raises(KeyboardInterrupt):
                run(tried)
    assert bucket.find("/bucket/export.incomplete/images")
    assert run(spec).resumed == 0
    check_store(bucket, spec)


@pytest.mark.parametrize("form", ["webdataset", "authors"])
def test_taking_an_export_back_leaves_what_is_not_its_own(
    make: MakeExport, bucket: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    break_off(make(form, output="memory://bucket/export"), monkeypatch, moves=3)
    foreign = ["images/mine.jpg", "images/2024/000000000.jpg", "notes.txt"]
    foreign += ["images/00000/000000000.jpg"] if form == "webdataset" else []
    for name in foreign:
        bucket.pipe_file(f"/bucket/export/{name}", b"mine")
    spec = make("parquet", output="memory://bucket/export")
    run(spec)
    check_store(bucket, spec)
    own = {file["path"] for file in json.loads(bucket.cat_file("/bucket/export/manifest.json"))["files"]}
    there = {name.removeprefix("/bucket/export/") for name in bucket.find("/bucket/export")}
    assert there == own | {"manifest.json", *foreign}


# --- a trainer ---


def test_one_training_step_with_webdataset_alone(make: MakeExport) -> None:
    """The script of docs/export.md, as it stands there, in the exported directory."""
    guide = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    (script,) = [block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "webdataset" in block]
    assert "capfilt" not in script
    spec = make()
    run(spec)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=spec.output, capture_output=True, text=True, timeout=120, check=False
    )
    first, second = (float(line.split()[1]) for line in done.stdout.splitlines())
    assert second < first, done.stderr


# --- the command line ---


def test_the_command(curated: str, tmp_path: Path) -> None:
    path = tmp_path / "export.yaml"
    path.write_text(f"kind: export\ndataset: {curated}\noutput: wds\nformat: webdataset\n")
    checked = CliRunner().invoke(app, ["check", str(path)])
    assert checked.exit_code == 0, checked.output
    assert "1 file of format webdataset to write" in checked.stdout
    assert not (tmp_path / "wds").exists()
    for said in ("rows of version", "nothing to do"):
        done = CliRunner().invoke(app, ["run", str(path)])
        assert done.exit_code == 0, done.output
        assert said in done.stdout
    readme = (tmp_path / "wds" / "README.md").read_text()
    for line in ("| captioner | writes | local | BSD-3-Clause |", "| judges | 0.6 | 0.25 |", "| no_match |"):
        assert line in readme
    assert "{00000..00000}.tar" in readme


def test_spec_errors(tmp_path: Path) -> None:
    path = tmp_path / "export.yaml"
    path.write_text("kind: export\ndataset: d\noutput: d/e\nformat: webdataset\n")
    with pytest.raises(SpecError, match="lies in the dataset that is exported"):
        load_spec(path)
    with pytest.raises(SpecError, match="web_probability: only of text: mixture, and text is best"):
        load_spec(path, ["output=e", "web_probability=0.3"])


def test_exporting_loads_neither_torch_nor_ray(curated: str, tmp_path: Path) -> None:
    code = (
        "import sys, capfilt\n"
        "from capfilt.spec import ExportSpec\n"
        f"capfilt.run(ExportSpec(kind='export', dataset={curated!r}, output={str(tmp_path / 'out')!r}, format='mds'))\n"
        "sys.exit(', '.join(m for m in ('torch', 'ray', 'transformers') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr
