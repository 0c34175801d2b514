"""WebDataset tars and Hugging Face's saved datasets as inputs: samples, what is broken, and whole runs."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import tarfile
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import MakeSpec, jpeg, read, write_shard
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from stubs import load_hash

from capfilt import arrow_streams, tars
from capfilt.errors import InputError
from capfilt.examples import epoch_groups, list_parts, read_group
from capfilt.fragments import Footer, Row, cut, read_footer, read_rows
from capfilt.inputs import InputFile, list_inputs
from capfilt.pipelines.curate import Summary, curate, in_process
from capfilt.spec import Columns, CurateSpec, Input, PairSource

LEAVES_FILES_OPEN = pytest.mark.filterwarnings(  # webdataset, to the garbage collector
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
Members = Iterable[tuple[str, bytes]]


def tar(members: Members, form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sample(number: int, **fields: Any) -> list[tuple[str, bytes]]:
    about = {"url": f"http://e.org/{number}", **fields}
    return [
        (f"{number:05d}.jpg", jpeg(number)),
        (f"{number:05d}.txt", f"text {number}".encode()),
        (f"{number:05d}.json", json.dumps(about).encode()),
    ]


def several(count: int) -> list[tuple[str, bytes]]:
    return [member for number in range(count) for member in sample(number)]


def look(path: Path, data: bytes | None = None, columns: Columns | None = None) -> tuple[InputFile, Footer]:
    if data is not None:
        path.write_bytes(data)
    (file,) = list_inputs(Input(paths=(str(path),)))
    return file, read_footer(file, columns or Columns(), {})


def rows_of(path: Path, data: bytes | None = None, columns: Columns | None = None) -> list[Row]:
    file, footer = look(path, data, columns)
    rows = list(read_rows(footer.fragment(file, 0, footer.rows), {}, pauses=()))
    assert [row.row for row in rows] == list(range(footer.rows))
    return rows


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "00000.tar"


# --- samples ---


@LEAVES_FILES_OPEN
def test_what_webdataset_writes(place: Path) -> None:
    import webdataset as wds

    with wds.TarWriter(str(place)) as writer:
        for n in range(5):
            writer.write(
                {"__key__": f"{n:03d}", "jpg": jpeg(n), "txt": f"text {n}", "json": {"url": "u", "key": f"k{n}"}}
            )
    rows = rows_of(place)
    assert [(row.image, row.text, row.url, row.key) for row in rows] == [
        (jpeg(n), f"text {n}", "u", f"k{n}") for n in range(5)
    ]
    read_back = wds.WebDataset(str(place), shardshuffle=False)
    assert [one["jpg"] for one in read_back] == [row.image for row in rows]
    del read_back
    gc.collect()  # while the warning is looked away from


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar(place: Path, form: int) -> None:
    folder = "" if form == tarfile.USTAR_FORMAT else f"é{'long' * 60}/"
    rows = rows_of(place, tar([(folder + name, data) for name, data in several(4)], form))
    assert [row.key for row in rows] == [f"{folder}{n:05d}" for n in range(4)]
    assert [row.text for row in rows] == [f"text {n}" for n in range(4)]


def test_members_in_any_order_side_by_side_are_a_sample(place: Path) -> None:
    for order in itertools.permutations(range(3)):
        shuffled = [sample(n)[i] for n in range(3) for i in order]
        assert [(row.image, row.text) for row in rows_of(place, tar(shuffled))] == [
            (jpeg(n), f"text {n}") for n in range(3)
        ]


def test_fragments_of_a_tar_are_read_by_themselves(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "RUN_ROWS", 8)
    file, footer = look(place, tar(several(35)))
    assert footer.row_groups == (8, 8, 8, 8, 3)
    for rows in (1, 5, 8, 20, 100):
        fragments = [footer.fragment(file, a, b) for a, b in cut(footer.row_groups, rows)]
        split = [part for fragment in fragments for part in fragment.split(2)]
        for parts in (fragments, split):
            found = [row for part in parts for row in read_rows(part, {})]
            assert [(row.row, row.image) for row in found] == [(n, jpeg(n)) for n in range(35)]


def test_only_headers_are_read_to_find_the_samples(place: Path) -> None:
    place.write_bytes(tar([(f"{n}.jpg", bytes(4_000_000)) for n in range(10)]))
    tracemalloc.start()
    _, footer = look(place)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert footer.rows == 10
    assert peak < 4_000_000


@pytest.mark.parametrize(
    ("members", "expected"),
    [  # (key, has image, text) of each row
        ([("a.png", b"p"), ("a.jpg", b"j")], [("a", b"j", None)]),
        ([("a.JPG", b"j"), ("a.txt", b"t")], [("a", b"j", "t")]),
        ([("a.jpg", b"j"), ("a.json", b'{"caption": "c"}')], [("a", b"j", "c")]),
        ([("a.jpg", b"j"), ("a.txt", b"t"), ("a.json", b'{"caption": "c"}')], [("a", b"j", "t")]),
        ([("a.jpg", b"1"), ("a.txt", b"t"), ("a.jpg", b"2"), ("a.txt", b"u")], [("a", b"1", "t"), ("a", b"2", "u")]),
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"t"), ("a.jpg", b"3")], [("a", b"1", None), ("b", b"2", None)]),
        ([("a.txt", b"t"), ("a.cls", b"5")], [("a", None, "t")]),
        ([("a.pyd", b"\x80\x04."), ("a.pth", b"x"), ("a.jpg", b"j")], [("a", b"j", None)]),
        ([("../../etc/passwd.jpg", b"j")], [("../../etc/passwd", b"j", None)]),
        ([("/root/x.jpg", b"j")], [("/root/x", b"j", None)]),
        ([("README", b"r"), (".hidden.jpg", b"h"), ("a.jpg", b"j")], [("a", b"j", None)]),
        ([("a.jpg", b"j"), ("a.txt", b"\xff\xfe")], [("a", b"j", "\ufffd\ufffd")]),
        ([("a.jpg", b""), ("a.txt", b"")], [("a", b"", "")]),
        ([("a.jpg", b"j"), ("a.json", b'{"caption": "x\\ud800y"}')], [("a", b"j", "x?y")]),
    ],
)  # fmt: skip
def test_samples(place: Path, members: Members, expected: list[tuple[str, bytes | None, str | None]]) -> None:
    rows = rows_of(place, tar(members))[: len(expected)]
    assert [(row.key, row.image, row.text) for row in rows] == expected
    assert all(row.readable for row in rows)


def test_what_is_missing_or_unusable_is_said(place: Path) -> None:
    members = [
        ("a.json", b'{"status": "failed_to_download", "error_message": "404"}'),
        ("b.cls", b"5"),
        *[("c.jpg", b"j"), ("c.json", b"{")],
        *[("d.jpg", b"j"), ("d.txt", bytes(2**20 + 1))],
        *[("e.jpg", b"j"), ("e.txt", b"t"), ("e.json", b"[" * 100_000)],
    ]
    rows = rows_of(place, tar(members))
    assert [row.readable for row in rows] == [True, True, False, False, True]
    assert [row.note for row in rows[:2]] == ["failed_to_download: 404", "no image among cls"]
    assert "'c.json' is no JSON" in (rows[2].note or "")
    assert rows[3].note == "'d.txt' has 1,048,577 bytes"
    assert (rows[4].image, rows[4].text) == (b"j", "t")


def test_columns_name_extensions_and_fields(place: Path) -> None:
    members = [("a.left.jpg", b"l"), ("a.jpg", b"j"), ("a.txt", b"t"), ("a.json", b'{"alt": "x", "page": "p"}')]
    (row,) = rows_of(place, tar(members), Columns(image="left.jpg", text="alt", url="page"))
    assert (row.image, row.text, row.url) == (b"l", "x", "p")


def test_images_apart_from_their_texts_are_refused(place: Path) -> None:
    members = sorted(several(3), key=lambda member: member[0][-3:])
    with pytest.raises(InputError, match=r"00000' do not lie side by side.*tar --sort=name"):
        look(place, tar(members))


def test_a_compressed_tar_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"a\.tar\.gz: a compressed tar .* decompress it"):
        look(path)


# --- broken tars ---


def test_a_tar_that_is_cut_off_keeps_what_came_before(place: Path) -> None:
    whole = tar(several(6))
    with tarfile.open(fileobj=io.BytesIO(whole)) as file:
        ends = {member.name: member.offset_data + member.size for member in file}
    for where, good, note in (
        (ends["00003.jpg"] - 1, 3, "in the middle of '00003.jpg'"),
        (ends["00003.json"] - 1, 3, "in the middle of '00003.json'"),
        (ends["00003.json"], 4, "without an end mark"),
        (ends["00005.json"], 6, "without an end mark"),
    ):
        rows = rows_of(place, whole[:where])
        assert [row.readable for row in rows] == [True] * good + [False]
        assert [row.text for row in rows[:good]] == [f"text {n}" for n in range(good)]
        assert note in (rows[-1].note or "")
    with pytest.raises(
        InputError, match=r"not readable as a tar: the tar ends at byte 600, in the middle of '00000.jpg'"
    ):
        look(place, whole[:600])
    with pytest.raises(InputError, match="not readable as a tar: no tar header at byte 0"):
        look(place, b"<html>" * 500)


def test_a_bad_header_ends_the_tar(place: Path) -> None:
    whole = bytearray(tar(several(6)))
    with tarfile.open(fileobj=io.BytesIO(bytes(whole))) as file:
        (at,) = (member.offset for member in file if member.name == "00004.jpg")
    whole[at + 5] ^= 1
    rows = rows_of(place, bytes(whole))
    assert [row.readable for row in rows] == [True] * 4 + [False]
    assert f"no tar header at byte {at:,} (bad checksum)" in (rows[-1].note or "")


def test_an_empty_tar_has_no_rows(place: Path) -> None:
    assert rows_of(place, tar([])) == []


def test_tars_one_after_another_are_one(place: Path) -> None:
    assert len(rows_of(place, tar(several(2)) + tar(several(3)) + b"what stands behind the end mark" * 30)) == 5


def test_a_header_that_claims_too_much_costs_no_memory(place: Path) -> None:
    info = tarfile.TarInfo("x" * 50)
    info.size, info.type = 2**40, tarfile.XHDTYPE
    with pytest.raises(InputError, match="in the middle of"):
        look(place, info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def damaged(data: st.DataObject, whole: bytes) -> io.BytesIO:
    """A file, some bytes of it changed and its end cut off."""
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4))):
        changed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    return io.BytesIO(changed[: data.draw(st.integers(1, len(whole)))])


SMALL = tar(
    [(f"{n}.{kind}", data) for n in range(3) for kind, data in (("jpg", b"j"), ("json", b'{"caption":"c"}'))],
    tarfile.PAX_FORMAT,
)[:7000]


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_tar_gives_the_rows_that_it_said(data: st.DataObject) -> None:
    file = damaged(data, SMALL)
    size = len(file.getvalue())
    try:
        rows = sum(tars.index(file, size, ("jpg",)).rows)
    except tars.BrokenTarError:
        return
    found, broken = 0, 0
    try:
        for one in tars.samples(file, 0, size):
            tars.contents(file, one, ("jpg",), ("txt", "caption"))
            found += 1
    except tars.BrokenTarError:
        broken = 1
    assert rows == found + broken <= 7


# --- Arrow, as Hugging Face saves it ---


def arrow(path: Path, batches: int, rows: int = 4, *, stream: bool = True) -> Path:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("text", pa.string()), ("label", pa.int64())])
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), schema) as writer:
        for batch in range(batches):
            numbers = range(batch * rows, batch * rows + rows)
            images = [{"bytes": jpeg(n), "path": None} for n in numbers]
            columns = [images, [f"text {n}" for n in numbers], list(numbers)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return path


@pytest.mark.parametrize("stream", [True, False])
def test_record_batches_are_found(tmp_path: Path, stream: bool) -> None:
    path = arrow(tmp_path / "a.arrow", 5, stream=stream)
    file, footer = look(path)
    assert footer.row_groups == (4,) * 5
    for rows in (1, 3, 8, 100):
        fragments = [footer.fragment(file, a, b) for a, b in cut(footer.row_groups, rows)]
        found = [row for fragment in fragments for row in read_rows(fragment, {}, batch_rows=3)]
        assert [(row.row, row.image, row.text) for row in found] == [(n, jpeg(n), f"text {n}") for n in range(20)]


def test_what_datasets_saves(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    images = [{"bytes": jpeg(n), "path": None} for n in range(250)]
    texts = [f"text {n}" for n in range(250)]
    saved = datasets.Dataset.from_dict({"image": images, "text": texts}, features=features)
    saved.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    (tmp_path / "saved" / "cache-0123.arrow").write_bytes(b"left by map")
    files = list_inputs(Input(paths=(str(tmp_path / "saved"),)))
    assert [Path(file.path).name for file in files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    rows = [row for file in files for row in rows_of(Path(file.path))]
    assert [(row.image, row.text) for row in rows] == list(zip([i["bytes"] for i in images], texts, strict=True))


def test_an_arrow_stream_that_is_cut_off_keeps_what_came_before(tmp_path: Path) -> None:
    path = arrow(tmp_path / "a.arrow", 5)
    whole = path.read_bytes()
    rows = rows_of(path, whole[:-8])  # without its end mark
    assert [row.readable for row in rows] == [True] * 20 + [False]
    rows = rows_of(path, whole[:-300])  # the last batch is not whole
    assert [row.readable for row in rows] == [True] * 16 + [False] * 4
    assert "cannot be decoded" in (rows[-1].note or "")
    with pytest.raises(InputError, match=r"a\.arrow: not readable as Arrow"):
        look(path, whole[:100])
    with pytest.raises(InputError, match=r"a\.arrow: not readable as Arrow"):
        look(path, b"x" * 1000)


def small_stream() -> bytes:
    schema = pa.schema([("image", pa.binary()), ("text", pa.string())])
    out = io.BytesIO()
    with pa.ipc.new_stream(out, schema) as writer:
        for n in range(3):
            writer.write_batch(pa.record_batch([[b"j", None], [f"text {n}", ""]], schema=schema))
    return out.getvalue()


SMALL_STREAM = small_stream()


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_stream_gives_the_rows_that_it_said_or_an_error(data: st.DataObject) -> None:
    file = damaged(data, SMALL_STREAM)
    try:
        stream = arrow_streams.index(file, len(file.getvalue()))
    except (pa.ArrowException, OSError, EOFError):
        return
    for rows, offset in zip(stream.rows, stream.offsets, strict=True):
        with contextlib.suppress(pa.ArrowException, OSError, MemoryError):
            assert arrow_streams.read_batch(file, offset, stream.schema, rows).num_rows == rows


# --- listing, stores, whole runs ---


def test_a_directory_is_searched_for_all_of_them(tmp_path: Path) -> None:
    for name in (
        "a.tar",
        "a.parquet",
        "a_stats.json",
        "sub/b.parquet",
        "sub/c.arrow",
        "_d.tar",
        "e.tar.gz",
        "cache-1.arrow",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    files = list_inputs(Input(paths=(str(tmp_path),)))
    assert [str(Path(file.path).relative_to(tmp_path)) for file in files] == ["a.tar", "sub/b.parquet", "sub/c.arrow"]
    assert [file.shard.rpartition("-")[0] for file in files] == ["a", "b", "c"]


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    fs = MemoryFileSystem()
    yield fs
    fs.rm("/tars", recursive=True)


def test_a_store_is_read_alike(memory: MemoryFileSystem, tmp_path: Path) -> None:
    memory.pipe_file("/tars/0.tar", tar(several(5)))
    memory.pipe_file("/tars/0.parquet", b"img2dataset's")
    memory.pipe_file("/tars/1.arrow", arrow(tmp_path / "1.arrow", 2).read_bytes())
    files = list_inputs(Input(paths=("memory://tars",)))
    found = []
    for file in files:
        footer = read_footer(file, Columns(), {})
        found += [row.image for row in read_rows(footer.fragment(file, 1, footer.rows), {})]
    assert found == [jpeg(n) for n in (*range(1, 5), *range(1, 8))]


def run(spec: CurateSpec) -> Summary:
    return curate(spec, load=load_hash, execute=in_process, console=Console(file=io.StringIO()))


def test_a_run_over_tars_is_a_run_over_parquet(make_spec: MakeSpec, tmp_path: Path) -> None:
    """The same pairs give the same rows whatever they lie in; a cut tar's loss is one row that says so."""
    folder = tmp_path / "in"
    count = 50
    write_shard(folder / "0.parquet", [jpeg(n) for n in range(count)], [f"text {n}" for n in range(count)])
    of_parquet = run(make_spec())
    expected = read(str(tmp_path / "out"))
    (folder / "0.parquet").unlink()
    arrow(folder / "0.arrow", 5, 10)
    (folder / "0.tar").write_bytes(tar(several(count)))
    (folder / "1.tar").write_bytes(tar(several(4))[: 512 * 25])
    summary = run(make_spec(output=str(tmp_path / "out2"), fragment_rows=20))
    rows = {name: [row for row in read(str(tmp_path / "out2")) if name in row["shard"]] for name in ("0-", "1-")}
    assert len(rows["0-"]) == 2 * count
    keep = ("row", "image_sha256", "status", "reason", "texts")
    for shard in {row["shard"] for row in rows["0-"]}:
        own = [row for row in rows["0-"] if row["shard"] == shard]
        assert [[row[name] for name in keep] for row in own] == [[row[name] for name in keep] for row in expected]
    assert summary.counts.kept >= 2 * of_parquet.counts.kept
    *good, lost = rows["1-"]
    assert all(row["status"] != "error" for row in good)
    assert (lost["status"], lost["reason"]) == ("error", "unreadable_row")
    assert "the tar ends at byte" in lost["detail"]
    assert run(make_spec(output=str(tmp_path / "out2"), fragment_rows=20)).shards == 0


def test_new_thresholds_read_newly_kept_images_from_a_tar(make_spec: MakeSpec, tmp_path: Path) -> None:
    from capfilt.spec import ThresholdsOverride

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(tar(several(30)))
    kept = []
    for threshold in (0.9, 0.1):
        run(make_spec(thresholds=ThresholdsOverride(web=threshold, synthetic=threshold)))
        pairs = read(str(tmp_path / "out"), "pairs")
        assert [pair["image"] for pair in pairs] == [jpeg(pair["row"]) for pair in pairs]
        kept.append(len(pairs))
    assert kept[0] < kept[1]


def test_tars_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar(several(30)))
    sources = (PairSource(pairs=Input(paths=(str(tmp_path),))),)
    parts, _ = list_parts(sources)
    groups = epoch_groups(parts, sources, seed=0, epoch=0)
    texts = {pair.texts[0] for group in groups for pair in read_group(group, sources) if pair}
    assert texts == {f"text {n}" for n in range(30)}
