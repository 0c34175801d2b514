"""Runs that overlap on one output, in processes of their own: at once, killed, stopped and woken; and what they log."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeSpec, jpeg, read, write_shard
from rich.console import Console
from stubs import load_hash
from typer.testing import CliRunner

from capfilt import open_dataset
from capfilt.cli import app
from capfilt.dataset import CuratedDataset
from capfilt.errors import LeaseHeldError
from capfilt.fragments import Fragment
from capfilt.holder import standing
from capfilt.lease import Lease
from capfilt.pipelines.curate import Summary, curate, in_process
from capfilt.pipelines.worker import Job, LoadModels
from capfilt.receipts import RECEIPTS, Receipt
from capfilt.records import DIED, RUNNING
from capfilt.spec import CurateSpec
from capfilt.terminal import out

LEASE_SECONDS = 5
DRIVER = Path(__file__).parent / "plain_driver.py"


class Driver:
    """A run in a process of its own, in the middle of its work."""

    def __init__(self, spec: CurateSpec, pause: float = 0.3, **environment: str) -> None:
        file = Path(spec.output).parent / "spec.json"
        file.write_text(spec.model_dump_json())
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER), str(file), str(pause)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.until(lambda: len(list((Path(spec.output) / RECEIPTS).rglob("*.json"))) > 3)

    def until(self, happened: Callable[[], bool], patience: float = 60) -> None:
        deadline = time.monotonic() + patience
        while not happened():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.fixture
def spec(make_spec: MakeSpec, tmp_path: Path) -> CurateSpec:
    """Four shards of 60 rows, 16 fragments; some rows are bad."""
    for s in range(4):
        images: list[bytes | None] = [jpeg(100 * s + i) for i in range(60)]
        images[3], images[50] = None, b"<html>"
        write_shard(tmp_path / "in" / f"{s:05d}.parquet", images)
    return make_spec(fragment_rows=20, lease_seconds=LEASE_SECONDS)


@pytest.fixture
def driver(spec: CurateSpec) -> Iterator[Driver]:
    one = Driver(spec)
    yield one
    if one.process.poll() is None:
        one.process.kill()
        one.process.communicate()


def run(spec: CurateSpec, execute: Any = in_process) -> Summary:
    return curate(spec, load=load_hash, execute=execute, console=Console(file=io.StringIO()))


def rows(output: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Annotations and pairs, without the runs that made them, and when."""
    annotations, pairs = (
        [{**row, "run": None, "generation": None} for row in read(output, table)] for table in ("annotations", "pairs")
    )
    return annotations, pairs


def undisturbed(spec: CurateSpec) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    other = spec.model_copy(update={"output": f"{spec.output}-undisturbed"})
    run(other)
    return rows(other.output)


def test_a_second_run_ends_at_once_and_the_first_does_not_notice(spec: CurateSpec, driver: Driver) -> None:
    before = sorted(Path(spec.output).glob("_runs/*"))
    begin = time.monotonic()
    with pytest.raises(LeaseHeldError, match=f"process {driver.process.pid}"):
        run(spec)
    assert time.monotonic() - begin < 1
    assert sorted(Path(spec.output).glob("_runs/*")) == before
    (record,) = open_dataset(spec.output).runs()
    assert (record.outcome, record.ended) == (RUNNING, None)
    assert "held by run " in CliRunner().invoke(app, ["status", spec.output]).stdout
    assert isinstance(CliRunner().invoke(app, ["vacuum", spec.output]).exception, LeaseHeldError)
    assert driver.end()[0] == 0
    assert rows(spec.output) == undisturbed(spec)


def test_a_killed_run_is_taken_over_at_once(spec: CurateSpec, driver: Driver) -> None:
    driver.process.kill()
    driver.process.communicate()
    assert open_dataset(spec.output).runs()[0].outcome == DIED
    assert "left by a run that died: run " in CliRunner().invoke(app, ["status", spec.output]).stdout
    begin = time.monotonic()
    assert run(spec).adopted_rows >= 60
    assert time.monotonic() - begin < LEASE_SECONDS
    assert rows(spec.output) == undisturbed(spec)
    assert [record.outcome for record in open_dataset(spec.output).runs()] == ["done", DIED]


@pytest.mark.parametrize("woken", ["in the middle", pytest.param("after the end", marks=pytest.mark.slow)])
def test_a_stopped_run_loses_cleanly_and_corrupts_nothing(spec: CurateSpec, driver: Driver, woken: str) -> None:
    os.kill(driver.process.pid, signal.SIGSTOP)
    time.sleep(LEASE_SECONDS)  # on this machine its last beat is known to be so old

    def waking(job: Job, work: Iterator[Fragment], load: LoadModels) -> Iterator[list[Receipt]]:
        for number, receipts in enumerate(in_process(job, work, load)):
            if number == 1 and woken == "in the middle":
                lose()
            yield receipts

    def lose() -> None:
        os.kill(driver.process.pid, signal.SIGCONT)
        code, errors = driver.end()
        assert code == 4, errors
        assert "taken over by run " in errors
        assert "Traceback" not in errors

    summary = run(spec, waking)
    assert summary.outcome == "done"
    if woken == "after the end":
        versions = CuratedDataset.for_reading(spec.output, {}).versions()
        lose()
        assert CuratedDataset.for_reading(spec.output, {}).versions() == versions
    assert rows(spec.output) == undisturbed(spec)
    newest, lost = open_dataset(spec.output).runs()
    assert newest.outcome == "done"
    assert lost.outcome.startswith("LeaseLostError: ")
    holder = standing(spec.output, {}).holder
    assert holder is not None
    assert (holder.run, holder.ended is None) == (summary.run, False)


