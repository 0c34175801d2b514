"""The curated dataset: three Delta tables under one output, which only a run's driver commits to.

    <output>/annotations        one row per input row; this table's log is the state of the dataset
    <output>/pairs              one row per kept image
    <output>/_runs/quarantine   one row per unusable image
    <output>/_runs/<run>/       what a run records of itself; the folder registers the run

Workers write Parquet files into the tables' directories, as `shard=<shard>/<start>-<stop>-<run>-<attempt>.parquet`,
the three files of one attempt under one name that no other attempt uses. A file is part of the dataset once a commit
names it. A commit names all files of its shards, and those that are there already stay: a shard that is decided anew
keeps the pairs that are the same. Every commit takes the output's next *transaction number* and moves all three tables
to it, annotations first; version n of one table goes with version n of the others.

Two drivers. A commit carries its number as a Delta application transaction, so one that does not start from the newest
fails (ConflictError). Delta alone would let two appends of one shard both pass.

A driver's death. The annotations commit carries, in its commit info, what is to be done to the other two tables (the
intent). Whoever opens the output for writing next finishes that, without recomputing anything.

Vacuum deletes files that no version names. Those of another driver's unfinished work must not be among them if it can
still commit them, so: a driver opens the output, which fixes the number it starts from, and registers its run after
that, before its workers write. Vacuum (1) lists the registered runs, (2) marks them closed, (3) makes an empty commit,
the fence, and (4) deletes the unnamed files of the listed runs. A listed run opened before the fence: its next commit
conflicts. A later run may commit files that an earlier one left, but none of a run marked closed when it looks, which
must be after it opened: if it opened before the fence it conflicts, if after, it sees the marks. So nothing deleted can
be committed, and a run that is not listed loses nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import time
import uuid
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from capfilt.damage import data_files_blamed, of_log
from capfilt.errors import ConflictError, DatasetError
from capfilt.logs import event
from capfilt.records import RUN, RunRecord, read_records
from capfilt.redaction import redacted
from capfilt.schema import ANNOTATIONS, PAIRS, PROVENANCE, QUARANTINE, SHARD, Reason, table_schema
from capfilt.stores import blamed, connect, delta_options, one_line, persist, refuses_to_overwrite, transient

DIRECTORIES = {ANNOTATIONS: "annotations", PAIRS: "pairs", QUARANTINE: "_runs/quarantine"}
"""Where each table lies under the output."""

CLOCK_SECONDS = 30.0
"""How long a vacuum waits for a clock that is behind its store's."""

_APP = "capfilt"
_SETTLED = "capfilt-settled"  # its number is that of the transaction after which copies had been looked for
_FOLLOWERS = (PAIRS, QUARANTINE)
_CLOSED = "closed"
_RESERVED = {"quarantine", "receipts", "lease", "withdrawn", _CLOSED}  # folders of _runs/ that are no run's
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_FILE_NAME = re.compile(r"(?P<start>\d+)-(?P<stop>\d+)-(?P<run>.+)-[^-]+\.parquet")
_RUNS_AT_ONCE = 32
_FOREVER = "interval 36500 days"


@dataclass(frozen=True)
class Counts:
    """Rows by status."""

    kept: int = 0
    dropped: int = 0
    errors: int = 0

    @property
    def rows(self) -> int:
        """All of them."""
        return self.kept + self.dropped + self.errors

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.kept + other.kept, self.dropped + other.dropped, self.errors + other.errors)


@dataclass(frozen=True)
class DataFile:
    """A Parquet file a worker wrote.

    Attributes:
        path: relative to the table's directory.
        rows: in all.
        size: bytes.
        errors, kept: rows of these statuses; of annotations.
    """

    path: str
    rows: int
    size: int
    errors: int = 0
    kept: int = 0

    @property
    def span(self) -> tuple[int, int] | None:
        """The rows [start, stop) of the input that it is about, as its name says; None where another tool wrote it."""
        match = _FILE_NAME.fullmatch(self.path.rpartition("/")[2])
        return (int(match["start"]), int(match["stop"])) if match else None


@dataclass(frozen=True)
class Provenance:
    """What a shard was made from and with; at most ~64 characters each. `run` is the last of those that wrote it."""

    input_id: str
    caption_fingerprint: str
    score_fingerprint: str
    decide_fingerprint: str
    run: str


