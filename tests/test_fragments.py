"""Inputs: what is listed, recognised, cut and read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import jpeg, write_shard
from hypothesis import given
from hypothesis import strategies as st

from capfilt.errors import InputError
from capfilt.fragments import Fragment, InputFile, cut, list_inputs, read_footer, read_rows, recognise
from capfilt.spec import Columns, Input


def listed(*paths: Path | str, **options: Any) -> list[InputFile]:
    return list_inputs(Input(paths=tuple(str(path) for path in paths)), **options)


def whole(file: InputFile) -> Fragment:
    footer = read_footer(file, Columns(), {})
    return Fragment(file, footer.layout, 0, footer.rows, footer.rows)


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
    with pytest.raises(InputError) as caught:
        listed(path)
    assert path in str(caught.value)


def test_memory_filesystem(tmp_path: Path) -> None:
    import fsspec

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
    assert all(0 < b - a <= size for a, b in ranges)


def test_cut_follows_row_groups() -> None:
    assert cut([100] * 4, 250) == [(0, 200), (200, 400)]
    assert cut([2500], 1000) == [(0, 833), (833, 1666), (1666, 2500)]
    assert cut([100, 2500, 100], 1000) == [(0, 100), (100, 933), (933, 1766), (1766, 2600), (2600, 2700)]


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


def test_hugging_face_structs(tmp_path: Path) -> None:
    images = [{"bytes": jpeg(1), "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None]
    table = pa.table({"image": images, "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "0.parquet")
    (file,) = listed(tmp_path)
    rows = list(read_rows(whole(file), {}))
    assert [row.image for row in rows] == [jpeg(1), None, None]
    assert rows[1].note == "only a path is stored: b.jpg"


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
