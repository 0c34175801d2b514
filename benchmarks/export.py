"""`kind: export` in every format, against a plain loop with webdataset's own TarWriter and a bare copy, in turn.

    python benchmarks/export.py [--rows 10000] [--image-bytes 30000] [--formats webdataset parquet ...] [--writers 4]
                                [--repeats 3] [--json FILE] [--folder DIRECTORY]

A dataset of `--rows` pairs is put on record as workers write it: images of `--image-bytes` bytes that do not compress,
two kept texts each. All sides read it from the machine's own disk, which holds it in memory by then:

copy     its Parquet files, byte by byte: what the disk does
loop     what a person writes who knows webdataset: pyarrow reads batches, TarWriter writes image, text and JSON
FORMAT   an export, from the command's first look at the dataset to the directory put in its place, with its sha256

MB/s are those of the images. Ratios are of the same repeat: above 1 the export is the faster one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import webdataset as wds
from measuring import machine, shown, spread
from rich.console import Console

from capfilt.dataset import Counts, CuratedDataset, DataFile, Provenance, ShardCommit
from capfilt.export.driver import export
from capfilt.schema import ANNOTATION_FILE_SCHEMA, ANNOTATIONS, PAIRS
from capfilt.spec import ExportSpec
from capfilt.writer import ParquetWriter

FORMATS = ("webdataset", "parquet", "huggingface", "authors", "mds")
"""litdata is measured when it is named and installed."""

FILE_ROWS = 1000
SHARD_BYTES = 64 * 2**20
ABOUT = ("key", "url", "row", "width", "height", "format", "image_sha256")


def make_dataset(output: Path, rows: int, image_bytes: int) -> None:
    """Pairs in files as workers write them; of the annotations the counts alone, which no export reads row by row."""
    rng, provenance = np.random.default_rng(0), Provenance("1-2", "c" * 16, "s" * 16, "d" * 16, "first")
    pairs, annotations = [], []
    for start in range(0, rows, FILE_ROWS):
        stop = min(rows, start + FILE_ROWS)
        path = f"shard=web/{start:09d}-{stop:09d}-first-0.parquet"
        writer = ParquetWriter(PAIRS, str(output / PAIRS / path), {}, {"run": "first"})
        for row in range(start, stop):
            image = rng.bytes(int(image_bytes * rng.uniform(0.5, 1.5)))
            writer.append(make_row(row, image), len(image))
        pairs.append(DataFile(path, stop - start, writer.close()))
        file = output / ANNOTATIONS / path
        file.parent.mkdir(parents=True, exist_ok=True)
        blank = {name: [None] * (stop - start) for name in ANNOTATION_FILE_SCHEMA.names}
        own = {"row": range(start, stop), "status": ["kept"] * (stop - start), "run": ["first"] * (stop - start)}
        columns = {**blank, **own, **{name: [value] * (stop - start) for name, value in vars(provenance).items()}}
        pq.write_table(make_table(columns), file)
        annotations.append(DataFile(path, stop - start, file.stat().st_size, 0, stop - start))
    commit = ShardCommit("web", rows, Counts(kept=rows), provenance, tuple(annotations), tuple(pairs))
    CuratedDataset.for_writing(str(output), {}).commit([commit])


def make_table(columns: dict[str, Any]) -> Any:
    """Annotations from columns by name."""
    import pyarrow as pa

    return pa.table({name: pa.array(columns[name], kind) for name, kind in zip(
        ANNOTATION_FILE_SCHEMA.names, ANNOTATION_FILE_SCHEMA.types, strict=True
    )})  # fmt: skip


def make_row(row: int, image: bytes) -> dict[str, Any]:
    """A pair; its web text and a synthetic one were kept."""
    web, own = f"a photograph number {row} of a house by the sea in summer", f"a house by the sea, {row}"
    captions = [
        {"text": web, "source": "web", "captioner": None, "itm": 0.9},
        {"text": own, "source": "synthetic", "captioner": "captioner-base", "itm": 0.8},
    ]
    return {
        "row": row,
        "key": f"{row:09d}",
        "url": f"https://img{row % 97}.example.org/{row:x}.jpg",
        "format": "JPEG",
        "width": 512,
        "height": 384,
        "image_sha256": hashlib.sha256(image).hexdigest(),
        "image": image,
        "text": web,
        "captions": captions,
    }


def copy(dataset: Path, output: Path) -> None:
    """The pairs' files as they are."""
    output.mkdir()
    for number, file in enumerate(sorted((dataset / PAIRS).rglob("*.parquet"))):
        with file.open("rb") as source, (output / f"{number}.parquet").open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)


