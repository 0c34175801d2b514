"""Whole runs on Ray: what is committed, resumed, redone and refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import polars
import pyarrow.parquet as pq
import pytest
from conftest import MakeSpec, jpeg, read, write_shard
from deltalake import DeltaTable, Field
from deltalake.schema import PrimitiveType
from rich.console import Console
from stubs import POISON, WIDTH_THAT_HANGS, load_dies, load_hangs, load_hash, load_loses_device, load_poison

from capfilt.dataset import CuratedDataset
from capfilt.errors import CapfiltError, ConflictError, DatasetError, ErrorBudgetError, LeaseHeldError
from capfilt.fragments import Fragment, read_rows
from capfilt.holder import FOLDER
from capfilt.models.tiny import write_tiny_pair
from capfilt.pipelines import worker
from capfilt.pipelines.curate import Execute, Summary, curate, in_process
from capfilt.pipelines.job import Job, LoadModels, load_models
from capfilt.receipts import RECEIPTS, Receipt
from capfilt.spec import CaptionerCard, CurateSpec, FilterCard, Images, LocalCheckpoint, Placement, Sampling, Thresholds


def run(spec: CurateSpec, load: Any = load_hash, execute: Execute | None = in_process) -> Summary:
    return curate(spec, load=load, execute=execute, console=Console(file=io.StringIO()))


def on(actors: int, batch: int, spec: CurateSpec) -> CurateSpec:
    placement = Placement(cpus=0.5, min_actors=actors, max_actors=actors)
    card = spec.captioners[0].model_copy(update={"placement": placement, "batch_size": batch})
    return spec.model_copy(update={"captioners": (card,)})


def comparable(output: str) -> list[dict[str, Any]]:
    return [{**row, "run": ""} for row in read(output)]


def files(output: str, table: str) -> set[str]:
    """Every Parquet file under a table's directory, as a plain reader finds them."""
    root = Path(output) / table
    return {str(p.relative_to(root)) for p in root.rglob("*.parquet") if "_delta_log" not in p.parts}


class Stop(BaseException):
    """Stands for the driver's death."""


def dying_after(fragments: int) -> Execute:
    """Runs so many fragments, then the driver is gone."""

    def execute(job: Job, work: Iterator[Fragment], load: LoadModels) -> Iterator[list[Receipt]]:
        for n, receipts in enumerate(in_process(job, work, load)):
            if n >= fragments:
                raise Stop
            yield receipts

    return execute


@pytest.fixture
def web(tmp_path: Path) -> Path:
    """Four shards of 100 rows, some bad."""
    for s in range(4):
        images: list[bytes | None] = [jpeg(100 * s + i) for i in range(100)]
        images[3], images[50], images[97] = None, b"", b"<html>"
        write_shard(tmp_path / "in" / f"{s:05d}.parquet", images)
    return tmp_path / "in"


# --- on Ray ---


@pytest.mark.usefixtures("local_ray", "web")
def test_actors_batches_and_fragments_change_nothing(make_spec: MakeSpec, tmp_path: Path) -> None:
    plain = make_spec(output=str(tmp_path / "plain"))
    run(plain)
    for actors, batch, rows in [(1, 8, 40), (2, 3, 17)]:
        spec = on(actors, batch, make_spec(output=str(tmp_path / f"ray{actors}"), fragment_rows=rows))
        summary = run(spec, execute=None)
        assert summary.counts.rows == 400
        assert comparable(spec.output) == comparable(plain.output)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray", "web")
