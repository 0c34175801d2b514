"""Tables whose log or files were damaged by hand: the file is named, with what can be done about it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MakeSpec, jpeg, read, write_shard
from rich.console import Console
from stubs import load_hash

from capfilt.damage import of_data
from capfilt.dataset import CuratedDataset
from capfilt.errors import DatasetError
from capfilt.pipelines.curate import curate, in_process
from capfilt.report import make_report
from capfilt.spec import CurateSpec


def run(spec: CurateSpec) -> None:
    curate(spec, load=load_hash, execute=in_process, console=Console(quiet=True))


@pytest.fixture
def spec(make_spec: MakeSpec, tmp_path: Path) -> CurateSpec:
    """Of an output with two shards, each of a commit."""
    spec = make_spec(report=False)
    for number in range(2):
        write_shard(tmp_path / "in" / f"{number:05d}.parquet", [jpeg(100 * number + row) for row in range(20)])
        run(spec)
    return spec


def entry(spec: CurateSpec, number: int) -> Path:
    return Path(spec.output) / "annotations" / "_delta_log" / f"{number:020d}.json"


def data_file(spec: CurateSpec) -> Path:
    return next((Path(spec.output) / "annotations").rglob("shard=00000*/*.parquet"))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def overwrite(path: Path) -> None:
    path.write_bytes(b"\x00\xffgarbage\n")


@pytest.mark.parametrize(
    ("number", "harm", "message"),
    [
        (2, cut_short, "_delta_log/00000000000000000002.json is damaged: cut short, or overwritten. Restore that file"),
        (1, overwrite, "_delta_log/00000000000000000001.json is damaged"),
        (1, Path.unlink, "_delta_log/00000000000000000001.json is gone. Restore that file from a copy"),
        (0, Path.unlink, "_delta_log/00000000000000000000.json is gone"),
    ],
)
def test_a_damaged_log_is_named_by_its_entry(
    spec: CurateSpec, number: int, harm: Callable[[Path], None], message: str
) -> None:
    harm(entry(spec, number))
    for opened in (lambda: CuratedDataset.for_reading(spec.output, {}), lambda: run(spec)):
        with pytest.raises(DatasetError) as failed:
            opened()
        said = str(failed.value)
        assert f"{spec.output}/annotations: cannot be opened: {message}" in said
        assert "\n" not in said
        assert "<unknown>" not in said
        assert len(said) < 400


@pytest.mark.parametrize(
    ("harm", "what"),
    [(Path.unlink, "is gone. Restore"), (cut_short, "is damaged, and not readable as Parquet. Restore")],
)
def test_a_data_file_is_named_and_what_is_said_to_help_does(
    spec: CurateSpec, harm: Callable[[Path], None], what: str
) -> None:
    before = read(spec.output)
    file = data_file(spec)
    harm(file)
    dataset = CuratedDataset.for_reading(spec.output, {})
    for reader in (dataset.reasons, lambda: make_report(dataset, {})):
        with pytest.raises(DatasetError) as failed:
            reader()
        name = file.relative_to(spec.output)
        assert f"version {dataset.versions()['annotations']} of the annotations cannot be read: {name} {what}" in str(
            failed.value
        )
    os.utime(Path(spec.input.paths[0]) / "00000.parquet", (1, 1))
    run(spec)
    assert [row["texts"] for row in read(spec.output)] == [row["texts"] for row in before]


def test_a_file_that_may_not_be_read_is_no_damage() -> None:
    file = "/o/annotations/shard=0/0.parquet"
    denied = PermissionError(f"IOError: Failed to open local file '{file}'. Detail: [errno 13] Permission denied")
    said = of_data("/o", "annotations", 1, 2, denied)
    assert said.endswith(f"{file}: Permission denied. Give the user who runs this the right to it")
