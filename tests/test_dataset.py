"""The curated dataset: conservation, two drivers, dead drivers, vacuum, and what other readers see."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import deltalake
import duckdb
import polars
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capfilt.dataset import (
    DIRECTORIES,
    Counts,
    CuratedDataset,
    DataFile,
    Provenance,
    ShardCommit,
    ShardFiles,
    ShardState,
)
from capfilt.errors import ConflictError, DatasetError
from capfilt.schema import ANNOTATIONS, FILE_SCHEMAS, PAIRS, QUARANTINE, Reason, Status, table_schema

KEPT, DROPPED, ERROR = Status.KEPT, Status.DROPPED, Status.ERROR
REASON = {KEPT: None, DROPPED: str(Reason.NO_MATCH), ERROR: str(Reason.CORRUPT_IMAGE)}
TEXT = {
    "source": "web",
    "captioner": None,
    "candidate": 0,
    "text": "a",
    "itm": 0.5,
    "itc": None,
    "scores": [{"filter": "f", "itm": 0.5, "itc": None}],
    "kept": True,
}
_attempts: Iterator[int] = iter(range(10**9))


def provenance(run: str, mark: str = "v1") -> Provenance:
    return Provenance(f"input-{mark}", f"caption-{mark}", f"score-{mark}", f"decide-{mark}", run)


def write_file(output: str, table: str, path: str, rows: Sequence[dict[str, Any]]) -> DataFile:
    schema = FILE_SCHEMAS[table]
    file = Path(output, DIRECTORIES[table], path)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema), file)
    errors, kept = (sum(row["status"] == status for row in rows) * (table == ANNOTATIONS) for status in (ERROR, KEPT))
    return DataFile(path, len(rows), file.stat().st_size, errors, kept)


def write_shard(
    output: str, shard: str, run: str, statuses: Sequence[Status] = (KEPT, DROPPED), mark: str = "v1", fragment: int = 3
) -> ShardCommit:
    """Do what workers do for a shard with rows of these statuses: one file a fragment and table."""
    files: dict[str, list[DataFile]] = {table: [] for table in DIRECTORIES}
    for start in range(0, max(1, len(statuses)), fragment):
        part = list(enumerate(statuses))[start : start + fragment]
        path = f"shard={shard}/{start:09d}-{start + len(part):09d}-{run}-{next(_attempts):08x}.parquet"
        rows = [
            {
                "row": i,
                "key": f"{shard}/{i}",
                "image_sha256": f"{mark}{i}",
                "width": 4,
                "status": str(status),
                "reason": REASON[status],
                "detail": "why" if status is ERROR else None,
                "texts": [TEXT],
                "image": b"bytes",
                "text": "a",
                "captions": [{"text": "a", "source": "web", "captioner": None, "itm": 0.75}],
                **vars(provenance(run, mark)),
            }
            for i, status in part
        ]
        for table, wanted in ((ANNOTATIONS, None), (PAIRS, KEPT), (QUARANTINE, ERROR)):
            chosen = [row for row in rows if wanted in (None, row["status"])]
            if chosen or table == ANNOTATIONS:
                files[table].append(write_file(output, table, path, chosen))
    tally = Counter(statuses)
    counts = Counts(tally[KEPT], tally[DROPPED], tally[ERROR])
    return ShardCommit(shard, len(statuses), counts, provenance(run, mark), *(tuple(files[t]) for t in DIRECTORIES))


def rows_of(dataset: CuratedDataset, table: str, version: int | None = None) -> list[tuple[str, str]]:
    """Sorted (key, run) of a table, through its data files."""
    read = {ANNOTATIONS: dataset.annotations, PAIRS: dataset.pairs, QUARANTINE: dataset.quarantine}[table]
    found = read(version).to_table(columns=["key", "run", "shard"]).to_pylist()
    assert all(row["key"].split("/")[0] == row["shard"] for row in found)
    return sorted((row["key"], row["run"]) for row in found)


def expected(model: dict[str, tuple[str, Sequence[Status]]], table: str) -> list[tuple[str, str]]:
    wanted = {ANNOTATIONS: set(Status), PAIRS: {KEPT}, QUARANTINE: {ERROR}}[table]
    return sorted(
        (f"{shard}/{i}", run) for shard, (run, rows) in model.items() for i, row in enumerate(rows) if row in wanted
    )


def assert_holds(output: str, model: dict[str, tuple[str, Sequence[Status]]]) -> None:
    """All three tables hold the model's rows, once, and the log says so too."""
    dataset = CuratedDataset.for_reading(output, {})
    for table in DIRECTORIES:
        assert rows_of(dataset, table) == expected(model, table), table
    states = {shard: (state.provenance.run, state.counts) for shard, state in dataset.committed().items()}
    tallies = {shard: (run, Counter(rows)) for shard, (run, rows) in model.items()}
    assert states == {s: (run, Counts(t[KEPT], t[DROPPED], t[ERROR])) for s, (run, t) in tallies.items()}


class Killed(BaseException):
    """Stands for SIGKILL: no handler of Exception sees it."""


class Dying(CuratedDataset):
    """A driver that dies after so many of a commit's three stages; at 3 it lives."""

    stages = 3

    def _roll_forward(self, table: str, intent: Any) -> None:
        if {PAIRS: 1, QUARANTINE: 2}[table] >= self.stages:
            raise Killed
        super()._roll_forward(table, intent)