def test_captions_are_the_same_from_one_actor_and_from_four(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Sampled by a real network, in other batches and fragments, too."""
    checkpoints = [LocalCheckpoint(path=str(path)) for path in write_tiny_pair(tmp_path / "tiny")]
    card: dict[str, Any] = {"name": "tiny", "image_size": 32, "batch_size": 64}
    spec = make_spec(
        captioners=(CaptionerCard(role="captioner", checkpoint=checkpoints[0], **card),),
        filters=(FilterCard(role="filter", checkpoint=checkpoints[1], **card),),
        sampling=Sampling(candidates=3, min_tokens=2, max_tokens=9),
    )
    written = []
    for actors, batch, rows in [(1, 64, 100), (4, 7, 17), (1, 1, 40)]:
        own = on(actors, batch, spec.model_copy(update={"output": str(tmp_path / str(batch)), "fragment_rows": rows}))
        assert run(own, load_models, execute=None).counts.rows == 400
        written.append([[text["text"] for text in row["texts"]] for row in read(own.output)])
    assert written[0] == written[1] == written[2]
    assert len({text for row in written[0] for text in row[1:]}) > 1000


@pytest.mark.usefixtures("local_ray")
def test_a_row_that_kills_its_worker_costs_one_row(make_spec: MakeSpec, tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(200)]
    texts[77] = POISON
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(200)], texts)
    summary = run(make_spec(fragment_rows=100), load_poison, None)
    assert (summary.counts.rows, summary.counts.errors) == (200, 1)
    (dead,) = [row for row in read(str(tmp_path / "out")) if row["status"] == "error"]
    assert (dead["row"], dead["reason"], dead["texts"][0]["text"]) == (77, "worker_died", POISON)
    (quarantined,) = read(str(tmp_path / "out"), "quarantine")
    assert quarantined["image"] == jpeg(77)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_an_image_that_hangs_its_decoder_costs_one_row(make_spec: MakeSpec, tmp_path: Path) -> None:
    images = [jpeg(i, WIDTH_THAT_HANGS if i == 7 else 24) for i in range(20)]
    write_shard(tmp_path / "in" / "0.parquet", images)
    summary = run(make_spec(fragment_rows=20, images=Images(max_seconds=2)), load_hangs, None)
    assert (summary.counts.rows, summary.counts.errors) == (20, 1)
    (dead,) = [row for row in read(str(tmp_path / "out")) if row["status"] == "error"]
    assert (dead["row"], dead["reason"]) == (7, "worker_died")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("table", ["annotations", "pairs"])
def test_read_delta_sees_the_rows_that_other_readers_see(make_spec: MakeSpec, web: Path, table: str) -> None:
    """Whole rows, in a dataset of which a shard was replaced: what the log no longer names is not read."""
    import ray.data

    spec = make_spec()
    run(spec)
    write_shard(web / "00002.parquet", [*(jpeg(9000 + i) for i in range(28)), b"", None], [None, "", *["new"] * 28])
    run(spec)
    by_arrow, uri = read(spec.output, table), f"{spec.output}/{table}"
    kept = sum(row["status"] == "kept" for row in read(spec.output))
    assert len(by_arrow) == {"annotations": 330, "pairs": kept}[table]
    dataset = getattr(CuratedDataset.for_reading(spec.output, {}), table)()
    readers = {
        "DuckDB": duckdb.from_arrow(dataset).to_arrow_table().to_pylist(),
        "Polars": polars.read_delta(uri).to_dicts(),
        "Ray": ray.data.read_delta(uri).take_all(),
    }
    for name, rows in readers.items():
        assert sorted(rows, key=lambda row: (row["shard"], row["row"])) == by_arrow, name
        assert [list(row) for row in rows] == [list(by_arrow[0])] * len(rows), name  # the columns' order


@pytest.mark.usefixtures("local_ray", "web")
def test_a_worker_that_cannot_write_fails_the_run_and_says_why(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec()
    run(spec)
    write_shard(tmp_path / "in" / "new.parquet", [jpeg(1)] * 50)
    shutil.rmtree(tmp_path / "out" / "_runs" / "receipts", ignore_errors=True)
    (tmp_path / "out" / "_runs" / "receipts").write_text("a file where a directory must be")
    with pytest.raises(CapfiltError, match=r"receipts/new-.*: cannot be written: (FileExistsError|NotADirectoryError)"):
        run(spec, execute=None)


@pytest.mark.usefixtures("local_ray", "web")
def test_models_that_kill_their_workers_end_the_run(make_spec: MakeSpec) -> None:
    with pytest.raises(CapfiltError, match="workers died 3 times or more while loading the models"):
        run(make_spec(), load_dies, None)


@pytest.mark.usefixtures("local_ray")
def test_a_lost_device_costs_the_row_that_lost_it(make_spec: MakeSpec, tmp_path: Path) -> None:
    """A CUDA error sticks to its process: the rows after it are innocent."""
    texts = [f"text {i}" for i in range(200)]
    texts[77] = "lose the device"
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(200)], texts)
    summary = run(make_spec(fragment_rows=100), load_loses_device, None)
    assert (summary.counts.rows, summary.counts.errors) == (200, 1)
    (dead,) = [row for row in read(str(tmp_path / "out")) if row["status"] == "error"]
    assert (dead["row"], dead["reason"]) == (77, "worker_died")


# --- resume ---


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize("after", [0, 1, 4, 7, 11])
def test_a_dead_driver_costs_what_was_in_flight(make_spec: MakeSpec, tmp_path: Path, after: int) -> None:
    whole = make_spec(output=str(tmp_path / "whole"))
    run(whole)
    spec = make_spec()
    with pytest.raises(Stop):
        run(spec, execute=dying_after(after))
    done = sum(1 for _ in (tmp_path / "out" / "_runs").rglob("receipts/*/*.json"))
    assert done == after + 1  # the last one finished, but its driver never heard
    summary = run(spec.model_copy(update={"fragment_rows": 33}))
    committed = CuratedDataset.for_reading(spec.output, {}).committed()
    assert summary.adopted_rows > 0
    assert sum(state.rows for state in committed.values()) == 400
    assert comparable(spec.output) == comparable(whole.output)
    assert len(read(spec.output, "pairs")) == len(read(whole.output, "pairs"))


@pytest.mark.usefixtures("web")
def test_finished_fragments_are_not_done_again(make_spec: MakeSpec) -> None:
    spec = make_spec()
    with pytest.raises(Stop):
        run(spec, execute=dying_after(4))
    again: list[str] = []

    def counting(job: Job, work: Iterator[Fragment], load: LoadModels) -> Iterator[list[Receipt]]:
        def watched() -> Iterator[Fragment]:
            for fragment in work:
                again.append(fragment.name)
                yield fragment

        return in_process(job, watched(), load)

    run(spec, execute=counting)
    assert len(again) == 4 * 4 - 5  # 100 rows of two row groups, at most 40 a fragment: four fragments a shard
    run(spec, execute=counting)
    assert len(again) == 4 * 4 - 5


@pytest.mark.usefixtures("web")
def test_receipts_whose_files_are_gone_or_that_are_broken_are_done_again(make_spec: MakeSpec, tmp_path: Path) -> None:
    whole = make_spec(output=str(tmp_path / "whole"))
    run(whole)
    spec = make_spec()
    with pytest.raises(Stop):
        run(spec, execute=dying_after(2))
    receipts = sorted((tmp_path / "out" / RECEIPTS).rglob("*.json"))
    receipts[0].write_text("{")
    for name in Receipt.model_validate_json(receipts[1].read_text()).annotations:
        path = tmp_path / "out" / "annotations" / name.path
        path.write_bytes(path.read_bytes()[:-10])
    run(spec)
    assert comparable(spec.output) == comparable(whole.output)


@pytest.mark.usefixtures("web")
def test_a_plain_reader_of_a_fresh_output_sees_exactly_the_dataset(make_spec: MakeSpec) -> None:
    spec = make_spec()
    with pytest.raises(Stop):
        run(spec, execute=dying_after(3))
    (Path(spec.output) / RECEIPTS / "leftover.json").write_text("{}")
    run(spec.model_copy(update={"fragment_rows": 1000}))
    for table in ("annotations", "pairs"):
        rows = sum(
            pq.ParquetFile(Path(spec.output) / table / name).metadata.num_rows for name in files(spec.output, table)
        )
        assert rows == len(read(spec.output, table))
    assert not (Path(spec.output) / RECEIPTS).exists()


@pytest.mark.usefixtures("web")
def test_folders_that_a_run_killed_at_its_very_end_left_go(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec()
    run(spec)
    (tmp_path / "out" / RECEIPTS / "00000").mkdir(parents=True)
    assert run(spec).shards == 0
    assert not (tmp_path / "out" / RECEIPTS).exists()


@pytest.mark.usefixtures("web")
def test_nothing_to_do_writes_nothing(make_spec: MakeSpec) -> None:
    spec = make_spec()
    run(spec)
    before = {path: path.stat().st_mtime_ns for path in Path(spec.output).rglob("*")}
    summary = run(spec)
    assert (summary.shards, summary.skipped) == (0, 4)
    assert {path: path.stat().st_mtime_ns for path in Path(spec.output).rglob("*")} == before


# --- what is redone ---


@pytest.mark.usefixtures("web")
def test_a_changed_file_is_redone_and_only_that(make_spec: MakeSpec, web: Path) -> None:
    spec = make_spec()
    run(spec)
    before = comparable(spec.output)
    write_shard(web / "00002.parquet", [jpeg(9000 + i) for i in range(30)])
    summary = run(spec)
    assert (summary.shards, summary.skipped, summary.counts.rows) == (1, 3, 30)
    after = comparable(spec.output)
    assert [r for r in after if not r["shard"].startswith("00002")] == [
        r for r in before if not r["shard"].startswith("00002")
    ]
    assert sum(r["shard"].startswith("00002") for r in after) == 30
    assert all(p["image"] for p in read(spec.output, "pairs"))


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize(
    "change",
    [
        {"sampling": Sampling(seed=1)},
        {"thresholds": Thresholds(web=0.9, synthetic=0.1)},
        {"sampling": Sampling(candidates=3), "keep": "all-above-threshold"},
    ],
    ids=str,
)
def test_a_changed_knob_is_redone(make_spec: MakeSpec, change: dict[str, Any], tmp_path: Path) -> None:
    run(make_spec())
    summary = run(make_spec(**change))
    assert summary.shards == 4
    fresh = make_spec(output=str(tmp_path / "fresh"), **change)
    run(fresh)
    assert comparable(make_spec().output) == comparable(fresh.output)
    assert [p["row"] for p in read(make_spec().output, "pairs")] == [p["row"] for p in read(fresh.output, "pairs")]


# --- what is wrong ---


@pytest.mark.usefixtures("web")
@pytest.mark.parametrize("table", ["annotations", "pairs", "_runs/quarantine"])
def test_an_output_of_another_version_stops_a_run_before_it_writes(make_spec: MakeSpec, web: Path, table: str) -> None:
    """Its rows would lack columns that the new ones have, or the other way round."""
    spec = make_spec()
    run(spec)
    DeltaTable(f"{spec.output}/{table}").alter.add_columns([Field("filter", PrimitiveType("string"))])
    before = {path: path.stat().st_mtime_ns for path in Path(spec.output).rglob("*")}
    write_shard(web / "00009.parquet", [jpeg(i) for i in range(10)])
    message = (
        rf"out/{table}: written by another version of capfilt, whose \w+ differ in filter\. Curate into a new output"
    )
    with pytest.raises(DatasetError, match=message):
        run(spec)
    assert {path: path.stat().st_mtime_ns for path in Path(spec.output).rglob("*")} == before


@pytest.mark.usefixtures("web")
def test_unreadable_files_are_named_and_the_rest_goes_on(make_spec: MakeSpec, web: Path) -> None:
    """A checkpoint directory with a file missing is accepted by Data-Juicer; Ray Data alone loses blocks in silence."""
    path = write_shard(web / "00009.parquet", [jpeg(i) for i in range(10)])
    path.write_bytes(path.read_bytes()[:-100])
    summary = run(make_spec(max_error_fraction=0.5))
    assert list(summary.failures) == [str(path)]
    assert "not readable as Parquet" in summary.failures[str(path)]
    assert summary.counts.rows == 400


def test_empty_files_count_as_done(make_spec: MakeSpec, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [])
    assert run(make_spec()).shards == 1
    assert run(make_spec()).skipped == 1


@pytest.mark.usefixtures("web")
def test_a_sick_run_stops_after_committing_what_was_good(make_spec: MakeSpec, web: Path) -> None:
    write_shard(web / "00009.parquet", [b"garbage"] * 300)
    spec = make_spec()
    with pytest.raises(ErrorBudgetError, match="max_error_fraction"):
        run(spec)
    committed = CuratedDataset.for_reading(spec.output, {}).committed()
    assert {name[:5] for name in committed} == {"00000", "00001", "00002", "00003"}
    summary = run(spec.model_copy(update={"max_error_fraction": 1.0}))
    assert summary.shards == 1
    assert 0 < summary.adopted_rows <= 300


def interrupted_at_the_end(job: Job, work: Iterator[Fragment], load: LoadModels) -> Iterator[list[Receipt]]:
    yield from in_process(job, work, load)
    raise KeyboardInterrupt


def test_the_error_budget_does_not_depend_on_interruptions(make_spec: MakeSpec, tmp_path: Path) -> None:
    for s in range(4):
        write_shard(tmp_path / "in" / f"{s}.parquet", [jpeg(100 * s + i) for i in range(100)])
    write_shard(tmp_path / "in" / "9.parquet", [b"garbage"] * 50)
    spec = make_spec(max_error_fraction=0.3)
    with pytest.raises(KeyboardInterrupt):
        run(spec, execute=interrupted_at_the_end)
    summary = run(spec)
    assert (summary.shards, summary.adopted_rows) == (1, 50)
    assert len(read(spec.output)) == 450


def test_a_night_of_garbage_is_sick_however_large_the_dataset(make_spec: MakeSpec, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(400)])
    spec = make_spec(max_error_fraction=0.3)
    run(spec)
    write_shard(tmp_path / "in" / "1.parquet", [b"garbage"] * 50)
    with pytest.raises(ErrorBudgetError, match=r"rows are errors, 100\.0%"):
        run(spec)
    assert len(read(spec.output)) == 400


@pytest.mark.usefixtures("web")
def test_a_file_that_stays_broken_does_not_fail_a_night_without_work(make_spec: MakeSpec, web: Path) -> None:
    path = write_shard(web / "00009.parquet", [jpeg(i) for i in range(10)])
    path.write_bytes(path.read_bytes()[:-100])
    spec = make_spec(max_error_fraction=0.3)
    for skipped in (0, 4, 4):
        summary = run(spec)
        assert (summary.skipped, list(summary.failures)) == (skipped, [str(path)])


def test_a_few_early_errors_do_not_stop_a_run(make_spec: MakeSpec, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [b"garbage"] * 30 + [jpeg(i) for i in range(670)])
    for s in range(1, 4):
        write_shard(tmp_path / "in" / f"{s}.parquet", [jpeg(1000 * s + i) for i in range(700)])
    assert run(make_spec(fragment_rows=25)).counts.errors == 30


def test_a_bad_shard_first_does_not_stop_a_run_within_its_budget(make_spec: MakeSpec, tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "0.parquet", [b"<html>"] * 1100 + [jpeg(0)] * 100, row_group=600)
    write_shard(tmp_path / "in" / "1.parquet", [None] * 20_000, row_group=5000)
    summary = run(make_spec(max_error_fraction=0.1, fragment_rows=600))
    assert (summary.counts.rows, summary.counts.errors) == (21_200, 1100)


def test_a_run_of_which_most_is_errors_stops_early(make_spec: MakeSpec, tmp_path: Path) -> None:
    for s in range(5):
        write_shard(tmp_path / "in" / f"{s}.parquet", [b"<html>"] * 6000, row_group=6000)
    spec = make_spec(max_error_fraction=0.45, fragment_rows=6000)
    with pytest.raises(ErrorBudgetError, match=r"12,000 of 12,000 rows are errors"):
        run(spec)


def failing(fails: Callable[[Fragment], bool]) -> Execute:
    """Runs fragments, but where the store fails."""

    def execute(job: Job, work: Iterator[Fragment], load: LoadModels) -> Iterator[list[Receipt]]:
        for fragment in work:
            if fails(fragment):
                yield [
                    Receipt(
                        shard=fragment.file.shard,
                        start=fragment.start,
                        stop=fragment.stop,
                        file_rows=fragment.file_rows,
                        provenance=job.provenance(fragment.file.input_id),
                        failure="503 slow down",
                    )
                ]
            else:
                yield from in_process(job, iter([fragment]), load)

    return execute


@pytest.mark.usefixtures("web")
def test_a_passing_failure_is_tried_again(make_spec: MakeSpec, tmp_path: Path) -> None:
    failed: set[str] = set()

    def once(fragment: Fragment) -> bool:
        fails = fragment.start > 0 and fragment.name not in failed
        failed.add(fragment.name)
        return fails

    whole = make_spec(output=str(tmp_path / "whole"))
    run(whole)
    spec = make_spec()
    summary = run(spec, execute=failing(once))
    assert failed
    assert summary.failures == {}
    assert comparable(spec.output) == comparable(whole.output)


def test_a_shard_that_is_given_up_takes_no_late_receipt(make_spec: MakeSpec, web: Path) -> None:
    failed: set[str] = set()

    def fails(fragment: Fragment) -> bool:
        """The second shard: its first fragment always, the others once."""
        again = fragment.start > 0 and fragment.name in failed
        failed.add(fragment.name)
        return fragment.file.path.endswith("00001.parquet") and not again

    spec = make_spec(max_error_fraction=0.5)
    summary = run(spec, execute=failing(fails))
    assert (summary.outcome, summary.shards) == ("done", 3)
    assert summary.failures == {str(web / "00001.parquet"): "503 slow down"}
    assert len(read(spec.output)) == 300


@pytest.mark.usefixtures("web")
def test_an_interrupt_during_a_commit_waits_for_its_end(make_spec: MakeSpec) -> None:
    spec = make_spec()
    logged = Path(spec.output) / "annotations" / "_delta_log" / f"{1:020d}.json"

    def interrupt() -> None:
        while not logged.exists():
            time.sleep(0.0001)
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
    interrupter.start()
    reports: list[Summary] = []
    try:
        with pytest.raises(KeyboardInterrupt):
            curate(spec, load=load_hash, execute=in_process, console=Console(file=io.StringIO()), report=reports.append)
    finally:
        interrupter.join()
        signal.signal(signal.SIGINT, before)
    assert reports[0].outcome == "interrupted"
    dataset = CuratedDataset.for_reading(spec.output, {})
    committed = dataset.committed()
    assert (reports[0].shards, len(committed)) == (4, 4)
    assert dataset.pairs().count_rows() == sum(state.counts.kept for state in committed.values())


@pytest.mark.usefixtures("web")
def test_the_end_of_a_run_leaves_the_receipts_of_another(make_spec: MakeSpec) -> None:
    spec = make_spec()
    others = RECEIPTS + "/0-other/000000000-000000010-0123abcd.20990101T000000-0123abcd.json"
    path = Path(spec.output) / others
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    run(spec)
    assert [str(p) for p in (Path(spec.output) / RECEIPTS).rglob("*.json")] == [str(path)]


def test_a_worker_that_dies_after_storing_its_receipt_blocks_nothing(make_spec: MakeSpec, tmp_path: Path) -> None:
    """Of a shard without rows there may then be two receipts, neither overlapping the other."""
    write_shard(tmp_path / "in" / "0.parquet", [])
    spec = make_spec()

    def twice(job: Job, work: Iterator[Fragment], load: LoadModels) -> Iterator[list[Receipt]]:
        for fragment in work:
            for _ in range(2):
                list(in_process(job, iter([fragment]), load))
        raise Stop
        yield

    with pytest.raises(Stop):
        run(spec, execute=twice)
    assert run(spec).shards == 1


@pytest.mark.usefixtures("web")
def test_a_run_that_fails_leaves_its_summary(make_spec: MakeSpec, web: Path) -> None:
    (web / "00008.parquet").write_bytes(b"no Parquet")
    write_shard(web / "00009.parquet", [b"garbage"] * 300)
    reported: list[Summary] = []
    spec = make_spec()
    with pytest.raises(ErrorBudgetError):
        curate(spec, load=load_hash, execute=in_process, console=Console(file=io.StringIO()), report=reported.append)
    (summary,) = reported
    written = json.loads((Path(spec.output) / "_runs" / summary.run / "summary.json").read_text())
    assert written["outcome"].startswith("ErrorBudgetError: ")
    assert list(written["failures"]) == [str(web / "00008.parquet")]
    assert written["counts"]["kept"] == summary.counts.kept
    reasons = [count for reason, count in summary.reasons.items() if ":" not in reason]
    assert sum(reasons) == summary.counts.rows == 400


def test_a_file_inserted_before_the_others_moves_nothing(make_spec: MakeSpec, tmp_path: Path) -> None:
    """img2dataset's shard ids are positional, so a changed list breaks resume."""
    for s in (1, 2):
        write_shard(tmp_path / "in" / f"{s}.parquet", [jpeg(s)] * 5)
    run(make_spec())
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(0)] * 5)
    summary = run(make_spec())
    assert (summary.shards, summary.skipped) == (1, 2)


