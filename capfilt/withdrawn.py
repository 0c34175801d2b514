"""Rows that their owners withdrew: the lists, and the rows of a dataset or an input that are on them.

A withdrawn row keeps its place, `(shard, row)`, and the digests of its URL and key: 64 bits each, by which a later run
tells whether it is still on a list. Which rows of a shard are withdrawn is in the shard's own decide fingerprint, so a
list that grows makes those shards stale that it hits, and no other.

Committed rows are compared by the URLs and keys in the annotations. `_runs/withdrawn/compared.json` names the lists,
and the version that was compared with them last: while the lists are the same, only files that came after it are read.
Without it everything is compared again.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from glob import has_magic
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.dataset import DIRECTORIES, CuratedDataset, ShardState
from capfilt.delimited import cut_rows
from capfilt.errors import DatasetError, InputError, SpecError
from capfilt.fingerprints import without_withdrawn
from capfilt.fragments import Footer, read_names
from capfilt.inputs import InputFile, read_parquet
from capfilt.schema import ANNOTATIONS, Reason
from capfilt.spec import CurateSpec, Withdrawn
from capfilt.stores import PAUSES, blamed, connect, one_line, persist

FOLDER, COMPARED = "withdrawn", "compared.json"

_THREADS = 16


@dataclass(frozen=True)
class Lists:
    """What is withdrawn: URLs and keys, none of them empty; some 200 bytes of memory each.

    Attributes:
        digest: of all that they name.
    """

    urls: frozenset[str]
    keys: frozenset[str]
    digest: str

    def __bool__(self) -> bool:
        return bool(self.urls or self.keys)

    def hold(self, url: str | None, key: str | None) -> bool:
        """Whether a row with this URL and key is withdrawn."""
        return url in self.urls or key in self.keys

    @cached_property
    def _digests(self) -> frozenset[str]:
        return frozenset(digest(kind, text) for kind, own in (("url", self.urls), ("key", self.keys)) for text in own)

    def still_hold(self, note: str) -> bool:
        """Whether a row with this note, which has been withdrawn, is still on a list."""
        return not self._digests.isdisjoint(note.split(", "))


def digest(kind: str, text: str) -> str:
    """What is left of a withdrawn row's URL or key, by `kind`."""
    return f"{kind} {hashlib.blake2b(text.encode(), digest_size=8, person=b'withdrawn').hexdigest()}"


def note_of(url: str | None, key: str | None) -> str | None:
    """The note of a withdrawn row; None where it had neither."""
    return ", ".join(digest(kind, text) for kind, text in (("url", url), ("key", key)) if text) or None


@dataclass(frozen=True)
class Withdrawals:
    """What a spec's lists mean for a dataset.

    Attributes:
        lists: None where the spec has none.
        hits: by committed shard, rows that are on a list and still hold what they held.
        returned: committed shards with rows that were withdrawn and are on no list any more.
    """

    lists: Lists | None = None
    hits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    returned: frozenset[str] = frozenset()


# --- the lists ---


def read_lists(spec: Withdrawn) -> Lists:
    """Read the lists whole, into memory.

    Raises:
        InputError: a list is not there, cannot be read, or is of no known kind; names it.
    """
    whole = hashlib.blake2b(digest_size=16)
    names: list[frozenset[str]] = []
    for places, column in ((spec.urls, spec.url_column), (spec.keys, spec.key_column)):
        own: set[Any] = set()
        for path in [path for place in places for path in _found(place, spec)]:
            own.update(_read_list(path, column, spec.storage_options))
        own -= {"", None}  # which would match what has no URL
        whole.update(f"{len(own)}\0".encode())
        for text in sorted(own):
            whole.update(f"{text}\0".encode())
        names.append(frozenset(own))
    return Lists(urls=names[0], keys=names[1], digest=whole.hexdigest())


def _found(place: str, spec: Withdrawn) -> list[str]:
    """The files that a path or glob names; that there are none is no empty list, but a mistake."""
    if not has_magic(place):
        return [place]
    fs, name = connect(place, spec.storage_options)
    try:
        found = persist(lambda: sorted(fs.glob(name)))
    except Exception as error:  # every store raises its own kinds
        raise InputError(f"{place}: cannot be listed: {one_line(error)}") from error
    if not found:
        raise InputError(f"{place}: no file there; withdrawn.urls and .keys take files and globs")
    return [fs.unstrip_protocol(path) for path in found]