@pytest.mark.parametrize("stop", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_the_lease_is_given_back_after_an_interrupt(spec: CurateSpec, driver: Driver, stop: signal.Signals) -> None:
    driver.process.send_signal(stop)
    assert driver.end()[0] != 0
    assert standing(spec.output, {}).free


def test_the_command_says_who_holds_the_output_and_exits_with_4(spec: CurateSpec, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(spec.model_dump_json())  # JSON is YAML
    with Lease(spec.output, {}, "first"):
        for form, code in (("text", 4), ("json", 4), ("xml", 2)):
            done = capfilt("run", file, CAPFILT_LOG_FORMAT=form)
            assert done.returncode == code, done.stderr
            assert done.stdout == ""
            if form == "text":
                assert done.stderr.startswith(f"capfilt: {spec.output}: held by run first on ")
                assert len(done.stderr.splitlines()) == 1
            elif form == "json":
                held, ended, failed = map(json.loads, done.stderr.splitlines())
                assert (held["event"], held["holder"], held["pid"]) == ("lease_held", "first", os.getpid())
                assert (ended["event"], ended["level"]) == ("run_ended", "warning")
                assert (failed["event"], failed["error"], failed["exit_code"]) == ("failed", "LeaseHeldError", 4)
            else:
                assert done.stderr == "capfilt: CAPFILT_LOG_FORMAT=xml: write text or json\n"
        for form in ("text", "json"):
            done = capfilt("run", file, "--overlap-ok", CAPFILT_LOG_FORMAT=form)
            assert (done.returncode, done.stdout) == (0, ""), done.stderr
            said = done.stderr if form == "text" else json.loads(done.stderr.splitlines()[-1])["message"]
            assert f"{spec.output}: held by run first on " in said
            assert said.rstrip().endswith("Exit code 0, as --overlap-ok asks")
    assert not list(Path(spec.output).glob("annotations"))


def capfilt(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "capfilt", *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_events_tell_the_run_in_json(spec: CurateSpec, tmp_path: Path) -> None:
    (tmp_path / "in" / "a\n\x1b[2J.parquet").write_bytes(b"no Parquet")
    spec = spec.model_copy(update={"max_error_fraction": 0.5})
    driver = Driver(spec, 0, CAPFILT_LOG_FORMAT="json", CAPFILT_LOG_LEVEL="debug")
    code, errors = driver.end()
    assert code == 0, errors
    assert "\x1b" not in errors
    events = [json.loads(line) for line in errors.splitlines()]
    names = [event["event"] for event in events]
    assert names.count("fragment_finished") == 16
    assert names.count("shard_committed") == 4
    assert (names[0], names[1], names[-1]) == ("lease_taken", "run_started", "run_ended")
    (record,) = open_dataset(spec.output).runs()
    assert {event["run"] for event in events} == {record.run}
    (failed,) = [event for event in events if event["event"] == "shard_failed"]
    assert failed["level"] == "warning"
    assert "not readable as Parquet" in failed["error"]
    committed = [event for event in events if event["event"] == "shard_committed"]
    assert sum(event["rows"] for event in committed) == events[-1]["rows"] == record.rows == 240
    assert (events[-1]["outcome"], events[-1]["errors"], events[-1]["failed"]) == ("done", 4, 1)


# --- the record ---


def test_what_a_run_leaves_on_record(spec: CurateSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY")
    summary = run(spec)
    (record,) = open_dataset(spec.output).runs()
    assert (record.run, record.outcome, record.shards, record.rows) == (summary.run, "done", 4, 240)
    assert (record.kept, record.dropped, record.errors) == (
        *(summary.counts.kept, summary.counts.dropped),
        4,
    )
    assert record.seconds == pytest.approx(summary.elapsed)
    assert record.images_per_second == pytest.approx(240 / summary.elapsed)
    assert record.started is not None
    assert record.ended is not None
    assert record.started <= record.ended
    busy, held = record.device_seconds["cpu_busy"], record.device_seconds["cpu_held"]
    assert 0 < busy <= held <= summary.elapsed
    assert busy == pytest.approx(summary.seconds["model"], abs=1e-3)
    assert record.device_seconds["gpu_held"] == 0
    for name in ("spec", "fingerprints", "packages", "reasons", "host", "python", "versions"):
        assert record.details[name], name
    listed = json.loads(CliRunner().invoke(app, ["runs", spec.output, "--json"]).stdout)
    assert listed == [json.loads(json.dumps(record.as_json()))]
    monkeypatch.setattr(out, "width", 200)  # it took that of its terminal, if any, when it was made
    table = CliRunner().invoke(app, ["runs", spec.output]).stdout
    for cell in (summary.run, "done", "240"):
        assert cell in table


def test_only_the_newest_runs_are_listed_and_a_torn_record_is_one_that_died(spec: CurateSpec, tmp_path: Path) -> None:
    run(spec)
    write_shard(tmp_path / "in" / "new.parquet", [jpeg(1)] * 5)
    last = run(spec)
    (Path(spec.output) / "_runs" / last.run / "summary.json").write_text('{"outcome": "do')
    assert [record.outcome for record in open_dataset(spec.output).runs()] == [DIED, "done"]
    (newest,) = json.loads(CliRunner().invoke(app, ["runs", spec.output, "--last", "1", "--json"]).stdout)
    assert (newest["run"], newest["outcome"], newest["rows"]) == (last.run, DIED, 0)