@pytest.mark.usefixtures("web")
def test_two_drivers_conflict_loudly_and_lose_nothing(make_spec: MakeSpec) -> None:
    spec = make_spec()

    def overtaken(job: Job, work: Iterator[Fragment], load: LoadModels) -> Iterator[list[Receipt]]:
        receipts = list(in_process(job, work, load))
        with pytest.raises(LeaseHeldError, match=f"held by run {job.run} on .* Nothing was done"):
            run(spec)
        shutil.rmtree(Path(spec.output) / FOLDER)  # as in a store that cannot create a file where there is none
        run(spec)  # another driver does it all meanwhile
        yield from receipts

    with pytest.raises(ConflictError, match="another run"):
        run(spec, execute=overtaken)
    assert len(read(spec.output)) == 400
    assert run(spec).skipped == 4
    assert len(read(spec.output, "pairs")) == sum(row["status"] == "kept" for row in read(spec.output))


@pytest.mark.parametrize(("slow", "bottleneck"), [("models", "the models"), ("reading", "reading the input")])
def test_a_summary_says_what_the_run_waited_for(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str, bottleneck: str
) -> None:
    """The slow part sleeps for many times as long as all the rest takes."""
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(n) for n in range(60)])

    def sleepy(spec: CurateSpec, device: str) -> Any:
        captioners, filters = load_hash(spec, device)
        write = captioners[0].caption

        def caption(images: Any, sha256: Any) -> list[list[str]]:
            time.sleep(0.3)
            return write(images, sha256)

        monkeypatch.setattr(captioners[0], "caption", caption)
        return captioners, filters

    def sleepy_rows(*arguments: Any) -> Iterator[Any]:
        for row in read_rows(*arguments):
            time.sleep(0.02)
            yield row

    if slow == "reading":
        monkeypatch.setattr(worker, "read_rows", sleepy_rows)
    spec = make_spec(fragment_rows=60)
    summary = run(spec, load=sleepy if slow == "models" else load_hash)
    assert summary.bottleneck == bottleneck
    assert summary.busy is not None
    assert (summary.busy > 0.9) == (slow == "models")
    record = json.loads((Path(spec.output) / "_runs" / summary.run / "summary.json").read_text())
    assert (record["busy"], record["bottleneck"]) == (summary.busy, summary.bottleneck)
