"""Inputs: what is listed, recognised, cut and read."""

from __future__ import annotations

import cProfile
import gc
import io
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import jpeg, write_shard
from fsspec import AbstractFileSystem
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from capfilt.errors import InputError
from capfilt.examples import Group, Part, read_group
from capfilt.fragments import Fragment, cut, read_footer, read_rows, recognise, row_group_rows
from capfilt.inputs import InputFile, current_identity, list_inputs, read_parquet
from capfilt.schema import FILE_SCHEMAS, PAIRS
from capfilt.spec import Columns, Input, PairSource
from capfilt.writer import ParquetWriter


def listed(*paths: Path | str, **options: Any) -> list[InputFile]:
    return list_inputs(Input(paths=tuple(str(path) for path in paths)), **options)


def whole(file: InputFile) -> Fragment:
    footer = read_footer(file, Columns(), {})
    return Fragment(file, footer.layout, 0, footer.rows, footer.rows)


class StoreFS(MemoryFileSystem):
    """A store in memory whose reads fail on demand, whose names lack the host, whose stamps and cache can be set."""

    protocol = "teststore"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fail: ClassVar[Callable[[int], Exception | None]]  # what befalls the n-th read of a file's first 10 kB
    reads: ClassVar[int]
    stamps: ClassVar[dict[str, Any]]
    listed: ClassVar[dict[str, Any]] = {}

    @classmethod
    def reset(cls) -> None:
        cls.fail, cls.reads, cls.stamps = staticmethod(lambda _: None), 0, {"ETag": "1"}
        cls.store.clear()
        cls.listed.clear()

    @classmethod
    def _get_kwargs_from_urls(cls, path: str) -> dict[str, Any]:
        host = path.removeprefix("teststore://").partition("/")[0]
        return {"host": host} if "://" in path and host else {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        if "://" in path:
            path = path.partition("://")[2].partition("/")[2]
        return "/" + path.strip("/") if path.strip("/") else ""

    def __init__(self, host: str = "", **options: Any) -> None:
        super().__init__(**options)
        if not host:
            raise ConnectionError("no host")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path not in self.listed:
            info = super().info(path, **options)
            info.pop("created", None)
            self.listed[path] = info | (self.stamps if info["type"] == "file" else {})
        return dict(self.listed[path])

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        names = [entry["name"] for entry in super().ls(path, detail=True, **options)]
        return [self.info(name) for name in names] if detail else names

    find = AbstractFileSystem.find  # memory's own does not ask `ls`

    def invalidate_cache(self, path: str | None = None) -> None:  # noqa: ARG002  fsspec's signature
        self.listed.clear()

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        return _StoreFile(file) if mode == "rb" else file


class _StoreFile:
    def __init__(self, file: Any) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, size: int = -1) -> bytes:
        if self.file.tell() < 10_000:
            StoreFS.reads += 1
            error = StoreFS.fail(StoreFS.reads)
            if error is not None:
                raise error
        data: bytes = self.file.read(size)
        return data


@pytest.fixture
def store() -> Iterator[Callable[[bytes], InputFile]]:
    """Stores a file as teststore://host/in/0.parquet and lists it."""
    fsspec.register_implementation("teststore", StoreFS, clobber=True)
    StoreFS.reset()
    fs = StoreFS("host")

    def put(data: bytes) -> InputFile:
        fs.pipe_file("/in/0.parquet", data)
        (file,) = listed("teststore://host/in")
        return file

    yield put
    StoreFS.reset()


def noise(rows: int, path: Path) -> bytes:
    """A shard whose pages lie apart from its footer."""
    return write_shard(path, [os.urandom(3000) for _ in range(rows)], row_group=20).read_bytes()


# --- listing ---


def test_directories_globs_files_and_lists_agree(tmp_path: Path) -> None:
    a, b = (write_shard(tmp_path / name, [jpeg(0)]) for name in ("x/00000.parquet", "x/deep/00000.parquet"))
    (tmp_path / "x" / "notes.txt").write_text("no shard")
    write_shard(tmp_path / "x" / "_tmp" / "00001.parquet", [jpeg(0)])
    write_shard(tmp_path / "x" / ".hidden.parquet", [jpeg(0)])
    expected = listed(tmp_path / "x")
    assert [file.path for file in expected] == [str(a), str(b)]
    assert len({file.shard for file in expected}) == 2
    assert listed(tmp_path / "x/**/00000.parquet") == expected
    assert listed(b, a, tmp_path / "x") == expected


