"""Splitting around a row that kills its worker, by hand: the ledger outlives workers that die."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MakeSpec, jpeg, write_shard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stubs import load_hash

from capfilt.fingerprints import run_fingerprints
from capfilt.fragments import Fragment, read_footer
from capfilt.inputs import list_inputs
from capfilt.pipelines.attempts import Attempts
from capfilt.pipelines.job import Job
from capfilt.pipelines.worker import DEATHS_BEFORE_SPLIT, LOST_ROWS_LIMIT, Worker
from capfilt.receipts import Receipt, shard_commit
from capfilt.schema import Reason
from capfilt.spec import Columns, CurateSpec


class Died(BaseException):
    """Stands for the death of a process: nothing of the worker runs after it."""


class DeadlyWorker(Worker):
    """Dies whenever a fragment holds one of `rows`."""

    def __init__(self, job: Job, attempts: Attempts, rows: set[int]) -> None:
        super().__init__(job, load_hash, attempts)
        self.rows = rows

    def curate(self, fragment: Fragment) -> Receipt:
        if self.rows & set(range(fragment.start, fragment.stop)):
            raise Died
        return super().curate(fragment)


def process(job: Job, fragment: Fragment, rows: set[int]) -> tuple[list[Receipt], int]:
    """Restart workers until the fragment is through; (receipts, deaths)."""
    attempts, deaths = Attempts(), 0
    while True:
        try:
            return DeadlyWorker(job, attempts, rows).process(fragment), deaths
        except Died:
            deaths += 1
            assert deaths < 1000


@pytest.fixture
def fragment(tmp_path: Path, make_spec: MakeSpec) -> tuple[Job, Fragment]:
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(100)])
    spec: CurateSpec = make_spec()
    (file,) = list_inputs(spec.input)
    footer = read_footer(file, Columns(), {})
    return Job(spec, run_fingerprints(spec), "run"), Fragment(file, footer.layout, 0, 100, 100)


def test_nothing_dies(fragment: tuple[Job, Fragment]) -> None:
    receipts, deaths = process(*fragment, set())
    assert (len(receipts), deaths) == (1, 0)


@pytest.mark.parametrize("row", [0, 57, 99])
def test_one_row_costs_one_row(fragment: tuple[Job, Fragment], row: int) -> None:
    receipts, deaths = process(*fragment, {row})
    counts = shard_commit(receipts).counts
    assert (counts.rows, counts.errors) == (100, 1)
    (dead,) = [r for r in receipts if r.counts.errors]
    assert (dead.start, dead.stop) == (row, row + 1)
    assert dead.reasons[Reason.WORKER_DIED] == 1
    assert deaths <= 2 * DEATHS_BEFORE_SPLIT + 1  # the whole twice, a part of seven rows, the row twice


def test_a_file_of_killers_is_given_up_in_bounded_time(fragment: tuple[Job, Fragment]) -> None:
    receipts, deaths = process(*fragment, set(range(100)))
    assert shard_commit(receipts).counts.errors == 100
    assert deaths < 4 * LOST_ROWS_LIMIT + 20


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.sets(st.integers(0, 99), max_size=6))
def test_any_few_killers_cost_themselves_only(fragment: tuple[Job, Fragment], rows: set[int]) -> None:
    receipts, _ = process(*fragment, rows)
    dead = {r.start for r in receipts if r.counts.errors}
    assert dead == rows
    assert shard_commit(receipts).rows == 100


def test_the_ledger_forgets_what_went_well() -> None:
    attempts = Attempts()
    for i in range(1000):
        attempts.begin(f"f{i}")
        attempts.end(f"f{i}", b"receipts", f"f{i}")
    assert not attempts._work