@dataclass(frozen=True)
class ShardCommit:
    """A whole shard, to replace whatever the dataset holds under its name. Files that it holds already stay.

    Attributes:
        shard: letters, digits, `.`, `_` and `-`.
        rows: of the input file.
        counts: of those rows.
        annotations: at least one file, which may be without rows.
        pairs, quarantine: may be empty.
    """

    shard: str
    rows: int
    counts: Counts
    provenance: Provenance
    annotations: tuple[DataFile, ...]
    pairs: tuple[DataFile, ...] = ()
    quarantine: tuple[DataFile, ...] = ()

    def check(self) -> None:
        """Check row conservation, and that the files lie where they should.

        Raises:
            DatasetError: naming the shard and what does not add up.
        """
        counts, annotated = self.counts, sum(file.rows for file in self.annotations)
        paired, quarantined = sum(file.rows for file in self.pairs), sum(file.rows for file in self.quarantine)
        files = (*self.annotations, *self.pairs, *self.quarantine)
        strays = [file.path for file in files if not file.path.startswith(f"{SHARD}={self.shard}/")]
        strays += [file.path for file in files if _run_of(file.path) is None]
        problem = None
        if not _NAME.fullmatch(self.shard):
            problem = "its name may hold letters, digits, '.', '_' and '-' only"
        elif not self.annotations:
            problem = "no annotations file; a shard without rows has one without rows"
        elif not self.rows == counts.rows == annotated:
            problem = f"{self.rows} rows in, {annotated} rows annotated, {counts.rows} counted ({counts})"
        elif counts.errors != sum(file.errors for file in self.annotations):
            problem = (
                f"{counts.errors} rows are errors, {sum(file.errors for file in self.annotations)} annotated as such"
            )
        elif counts.kept != (kept := sum(file.kept for file in self.annotations)):
            problem = f"{counts.kept} rows are kept, {kept} annotated as such"
        elif paired != counts.kept:
            problem = f"{counts.kept} rows kept, {paired} rows in pairs"
        elif quarantined > counts.errors:
            problem = f"{counts.errors} rows are errors, {quarantined} rows in quarantine"
        elif strays:
            problem = f"{strays[0]} has another shard's place, or no run in its name"
        if problem:
            raise DatasetError(f"shard {self.shard}: {problem}. Nothing was committed; report this bug")


@dataclass(frozen=True)
class ShardState:
    """What the log tells of a committed shard. `files` and `size` (bytes) are those of its annotations."""

    provenance: Provenance
    counts: Counts
    files: int
    size: int

    @property
    def rows(self) -> int:
        """Rows of the input file."""
        return self.counts.rows


@dataclass(frozen=True)
class ShardFiles:
    """The files that hold a committed shard, as the log tells."""

    annotations: tuple[DataFile, ...] = ()
    pairs: tuple[DataFile, ...] = ()
    quarantine: tuple[DataFile, ...] = ()


@dataclass(frozen=True)
class Version:
    """An entry of the dataset's history; `shards` is how many its commit wrote."""

    version: int
    time: datetime
    shards: int


