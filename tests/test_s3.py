"""Whole runs with input and output on a real S3-speaking server, under every kind of fault."""

from __future__ import annotations

import io
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.retries.standard import ExponentialBackoff
from conftest import MakeSpec, jpeg, read, write_shard
from rich.console import Console
from s3 import PASSING, S3, Fault, Seeded, Several, Struck
from s3fs import S3FileSystem
from stubs import load_hash

from capfilt.dataset import DIRECTORIES, CuratedDataset
from capfilt.errors import CapfiltError, ConflictError, DatasetError, InputError, StoreError
from capfilt.fragments import Fragment
from capfilt.holder import FOLDER
from capfilt.inputs import list_inputs, renew
from capfilt.pipelines.curate import Execute, Summary, curate, in_process
from capfilt.pipelines.worker import Job, LoadModels
from capfilt.receipts import Receipt
from capfilt.schema import ANNOTATIONS, PAIRS, SHARD
from capfilt.spec import CurateSpec, Input, Retention, Thresholds
from capfilt.stores import REQUESTS
from capfilt.writer import ParquetWriter

slow = partial(pytest.param, marks=pytest.mark.slow)
"""A case that is like another one, and has its turn with the slow tests."""


@pytest.fixture(scope="module")
def web(s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three shards of 30 rows, some bad, on S3."""
    folder = tmp_path_factory.mktemp("web")
    for s in range(3):
        images: list[bytes | None] = [jpeg(100 * s + i) for i in range(30)]
        images[3], images[7] = None, b"<html>"
        path = write_shard(folder / f"{s}.parquet", images, row_group=15)
        s3_server.files().pipe_file(f"data/web/{s}.parquet", path.read_bytes())
    return "s3://data/web"


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients and capfilt wait a moment before they try again; how long they do otherwise is test_stores' to see."""
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.03)
    monkeypatch.setattr("capfilt.stores.random", SimpleNamespace(uniform=lambda *_: 0.02))


@pytest.fixture
def spec(make_spec: MakeSpec, s3: S3, web: str, tmp_path: Path) -> CurateSpec:
    """Curates the web into an output on S3 of the test's own."""
    return make_spec(
        input=Input(paths=(web,), storage_options=s3.options),
        output=f"s3://data/out/{tmp_path.name}",
        output_options=s3.options,
        fragment_rows=15,
        max_error_fraction=0.5,
    )


def run(spec: CurateSpec, execute: Execute | None = in_process) -> Summary:
    return curate(spec, load=load_hash, execute=execute, console=Console(file=io.StringIO()))


def test_a_night_without_news_lists_the_input_once_and_reads_none_of_it(spec: CurateSpec, s3: S3) -> None:
    """Counted by the store: an answer that is slow is the same answer, and is on record."""
    asked = r"GET /data(/web/|\S*prefix=web)"
    with s3.faulty(Struck(Fault.SLOW, asked)):
        assert run(spec).shards == 3
    assert any("/web/0.parquet" in request for _, request in s3.injected)
    s3.reset()
    with s3.faulty(Struck(Fault.SLOW, asked)):
        assert run(spec).skipped == 3
    look, listing = (request for _, request in s3.injected)
    assert re.search("list-type=2.*max-keys=1&", look)  # whether the input is there, and a directory
    assert "list-type=2" in listing


def test_an_object_is_curated_anew_once_it_has_other_bytes(spec: CurateSpec, s3: S3, tmp_path: Path) -> None:
    url, table = (
        f"data/anew/{tmp_path.name}/0.parquet",
        pa.table({"jpg": [jpeg(n) for n in range(3)], "txt": ["a"] * 3}),
    )
    spec = spec.model_copy(update={"input": Input(paths=(f"s3://{url}",), storage_options=s3.options)})

    def put(compression: str) -> None:
        with s3.files().open(url, "wb") as file:
            pq.write_table(table, file, compression=compression)

    put("snappy")
    assert run(spec).shards == 1
    put("snappy")
    assert run(spec).shards == 0, "another time stamp is no change to S3, whose ETag is of the bytes"
    assert (
        renew(f"s3://{url}")
        == f"Write s3://{url} anew with other bytes (its rows in another compression, say) to curate it anew"
    )
    put("zstd")
    assert run(spec).shards == 1
    assert len(rows(spec)) == 3
    s3.files().mv(url, url.replace("/0.", "/1."))
    moved = spec.model_copy(
        update={"input": Input(paths=(f"s3://{url.replace('/0.', '/1.')}",), storage_options=s3.options)}
    )
    assert run(moved).shards == 1
    assert len(rows(moved)) == 6, "under another name it is another shard"


