"""What an input file holds, how it is cut into fragments, and reading them.

Parquet has a footer; tars and Arrow streams are looked through once for what one would say (tars.py, arrow_streams.py).

A fragment is a run of rows of one input file, the unit of work and of what a crash can cost. It follows row groups
where they are small and slices those that are large, without reading the whole file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt import arrow_streams, tars
from capfilt.errors import InputError
from capfilt.inputs import InputFile, Opened, current_identity, read_file, read_parquet
from capfilt.spec import Columns
from capfilt.stores import PAUSES, one_line, pause, transient

IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "image_bytes", "bytes")
TEXT_COLUMNS = ("caption", "text", "txt", "TEXT", "alt_text")
URL_COLUMNS = ("url", "URL", "image_url")
KEY_COLUMNS = ("key", "__key__", "id", "uid")
STATUS_COLUMNS = ("status",)
ERROR_COLUMNS = ("error_message",)
SHA256_COLUMNS = ("sha256",)

_SLICES = 8
"""Of one row group. pyarrow cannot skip rows, so each is decoded from the group's first row: eight read it 4.5 times,
80 would read it 40 times."""

_ROWS_PER_BYTE = 1_000
"""Claimed by a footer. A million nulls have 250; a lie may have any, and each row is accounted for."""

_NAMES = 4096  # rows whose URLs and keys are read at a time

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

_REREADS = 3  # a page that fails to decode so many times in a row is corrupt, not unlucky


@dataclass(frozen=True, slots=True)
class Layout:
    """Which input column plays which part; None where the file has none.

    Of a tar these are extensions, or fields of a sample's JSON, several with `|` between them: the first that is there.
    """

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
    """What a Parquet footer says: the layout, and the row groups' sizes in rows.

    Attributes:
        offsets: of a file without a footer: where each of its runs of rows begins, in bytes.
    """

    layout: Layout
    row_groups: tuple[int, ...]
    offsets: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return sum(self.row_groups)

    def fragment(self, file: InputFile, start: int, stop: int, annotations: tuple[str, ...] = ()) -> Fragment:
        """Rows [start, stop) of the file that this is the footer of."""
        runs, begin = [], 0
        for rows, offset in zip(self.row_groups, self.offsets, strict=False):
            if begin < stop and begin + rows > start:
                runs.append((begin, begin + rows, offset))
            begin += rows
        return Fragment(file, self.layout, start, stop, self.rows, annotations, runs=tuple(runs))


@dataclass(frozen=True, slots=True)
class Fragment:
    """Rows [start, stop) of one input file of `file_rows` rows.

    Attributes:
        annotations: committed files that hold their captions, where these stay; paths within the table.
        withdrawn: rows of the file that their owners withdrew.
        runs: (first row, last row + 1, offset in bytes) of the runs that hold its rows, of a file without a footer.
    """

    file: InputFile
    layout: Layout
    start: int
    stop: int
    file_rows: int
    annotations: tuple[str, ...] = ()
    withdrawn: tuple[int, ...] = ()
    runs: tuple[tuple[int, int, int], ...] = ()

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
        return [replace(self, start=a, stop=b) for a, b in itertools.pairwise(cuts)]


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


# --- footers and splitting ---


def read_footer(
    file: InputFile, columns: Columns, options: Mapping[str, Any], pauses: Sequence[float] = PAUSES
) -> Footer:
    """Read one footer, or what a tar or an Arrow stream has instead of one.

    Args:
        pauses: seconds to wait before each further try at a store that fails.

    Raises:
        InputError: the file is not Parquet, is truncated, lies about its rows, or lacks a usable column, or its store
            keeps failing; the message names the file.
    """
    if file.path.endswith(_PACKED):
        raise InputError(f"{file.path}: a compressed tar cannot be read from the middle; decompress it")
    if file.path.endswith(".tar"):
        found = read_file(file.path, options, lambda source: _tar_footer(source, file, columns), pauses)
    elif file.path.endswith(".arrow"):
        found = read_file(file.path, options, lambda source: _stream_footer(source, file, columns), pauses)
    else:
        found = read_parquet(
            file.path,
            options,
            lambda parquet: Footer(recognise(parquet.schema_arrow, columns, file.path), row_group_rows(parquet)),
            pauses,
        )
    if found.rows > _ROWS_PER_BYTE * max(file.size, 1):
        raise InputError(f"{file.path}: claims {found.rows:,} rows in {file.size:,} bytes; take it out of the input")
    return found


def _tar_footer(source: Any, file: InputFile, columns: Columns) -> Footer:
    known = {
        "image": tars.IMAGES,
        "text": ("txt", *TEXT_COLUMNS),
        "url": URL_COLUMNS,
        "key": KEY_COLUMNS,
        "status": STATUS_COLUMNS,
        "error": ERROR_COLUMNS,
        "sha256": SHA256_COLUMNS,
    }
    named = {"image": columns.image, "text": columns.text, "url": columns.url, "key": columns.key}
    layout = Layout(**{role: named.get(role) or "|".join(dict.fromkeys(names)) for role, names in known.items()})
    try:
        index = tars.index(source, file.size, _names(layout.image))
    except tars.BrokenTarError as error:
        raise InputError(
            f"{file.path}: not readable as a tar: {error}; pack it again, or take it out of the input"
        ) from error
    if index.scattered is not None:
        raise InputError(
            f"{file.path}: the image and the text of {index.scattered[:200]!r} do not lie side by side, as "
            "WebDataset's readers want them; pack it again in order of names (tar --sort=name)"
        )
    return Footer(layout, index.rows, index.offsets)


def _stream_footer(source: Any, file: InputFile, columns: Columns) -> Footer:
    try:
        stream = arrow_streams.index(source, file.size)
    except (pa.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not Arrow's
            raise
        raise InputError(
            f"{file.path}: not readable as Arrow: {one_line(error)}; write it again, or take it out of the input"
        ) from error
    return Footer(recognise(stream.schema, columns, file.path), stream.rows, stream.offsets)


def _names(names: str | None) -> tuple[str, ...]:
    """What a tar's layout holds of one part."""
    return tuple(names.split("|")) if names else ()


