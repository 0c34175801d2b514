"""Shared fixtures: small real Parquet, a spec for it, and one local Ray for the whole session."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from PIL import Image
from s3 import S3

from capfilt.spec import CaptionerCard, CurateSpec, FilterCard, Input, LocalCheckpoint

settings.register_profile("shared machine", deadline=None)  # a busy one is no fault of the code
settings.load_profile("shared machine")

# Nobody's own: of this process, and of the Ray that it starts.
for setting in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
    os.environ.pop(setting, None)
os.environ |= {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}
os.environ |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}


def jpeg(seed: int, side: int = 24) -> bytes:
    """A small JPEG, different for every seed."""
    rng = np.random.default_rng(seed)
    pixels = np.kron(rng.integers(0, 255, (4, 4, 3), np.uint8), np.ones((side // 4, side // 4, 1), np.uint8))
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write_shard(
    path: Path, images: Sequence[bytes | None], texts: Sequence[str | None] | None = None, row_group: int = 50
) -> Path:
    """A Parquet shard with img2dataset's column names."""
    texts = [f"text {i} of {path.stem}" for i in range(len(images))] if texts is None else texts
    columns = {
        "key": pa.array([f"{i:09d}" for i in range(len(images))], pa.string()),
        "url": pa.array([f"http://example.org/{path.stem}/{i}.jpg" for i in range(len(images))], pa.string()),
        "caption": pa.array(texts, pa.string()),
        "jpg": pa.array(images, pa.binary()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group)
    return path


def write_sick_shards(folder: Path) -> None:
    """Four shards of 30 rows; some rows are bad."""
    for s in range(4):
        images: list[bytes | None] = [jpeg(100 * s + i) for i in range(30)]
        images[3], images[17] = None, b"<html>"
        write_shard(folder / f"{s:05d}.parquet", images)


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[Path]:
    """For Ray's sessions; the names of its sockets leave room for a short path only."""
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


MakeSpec = Callable[..., CurateSpec]


@pytest.fixture
def make_spec(tmp_path: Path) -> MakeSpec:
    """Makes a spec over `tmp_path/in` with output `tmp_path/out`; keyword arguments replace fields."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "vocab.txt").write_text("[PAD]")

    def make(**fields: Any) -> CurateSpec:
        local = LocalCheckpoint(path=str(checkpoint))
        defaults: dict[str, Any] = {
            "kind": "curate",
            "input": Input(paths=(str(tmp_path / "in"),)),
            "output": str(tmp_path / "out"),
            "captioners": (
                CaptionerCard(role="captioner", name="stub-captioner", checkpoint=local, image_size=16, batch_size=8),
            ),
            "filters": (FilterCard(role="filter", name="stub-filter", checkpoint=local, image_size=16, batch_size=8),),
            "fragment_rows": 40,
            "report": False,  # tests/test_report.py's runs leave one
        }
        return CurateSpec(**{**defaults, **fields})

    return make


def read(output: str, table: str = "annotations", options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Every row of a table of a curated dataset, in order of shard and row."""
    from capfilt.dataset import CuratedDataset

    dataset = CuratedDataset.for_reading(output, options or {})
    rows = getattr(dataset, table)().to_table().to_pylist()
    return sorted(rows, key=lambda row: (row["shard"], row["row"]))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """One S3-speaking server for the whole session, with the bucket `data`."""
    with S3() as server:
        server.files().mkdir("data")
        yield server


@pytest.fixture
def s3(s3_server: S3) -> S3:
    """That server, smooth and asked nothing yet."""
    s3_server.reset()
    return s3_server


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray on this machine for the whole session, shut down at its end."""
    import ray
    import stubs

    ray.cloudpickle.register_pickle_by_value(stubs)  # the workers cannot import what lies under tests/
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=200 * 2**20,
    )
    yield
    ray.shutdown()