def test_a_bucket_that_is_not_there(s3: S3) -> None:
    for path in ("s3://nowhere/x.parquet", "s3://nowhere/*.parquet"):
        with pytest.raises(InputError, match=r"cannot be listed: .*; make the bucket, or mend its name"):
            list_inputs(Input(paths=(path,), storage_options=s3.options))


def rows(spec: CurateSpec, table: str = "annotations") -> list[dict[str, Any]]:
    return [{**row, "run": ""} for row in read(spec.output, table, spec.output_options)]


def contents(spec: CurateSpec) -> list[list[dict[str, Any]]]:
    return [rows(spec, table) for table in ("annotations", "pairs", "quarantine")]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    """What a run makes of the web when nothing goes wrong, once it is known."""
    return {}


def assert_whole(spec: CurateSpec, s3: S3, undisturbed: dict[str, Any]) -> None:
    """The dataset is what an undisturbed run makes; every file in its tables is whole, named once, and none else is."""
    if not undisturbed:
        smooth = spec.model_copy(update={"output": f"{spec.output}-undisturbed"})
        run(smooth)
        undisturbed["contents"] = contents(smooth)
        assert [len(table) for table in undisturbed["contents"]] == [90, 60, 3]
    assert contents(spec) == undisturbed["contents"]
    dataset = CuratedDataset.for_reading(spec.output, spec.output_options)
    root = spec.output.removeprefix("s3://")
    for table, folder in DIRECTORIES.items():
        there = {
            name.removeprefix(f"{root}/{folder}/"): info["size"]
            for name, info in s3.files().find(f"{root}/{folder}/", detail=True).items()
            if name.endswith(".parquet") and "_delta_log" not in name and f"/{SHARD}=" in name
        }
        named = pa.table(dataset._tables[table].get_add_actions()).select(["path", "size_bytes"]).to_pylist()
        assert sorted((one["path"], one["size_bytes"]) for one in named) == sorted(there.items())


EACH_ONCE = 16
"""How many the next test has at the least; some kinds find no request that they can befall."""


def test_every_kind_of_fault_once(spec: CurateSpec, s3: S3, undisturbed: dict[str, Any]) -> None:
    data, log, small = r"/data/(web|out/.*shard=.*\.parquet)", r"_delta_log", r"list-type|_runs/20|receipts"
    once = [Struck(kind, where, times=1, skip=2 * n) for n, kind in enumerate(PASSING) for where in (data, log, small)]
    with s3.faulty(Several(*once)):
        summary = run(spec)
    assert {kind for kind, _ in s3.injected} == set(PASSING)
    assert len(s3.injected) >= EACH_ONCE
    assert summary.failures == {}
    assert (summary.outcome, summary.shards) == ("done", 3)
    assert_whole(spec, s3, undisturbed)


def test_records_that_break_off_are_read_again(spec: CurateSpec, s3: S3) -> None:
    """s3fs passes on what breaks off in a body; a run that has committed all would fail as it lets old versions go."""

    def rethreshold(web: float) -> CurateSpec:
        return spec.model_copy(update={"thresholds": Thresholds(web=web), "retention": Retention(versions=2)})

    left = [run(rethreshold(web)).versions["annotations"] for web in (0.2, 0.4)]
    with s3.faulty(Struck(Fault.DOWNLOAD_RESET, r"GET .*_runs/20.*summary\.json", 2)):
        left.append(run(rethreshold(0.6)).versions["annotations"])
    assert len(s3.injected) == 2
    with s3.faulty(Struck(Fault.TRUNCATED, r"GET .*_runs/20.*/(run|summary)\.json", 2)):
        dataset = CuratedDataset.for_reading(spec.output, spec.output_options)
        assert [record.version for record in dataset.runs()] == left[::-1]
    assert len(s3.injected) == 4
    assert [dataset.annotations(version).to_table().num_rows for version in left[1:]] == [90, 90]
    with pytest.raises(FileNotFoundError):
        dataset.annotations(left[0]).to_table()


