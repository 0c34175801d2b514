"""List inputs, read fragments, write Parquet: the one module that touches the inputs' storage, on any fsspec URL.

A fragment is a run of rows of one input file, the unit of work and of what a crash can cost. It follows row groups
where they are small and slices those that are large, without reading the whole file.
"""

from __future__ import annotations

import contextlib
import datetime
import glob
import hashlib
import itertools
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from capfilt.errors import InputError
from capfilt.schema import FILE_SCHEMAS
from capfilt.spec import Columns, Input

IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "image_bytes", "bytes")
TEXT_COLUMNS = ("caption", "text", "txt", "TEXT", "alt_text")
URL_COLUMNS = ("url", "URL", "image_url")
KEY_COLUMNS = ("key", "__key__", "id", "uid")
STATUS_COLUMNS = ("status",)
ERROR_COLUMNS = ("error_message",)
SHA256_COLUMNS = ("sha256",)

_REREADS = 3  # a page that fails to decode so many times in a row is corrupt, not unlucky
_STORE_PAUSES = (0.5, 2.0)  # seconds before a store that failed is tried again; the stores' clients retry too
_REMOTE_BUFFER = 8 * 2**20
_TAIL = 64 * 2**10

_CONTENT_TAGS = ("ETag", "etag", "md5Hash", "Content-MD5", "blob_id", "sha", "generation", "version_id")
_TIME_STAMPS = (
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "modified", "modify", "modificationTime"),
    "created",
)


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file, and so one shard.

    Attributes:
        path: absolute local path or URL.
        shard: name of the shard: the file's stem and a hash of `path`, of [A-Za-z0-9._-]; unique among inputs.
        input_id: content identity from the listing: the store's ETag or other content tag where it has one, else size
            and modification time (of a symlink's target), else size and a hash of the file's end, its footer.
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
    sha256: str | None

    @property
    def columns(self) -> list[str]:
        """The columns to read."""
        names = (self.image, self.text, self.url, self.key, self.status, self.error, self.sha256)
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
        sha256: hex digest that the input claims, unchecked. img2dataset's is that of the download, so where it resized
            not that of `image`.
        readable: False where the file's pages holding this row cannot be decoded; then all else is None.
    """

    row: int
    image: bytes | None = None
    text: str | None = None
    url: str | None = None
    key: str | None = None
    note: str | None = None
    sha256: str | None = None
    readable: bool = True


# --- listing ---


def list_inputs(spec: Input, exclude: str | None = None) -> list[InputFile]:
    """List the input files, sorted by path, each path once.

    Directories are searched for `*.parquet` at any depth; names that begin with `_` or `.` are left out, as every
    Parquet reader does. A path that exists is taken literally, whatever glob characters it holds. Symlinks to files
    are inputs like others, under their own names; a symlinked directory may be named in the spec, but those found
    below one are not followed. Nothing is read, except the files' ends in a store that stamps its files with nothing.

    Args:
        exclude: a directory whose files are no inputs (the output, should it lie inside an input directory), also
            where a symlink leads there.

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
        prefix = _real(exclude).rstrip("/") + "/"
        found = {
            path: file for path, file in found.items() if not _real(posixpath.dirname(path) + "/").startswith(prefix)
        }
    return [found[path] for path in sorted(found)]


def _real(path: str) -> str:
    """A local directory without symlinks, `file://` or not, ending in a slash if `path` does; a URL as it is."""
    if fsspec.utils.get_protocol(path) not in LocalFileSystem.protocol:
        return path
    real = os.path.realpath(str(LocalFileSystem._strip_protocol(path)))
    return real.rstrip("/") + "/" * path.endswith("/")


def _list_path(path: str, options: Mapping[str, Any]) -> dict[str, InputFile]:
    try:
        fs, root = fsspec.core.url_to_fs(path, **options)
        fs.invalidate_cache()  # s3fs and others would answer from what they listed before, for ever
        files = [_input_file(fs, info, path, root) for info in _find(fs, path, root)]
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or directory") from None
    except Exception as error:  # every store raises its own kinds
        raise InputError(f"{path}: cannot be listed: {_one_line(error)}") from error
    return {file.path: file for file in files}


def _find(fs: Any, path: str, root: str) -> list[Mapping[str, Any]]:
    """What the store says of each file at `path`, whose name in the store is `root`."""
    if glob.has_magic(path) and not fs.exists(root):
        infos = fs.glob(root, detail=True).values()
    elif fs.isdir(root):
        infos = [
            info
            for name, info in fs.find(root, detail=True).items()
            if name.endswith(".parquet") and not re.search(r"/[._]", name.removeprefix(root.rstrip("/")))
        ]
    else:
        infos = [fs.info(root)]
    linked = os.path.isdir if _is_local(fs) else lambda _: False  # a link to a directory is listed as no directory
    return [info for info in infos if info["type"] != "directory" and not linked(info["name"])]


def _input_file(fs: Any, info: Mapping[str, Any], asked: str, root: str) -> InputFile:
    name = info["name"]
    path = name if _is_local(fs) else _url(fs, name, asked, root)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", posixpath.basename(name).removesuffix(".parquet"))[:60]
    digest = hashlib.blake2b(path.encode(), digest_size=8).hexdigest()
    if _is_local(fs):
        try:
            info = _stat(name)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {_one_line(error)}") from error
    elif _stamp(info) is None:  # a web server's index says less than its answer for one file
        info = fs.info(name)
    return InputFile(path, f"{stem}-{digest}", _identity(fs, name, info), int(info["size"] or 0))


def _url(fs: Any, name: str, asked: str, root: str) -> str:
    """URL of file `name`, found under URL `asked` whose own name is `root`, such that it opens in the same store.

    Some names lack what the URL says of the store, as FTP's and HDFS's lack the host; then it is taken from `asked`.
    """
    url: str = fs.unstrip_protocol(name)
    if fs._get_kwargs_from_urls(url) == fs._get_kwargs_from_urls(asked):
        return url
    asked, root = asked.rstrip("/"), root.rstrip("/")
    common = len(posixpath.commonprefix([asked[::-1], root[::-1]]))  # asked = A + common, root = R + common
    return asked[: len(asked) - common] + name.removeprefix(root[: len(root) - common])


def _stat(name: str) -> dict[str, Any]:
    """Size and time of a local file, of its target where it is a symlink."""
    stat = Path(name).stat()
    return {"size": stat.st_size, "mtime": stat.st_mtime}


def _stamp(info: Mapping[str, Any]) -> Any:
    return next((info[key] for key in (*_CONTENT_TAGS, *_TIME_STAMPS) if info.get(key)), None)


def _identity(fs: Any, name: str, info: Mapping[str, Any]) -> str:
    """Content identity of a listed file, at most 64 characters."""
    for tag in _CONTENT_TAGS:
        if info.get(tag):
            return str(info[tag]).strip('"')[:64]
    stamp = _stamp(info)
    if stamp is None:
        stamp = hashlib.blake2b(fs.tail(name, _TAIL), digest_size=16).hexdigest()
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
    with _Opened(file.path, options) as parquet:
        layout = recognise(parquet.schema_arrow, columns, file.path)
        meta = parquet.metadata
        return Footer(layout, tuple(meta.row_group(i).num_rows for i in range(meta.num_row_groups)))


def recognise(schema: pa.Schema, columns: Columns, path: str) -> Layout:
    """Find the columns: those the spec names, else img2dataset's, Hugging Face's and the plain names.

    Raises:
        InputError: no image or text column, one of an unusable type, or two of one name; says what the file has.
    """
    layout = Layout(
        image=_pick(schema, columns.image, IMAGE_COLUMNS, "image", path) or "",
        text=_pick(schema, columns.text, TEXT_COLUMNS, "text", path) or "",
        url=_pick(schema, columns.url, URL_COLUMNS, "url", path, optional=True),
        key=_pick(schema, columns.key, KEY_COLUMNS, "key", path, optional=True),
        status=_pick(schema, None, STATUS_COLUMNS, "status", path, optional=True),
        error=_pick(schema, None, ERROR_COLUMNS, "error", path, optional=True),
        sha256=_pick(schema, None, SHA256_COLUMNS, "sha256", path, optional=True),
    )
    for name in layout.columns:
        if schema.names.count(name) > 1:
            raise InputError(
                f"{path}: {schema.names.count(name)} columns are named {name}; name another with input.columns, or "
                "rewrite the file without"
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


class _Watched:
    """A store's file for reading that keeps the last error of its own.

    Arrow passes a store's errors on in many forms; this tells a store that fails from pages that are corrupt.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.failed: Exception | None = None

    def _watch(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:
            self.failed = error
            raise

    def read(self, size: int = -1) -> bytes:
        answer: bytes = self._watch(self._file.read, size)
        return answer

    def seek(self, offset: int, whence: int = 0) -> int:
        answer: int = self._watch(self._file.seek, offset, whence)
        return answer

    def tell(self) -> int:
        answer: int = self._watch(self._file.tell)
        return answer

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def close(self) -> None:
        self._file.close()


class _Opened:
    """A Parquet file of one store, closed on exit.

    Attributes:
        failed: the error of a store that failed to open or read the file; None for a local file, and for one that is
            readable but wrong.
    """

    def __init__(self, path: str, options: Mapping[str, Any]) -> None:
        self.path, self.options = path, options
        self._handle: Any = None
        self._unopened: Exception | None = None

    @property
    def failed(self) -> Exception | None:
        return self._unopened or getattr(self._handle, "failed", None)

    def __enter__(self) -> pq.ParquetFile:
        """Raises InputError for what is no Parquet file, and for a store that fails."""
        try:
            buffer = self._open()
            return pq.ParquetFile(self._handle, buffer_size=buffer, pre_buffer=False)
        except Exception as error:  # every store raises its own kinds
            self.__exit__()
            what = "cannot be read" if self.failed else "not readable as Parquet"
            raise InputError(f"{self.path}: {what}: {_one_line(error)}") from error

    def _open(self) -> int:
        """Open the handle; returns the buffer to read it with, in bytes."""
        try:
            fs, name = fsspec.core.url_to_fs(self.path, **self.options)
            if not _is_local(fs):
                self._handle = _Watched(fs.open(name, "rb", block_size=_REMOTE_BUFFER))
                return _REMOTE_BUFFER
        except Exception as error:
            self._unopened = error
            raise
        self._handle = pa.OSFile(name, "rb")
        return 2**20

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            with contextlib.suppress(Exception):  # nothing of a file read is lost by it
                self._handle.close()


def current_identity(file: InputFile, options: Mapping[str, Any], pauses: Sequence[float] = _STORE_PAUSES) -> str:
    """The file's content identity now, to compare with `file.input_id`.

    Args:
        pauses: seconds to wait before each further try at a store that fails.

    Raises:
        InputError: the file is gone or its store does not answer.
    """
    for pause in (*pauses, None):
        try:
            fs, name = fsspec.core.url_to_fs(file.path, **options)
            fs.invalidate_cache()
            return _identity(fs, name, _stat(name) if _is_local(fs) else fs.info(name))
        except Exception as error:  # every store raises its own kinds
            if pause is None or isinstance(error, FileNotFoundError):
                raise InputError(f"{file.path}: cannot be read any more: {_one_line(error)}") from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def read_rows(
    fragment: Fragment, options: Mapping[str, Any], batch_rows: int = 32, pauses: Sequence[float] = _STORE_PAUSES
) -> Iterator[Row]:
    """Read a fragment's rows in order; exactly `fragment.rows` of them, all of one state of the file.

    A page that cannot be decoded though the store answered every read costs the rest of its row group: those rows
    come with `readable=False`.

    Args:
        batch_rows: rows decoded at a time; bounds memory, with the images' size.
        pauses: seconds to wait before each further try at a store that fails.

    Raises:
        InputError: the file changed since it was listed, or its store fails (another try may succeed). The rows that
            came before it are then void.
    """
    path = fragment.file.path
    position = fragment.start
    failures = 0
    while position < fragment.stop:
        _refuse_changed(fragment.file, options, pauses)
        group_stop = fragment.stop
        opened = _Opened(path, options)
        try:
            with opened as parquet:
                for group, begin, end in _groups(parquet, position, fragment.stop):
                    group_stop = end
                    for row in _read_group(parquet, fragment.layout, group, begin, position, end, batch_rows):
                        yield row
                        position, failures = row.row + 1, 0
            if position < fragment.stop:
                raise InputError(f"{path}: holds fewer rows than when it was listed; run again")
        except Exception as error:  # noqa: BLE001  every store raises its own kinds; re-raised where it is none
            failures += 1
            if _another_try(opened, error, failures, pauses):
                continue
            note = f"pages of rows {position} to {group_stop - 1} cannot be decoded: {_one_line(error)}"
            yield from (Row(number, note=note, readable=False) for number in range(position, group_stop))
            position, failures = group_stop, 0
    _refuse_changed(fragment.file, options, pauses)


def _refuse_changed(file: InputFile, options: Mapping[str, Any], pauses: Sequence[float]) -> None:
    if current_identity(file, options, pauses) != file.input_id:
        raise InputError(f"{file.path}: changed during the run; run again to curate what it holds now")


def _another_try(opened: _Opened, error: Exception, failures: int, pauses: Sequence[float]) -> bool:
    """Wait, if reading on after `error`, the `failures`-th in a row, may help; False where the pages are corrupt.

    Raises:
        InputError: the store keeps failing, or the file is no Parquet file any more.
        Exception: `error`, where it is a fault of ours.
    """
    if opened.failed is not None:
        if failures > len(pauses) or isinstance(opened.failed, FileNotFoundError):
            raise InputError(f"{opened.path}: cannot be read: {_one_line(opened.failed)}") from error
        time.sleep(pauses[failures - 1])
        return True
    if isinstance(error, OSError) and error.errno is not None:
        raise InputError(f"{opened.path}: cannot be read: {_one_line(error)}") from error
    if not isinstance(error, (pa.ArrowException, OSError, UnicodeDecodeError)):
        raise error
    if failures < _REREADS:
        time.sleep(0.1 * failures)
    return failures < _REREADS


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
            outside = pc.struct_field(images, "path").to_pylist()
        images = pc.struct_field(images, "bytes")
    texts, urls, keys = (_strings(batch, name) for name in (layout.text, layout.url, layout.key))
    states, errors, digests = (_strings(batch, name) for name in (layout.status, layout.error, layout.sha256))
    for i, image in enumerate(images.to_pylist()):
        note = None
        if image is None:
            said = [part for part in (states[i], errors[i]) if part]
            note = ": ".join(said) or (f"only a path is stored: {outside[i]}" if outside[i] else None)
        yield Row(first + i, image, texts[i], urls[i], keys[i], note, digests[i])


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
        """Give the file up: nothing readable is left where the store allows it; vacuum finds the rest.

        Raises nothing, since the error that led here is the one to hear of.
        """
        self._pending = []
        self._writer.is_open = False  # else it would write its footer when collected
        with contextlib.suppress(Exception):  # every store raises its own kinds
            self._file.close() if self._local else self._file.discard()
        with contextlib.suppress(OSError, AttributeError):  # some files' `closed` is read-only
            if self._local:
                os.unlink(self._local)
            else:
                self._file.closed = True  # else fsspec would upload what it holds when collected


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """`pa.array`, but for binary values without its growing and copying buffer; together they must fit 2 GiB."""
    if kind != pa.binary() or None in values:
        return pa.array(values, kind)
    offsets = pa.array(itertools.accumulate(map(len, values), initial=0), pa.int32())
    return pa.Array.from_buffers(kind, len(values), [None, offsets.buffers()[1], pa.py_buffer(b"".join(values))])