class Hooked(CuratedDataset):
    """A driver that lets others act at a moment of its own: before a commit, or between its stages."""

    before_commit: Callable[[], None] | None = None
    after_commit: Callable[[], None] | None = None
    between_stages: Callable[[], None] | None = None

    def commit(self, shards: Sequence[ShardCommit]) -> int:
        if self.before_commit:
            self.before_commit()
        version = super().commit(shards)
        if self.after_commit:
            self.after_commit()
        return version

    def _roll_forward(self, table: str, intent: Any) -> None:
        if self.between_stages:
            hook, self.between_stages = self.between_stages, None
            hook()
        super()._roll_forward(table, intent)


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out")


# --- commits ----------------------------------------------------------------------------------------------------------


def test_commit_makes_whole_shards_and_versions_agree(output: str) -> None:
    dataset = CuratedDataset.for_writing(output, {})
    a = write_shard(output, "a", "r1", [KEPT, KEPT, DROPPED, ERROR, KEPT, ERROR, DROPPED])
    assert dataset.commit([a, write_shard(output, "b", "r1", [DROPPED])]) == 1
    assert dataset.commit([write_shard(output, "c", "r1", [])]) == 2
    model = {"a": ("r1", [KEPT, KEPT, DROPPED, ERROR, KEPT, ERROR, DROPPED]), "b": ("r1", [DROPPED]), "c": ("r1", [])}
    assert_holds(output, model)
    assert dataset.versions() == {ANNOTATIONS: 2, PAIRS: 2, QUARANTINE: 2}
    assert [(entry.version, entry.shards) for entry in dataset.history()] == [(2, 1), (1, 2), (0, 0)]
    assert dataset.reasons() == {
        ("kept", None): 3,
        ("dropped", "no_match"): 3,
        ("error", "corrupt_image"): 2,
    }


def test_state_comes_from_the_log_alone(output: str) -> None:
    dataset = CuratedDataset.for_writing(output, {})
    shard = write_shard(output, "a", "r1", [KEPT, DROPPED, KEPT, KEPT, ERROR])
    dataset.commit([shard, write_shard(output, "empty", "r1", [])])
    for table in DIRECTORIES:
        for file in Path(output, DIRECTORIES[table]).glob("shard=*/*.parquet"):
            file.unlink()
    size = sum(file.size for file in shard.annotations)
    committed = CuratedDataset.committed_in(output, {})
    assert committed["a"] == ShardState(provenance("r1"), Counts(3, 1, 1), files=2, size=size)
    assert committed["empty"].rows == 0
    assert committed["empty"].provenance == provenance("r1")


def test_statistics_in_the_log_are_those_of_the_files(output: str) -> None:
    """A reader may skip files by them: what we write without reading must be what the files hold."""
    dataset = CuratedDataset.for_writing(output, {})
    one = write_shard(output, "a", "r1", [KEPT, DROPPED, ERROR, KEPT])
    other = write_shard(output, "a", "r2", [DROPPED, KEPT])  # a later run completes what an earlier one began
    mixed = replace(
        other,
        rows=6,
        counts=one.counts + other.counts,
        annotations=one.annotations + other.annotations,
        pairs=one.pairs + other.pairs,
        quarantine=one.quarantine,
    )
    dataset.commit([mixed])
    actions = pa.table(deltalake.DeltaTable(f"{output}/annotations").get_add_actions()).flatten().to_pylist()
    assert len(actions) == 3
    for action in actions:
        file = pq.read_table(Path(output, "annotations", action["path"]), partitioning=None)
        assert action["num_records"] == file.num_rows
        for name in ("reason", *vars(provenance(""))):
            assert action[f"null_count.{name}"] == file[name].null_count
            if name != "reason":
                assert {action[f"min.{name}"], action[f"max.{name}"]} == set(file[name].to_pylist())
    assert dataset.committed()["a"].provenance == provenance("r2")


def test_replacing_a_shard_replaces_it_in_every_table(output: str) -> None:
    dataset = CuratedDataset.for_writing(output, {})
    dataset.commit([write_shard(output, s, "r1", [KEPT, ERROR]) for s in ("a", "b")])
    dataset.commit([write_shard(output, "a", "r2", [DROPPED, DROPPED]), write_shard(output, "c", "r2", [KEPT])])
    assert_holds(output, {"a": ("r2", [DROPPED] * 2), "b": ("r1", [KEPT, ERROR]), "c": ("r2", [KEPT])})
    dataset.commit([write_shard(output, "a", "r3", [KEPT, KEPT])])
    assert_holds(output, {"a": ("r3", [KEPT] * 2), "b": ("r1", [KEPT, ERROR]), "c": ("r2", [KEPT])})
    old = CuratedDataset.for_reading(output, {})
    assert rows_of(old, PAIRS, version=1) == [("a/0", "r1"), ("b/0", "r1")]
    assert rows_of(old, ANNOTATIONS, version=1) == [("a/0", "r1"), ("a/1", "r1"), ("b/0", "r1"), ("b/1", "r1")]


def redecide(output: str, old: ShardCommit, run: str, keep: Sequence[bool]) -> ShardCommit:
    """Annotations anew, and of a shard with one file for each of `keep` the pairs that are kept as they are."""
    kinds = {table: getattr(old, table) for table in DIRECTORIES}
    statuses = [KEPT, DROPPED, ERROR] * len(keep)
    new = write_shard(output, old.shard, run, statuses, mark="v1")
    pairs = tuple(was if kept else now for was, now, kept in zip(kinds[PAIRS], new.pairs, keep, strict=True))
    provenance = replace(new.provenance, decide_fingerprint="decide-v2")
    return replace(new, provenance=provenance, pairs=pairs, quarantine=old.quarantine)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("keep", [(True, True), (True, False), (False, False)])
