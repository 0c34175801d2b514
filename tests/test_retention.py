"""Which versions stay readable when a run has ended."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeSpec, jpeg, write_shard
from rich.console import Console
from test_recurate import no_models, run

from capfilt.dataset import CuratedDataset
from capfilt.pipelines.curate import curate, in_process
from capfilt.spec import CurateSpec, Retention, Thresholds

slow = partial(pytest.param, marks=pytest.mark.slow)


def rethreshold(spec: CurateSpec, web: float) -> CurateSpec:
    return spec.model_copy(update={"thresholds": Thresholds(web=web, synthetic=0.5)})


def versions_kept(spec: CurateSpec, versions: int) -> CurateSpec:
    return spec.model_copy(update={"retention": Retention(versions=versions)})


def readable(spec: CurateSpec, version: int) -> bool:
    try:
        return CuratedDataset.for_reading(spec.output, {}).annotations(version).to_table().num_rows > 0
    except FileNotFoundError:
        return False


@pytest.fixture
def spec(make_spec: MakeSpec, tmp_path: Path) -> CurateSpec:
    for s in range(2):
        write_shard(tmp_path / "in" / f"{s}.parquet", [jpeg(100 * s + i) for i in range(60)])
    return make_spec()


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        slow(None, [True, True, True, True]),
        slow(Retention(versions=1), [False, False, False, True]),
        (Retention(versions=2), [False, False, True, True]),
        slow(Retention(versions=9), [True, True, True, True]),
        slow(Retention(days=30), [True, True, True, True]),
        (Retention(days=0), [False, False, False, True]),
        slow(Retention(versions=2, days=0), [False, False, True, True]),
        (Retention(versions=1, days=30), [True, True, True, True]),
    ],
    ids=str,
)
def test_versions_that_runs_left(spec: CurateSpec, retention: Retention | None, kept: list[bool]) -> None:
    left = [run(rethreshold(spec, web)).versions["annotations"] for web in (0.2, 0.4, 0.6)]
    last = run(rethreshold(spec, 0.8).model_copy(update={"retention": retention}), no_models)
    left.append(last.versions["annotations"])
    assert [readable(spec, version) for version in left] == kept
    dataset = CuratedDataset.for_reading(spec.output, {})
    assert all(not Path(spec.output, path).exists() for path in dataset.replaced(0)) == (kept == [False] * 3 + [True])
    assert dataset.pairs().to_table().num_rows == last.counts.kept


def test_a_night_with_nothing_to_do_lets_old_versions_go(spec: CurateSpec) -> None:
    first = run(rethreshold(spec, 0.2))
    spec = rethreshold(spec, 0.6)
    run(spec)
    assert readable(spec, first.versions["annotations"])
    spec = spec.model_copy(update={"retention": Retention(days=0)})
    summary = run(spec, no_models)
    assert (summary.shards, summary.skipped) == (0, 2)
    assert not readable(spec, first.versions["annotations"])
    runs = len(CuratedDataset.for_reading(spec.output, {}).runs())
    versions = CuratedDataset.for_reading(spec.output, {}).versions()
    assert run(spec, no_models).skipped == 2
    after = CuratedDataset.for_reading(spec.output, {})
    assert (len(after.runs()), after.versions()) == (runs, versions)


def fruitless(spec: CurateSpec, after: str, runs: int, **summary: Any) -> None:
    """Put runs on record that came after another and committed nothing; without a summary, such as died."""
    dataset = CuratedDataset.for_reading(spec.output, {})
    for number in range(runs):
        dataset.write_run_file(f"{after}-{number:03d}", "run.json", {})
        if summary:
            dataset.write_run_file(f"{after}-{number:03d}", "summary.json", summary)


@pytest.mark.parametrize(
    "nights",
    [
        {},  # they died
        {"outcome": "StoreError: down", "finished": "then", "shards": 0, "versions": "those of before"},
        {"outcome": "InputError: no such bucket", "finished": "then"},  # ended before they opened the dataset
    ],
    ids=["died", "failed", "ended before they began"],
)
def test_weeks_of_failed_nights_let_no_version_go(spec: CurateSpec, nights: dict[str, Any]) -> None:
    left, spec = [run(rethreshold(spec, web)) for web in (0.2, 0.4, 0.6)], versions_kept(spec, 4)
    if "versions" in nights:
        nights["versions"] = left[-1].versions
    fruitless(spec, left[-1].run, 60, **nights)
    left.append(run(rethreshold(spec, 0.8), no_models))
    assert [readable(spec, one.versions["annotations"]) for one in left] == [True] * 4
    left.append(run(rethreshold(spec, 0.3), no_models))
    assert [readable(spec, one.versions["annotations"]) for one in left] == [False, *[True] * 4]


def test_nights_that_commit_nothing_leave_no_version_of_their_own(spec: CurateSpec, tmp_path: Path) -> None:
    """A file that stays unreadable is tried again every night; each of these makes a version of the tables that holds
    what the last one held."""
    spec = versions_kept(spec, 2).model_copy(update={"max_error_fraction": 0.9})
    write_shard(tmp_path / "in" / "bad.parquet", [jpeg(1)]).write_bytes(b"no Parquet")
    left = [run(rethreshold(spec, web)) for web in (0.2, 0.4)]
    spec = rethreshold(spec, 0.4)
    for _ in range(3):
        night = run(spec, no_models)
        assert (night.outcome, night.shards, len(night.failures)) == ("done", 0, 1)
        assert night.versions != left[-1].versions
        assert [readable(spec, one.versions["annotations"]) for one in left] == [True, True]
    left.append(run(rethreshold(spec, 0.6), no_models))
    assert [readable(spec, one.versions["annotations"]) for one in left] == [False, True, True]


def test_what_a_run_that_died_committed_stays_beside_those_wanted(spec: CurateSpec, tmp_path: Path) -> None:
    """Only the fruitless run after it tells of it."""
    write_shard(tmp_path / "in" / "bad.parquet", [jpeg(1)]).write_bytes(b"no Parquet")
    spec = spec.model_copy(update={"max_error_fraction": 0.9})
    first = run(rethreshold(spec, 0.2))
    died = run(rethreshold(spec, 0.4), no_models)
    (Path(spec.output) / "_runs" / died.run / "summary.json").unlink()
    night = run(rethreshold(spec, 0.4), no_models)
    assert (night.outcome, night.shards) == ("done", 0)
    last = run(rethreshold(versions_kept(spec, 2), 0.6), no_models)
    left = [one.versions["annotations"] for one in (first, night, last)]
    assert [readable(spec, version) for version in left] == [True] * 3


@pytest.mark.parametrize("text", ['{"outcome": "do', "[]", "{}", '{"outcome": "done", "versions": {"pairs": 3}}'])
def test_a_record_that_cannot_be_read_lets_no_version_go(spec: CurateSpec, text: str) -> None:
    left = [run(rethreshold(spec, web)) for web in (0.2, 0.4, 0.6)]
    summary = Path(spec.output) / "_runs" / left[1].run / "summary.json"
    summary.write_text(text)
    spec, said = versions_kept(spec, 3), io.StringIO()
    left.append(
        curate(rethreshold(spec, 0.8), load=no_models, execute=in_process, console=Console(file=said, width=500))
    )
    assert [readable(spec, one.versions["annotations"]) for one in left] == [True] * 4
    assert f"{summary}: is no run's record" in said.getvalue()
    assert "Remove the file" in said.getvalue()
    summary.unlink()
    assert run(rethreshold(spec, 0.8), no_models).shards == 0
    assert [readable(spec, one.versions["annotations"]) for one in left] == [True, False, True, True]


def test_a_retention_says_something() -> None:
    with pytest.raises(ValueError, match="give versions, days or both"):
        Retention()
