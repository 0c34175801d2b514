"""The books of an ingest: lists cut into shards that are known by their content, and every URL accounted for.

A shard's file is named by what it holds, `<rows>-<digest of its first row>-<digest of all rows>.parquet`, and is there
only when it is whole: it is written elsewhere and moved. So a listing of the output says what is done, and nothing else
is asked. A list that has grown keeps the shards it had, wherever they now stand in it; what is new is cut into shards
of its own. A shard that the list no longer has moves to `_stale/`, where no reader looks.

    <output>/<shard>.parquet        a row for every URL: its image, or what went wrong
    <output>/_ingest/settings.json  what all of them were made with
    <output>/_ingest/report.json    the last run's account
    <output>/_stale/                shards of rows that the list has no longer, as they were
    <output>/_attempts/             shards being fetched
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from capfilt.errors import DatasetError, InputError, SpecError
from capfilt.inputs import Opened, is_local
from capfilt.lists import Columns, ListFile, columns_of, find_lists, read_list
from capfilt.spec import IngestSpec
from capfilt.stores import blamed, connect, persist

COUNTS = b"capfilt.ingest"
"""Key of a shard's own account, in its file's footer."""

SUCCESS = "success"

_FOLDER, _STALE, ATTEMPTS = "_ingest", "_stale", "_attempts"
_NAME = re.compile(r"(\d+)-([0-9a-f]{8})-([0-9a-f]{32})(?:-(\d+))?\.parquet")
_FOOTER_THREADS = 16

SICK_SHARD = 100
"""Rows from which on a shard's failures are taken for those of the network that fetched it."""


# --- shards ---


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


def look_at_lists(spec: IngestSpec) -> dict[ListFile, Columns]:
    """The files of a spec's lists and their columns; what lies in the output is no list, though it has URLs.

    Raises:
        InputError: a list cannot be used; see capfilt.lists.
    """
    files = [file for file in find_lists(spec.urls) if not file.path.startswith(spec.output.rstrip("/") + "/")]
    if not files:
        raise InputError(f"every file of urls.paths lies in the output, {spec.output}; name others")
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        return dict(zip(files, pool.map(lambda file: columns_of(file, spec.urls), files), strict=True))


# --- accounts ---


@dataclass(frozen=True)
class Account:
    """What became of URLs.

    Attributes:
        statuses: rows by img2dataset's status: success, failed_to_download, failed_to_resize.
        errors: rows that failed, by what was wrong; the most frequent ones of each shard.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """Accounted for."""
        return sum(self.statuses.values())

    @property
    def failed(self) -> int:
        """Rows without an image."""
        return self.rows - self.statuses[SUCCESS]

    def __add__(self, other: Account) -> Account:
        return Account(self.statuses + other.statuses, self.errors + other.errors)

    def over(self, fraction: float) -> bool:
        """Whether more failed than is tolerated."""
        return self.failed > fraction * self.rows

    def to_json(self) -> str:
        """For a footer."""
        return json.dumps({"statuses": self.statuses, "errors": dict(self.errors.most_common(100))}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Account:
        """Of a footer."""
        said = json.loads(text)
        return cls(Counter(said["statuses"]), Counter(said["errors"]))


_HOLES = re.compile(r"""'[^']*'|"[^"]*"|\S+(?= is refused)|(?<=refused: )\S+|\b\d[\d.,]*\b""")


def kind_of_error(message: str) -> str:
    """An error's message without what differs from URL to URL, so that its like can be counted."""
    kept = re.match(r"HTTP Error \d+", message)
    return (kept[0] if kept else re.sub(r"\s+", " ", _HOLES.sub("…", message)).strip())[:120] or "no message"


# --- the output ---