def test_files_that_a_commit_names_again_stay_whenever_its_driver_dies(
    output: str, keep: tuple[bool, bool], stages: int
) -> None:
    dataset = Dying.for_writing(output, {})
    old = write_shard(output, "a", "r1", [KEPT, DROPPED, ERROR] * 2)
    other = write_shard(output, "b", "r1", [KEPT])
    dataset.commit([old, other])
    assert dataset.files(["a", "b", "c"]) == {
        shard.shard: ShardFiles(shard.annotations, shard.pairs, shard.quarantine) for shard in (old, other)
    } | {"c": ShardFiles()}
    new = redecide(output, old, "r2", keep)
    dataset.stages = stages
    if stages < 3:
        with pytest.raises(Killed):
            dataset.commit([new])
    else:
        dataset.commit([new])
    after = CuratedDataset.for_writing(output, {})
    after.register("r1", {})
    after.register("r2", {})
    after.vacuum(0)
    after = CuratedDataset.for_reading(output, {})
    assert after.files(["a"]) == {"a": ShardFiles(new.annotations, new.pairs, new.quarantine)}
    runs = ["r1" if kept else "r2" for kept in keep]
    assert rows_of(after, ANNOTATIONS) == [*((f"a/{i}", "r2") for i in range(6)), ("b/0", "r1")]
    assert rows_of(after, PAIRS) == [("a/0", runs[0]), ("a/3", runs[1]), ("b/0", "r1")]
    assert rows_of(after, QUARANTINE) == [("a/2", "r1"), ("a/5", "r1")]
    assert after.committed()["a"].provenance == new.provenance


def test_a_file_that_was_replaced_can_come_back(output: str) -> None:
    """A run dies before its commit, another replaces what it built on, and a third adopts its receipts."""
    dataset = CuratedDataset.for_writing(output, {})
    old = write_shard(output, "a", "r1", [KEPT, DROPPED, ERROR])
    dataset.commit([old])
    adopted = redecide(output, old, "r2", [True])
    dataset.commit([write_shard(output, "a", "r3", [KEPT, KEPT, KEPT])])
    dataset.commit([adopted])
    for run in ("r1", "r2", "r3"):
        dataset.register(run, {})
    for retain_hours in (None, 0):
        dataset.vacuum(retain_hours)
        assert rows_of(dataset, PAIRS) == [("a/0", "r1")]
    assert rows_of(dataset, QUARANTINE) == [("a/2", "r1")]


