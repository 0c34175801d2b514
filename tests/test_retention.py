"""Which versions stay readable when a run has ended."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from conftest import MakeSpec, jpeg, write_shard
from test_recurate import no_models, run

from capfilt.dataset import CuratedDataset
from capfilt.spec import CurateSpec, Retention, Thresholds

slow = partial(pytest.param, marks=pytest.mark.slow)


def rethreshold(spec: CurateSpec, web: float) -> CurateSpec:
    return spec.model_copy(update={"thresholds": Thresholds(web=web, synthetic=0.5)})


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


def test_a_retention_says_something() -> None:
    with pytest.raises(ValueError, match="give versions, days or both"):
        Retention()