class Store:
    """The output of an ingest.

    Raises:
        StoreError: from every method, where the store refuses or keeps failing.
    """

    def __init__(self, output: str, options: Mapping[str, Any]) -> None:
        self.output, self.options = output, options
        self.fs, self.root = connect(output, options)
        self.local = is_local(self.fs)

    def _path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    # --- shards ---

    def names(self) -> set[ShardName]:
        """Every shard that is there, by the listing."""
        with blamed(f"{self.output}: cannot be listed"):
            self.fs.invalidate_cache()
            entries = persist(lambda: self.fs.ls(self.root, detail=False)) if self.fs.exists(self.root) else []
        parsed = (ShardName.parse(str(entry).rstrip("/").rpartition("/")[2]) for entry in entries)
        return {name for name in parsed if name}

    def shards(self) -> dict[ShardName, Account | None]:
        """Every shard that is there, and its account; None where its file cannot be read as what its name says."""
        names = sorted(self.names())
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            return dict(zip(names, pool.map(self._account, names), strict=True))

    def _account(self, name: ShardName) -> Account | None:
        opened = Opened(f"{self.output}/{name.file}", self.options)
        try:
            with opened as parquet:
                account = Account.from_json(parquet.metadata.metadata[COUNTS])
                return account if account.rows == parquet.metadata.num_rows == name.rows else None
        except Exception as error:
            if opened.failed is not None:
                with blamed(f"{self.output}/{name.file}: cannot be read"):
                    raise opened.failed from error
            return None  # cut short, or another's

    def publish(self, local: str, name: ShardName) -> None:
        """Make a file that is whole the shard's own, at once."""
        with blamed(f"{self.output}: cannot be written"):
            if self.local:
                Path(local).replace(self._path(name.file))
            else:  # which shows nothing of it before all of it has come
                persist(lambda: self.fs.put_file(local, self._path(name.file)))

    def retire(self, names: Iterable[ShardName]) -> None:
        """Move shards to `_stale/`."""
        with blamed(f"{self.output}: cannot be written"):
            for name in names:
                self.fs.makedirs(self._path(_STALE), exist_ok=True)
                persist(lambda name=name: self.fs.mv(self._path(name.file), self._path(_STALE, name.file)))  # type: ignore[misc]

    def clear_attempts(self) -> None:
        """Remove what killed runs left; for whoever holds the output alone."""
        with blamed(f"{self.output}: cannot be written"):
            self.fs.makedirs(self.root, exist_ok=True)
            if self.fs.exists(self._path(ATTEMPTS)):
                self.fs.rm(self._path(ATTEMPTS), recursive=True)

    # --- records ---

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Make sure that what is there was made with these settings; nothing being there is fine.

        Raises:
            SpecError: naming each that differs.
            DatasetError: the record cannot be read.
        """
        before = self._read("settings.json")
        if before is None:
            return
        now = json.loads(json.dumps(settings))
        differ = [
            f"{name} was {was!r} and is {now.get(name)!r}" for name, was in before.items() if was != now.get(name)
        ]
        if differ:
            raise SpecError(
                f"{self.output}: its shards were made with other settings: {'; '.join(differ)}. Set these back, or "
                "give another output"
            )

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a record."""
        text = json.dumps(value, indent=1, sort_keys=True).encode()
        with blamed(f"{self.output}: cannot be written"):
            self.fs.makedirs(self._path(_FOLDER), exist_ok=True)
            temporary = self._path(_FOLDER, f".{name}") if self.local else self._path(_FOLDER, name)
            persist(lambda: self.fs.pipe_file(temporary, text))
            if self.local:
                Path(temporary).replace(self._path(_FOLDER, name))

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._path(_FOLDER, name)
        with blamed(f"{self.output}: cannot be read"):
            try:
                text = persist(lambda: self.fs.cat_file(path))
            except FileNotFoundError:
                return None
        try:
            value: dict[str, Any] = json.loads(text)
        except ValueError:
            raise DatasetError(
                f"{self.output}/{_FOLDER}/{name}: not readable; remove it, or give another output"
            ) from None
        return value


# --- plans ---


@dataclass
class Plan:
    """What a run would do.

    Attributes:
        files: of the lists.
        rows, shards: of the lists. done: of them, accounted for already.
        again: shards that were fetched, see `unsettled`; stale: that the list no longer has.
    """

    files: int
    rows: int = 0
    shards: int = 0
    done_rows: int = 0
    done: int = 0
    again: int = 0
    stale: int = 0

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.rows:,} URLs in {self.files:,} lists"
        left = self.shards - self.done
        yield f"fetch {self.rows - self.done_rows:,} URLs, in {left:,} shards" if left else "nothing to fetch"
        if self.again:
            yield f"of these, {self.again:,} shards again: too many of their URLs failed, or their files are damaged"
        yield f"leave {self.done_rows:,} URLs, in {self.done:,} shards: on record"
        if self.stale:
            yield f"move {self.stale:,} shards to {_STALE}/: the list no longer has their rows as they were"


def unsettled(there: Mapping[ShardName, Account | None], fraction: float) -> set[ShardName]:
    """Shards to fetch again: files that cannot be read, and those of which more than this fraction failed.

    Of a few rows that says little, of a row that kills whoever fetches it nothing; so shards of less than SICK_SHARD
    rows are left as they are, unless the output as a whole is over.
    """
    accounts = [account for account in there.values() if account]
    whole = sum(account.failed for account in accounts) > fraction * sum(account.rows for account in accounts)
    return {
        name
        for name, account in there.items()
        if account is None or (account.over(fraction) and (whole or name.rows >= SICK_SHARD))
    }


def make_plan(spec: IngestSpec) -> Plan:
    """Read the lists, and the output's listing and footers; say what a run would do.

    Raises:
        InputError: a list cannot be used.
        SpecError: the output was made with other settings.
    """
    files = list(look_at_lists(spec))
    store = Store(spec.output, spec.output_options)
    store.check_settings(spec.settings)
    there = store.shards()
    plan = Plan(len(files))
    again = unsettled(there, spec.max_error_fraction)
    wanted: set[ShardName] = set()
    for shard in cut_lists(spec, files, there, wanted):
        plan.shards += 1
        plan.rows += shard.name.rows
        if shard.name in there.keys() - again:
            plan.done += 1
            plan.done_rows += shard.name.rows
        plan.again += shard.name in again
    plan.stale = len(there.keys() - wanted)
    return plan


def describe(spec: IngestSpec) -> Iterator[str]:
    """What a look at a spec's lists and output finds, for people; no list is read to its end.

    Raises:
        InputError, SpecError: as :func:`make_plan`.
    """
    kinds: dict[tuple[str, Columns], list[str]] = {}
    for file, columns in look_at_lists(spec).items():
        kinds.setdefault((file.format, columns), []).append(file.path)
    for (format_, columns), paths in kinds.items():
        found = f"url={columns.url} caption={columns.caption}"
        yield f"lists: {len(paths):,} of {format_}, {found}; the first is {paths[0]}"
    Store(spec.output, spec.output_options).check_settings(spec.settings)
    if spec.download.allow_private:
        yield "download.allow_private: the lists may have this machine's and its network's own addresses asked"
