"""A report of a large dataset, as after a night's run: seconds and peak memory of `capfilt report`, in its own process.

    python benchmarks/report.py [--rows 1000000] [--shards 1000] [--words 200000] [--folder DIRECTORY] [--json FILE]

`--shards` shards are curated twice, as far as the tables and the runs' records tell: every row with a web text and a
synthetic one and random scores, half of which reach the threshold; the second night has other texts and scores. Words
of texts are drawn from a vocabulary of `--words` by Zipf's law, 4 to 20 to a web text and 6 to 14 to a synthetic one.
So the report tallies both versions and compares them.

The gallery's pictures are JPEGs of 512 pixels and 83 kB on average, in row groups of 100 rows: those of kept rows lie
in the pairs, those of dropped ones in the input. The files with pictures of `DRAWN` shards are written; the others' are
hard links to them, so that a million rows take half a gigabyte. Making the data is not counted. It is read from memory,
where it lies since it was made.

Where there is a Chromium, and Playwright, its page's slider is moved 13 times: milliseconds from the event to the next
frame drawn, to be 100 at the most.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from measuring import machine, spread
from PIL import Image

from capfilt.dataset import Counts, CuratedDataset, DataFile, Provenance, ShardCommit
from capfilt.inputs import InputFile, list_inputs
from capfilt.records import SUMMARY
from capfilt.schema import ANNOTATION_FILE_SCHEMA, ANNOTATIONS, PAIR_FILE_SCHEMA, PAIRS, TEXT_STRUCT
from capfilt.spec import CaptionerCard, CurateSpec, FilterCard, HubCheckpoint, Input

THRESHOLD = 0.5
NIGHTS = ("night-1", "night-2")
DRAWN = 4
"""Shards whose pictures, and which of whose texts are kept, are drawn."""

PICTURES = 64
"""Different ones; what follows the end of each makes it a row's own."""

GROUP = 100
"""Rows of a row group with pictures."""


@dataclass(frozen=True)
class Drawn:
    """What several shards share.

    Attributes:
        images, sha256: of each row.
        matches: [2 * rows]; of each row's web text, then its synthetic one.
        pairs: the file of those that are kept.
    """

    images: list[bytes]
    sha256: list[str]
    matches: np.ndarray
    pairs: Path


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG about as large as one of a photograph: clouds of many sizes, and grain."""
    height, width = rng.choice([(341, 512), (384, 512), (512, 384), (512, 512)])
    pixels = np.full((height, width, 3), 128.0)
    for side in (4, 16, 64, 128):
        small = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize((int(width), int(height)))
        pixels += (np.asarray(small, float) - 128) * (2 / side**0.5)
    pixels += rng.normal(0, 7, pixels.shape)
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=92)
    return out.getvalue()


def draw(folder: Path, number: int, rows: int, pictures: list[bytes]) -> Drawn:
    """Draw a shard's pictures, and write them: as an input file, `folder`/input-N.parquet, and as pairs."""
    rng = np.random.default_rng(1_000_000 + number)
    images = [pictures[rng.integers(PICTURES)] + f"{number}/{n}".encode() for n in range(rows)]
    sha256 = [hashlib.sha256(image).hexdigest() for image in images]
    matches = rng.random(2 * rows) >= THRESHOLD
    mine = np.flatnonzero(matches.reshape(rows, 2).any(axis=1))
    pairs = {"row": mine, "image": [images[n] for n in mine], "image_sha256": [sha256[n] for n in mine]}
    write(folder / f"pairs-{number}.parquet", PAIR_FILE_SCHEMA, len(mine), pairs, GROUP)
    schema = pa.schema({"caption": pa.string(), "jpg": pa.binary()})
    write(folder / f"input-{number}.parquet", schema, rows, {"jpg": images}, GROUP)
    return Drawn(images, sha256, matches, folder / f"pairs-{number}.parquet")


def captions(rng: np.random.Generator, rows: int, words: pa.Array, shortest: int, longest: int) -> pa.Array:
    """Texts of words drawn by Zipf's law."""
    lengths = rng.integers(shortest, longest + 1, rows)
    drawn = np.minimum(rng.zipf(1.3, lengths.sum()), len(words)) - 1
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), words.take(pa.array(drawn))), " ")


