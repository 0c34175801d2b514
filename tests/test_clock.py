"""Clocks that are wrong, and that are set while a run is at work: they cost nothing, and a store that minds is named.

The clock is that of one process (libfaketime); files are stamped by the system's, as by a store on another machine.
"""

from __future__ import annotations

import importlib.util
import io
import os
import random
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeSpec, read, write_sick_shards
from rich.console import Console
from s3 import S3
from stubs import load_hash
from test_disk import DRIVER, check_failed, check_whole, tables

from capfilt import open_dataset
from capfilt.pipelines.curate import curate, in_process
from capfilt.records import DIED
from capfilt.spec import CurateSpec, Input, Thresholds

FRAGMENTS = 8
OFFSETS = ("-10y", "-1d", "-1h", "+1h", "+1d", "+10y")
FAULTS = {"skew": 12, "set": 6, "store": 3}
"""How many of each kind: runs by several wrong clocks, clocks that are set meanwhile, stores that refuse."""


def library() -> str:
    """libfaketime's, to be preloaded."""
    found = importlib.util.find_spec("libfaketime")
    origin = found.origin if found else None
    path = Path(origin).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1" if origin else Path()
    if not path.is_file():
        pytest.skip("libfaketime is not there for this system")
    return str(path)


@pytest.fixture
def spec(make_spec: MakeSpec, tmp_path: Path) -> CurateSpec:
    """Eight fragments."""
    write_sick_shards(tmp_path / "in")
    return make_spec(fragment_rows=15)


def undisturbed(spec: CurateSpec, name: str = "undisturbed") -> dict[str, Any]:
    whole = spec.model_copy(update={"output": str(Path(spec.output).with_name(name))})
    curate(whole, load=load_hash, execute=in_process, console=Console(file=io.StringIO()))
    return tables(whole.output)


@dataclass
class Clock:
    """A clock that is off, and can be set: `date` says how, as "+1h"."""

    file: Path

    def set(self, offset: str) -> None:
        self.file.write_text(offset)

    def command(self, offset: str) -> str:
        return f"printf %s {offset} > {shlex.quote(str(self.file))}"

    def drive(self, spec: CurateSpec, *strike: str) -> subprocess.CompletedProcess[str]:
        """A run by it."""
        file = self.file.with_name("spec.json")
        file.write_text(spec.model_dump_json())
        fake = {"LD_PRELOAD": library(), "FAKETIME_TIMESTAMP_FILE": str(self.file), "FAKETIME_NO_CACHE": "1"}
        own = {"DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
        command = [sys.executable, str(DRIVER), str(file), "0", *strike]
        environment = {**os.environ, **fake, **own}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path / "clock")


def cases(kind: str, fast: int = 0) -> list[Any]:
    """Seeds, of which so many have their turn in every test run."""
    return [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= fast)) for seed in range(FAULTS[kind])]


@pytest.mark.parametrize("seed", cases("skew", fast=1))
def test_runs_by_different_clocks_make_one_dataset(spec: CurateSpec, clock: Clock, seed: int) -> None:
    """The first is killed; the second resumes it, and the third decides anew, each by another clock."""
    rng = random.Random(f"skew {seed}")
    first, second, third = rng.sample(OFFSETS, 3)
    clock.set(first)
    assert clock.drive(spec, str(rng.randint(1, FRAGMENTS)), "kill -9 $PPID").returncode == -9
    clock.set(second)
    done = clock.drive(spec)
    assert done.returncode == 0, done.stderr
    assert "which is dead" in done.stderr  # at once, whatever the clock says of its last beat
    check_whole(spec.output, undisturbed(spec))
    assert sorted(record.outcome for record in open_dataset(spec.output).runs()) == ["done", DIED]
    stricter = spec.model_copy(update={"thresholds": Thresholds(web=0.7, synthetic=0.6)})
    clock.set(third)
    done = clock.drive(stricter)
    assert done.returncode == 0, done.stderr
    assert tables(spec.output) == undisturbed(stricter, "stricter")
    dataset = open_dataset(spec.output)
    versions = [version.version for version in dataset.history()]
    assert versions == sorted(versions, reverse=True)
    assert dataset.annotations(0).count_rows() == 0  # as it was, whenever that was


@pytest.mark.parametrize("seed", cases("set"))
def test_a_clock_that_is_set_meanwhile_is_not_noticed(spec: CurateSpec, clock: Clock, seed: int) -> None:
    rng = random.Random(f"set {seed}")
    clock.set("+0")
    offset = OFFSETS[seed % len(OFFSETS)]
    done = clock.drive(spec, str(rng.randint(1, FRAGMENTS - 1)), clock.command(offset))
    assert done.returncode == 0, done.stderr
    check_whole(spec.output, undisturbed(spec))
    (record,) = open_dataset(spec.output).runs()
    assert record.outcome == "done"
    assert record.seconds is not None
    assert 0 < record.device_seconds["cpu_busy"] <= record.device_seconds["cpu_held"] <= record.seconds < 120


LEFT_BEHIND = """
for file in {output}/*/shard=*/*.parquet; do cp "$file" "${{file%.parquet}}0.parquet"; done
"""


def test_what_a_dead_attempt_left_goes_though_the_clock_is_behind_its_stamps(spec: CurateSpec, clock: Clock) -> None:
    """A plain Parquet reader would see these rows twice."""
    clock.set("-4")
    leave = LEFT_BEHIND.format(output=shlex.quote(spec.output))
    done = clock.drive(spec, str(FRAGMENTS), leave)
    assert done.returncode == 0, done.stderr
    check_whole(spec.output, undisturbed(spec))


@pytest.mark.parametrize("seed", cases("store"))
def test_a_store_that_minds_the_clock_is_named(
    spec: CurateSpec, s3: S3, clock: Clock, tmp_path: Path, seed: int
) -> None:
    """S3 refuses requests of a clock that is 15 minutes off."""
    for file in sorted(Path(spec.input.paths[0]).iterdir()):
        s3.files().pipe_file(f"data/clock/{tmp_path.name}/in/{file.name}", file.read_bytes())
    output = f"s3://data/clock/{tmp_path.name}/out"
    where = Input(paths=(f"s3://data/clock/{tmp_path.name}/in",), storage_options=s3.options)
    remote = spec.model_copy(update={"input": where, "output": output, "output_options": s3.options})
    clock.set("+0")
    strikes = [("0", "+16m"), ("3", "-1h"), (str(FRAGMENTS), "+1d")]
    after, offset = strikes[seed]
    done = clock.drive(remote, after, clock.command(offset))
    line = check_failed(done, "s3://data/clock/", "request time and the current time is too large")
    print(line)
    clock.set("+0")
    done = clock.drive(remote)
    assert done.returncode == 0, done.stderr

    def identities(output: str, options: dict[str, Any]) -> list[tuple[Any, ...]]:
        rows = read(output, "annotations", options)
        return [(row["shard"].rpartition("-")[0], row["row"], row["status"], row["texts"]) for row in rows]

    undisturbed(spec)
    assert identities(output, s3.options) == identities(str(Path(spec.output).with_name("undisturbed")), {})
