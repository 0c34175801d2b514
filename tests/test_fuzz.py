"""Hostile files: no outcome but those that are meant, no crash, no hang, bounded memory."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from conftest import MakeSpec, read, write_shard
from fuzz import CPU_SECONDS, Found, sweep
from mutations import images, mutated_image, parquets
from rich.console import Console
from stubs import load_hash

from capfilt.images import decode
from capfilt.pipelines.curate import curate, in_process
from capfilt.schema import Reason
from capfilt.spec import Images

MEGABYTES = 2_000
"""What a process may grow by: 32 bytes a pixel of images.max_pixels."""


def check(found: Found) -> None:
    print(found)
    assert not found.faults
    assert found.noise == ""
    assert found.slowest[0] < CPU_SECONDS
    assert found.megabytes < MEGABYTES


def test_what_is_mutated_is_good_before() -> None:
    assert {decode(data, Images()).format for data in images()} == {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"}
    assert len(parquets()) == 7


def test_a_few_mutated_images_and_shards() -> None:
    check(sweep("images", range(2_000), processes=1))
    check(sweep("parquets", range(16), processes=1))


def curate_mutated(make_spec: MakeSpec, directory: Path, rows: int, **options: object) -> None:
    """Each has its row, and a reason of images' where it has no picture."""
    for start in range(0, rows, 500):
        part: list[bytes | None] = [mutated_image(n) for n in range(start, min(start + 500, rows))]
        write_shard(directory / "in" / f"{start:06d}.parquet", part)
    spec = make_spec(max_error_fraction=1.0)
    curate(spec, load=load_hash, console=Console(file=io.StringIO()), **options)  # type: ignore[arg-type]
    found = read(spec.output)
    assert len(found) == rows
    errors = {row["reason"] for row in found if row["status"] == "error"}
    assert errors <= {
        *(Reason.CORRUPT_IMAGE, Reason.TRUNCATED_IMAGE, Reason.NOT_AN_IMAGE, Reason.TOO_MANY_PIXELS),
        *(Reason.TOO_MANY_BYTES, Reason.EMPTY_IMAGE),
    }
    assert {"kept", "error"} <= {row["status"] for row in found}


def test_a_run_over_mutated_images(make_spec: MakeSpec, tmp_path: Path) -> None:
    curate_mutated(make_spec, tmp_path, 400, execute=in_process)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_run_on_ray_over_mutated_images(make_spec: MakeSpec, tmp_path: Path) -> None:
    curate_mutated(make_spec, tmp_path, 10_000)


@pytest.mark.slow
def test_a_hundred_thousand_mutated_images() -> None:
    check(sweep("images", range(100_000)))


@pytest.mark.slow
def test_two_thousand_mutated_shards() -> None:
    check(sweep("parquets", range(2_000), processes=4))  # most of the time is waiting to read once more