def texts(rng: np.random.Generator, matches: np.ndarray, words: pa.Array) -> pa.ListArray:
    """The `texts` column of rows, of which these match."""
    rows = len(matches) // 2
    web, synthetic = captions(rng, rows, words, 4, 20), captions(rng, rows, words, 6, 14)
    order = np.arange(2 * rows).reshape(2, rows).T.ravel()  # web, synthetic, web, ...
    text = pa.concat_arrays([web, synthetic]).take(pa.array(order))
    score = (rng.random(2 * rows, np.float32) * 0.499 + np.where(matches, THRESHOLD, 0)).astype(np.float32)
    itm, itc = pa.array(score), pa.array((2 * score - 1).astype(np.float32))
    scores = pa.StructArray.from_arrays([pa.array(["judge"] * (2 * rows)), itm, itc], ["filter", "itm", "itc"])
    columns = {
        "source": pa.array(["web", "synthetic"] * rows),
        "captioner": pa.array([None, "writer"] * rows),
        "candidate": pa.array(np.zeros(2 * rows, np.int32)),
        **{"text": text, "itm": itm, "itc": itc},
        "scores": pa.ListArray.from_arrays(pa.array(np.arange(2 * rows + 1, dtype=np.int32)), scores),
        "kept": pa.array(matches),
        "reason": pc.if_else(pa.array(matches), None, pa.scalar("below_threshold")),
    }
    arrays = [columns[field.name].cast(field.type) for field in TEXT_STRUCT]
    struct = pa.StructArray.from_arrays(arrays, fields=list(TEXT_STRUCT))
    return pa.ListArray.from_arrays(pa.array(np.arange(0, 2 * rows + 1, 2, dtype=np.int32)), struct)


def annotate(output: Path, file: InputFile, night: int, seed: int, of: Drawn, words: pa.Array) -> ShardCommit:
    """Put a shard on record: one file of annotations, and one of the pairs that are kept."""
    rng, rows, shard = np.random.default_rng(seed), len(of.images), file.shard
    kept = of.matches.reshape(rows, 2).any(axis=1)
    sides = np.exp2(rng.normal(9, 0.7, (2, rows))).astype(np.int32) + 16
    provenance = Provenance(file.input_id, f"caption-{night}", "score", "decide", NIGHTS[night])
    values: dict[str, Any] = {
        "row": np.arange(rows),
        "url": [f"https://example.org/{shard}/{n}.jpg" for n in range(rows)],
        "format": rng.choice(["JPEG", "PNG", "WEBP"], rows, p=[0.85, 0.1, 0.05]),
        **{"width": sides[0], "height": sides[1]},
        "image_sha256": of.sha256,
        "image_bytes": (sides[0].astype(np.int64) * sides[1]) // 8,
        "status": np.where(kept, "kept", "dropped"),
        "reason": pc.if_else(pa.array(kept), None, pa.scalar("no_match")),
        "texts": texts(rng, of.matches, words),
        "seed": [0] * rows,
        **{name: [value] * rows for name, value in vars(provenance).items()},
    }
    path, many = f"shard={shard}/0-{rows}-{NIGHTS[night]}-0.parquet", int(kept.sum())
    size = write(output / ANNOTATIONS / path, ANNOTATION_FILE_SCHEMA, rows, values)
    paired = output / PAIRS / path
    paired.parent.mkdir(parents=True, exist_ok=True)
    os.link(of.pairs, paired)
    return ShardCommit(
        *(shard, rows, Counts(many, rows - many), provenance),
        annotations=(DataFile(path, rows, size, kept=many),),
        pairs=(DataFile(path, many, paired.stat().st_size),),
    )


def write(path: Path, schema: pa.Schema, rows: int, values: dict[str, Any], group: int | None = None) -> int:
    """Write a file, null where no values are given; its size."""
    columns = []
    for field in schema:
        own = values.get(field.name)
        columns.append(pa.nulls(rows, field.type) if own is None else pa.array(own).cast(field.type))
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns, schema=schema)
    pq.write_table(table, path, compression="zstd", store_schema=False, row_group_size=group)
    return path.stat().st_size