def test_the_output_is_no_input(tmp_path: Path) -> None:
    write_shard(tmp_path / "00000.parquet", [jpeg(0)])
    write_shard(tmp_path / "out" / "pairs" / "p.parquet", [jpeg(0)])
    write_shard(tmp_path / "out2" / "q.parquet", [jpeg(0)])
    names = [Path(file.path).name for file in listed(tmp_path, exclude=str(tmp_path / "out"))]
    assert names == ["00000.parquet", "q.parquet"]


@pytest.mark.parametrize("spelling", ["file://{0}/in/out", "{0}/link/out", "file://{0}/link/out/"])
def test_the_output_is_no_input_however_it_is_spelled(tmp_path: Path, spelling: str) -> None:
    write_shard(tmp_path / "in" / "00000.parquet", [jpeg(0)])
    write_shard(tmp_path / "in" / "out" / "pairs" / "p.parquet", [jpeg(0)])
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for paths in ("in", "link"):
        names = [Path(file.path).name for file in listed(tmp_path / paths, exclude=spelling.format(tmp_path))]
        assert names == ["00000.parquet"]


def test_file_urls_are_plain_paths(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "in" / "00000.parquet", [jpeg(0)])
    assert listed(f"file://{path}") == listed(f"file://{tmp_path}/in") == listed(path)


def test_symlinks_are_inputs_with_their_targets_identity(tmp_path: Path) -> None:
    blob = write_shard(tmp_path / "blobs" / "abc", [jpeg(0)] * 3)
    snapshot = tmp_path / "in"
    snapshot.mkdir()
    (snapshot / "0.parquet").symlink_to(blob)
    (snapshot / "dir.parquet").symlink_to(tmp_path / "blobs")  # a directory below an input is not followed
    (tmp_path / "again").symlink_to(snapshot)
    (file,) = listed(snapshot)
    assert file.path == str(snapshot / "0.parquet")
    assert listed(snapshot / "*.parquet") == listed(file.path) == [file]
    assert [found.path for found in listed(tmp_path / "again")] == [str(tmp_path / "again" / "0.parquet")]
    assert len(list(read_rows(whole(file), {}))) == 3
    os.utime(blob, (1, 1))
    assert current_identity(file, {}) != file.input_id
    assert listed(snapshot)[0].input_id == current_identity(file, {})


@pytest.mark.parametrize("asked", ["", "*.parquet"])
def test_a_symlink_to_nothing_is_that_files_failure(tmp_path: Path, asked: str) -> None:
    for name in ("0.parquet", "2.parquet"):
        write_shard(tmp_path / name, [jpeg(0)] * 3)
    (tmp_path / "1.parquet").symlink_to(tmp_path / "gone")
    first, broken, last = listed(tmp_path / asked)
    assert [len(list(read_rows(whole(file), {}))) for file in (first, last)] == [3, 3]
    with pytest.raises(InputError, match=r"1\.parquet: cannot be read: FileNotFoundError"):
        read_footer(broken, Columns(), {})
    write_shard(tmp_path / "gone", [jpeg(0)] * 3)  # it may come yet, but as what the plan does not know
    with pytest.raises(InputError, match="changed during the run"):
        list(read_rows(whole(broken), {}))


def test_a_name_that_is_no_text_is_that_files_failure(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.parquet", [jpeg(0)])
    shutil.copy(tmp_path / "0.parquet", os.fsencode(tmp_path) + b"/\xff.parquet")
    good, odd = listed(tmp_path)
    assert read_footer(good, Columns(), {}).rows == 1
    with pytest.raises(InputError, match=r"\.parquet: not readable as Parquet: UnicodeEncodeError"):
        read_footer(odd, Columns(), {})


def test_a_symlink_to_nothing_asked_for_by_name_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "1.parquet").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"1\.parquet: no such file"):
        listed(tmp_path / "1.parquet")