class CuratedDataset:
    """The curated dataset at one output, as it was when opened or last committed to. Not for use across threads."""

    def __init__(self, output: str, options: Mapping[str, Any]) -> None:
        """Touches nothing; use :meth:`for_reading` or :meth:`for_writing`."""
        self.output = output.rstrip("/")
        self.options = dict(options)
        self._delta_options = delta_options(output, options)
        self._tables: dict[str, DeltaTable] = {}
        self._numbers: dict[str, tuple[int, int]] = {}  # by table, a version and its transaction number: see _number
        self._transaction: int | None = None  # the number this writer builds on; None for a reader

    @classmethod
    def for_reading(cls, output: str, options: Mapping[str, Any]) -> Self:
        """Open what is there. A commit that a driver left half done shows in the annotations only.

        Args:
            output: directory or URL.
            options: fsspec's storage options for it, without secrets.

        Raises:
            DatasetError: there is no dataset, or its tables are not capfilt's.
        """
        dataset = cls(output, options)
        for table in (*_FOLLOWERS, ANNOTATIONS):
            dataset._load(table)
        return dataset

    @classmethod
    def for_writing(cls, output: str, options: Mapping[str, Any]) -> Self:
        """Create what is missing, open, and finish what a dead driver left half done.

        Raises:
            DatasetError: the tables are not capfilt's, or do not belong together; or the store cannot keep one driver
                from overwriting another's commit.
            StoreError: the store refuses, or keeps failing.
        """
        dataset = cls(output, options)
        # Annotations last, here and below: where they exist the others do, and the others are never seen ahead of them.
        if not dataset._exists():
            if not refuses_to_overwrite(dataset.output, options):
                raise DatasetError(
                    f"{output}: its store overwrites even when asked not to (it does not know If-None-Match), so that "
                    "two runs would take each other's commits away; use a newer version of it, or another store"
                )
            for table in (*_FOLLOWERS, ANNOTATIONS):
                dataset._create(table)
        for table in (*_FOLLOWERS, ANNOTATIONS):
            dataset._load(table)
        dataset._transaction = dataset._number(ANNOTATIONS)
        dataset._recover(dataset._transaction)
        return dataset

    @classmethod
    def committed_in(cls, output: str, options: Mapping[str, Any]) -> dict[str, ShardState]:
        """What :meth:`committed` would say after opening; nothing if there is no dataset yet."""
        dataset = cls.if_any(output, options)
        return dataset.committed() if dataset else {}

    @classmethod
    def if_any(cls, output: str, options: Mapping[str, Any]) -> Self | None:
        """As :meth:`for_reading`; None if there is no dataset yet."""
        return cls.for_reading(output, options) if cls(output, options)._exists() else None

    # --- runs ---

    def register(self, run: str, record: Mapping[str, Any]) -> None:
        """Register a run, before its first worker starts, by writing its `run.json`. A run's id is used once."""
        self._writable()
        if not _NAME.fullmatch(run) or run in _RESERVED:
            raise DatasetError(f"run {run!r}: letters, digits, '.', '_' and '-' only, and none of {sorted(_RESERVED)}")
        self.write_run_file(run, RUN, record)

    def write_run_file(self, run: str, name: str, record: Mapping[str, Any]) -> None:
        """Write `_runs/<run>/<name>` as JSON, without secrets."""
        self._put(f"_runs/{run}/{name}", json.dumps(redacted(record), indent=2).encode())

    def remove_pages(self) -> None:
        """Delete the pages (.html) that runs left in their folders: they may show rows that are withdrawn by now."""
        for run in self._names("_runs") - _RESERVED:
            for name in self._names(f"_runs/{run}"):
                if name.endswith(".html"):
                    self._delete(f"_runs/{run}/{name}")

    def write_run_page(self, run: str, name: str, page: bytes) -> None:
        """Write `_runs/<run>/<name>` as it is."""
        self._put(f"_runs/{run}/{name}", page)

    def runs(self, last: int | None = None) -> list[RunRecord]:
        """What runs left on record, the newest first; all if `last` is None."""
        fs, root = self._filesystem()
        return read_records(self.output, self.options, fs, root, self._run_names()[:last])

    def each_run(self) -> Iterator[RunRecord]:
        """As :meth:`runs`, some at a time, as they are asked for."""
        fs, root = self._filesystem()
        names = self._run_names()
        for start in range(0, len(names), _RUNS_AT_ONCE):
            yield from read_records(self.output, self.options, fs, root, names[start : start + _RUNS_AT_ONCE])

    def _run_names(self) -> list[str]:
        return sorted(self._names("_runs") - _RESERVED, reverse=True)

    def record(self, run: str) -> RunRecord:
        """What one run left on record; one without details if nothing."""
        fs, root = self._filesystem()
        (found,) = read_records(self.output, self.options, fs, root, [run])
        return found

    def closed_runs(self) -> set[str]:
        """Runs whose uncommitted files no one may commit any more: vacuum may have deleted them."""
        return self._names(f"_runs/{_CLOSED}")

    # --- commits ---

    def committed(self) -> dict[str, ShardState]:
        """Every committed shard's state, from the log alone: no data file is opened.

        A shard whose log entries lack capfilt's statistics, or differ (another tool rewrote its files), is left out: it
        counts as pending, and committing it replaces those files.
        """
        actions = pa.table(self._tables[ANNOTATIONS].get_add_actions()).flatten()  # its own flatten is 15 times slower
        sums = ("num_records", "null_count.reason", "null_count.detail", "size_bytes")
        grouped = actions.group_by(f"partition.{SHARD}").aggregate(
            [(f"{side}.{name}", side) for name in PROVENANCE for side in ("min", "max")]
            + [(name, how) for name in sums for how in ("sum", "count")]
        )
        whole = pc.equal(grouped["size_bytes_count"], grouped["null_count.reason_count"])
        whole = pc.and_(whole, pc.equal(grouped["size_bytes_count"], grouped["null_count.detail_count"]))
        for name in PROVENANCE[:-1]:
            whole = pc.and_(whole, pc.equal(grouped[f"min.{name}_min"], grouped[f"max.{name}_max"]))
        grouped = grouped.filter(whole)  # null, which is to say unknown, is not whole
        columns = [f"partition.{SHARD}", *(f"{name}_sum" for name in sums), "size_bytes_count"]
        columns += [f"max.{name}_max" for name in PROVENANCE]
        once: dict[str, str] = {}  # 100,000 shards share a few fingerprints
        return {
            shard: ShardState(
                Provenance(*(once.setdefault(text, text) for text in texts)),
                Counts(kept, no_errors - kept, rows - no_errors),
                files,
                size,
            )
            for shard, rows, kept, no_errors, size, files, *texts in zip(
                *(grouped[c].to_pylist() for c in columns), strict=True
            )
        }

    def files(self, shards: Sequence[str]) -> dict[str, ShardFiles]:
        """The files of committed shards, in order of their rows, from the log alone."""
        found: dict[str, dict[str, list[DataFile]]] = {shard: {table: [] for table in DIRECTORIES} for shard in shards}
        for table, delta in self._tables.items():
            actions = _actions(delta, shards)
            kept, no_errors = (
                actions[f"null_count.{name}"].to_pylist() if table == ANNOTATIONS else [0] * len(actions)
                for name in ("reason", "detail")
            )
            columns = (
                actions[name].to_pylist() for name in (f"partition.{SHARD}", "path", "num_records", "size_bytes")
            )
            for shard, path, rows, size, k, n in zip(*columns, kept, no_errors, strict=True):
                errors = rows - n if table == ANNOTATIONS else 0
                found[shard][table].append(DataFile(path, rows, size, errors, k))
        return {
            shard: ShardFiles(
                **{table: tuple(sorted(of[table], key=lambda file: file.span or (0, 0))) for table in DIRECTORIES}
            )
            for shard, of in found.items()
        }

    def annotation_paths(self, version: int | None = None) -> list[str]:
        """The files of a version of the annotations, from the log alone; as opened if `version` is None.

        Raises:
            DatasetError: there is no such version.
        """
        return self._paths_of(ANNOTATIONS, version)[1]

    @property
    def settled(self) -> bool:
        """Whether copies were looked for over all that the dataset holds (see capfilt.duplicates)."""
        return self.generation == self._number(ANNOTATIONS)

    @property
    def generation(self) -> int:
        """Which of its commits last settled the dataset, 0 if none: rows scored since are later than any before."""
        return self._tables[ANNOTATIONS].transaction_version(_SETTLED) or 0

    @classmethod
    def settled_in(cls, output: str, options: Mapping[str, Any]) -> bool:
        """Whether the dataset at an output is settled; one that does not exist is."""
        dataset = cls.if_any(output, options)
        return dataset is None or dataset.settled

    def commit(self, shards: Sequence[ShardCommit], *, settles: bool = False) -> int:
        """Make whole shards part of the dataset, each in place of whatever it held under that name: all, or none.

        Args:
            settles: copies have been looked for over all of it. A commit of no shards leaves what was settled so.

        Returns:
            The version of the annotations that holds them.

        Raises:
            DatasetError: a shard's rows do not add up, or one comes twice. Nothing was committed.
            ConflictError: another driver committed since this one opened. Nothing was committed.
        """
        transaction = self._writable()
        for shard in shards:
            shard.check()
        names = [shard.shard for shard in shards]
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise DatasetError(f"shard {twice[0]}: twice in one commit. Nothing was committed; report this bug")
        if self._number(ANNOTATIONS) != transaction:
            raise self._conflict()
        if any(self._number(table) < transaction for table in _FOLLOWERS):
            self._recover(transaction)  # a store's error came between the stages of this driver's own last commit
        intent = {
            "transaction": transaction + 1,
            "id": uuid.uuid4().hex,
            "settles": settles or (not shards and self.settled),
            "shards": names,
            PAIRS: [(file.path, file.rows, file.size) for shard in shards for file in shard.pairs],
            QUARANTINE: [(file.path, file.rows, file.size) for shard in shards for file in shard.quarantine],
        }
        if not self._write(ANNOTATIONS, intent, [add for shard in shards for add in _annotation_adds(shard)]):
            raise self._conflict()
        self._transaction = transaction + 1
        version = self._tables[ANNOTATIONS].version()
        for table in _FOLLOWERS:
            self._roll_forward(table, intent)
        return version

    def vacuum(self, retain_hours: float | None = None, keep: Sequence[Mapping[str, int]] = ()) -> int:
        """Delete files that no version names, and with `retain_hours` those replaced longer ago than that.

        Stops every other run that is writing to the output (the module's docstring says how), and takes the caller's
        own uncommitted files, too. After it, if nothing was ever replaced or `retain_hours` is 0 and `keep` empty, a
        reader of a table's `shard=*/*.parquet` sees exactly the newest version.

        Args:
            retain_hours: None keeps every version readable.
            keep: versions, by table, of which no file is deleted, however old.

        Returns:
            Number of files deleted.

        Raises:
            ConflictError: another driver committed since this one opened. Nothing was deleted.
        """
        self._writable()
        runs = self._names("_runs") - _RESERVED
        mark = None
        for run in sorted(runs - self.closed_runs()):
            mark = f"_runs/{_CLOSED}/{run}"
            self._put(mark, b"")
        self.commit([])
        if mark:
            self._await_clock(mark)
        doomed = self.replaced(retain_hours, keep) if retain_hours is not None else []
        for table, delta in self._tables.items():
            unnamed = _vacuumable(delta, 0, full=True) - _vacuumable(delta, 0, full=False)
            doomed += [f"{DIRECTORIES[table]}/{path}" for path in unnamed if _run_of(path) in runs]
        return sum(self._delete(path) for path in doomed)

    def replaced(self, hours: float, keep: Sequence[Mapping[str, int]] = ()) -> list[str]:
        """Files there that were replaced so many hours ago or earlier; not those of the versions to keep, by table."""
        found = []
        for table, delta in self._tables.items():
            old = _vacuumable(delta, math.ceil(hours), full=False, keep=[version[table] for version in keep])
            if old:  # the log names for ever what it replaced
                found += [f"{DIRECTORIES[table]}/{path}" for path in sorted(old & self._there(table))]
        return found

    # --- reading ---

    def versions(self) -> dict[str, int]:
        """Delta version by table, as opened or last committed."""
        return {table: self._tables[table].version() for table in DIRECTORIES}

    def history(self, limit: int | None = None) -> list[Version]:
        """The newest versions of the annotations, newest first; all if `limit` is None, which reads the whole log."""
        return [
            Version(
                entry["version"],
                datetime.fromtimestamp(entry["timestamp"] / 1000, UTC),
                len(entry.get(_APP, {}).get("shards", ())),
            )
            for entry in persist(partial(self._connect(ANNOTATIONS).history, limit))  # an older object misnumbers them
        ]

    def annotations(self, version: int | None = None) -> Any:
        """The annotations as a pyarrow Dataset; as opened if `version` is None.

        Raises:
            DatasetError: there is no such version.
        """
        return self._read(ANNOTATIONS, version)

    def pairs(self, version: int | None = None) -> Any:
        """The pairs, as :meth:`annotations`."""
        return self._read(PAIRS, version)

    def pair_files(self, version: int | None = None) -> tuple[int, list[str]]:
        """A version of the pairs: its number, and the URLs of the files that hold it, sorted.

        Raises:
            DatasetError: there is no such version.
        """
        return self._files_of(PAIRS, version)

    def annotation_files(self, version: int | None = None) -> tuple[int, list[str]]:
        """A version of the annotations, as :meth:`pair_files`."""
        return self._files_of(ANNOTATIONS, version)

    def quarantine(self, version: int | None = None) -> Any:
        """The quarantine, as :meth:`annotations`."""
        return self._read(QUARANTINE, version)

    def reasons(self) -> dict[tuple[str, str | None], int]:
        """Rows by (status, reason), most first. Reads these two columns of every annotations file."""
        total: Counter[tuple[str, str | None]] = Counter()
        with data_files_blamed(self.output, ANNOTATIONS, self.versions()[ANNOTATIONS]):
            for batch in self.annotations().to_batches(columns=["status", "reason"]):
                groups = pa.table(batch).group_by(["status", "reason"]).aggregate([([], "count_all")])
                for row in groups.to_pylist():
                    total[row["status"], row["reason"]] += row["count_all"]
        return dict(total.most_common())

    # --- one table ---

    def _files_of(self, table: str, version: int | None) -> tuple[int, list[str]]:
        number, paths = self._paths_of(table, version)
        return number, sorted(f"{self._uri(table)}/{path}" for path in paths)

    def _paths_of(self, table: str, version: int | None) -> tuple[int, list[str]]:
        delta = self._tables[table] if version is None else self._at(table, version)
        paths: list[str] = pa.table(delta.get_add_actions())["path"].to_pylist()  # file_uris say %20 for a space
        return delta.version(), paths

    def as_of(self, version: int) -> Self:
        """The dataset for reading, as it was at a version of its pairs.

        Raises:
            DatasetError: there is no such version; or its annotations cannot be told, since another tool has maintained
                one of the tables.
        """
        if version == self._tables[PAIRS].version():
            return self
        then = type(self)(self.output, self.options)
        then._tables = {table: self._at(table, version) for table in DIRECTORIES}
        if len({then._number(table) for table in DIRECTORIES}) > 1:
            raise DatasetError(
                f"{self.output}: version {version} of the pairs goes with another version of the annotations: another "
                "tool has maintained one of the tables. Take a version from before that"
            )
        return then

    def _uri(self, table: str) -> str:
        return f"{self.output}/{DIRECTORIES[table]}"

    def _exists(self) -> bool:
        with blamed(f"{self.output}: cannot be looked at"):
            return persist(lambda: DeltaTable.is_deltatable(self._uri(ANNOTATIONS), self._delta_options))

    def _is_ingest(self) -> bool:
        fs, root = self._filesystem()
        with blamed(f"{self.output}: cannot be looked at"):
            return bool(persist(lambda: fs.exists(f"{root}/_ingest/report.json")))

    def _connect(self, table: str, version: int | None = None) -> DeltaTable:
        return persist(lambda: DeltaTable(self._uri(table), version=version, storage_options=self._delta_options))

    def _load(self, table: str) -> None:
        """Take up a table's newest version, if it is one of ours."""
        try:
            delta = self._connect(table)
        except TableNotFoundError as error:
            hint = "`capfilt run` with this output makes one"
            if self._is_ingest():
                hint = "it is an ingest's: _ingest/report.json says what became of every URL; curate it into another"
            elif table != ANNOTATIONS and self._exists():
                hint = "the Delta table in annotations/ is another's, or this one was removed; give another output"
            raise DatasetError(f"{self._uri(table)}: no curated dataset there; {hint} ({one_line(error)})") from error
        except (DeltaError, OSError) as error:
            fs, root = self._filesystem()
            if not transient(error) and (damage := of_log(fs, f"{root}/{DIRECTORIES[table]}")):
                raise DatasetError(
                    f"{self._uri(table)}: cannot be opened: {damage}. Restore that file from a copy, or give another "
                    "output; the data files are not touched"
                ) from error
            raise DatasetError(
                f"{self._uri(table)}: cannot be opened: {one_line(error)}. What is committed stays; mend the cause, if "
                "it does not pass, and run again to resume"
            ) from error
        if delta.schema() != _schema(table) or delta.metadata().partition_columns != [SHARD]:
            raise self._not_this(table, delta)
        self._tables[table] = delta
        self._numbers.pop(table, None)

    def _not_this(self, table: str, delta: DeltaTable) -> DatasetError:
        """A table whose columns are not this version's is left as it is: its rows lack what new ones have."""
        if delta.transaction_version(_APP) is None:
            return DatasetError(f"{self._uri(table)}: a Delta table, but not capfilt's {table}; give another output")
        ours, theirs = ({field.name: field for field in of.fields} for of in (_schema(table), delta.schema()))
        names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        return DatasetError(
            f"{self._uri(table)}: written by another version of capfilt, whose {table} differ in {', '.join(names)}. "
            "Curate into a new output, or use the version that wrote this one"
        )

    def _create(self, table: str) -> None:
        """Make an empty table, unless another driver is faster."""
        # A pretraining run names the version it learnt from: versions stay until vacuum is told how many hours to keep.
        configuration = {"delta.logRetentionDuration": _FOREVER, "delta.deletedFileRetentionDuration": _FOREVER}
        if table == ANNOTATIONS:
            configuration["delta.dataSkippingStatsColumns"] = ",".join(("reason", "detail", *PROVENANCE))
        else:
            configuration["delta.dataSkippingNumIndexedCols"] = "0"
        create = partial(
            DeltaTable.create,
            self._uri(table),
            _schema(table),
            mode="ignore",  # also what this driver has made without hearing of it
            partition_by=[SHARD],
            name=table,
            description="written by capfilt; see the dataset's run records in _runs/",
            configuration=configuration,
            storage_options=self._delta_options,
            commit_properties=CommitProperties(app_transactions=[Transaction(_APP, 0)]),
        )
        # A conflict: made between the look and the commit; whose it is shows when it is loaded.
        with blamed(f"{self._uri(table)}: cannot be created"), contextlib.suppress(CommitFailedError):
            persist(create)

    def _number(self, table: str) -> int:
        """The transaction number of a table as loaded.

        deltalake reads the log for it, back to the last checkpoint, with a thread for every entry. So it is asked once
        for a version, and not of those that this writer made.
        """
        delta = self._tables[table]
        version, number = self._numbers.get(table, (None, 0))
        if version != delta.version():
            with blamed(f"{self._uri(table)}: cannot be read"):
                version, number = delta.version(), delta.transaction_version(_APP) or 0
            self._numbers[table] = version, number
        return number

    def _write(self, table: str, intent: Mapping[str, Any], adds: Sequence[AddAction]) -> bool:
        """Commit an intent to one table, once: of its shards, what is not among `adds` goes, and what is there stays.

        An answer that got lost, or that says no, does not tell whether the commit is in the log: the store may have
        taken it and not said so, and deltalake, trying again, have found its own entry in its way. The log tells.

        Returns:
            Whether it is there; False if another driver committed since the table was loaded.

        Raises:
            StoreError: the store keeps failing; the commit may be there, whole, or not at all.
        """

        def commit() -> bool:
            delta = self._tables[table]
            before = delta.version()
            held = _actions(delta, intent["shards"])
            there, wanted = set(held["path"].to_pylist()), {add.path for add in adds}
            try:
                delta.create_write_transaction(
                    [*(add for add in adds if add.path not in there), *_removes(held, wanted)],
                    "append",  # with removes; deltalake's overwrite by filter takes four times as long, even of nothing
                    _schema(table),
                    [SHARD],
                    commit_properties=CommitProperties(
                        custom_metadata={_APP: intent} if table == ANNOTATIONS else None,
                        app_transactions=[
                            Transaction(app, intent["transaction"])
                            for app in (_APP, _SETTLED)
                            if app == _APP or intent.get("settles")
                        ],
                    ),
                )
                delta.update_incremental()
                if delta.version() == before + 1:  # by this commit alone; where there was another, the log tells
                    self._numbers[table] = before + 1, intent["transaction"]
                return True
            except (DeltaError, OSError) as error:
                self._load(table)
                if self._number(table) >= intent["transaction"]:
                    return table != ANNOTATIONS or self._intent(intent["transaction"]).get("id") == intent["id"]
                if isinstance(error, CommitFailedError) and not transient(error):
                    return False
                raise

        with blamed(f"{self._uri(table)}: cannot be committed to"):
            return persist(commit)

    # --- all tables ---

    def _roll_forward(self, table: str, intent: Mapping[str, Any]) -> None:
        """Bring another table to the annotations' transaction, unless someone else did."""
        for _ in range(5):
            if self._number(table) >= intent["transaction"]:
                return
            if self._number(table) < intent["transaction"] - 1:
                raise self._torn(table, intent["transaction"])
            if self._write(table, intent, [_add(path, size, rows) for path, rows, size in intent[table]]):
                return
            self._load(table)  # someone maintained the table: look again
        raise self._conflict()

    def _recover(self, transaction: int) -> None:
        """Finish the newest annotations commit. Only the newest can be unfinished: each driver comes through here."""
        for table in _FOLLOWERS:
            if self._number(table) > transaction:
                raise self._torn(table, transaction)
            if self._number(table) < transaction:
                self._load(table)  # it may have come along while the annotations were loaded
                self._roll_forward(table, self._intent(transaction))

    def _intent(self, transaction: int) -> Mapping[str, Any]:
        for limit in (1, 30, 1000):  # the newest entry, unless another tool has maintained the table since
            for entry in persist(partial(self._tables[ANNOTATIONS].history, limit)):
                intent: Mapping[str, Any] = entry.get(_APP, {})
                if intent.get("transaction") == transaction:
                    return intent
        raise DatasetError(f"{self._uri(ANNOTATIONS)}: the log has lost transaction {transaction}; give another output")

    def _torn(self, table: str, transaction: int) -> DatasetError:
        return DatasetError(
            f"{self._uri(table)}: at transaction {self._number(table)} where the annotations are at {transaction}: one "
            "of the two was restored or replaced by hand; undo that, or give another output"
        )

    def _conflict(self) -> ConflictError:
        return ConflictError(
            f"{self.output}: another run is writing here and committed since this one began. This run stops; what was "
            "committed stays, nothing is lost. Run again when the other has ended: it takes up what is still pending"
        )

    def _writable(self) -> int:
        """The transaction number to build on."""
        if self._transaction is None:
            raise DatasetError(f"{self.output}: opened for reading; open it with CuratedDataset.for_writing")
        return self._transaction

    def _read(self, table: str, version: int | None) -> Any:
        delta = self._tables[table] if version is None else self._at(table, version)
        # Arrow's own file system where it can be: deltalake's calls Python from Arrow's threads, and one that does so
        # while the interpreter ends takes the process down.
        local = "://" not in self.output
        files = SubTreeFileSystem(self._uri(table), LocalFileSystem()) if local else None
        return delta.to_pyarrow_dataset(filesystem=files)

    def _at(self, table: str, version: int) -> DeltaTable:
        try:
            return self._connect(table, version)
        except (DeltaError, OSError) as error:
            newest = self._connect(table).version()
            raise DatasetError(
                f"{self._uri(table)}: no version {version} to read; the newest is {newest}, and `capfilt runs --json` "
                f"lists those that runs left ({one_line(error)})"
            ) from error

    def _filesystem(self) -> tuple[Any, str]:
        return connect(self.output, self.options, auto_mkdir=True)

    def _put(self, path: str, data: bytes) -> None:
        """Write a small file under the output."""
        fs, root = self._filesystem()
        with blamed(f"{self.output}/{path}: cannot be written"):
            persist(lambda: fs.pipe_file(f"{root}/{path}", data))

    def _await_clock(self, path: str) -> None:
        """Wait until the clock here shows the time at which the store wrote a file just now.

        Files that are stamped later are not found by a vacuum. Where it is behind by more than CLOCK_SECONDS, those of
        the newest attempts that died stay until a later one.
        """
        fs, root = self._filesystem()
        with blamed(f"{self.output}/{path}: cannot be looked at"):
            try:
                behind = persist(lambda: fs.modified(f"{root}/{path}")).timestamp() - time.time()
            except NotImplementedError:  # the store does not tell
                return
        if behind > 0:
            event("clock_behind_store", logging.WARNING, output=self.output, seconds=round(behind, 3))
            time.sleep(behind if behind <= CLOCK_SECONDS else 0)

    def _there(self, table: str) -> set[str]:
        """The files in a table's directory, whichever version names them."""
        fs, root = self._filesystem()
        folder = f"{root}/{DIRECTORIES[table]}"

        def names() -> set[str]:
            fs.invalidate_cache()
            return {path.removeprefix(f"{folder}/") for path in fs.find(folder)}

        with blamed(f"{self._uri(table)}: cannot be listed"):
            return persist(names)

    def _delete(self, path: str) -> bool:
        """Delete a file under the output; False if it was gone, as by a vacuum, which no log need tell."""
        fs, root = self._filesystem()
        with blamed(f"{self.output}/{path}: cannot be deleted"):
            try:
                persist(lambda: fs.rm_file(f"{root}/{path}"))
            except FileNotFoundError:
                return False
        return True

    def _names(self, folder: str) -> set[str]:
        """Names in a folder under the output, as they are now; none if it does not exist."""
        fs, root = self._filesystem()

        def names() -> set[str]:
            fs.invalidate_cache()
            try:
                return {path.rstrip("/").rpartition("/")[2] for path in fs.ls(f"{root}/{folder}", detail=False)}
            except FileNotFoundError:
                return set()

        with blamed(f"{self.output}/{folder}: cannot be listed"):
            return persist(names)