def make(root: Path, shards: int, rows: int, vocabulary: int) -> None:
    """The input, root/in, and the dataset, root/out, in commits of 200 shards; a run on record for each night."""
    words = pa.array([f"w{n:x}" for n in range(vocabulary)])
    rng = np.random.default_rng(0)
    pictures = [photograph(rng) for _ in range(PICTURES)]
    drawn = [draw(root / "drawn", n, rows // shards, pictures) for n in range(min(DRAWN, shards))]
    (root / "in").mkdir()
    for n in range(shards):
        os.link(root / "drawn" / f"input-{n % len(drawn)}.parquet", root / "in" / f"part-{n:05d}.parquet")
    spec = spec_of(root)
    files = list_inputs(spec.input)
    dataset = CuratedDataset.for_writing(spec.output, {})
    for night, run in enumerate(NIGHTS):
        dataset.register(run, {"spec": spec.model_dump(mode="json"), "started": f"2026-01-0{night + 1}T00:00:00"})
        counts = Counts()
        for start in range(0, shards, 200):
            commits = [
                annotate(root / "out", files[n], night, night * shards + n, drawn[n % len(drawn)], words)
                for n in range(start, min(shards, start + 200))
            ]
            dataset.commit(commits)
            counts = sum((commit.counts for commit in commits), counts)
        summary = {"outcome": "done", "shards": shards, "counts": vars(counts), "versions": dataset.versions()}
        seconds = {"read": 600.0, "decode": 2000.0, "model": 9000.0, "write": 700.0}
        dataset.write_run_file(run, SUMMARY, {**summary, "elapsed": 10_000.0, "busy": 0.9, "seconds": seconds})


def spec_of(root: Path) -> CurateSpec:
    """The spec that both nights would have run."""
    card = {"checkpoint": HubCheckpoint(hub="example/none", revision="0" * 40), "image_size": 384}
    return CurateSpec(
        kind="curate",
        input=Input(paths=(str(root / "in"),)),
        output=str(root / "out"),
        captioners=(CaptionerCard(role="captioner", name="writer", **card),),
        filters=(FilterCard(role="filter", name="judge", **card),),
    )


def shown(page: Path) -> dict[str, int]:
    """Rows of the gallery, and those of them that have a picture.

    Raises:
        ValueError: few kept rows have one, or few dropped ones, or no version is compared: that would be a cheaper
            report than a night's.
    """
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    found = json.loads(data)
    rows, pictures = (dict.fromkeys(("kept", "dropped"), 0) for _ in range(2))
    for row in found["gallery"]:
        rows[row["status"]] += 1
        pictures[row["status"]] += "picture" in row
    if not found["before"] or any(2 * pictures[status] < n for status, n in rows.items()):
        raise ValueError(f"pictures of {pictures} of the rows {rows}; compared: {bool(found['before'])}")
    return {"rows in the gallery": sum(rows.values()), "pictures": sum(pictures.values())}


SLIDE = """async (to) => {
  const slider = document.getElementById("slide-web");
  slider.value = to;
  const begin = performance.now();
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - begin;
}"""


def slide(page: Path) -> list[float]:
    """Milliseconds that each move of the slider takes; none where there is no browser."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        return []
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        shown = browser.new_page()
        shown.goto(page.as_uri())
        shown.wait_for_selector("html[data-ready]")
        took = [shown.evaluate(SLIDE, n / 12) for n in range(13)]
        browser.close()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=1_000)
    parser.add_argument("--words", type=int, default=200_000, help="of the vocabulary")
    parser.add_argument("--folder", help="where to work; a temporary folder there is removed at the end")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="report-", dir=args.folder))
    try:
        begin = time.perf_counter()
        make(root, args.shards, args.rows, args.words)
        print(f"{args.rows:,} rows made in {time.perf_counter() - begin:.0f} s (not counted)", flush=True)
        page = root / "page.html"
        command = [sys.executable, "-m", "capfilt", "report", str(root / "out"), "--to", str(page)]
        begin = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "TMPDIR": str(root)})
        found: dict[str, Any] = {
            "seconds": round(time.perf_counter() - begin, 1),
            "peak memory, MiB": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10),
            "page, MB": round(page.stat().st_size / 10**6, 2),
            **shown(page),
        }
        if took := slide(page):
            found["slider, ms"] = {name: round(value, 1) for name, value in spread(took).items()}
    finally:
        shutil.rmtree(root)
    print(json.dumps(found))
    if args.json:
        about = {"arguments": {k: v for k, v in vars(args).items() if k != "json"}, "machine": machine()}
        args.json.write_text(json.dumps({**about, "results": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