# --- a commit whose answer is lost ---

DOUBTFUL = (Fault.LOST, Fault.LATE_500, Fault.UPLOAD_RESET)
COMMIT = r"PUT if absent .*_delta_log/0*[1-9]\d*\.json"


def once_a_table(fault: Fault) -> Several:
    return Several(
        *(Struck(fault, f"PUT if absent .*{folder}/_delta_log/0*[1-9]", 1) for folder in DIRECTORIES.values())
    )


def transactions(spec: CurateSpec) -> list[int]:
    """Numbers of the commits in the annotations' log, oldest first; a commit that was made twice is there twice."""
    log = CuratedDataset.for_reading(spec.output, spec.output_options)._tables[ANNOTATIONS].history()
    return [entry["capfilt"]["transaction"] for entry in reversed(log) if "capfilt" in entry]


@pytest.mark.parametrize("fault", DOUBTFUL)
def test_a_driver_whose_commit_is_not_answered_neither_gives_up_nor_commits_twice(
    spec: CurateSpec, s3: S3, fault: Fault
) -> None:
    driver = CuratedDataset.for_writing(spec.output, spec.output_options)
    other = CuratedDataset.for_writing(spec.output, spec.output_options)
    with s3.faulty(once_a_table(fault)):
        driver.commit([])
    assert len(s3.injected) == 3
    driver.commit([])
    assert transactions(spec) == [1, 2]
    with pytest.raises(ConflictError, match="another run is writing here"):
        other.commit([])
    assert set(CuratedDataset.for_writing(spec.output, spec.output_options).versions().values()) == {2}


def test_of_drivers_that_commit_at_once_one_wins(spec: CurateSpec, s3: S3) -> None:
    for round_ in range(3):
        drivers = [CuratedDataset.for_writing(spec.output, spec.output_options) for _ in range(4)]
        start = threading.Barrier(len(drivers))

        def commit(driver: CuratedDataset, start: threading.Barrier = start) -> str:
            start.wait()
            try:
                driver.commit([])
            except ConflictError:
                return "lost"
            return "won"

        with s3.faulty(Seeded(round_, 0.5, (Fault.LOST, Fault.LATE_500))), ThreadPoolExecutor(len(drivers)) as pool:
            outcomes = list(pool.map(commit, drivers))
        assert sorted(outcomes) == ["lost", "lost", "lost", "won"]
    assert s3.injected
    assert transactions(spec) == [1, 2, 3]


@pytest.mark.parametrize("fault", [Fault.LOST, slow(Fault.LATE_500)])
def test_of_two_runs_that_race_one_loses_cleanly(
    spec: CurateSpec, s3: S3, undisturbed: dict[str, Any], fault: Fault
) -> None:
    spec = spec.model_copy(update={"lease_seconds": 3600})  # no beat, which would tell that the lease is gone

    def overtaken(job: Job, work: Iterator[Fragment], load: LoadModels) -> Iterator[list[Receipt]]:
        yield from in_process(job, work, load)
        s3.files().rm(f"{spec.output}/{FOLDER}", recursive=True)
        with s3.faulty(once_a_table(fault)):
            assert run(spec).shards == 3
        assert len(s3.injected) == 3

    with pytest.raises(ConflictError, match="another run is writing here"):
        run(spec, overtaken)
    summary = run(spec)
    assert (summary.shards, summary.skipped) == (0, 3)
    assert_whole(spec, s3, undisturbed)


