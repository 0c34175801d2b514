"""List inputs, read fragments, write Parquet: the one module that touches the inputs' storage, on any fsspec URL.

A fragment is a run of rows of one input file, the unit of work and of what a crash can cost. It follows row groups
where they are small and slices those that are large, without reading the whole file.
"""

from __future__ import annotations

import datetime
import glob
import hashlib
import itertools
import os
import posixpath
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.errors import InputError
from capfilt.schema import FILE_SCHEMAS
from capfilt.spec import Columns, Input

IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "image_bytes", "bytes")
TEXT_COLUMNS = ("caption", "text", "txt", "TEXT", "alt_text")
URL_COLUMNS = ("url", "URL", "image_url")
KEY_COLUMNS = ("key", "__key__", "id", "uid")
STATUS_COLUMNS = ("status",)
ERROR_COLUMNS = ("error_message",)

_REREADS = 3  # a page that fails to decode so many times in a row is corrupt, not unlucky
_REMOTE_BUFFER = 8 * 2**20


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file, and so one shard.

    Attributes:
        path: absolute local path or URL.
        shard: name of the shard: the file's stem and a hash of `path`, of [A-Za-z0-9._-]; unique among inputs.
        input_id: content identity from the listing: the store's ETag where it has one, else size and modification time.
        size: bytes.
    """

    path: str
    shard: str
    input_id: str
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Which input column plays which part; None where the file has none."""

    image: str
    text: str
    url: str | None
    key: str | None
    status: str | None
    error: str | None

    @property
    def columns(self) -> list[str]:
        """The columns to read."""
        names = (self.image, self.text, self.url, self.key, self.status, self.error)
        return list(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True, slots=True)
