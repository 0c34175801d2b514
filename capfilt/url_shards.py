"""URL lists cut into shards that are known by their content.

A shard's name is what it holds: how many rows, the digest of the first, the digest of all. So a list that has grown
keeps the shards it had, wherever they now stand in it; what is new is cut into shards of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from capfilt.lists import ListFile, read_list
from capfilt.spec import IngestSpec

_NAME = re.compile(r"(\d+)-([0-9a-f]{8})-([0-9a-f]{32})(?:-(\d+))?\.parquet")


@dataclass(frozen=True, order=True)
class ShardName:
    """What a shard holds.

    Attributes:
        first, digest: of the first row, and of all.
        copy: 0; n of the nth repetition of the very same rows.
    """

    rows: int
    first: str
    digest: str
    copy: int = 0

    def __str__(self) -> str:
        return f"{self.rows:06d}-{self.first}-{self.digest}" + (f"-{self.copy}" if self.copy else "")

    @property
    def file(self) -> str:
        """Its name in the output."""
        return f"{self}.parquet"

    @classmethod
    def parse(cls, file: str) -> ShardName | None:
        """The shard of a file's name; None of a file that is none of ours."""
        said = _NAME.fullmatch(file)
        return cls(int(said[1]), said[2], said[3], int(said[4] or 0)) if said else None


@dataclass(frozen=True)
class Shard:
    """Rows to fetch, as img2dataset's shards have them."""

    name: ShardName
    table: pa.Table

    def halves(self) -> tuple[Shard, Shard]:
        """Two shards of its rows; of two rows at least."""
        middle = self.name.rows // 2
        first, second = self.table.slice(0, middle), self.table.slice(middle)
        return Shard(name_rows(_digests(first)), first), Shard(name_rows(_digests(second)), second)


def name_rows(digests: Sequence[bytes]) -> ShardName:
    """The name of the shard of rows with these digests."""
    whole = hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()
    return ShardName(len(digests), digests[0].hex()[:8], whole)


def _digests(table: pa.Table) -> list[bytes]:
    columns = [column.to_pylist() for column in table.columns]
    return [hashlib.blake2b(repr(row).encode(), digest_size=16).digest() for row in zip(*columns, strict=True)]


class _Ahead:
    """The rows of a list, of which some are looked at before any is taken."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self._held: pa.Table | None = None
        self.digests: list[bytes] = []

    def has(self, count: int) -> bool:
        """Whether so many are left."""
        while len(self.digests) < count:
            table = next(self._tables, None)
            if table is None:
                return False
            self.digests += _digests(table)
            self._held = table if self._held is None else pa.concat_tables([self._held, table])
        return True

    def take(self, count: int) -> Shard:
        """The next `count`, as a shard."""
        assert self._held is not None
        shard = Shard(name_rows(self.digests[:count]), self._held.slice(0, count))
        self._held, self.digests = self._held.slice(count), self.digests[count:]
        return shard


def cut(tables: Iterator[pa.Table], known: Iterable[ShardName], shard_rows: int) -> Iterator[Shard]:
    """Cut a list into shards: those that are known, wherever its rows are theirs; else of `shard_rows` at the most."""
    rows = _Ahead(tables)
    beginning: dict[str, list[ShardName]] = {}
    for name in sorted(known, reverse=True):  # the longest first
        beginning.setdefault(name.first, []).append(name)

    def found(at: int) -> ShardName | None:
        for name in beginning.get(rows.digests[at].hex()[:8], ()):
            end = at + name.rows
            if rows.has(end) and name_rows(rows.digests[at:end]).digest == name.digest:
                return name
        return None

    fresh = 0
    while rows.has(fresh + 1):
        match = found(fresh)
        if match is None and fresh < shard_rows:
            fresh += 1
            continue
        if fresh:
            yield rows.take(fresh)
            fresh = 0
        if match is not None:
            yield rows.take(match.rows)
    if fresh:
        yield rows.take(fresh)


def cut_lists(
    spec: IngestSpec, files: Iterable[ListFile], known: Iterable[ShardName], wanted: set[ShardName]
) -> Iterator[Shard]:
    """The shards of all lists, each put into `wanted` when it comes.

    Raises:
        InputError: see capfilt.lists.read_list.
    """
    known = list(known)
    for file in files:
        tables = read_list(file, spec.urls, spec.download.compute_hash)
        for shard in cut(tables, known, spec.shard_rows):
            yield place(shard, wanted)


def place(shard: Shard, wanted: set[ShardName]) -> Shard:
    """Put a shard among those wanted; the very same rows again as a copy of their own: every row is accounted for."""
    name = shard.name
    while name in wanted:
        name = replace(name, copy=name.copy + 1)
    wanted.add(name)
    return replace(shard, name=name)