def test_a_stores_file_that_vanishes_while_it_is_listed_is_that_files_failure(
    store: Callable[[bytes], InputFile], tmp_path: Path
) -> None:
    StoreFS.stamps = {}  # so that the listing has to look at the file itself
    data = noise(5, tmp_path / "x")
    before = store(data)
    StoreFS.fail = staticmethod(lambda _: FileNotFoundError("gone"))
    file = store(data)
    assert (file.path, file.shard) == (before.path, before.shard)
    with pytest.raises(InputError, match=r"teststore://host/in/0\.parquet: cannot be read: FileNotFoundError"):
        read_footer(file, Columns(), {})


def test_a_directory_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    """Its path is too long here: that is closed to root as well."""
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(0)])
    folder = os.open(tmp_path / "in", os.O_RDONLY)
    for _ in range(17):
        os.mkdir("d" * 250, dir_fd=folder)
        outer, folder = folder, os.open("d" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(outer)
    os.close(folder)
    with pytest.raises(InputError, match=r"in: cannot be listed: OSError: .* too long"):
        listed(tmp_path / "in")
    shutil.rmtree(tmp_path / "in")


def test_a_file_costs_one_look_at_the_disk(tmp_path: Path) -> None:
    """A listing of 100,000 files is most of what a run with nothing to do costs."""
    for n in range(300):
        (tmp_path / "in" / str(n % 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / str(n % 3) / f"{n}.parquet").touch()
    with cProfile.Profile() as profile:
        files = listed(tmp_path / "in", exclude=str(tmp_path / "out"))
    looks = [entry for entry in profile.getstats() if re.search(r"\b(l?stat|readlink)\b", str(entry.code))]
    assert len(files) == 300
    assert 300 <= sum(entry.callcount for entry in looks) < 350


def test_a_linked_file_lies_where_its_link_does(tmp_path: Path) -> None:
    """Whether a file is in the output is for its directory to say, file by file or once for all."""
    kept = write_shard(tmp_path / "out" / "kept.parquet", [jpeg(0)])
    blob = write_shard(tmp_path / "blobs" / "b.parquet", [jpeg(0)])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "kept.parquet").symlink_to(kept)
    (tmp_path / "out" / "b.parquet").symlink_to(blob)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    asked = [tmp_path / "in", tmp_path / "link", tmp_path / "out" / "b.parquet", tmp_path / "link" / "*.parquet"]
    assert [file.path for file in listed(*asked, exclude=str(tmp_path / "out"))] == [str(tmp_path / "in/kept.parquet")]


def test_what_exists_is_no_glob(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "in[1]" / "a b[2].parquet", [jpeg(0)])
    (file,) = listed(path)
    assert file.path == str(path)
    assert listed(tmp_path / "in[1]") == [file]
    assert len(list(read_rows(whole(file), {}))) == 1


@pytest.mark.parametrize("asked", ["in/0.parquet", "in/", "in", "", "in/*.parquet", "**/0.parquet"])
def test_found_files_keep_the_urls_host(store: Callable[[bytes], InputFile], tmp_path: Path, asked: str) -> None:
    store(noise(5, tmp_path / "x"))
    (file,) = listed(f"teststore://host/{asked}")
    assert file.path == "teststore://host/in/0.parquet"
    assert len(list(read_rows(whole(file), {}))) == 5


def test_a_stores_cache_is_not_believed(store: Callable[[bytes], InputFile], tmp_path: Path) -> None:
    file = store(noise(5, tmp_path / "x"))
    StoreFS.stamps = {"ETag": "2"}
    assert current_identity(file, {}) == "2"
    StoreFS.stamps = {"ETag": "3"}
    assert [found.input_id for found in listed("teststore://host/in")] == ["3"]


@pytest.mark.parametrize(
    "key", ["blob_id", "generation", "version_id", "updated", "Last-Modified", "modified", "LastModified", "mtime"]
)
def test_identity_uses_whatever_stamp_there_is(store: Callable[[bytes], InputFile], tmp_path: Path, key: str) -> None:
    data = noise(5, tmp_path / "x")
    StoreFS.stamps = {key: "one"}
    before = store(data)
    StoreFS.stamps = {key: "two"}
    assert store(data).input_id != before.input_id


def test_identity_without_a_stamp_is_of_the_footer(store: Callable[[bytes], InputFile], tmp_path: Path) -> None:
    StoreFS.stamps = {}
    data = noise(5, tmp_path / "x")
    before = store(data)
    assert store(data) == before
    assert current_identity(before, {}) == before.input_id
    assert store(data[:-20] + bytes(20)).input_id != before.input_id
    assert len(before.input_id) <= 64


def test_identity_changes_with_the_file_and_only_then(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "00000.parquet", [jpeg(0)])
    (before,) = listed(path)
    assert listed(path) == [before]
    write_shard(path, [jpeg(1)])
    os.utime(path, (1, 1))
    (after,) = listed(path)
    assert after.shard == before.shard
    assert after.input_id != before.input_id


@pytest.mark.parametrize("path", ["nowhere", "nowhere/*.parquet", "empty", "weird://x/y"])
def test_what_is_not_there_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    path = path if "://" in path else str(tmp_path / path)
    begin = time.monotonic()
    with pytest.raises(InputError) as caught:
        listed(path)
    assert path in str(caught.value)
    assert time.monotonic() - begin < 3  # it is not looked for again: that would take 5 s or more


def test_memory_filesystem(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "00000.parquet", [jpeg(i) for i in range(5)])
    fsspec.filesystem("memory").pipe_file("/bucket/00000.parquet", path.read_bytes())
    (file,) = listed("memory://bucket/")
    assert file.path == "memory:///bucket/00000.parquet"
    assert [row.image for row in read_rows(whole(file), {})] == [jpeg(i) for i in range(5)]


# --- recognition ---


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"jpg": pa.binary(), "caption": pa.string(), "url": pa.string(), "key": pa.string()}, ("jpg", "caption")),
        ({"png": pa.binary(), "caption": pa.string()}, ("png", "caption")),
        ({"webp": pa.large_binary(), "caption": pa.large_string()}, ("webp", "caption")),
        ({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "text": pa.string()}, ("image", "text")),
        ({"image": pa.binary(), "caption": pa.dictionary(pa.int32(), pa.string())}, ("image", "caption")),
        ({"image": pa.binary(), "text": pa.null()}, ("image", "text")),
    ],
)
def test_known_layouts(fields: dict[str, pa.DataType], expected: tuple[str, str]) -> None:
    layout = recognise(pa.schema(list(fields.items())), Columns(), "f.parquet")
    assert (layout.image, layout.text) == expected