def _read_list(path: str, column: str, options: Mapping[str, Any]) -> list[str | None]:
    kind = path.removesuffix(".gz").rpartition(".")[2].lower()
    if kind == "parquet":
        return _read_parquet(path, column, options)
    if kind not in ("csv", "txt"):
        raise InputError(f"{path}: lists of what is withdrawn are .parquet, .csv, .txt, .csv.gz or .txt.gz files")
    try:
        fs, name = connect(path, options)
        data: bytes = persist(lambda: fs.cat_file(name))
        data = gzip.decompress(data) if path.endswith(".gz") else data
        return _read_csv(path, data, column) if kind == "csv" else _read_text(data)
    except InputError:
        raise
    except Exception as error:  # every store raises its own kinds
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from error


def _read_parquet(path: str, column: str, options: Mapping[str, Any]) -> list[str | None]:
    def read(parquet: Any) -> list[str | None]:
        names = parquet.schema_arrow.names
        if column not in names:
            raise InputError(
                f"{path}: no column {column} (it has {', '.join(names)}); name it with withdrawn.url_column or "
                "withdrawn.key_column"
            )
        return _column(parquet.read([column], use_threads=False))

    try:
        return read_parquet(path, options, read)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from error


def _read_csv(path: str, data: bytes, column: str) -> list[str | None]:
    """A column, of rows of a line each: a quote left open would take those after it into a value, and keep them in."""
    rows = cut_rows(path, io.BytesIO(data), ",")
    if column not in (names := next(rows, [])):
        raise InputError(f"{path}: no column {column}; name it with withdrawn.url_column or withdrawn.key_column")
    place = names.index(column)
    entries: list[str | None] = []
    for row in rows:
        if broken := [value for value in row if "\n" in value]:
            raise InputError(
                f"{path}: a value reaches over several lines, where each is to be a row: {broken[0][:60]!r}; close its "
                "quote"
            )
        entries.append(row[place])
    return entries