def test_a_store_that_overwrites_when_asked_not_to_is_refused(spec: CurateSpec, s3: S3) -> None:
    s3.ignore_conditions()
    with pytest.raises(DatasetError, match=r"s3://data/out/.*overwrites even when asked not to.*use a newer version"):
        run(spec)
    assert all("/_runs/lease/" in name for name in s3.files().find(spec.output))


# --- what is refused ---


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"PUT /data/out/.*annotations/shard=", r"annotations/shard=.*\.parquet: cannot be written: PermissionError"),
        slow(r"PUT /data/out/.*receipts/", r"_runs/receipts/\d-.*: cannot be written: PermissionError: Access Denied"),
        slow(r"PUT /data/out/.*_runs/20", r"_runs/20.*/run\.json: cannot be written: PermissionError: Access Denied"),
        (COMMIT, r"annotations: cannot be committed to: .*lacked the necessary privileges"),
        (r"GET .*prefix=web", r"s3://data/web: cannot be listed: PermissionError: Access Denied"),
        slow(r"GET .*prefix=.*/_runs/closed", r"_runs/closed: cannot be listed: PermissionError: Access Denied"),
    ],
)
def test_what_is_denied_is_named_and_not_asked_again(spec: CurateSpec, s3: S3, pattern: str, message: str) -> None:
    with s3.faulty(Struck(Fault.DENIED, pattern)), pytest.raises((StoreError, InputError), match=message):
        run(spec)
    assert len(s3.injected) <= 2


def test_a_rerun_completes_what_was_denied(spec: CurateSpec, s3: S3, undisturbed: dict[str, Any]) -> None:
    denied = Struck(Fault.DENIED, r"PUT /data/out/.*pairs/shard=", skip=3)
    with s3.faulty(denied), pytest.raises(StoreError, match="run again to resume"):
        run(spec)
    summary = run(spec)
    assert (summary.shards, summary.skipped, summary.adopted_rows) == (2, 1, 15)
    assert_whole(spec, s3, undisturbed)


# --- listing ---


@pytest.mark.parametrize("fault", [Fault.DENIED, Fault.TRUNCATED, Fault.ERROR_500])
def test_a_folder_that_cannot_be_listed_is_not_one_without_files(s3: S3, fault: Fault) -> None:
    for name in ("a/0", "b/0", "b/1", "b/deep/0"):
        s3.files().pipe_file(f"data/folders/{name}.parquet", b"x")
    spec = Input(paths=("s3://data/folders/*/?.parquet",), storage_options=s3.options)
    with s3.faulty(Struck(fault, r"GET .*prefix=folders/b/", times=1)):
        if fault is Fault.DENIED:
            with pytest.raises(InputError, match=r"folders/\*/\?\.parquet: cannot be listed: PermissionError"):
                list_inputs(spec)
        else:
            found = [file.path for file in list_inputs(spec)]
            assert found == [f"s3://data/folders/{name}.parquet" for name in ("a/0", "b/0", "b/1")]
    assert len(s3.injected) == 1


# --- uploads in parts ---

PARTS = {
    Fault.UPLOAD_RESET: r"PUT .*partNumber=2",
    Fault.LOST: r"POST .*uploadId=",
    Fault.LATE_500: r"POST .*uploadId=",
    Fault.SLOW_DOWN: r"POST .*uploads",
}


def write_large(url: str, s3: S3, rows: int = 6) -> tuple[int, int]:
    """A pairs file of 4 MiB a row, which goes up in parts of 16. Its rows and size."""
    writer = ParquetWriter(PAIRS, url, s3.options)
    row: dict[str, Any] = dict.fromkeys(writer.schema.names)
    try:
        for n in range(rows):
            writer.append({**row, "row": n, "image": bytes([n]) * 4 * 2**20, "captions": []}, 4 * 2**20)
        return writer.rows, writer.close()
    except BaseException:
        writer.abandon()
        raise


