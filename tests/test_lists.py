"""URL lists: the same rows whatever the format, and what is wrong is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from capfilt.errors import InputError
from capfilt.lists import columns_of, find_lists, read_list
from capfilt.spec import UrlList

URLS = ["http://a.example/1.jpg", "http://a.example/2.jpg", None, "http://b.example/ü?x=1,2", "http://a.example/1.jpg"]
TEXTS = ["plain", None, "no url", 'with "quotes", a comma\tand a tab', "über 🖼\nsecond line"]
SIMILARITY = ["0.3", "0.25", None, "1e-3", "0"]


def write(directory: Path, name: str, urls: list[Any] = URLS, texts: list[Any] = TEXTS) -> Path:
    path = directory / name
    directory.mkdir(exist_ok=True)
    rows = list(zip(urls, texts, SIMILARITY, strict=False))
    if name.endswith(".parquet"):
        pq.write_table(pa.table(dict(zip(("URL", "TEXT", "similarity"), zip(*rows, strict=True), strict=True))), path)
        return path
    if name.removesuffix(".gz").endswith(".jsonl"):
        lines = [json.dumps({"URL": u, "TEXT": t, "similarity": s}, ensure_ascii=False) + "\n" for u, t, s in rows]
        data = "\n".join(lines).encode()  # empty lines between
    else:
        mark = "\t" if ".tsv" in name else ","
        quoted = [mark.join("" if one is None else '"' + one.replace('"', '""') + '"' for one in row) for row in rows]
        data = "\n".join([mark.join(("URL", "TEXT", "similarity")), *quoted, ""]).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def rows(*paths: Path, **fields: Any) -> list[dict[str, Any]]:
    source = UrlList(paths=tuple(map(str, paths)), **fields)
    tables = (table for file in find_lists(source) for table in read_list(file, source, "sha256"))
    return [row for table in tables for row in table.to_pylist()]


@pytest.mark.parametrize("name", ["l.parquet", "l.csv", "l.tsv", "l.jsonl", "l.csv.gz", "l.jsonl.gz"])
def test_rows_are_the_same_whatever_the_format(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    expected = [{"similarity": s, "caption": t, "url": u} for u, t, s in zip(URLS, TEXTS, SIMILARITY, strict=True)]
    assert rows(path, save_additional_columns=("similarity",)) == expected
    assert rows(path) == [{"caption": row["caption"], "url": row["url"]} for row in expected]


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    kinds = pa.schema([("url", pa.large_string()), ("score", pa.float32()), ("tags", pa.list_(pa.string()))])
    table = pa.table({"url": ["a"], "score": [0.5], "tags": [["x", "y"]]}, schema=kinds)
    pq.write_table(table, tmp_path / "l.parquet")
    source = UrlList(paths=(str(tmp_path),), save_additional_columns=("tags", "score"))
    (read,) = read_list(find_lists(source)[0], source, None)
    texts = [pa.field(name, pa.string()) for name in ("caption", "url")]
    assert read.schema == pa.schema([kinds.field("tags"), kinds.field("score"), *texts])
    assert read["caption"].to_pylist() == [None]


def test_json_lines_keep_what_is_no_string_as_json(tmp_path: Path) -> None:
    lines = [{"url": "a"}, {"url": "b", "caption": 7, "more": {"x": [1, None]}}, {"caption": "half \ud83d"}]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert rows(tmp_path, save_additional_columns=("more",)) == [
        {"more": None, "caption": None, "url": "a"},
        {"more": '{"x": [1, null]}', "caption": "7", "url": "b"},
        {"more": None, "caption": "half �", "url": None},
    ]


def test_a_hash_to_verify_goes_under_its_kind(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("url,checksum\nu,abc\n")
    assert rows(tmp_path, verify_hash_col="checksum") == [{"caption": None, "sha256": "abc", "url": "u"}]


def test_what_is_found(tmp_path: Path) -> None:
    for name in ("b.csv", "a.parquet", "_hidden.csv", ".also.csv", "notes.txt", "c.jsonl.gz"):
        write(tmp_path / "in", name) if name != "notes.txt" else (tmp_path / "in" / name).write_text("x")
    write(tmp_path / "in" / "deep", "d.tsv")
    names = [Path(file.path).name for file in find_lists(UrlList(paths=(str(tmp_path / "in"),)))]
    assert names == ["a.parquet", "b.csv", "c.jsonl.gz", "d.tsv"]
    globbed = find_lists(UrlList(paths=(str(tmp_path / "in" / "*.csv"), str(tmp_path / "in" / "b.csv"))))
    assert [Path(file.path).name for file in globbed] == [".also.csv", "_hidden.csv", "b.csv"]  # who asks gets
    (odd,) = find_lists(UrlList(paths=(str(tmp_path / "in" / "notes.txt"),), format="csv"))
    assert odd.format == "csv"


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        (
            "l.csv",
            "link,text\nu,t\n",
            {},
            r"l\.csv: no column url, URL, image_url; it has link, text. .* urls\.url_col",
        ),
        ("l.csv", "url\nu\n", {"caption_col": "alt"}, r"no column alt; it has url. Name it with urls\.caption_col"),
        ("l.csv", "url\nu\n", {"save_additional_columns": ("x",)}, r"no column x; .* urls\.save_additional_columns"),
        ("l.csv", "url,url\nu,v\n", {}, r"2 columns are named url"),
        ("l.csv", "", {}, r"l\.csv: holds no line; take it out"),
        ("l.csv", "url,text\nu,t\nu,t,more\n", {}, r"l\.csv: line 3 has 3 fields, and its header 2; mend that line"),
        ("l.csv", b"url\n\xff\xfe\n", {}, r"l\.csv: line 2 is not UTF-8: .*0xff.*; write the list in UTF-8"),
        (
            "l.tsv",
            "a bus station\thttp://a/1\n",
            {},
            r"l\.tsv: has no header: its line 1 holds http://a/1\. Name its 2 columns in order with urls\.column_names",
        ),
        ("l.tsv", "a\thttp://a/1\n", {"column_names": ("text", "url", "x")}, r"2 fields, and urls\.column_names 3"),
        (
            "l.tsv",
            "a\thttp://a/1\n",
            {"column_names": ("url", "text")},
            r"in line 1 column text holds a URL, and url does not; name the columns in their order",
        ),
        ("l.tsv", "text\tURL\n", {"column_names": ("text", "url")}, r"line 1 is a header; take out urls\.column_names"),
        ("l.jsonl", '{"url": "u"}\n', {"column_names": ("url",)}, r"l\.jsonl: urls\.column_names is for CSV and TSV"),
        ("l.csv.gz", "url\nu\n", {}, r"l\.csv\.gz: not readable as csv: BadGzipFile"),
        ("l.jsonl", '{"url": "u"}\n{"url": \n', {}, r"l\.jsonl: line 2 is not JSON"),
        ("l.jsonl", '["u"]\n', {}, r"l\.jsonl: line 1 is not an object"),
        ("l.jsonl", "\n", {}, r"l\.jsonl: holds no line"),
        ("l.parquet", "no parquet", {}, r"l\.parquet: not readable as parquet: "),
        ("l.txt", "u\n", {}, r"l\.txt: its name does not end in .* urls\.format"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: Any, fields: dict[str, Any], message: str) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        rows(tmp_path / name, **fields)


def test_a_url_column_is_of_strings(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [1, 2]}), tmp_path / "l.parquet")
    source = UrlList(paths=(str(tmp_path),))
    with pytest.raises(InputError, match=r"l\.parquet: column url is int64; it must be of strings"):
        columns_of(find_lists(source)[0], source)


@pytest.mark.parametrize("name", ["l.tsv", "l.csv"])
def test_a_list_without_header_has_its_columns_named(tmp_path: Path, name: str) -> None:
    """Conceptual Captions' lists have none."""
    mark = "\t" if name == "l.tsv" else ","
    (tmp_path / name).write_text(f"a bus station{mark}http://a/1\nanother{mark}http://a/2\n")
    assert rows(tmp_path, column_names=("caption", "url")) == [
        {"caption": "a bus station", "url": "http://a/1"},
        {"caption": "another", "url": "http://a/2"},
    ]
    assert rows(tmp_path, column_names=("caption", "link"), url_col="link")[1]["url"] == "http://a/2"


def test_columns_named_twice_are_refused() -> None:
    with pytest.raises(ValidationError, match="named twice: url"):
        UrlList(paths=("l.tsv",), column_names=("url", "url"))


@pytest.mark.parametrize("path", ["nowhere", "nowhere/*.csv", "empty"])
def test_nothing_there_is_an_error(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no URL list there; urls\.paths takes Parquet, CSV, TSV and JSONL"):
        find_lists(UrlList(paths=(str(tmp_path / path),)))


def test_lists_lie_in_object_stores(s3: Any) -> None:
    s3.files().pipe_file("data/lists/l.csv", b"url,caption\nu,c\n")
    source = UrlList(paths=("s3://data/lists",), storage_options=s3.options)
    (file,) = find_lists(source)
    assert file.path == "s3://data/lists/l.csv"
    assert [table.to_pylist() for table in read_list(file, source, None)] == [[{"caption": "c", "url": "u"}]]
