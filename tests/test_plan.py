"""What a run would do, and why: by what changed, by what is gone, and by what only moved."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MakeSpec, jpeg, read, write_shard
from rich.console import Console
from stubs import load_hash

from capfilt.dataset import Counts, Provenance, ShardState
from capfilt.fingerprints import Fingerprints
from capfilt.inputs import InputFile, list_inputs
from capfilt.pace import Pace, costs, last_paces
from capfilt.pipelines.curate import Summary, curate, in_process
from capfilt.plan import Plan, Stage, Why, make_plan
from capfilt.records import RunRecord
from capfilt.spec import CurateSpec, Input

NOW = Fingerprints("caption", "score", "decide")


def put(path: Path, content: bytes = b"no one reads it", moment: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (moment, moment))
    return path


def state(file: InputFile) -> ShardState:
    """Of a shard curated from a file as it is now, with what is wanted now."""
    return ShardState(Provenance(file.input_id, NOW.caption, NOW.score, NOW.decide, "run"), Counts(10), 1, 1000)


def curated(folder: Path) -> dict[str, ShardState]:
    """A dataset that holds every file of a folder as it is now."""
    return {file.shard: state(file) for file in list_inputs(Input(paths=(str(folder),)))}


def plan(make_spec: MakeSpec, committed: dict[str, ShardState], now: Fingerprints = NOW) -> Plan:
    return make_plan(make_spec(), now, committed)


def reasons(made: Plan) -> list[tuple[str, Why]]:
    return [(Path(file.path).name, why) for file, why in made.todo]


# --- what changed ---


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ([], None),
        (["input_id"], Why.INPUT),
        (["caption_fingerprint"], Why.CAPTION),
        (["score_fingerprint"], Why.SCORE),
        (["decide_fingerprint"], Why.DECIDE),
        (["run"], None),
        (["decide_fingerprint", "score_fingerprint"], Why.SCORE),
        (["decide_fingerprint", "score_fingerprint", "caption_fingerprint"], Why.CAPTION),
        (["decide_fingerprint", "score_fingerprint", "caption_fingerprint", "input_id"], Why.INPUT),
    ],
    ids=str,
)
def test_the_most_upstream_change_is_the_reason(
    make_spec: MakeSpec, tmp_path: Path, changed: list[str], why: Why | None
) -> None:
    put(tmp_path / "in" / "0.parquet")
    ((shard, before),) = curated(tmp_path / "in").items()
    then = replace(before, provenance=replace(before.provenance, **dict.fromkeys(changed, "another")))
    made = plan(make_spec, {shard: then})
    assert reasons(made) == ([] if why is None else [("0.parquet", why)])
    assert made.done == ((shard,) if why is None else ())
    assert made.reasons == ({} if why is None else {why: 1})


def test_new_changed_done_and_gone_files_are_told_apart(make_spec: MakeSpec, tmp_path: Path) -> None:
    for name in "abcd":
        put(tmp_path / "in" / f"{name}.parquet")
    committed = curated(tmp_path / "in")
    a, _, _, d = sorted(committed)
    put(tmp_path / "in" / "b.parquet", moment=2)
    put(tmp_path / "in" / "c.parquet", b"of another size")
    (tmp_path / "in" / "d.parquet").unlink()
    put(tmp_path / "in" / "e.parquet")
    made = plan(make_spec, committed)
    assert reasons(made) == [("b.parquet", Why.INPUT), ("e.parquet", Why.NEW)]
    assert made.done == (a, sorted(committed)[2])
    assert (made.gone, made.moved) == ((d,), 0)


# --- what it costs ---


PACES = {
    Stage.CAPTION: ("third", Pace(rows=1100, seconds=20.0, first_rows=100, first_seconds=10.0)),
    Stage.DECIDE: ("second", Pace(rows=10_000, seconds=2.0)),
}


def test_rows_by_stage_and_what_they_take(make_spec: MakeSpec, tmp_path: Path) -> None:
    for name in "abcdef":
        put(tmp_path / "in" / f"{name}.parquet")
    committed = curated(tmp_path / "in")
    a, b, c, d, e = sorted(committed)[:5]
    put(tmp_path / "in" / "f.parquet", 2 * b"no one reads it")
    put(tmp_path / "in" / "g.parquet")
    for shard, name in ((b, "decide"), (c, "decide"), (d, "score"), (e, "caption")):
        was = replace(committed[shard].provenance, **{f"{name}_fingerprint": "another"})
        committed[shard] = replace(committed[shard], provenance=was)
    made = plan(make_spec, committed)
    assert made.done == (a,)
    decide, score, caption = costs(made, PACES)
    assert (decide.stage, decide.shards, decide.rows, decide.exact) == (Stage.DECIDE, 2, 20, True)
    assert (score.stage, score.shards, score.rows, score.rate) == (Stage.SCORE, 1, 10, None)
    # e as it was, f of twice its size, and g that is new; ten rows in a file
    assert (caption.stage, caption.shards, caption.rows, caption.exact) == (Stage.CAPTION, 3, 40, False)
    assert [str(cost) for cost in (decide, score, caption)] == [
        "restart at decide: 2 shards, 20 rows; at most about 0:00:01: run second was too short to tell its pace "
        "without its start-up",
        "restart at score: 1 shard, 10 rows; no run on record was at the score stage, to tell how long that takes",
        "restart at caption: 3 shards, about 40 rows; about 0:00:01 once started, at 100.0 rows/s as in run third",
    ]


def test_the_pace_is_that_of_the_newest_run_long_enough_to_tell() -> None:
    def record(run: str, **pace: float) -> RunRecord:
        return RunRecord(run, None, None, "done", details={"stages": {"caption": pace}})

    newest = record("newest", rows=10, seconds=9.0, first_rows=10, first_seconds=9.0)  # one fragment: start-up and all
    short = record("short", rows=20, seconds=9.5, first_rows=10, first_seconds=9.0)
    longer = record("longer", rows=1010, seconds=19.0, first_rows=10, first_seconds=9.0)
    oldest = record("oldest", rows=9000, seconds=90.0, first_rows=10, first_seconds=9.0)
    run, pace = last_paces([newest, short, longer, oldest])[Stage.CAPTION]
    assert (run, pace.rate, pace.steady) == ("longer", 100.0, True)
    run, pace = last_paces([newest, short])[Stage.CAPTION]
    assert (run, pace.rate, pace.steady) == ("newest", 10 / 9, False)


def test_rows_of_new_files_are_not_guessed_without_any_curated_one(make_spec: MakeSpec, tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.parquet")
    (cost,) = costs(plan(make_spec, {}), PACES)
    assert str(cost) == "restart at caption: 1 shard, rows not known yet; 100.0 rows/s in run third"


# --- what only moved ---


def test_a_moved_folder_changes_nothing(make_spec: MakeSpec, tmp_path: Path) -> None:
    for name in ("0.parquet", "deep/0.parquet", "1.parquet"):
        put(tmp_path / "elsewhere" / name, name.encode())
    committed = curated(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "in")
    made = plan(make_spec, committed)
    assert (made.todo, made.gone, made.moved) == ((), (), 3)
    assert sorted(made.done) == sorted(committed)
    assert plan(make_spec, committed) == made


def test_a_moved_file_is_redone_in_its_old_place(make_spec: MakeSpec, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "0.parquet")
    committed = curated(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "in")
    made = plan(make_spec, committed, replace(NOW, decide="another"))
    assert [(file.path, file.shard, why) for file, why in made.todo] == [
        (str(tmp_path / "in" / "0.parquet"), *committed, Why.DECIDE)
    ]
    assert (made.gone, made.moved) == ((), 1)


@pytest.mark.parametrize(
    ("name", "content", "moment"),
    [("1.parquet", b"content", 1), ("0.parquet", b"another", 2), ("0.parquet", b"longer content", 1)],
)
def test_what_has_another_name_or_content_did_not_move(
    make_spec: MakeSpec, tmp_path: Path, name: str, content: bytes, moment: int
) -> None:
    put(tmp_path / "elsewhere" / "0.parquet", b"content")
    committed = curated(tmp_path / "elsewhere")
    put(tmp_path / "in" / name, content, moment)
    made = plan(make_spec, committed)
    assert reasons(made) == [(name, Why.NEW)]
    assert (made.gone, made.moved) == (tuple(committed), 0)


def test_a_copy_beside_its_original_is_new(make_spec: MakeSpec, tmp_path: Path) -> None:
    put(tmp_path / "in" / "a" / "0.parquet")
    committed = curated(tmp_path / "in")
    put(tmp_path / "in" / "b" / "0.parquet")
    made = plan(make_spec, committed)
    assert reasons(made) == [("0.parquet", Why.NEW)]
    assert (made.done, made.gone, made.moved) == (tuple(committed), (), 0)


def test_a_curated_file_keeps_its_shard_though_its_twin_is_gone(make_spec: MakeSpec, tmp_path: Path) -> None:
    put(tmp_path / "in" / "a" / "0.parquet")
    put(tmp_path / "in" / "b" / "0.parquet")
    committed = curated(tmp_path / "in")
    (tmp_path / "in" / "a" / "0.parquet").unlink()
    made = plan(make_spec, committed)
    assert set(made.done) == set(curated(tmp_path / "in"))
    assert set(made.gone) == set(committed) - set(made.done)
    assert (made.todo, made.moved) == ((), 0)


@pytest.mark.parametrize(("before", "after"), [("ab", "xyz"), ("abc", "xy")])
def test_twins_that_moved_are_matched_one_to_one(make_spec: MakeSpec, tmp_path: Path, before: str, after: str) -> None:
    for name in before:
        put(tmp_path / "elsewhere" / name / "0.parquet")
    committed = curated(tmp_path / "elsewhere")
    for name in after:
        put(tmp_path / "in" / name / "0.parquet")
    made = plan(make_spec, committed)
    assert made.done == tuple(sorted(committed)[:2])
    assert made.gone == tuple(sorted(committed)[2:])
    assert [(file.path, why) for file, why in made.todo] == [
        (str(tmp_path / "in" / name / "0.parquet"), Why.NEW) for name in after[2:]
    ]
    assert made.moved == 2
    assert plan(make_spec, dict(reversed(committed.items()))) == made


# --- whole runs ---


def run(spec: CurateSpec) -> Summary:
    return curate(spec, load=load_hash, execute=in_process, console=Console(file=io.StringIO()))


def test_a_moved_project_is_not_curated_again(make_spec: MakeSpec, tmp_path: Path) -> None:
    for s in range(2):
        write_shard(tmp_path / "project" / "in" / f"{s}.parquet", [jpeg(100 * s + i) for i in range(30)])

    def at(folder: Path) -> CurateSpec:
        return make_spec(input=Input(paths=(str(folder / "in"),)), output=str(folder / "out"))

    assert run(at(tmp_path / "project")).shards == 2
    rows = read(str(tmp_path / "project" / "out"))
    shutil.move(tmp_path / "project", tmp_path / "moved")
    summary = run(at(tmp_path / "moved"))
    assert (summary.shards, summary.skipped, summary.gone) == (0, 2, 0)
    assert read(str(tmp_path / "moved" / "out")) == rows