BROKEN: dict[str, tuple[Callable[[ShardCommit], ShardCommit], str]] = {
    "a row lost": (lambda s: replace(s, rows=5), "5 rows in, 4 rows annotated"),
    "a row miscounted": (lambda s: replace(s, counts=Counts(2, 2, 1)), "5 counted"),
    "a pair lost": (lambda s: replace(s, pairs=()), "2 rows kept, 0 rows in pairs"),
    "an error miscounted": (lambda s: replace(s, counts=Counts(2, 2, 0)), "0 rows are errors, 1 annotated as such"),
    "too much in quarantine": (
        lambda s: replace(s, quarantine=2 * s.quarantine),
        "1 rows are errors, 2 rows in quarant",
    ),
    "no annotations": (lambda s: replace(s, rows=0, counts=Counts(), annotations=(), pairs=()), "no annotations file"),
    "another shard's file": (
        lambda s: replace(s, quarantine=(replace(s.quarantine[0], path="shard=b/0-1-r-0.parquet"),)),
        "shard=b/0-1-r-0.parquet has",
    ),
    "no run in a name": (
        lambda s: replace(s, quarantine=(replace(s.quarantine[0], path="shard=bad/x.parquet"),)),
        "shard=bad/x.parquet has",
    ),
    "a kept row miscounted": (
        lambda s: replace(s, annotations=tuple(replace(file, kept=0) for file in s.annotations)),
        "2 rows are kept, 0 annotated as such",
    ),
    "a name that needs escaping": (lambda s: replace(s, shard="b d"), "its name may hold"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_add_up_is_refused_whole(output: str, case: str) -> None:
    dataset = CuratedDataset.for_writing(output, {})
    good = write_shard(output, "good", "r1")
    bad = write_shard(output, "bad", "r1", [KEPT, DROPPED, ERROR, KEPT])
    spoil, message = BROKEN[case]
    with pytest.raises(DatasetError, match=message) as caught:
        dataset.commit([good, spoil(bad)])
    assert str(caught.value).startswith("shard b")
    assert "Nothing was committed" in str(caught.value)
    assert_holds(output, {})
    dataset.commit([good, bad])  # the refusal left the driver fit for more
    assert_holds(output, {"good": ("r1", [KEPT, DROPPED]), "bad": ("r1", [KEPT, DROPPED, ERROR, KEPT])})


def test_a_shard_twice_in_a_commit_is_refused(output: str) -> None:
    dataset = CuratedDataset.for_writing(output, {})
    with pytest.raises(DatasetError, match="shard a: twice"):
        dataset.commit([write_shard(output, "a", "r1"), write_shard(output, "a", "r1")])
    assert_holds(output, {})


# --- opening ----------------------------------------------------------------------------------------------------------


def test_opening_nothing(output: str) -> None:
    with pytest.raises(DatasetError, match=r"out/_?.*no curated dataset there; `capfilt run`"):
        CuratedDataset.for_reading(output, {})
    assert CuratedDataset.committed_in(output, {}) == {}
    assert not Path(output).exists()


def test_a_foreign_table_is_refused(output: str) -> None:
    deltalake.write_deltalake(f"{output}/annotations", pa.table({"shard": ["a"], "x": [1]}), partition_by=["shard"])
    with pytest.raises(
        DatasetError, match="out/pairs: no curated dataset there; the Delta table in annotations/ is another's"
    ):
        CuratedDataset.for_writing(output, {})
    for table in ("pairs", "_runs/quarantine"):
        deltalake.write_deltalake(f"{output}/{table}", pa.table({"shard": ["a"], "x": [1]}), partition_by=["shard"])
    for way in (CuratedDataset.for_writing, CuratedDataset.for_reading):
        with pytest.raises(
            DatasetError, match="out/pairs: a Delta table, but not capfilt's pairs; give another output"
        ):
            way(output, {})


_OLDER_TEXT = pa.struct({"source": pa.string(), "candidate": pa.int32(), "text": pa.string(), "itm": pa.float32()})
OLDER = {
    ANNOTATIONS: {"texts": pa.list_(_OLDER_TEXT), "captioner": pa.string(), "filter": pa.string()},
    PAIRS: {"captions": pa.list_(pa.struct({"text": pa.string(), "source": pa.string(), "itm": pa.float32()}))},
}
"""Columns as they were when a run had one captioner and one filter."""


@pytest.mark.parametrize("table", [ANNOTATIONS, PAIRS])
def test_a_table_of_another_version_is_refused_and_left_as_it_is(output: str, table: str) -> None:
    CuratedDataset.for_writing(output, {})
    shutil.rmtree(f"{output}/{table}")
    columns = {**{field.name: field.type for field in table_schema(table)}, **OLDER[table]}
    DeltaTable.create(
        f"{output}/{table}",
        Schema.from_arrow(pa.schema(columns)),
        partition_by=["shard"],
        commit_properties=CommitProperties(app_transactions=[Transaction("capfilt", 0)]),
    )
    before = sorted(Path(output).rglob("*"))
    names = ", ".join(sorted(OLDER[table]))
    for way in (CuratedDataset.for_writing, CuratedDataset.for_reading, CuratedDataset.committed_in):
        with pytest.raises(DatasetError) as caught:
            way(output, {})
        assert str(caught.value) == (
            f"{output}/{table}: written by another version of capfilt, whose {table} differ in {names}. "
            "Curate into a new output, or use the version that wrote this one"
        )
    assert sorted(Path(output).rglob("*")) == before


def test_a_reader_cannot_write(output: str) -> None:
    CuratedDataset.for_writing(output, {})
    reader = CuratedDataset.for_reading(output, {})
    for act in (lambda: reader.commit([]), reader.vacuum, lambda: reader.register("r1", {})):
        with pytest.raises(DatasetError, match="opened for reading"):
            act()


def test_a_version_that_is_not_there(output: str) -> None:
    dataset = CuratedDataset.for_writing(output, {})
    with pytest.raises(DatasetError, match=r"pairs: no version 7 to read; the newest is 0"):
        dataset.pairs(7)


def test_a_table_put_back_by_hand_is_noticed(output: str, tmp_path: Path) -> None:
    dataset = CuratedDataset.for_writing(output, {})
    empty = tmp_path / "empty"
    Path(output, "pairs").rename(empty)
    CuratedDataset.for_writing(str(tmp_path / "other"), {})
    Path(tmp_path, "other", "pairs").rename(Path(output, "pairs"))
    for shard in ("a", "b"):  # an open driver goes on with the new table, which is as the old one was
        dataset.commit([write_shard(output, shard, "r1")])
    Path(output, "pairs").rename(tmp_path / "full")
    empty.rename(Path(output, "pairs"))
    with pytest.raises(DatasetError, match="pairs: at transaction 0 where the annotations are at 2"):
        CuratedDataset.for_writing(output, {})
    Path(output, "annotations").rename(tmp_path / "annotations")
    (tmp_path / "other" / "annotations").rename(Path(output, "annotations"))
    Path(output, "pairs").rename(empty)
    (tmp_path / "full").rename(Path(output, "pairs"))
    with pytest.raises(DatasetError, match="pairs: at transaction 2 where the annotations are at 0"):
        CuratedDataset.for_writing(output, {})


def test_files_of_a_shard_another_tool_rewrote_count_as_pending(output: str) -> None:
    dataset = CuratedDataset.for_writing(output, {})
    dataset.commit([write_shard(output, "a", "r1", [KEPT] * 6), write_shard(output, "b", "r1", [KEPT] * 6)])
    table = deltalake.DeltaTable(f"{output}/annotations")
    rows = dataset.annotations().to_table(filter=pads.field("shard") == "a")
    rows = rows.set_column(rows.schema.get_field_index("input_id"), "input_id", pa.array(["x"] * 3 + ["y"] * 3))
    deltalake.write_deltalake(table, rows, mode="overwrite", predicate="shard = 'a'")
    later = CuratedDataset.for_writing(output, {})
    assert set(later.committed()) == {"b"}
    later.commit([write_shard(output, "a", "r2", [KEPT])])
    assert_holds(output, {"a": ("r2", [KEPT]), "b": ("r1", [KEPT] * 6)})


def test_another_tools_compaction_changes_nothing(output: str) -> None:
    dataset = CuratedDataset.for_writing(output, {})
    dataset.commit([write_shard(output, "a", "r1", [KEPT, DROPPED] * 4), write_shard(output, "b", "r1", [KEPT] * 6)])
    before = dataset.committed()
    for table in (ANNOTATIONS, PAIRS):
        deltalake.DeltaTable(f"{output}/{table}").optimize.compact()
    later = CuratedDataset.for_writing(output, {})
    after = later.committed()
    assert {s: replace(state, files=0, size=0) for s, state in after.items()} == {
        s: replace(state, files=0, size=0) for s, state in before.items()
    }
    later.commit([write_shard(output, "a", "r2", [DROPPED])])
    assert_holds(output, {"a": ("r2", [DROPPED]), "b": ("r1", [KEPT] * 6)})


# --- two drivers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"), [("new", "new"), ("new", "other"), ("old", "old"), ("old", "new"), ("", "new")]
)
def test_the_second_of_two_drivers_is_stopped(output: str, first: str, second: str) -> None:
    CuratedDataset.for_writing(output, {}).commit([write_shard(output, "old", "r0", [KEPT, ERROR])])
    model: dict[str, tuple[str, Sequence[Status]]] = {"old": ("r0", [KEPT, ERROR])}
    one, two = CuratedDataset.for_writing(output, {}), CuratedDataset.for_writing(output, {})
    one.commit([write_shard(output, first, "r1", [KEPT])] if first else [])
    model |= {first: ("r1", [KEPT])} if first else {}
    for _ in range(2):  # trying again does not help
        with pytest.raises(ConflictError, match=r"out: another run is writing here.*nothing is lost. Run again when"):
            two.commit([write_shard(output, second, "r2", [KEPT, KEPT])])
        assert_holds(output, model)
    one.commit([write_shard(output, "more", "r1", [DROPPED])])  # the first is not disturbed
    third = CuratedDataset.for_writing(output, {})
    third.commit([write_shard(output, second, "r3", [ERROR])])  # who opens anew may
    assert_holds(output, {**model, "more": ("r1", [DROPPED]), second: ("r3", [ERROR])})


def test_a_driver_that_loads_anothers_commit_is_stopped_too(output: str) -> None:
    """The first driver's own commit brings its tables up to date; what came in unseen must not become its basis."""
    one = Hooked.for_writing(output, {})

    def other() -> None:
        CuratedDataset.for_writing(output, {}).commit([write_shard(output, "b", "r2", [KEPT])])
        one._tables[ANNOTATIONS].update_incremental()

    one.after_commit = other
    one.commit([write_shard(output, "a", "r1", [KEPT])])
    one.after_commit = None
    with pytest.raises(ConflictError):
        one.commit([write_shard(output, "b", "r1", [DROPPED])])
    assert_holds(output, {"a": ("r1", [KEPT]), "b": ("r2", [KEPT])})


CHILD = """
import pickle, sys, time
from pathlib import Path
from capfilt.dataset import CuratedDataset
from capfilt.errors import ConflictError

output, me, order = sys.argv[1], sys.argv[2], sys.argv[3]
commits = pickle.load(open(me, "rb"))
def wait():
    Path(me + ".ready").touch()
    while not Path(output + ".go").exists():
        time.sleep(0.0005)
if order == "create":
    wait()
dataset = CuratedDataset.for_writing(output, {})
if order == "commit":
    wait()
try:
    for commit in commits:
        dataset.commit([commit])
except ConflictError as error:
    sys.exit(3)
"""


@pytest.mark.parametrize("order", ["create", "commit"])
def test_two_processes_race(output: str, tmp_path: Path, order: str) -> None:
    """Both begin at once, from creation or from the same version; a loser's work never shows, nothing doubles."""
    writers: dict[str, list[ShardCommit]] = {}
    for run in ("r1", "r2"):
        commits = [write_shard(output, name, run, [KEPT, ERROR]) for name in ("same", f"own-{run}", "same")]
        (tmp_path / run).write_bytes(pickle.dumps(commits))
        writers[run] = commits
    processes = {
        run: subprocess.Popen([sys.executable, "-W", "error", "-c", CHILD, output, str(tmp_path / run), order])
        for run in writers
    }
    while not all((tmp_path / f"{run}.ready").exists() for run in writers):
        assert all(process.poll() is None for process in processes.values())
        time.sleep(0.001)
    Path(output + ".go").touch()
    codes = {run: process.wait(60) for run, process in processes.items()}
    assert set(codes.values()) <= {0, 3}
    assert 0 in codes.values()
    if order == "commit":
        assert sorted(codes.values()) == [0, 3]
    dataset = CuratedDataset.for_writing(output, {})
    states = dataset.committed()
    last = states["same"].provenance.run
    model = {shard: (state.provenance.run, [KEPT, ERROR]) for shard, state in states.items()}
    assert codes[last] == 0
    assert f"own-{last}" in states
    assert_holds(output, model)


# --- dead drivers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_what_a_dead_driver_left_is_finished(output: str, stages: int, checkpoint: bool) -> None:
    CuratedDataset.for_writing(output, {}).commit([write_shard(output, s, "r1", [KEPT, ERROR]) for s in "abc"])
    dying = Dying.for_writing(output, {})
    dying.stages = stages
    with pytest.raises(Killed):
        dying.commit([write_shard(output, "a", "r2", [DROPPED]), write_shard(output, "d", "r2", [KEPT, KEPT, ERROR])])
    if checkpoint:
        table = deltalake.DeltaTable(f"{output}/annotations")
        table.create_checkpoint()
        table.cleanup_metadata()
    reader = CuratedDataset.for_reading(output, {})  # reads what is there and mends nothing
    assert (len(rows_of(reader, PAIRS)) == 3) == (stages == 1)
    CuratedDataset.for_writing(output, {})
    model = {
        "a": ("r2", [DROPPED]),
        "b": ("r1", [KEPT, ERROR]),
        "c": ("r1", [KEPT, ERROR]),
        "d": ("r2", [KEPT, KEPT, ERROR]),
    }
    assert_holds(output, model)
    last = CuratedDataset.for_writing(output, {})
    assert last.versions() == {ANNOTATIONS: 2, PAIRS: 2, QUARANTINE: 2}
    last.commit([write_shard(output, "b", "r3", [])])
    assert_holds(output, {**model, "b": ("r3", [])})


def test_a_death_is_mended_past_another_tools_entries(output: str) -> None:
    dying = Dying.for_writing(output, {})
    dying.stages = 1
    with pytest.raises(Killed):
        dying.commit([write_shard(output, "a", "r1", [KEPT] * 7)])
    for _ in range(3):
        deltalake.DeltaTable(f"{output}/annotations").alter.set_table_properties({"delta.checkpointInterval": "50"})
    CuratedDataset.for_writing(output, {})
    assert_holds(output, {"a": ("r1", [KEPT] * 7)})


def test_a_real_death_between_the_stages(output: str, tmp_path: Path) -> None:
    (tmp_path / "commit").write_bytes(pickle.dumps(write_shard(output, "a", "r1", [KEPT, ERROR])))
    child = """
import os, pickle, sys
from capfilt.dataset import CuratedDataset
class Dying(CuratedDataset):
    def _roll_forward(self, table, intent):
        os._exit(9)
Dying.for_writing(sys.argv[1], {}).commit([pickle.load(open(sys.argv[2], "rb"))])
"""
    command = [sys.executable, "-c", child, output, str(tmp_path / "commit")]
    assert subprocess.run(command, timeout=60, check=False).returncode == 9
    assert rows_of(CuratedDataset.for_reading(output, {}), PAIRS) == []
    CuratedDataset.for_writing(output, {})
    assert_holds(output, {"a": ("r1", [KEPT, ERROR])})


def test_a_driver_that_outlives_a_failure_between_the_stages_mends_it_first(output: str) -> None:
    driver = Dying.for_writing(output, {})
    for stages, shard in ((1, "a"), (2, "b")):
        driver.stages = stages
        with pytest.raises(Killed):
            driver.commit([write_shard(output, shard, "r1", [KEPT, ERROR])])
        driver.stages = 3
        driver.commit([write_shard(output, f"{shard}-next", "r1", [KEPT])])
    rows: list[Status] = [KEPT, ERROR]
    assert_holds(output, {"a": ("r1", rows), "a-next": ("r1", [KEPT]), "b": ("r1", rows), "b-next": ("r1", [KEPT])})


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_slow_driver_is_taken_for_dead(output: str, goes_on: bool) -> None:
    """Another opens the output between the stages: it finishes the commit, and the slow one finds it finished."""
    slow = Hooked.for_writing(output, {})

    def other() -> None:
        dataset = CuratedDataset.for_writing(output, {})
        if goes_on:
            dataset.commit([write_shard(output, "a", "r2", [DROPPED, KEPT])])

    slow.between_stages = other
    slow.commit([write_shard(output, "a", "r1", [KEPT, ERROR])])
    model: dict[str, tuple[str, Sequence[Status]]] = {
        "a": ("r2", [DROPPED, KEPT]) if goes_on else ("r1", [KEPT, ERROR])
    }
    assert_holds(output, model)
    if goes_on:
        with pytest.raises(ConflictError):
            slow.commit([write_shard(output, "b", "r1")])
    else:
        slow.commit([write_shard(output, "b", "r1", [KEPT])])
        model["b"] = ("r1", [KEPT])
    assert_holds(output, model)


def test_hundreds_of_commits_across_checkpoints(output: str) -> None:
    dataset: CuratedDataset = CuratedDataset.for_writing(output, {})
    model: dict[str, tuple[str, Sequence[Status]]] = {}
    for n in range(98):
        dataset.commit([write_shard(output, f"s{n % 40}", f"r{n}", [KEPT])])
        model[f"s{n % 40}"] = (f"r{n}", [KEPT])
    dying = Dying.for_writing(output, {})
    dying.stages = 1
    with pytest.raises(Killed):  # deltalake makes its checkpoint in this commit
        dying.commit([write_shard(output, "s0", "last", [KEPT])])
    model["s0"] = ("last", [KEPT])
    assert list(Path(output, "annotations", "_delta_log").glob("*99.checkpoint.parquet"))
    CuratedDataset.for_writing(output, {}).commit([write_shard(output, "s1", "more", [DROPPED])])
    assert_holds(output, {**model, "s1": ("more", [DROPPED])})
    assert len(CuratedDataset.for_reading(output, {}).history(3)) == 3


# --- vacuum -----------------------------------------------------------------------------------------------------------


def files(output: str) -> set[str]:
    return {
        str(path.relative_to(output))
        for table in DIRECTORIES.values()
        for path in Path(output, table).glob("shard=*/*")
    }


def named(commit: ShardCommit) -> set[str]:
    tables = (ANNOTATIONS, commit.annotations), (PAIRS, commit.pairs), (QUARANTINE, commit.quarantine)
    return {f"{DIRECTORIES[table]}/{file.path}" for table, of_table in tables for file in of_table}


def test_vacuum_deletes_what_no_version_names(output: str) -> None:
    dead = CuratedDataset.for_writing(output, {})
    dead.register("dead", {})
    left = write_shard(output, "a", "dead", [KEPT, ERROR])
    stranger = Path(output, "annotations", "shard=a", "notes.txt")
    stranger.write_text("not capfilt's")
    dataset = CuratedDataset.for_writing(output, {})
    dataset.register("r1", {"spec": {"output": output}})
    first = write_shard(output, "a", "r1", [KEPT, ERROR])
    dataset.commit([first])
    second = write_shard(output, "a", "r1", [DROPPED])
    retried = write_shard(output, "a", "r1", [DROPPED])
    dataset.commit([second])
    assert dataset.vacuum() == len(named(left)) + len(named(retried))
    assert files(output) == named(first) | named(second) | {"annotations/shard=a/notes.txt"}
    assert len(rows_of(CuratedDataset.for_reading(output, {}), ANNOTATIONS, version=1)) == 2
    assert json.loads(Path(output, "_runs", "r1", "run.json").read_text()) == {"spec": {"output": output}}
    with pytest.raises(ConflictError):
        dead.commit([left])
    assert dataset.vacuum(retain_hours=1) == 0
    assert dataset.vacuum(retain_hours=0) == len(named(first))
    assert files(output) == named(second) | {"annotations/shard=a/notes.txt"}
    assert dataset.vacuum(retain_hours=0) == 0
    dataset.commit([write_shard(output, "b", "r1", [KEPT])])  # the vacuuming driver itself goes on
    assert_holds(output, {"a": ("r1", [DROPPED]), "b": ("r1", [KEPT])})
    assert len(set(dataset.versions().values())) == 1


def test_vacuum_after_a_checkpoint_keeps_old_versions(output: str) -> None:
    dataset = CuratedDataset.for_writing(output, {})
    dataset.register("r1", {})
    for rows in ([KEPT], [DROPPED]):
        dataset.commit([write_shard(output, "a", "r1", rows)])
    for table in DIRECTORIES.values():
        deltalake.DeltaTable(f"{output}/{table}").create_checkpoint()
    again = CuratedDataset.for_writing(output, {})
    assert again.vacuum() == 0
    assert rows_of(again, PAIRS, version=1) == [("a/0", "r1")]
    for table in DIRECTORIES.values():  # by default a checkpoint forgets a replaced file after a week
        configuration = deltalake.DeltaTable(f"{output}/{table}").metadata().configuration
        assert configuration["delta.deletedFileRetentionDuration"] == "interval 36500 days"
        assert configuration["delta.logRetentionDuration"] == "interval 36500 days"


def test_vacuum_spares_a_driver_it_does_not_know(output: str) -> None:
    """Who registers after the runs were listed has opened before or after the fence; either way nothing is lost."""
    vacuuming = Hooked.for_writing(output, {})
    vacuuming.register("r1", {})
    late: dict[str, Any] = {}

    def begin(name: str) -> Callable[[], None]:
        def go() -> None:
            driver = CuratedDataset.for_writing(output, {})
            driver.register(name, {})
            late[name] = driver, write_shard(output, name, name, [KEPT, ERROR])

        return go

    vacuuming.before_commit, vacuuming.after_commit = begin("before-fence"), begin("after-fence")
    assert vacuuming.vacuum() == 0
    for name in late:
        assert named(late[name][1]) <= files(output)
    assert vacuuming.closed_runs() == {"r1"}
    driver, commit = late["before-fence"]
    with pytest.raises(ConflictError):
        driver.commit([commit])
    driver, commit = late["after-fence"]
    driver.commit([commit])
    assert_holds(output, {"after-fence": ("after-fence", [KEPT, ERROR])})


def test_vacuumed_runs_are_known_to_who_opens_during_a_vacuum(output: str) -> None:
    """A driver that would take over an earlier run's files must be able to see that they are being deleted."""
    CuratedDataset.for_writing(output, {}).register("dead", {})
    write_shard(output, "a", "dead")
    vacuuming = Hooked.for_writing(output, {})
    seen: list[set[str]] = []
    vacuuming.after_commit = lambda: seen.append(CuratedDataset.for_writing(output, {}).closed_runs())
    assert vacuuming.vacuum() == 2
    assert seen == [{"dead"}]


def test_vacuum_gives_way_to_a_driver_that_committed(output: str) -> None:
    vacuuming = CuratedDataset.for_writing(output, {})
    vacuuming.register("r1", {})
    other = CuratedDataset.for_writing(output, {})
    other.register("r2", {})
    pending = write_shard(output, "b", "r2", [KEPT])
    other.commit([write_shard(output, "a", "r2", [KEPT])])
    before = files(output)
    with pytest.raises(ConflictError):
        vacuuming.vacuum()
    assert files(output) == before
    other.commit([pending])
    assert_holds(output, {"a": ("r2", [KEPT]), "b": ("r2", [KEPT])})


def test_after_vacuum_a_plain_parquet_reader_sees_the_dataset(output: str) -> None:
    dataset = CuratedDataset.for_writing(output, {})
    dataset.register("r1", {})
    write_shard(output, "a", "r1", [KEPT])
    dataset.commit([write_shard(output, "a", "r1", [KEPT, ERROR]), write_shard(output, "0007", "r1", [])])
    dataset.vacuum()
    plain = pads.dataset(
        f"{output}/pairs", partitioning=pads.partitioning(pa.schema([("shard", pa.string())]), flavor="hive")
    )
    assert plain.to_table(columns=["key"]).to_pylist() == [{"key": "a/0"}]
    glob = f"{output}/annotations/shard=*/*.parquet"
    assert duckdb.sql(f"select key from read_parquet('{glob}') order by 1").fetchall() == [("a/0",), ("a/1",)]


def test_run_names(output: str) -> None:
    dataset = CuratedDataset.for_writing(output, {})
    for name in ("a/b", "", "quarantine", "closed", "receipts"):
        with pytest.raises(DatasetError, match="run "):
            dataset.register(name, {})


# --- other readers ----------------------------------------------------------------------------------------------------


def test_every_reader_sees_the_same_rows(output: str) -> None:
    dataset = CuratedDataset.for_writing(output, {})
    dataset.commit([write_shard(output, "a", "r1", [KEPT, DROPPED, ERROR, KEPT]), write_shard(output, "z", "r1", [])])
    dataset.commit([write_shard(output, "b", "r2", [DROPPED, KEPT, DROPPED, DROPPED]), write_shard(output, "c", "r1")])
    dataset.commit([write_shard(output, "a", "r3", [KEPT, KEPT, KEPT, DROPPED])])
    for table, read in ((ANNOTATIONS, dataset.annotations), (PAIRS, dataset.pairs)):
        uri = f"{output}/{table}"
        arrow = read().to_table()
        key = [("shard", "ascending"), ("row", "ascending")]
        rows = arrow.sort_by(key).to_pylist()
        assert len(rows) == {ANNOTATIONS: 10, PAIRS: 5}[table]
        assert [field.name for field in arrow.schema] == ["shard", *FILE_SCHEMAS[table].names]
        delta_files = deltalake.DeltaTable(uri).file_uris()
        assert pq.ParquetDataset(delta_files).read().num_rows == len(rows)
        lazy, duck = polars.scan_delta(uri), duckdb.connect()
        duck.register("by_arrow", read())
        duck.register("listed", duck.read_parquet(delta_files, hive_partitioning=True).to_arrow_table())
        assert polars.read_delta(uri).sort("shard", "row").to_dicts() == rows
        in_duckdb = duck.sql("select * from by_arrow order by shard, row").to_arrow_table()
        assert in_duckdb.to_pylist() == rows
        assert duck.sql("select count(*) from listed").fetchall() == [(len(rows),)]
        for run in ("r1", "r2", "r3", "nobody"):  # the log's statistics let readers skip files
            wanted = [row for row in rows if row["run"] == run]
            assert lazy.filter(polars.col("run") == run).sort("shard", "row").collect().to_dicts() == wanted
            assert read().to_table(filter=pads.field("run") == run).sort_by(key).to_pylist() == wanted
            found = duck.sql(f"select * from by_arrow where run = '{run}' order by shard, row").to_arrow_table()
            assert found.to_pylist() == wanted
        by_shard = [row for row in rows if row["shard"] == "b"]
        assert lazy.filter(polars.col("shard") == "b").sort("row").collect().to_dicts() == by_shard
    annotations = polars.scan_delta(f"{output}/annotations")
    assert annotations.filter(polars.col("reason").is_null()).collect().height == 5
    assert annotations.filter(polars.col("reason").is_not_null()).collect().height == 5
    assert dataset.annotations().count_rows(filter=pads.field("reason").is_null()) == 5
    assert dataset.annotations().count_rows(filter=~pads.field("reason").is_null()) == 5


def test_a_filter_by_reason_or_detail_loses_no_file(output: str) -> None:
    """Files with rows of every kind, of one kind, and of none: the log has no null where a reader wants a bound."""
    dataset = CuratedDataset.for_writing(output, {})
    shards = {
        "mixed": [KEPT, DROPPED, ERROR],
        "kept": [KEPT] * 2,
        "dropped": [DROPPED] * 2,
        "error": [ERROR],
        "none": [],
    }
    dataset.commit([write_shard(output, name, "r1", rows) for name, rows in shards.items()])
    rows, lazy = dataset.annotations().to_table().to_pylist(), polars.scan_delta(f"{output}/annotations")
    duck = duckdb.connect()
    duck.register("rows", dataset.annotations())
    assert len({row["reason"] for row in rows}) == 3
    for column in ("reason", "detail"):
        for value in {row[column] for row in rows}:
            wanted = sum(row[column] == value for row in rows)
            by_arrow = pads.field(column).is_null() if value is None else pads.field(column) == value
            by_polars = polars.col(column).is_null() if value is None else polars.col(column) == value
            by_duckdb = f"{column} is null" if value is None else f"{column} = '{value}'"
            assert dataset.annotations().count_rows(filter=by_arrow) == wanted
            assert lazy.filter(by_polars).collect().height == wanted
            assert duck.sql(f"select count(*) from rows where {by_duckdb}").fetchall() == [(wanted,)]
    for action in pa.table(deltalake.DeltaTable(f"{output}/annotations").get_add_actions()).flatten().to_pylist():
        file = pq.read_table(Path(output, "annotations", action["path"]), partitioning=None)
        for column in ("reason", "detail"):
            known = [value for value in file[column].to_pylist() if value is not None]
            least, most = action[f"min.{column}"], action[f"max.{column}"]
            assert all(least <= value <= most for value in known) if known else least is most is None


# --- any history ------------------------------------------------------------------------------------------------------

SHARDS = st.dictionaries(st.sampled_from("abcd"), st.lists(st.sampled_from(list(Status)), max_size=4), max_size=3)
STEPS = st.lists(
    st.tuples(st.sampled_from(["commit", "die 1", "die 2", "reopen", "conflict", "vacuum"]), SHARDS), max_size=8
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_history_conserves_rows(tmp_path_factory: pytest.TempPathFactory, steps: Any) -> None:
    output = str(tmp_path_factory.mktemp("history") / "out")
    model: dict[str, tuple[str, Sequence[Status]]] = {}
    dataset = Dying.for_writing(output, {})
    for n, (step, shards) in enumerate(steps):
        run = f"r{n}"
        dataset.stages = int(step[-1]) if step.startswith("die") else 3
        dataset.register(run, {})
        commits = [write_shard(output, shard, run, rows, fragment=2) for shard, rows in shards.items()]
        if step == "vacuum":
            dataset.vacuum(retain_hours=0)
            assert {path for path in files(output) if path.startswith("pairs")} == {
                f"pairs/{path}" for path in pa.table(dataset._tables[PAIRS].get_add_actions())["path"].to_pylist()
            }
        elif step == "conflict":
            other = CuratedDataset.for_writing(output, {})
            dataset.commit([])
            with pytest.raises(ConflictError):
                other.commit(commits)
        elif step == "reopen":
            dataset = Dying.for_writing(output, {})
        elif step == "commit":
            dataset.commit(commits)
            model |= {shard: (run, rows) for shard, rows in shards.items()}
        else:
            with pytest.raises(Killed):
                dataset.commit(commits)
            model |= {shard: (run, rows) for shard, rows in shards.items()}
            dataset = Dying.for_writing(output, {})
        assert_holds(output, model)