def _read_text(data: bytes) -> list[str | None]:
    return [*data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")]


def _column(table: pa.Table) -> list[str | None]:
    """A table's only column as text: a number as it is written in annotations."""
    (column,) = table.columns
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    entries: list[str | None] = column.cast(pa.large_string()).to_pylist()
    return entries


# --- a dataset ---


def look(spec: CurateSpec, dataset: CuratedDataset | None, committed: Mapping[str, ShardState]) -> Withdrawals:
    """Compare what is committed with the spec's lists. Where both are as they were last time, no annotation is read.

    Raises:
        InputError: a list or an annotations file cannot be read.
        SpecError: the dataset has withdrawn rows, and the spec no `withdrawn`.
    """
    marked = [shard for shard, state in committed.items() if has_withdrawn(state)]
    if spec.withdrawn is None:
        if marked:
            raise SpecError(
                f"{spec.output}: rows of {len(marked):,} shards were withdrawn, of {marked[0]} for one, and this spec "
                "names no lists; name them under `withdrawn`, or give `withdrawn: {}` to take every row back"
            )
        return Withdrawals()
    lists = read_lists(spec.withdrawn)
    if dataset is None:
        return Withdrawals(lists)
    paths = _not_compared(dataset, lists)
    hits = _hits(dataset, lists, paths) if lists else {}
    fresh = {shard_of(path) for path in paths}
    recorded = withdrawn_rows(dataset, [shard for shard in marked if shard in fresh])
    returned = {
        shard for shard, rows in recorded.items() if any(note and not lists.still_hold(note) for note in rows.values())
    }
    return Withdrawals(lists, hits, frozenset(returned))


def has_withdrawn(state: ShardState) -> bool:
    """Whether rows of a committed shard are withdrawn."""
    decide = state.provenance.decide_fingerprint
    return decide != without_withdrawn(decide)


def withdrawn_rows(dataset: CuratedDataset, shards: Sequence[str]) -> dict[str, dict[int, str | None]]:
    """By shard, the rows that were withdrawn, each with its note.

    Raises:
        InputError: an annotations file cannot be read.
    """
    found: dict[str, dict[int, str | None]] = defaultdict(dict)
    paths = [file.path for files in dataset.files(shards).values() for file in files.annotations]
    for path, table in _read(dataset, paths, ["row", "reason", "note"]):
        table = table.filter(pc.equal(table["reason"], Reason.WITHDRAWN))
        found[shard_of(path)].update(zip(table["row"].to_pylist(), table["note"].to_pylist(), strict=True))
    return found


def shard_of(path: str) -> str:
    """The shard of a file of a table."""
    return path.partition("/")[0].partition("=")[2]


def compared(dataset: CuratedDataset, lists: Lists) -> None:
    """Put on record that every row of the dataset, as opened or last committed to, was compared with the lists."""
    now = {"lists": lists.digest, "version": dataset.versions()[ANNOTATIONS]}
    last = _last_compared(dataset)
    if last.get("lists") != lists.digest:  # a run that died may have withdrawn rows, and not have come to this
        dataset.remove_pages()
    if last != now:
        dataset.write_run_file(FOLDER, COMPARED, now)


def _last_compared(dataset: CuratedDataset) -> dict[str, Any]:
    fs, root = connect(dataset.output, dataset.options)

    def read() -> dict[str, Any]:
        fs.invalidate_cache()
        try:
            content = json.loads(fs.cat_file(f"{root}/_runs/{FOLDER}/{COMPARED}"))
        except (FileNotFoundError, ValueError):  # nothing compared yet, or cut short by its writer's death
            return {}
        return content if isinstance(content, dict) else {}

    with blamed(f"{dataset.output}: what its rows were last compared with cannot be read"):
        return persist(read)


def _not_compared(dataset: CuratedDataset, lists: Lists) -> list[str]:
    """Annotations files that were not compared with these lists yet."""
    paths, last = dataset.annotation_paths(), _last_compared(dataset)
    if last.get("lists") != lists.digest:
        return paths
    if last.get("version") == dataset.versions()[ANNOTATIONS]:
        return []
    try:
        known = set(dataset.annotation_paths(last["version"]))
    except (DatasetError, KeyError, TypeError):  # its log is gone: nothing says what was compared
        return paths
    return [path for path in paths if path not in known]


def _hits(dataset: CuratedDataset, lists: Lists, paths: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """By shard, the rows that are on a list."""
    hits: dict[str, tuple[int, ...]] = {}
    for path, table in _read(dataset, paths, ["row", "url", "key"]):
        columns = (table[name].to_pylist() for name in ("row", "url", "key"))
        if rows := tuple(row for row, url, key in zip(*columns, strict=True) if lists.hold(url, key)):
            hits[shard_of(path)] = (*hits.get(shard_of(path), ()), *rows)
    return hits


def _read(dataset: CuratedDataset, paths: Sequence[str], columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    """Some columns of annotations files, a few files at a time."""

    def read(path: str) -> pa.Table:
        url = f"{dataset.output}/{DIRECTORIES[ANNOTATIONS]}/{path}"
        return read_parquet(url, dataset.options, lambda parquet: parquet.read(columns, use_threads=False))

    with ThreadPoolExecutor(_THREADS) as pool:
        for n in range(0, len(paths), 4 * _THREADS):
            chunk = paths[n : n + 4 * _THREADS]
            yield from zip(chunk, pool.map(read, chunk), strict=True)


# --- an input ---


def rows_named(
    lists: Lists, file: InputFile, footer: Footer, options: Mapping[str, Any], pauses: Sequence[float] = PAUSES
) -> tuple[int, ...]:
    """The rows of an input file that are on a list. Of its columns URL and key are read.

    Raises:
        InputError: it has neither column that lists are given for, or cannot be read.
    """
    if not lists:
        return ()
    layout = footer.layout
    if not (lists.urls and layout.url) and not (lists.keys and layout.key):
        raise InputError(
            f"{file.path}: has no column to compare with the lists of what is withdrawn; name it with "
            "input.columns.url or input.columns.key"
        )
    names = read_names(file, footer, options, pauses)
    return tuple(row.row for row in names if lists.hold(row.url, row.key))
