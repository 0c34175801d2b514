"""The rows of one version of a dataset, in order of (shard, row), cut into the files of an export, and reading them.

The cut follows from the footers of the version's files alone, so an export that was killed finds the same files again.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.dataset import CuratedDataset, DataFile
from capfilt.errors import DatasetError
from capfilt.export.choice import Caption, Choice
from capfilt.fragments import row_group_rows
from capfilt.inputs import read_parquet
from capfilt.schema import SHARD

_THREADS = 16
_EXTENSIONS = {"jpeg": "jpg", "tiff": "tif"}
_COLUMNS = ("row", "key", "url", "format", "width", "height", "image_sha256", "image", "text", "captions")


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of one of the dataset's files; `size` is its uncompressed bytes."""

    url: str
    number: int
    rows: int
    size: int


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows [start, stop) of one row group."""

    url: str
    row_group: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Shard:
    """What one file of the export holds: `rows` rows, the first of which is the export's row number `first`."""

    number: int
    first: int
    slices: tuple[Slice, ...]

    @property
    def rows(self) -> int:
        """Rows of all its slices."""
        return sum(one.stop - one.start for one in self.slices)


@dataclass(frozen=True, slots=True)
class Example:
    """A row of the export.

    Attributes:
        number: from 0, over the whole export.
        shard, row: of the curated dataset, and so of its input.
        image: bytes as they came.
        chosen: the text that the rule takes.
        captions: every kept text.
    """

    number: int
    shard: str
    row: int
    key: str | None
    url: str | None
    format: str
    width: int
    height: int
    sha256: str
    image: bytes
    chosen: Caption
    captions: tuple[Caption, ...]

    def about(self) -> dict[str, Any]:
        """All but image and texts, by the names that every format uses."""
        names = ("key", "url", "shard", "row", "width", "height", "format", "sha256")
        return {name: getattr(self, name) for name in names} | {
            "source": self.chosen.source,
            "captioner": self.chosen.captioner,
            "itm": self.chosen.itm,
        }

    @property
    def file_name(self) -> str:
        """For its image: the row number, so that names are in order, and what the bytes are."""
        kind = self.format.lower()
        return f"{self.number:09d}.{_EXTENSIONS.get(kind, kind)}"


def captions_of(example: Example) -> list[dict[str, Any]]:
    """Every kept text, as plain containers."""
    return [asdict(caption) for caption in example.captions]


# --- cutting ---


def row_groups(dataset: CuratedDataset, version: int | None, options: Mapping[str, Any]) -> tuple[int, list[RowGroup]]:
    """A version of the pairs: its number, and its row groups in order of shard and row.

    Raises:
        DatasetError: there is no such version.
        InputError: a file of it cannot be read; vacuum may have taken it.
    """
    number, urls = dataset.pair_files(version)

    def groups(url: str) -> list[RowGroup]:
        def look(parquet: pq.ParquetFile) -> list[RowGroup]:
            sizes = (parquet.metadata.row_group(n).total_byte_size for n in range(parquet.num_row_groups))
            return [
                RowGroup(url, n, rows, size)
                for n, (rows, size) in enumerate(zip(row_group_rows(parquet), sizes, strict=True))
                if rows
            ]

        return read_parquet(url, options, look)

    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(groups, sorted(urls, key=_place))
        return number, [group for of_file in found for group in of_file]


def _place(url: str) -> tuple[str, int, str]:
    """Where a file's rows stand, by its name; a shard that another tool rewrote is one file, as a rule."""
    return _shard_of(url), (DataFile(url, 0, 0).span or (0, 0))[0], url


def _shard_of(url: str) -> str:
    return posixpath.basename(posixpath.dirname(url)).removeprefix(f"{SHARD}=")


def cut(groups: Iterable[RowGroup], max_bytes: int, max_rows: int | None) -> list[Shard]:
    """Shards of about `max_bytes` and at most `max_rows`, a row each at least, that cover the row groups in order.

    A row counts as the mean of its row group.
    """
    shards: list[Shard] = []
    slices: list[Slice] = []
    first = rows = 0
    size = 0.0

    def close() -> None:
        nonlocal first, rows, size
        shards.append(Shard(len(shards), first, tuple(slices)))
        slices.clear()
        first, rows, size = first + rows, 0, 0.0

    for group in groups:
        start, each = 0, group.size / group.rows
        while start < group.rows:
            room = group.rows - start
            if each:
                room = min(room, max(int((max_bytes - size) / each), 0 if rows else 1))
            if max_rows is not None:
                room = min(room, max_rows - rows)
            if not room:
                close()
                continue
            slices.append(Slice(group.url, group.number, start, start + room))
            start, rows, size = start + room, rows + room, size + room * each
    if rows:
        close()
    return shards


def digest(shards: Sequence[Shard]) -> str:
    """What an export is cut into, in 16 hex digits."""
    hashed = hashlib.blake2b(digest_size=8)
    for shard in shards:
        hashed.update(json.dumps(asdict(shard)).encode())
    return hashed.hexdigest()


# --- reading ---


def read_examples(shard: Shard, options: Mapping[str, Any], choice: Choice) -> Iterator[list[Example]]:
    """A shard's rows in order, those of a slice at a time.

    Raises:
        DatasetError: rows of the dataset are not in order: another tool has rewritten them.
        InputError: a file cannot be read; vacuum may have taken it.
    """
    number, last = shard.first, ("", -1)
    for one in shard.slices:
        table = read_parquet(one.url, options, partial(_row_group, number=one.row_group))
        examples = list(_examples(table.slice(one.start, one.stop - one.start), _shard_of(one.url), number, choice))
        del table
        for example in examples:
            last = in_order(last, (example.shard, example.row), one.url)
        number += len(examples)
        yield examples


def _row_group(parquet: pq.ParquetFile, number: int) -> pa.Table:
    return parquet.read_row_group(number, columns=list(_COLUMNS))


def in_order(before: tuple[str, int], now: tuple[str, int], where: str) -> tuple[str, int]:
    """`now`, which must come after `before`: so no row is written twice."""
    if now <= before:
        raise DatasetError(
            f"{where}: row {now[1]} of {now[0]} comes after row {before[1]} of {before[0]}: another tool rewrote the "
            "files of this version out of order. Export an earlier version (`version: N`)"
        )
    return now


def _examples(table: pa.Table, shard: str, first: int, choice: Choice) -> Iterator[Example]:
    columns = (table[name].to_pylist() for name in _COLUMNS)
    for n, (row, key, url, kind, width, height, sha256, image, text, captions) in enumerate(zip(*columns, strict=True)):
        kept = tuple(Caption(one["text"], one["source"], one["captioner"], one["itm"]) for one in captions)
        chosen = choice.of(kept, text, sha256)
        yield Example(first + n, shard, row, key, url, kind, width, height, sha256, image, chosen, kept)
