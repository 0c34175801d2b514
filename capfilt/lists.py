"""URL lists: found, recognised and read in order, a batch at a time."""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.delimited import URL, cut_rows
from capfilt.errors import InputError
from capfilt.fragments import TEXT_COLUMNS, URL_COLUMNS
from capfilt.spec import UrlList
from capfilt.stores import connect, one_line, persist

_BATCH = 4096
_NAME = re.compile(r"\.(parquet|csv|tsv|jsonl|ndjson)(?:\.(?:gz|bz2|xz|zst))?$", re.IGNORECASE)


@dataclass(frozen=True)
class ListFile:
    """One file of a URL list.

    Attributes:
        path: absolute local path or URL.
        format: parquet, csv, tsv or jsonl.
    """

    path: str
    format: str


# --- finding ---


def find_lists(source: UrlList) -> list[ListFile]:
    """The files of a URL list, sorted by path, each once.

    Directories are searched at any depth for names that say a format; names that begin with `_` or `.` are left out.

    Raises:
        InputError: a path is not there, matches nothing, cannot be listed, or does not say its format.
    """
    found: dict[str, ListFile] = {}
    for path in source.paths:
        try:
            names = persist(lambda path=path: _look(path, source.storage_options))  # type: ignore[misc]
        except FileNotFoundError:
            names = []
        except Exception as error:  # every store raises its own kinds
            raise InputError(f"{path}: cannot be listed: {one_line(error)}") from error
        if not names:
            raise InputError(f"{path}: no URL list there; urls.paths takes Parquet, CSV, TSV and JSONL files")
        for name in names:
            found[name] = ListFile(name, source.format or _format(name))
    return [found[name] for name in sorted(found)]


def _look(path: str, options: Mapping[str, Any]) -> list[str]:
    fs, root = connect(path, options)
    fs.invalidate_cache()
    if fs.isdir(root):
        below = ((name, name.removeprefix(root.rstrip("/"))) for name in fs.find(root))
        names = [name for name, rest in below if _NAME.search(rest) and not re.search(r"/[._]", rest)]
    elif glob.has_magic(path) and not fs.exists(root):
        names = [name for name in fs.glob(root) if not fs.isdir(name)]
    else:
        names = [root] if fs.exists(root) else []
    return [fs.unstrip_protocol(name) if "://" in path else name for name in names]


def _format(path: str) -> str:
    if said := _NAME.search(path):
        kind = said[1].lower()
        return "jsonl" if kind == "ndjson" else kind
    raise InputError(
        f"{path}: its name does not end in .parquet, .csv, .tsv or .jsonl; say what it is with urls.format"
    )


# --- reading ---


@dataclass(frozen=True)
class Columns:
    """Columns of a list by what they are, in the list's own names."""

    url: str
    caption: str | None
    verify: str | None
    saved: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(name for name in (*self.saved, self.caption, self.verify, self.url) if name))


def read_list(file: ListFile, source: UrlList, hash_kind: str | None) -> Iterator[pa.Table]:
    """The rows of a list in order, in tables of the columns that img2dataset wants: those saved, `caption`, the hash
    to verify under its kind's name, and `url`.

    Every row comes, null URLs too: what cannot be fetched is a failure on record. A list without captions has nulls.

    Args:
        hash_kind: of urls.verify_hash_col.

    Raises:
        InputError: a column is not there or not of strings; the file cannot be read, or a line of it not be parsed.
    """
    with _blamed(file), closing(_READERS[file.format](file, source)) as tables:
        for columns, table in tables:
            if table.num_rows:
                yield _named(table, columns, hash_kind)


def columns_of(file: ListFile, source: UrlList) -> Columns:
    """The columns of a list, by a look at its beginning.

    Raises:
        InputError: as :func:`read_list`.
    """
    with _blamed(file), closing(_READERS[file.format](file, source)) as tables:
        return next(tables)[0]


