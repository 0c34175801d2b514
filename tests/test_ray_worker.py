"""What comes out of a worker on Ray when something is wrong that is no row's fault."""

from __future__ import annotations

import io
import pickle
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import MakeSpec, jpeg, write_shard
from rich.console import Console
from stubs import load_hash

from capfilt.dataset import CuratedDataset
from capfilt.errors import CapfiltError, CheckpointError, DatasetError, ImageError, InputError, SpecError
from capfilt.fingerprints import run_fingerprints
from capfilt.fragments import Fragment, read_footer
from capfilt.inputs import list_inputs
from capfilt.pipelines.curate import curate
from capfilt.pipelines.job import Failure, Job
from capfilt.pipelines.ray_worker import RayWorker, start_attempts
from capfilt.schema import Reason
from capfilt.spec import Columns, CurateSpec


@pytest.fixture
def fragment(tmp_path: Path, make_spec: MakeSpec) -> tuple[Job, Fragment]:
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(4)])
    spec: CurateSpec = make_spec()
    (file,) = list_inputs(spec.input)
    footer = read_footer(file, Columns(), {})
    CuratedDataset.for_writing(spec.output, {}).register("run", {})
    return Job(spec, run_fingerprints(spec), "run"), Fragment(file, footer.layout, 0, 4, 4)


def process(job: Job, fragment: Fragment, load: Any) -> Any:
    """What the driver gets of a worker for one fragment."""
    worker = RayWorker(job, load, start_attempts())
    (result,) = worker(pa.table({"fragment": [pickle.dumps(fragment)]})).column("result").to_pylist()
    return pickle.loads(result)


@pytest.mark.usefixtures("local_ray")
def test_an_output_that_the_node_does_not_share_is_refused(fragment: tuple[Job, Fragment]) -> None:
    job, work = fragment
    failure = process(Job(job.spec, job.fingerprints, "of-another-disk"), work, load_hash)
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, DatasetError)
    assert f"{job.spec.output}: node " in str(failure.error)
    assert not list(Path(job.spec.output).rglob("*.parquet"))


def failing(error: Exception) -> Any:
    def load(_spec: CurateSpec, _device: str) -> Any:
        raise error

    return load


@pytest.mark.usefixtures("local_ray")
def test_receipts(fragment: tuple[Job, Fragment]) -> None:
    (receipt,) = process(*fragment, load_hash)
    assert (receipt.rows, receipt.counts.errors) == (4, 0)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    "error",
    [
        SpecError("filter.max_tokens: 512 tokens"),
        CheckpointError("config.json: gone"),
        InputError("a"),
        ImageError(Reason.TOO_MANY_PIXELS, "1 x 1"),
    ],
)
def test_an_error_of_ours_comes_out_as_it_is(fragment: tuple[Job, Fragment], error: CapfiltError) -> None:
    failure = process(*fragment, failing(error))
    assert isinstance(failure, Failure)
    assert type(failure.error) is type(error)
    assert (str(failure.error), failure.error.exit_code) == (str(error), error.exit_code)
    assert vars(failure.error) == vars(error)  # no notes: it says itself what is wrong


@pytest.mark.usefixtures("local_ray")
def test_any_other_error_names_the_fragment_and_brings_its_traceback(fragment: tuple[Job, Fragment]) -> None:
    failure = process(*fragment, failing(ZeroDivisionError("a bug")))
    assert type(failure.error) is CapfiltError
    message = (
        f"a worker failed on {fragment[1].name}: ZeroDivisionError: a bug. What was finished is kept; run again to "
    )
    assert str(failure.error) == f"{message}resume"
    (trace,) = failure.error.__notes__
    assert trace.startswith("Traceback (most recent call last)")
    assert "test_ray_worker.py" in trace


@pytest.mark.usefixtures("local_ray")
def test_a_run_that_fails_leaves_no_thread_behind(tmp_path: Path, make_spec: MakeSpec) -> None:
    """One that meets Ray after its shutdown ends the process with exit code 1, before the error is printed."""
    write_shard(tmp_path / "in" / "0.parquet", [jpeg(i) for i in range(40)])
    before = set(threading.enumerate())
    with pytest.raises(CapfiltError, match="a lie"):
        curate(make_spec(fragment_rows=5), load=failing(SpecError("a lie")), console=Console(file=io.StringIO()))
    assert [thread.name for thread in threading.enumerate() if thread not in before] == []


def kinds(root: type[CapfiltError]) -> list[type[CapfiltError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in kinds(child))]


@pytest.mark.parametrize("kind", kinds(CapfiltError))
def test_every_error_crosses_processes(kind: type[CapfiltError]) -> None:
    error = kind(*((Reason.TOO_MANY_PIXELS, "1 x 1") if kind is ImageError else ("what is wrong",)))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
