"""A disk that is full, or turns read-only, at any moment of a run: the error names it, and once it is mended the same
command finishes with what an undisturbed run makes.

The disk is a small file system in memory, which takes root to mount; a limit on the size of files is there for all.
"""

from __future__ import annotations

import io
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import MakeSpec, read, write_sick_shards
from rich.console import Console
from stubs import load_hash
from test_crash import plain_ids

from capfilt.dataset import DIRECTORIES
from capfilt.errors import StoreError
from capfilt.pipelines.curate import curate, in_process
from capfilt.schema import FILE_SCHEMAS, PAIRS
from capfilt.spec import CurateSpec
from capfilt.writer import ParquetWriter

DRIVER = Path(__file__).parent / "plain_driver.py"
FRAGMENTS = 8
CAUSES = {
    "blocks": "No space left on device",
    "inodes": "No space left on device",
    "read-only": "Read-only file system",
    "limit": "File too large",
}
LEFT = {"blocks": 9, "inodes": 9, "read-only": 0, "limit": 2}
"""The most that is left: blocks of 4 KiB, files, or KiB of each file; less than what the rest of the run takes."""
FAULTS = {"blocks": 32, "inodes": 8, "read-only": 9, "limit": 9}
"""How many of each kind."""

Tables = dict[str, list[dict[str, Any]]]


class Disk:
    """A file system of 4 MiB and 500 files at a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        options = ("-t", "tmpfs", "-o", "size=4m,nr_inodes=500", "none", str(folder))
        done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def command(self, kind: str, left: int) -> str:
        """What a shell does to it: so many blocks of 4 KiB, or files, are left; or nothing can be written."""
        filler = shlex.quote(str(self.folder / "filler"))
        if kind == "blocks":
            return f"cat /dev/zero > {filler} 2> /dev/null; truncate --size=-{4 * left}K {filler}"
        if kind == "inodes":
            fill = f"{{ n=0; while true > {filler}$n; do n=$((n + 1)); done; }} 2> /dev/null"
            return f"{fill}; while [ $n -gt 0 ] && [ $((k += 1)) -le {left} ]; do rm {filler}$((n -= 1)); done"
        # It is refused while a file is open for writing.
        return f"until mount -o remount,ro {shlex.quote(str(self.folder))} 2> /dev/null; do sleep 0.01; done"

    def mend(self) -> None:
        """Make room, and let it be written."""
        subprocess.run(["mount", "-o", "remount,rw", str(self.folder)], check=True)
        for filler in self.folder.glob("filler*"):
            filler.unlink()

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@dataclass(frozen=True)
class Fault:
    """A moment of a run: so many fragments are finished. So much can be written from then on."""

    kind: str
    after: int
    left: int


def drawn(kind: str) -> list[Fault]:
    """The faults of a kind: all different."""
    moments = range(FRAGMENTS + 1)
    faults = [
        Fault(kind, after, left)
        for after in moments
        for left in range(1 + (LEFT[kind] if after < FRAGMENTS else min(LEFT[kind], 2)))
    ]
    return random.Random(kind).sample(faults, FAULTS[kind])


@pytest.fixture
def spec(make_spec: MakeSpec, tmp_path: Path) -> CurateSpec:
    """Eight fragments."""
    write_sick_shards(tmp_path / "in")
    return make_spec(fragment_rows=15, output=str(tmp_path / "disk" / "out"))


@pytest.fixture
def undisturbed(spec: CurateSpec, tmp_path: Path) -> Tables:
    whole = spec.model_copy(update={"output": str(tmp_path / "undisturbed")})
    curate(whole, load=load_hash, execute=in_process, console=Console(file=io.StringIO()))
    return tables(whole.output)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


def tables(output: str) -> Tables:
    return {name: [{**row, "run": None} for row in read(output, name)] for name in DIRECTORIES}


def drive(spec: CurateSpec, *fault: str) -> subprocess.CompletedProcess[str]:
    file = Path(spec.output).parent.parent / "spec.json"
    file.write_text(spec.model_dump_json())
    command = [sys.executable, str(DRIVER), str(file), "0", *fault]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def check_failed(done: subprocess.CompletedProcess[str], output: str, cause: str) -> str:
    """One line says where, why and what next. That line."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if cause in line]
    assert line.startswith(output)
    assert "mend the cause, if it does not pass, and run again to resume" in line
    return line