def _schema(table: str) -> Schema:
    return Schema.from_arrow(table_schema(table))


def _shard_of(path: str) -> str:
    return path.partition("/")[0].removeprefix(f"{SHARD}=")


def _run_of(path: str) -> str | None:
    match = _FILE_NAME.fullmatch(path.rpartition("/")[2])
    return match["run"] if match else None


def _add(path: str, size: int, rows: int, **stats: Mapping[str, Any]) -> AddAction:
    """The log's entry for a file. Readers take a column without statistics as unknown."""
    statistics = json.dumps({"numRecords": rows, **stats})
    return AddAction(path, size, {SHARD: _shard_of(path)}, int(time.time() * 1000), True, statistics)


_BOUNDS = ("reason", "detail")
_ENDS = (
    {"reason": min(Reason), "detail": ""},
    {"reason": max(Reason), "detail": "\U0010ffff"},
)
"""Lower and upper bounds of columns whose values no one looked at: wide ones, as those of long strings always are."""


def _annotation_adds(shard: ShardCommit) -> list[AddAction]:
    """Entries whose statistics tell the shard's state: its provenance is the min and max of constant columns, its kept
    rows are the nulls of `reason`, its errors the rows where `detail` is not null. They are as true for any reader that
    skips files by them.

    Entries that were committed before these two columns had bounds stay as they are: deltalake, asked for a `reason` or
    a `detail`, passes over the rows of their files until their shards are committed again."""
    adds = []
    for file in shard.annotations:
        # A shard may hold files that an earlier run finished and did not live to commit.
        constant = {**asdict(shard.provenance), "run": _run_of(file.path)}
        nulls = {**dict.fromkeys(constant, 0), "reason": file.kept, "detail": file.rows - file.errors}
        # deltalake compares with null where there is a count of nulls and no bound: no row would match a filter.
        least, most = ({name: end[name] for name in _BOUNDS if nulls[name] < file.rows} for end in _ENDS)
        bounds = {"minValues": {**constant, **least}, "maxValues": {**constant, **most}}
        adds.append(_add(file.path, file.size, file.rows, **bounds, nullCount=nulls))
    return adds


def _actions(delta: DeltaTable, shards: Sequence[str]) -> pa.Table:
    """The log's entries for the files that a table holds of these shards, structs as columns of dotted names."""
    actions = pa.table(delta.get_add_actions()).flatten()  # its own flatten is 15 times slower
    return actions.filter(pc.is_in(actions[f"partition.{SHARD}"], value_set=pa.array(shards, pa.string())))


def _removes(held: pa.Table, wanted: Container[str]) -> list[RemoveAction]:
    """Entries that take out what is held and not wanted any more."""
    now = int(time.time() * 1000)
    columns = (held[name].to_pylist() for name in ("path", "size_bytes", f"partition.{SHARD}"))
    return [
        RemoveAction(path, True, now, size, {SHARD: shard})
        for path, size, shard in zip(*columns, strict=True)
        if path not in wanted
    ]


def _vacuumable(delta: DeltaTable, hours: int, *, full: bool, keep: Sequence[int] = ()) -> set[str]:
    """Files replaced `hours` ago or earlier and, if full, those in the directory that no version names."""
    versions = list(keep) or None
    look = partial(
        delta.vacuum, hours, dry_run=True, enforce_retention_duration=False, full=full, keep_versions=versions
    )
    return set(persist(look))