def test_columns_can_be_named() -> None:
    schema = pa.schema([("a", pa.binary()), ("b", pa.string()), ("jpg", pa.binary()), ("caption", pa.string())])
    layout = recognise(schema, Columns(image="a", text="b"), "f.parquet")
    assert (layout.image, layout.text, layout.url) == ("a", "b", None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"caption": pa.string()}, "no image column"),
        ({"jpg": pa.binary(), "alt": pa.string()}, "no text column"),
        ({"jpg": pa.string(), "caption": pa.string()}, "images are encoded bytes"),
        ({"jpg": pa.binary(), "caption": pa.int64()}, "texts are strings"),
        ({"image": pa.struct({"path": pa.string()}), "text": pa.string()}, "images are encoded bytes"),
    ],
)
def test_unusable_layouts_name_file_and_field(fields: dict[str, pa.DataType], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        recognise(pa.schema(list(fields.items())), Columns(), "f.parquet")
    assert "f.parquet" in str(caught.value)
    assert "input.columns" in str(caught.value)


@pytest.mark.parametrize("name", ["jpg", "caption", "url", "sha256"])
def test_a_chosen_name_that_occurs_twice_is_refused(name: str) -> None:
    fields = {"jpg": pa.binary(), "caption": pa.string(), "url": pa.string(), "sha256": pa.string()}
    schema = pa.schema([*fields.items(), (name, fields[name]), ("other", pa.string()), ("other", pa.string())])
    with pytest.raises(InputError, match=rf"f\.parquet: 2 columns are named {name}"):
        recognise(schema, Columns(), "f.parquet")


# --- cutting ---


@given(st.lists(st.integers(0, 60), max_size=12), st.integers(1, 50), st.data())
def test_cut_covers_the_rows_exactly(groups: list[int], size: int, data: st.DataObject) -> None:
    total = sum(groups)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    ranges = cut(groups, size, start, stop)
    if total == 0:
        assert ranges == [(0, 0)]
        return
    assert [row for a, b in ranges for row in range(a, b)] == list(range(start, stop))
    assert all(0 < b - a <= max(size, -(-max(groups) // 8)) for a, b in ranges)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), st.integers(1, 50))
def test_cut_bounds_how_often_a_row_group_is_decoded(groups: list[int], size: int) -> None:
    """A slice is decoded from its row group's first row on."""
    edges = list(itertools.accumulate(groups, initial=0))
    for first, last in itertools.pairwise(edges):
        stops = [min(b, last) for a, b in cut(groups, size) if a < last and b > first]
        assert len(stops) <= 8
        assert sum(stop - first for stop in stops) <= 4.5 * (last - first)


def test_cut_follows_row_groups() -> None:
    assert cut([100] * 4, 250) == [(0, 200), (200, 400)]
    assert cut([2500], 1000) == [(0, 833), (833, 1666), (1666, 2500)]
    assert cut([100, 2500, 100], 1000) == [(0, 100), (100, 933), (933, 1766), (1766, 2600), (2600, 2700)]
    assert cut([80_000], 1000) == [(n, n + 10_000) for n in range(0, 80_000, 10_000)]
    assert cut([80_000], 1000, 3_000, 24_000) == [(3_000, 10_000), (10_000, 17_000), (17_000, 24_000)]


def test_split_covers_the_fragment(tmp_path: Path) -> None:
    (file,) = listed(write_shard(tmp_path / "0.parquet", [None] * 37))
    parts = whole(file).split(16)
    assert len(parts) == 16
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(37))
    assert all(part.rows == 1 for part in whole(file).split(100))


# --- reading ---


def test_rows_keep_their_order_and_nulls(tmp_path: Path) -> None:
    images = [jpeg(i) if i % 3 else None for i in range(130)]
    texts = [f"t{i}" if i % 4 else None for i in range(130)]
    (file,) = listed(write_shard(tmp_path / "0.parquet", images, texts, row_group=50))
    layout = read_footer(file, Columns(), {}).layout
    for start, stop in [(0, 130), (0, 1), (45, 55), (99, 130), (50, 100)]:
        rows = list(read_rows(Fragment(file, layout, start, stop, 130), {}, batch_rows=7))
        assert [row.row for row in rows] == list(range(start, stop))
        assert [row.image for row in rows] == images[start:stop]
        assert [row.text for row in rows] == texts[start:stop]


def bytes_read() -> int:
    """By this process so far, from the page cache or the disk."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def test_one_large_row_group_is_read_a_few_times_only(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.parquet", [os.urandom(2000) for _ in range(8000)], row_group=8000)
    (file,) = listed(path)
    footer = read_footer(file, Columns(), {})
    before, rows = bytes_read(), 0
    for start, stop in cut(footer.row_groups, 100):
        rows += sum(1 for _ in read_rows(Fragment(file, footer.layout, start, stop, 8000), {}))
    assert rows == 8000
    assert bytes_read() - before < 5.5 * path.stat().st_size  # 4.5 times, and eight buffers of 1 MiB


def test_hugging_face_structs(tmp_path: Path) -> None:
    images = [{"bytes": jpeg(1), "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None]
    table = pa.table({"image": images, "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "0.parquet")
    (file,) = listed(tmp_path)
    rows = list(read_rows(whole(file), {}))
    assert [row.image for row in rows] == [jpeg(1), None, None]
    assert rows[1].note == "only a path is stored: b.jpg"


def test_the_claimed_digest_is_carried(tmp_path: Path) -> None:
    table = pa.table({"jpg": [jpeg(1), None], "caption": ["a", "b"], "sha256": ["c0ffee", None]})
    pq.write_table(table, tmp_path / "0.parquet")
    (file,) = listed(tmp_path)
    assert [row.sha256 for row in read_rows(whole(file), {})] == ["c0ffee", None]


class ClientPayloadError(Exception):
    """A store client's own kind, as aiohttp's, which is no OSError."""


TRANSIENT = [
    FSTimeoutError,
    ConnectionResetError,
    ClientPayloadError,
    lambda text: OSError(5, text),
    lambda text: json.JSONDecodeError(text, "", 0),
]


@pytest.mark.parametrize("error", TRANSIENT)
def test_a_store_that_fails_for_a_while_is_read_again(
    store: Callable[[bytes], InputFile], tmp_path: Path, error: Callable[[str], Exception]
) -> None:
    fragment = whole(store(noise(50, tmp_path / "x")))
    StoreFS.fail = staticmethod(lambda read: error("reset") if read in (1, 2) else None)
    rows = list(read_rows(fragment, {}, pauses=(0, 0)))
    assert [row.row for row in rows] == list(range(50))
    assert all(row.readable for row in rows)
    assert StoreFS.reads > 2


@pytest.mark.parametrize("error", TRANSIENT)
def test_a_store_that_keeps_failing_makes_no_row_unreadable(
    store: Callable[[bytes], InputFile], tmp_path: Path, error: Callable[[str], Exception]
) -> None:
    fragment = whole(store(noise(50, tmp_path / "x")))
    StoreFS.fail = staticmethod(lambda _: error("reset"))
    with pytest.raises(InputError, match=r"teststore://host/in/0\.parquet: cannot be read: .*reset"):
        list(read_rows(fragment, {}, pauses=(0, 0)))
    assert StoreFS.reads == 3


@pytest.mark.parametrize("error", TRANSIENT)
def test_a_footer_is_read_again_where_its_store_fails(
    store: Callable[[bytes], InputFile], tmp_path: Path, error: Callable[[str], Exception]
) -> None:
    file = store(noise(3, tmp_path / "x"))  # so short that its footer lies in its first bytes
    StoreFS.fail = staticmethod(lambda read: error("reset") if read in (1, 2) else None)
    assert read_footer(file, Columns(), {}, pauses=(0, 0)).rows == 3
    assert StoreFS.reads > 2


@pytest.mark.parametrize("error", TRANSIENT)
def test_a_footer_whose_store_keeps_failing_is_named(
    store: Callable[[bytes], InputFile], tmp_path: Path, error: Callable[[str], Exception]
) -> None:
    file = store(noise(3, tmp_path / "x"))
    StoreFS.fail = staticmethod(lambda _: error("reset"))
    with pytest.raises(InputError, match=r"teststore://host/in/0\.parquet: cannot be read: .*reset"):
        read_footer(file, Columns(), {}, pauses=(0, 0))
    assert StoreFS.reads == 3


@pytest.mark.parametrize("fault", ["no Parquet", "no columns", FileNotFoundError, PermissionError])
def test_a_footer_that_no_further_try_can_mend_is_read_once(
    store: Callable[[bytes], InputFile], tmp_path: Path, fault: str | type[Exception]
) -> None:
    pq.write_table(pa.table({"other": [1]}), tmp_path / "x")
    file = store((tmp_path / "x").read_bytes() if fault == "no columns" else b"no Parquet at all")
    if not isinstance(fault, str):
        StoreFS.fail = staticmethod(lambda _: fault("never"))
    with pytest.raises(InputError, match=r"teststore://host/in/0\.parquet"):
        read_footer(file, Columns(), {}, pauses=())
    once = StoreFS.reads
    with pytest.raises(InputError, match=r"teststore://host/in/0\.parquet"):
        read_footer(file, Columns(), {}, pauses=(0, 0))
    assert StoreFS.reads == 2 * once


def pairs(path: Path) -> bytes:
    """A file of a curated dataset's pairs whose pages lie apart from its footer; each image has one text."""
    caption = {"source": "web", "candidate": 0, "text": "a", "scores": []}
    images = [os.urandom(3000) for _ in range(50)]
    table = pa.table({"image": images, "captions": [[caption]] * len(images)})
    pq.write_table(table, path, row_group_size=20, use_dictionary=False)
    return path.read_bytes()


@pytest.mark.parametrize("error", TRANSIENT)
def test_a_datasets_row_group_is_read_again_where_its_store_fails(
    store: Callable[[bytes], InputFile], tmp_path: Path, error: Callable[[str], Exception]
) -> None:
    file = store(pairs(tmp_path / "x"))
    group = Group(0, (Part(0, file.path, 20, row_group=0),), seed=0)
    StoreFS.fail = staticmethod(lambda read: error("reset") if read == 1 else None)
    assert len(read_group(group, [PairSource(dataset="/d")])) == 20
    assert StoreFS.reads > 1


@pytest.mark.parametrize("error", TRANSIENT)
def test_a_file_is_read_as_a_whole_again_where_its_store_fails(
    store: Callable[[bytes], InputFile], tmp_path: Path, error: Callable[[str], Exception]
) -> None:
    file = store(pairs(tmp_path / "x"))

    def first(parquet: pq.ParquetFile) -> int:
        return len(parquet.read_row_group(0)) + len(row_group_rows(parquet))

    StoreFS.fail = staticmethod(lambda read: error("reset") if read <= 2 else None)
    assert read_parquet(file.path, {}, first, pauses=(0, 0)) == 20 + 3
    StoreFS.fail = staticmethod(lambda _: error("reset"))
    with pytest.raises(InputError, match=r"teststore://host/in/0\.parquet: cannot be read: .*reset"):
        read_parquet(file.path, {}, first, pauses=(0, 0))


def test_a_fault_of_ours_comes_as_itself(store: Callable[[bytes], InputFile], tmp_path: Path) -> None:
    file = store(pairs(tmp_path / "x"))
    with pytest.raises(KeyError, match="typo"):
        read_parquet(file.path, {}, lambda parquet: parquet.read()["typo"])


@pytest.mark.parametrize("error", [MemoryError, pa.ArrowMemoryError])
def test_want_of_memory_is_no_fault_of_the_files(
    store: Callable[[bytes], InputFile], tmp_path: Path, error: type[Exception]
) -> None:
    file = store(noise(50, tmp_path / "x"))
    fragment = whole(file)
    StoreFS.fail = staticmethod(lambda _: error("malloc of size 64 failed"))
    with pytest.raises(error):
        list(read_rows(fragment, {}, pauses=(0, 0)))
    with pytest.raises(error):
        read_footer(store(noise(3, tmp_path / "y")), Columns(), {}, pauses=(0, 0))


def test_a_corrupt_page_of_a_store_that_answers_is_unreadable(
    store: Callable[[bytes], InputFile], tmp_path: Path
) -> None:
    data = bytearray(noise(50, tmp_path / "x"))
    at = pq.ParquetFile(tmp_path / "x").metadata.row_group(0).column(3).data_page_offset
    data[at : at + 40] = b"\xff" * 40
    rows = list(read_rows(whole(store(bytes(data))), {}, pauses=(0, 0)))
    assert [row.readable for row in rows] == [False] * 20 + [True] * 30


def test_a_file_shorter_than_the_fragment_is_refused(tmp_path: Path) -> None:
    (file,) = listed(write_shard(tmp_path / "0.parquet", [jpeg(0)] * 5))
    fragment = Fragment(file, whole(file).layout, 0, 10, 10)
    with pytest.raises(InputError, match="fewer rows"):
        list(read_rows(fragment, {}))


def test_a_file_replaced_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.parquet", [os.urandom(3000) for _ in range(90)])
    rows = read_rows(whole(listed(path)[0]), {})
    next(rows)
    os.utime(path, (1, 1))
    with pytest.raises(InputError, match="changed during the run"):
        list(rows)


def test_a_file_replaced_before_a_store_is_asked_again_is_not_mixed_in(
    store: Callable[[bytes], InputFile], tmp_path: Path
) -> None:
    fragment = whole(store(noise(50, tmp_path / "x")))

    def replaced(_: int) -> Exception:
        StoreFS.stamps = {"ETag": "2"}
        return ConnectionResetError("reset")

    StoreFS.fail = staticmethod(replaced)
    with pytest.raises(InputError, match="changed during the run"):
        list(read_rows(fragment, {}, pauses=(0, 0)))
    assert StoreFS.reads == 1


def test_broken_utf8_is_replaced(tmp_path: Path) -> None:
    text = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\3\0\0\0\5\0\0\0"), pa.py_buffer(b"a\xffbok"))
    pq.write_table(pa.table({"image": pa.array([b"x", b"y"]), "text": text}), tmp_path / "0.parquet")
    (file,) = listed(tmp_path)
    assert [row.text for row in read_rows(whole(file), {})] == ["a\N{REPLACEMENT CHARACTER}b", "ok"]


def test_a_file_changed_since_listing_is_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.parquet", [jpeg(0)] * 3)
    (file,) = listed(path)
    fragment = whole(file)
    write_shard(path, [jpeg(1)] * 4)
    with pytest.raises(InputError, match="changed during the run"):
        list(read_rows(fragment, {}))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "magic"])
def test_a_file_that_is_not_parquet_is_named(tmp_path: Path, damage: str) -> None:
    path = write_shard(tmp_path / "0.parquet", [jpeg(0)] * 3)
    data = path.read_bytes()
    broken = {"truncated": data[: len(data) // 2], "empty": b"", "text": b"hello", "magic": b"PAR1" * 3}
    path.write_bytes(broken[damage])
    (file,) = listed(path)
    with pytest.raises(InputError, match=r"0\.parquet: not readable as Parquet"):
        read_footer(file, Columns(), {})


def test_a_corrupt_page_costs_the_rest_of_its_row_group(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    table = pa.table({"image": [os.urandom(500) for _ in range(90)], "text": ["t"] * 90})
    pq.write_table(table, path, row_group_size=30, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    (file,) = listed(path)
    rows = list(read_rows(whole(file), {}))
    assert [row.row for row in rows] == list(range(90))
    assert [row.readable for row in rows] == [True] * 30 + [False] * 30 + [True] * 30
    assert "cannot be decoded" in (rows[30].note or "")


# --- writing ---


def pair(row: int, image: bytes) -> dict[str, Any]:
    return dict.fromkeys(FILE_SCHEMAS[PAIRS].names) | {"row": row, "image": image}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_abandoned_file_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out" / "0.parquet"
    writer = ParquetWriter(PAIRS, str(path), {})
    for row in range(3):
        writer.append(pair(row, bytes(5 * 2**20)), 5 * 2**20)
    path.unlink()  # that it is gone already is no error to hear of
    writer.abandon()
    del writer
    gc.collect()
    assert not path.exists()


# --- footers that lie (found by tests/test_fuzz.py) ---


def claiming(rows: int, which: slice) -> bytes:
    """A shard of 25 rows whose footer has `rows` in place of some of its numbers of rows and of values."""
    out = io.BytesIO()
    pq.write_table(pa.table({"jpg": [b"xyz"] * 25, "caption": ["no"] * 25}), out)
    data = out.getvalue()
    length = int.from_bytes(data[-8:-4], "little")
    footer, number = data[-8 - length : -8], bytearray()
    rows *= 2  # zigzag
    while rows > 0x7F:
        number.append(rows & 0x7F | 0x80)
        rows >>= 7
    honest = b"\x16\x32"  # Thrift's compact protocol: the next field, an i64; 25
    parts = footer.split(honest)
    kinds = [honest] * (len(parts) - 1)
    assert len(kinds) == 4  # of the file, of its row group, values of two columns
    kinds[which] = [b"\x16" + number + bytes([rows])] * len(kinds[which])
    footer = b"".join(part + kind for part, kind in zip(parts, [*kinds, b""], strict=True))
    return data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("rows", [24, 26, 2**40])
def test_one_number_of_rows_that_lies_makes_no_rows(rows: int, place: int, tmp_path: Path) -> None:
    """Rows that are not there would be unreadable ones, a trillion of them."""
    (tmp_path / "0.parquet").write_bytes(claiming(rows, slice(place, place + 1)))
    (file,) = listed(tmp_path)
    try:
        footer = read_footer(file, Columns(), {})
    except InputError as error:
        assert "the footer says" in str(error)  # noqa: PT017  (either will do)
    else:
        assert footer.rows == 25
        assert [row.text for row in read_rows(whole(file), {})] == ["no"] * 25


def test_a_file_of_a_trillion_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.parquet").write_bytes(claiming(2**40, slice(None)))
    (file,) = listed(tmp_path)
    with pytest.raises(InputError, match=r"0.parquet: claims 1,099,511,627,776 rows in"):
        read_footer(file, Columns(), {})


def test_a_file_of_nulls_is_not_refused(tmp_path: Path) -> None:
    columns = {"jpg": pa.nulls(200_000, pa.binary()), "caption": pa.nulls(200_000, pa.string())}
    pq.write_table(pa.table(columns), tmp_path / "0.parquet", compression="zstd")
    (file,) = listed(tmp_path)
    assert read_footer(file, Columns(), {}).rows == 200_000