def check_partial(output: str, undisturbed: Tables) -> None:
    """What is committed is whole and right; the other tables are at most a commit behind."""
    if not list(Path(output).glob("annotations/_delta_log/*.json")):
        return
    now = tables(output)
    shards = {row["shard"] for row in now["annotations"]}
    for name, rows in now.items():
        of_shards = [row for row in undisturbed[name] if row["shard"] in shards]
        assert rows == of_shards or (name != "annotations" and not rows)


def check_whole(output: str, undisturbed: Tables) -> None:
    """Every row once, as in an undisturbed run; no reader sees more, and nothing is left over."""
    assert tables(output) == undisturbed
    for name in ("annotations", "pairs"):
        assert plain_ids(Path(output) / name) == [(row["shard"], row["row"]) for row in undisturbed[name]]
    record, lease, closed = (r"_runs/\d{8}T[^/]+/(run|summary)\.json", r"_runs/lease/\d+\.json", r"_runs/closed/[^/]+")
    known = rf"_delta_log/\d+\.json|shard=[^/]+/[^/]+\.parquet|{record}|{lease}|{closed}"
    files = [str(path) for path in Path(output).rglob("*") if path.is_file()]
    assert [file for file in files if not re.search(f"/({known})$", file)] == []


def cases(kind: str, fast: int = 0) -> list[Any]:
    """The faults of a kind, of which so many have their turn in every test run."""
    return [
        pytest.param(fault, marks=[pytest.mark.slow] * (n >= fast), id=f"{kind}-{fault.after}-{fault.left}")
        for n, fault in enumerate(drawn(kind))
    ]


@pytest.mark.parametrize("fault", [*cases("blocks", fast=1), *cases("inodes"), *cases("read-only", fast=1)])
def test_a_disk_that_refuses_is_named_and_costs_nothing(
    disk: Disk, spec: CurateSpec, undisturbed: Tables, fault: Fault
) -> None:
    struck = drive(spec, str(fault.after), disk.command(fault.kind, fault.left))
    print(check_failed(struck, spec.output, CAUSES[fault.kind]))
    check_partial(spec.output, undisturbed)
    disk.mend()
    assert drive(spec).returncode == 0
    check_whole(spec.output, undisturbed)


@pytest.mark.parametrize("fault", cases("limit"))
def test_a_limit_on_files_is_named_and_costs_nothing(spec: CurateSpec, undisturbed: Tables, fault: Fault) -> None:
    struck = drive(spec, str(fault.after), f"prlimit --pid $PPID --fsize={1024 * fault.left}")
    print(check_failed(struck, spec.output, CAUSES["limit"]))
    check_partial(spec.output, undisturbed)
    assert drive(spec).returncode == 0
    check_whole(spec.output, undisturbed)


def test_a_file_that_cannot_be_begun_or_grow_is_named(disk: Disk) -> None:
    """The first bytes are written before the first row is there."""
    url, full = f"{disk.folder}/1.parquet", rf"^{disk.folder}/1\.parquet: cannot be written: .*No space left on device"
    row = {**dict.fromkeys(FILE_SCHEMAS[PAIRS].names), "image": bytes(2**20), "captions": []}
    table = pa.Table.from_pylist([row], FILE_SCHEMAS[PAIRS])
    writer, fill = ParquetWriter(PAIRS, url, {}), ["/bin/sh", "-c", disk.command("blocks", 0)]
    subprocess.run(fill, check=True)
    with pytest.raises(StoreError, match=full):
        writer.write(table)
    writer.abandon()
    subprocess.run(fill, check=True)
    with pytest.raises(StoreError, match=full):
        ParquetWriter(PAIRS, url, {})
    assert not Path(url).exists()
    disk.mend()
    writer = ParquetWriter(PAIRS, url, {})
    writer.write(table)
    assert writer.close() > 2**20


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_full_disk_ends_a_run_on_ray_by_its_name(disk: Disk, spec: CurateSpec, undisturbed: Tables) -> None:
    """A worker, in a process of its own, meets it."""
    Path(spec.output).mkdir()
    strike = disk.command("blocks", 12)
    subprocess.run(["/bin/sh", "-c", strike], check=True)
    with pytest.raises(StoreError, match=rf"^{spec.output}/.*No space left on device.*run again to resume"):
        curate(spec, load=load_hash, console=Console(file=io.StringIO()))
    check_partial(spec.output, undisturbed)
    disk.mend()
    assert drive(spec).returncode == 0
    check_whole(spec.output, undisturbed)