@pytest.mark.parametrize("fault", [Fault.UPLOAD_RESET, Fault.LOST, slow(Fault.LATE_500), slow(Fault.SLOW_DOWN)])
def test_an_upload_in_parts_survives(s3: S3, tmp_path: Path, fault: Fault) -> None:
    url = f"s3://data/parts/{tmp_path.name}.parquet"
    with s3.faulty(Struck(fault, PARTS[fault], times=1)):
        rows, size = write_large(url, s3)
    assert len(s3.injected) == 1
    assert s3.files().info(url)["size"] == size
    assert pq.read_table(url, filesystem=s3.files(), columns=["row"])["row"].to_pylist() == list(range(rows))


def test_an_upload_in_parts_that_dies_leaves_nothing_to_be_seen(s3: S3, tmp_path: Path) -> None:
    url = f"s3://data/parts/{tmp_path.name}.parquet"
    with s3.faulty(Struck(Fault.DENIED, r"PUT .*partNumber=2")), pytest.raises(StoreError, match="cannot be written"):
        write_large(url, s3, 9)
    assert not s3.files().exists(url)
    assert s3.files().list_multipart_uploads("data") == []


# --- credentials ---


def test_a_profile_gives_both_clients_key_endpoint_and_region(
    spec: CurateSpec, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(f"[profile mine]\nregion = us-east-1\nendpoint_url = {s3.url}\n")
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = MINE\naws_secret_access_key = x\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    bare = {"input": Input(paths=spec.input.paths), "output_options": {}}
    S3FileSystem.clear_instance_cache()
    try:
        assert run(spec.model_copy(update=bare)).shards == 3
    finally:
        S3FileSystem.clear_instance_cache()
    assert set(s3.keys) == {"MINE"}


# --- many faults ---

SEEDS, FEWEST = 8, 120
"""Runs with faults at random, and how many these have together; which request is the n-th depends on threads."""


@pytest.mark.slow
def test_faults_at_random_cost_nothing(
    spec: CurateSpec, s3: S3, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    injected: Counter[Fault] = Counter()
    failures: list[str] = []
    for seed in range(SEEDS):
        one = spec.model_copy(update={"output": f"{spec.output}-{seed}"})
        with s3.faulty(Seeded(seed, rate=0.08)):
            try:
                run(one)
            except CapfiltError as error:  # it names where and why; the next run resumes
                failures.append(str(error))
        injected.update(fault for fault, _ in s3.injected)
        s3.reset()
        run(one)
        assert_whole(one, s3, undisturbed)
    with capsys.disabled():
        print(
            f"\n{injected.total()} faults in {SEEDS} runs, {len(failures)} of which failed: {dict(injected)} {failures}"
        )
    assert injected.total() >= FEWEST
    assert set(injected) == set(PASSING)
    assert all(re.search(r"s3://data/.*(Error|HTTP)", failure) for failure in failures)
    assert len(failures) <= 2


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_faults_at_random_on_ray(
    spec: CurateSpec, s3: S3, undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with s3.faulty(Seeded(1, rate=0.08)):
        summary = run(spec, None)
    with capsys.disabled():
        print(f"\n{len(s3.injected)} faults in a run on Ray: {dict(Counter(fault for fault, _ in s3.injected))}")
    assert (summary.outcome, summary.shards) == ("done", 3)
    assert len(s3.injected) >= 10
    assert_whole(spec, s3, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "message", "operations"),
    [
        (r"PUT /data/out/.*annotations/shard=", r"annotations/shard=.*cannot be written: .*internal error", 4),
        (r"(HEAD|GET) /data/web/", "3 of 3 files are unreadable.*Internal Server Error", 12),  # a HEAD's says no more
        (COMMIT, r"annotations: cannot be committed to: .*500", 4),
    ],
)
def test_a_store_that_stays_down_ends_the_run_in_bounded_time(
    spec: CurateSpec, s3: S3, undisturbed: dict[str, Any], pattern: str, message: str, operations: int
) -> None:
    begin = time.monotonic()
    with s3.faulty(Struck(Fault.ERROR_500, pattern)), pytest.raises(CapfiltError, match=message):
        run(spec)
    assert time.monotonic() - begin < 180
    assert len(s3.injected) <= operations * REQUESTS
    assert run(spec).outcome == "done"
    assert_whole(spec, s3, undisturbed)