def row_group_rows(parquet: pq.ParquetFile) -> tuple[int, ...]:
    """Rows of each row group, by the footer.

    Raises:
        pa.ArrowInvalid: its columns hold more or fewer; those that it has not would be unreadable rows, without end.
    """
    meta = parquet.metadata
    flat = [n for n in range(meta.num_columns) if parquet.schema.column(n).max_repetition_level == 0]
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    for number, group in enumerate(groups):
        held = max((group.column(n).num_values for n in flat), default=group.num_rows)
        if group.num_rows != held:
            raise pa.ArrowInvalid(
                f"the footer says {group.num_rows:,} rows of row group {number}, its columns {held:,}"
            )
    return tuple(group.num_rows for group in groups)


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

    Small row groups are joined, large ones sliced; no range holds rows of a large one and of another. A slice is at
    least an eighth of its row group, so longer than `fragment_rows` where the group has more than eight times as many
    rows: to read a slice is to decode its group from the first row on, and the slices of one together come to 4.5
    times its bytes at most.

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
        pieces = -(-(b - begin) // max(fragment_rows, -(-rows // _SLICES)))
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


def read_rows(
    fragment: Fragment, options: Mapping[str, Any], batch_rows: int = 32, pauses: Sequence[float] = PAUSES
) -> Iterator[Row]:
    """Read a fragment's rows in order; exactly `fragment.rows` of them, all of one state of the file.

    A page that cannot be decoded though the store answered every read costs the rest of its row group: those rows
    come with `readable=False`. So does the rest of a tar's run or an Arrow stream's record batch.

    Args:
        batch_rows: rows decoded at a time; bounds memory, with the images' size.
        pauses: seconds to wait before each further try at a store that fails.

    Raises:
        InputError: the file changed since it was listed, or its store fails (another try may succeed). The rows that
            came before it are then void.
        MemoryError: there is no memory to read or decode into; the file is not to blame.
    """
    path = fragment.file.path
    position = fragment.start
    failures = 0
    while position < fragment.stop:
        _refuse_changed(fragment.file, options, pauses)
        group_stop = fragment.stop
        opened = Opened(path, options, plain=bool(fragment.runs))
        try:
            with opened as source:
                for group, begin, end in _groups(source, fragment, position):
                    group_stop = end
                    for row in _read_group(source, fragment, group, begin, position, end, batch_rows):
                        yield row
                        position, failures = row.row + 1, 0
            if position < fragment.stop:
                raise InputError(f"{path}: holds fewer rows than when it was listed; run again")
        except MemoryError:  # Arrow's own is one, too
            raise
        except Exception as error:  # noqa: BLE001  every store raises its own kinds; re-raised where it is none
            failures += 1
            if _another_try(opened, error, failures, pauses):
                continue
            what = "rows" if fragment.runs else "pages of rows"
            note = f"{what} {position} to {group_stop - 1} cannot be decoded: {one_line(error)}"
            yield from (Row(number, note=note, readable=False) for number in range(position, group_stop))
            position, failures = group_stop, 0
    _refuse_changed(fragment.file, options, pauses)


def read_names(
    file: InputFile, footer: Footer, options: Mapping[str, Any], pauses: Sequence[float] = PAUSES
) -> Iterator[Row]:
    """A file's rows with URL and key; of a Parquet file no other column is read. `readable` where :func:`read_rows`
    finds them so, or more often: it reads more columns, of which one may be corrupt.

    Raises:
        InputError, MemoryError: as :func:`read_rows`.
    """
    whole = footer.fragment(file, 0, footer.rows)
    if footer.offsets:  # a tar has its samples' names beside their images
        return (replace(row, image=None, text=None) for row in read_rows(whole, options, pauses=pauses))
    name = footer.layout.url or footer.layout.key or ""
    bare = replace(footer.layout, image=name, text=name, status=None, error=None, sha256=None)
    whole = replace(whole, layout=bare)
    found = [row for row in read_rows(whole, options, _NAMES, pauses) if row.readable]
    # One by one, up to a page that is corrupt: the batch that holds it was given up as a whole.
    return iter(found) if len(found) == footer.rows else read_rows(whole, options, 1, pauses)


def _refuse_changed(file: InputFile, options: Mapping[str, Any], pauses: Sequence[float]) -> None:
    if current_identity(file, options, pauses) != file.input_id:
        raise InputError(f"{file.path}: changed during the run; run again to curate what it holds now")


def _another_try(opened: Opened, error: Exception, failures: int, pauses: Sequence[float]) -> bool:
    """Wait, if reading on after `error`, the `failures`-th in a row, may help; False where the pages are corrupt.

    Raises:
        InputError: the store keeps failing, or the file is no Parquet file any more.
        Exception: `error`, where it is a fault of ours.
    """
    if opened.failed is not None:
        if failures > len(pauses) or not transient(opened.failed):
            raise InputError(f"{opened.path}: cannot be read: {one_line(opened.failed)}") from error
        pause(pauses[failures - 1])
        return True
    if isinstance(error, OSError) and error.errno is not None:
        raise InputError(f"{opened.path}: cannot be read: {one_line(error)}") from error
    if not isinstance(error, (pa.ArrowException, OSError, UnicodeDecodeError)):
        raise error
    if failures < _REREADS:
        pause(0.1 * failures)
    return failures < _REREADS


def _groups(source: Any, fragment: Fragment, start: int) -> Iterator[tuple[int, int, int]]:
    """(row group, or a run's offset; its first row; last row + 1 wanted) of those that hold rows from `start` on."""
    if fragment.runs:
        runs = ((offset, begin, end) for begin, end, offset in fragment.runs)
    else:
        sizes = [source.metadata.row_group(n).num_rows for n in range(source.metadata.num_row_groups)]
        ends = itertools.accumulate(sizes)
        runs = ((n, end - rows, end) for n, (rows, end) in enumerate(zip(sizes, ends, strict=True)))
    for group, begin, end in runs:
        if begin < fragment.stop and end > start and end > begin:
            yield group, begin, min(end, fragment.stop)


def _read_group(
    source: Any, fragment: Fragment, group: int, begin: int, start: int, stop: int, batch_rows: int
) -> Iterator[Row]:
    """Rows [start, stop) of a row group or run whose first row is `begin`."""
    if fragment.file.path.endswith(".tar"):
        yield from _read_tar(source, fragment, group, begin, start, stop)
        return
    layout, position = fragment.layout, begin
    if fragment.runs:
        batches = _read_batch(source, fragment, group, begin, batch_rows)
    else:
        batches = source.iter_batches(batch_rows, row_groups=[group], columns=layout.columns, use_threads=False)
    for batch in batches:
        low, high = max(start - position, 0), min(stop - position, batch.num_rows)
        if low < high:
            yield from _rows(batch.slice(low, high - low), layout, position + low)
        position += batch.num_rows
        if position >= stop:
            return
    if position < stop:
        raise OSError(f"row group {group} ends at row {position} of {stop}")


def _read_batch(source: Any, fragment: Fragment, offset: int, begin: int, rows: int) -> Iterator[pa.RecordBatch]:
    """An Arrow stream's record batch, some rows at a time."""
    whole = next(end - first for first, end, _ in fragment.runs if first == begin)
    batch = arrow_streams.read_batch(source, offset, arrow_streams.read_schema(source), whole)
    for first in range(0, whole, rows):
        yield batch.slice(first, rows)


def _read_tar(source: Any, fragment: Fragment, offset: int, begin: int, start: int, stop: int) -> Iterator[Row]:
    """Rows [start, stop) of a tar, whose row `begin` is at `offset`."""
    layout = fragment.layout
    images, texts = _names(layout.image), _names(layout.text)
    others = [_names(name) for name in (layout.url, layout.key, layout.status, layout.error, layout.sha256)]
    found = enumerate(tars.samples(source, offset, fragment.file.size), begin)
    for number, sample in itertools.islice(found, start - begin, stop - begin):
        held = tars.contents(source, sample, images, texts)
        url, key, status, error, sha256 = (
            next((_valid(str(held.fields[name])) for name in names if held.fields.get(name) is not None), None)
            for names in others
        )
        if held.problem is not None:
            yield Row(number, key=sample.key, note=held.problem, readable=False)
            continue
        note = None
        if held.image is None:
            said = [part for part in (status, error) if part]
            note = ": ".join(said) or f"no image among {', '.join(sample.members)}"[:1000]
        text = None if held.text is None else _valid(held.text)
        yield Row(number, held.image, text, url, key or sample.key, note and _valid(note), sha256)


def _valid(text: str) -> str:
    """Without the halves of characters that JSON lets through and UTF-8 does not."""
    return text.encode("utf-8", "replace").decode()


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
