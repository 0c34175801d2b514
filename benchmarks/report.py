"""A report of a large dataset: seconds and peak memory of `capfilt report`, in a process of its own.

    python benchmarks/report.py [--rows 1000000] [--shards 1000] [--words 200000] [--folder DIRECTORY] [--json FILE]

`--shards` shards are put on record, as benchmarks/recurate.py does: every row with a web text and a synthetic one and
random scores, half of which reach the threshold. Words of texts are drawn from a vocabulary of `--words` by Zipf's law,
4 to 20 to a web text and 6 to 14 to a synthetic one. The pairs of kept rows hold a small JPEG each, from which the
gallery's pictures are made; there is no input, so that dropped rows have none. Making the data is not counted.

Where there is a Chromium, and Playwright, its page's slider is moved 13 times: milliseconds from the event to the next
frame drawn, to be 100 at the most.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from measuring import machine, spread
from PIL import Image

from capfilt.dataset import Counts, CuratedDataset, DataFile, Provenance, ShardCommit
from capfilt.schema import ANNOTATION_FILE_SCHEMA, ANNOTATIONS, PAIR_FILE_SCHEMA, PAIRS, TEXT_STRUCT

THRESHOLD = 0.5


def jpeg() -> bytes:
    """A small one."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(out, "JPEG")
    return out.getvalue()


JPEG = jpeg()


def captions(rng: np.random.Generator, rows: int, words: pa.Array, shortest: int, longest: int) -> pa.Array:
    """Texts of words drawn by Zipf's law."""
    lengths = rng.integers(shortest, longest + 1, rows)
    drawn = np.minimum(rng.zipf(1.3, lengths.sum()), len(words)) - 1
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), words.take(pa.array(drawn))), " ")


def texts(rng: np.random.Generator, rows: int, words: pa.Array) -> tuple[pa.ListArray, np.ndarray]:
    """The `texts` column of rows, and which of them are kept."""
    web, synthetic = captions(rng, rows, words, 4, 20), captions(rng, rows, words, 6, 14)
    order = np.arange(2 * rows).reshape(2, rows).T.ravel()  # web, synthetic, web, ...
    text = pa.concat_arrays([web, synthetic]).take(pa.array(order))
    score = rng.random(2 * rows, np.float32)
    itm, itc = pa.array(score), pa.array((2 * score - 1).astype(np.float32))
    kept = score >= THRESHOLD
    scores = pa.StructArray.from_arrays([pa.array(["judge"] * (2 * rows)), itm, itc], ["filter", "itm", "itc"])
    columns = {
        "source": pa.array(["web", "synthetic"] * rows),
        "captioner": pa.array([None, "writer"] * rows),
        "candidate": pa.array(np.zeros(2 * rows, np.int32)),
        **{"text": text, "itm": itm, "itc": itc},
        "scores": pa.ListArray.from_arrays(pa.array(np.arange(2 * rows + 1, dtype=np.int32)), scores),
        "kept": pa.array(kept),
        "reason": pc.if_else(pa.array(kept), None, pa.scalar("below_threshold")),
    }
    arrays = [columns[field.name].cast(field.type) for field in TEXT_STRUCT]
    struct = pa.StructArray.from_arrays(arrays, fields=list(TEXT_STRUCT))
    return pa.ListArray.from_arrays(pa.array(np.arange(0, 2 * rows + 1, 2, dtype=np.int32)), struct), kept


def annotate(output: Path, shard: str, seed: int, rows: int, words: pa.Array) -> ShardCommit:
    """Put a shard on record: one file of annotations, and one of the pairs that are kept."""
    rng = np.random.default_rng(seed)
    column, matches = texts(rng, rows, words)
    kept = matches.reshape(rows, 2).any(axis=1)
    sides = np.exp2(rng.normal(9, 0.7, (2, rows))).astype(np.int32) + 16
    images = [JPEG + f"{shard}/{n}".encode() for n in range(rows)]  # what follows a JPEG's end is no part of it
    sha256 = [hashlib.sha256(image).hexdigest() for image in images]
    provenance = Provenance("input", "caption", "score", "decide", "made")
    values: dict[str, Any] = {
        "row": np.arange(rows),
        "url": [f"https://example.org/{shard}/{n}.jpg" for n in range(rows)],
        "format": rng.choice(["JPEG", "PNG", "WEBP"], rows, p=[0.85, 0.1, 0.05]),
        **{"width": sides[0], "height": sides[1]},
        "image_sha256": sha256,
        "image_bytes": (sides[0].astype(np.int64) * sides[1]) // 8,
        "status": np.where(kept, "kept", "dropped"),
        "reason": pc.if_else(pa.array(kept), None, pa.scalar("no_match")),
        "texts": column,
        "seed": [0] * rows,
        **{name: [value] * rows for name, value in vars(provenance).items()},
    }
    mine = np.flatnonzero(kept)
    pairs = {"row": mine, "image": [images[n] for n in mine], "image_sha256": [sha256[n] for n in mine]}
    path, many = f"shard={shard}/0-{rows}-made-0.parquet", len(mine)
    annotated = DataFile(
        path, rows, write(output / ANNOTATIONS / path, ANNOTATION_FILE_SCHEMA, rows, values), kept=many
    )
    paired = DataFile(path, many, write(output / PAIRS / path, PAIR_FILE_SCHEMA, many, pairs))
    return ShardCommit(shard, rows, Counts(many, rows - many), provenance, (annotated,), (paired,))


def write(path: Path, schema: pa.Schema, rows: int, values: dict[str, Any]) -> int:
    """Write a file, null where no values are given; its size."""
    columns = []
    for field in schema:
        own = values.get(field.name)
        columns.append(pa.nulls(rows, field.type) if own is None else pa.array(own).cast(field.type))
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd", store_schema=False)
    return path.stat().st_size


def make(output: Path, shards: int, rows: int, vocabulary: int) -> None:
    """The dataset, in commits of 200 shards."""
    words = pa.array([f"w{n:x}" for n in range(vocabulary)])
    dataset = CuratedDataset.for_writing(str(output), {})
    for start in range(0, shards, 200):
        numbers = range(start, min(shards, start + 200))
        dataset.commit([annotate(output, f"part-{n:05d}", n, rows // shards, words) for n in numbers])


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
        make(root / "out", args.shards, args.rows, args.words)
        print(f"{args.rows:,} rows made in {time.perf_counter() - begin:.0f} s (not counted)", flush=True)
        page = root / "page.html"
        command = [sys.executable, "-m", "capfilt", "report", str(root / "out"), "--to", str(page)]
        begin = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "TMPDIR": str(root)})
        found: dict[str, Any] = {
            "seconds": round(time.perf_counter() - begin, 1),
            "peak memory, MiB": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10),
            "page, MB": round(page.stat().st_size / 10**6, 2),
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
