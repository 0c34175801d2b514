"""Runs that end before they begin: the log and the record tell of them, and nothing else is touched."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import MakeSpec, jpeg, write_shard
from deltalake import write_deltalake
from rich.console import Console
from stubs import load_hash
from test_recurate import run
from typer.testing import CliRunner

from capfilt.cli import app
from capfilt.dataset import CuratedDataset
from capfilt.errors import CapfiltError, CheckpointError, DatasetError, InputError, LeaseHeldError, StoreError
from capfilt.holder import standing
from capfilt.lease import Lease
from capfilt.pace import last_paces
from capfilt.pipelines.curate import curate, in_process
from capfilt.pipelines.job import load_models
from capfilt.plan import Stage
from capfilt.spec import CurateSpec, Thresholds, Withdrawn


@pytest.fixture
def spec(make_spec: MakeSpec, tmp_path: Path) -> CurateSpec:
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(20)])
    return make_spec()


def files(output: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(output).rglob("*") if path.is_file()}


def no_input(spec: CurateSpec) -> CurateSpec:
    shutil.rmtree(spec.input.paths[0])
    return spec


def no_list(spec: CurateSpec) -> CurateSpec:
    return spec.model_copy(update={"withdrawn": Withdrawn(urls=(f"{spec.output}-gone.txt",))})


def no_checkpoint(spec: CurateSpec) -> CurateSpec:
    for card in spec.captioners:
        Path(card.checkpoint.path, "model.safetensors").unlink()  # type: ignore[union-attr]
    return spec.model_copy(update={"sampling": spec.sampling.model_copy(update={"seed": 7})})


def torn_tables(spec: CurateSpec) -> CurateSpec:
    """The annotations are those of an earlier day, the lease is taken when this shows."""
    log = Path(spec.output, "annotations", "_delta_log")
    max(log.glob("*.json")).unlink()
    return spec.model_copy(update={"thresholds": Thresholds(web=0.9, synthetic=0.9)})


@pytest.mark.parametrize(
    ("trouble", "error", "load"),
    [
        (no_input, InputError, load_hash),
        (no_list, InputError, load_hash),
        (no_checkpoint, CheckpointError, load_models),
        (torn_tables, DatasetError, load_hash),
    ],
)
def test_what_went_wrong_is_on_record(
    spec: CurateSpec,
    trouble: Callable[[CurateSpec], CurateSpec],
    error: type[CapfiltError],
    load: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = run(spec)
    before = files(spec.output)
    spec = trouble(spec)
    caplog.clear()
    with pytest.raises(error) as caught:
        curate(spec, load=load, execute=in_process, console=Console(file=io.StringIO()))
    dataset = CuratedDataset(spec.output, {})
    record, earlier = dataset.runs()
    assert earlier.run == first.run
    assert record.outcome == f"{error.__name__}: {caught.value}"
    assert (record.shards, record.rows, record.version) == (0, 0, None)
    assert record.details["spec"]["thresholds"] == spec.model_dump(mode="json")["thresholds"]
    assert record.host is not None
    assert record.started is not None
    assert record.ended is not None
    assert earlier.ended is not None
    assert earlier.ended <= record.started <= record.ended
    ours = {Path(spec.output, "_runs", record.run, name) for name in ("run.json", "summary.json")}
    mine = {path for path in files(spec.output).keys() - before.keys() if "lease" not in path.parts}
    assert mine == ours
    assert standing(spec.output, {}).free
    (ended,) = [one for one in caplog.records if one.message == "run_ended"]
    assert ended.levelno == logging.ERROR
    listed = json.loads(CliRunner().invoke(app, ["runs", spec.output, "--json"]).stdout)
    assert [one["run"] for one in listed] == [record.run, first.run]


def test_a_mistyped_input_makes_no_output(make_spec: MakeSpec, caplog: pytest.LogCaptureFixture) -> None:
    spec = make_spec()
    with pytest.raises(InputError):
        run(spec)
    assert not Path(spec.output).exists()
    assert [one.message for one in caplog.records] == ["run_ended"]


def test_an_output_that_is_held_is_another_runs(spec: CurateSpec, caplog: pytest.LogCaptureFixture) -> None:
    run(spec)
    with Lease(spec.output, {}, "other", 600):
        before = files(spec.output)
        caplog.clear()
        with pytest.raises(LeaseHeldError):
            run(spec)
        assert files(spec.output) == before
    assert [(one.message, one.levelno) for one in caplog.records][:2] == [
        ("lease_held", logging.WARNING),
        ("run_ended", logging.WARNING),
    ]


def test_another_ones_table_is_left_alone(spec: CurateSpec, caplog: pytest.LogCaptureFixture) -> None:
    write_deltalake(f"{spec.output}/annotations", pa.table({"a": [1]}))
    before = files(spec.output)
    with pytest.raises(DatasetError):
        run(spec)
    assert files(spec.output) == before
    assert "run_ended" in [one.message for one in caplog.records]


def test_an_output_that_cannot_be_reached_is_not_asked_again(
    spec: CurateSpec, caplog: pytest.LogCaptureFixture
) -> None:
    Path(spec.output).write_text("a file where a directory must be")
    with pytest.raises(StoreError):
        run(spec)
    assert [one.message for one in caplog.records] == ["run_ended"]


def test_many_of_them_do_not_hide_how_fast_runs_are(spec: CurateSpec) -> None:
    first = run(spec)
    dataset = CuratedDataset(spec.output, {})
    for night in range(60):
        dataset.write_run_file(f"{first.run}-{night:02d}", "run.json", {})
        dataset.write_run_file(
            f"{first.run}-{night:02d}", "summary.json", {"outcome": "InputError: no", "finished": "now"}
        )
    assert len(list(dataset.each_run())) == 61
    assert last_paces(dataset.each_run()) == {Stage.CAPTION: (first.run, first.stages[Stage.CAPTION])}