def loop(dataset: Path, output: Path) -> None:
    """The same tars as the export's, by webdataset's own writer."""
    output.mkdir()
    number = 0
    with wds.ShardWriter(f"{output}/%05d.tar", maxcount=10**9, maxsize=SHARD_BYTES, verbose=0) as writer:
        for file in sorted((dataset / PAIRS).rglob("*.parquet")):
            for batch in pq.ParquetFile(file).iter_batches(FILE_ROWS, columns=["image", "text", *ABOUT]):
                for row in batch.to_pylist():
                    about = {"caption": row["text"], **{name: row[name] for name in ABOUT}}
                    writer.write({"__key__": f"{number:09d}", "jpg": row["image"], "txt": row["text"], "json": about})
                    number += 1


def exporting(name: str, dataset: Path, writers: int) -> Callable[[Path, Path], None]:
    """An export in a format."""

    def run(_: Path, output: Path) -> None:
        spec = ExportSpec(
            kind="export",
            dataset=str(dataset),
            output=str(output),
            format=name,  # type: ignore[arg-type]
            shard_bytes=SHARD_BYTES,
            writers=writers,
        )
        export(spec, Console(file=io.StringIO()))

    return run


def timed(side: Callable[[Path, Path], None], dataset: Path, folder: Path) -> float:
    """Seconds of one run into a folder that is gone afterwards."""
    output = folder / "out"
    begin = time.perf_counter()
    side(dataset, output)
    seconds = time.perf_counter() - begin
    shutil.rmtree(output)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--image-bytes", type=int, default=30_000)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        folder = Path(place)
        dataset = folder / "dataset"
        make_dataset(dataset, asked.rows, asked.image_bytes)
        megabytes = sum(
            chunk.total_uncompressed_size
            for file in (dataset / PAIRS).rglob("*.parquet")
            for group in [pq.ParquetFile(file).metadata]
            for n in range(group.num_row_groups)
            for chunk in [group.row_group(n).column(group.schema.names.index("image"))]
        ) / 1e6  # fmt: skip
        sides: dict[str, Callable[[Path, Path], None]] = {"copy": copy, "loop": loop}
        sides |= {name: exporting(name, dataset, asked.writers) for name in asked.formats}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(asked.repeats + 1):
            for name, side in sides.items():
                took = timed(side, dataset, folder)
                if repeat:  # the first warms up
                    seconds[name].append(took)
    report = {
        "machine": machine(),
        "asked": {name: value for name, value in vars(asked).items() if name not in ("json", "folder")},
        "megabytes": megabytes,
        "seconds": seconds,
    }
    print(f"{asked.rows:,} pairs, {megabytes:,.0f} MB of images, {asked.writers} writers")
    for name, own in seconds.items():
        median = spread(own)["median"]
        line = f"{name:12} {asked.rows / median:8,.0f} rows/s {megabytes / median:7,.0f} MB/s"
        for other in ("loop", "copy"):
            if name not in ("copy", other):
                ratio = spread([theirs / ours for theirs, ours in zip(seconds[other], own, strict=True)])
                report.setdefault("ratios", {})[f"{name} against {other}"] = ratio
                line += f"   {other}: {shown(ratio)}"
        print(line)
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