class Footer:
    """What a Parquet footer says: the layout, and the row groups' sizes in rows."""

    layout: Layout
    row_groups: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return sum(self.row_groups)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Rows [start, stop) of one input file of `file_rows` rows."""

    file: InputFile
    layout: Layout
    start: int
    stop: int
    file_rows: int

    @property
    def rows(self) -> int:
        """Rows of the fragment."""
        return self.stop - self.start

    @property
    def name(self) -> str:
        """Unique within a run."""
        return f"{self.file.shard}/{self.start:09d}-{self.stop:09d}"

    def split(self, parts: int) -> list[Fragment]:
        """At most `parts` fragments of nearly equal size that make up this one."""
        parts = min(parts, self.rows)
        cuts = [self.start + self.rows * i // parts for i in range(parts + 1)]
        return [Fragment(self.file, self.layout, a, b, self.file_rows) for a, b in itertools.pairwise(cuts)]


@dataclass(frozen=True, slots=True)
class Row:
    """One input row as read.

    Attributes:
        row: position in the file, from 0.
        image: encoded bytes, or None for a null image.
        text: web text, or None; undecodable UTF-8 is replaced.
        note: why there is no image, where the file says so (img2dataset's status and error).
        readable: False where the file's pages holding this row cannot be decoded; then all else is None.
    """

    row: int
    image: bytes | None = None
    text: str | None = None
    url: str | None = None
    key: str | None = None
    note: str | None = None
    readable: bool = True


# --- listing ---


def list_inputs(spec: Input, exclude: str | None = None) -> list[InputFile]:
    """List the input files, sorted by path, each once.

    Directories are searched for `*.parquet` at any depth; names that begin with `_` or `.` are left out, as every
    Parquet reader does. Nothing is read.

    Args:
        exclude: a directory whose files are no inputs (the output, should it lie inside an input directory).

    Raises:
        InputError: a path does not exist, matches nothing, or cannot be listed.
    """
    found: dict[str, InputFile] = {}
    for path in spec.paths:
        files = _list_path(path, spec.storage_options)
        if not files:
            raise InputError(f"{path}: no Parquet file there; input.paths takes files, globs and directories")
        found.update(files)
    if exclude is not None:
        prefix = exclude.rstrip("/") + "/"
        found = {path: file for path, file in found.items() if not path.startswith(prefix)}
    return [found[path] for path in sorted(found)]


def _list_path(path: str, options: Mapping[str, Any]) -> dict[str, InputFile]:
    try:
        fs, root = fsspec.core.url_to_fs(path, **options)
        if glob.has_magic(path):
            infos = [info for info in fs.glob(root, detail=True).values() if info["type"] == "file"]
        elif fs.isdir(root):
            infos = [
                info
                for name, info in fs.find(root, detail=True).items()
                if name.endswith(".parquet") and not re.search(r"/[._]", name.removeprefix(root.rstrip("/")))
            ]
        else:
            infos = [fs.info(root)]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or directory") from None
    except Exception as error:  # every store raises its own kinds
        raise InputError(f"{path}: cannot be listed: {type(error).__name__}: {error}") from error
    files = (_input_file(fs, info) for info in infos)
    return {file.path: file for file in files}


def _input_file(fs: Any, info: Mapping[str, Any]) -> InputFile:
    name = info["name"]
    path = name if _is_local(fs) else fs.unstrip_protocol(name)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", posixpath.basename(name).removesuffix(".parquet"))[:60]
    digest = hashlib.blake2b(path.encode(), digest_size=8).hexdigest()
    return InputFile(path, f"{stem}-{digest}", _identity(info), int(info["size"] or 0))


def _identity(info: Mapping[str, Any]) -> str:
    """Content identity of a listed file, at most 64 characters."""
    for tag in ("ETag", "etag", "md5Hash"):
        if info.get(tag):
            return str(info[tag]).strip('"')[:64]
    stamp = info.get("mtime") or info.get("LastModified") or info.get("last_modified") or info.get("created")
    if isinstance(stamp, datetime.datetime):  # a listing and a look at one file may differ in form
        stamp = stamp.timestamp()
    moment = f"{stamp:.6f}" if isinstance(stamp, float) else str(stamp)
    return f"{info['size']}-{moment}"[:64]


def _is_local(fs: Any) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


# --- footers and splitting ---


def read_footer(file: InputFile, columns: Columns, options: Mapping[str, Any]) -> Footer:
    """Read one footer.

    Raises:
        InputError: the file is not Parquet, is truncated, or lacks a usable column; the message names the file.
    """
    with _opened(file.path, options) as parquet:
        layout = recognise(parquet.schema_arrow, columns, file.path)
        meta = parquet.metadata
        return Footer(layout, tuple(meta.row_group(i).num_rows for i in range(meta.num_row_groups)))


def recognise(schema: pa.Schema, columns: Columns, path: str) -> Layout:
    """Find the columns: those the spec names, else img2dataset's, Hugging Face's and the plain names.

    Raises:
        InputError: no image or text column, or one of an unusable type; says what the file has.
    """
    layout = Layout(
        image=_pick(schema, columns.image, IMAGE_COLUMNS, "image", path) or "",
        text=_pick(schema, columns.text, TEXT_COLUMNS, "text", path) or "",
        url=_pick(schema, columns.url, URL_COLUMNS, "url", path, optional=True),
        key=_pick(schema, columns.key, KEY_COLUMNS, "key", path, optional=True),
        status=_pick(schema, None, STATUS_COLUMNS, "status", path, optional=True),
        error=_pick(schema, None, ERROR_COLUMNS, "error", path, optional=True),
    )
    image_type, text_type = schema.field(layout.image).type, schema.field(layout.text).type
    if pa.types.is_struct(image_type):
        inner = image_type.get_field_index("bytes")
        image_type = image_type.field(inner).type if inner >= 0 else image_type
    if not (_is_binary(image_type) or pa.types.is_null(image_type)):
        raise InputError(
            f"{path}: column {layout.image} is {schema.field(layout.image).type}; images are encoded bytes "
            "(binary, or a struct with a binary field `bytes`). Name another with input.columns.image"
        )
    if not (_is_string(text_type) or pa.types.is_null(text_type)):
        raise InputError(
            f"{path}: column {layout.text} is {text_type}; texts are strings. Name another with input.columns.text"
        )
    return layout


def _pick(
    schema: pa.Schema, wanted: str | None, known: Sequence[str], role: str, path: str, *, optional: bool = False
) -> str | None:
    names = (wanted,) if wanted is not None else known
    for name in names:
        if name in schema.names:
            return name
    if optional and wanted is None:
        return None
    raise InputError(
        f"{path}: no {role} column ({', '.join(names)}); the file has {', '.join(schema.names)}. "
        f"Name it with input.columns.{role}"
    )


def _is_binary(kind: pa.DataType) -> bool:
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(check(kind) for check in checks)


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in checks)


def cut(
    row_groups: Sequence[int], fragment_rows: int, start: int = 0, stop: int | None = None
) -> list[tuple[int, int]]:
    """Cut rows [start, stop) into ranges of at most `fragment_rows`, along row groups where they allow.

    Small row groups are joined, large ones sliced; no range holds rows of a large one and of another.

    Returns:
        Non-empty ranges in order that cover [start, stop) exactly; `[(0, 0)]` for a file of no rows.
    """
    total = sum(row_groups)
    stop = total if stop is None else stop
    if total == 0:
        return [(0, 0)]
    ranges: list[tuple[int, int]] = []
    begin = end = start  # the range being grown
    group_start = 0
    for rows in row_groups:
        a, b = max(start, group_start), min(stop, group_start + rows)
        group_start += rows
        if a >= b:
            continue
        if b - begin > fragment_rows and end > begin:
            ranges.append((begin, end))
            begin = a
        pieces = -(-(b - begin) // fragment_rows)
        cuts = [begin + (b - begin) * i // pieces for i in range(pieces + 1)]
        ranges += list(itertools.pairwise(cuts[:-1]))
        begin, end = cuts[-2], b
        if pieces > 1:
            ranges.append((begin, end))
            begin = end
    if end > begin:
        ranges.append((begin, end))
    return ranges


# --- reading ---


class _Opened:
    """A Parquet file of one store, closed on exit; what is wrong with it is an InputError."""

    def __init__(self, path: str, options: Mapping[str, Any]) -> None:
        self.path, self.options, self.handle = path, options, None

    def __enter__(self) -> pq.ParquetFile:
        try:
            fs, name = fsspec.core.url_to_fs(self.path, **self.options)
            if _is_local(fs):
                self.handle = pa.OSFile(name, "rb")
                return pq.ParquetFile(self.handle, buffer_size=2**20, pre_buffer=False)
            self.handle = fs.open(name, "rb", block_size=_REMOTE_BUFFER)
            return pq.ParquetFile(self.handle, buffer_size=_REMOTE_BUFFER, pre_buffer=False)
        except Exception as error:  # every store raises its own kinds
            self.__exit__()
            raise InputError(f"{self.path}: not readable as Parquet: {_one_line(error)}") from error

    def __exit__(self, *_: object) -> None:
        if self.handle is not None:
            self.handle.close()


def _opened(path: str, options: Mapping[str, Any]) -> _Opened:
    return _Opened(path, options)


def current_identity(file: InputFile, options: Mapping[str, Any]) -> str:
    """The file's content identity now, to compare with `file.input_id`.

    Raises:
        InputError: the file is gone or its store does not answer.
    """
    try:
        fs, name = fsspec.core.url_to_fs(file.path, **options)
        return _identity(fs.info(name))
    except Exception as error:  # every store raises its own kinds
        raise InputError(f"{file.path}: cannot be read any more: {_one_line(error)}") from error


def read_rows(fragment: Fragment, options: Mapping[str, Any], batch_rows: int = 32) -> Iterator[Row]:
    """Read a fragment's rows in order; exactly `fragment.rows` of them.

    A page that cannot be decoded costs the rest of its row group: those rows come with `readable=False`.

    Args:
        batch_rows: rows decoded at a time; bounds memory, with the images' size.

    Raises:
        InputError: the file changed since it was listed, or its store fails (another try may succeed).
    """
    if current_identity(fragment.file, options) != fragment.file.input_id:
        raise InputError(f"{fragment.file.path}: changed during the run; run again to curate what it holds now")
    position = fragment.start
    failures = 0
    while position < fragment.stop:
        group_stop = fragment.stop
        try:
            with _opened(fragment.file.path, options) as parquet:
                for group, begin, end in _groups(parquet, position, fragment.stop):
                    group_stop = end
                    for row in _read_group(parquet, fragment.layout, group, begin, position, end, batch_rows):
                        yield row
                        position, failures = row.row + 1, 0
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise InputError(f"{fragment.file.path}: cannot be read: {_one_line(error)}") from error
            failures += 1
            if failures >= _REREADS:
                note = f"pages of rows {position} to {group_stop - 1} cannot be decoded: {_one_line(error)}"
                for row_number in range(position, group_stop):
                    yield Row(row_number, note=note, readable=False)
                position, failures = group_stop, 0
            else:
                time.sleep(0.1 * failures)


def _groups(parquet: pq.ParquetFile, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(row group, its first row, last row + 1 wanted) of the groups that hold rows [start, stop)."""
    begin = 0
    for group in range(parquet.metadata.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if begin < stop and begin + rows > start and rows:
            yield group, begin, min(begin + rows, stop)
        begin += rows


def _read_group(
    parquet: pq.ParquetFile, layout: Layout, group: int, begin: int, start: int, stop: int, batch_rows: int
) -> Iterator[Row]:
    """Rows [start, stop) of a row group whose first row is `begin`."""
    position = begin
    batches = parquet.iter_batches(batch_rows, row_groups=[group], columns=layout.columns, use_threads=False)
    for batch in batches:
        low, high = max(start - position, 0), min(stop - position, batch.num_rows)
        if low < high:
            yield from _rows(batch.slice(low, high - low), layout, position + low)
        position += batch.num_rows
        if position >= stop:
            return
    if position < stop:
        raise OSError(f"row group {group} ends at row {position} of {stop}")


def _rows(batch: pa.RecordBatch, layout: Layout, first: int) -> Iterator[Row]:
    images = batch.column(layout.image)
    outside: list[Any] = [None] * batch.num_rows
    if pa.types.is_struct(images.type):
        if images.type.get_field_index("path") >= 0:
            outside = pa.compute.struct_field(images, "path").to_pylist()
        images = pa.compute.struct_field(images, "bytes")
    texts, urls, keys = (_strings(batch, name) for name in (layout.text, layout.url, layout.key))
    states, errors = _strings(batch, layout.status), _strings(batch, layout.error)
    for i, image in enumerate(images.to_pylist()):
        note = None
        if image is None:
            said = [part for part in (states[i], errors[i]) if part]
            note = ": ".join(said) or (f"only a path is stored: {outside[i]}" if outside[i] else None)
        yield Row(first + i, image, texts[i], urls[i], keys[i], note)


def _strings(batch: pa.RecordBatch, name: str | None) -> list[str | None]:
    """A column as text: any UTF-8 error is replaced, numbers are written out."""
    if name is None:
        return [None] * batch.num_rows
    column = batch.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_string(column.type):
        raw = column.cast(pa.large_string() if pa.types.is_string_view(column.type) else column.type)
        large = pa.types.is_large_string(raw.type)
        return [
            None if value is None else value.decode("utf-8", "replace")
            for value in raw.cast(pa.large_binary() if large else pa.binary()).to_pylist()
        ]
    return [None if value is None else str(value) for value in column.to_pylist()]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


# --- writing ---

_ROW_GROUP_BYTES = 8 * 2**20
"""More costs the kernel's zeroing of fresh memory for every row group: 32 MiB twice the time of 8."""


class ParquetWriter:
    """Writes one file of one table, a row group whenever enough has gathered, so that memory stays bounded.

    The file is whole, or it is not readable as Parquet: its footer is written by `close`.

    Args:
        table: a key of schema.FILE_SCHEMAS.
        url: local path or URL of the file; parent directories are made.

    Raises:
        OSError: the store refuses.
    """

    def __init__(self, table: str, url: str, options: Mapping[str, Any]) -> None:
        self.schema = FILE_SCHEMAS[table]
        self.rows = 0
        self.size = 0
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        fs, name = fsspec.core.url_to_fs(url, **options)
        self._local = name if _is_local(fs) else None
        if self._local:  # arrow's own file: no detour through Python for every page
            os.makedirs(os.path.dirname(name), exist_ok=True)
            self._file = self._sink = pa.OSFile(name, mode="w")
        else:
            self._file = fs.open(name, "wb")
            self._sink = pa.PythonFile(self._file, mode="w")
        plain = [field.name for field in self.schema if field.name != "image"]
        self._writer = pq.ParquetWriter(
            self._sink,
            self.schema,
            compression={name: "none" if name == "image" else "zstd" for name in self.schema.names},
            use_dictionary=[name for name in plain if name not in ("row", "image_sha256")],
            write_statistics=plain,
            store_schema=False,
        )

    def append(self, row: dict[str, Any], size: int) -> None:
        """Add one row; `size` is about its bytes."""
        if self._pending_bytes + size > _ROW_GROUP_BYTES:
            self._flush()
        self._pending.append(row)
        self._pending_bytes += size
        self.rows += 1

    def _flush(self) -> None:
        if self._pending:
            columns = [_array([row[field.name] for row in self._pending], field.type) for field in self.schema]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self.schema))
        self._pending, self._pending_bytes = [], 0

    def close(self) -> int:
        """Finish the file and return its size in bytes."""
        self._flush()
        self._writer.close()
        size: int = self._sink.tell()
        self._file.close()
        return size

    def abandon(self) -> None:
        """Give the file up: nothing readable is left where the store allows it; vacuum finds the rest."""
        self._pending = []
        if self._local:
            self._file.close()
            os.unlink(self._local)
        elif hasattr(self._file, "discard"):
            self._file.discard()


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """`pa.array`, but for binary values without its growing and copying buffer; together they must fit 2 GiB."""
    if kind != pa.binary() or None in values:
        return pa.array(values, kind)
    offsets = pa.array(itertools.accumulate(map(len, values), initial=0), pa.int32())
    return pa.Array.from_buffers(kind, len(values), [None, offsets.buffers()[1], pa.py_buffer(b"".join(values))])