@contextmanager
def _blamed(file: ListFile) -> Iterator[None]:
    try:
        yield
    except (InputError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{file.path}: no such file; it was listed a moment ago: run again") from None
    except Exception as error:  # every store raises its own kinds
        raise InputError(
            f"{file.path}: not readable as {file.format}: {one_line(error)}; mend it, or say what it is with "
            "urls.format"
        ) from error


Tables = Generator[tuple[Columns, pa.Table], None, None]
"""Of a file's own column names; the first comes at once, if need be without rows."""


def _recognised(file: ListFile, source: UrlList, names: Sequence[str]) -> Columns:
    def pick(field: str, wanted: str | None, known: Iterable[str], needed: bool) -> str | None:
        for name in [wanted] if wanted is not None else known:
            if name in names:
                if names.count(name) > 1:
                    raise InputError(f"{file.path}: {names.count(name)} columns are named {name}; rename all but one")
                return name
        if wanted is None and not needed:
            return None
        looked = wanted or ", ".join(known)
        if text and (found := [name for name in names if URL.match(name)]):
            raise InputError(
                f"{file.path}: has no header: its line 1 holds {found[0]}. Name its {len(names)} columns in order with "
                "urls.column_names, as [caption, url]"
            )
        raise InputError(f"{file.path}: no column {looked}; it has {', '.join(names)}. Name it with urls.{field}")

    text = file.format in ("csv", "tsv")
    if source.column_names and not text:
        raise InputError(
            f"{file.path}: urls.column_names is for CSV and TSV without a header, and {file.format} names its columns "
            "itself; leave it out, or give these lists a spec and an output of their own"
        )
    url = pick("url_col", source.url_col, URL_COLUMNS, True)
    assert url is not None
    saved = tuple(str(pick("save_additional_columns", name, (), True)) for name in source.save_additional_columns)
    caption = pick("caption_col", source.caption_col, TEXT_COLUMNS, False)
    verify = source.verify_hash_col and pick("verify_hash_col", source.verify_hash_col, (), True)
    return Columns(url, caption, verify, saved)


def _named(table: pa.Table, columns: Columns, hash_kind: str | None) -> pa.Table:
    arrays = {name: table[name] for name in columns.saved}
    text = table[columns.caption] if columns.caption is not None else pa.nulls(table.num_rows)
    arrays["caption"] = text.cast(pa.string())
    if columns.verify is not None and hash_kind is not None:
        arrays[hash_kind] = table[columns.verify].cast(pa.string())
    arrays["url"] = table[columns.url].cast(pa.string())
    return pa.table(arrays)


def _parquet(file: ListFile, source: UrlList) -> Tables:
    fs, name = connect(file.path, source.storage_options)
    with fs.open(name, "rb") as opened, pq.ParquetFile(opened) as parquet:
        columns = _recognised(file, source, parquet.schema_arrow.names)
        for wanted in filter(None, (columns.url, columns.caption, columns.verify)):
            kind = parquet.schema_arrow.field(wanted).type
            if not _is_text(kind):
                raise InputError(
                    f"{file.path}: column {wanted} is {kind}; it must be of strings: write it so, or name another"
                )
        yield columns, parquet.schema_arrow.empty_table()
        for batch in parquet.iter_batches(_BATCH, columns=columns.all):
            yield columns, pa.Table.from_batches([batch])


def _is_text(kind: pa.DataType) -> bool:
    """Whether values are strings; or there are none."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(check(kind) for check in checks)


def _csv(file: ListFile, source: UrlList) -> Tables:
    """Every column as strings, an empty field as null."""
    with _text(file, source) as opened:
        rows = cut_rows(file.path, opened, "\t" if file.format == "tsv" else ",", source.column_names)
        first = next(rows, None)
        if first is None:
            raise InputError(f"{file.path}: holds no line; take it out of urls.paths")
        names = list(source.column_names or first)
        columns = _recognised(file, source, names)
        if source.column_names:
            _check_named(file, columns.url, dict(zip(names, first, strict=True)))
            rows = itertools.chain([first], rows)
        places = {name: names.index(name) for name in columns.all}
        yield columns, _texts([], places)
        while batch := list(itertools.islice(rows, _BATCH)):
            yield columns, _texts(batch, places)


def _check_named(file: ListFile, url: str, first: Mapping[str, str]) -> None:
    """Refuse columns' names that the first row shows to be wrong."""
    if first[url] in (url, *URL_COLUMNS):
        raise InputError(f"{file.path}: line 1 is a header; take out urls.column_names")
    others = [name for name, value in first.items() if URL.match(value)]
    if first[url] and others and url not in others:
        raise InputError(
            f"{file.path}: in line 1 column {others[0]} holds a URL, and {url} does not; name the columns in their "
            "order with urls.column_names"
        )


def _texts(rows: Sequence[Sequence[str]], places: Mapping[str, int]) -> pa.Table:
    return pa.table({name: pa.array([row[at] or None for row in rows], pa.string()) for name, at in places.items()})


def _jsonl(file: ListFile, source: UrlList) -> Tables:
    """An object a line, empty lines left out; values that are not strings as their JSON."""
    with _text(file, source) as opened:
        objects = (_object(file, number, line) for number, line in enumerate(opened, 1) if line.strip())
        rows = list(itertools.islice(objects, _BATCH))
        if not rows:
            raise InputError(f"{file.path}: holds no line; take it out of urls.paths")
        columns = _recognised(file, source, list(dict.fromkeys(name for row in rows for name in row)))
        while rows:
            yield columns, _strings(rows, columns)
            rows = list(itertools.islice(objects, _BATCH))


def _object(file: ListFile, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{file.path}: line {number:,} is not JSON: {error}; mend that line") from None
    if not isinstance(row, dict):
        raise InputError(
            f'{file.path}: line {number:,} is not an object, as {{"url": ..., "caption": ...}}; mend that line'
        )
    return row


def _strings(rows: Sequence[Mapping[str, Any]], columns: Columns) -> pa.Table:
    def text(value: Any) -> str | None:
        if value is None:
            return None
        said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return re.sub("[\ud800-\udfff]", "\ufffd", said)  # JSON can hold halves of characters, and Arrow cannot

    return pa.table({name: pa.array([text(row.get(name)) for row in rows], pa.string()) for name in columns.all})


def _text(file: ListFile, source: UrlList) -> Any:
    fs, name = connect(file.path, source.storage_options)
    return fsspec.core.OpenFile(fs, name, "rb", compression=fsspec.utils.infer_compression(name))


_READERS = {"parquet": _parquet, "csv": _csv, "tsv": _csv, "jsonl": _jsonl}
