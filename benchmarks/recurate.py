"""Recuration: what a new threshold and a night without news cost, as `capfilt run` in a process of its own.

    python benchmarks/recurate.py [--shards 1000] [--rows 1000] [--nightly 100000] [--json FILE] [--folder DIRECTORY]

New thresholds: `--shards` shards of `--rows` rows are put on record with random scores (every row with a web text and a
synthetic one, no score in [0.50, 0.51), in nine shards of ten none in [0.4, 0.6)), all of them dropped. Then
`capfilt run` decides again at

    0.50   every shard changes: the images of all rows that are kept are read from the input
    0.51   nothing changes
    0.45   one shard in ten changes: rows are newly kept in it

and is compared with what numpy says of the scores. The night: `--nightly` shards (hard links, as commit_scale.py makes
them) that are up to date; `capfilt run`, and then the same in this process, with listings (one) and
opened inputs (none) counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from commit_scale import make_files, make_shards, make_spec
from deltalake import DeltaTable
from measuring import machine

from capfilt import inputs
from capfilt.dataset import Counts, CuratedDataset, DataFile, Provenance, ShardCommit
from capfilt.fingerprints import Fingerprints, run_fingerprints
from capfilt.inputs import InputFile, list_inputs
from capfilt.pipelines.curate import curate
from capfilt.schema import ANNOTATION_FILE_SCHEMA, ANNOTATIONS, PAIRS, TEXT_STRUCT
from capfilt.spec import CurateSpec

IMAGE_BYTES = 100  # nothing decodes them


def write_spec(root: Path) -> CurateSpec:
    """A spec at `root/spec.yaml` over `root/in`, whose checkpoints are there and are no models."""
    (root / "none").mkdir()
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        (root / "none" / name).write_text("{}")
    spec = make_spec(root)
    (root / "spec.yaml").write_text(json.dumps(spec.model_dump(mode="json")))
    return spec


def run(root: Path, *overrides: str) -> tuple[float, dict[str, Any]]:
    """Seconds that `capfilt run` takes, and the summary that it leaves, if any."""
    command = [sys.executable, "-m", "capfilt", "run", str(root / "spec.yaml"), *(f"--set={one}" for one in overrides)]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(done.stderr)
    summaries = sorted(root.glob("out/_runs/*/summary.json"), key=lambda path: path.stat().st_mtime)
    return seconds, json.loads(summaries[-1].read_text()) if summaries else {}


# --- new thresholds ---


def make_input(path: Path, rows: int) -> list[str]:
    """A shard of rows of random bytes for images. Their sha256."""
    data = np.random.default_rng(int(path.stem)).bytes(rows * IMAGE_BYTES)
    images = [data[i * IMAGE_BYTES : (i + 1) * IMAGE_BYTES] for i in range(rows)]
    texts = [f"web text {i} of {path.stem}" for i in range(rows)]
    pq.write_table(pa.table({"caption": texts, "jpg": images}), path, row_group_size=500)
    return [hashlib.sha256(image).hexdigest() for image in images]


def make_scores(shard: int, rows: int) -> np.ndarray:
    """float32 [rows, 2]: of the web's text and the captioner's."""
    scores = np.random.default_rng(10**6 + shard).random((rows, 2), np.float32)
    low, high = (0.4, 0.6) if shard % 10 else (0.50, 0.51)
    return np.where((scores >= low) & (scores < high), scores / 4, scores)


def annotate(output: Path, file: InputFile, sha256: list[str], scores: np.ndarray, prints: Fingerprints) -> ShardCommit:
    """Put a shard on record as one file, every row of it dropped."""
    rows, run_ = len(sha256), "first"
    both = {
        "source": ["web", "synthetic"] * rows,
        "captioner": [None, "none"] * rows,
        "candidate": [0] * (2 * rows),
        "text": [text for i in range(rows) for text in (f"web text {i}", f"a picture of the number {i}")],
        "itm": scores.ravel(),
        "itc": scores.ravel(),
        "kept": [False] * (2 * rows),
        "reason": ["below_threshold"] * (2 * rows),
    }
    one_filter = pa.StructArray.from_arrays(
        [pa.array(["none"] * (2 * rows)), pa.array(both["itm"]), pa.array(both["itc"])], ["filter", "itm", "itc"]
    )
    both["scores"] = pa.ListArray.from_arrays(pa.array(range(2 * rows + 1), pa.int32()), one_filter)
    columns = [pa.array(both[field.name], field.type) for field in TEXT_STRUCT if field.name != "scores"]
    columns.insert(TEXT_STRUCT.get_field_index("scores"), both["scores"].cast(TEXT_STRUCT.field("scores").type))
    texts = pa.StructArray.from_arrays(columns, fields=list(TEXT_STRUCT))
    provenance = Provenance(file.input_id, prints.caption, prints.score, "never decided", run_)
    values: dict[str, Any] = {
        "row": range(rows),
        "format": ["JPEG"] * rows,
        "image_sha256": sha256,
        "image_bytes": [IMAGE_BYTES] * rows,
        "status": ["dropped"] * rows,
        "reason": ["no_match"] * rows,
        "texts": pa.ListArray.from_arrays(pa.array(range(0, 2 * rows + 1, 2), pa.int32()), texts),
        "seed": [0] * rows,
        **{name: [value] * rows for name, value in vars(provenance).items()},
    }
    arrays = [
        values["texts"] if field.name == "texts" else pa.array(values.get(field.name, [None] * rows), field.type)
        for field in ANNOTATION_FILE_SCHEMA
    ]
    path = f"shard={file.shard}/0-{rows}-{run_}-0.parquet"
    target = output / ANNOTATIONS / path
    target.parent.mkdir(parents=True)
    pq.write_table(pa.table(arrays, schema=ANNOTATION_FILE_SCHEMA), target, compression="zstd", store_schema=False)
    data = DataFile(path, rows, target.stat().st_size)
    return ShardCommit(file.shard, rows, Counts(dropped=rows), provenance, (data,))


def expected(scores: list[np.ndarray], before: float | None, threshold: float) -> dict[str, int]:
    """Rows kept at a threshold; images read where they were kept at another one before, or never."""
    now = [(of >= np.float32(threshold)) for of in scores]
    was = [(of >= np.float32(before)) if before is not None else np.zeros_like(of, bool) for of in scores]
    new = [n.any(1) & ~w.any(1) for n, w in zip(now, was, strict=True)]
    changed = [(n != w).any() for n, w in zip(now, was, strict=True)]
    return {"kept": int(sum(n.any(1).sum() for n in now)), "images": int(sum(map(np.sum, new))), "shards": sum(changed)}


def thresholds(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    spec, found = write_spec(root), {}
    output = root / "out"
    (root / "in").mkdir()
    begin = time.perf_counter()
    sha256 = [make_input(root / "in" / f"{n:05d}.parquet", args.rows) for n in range(args.shards)]
    scores = [make_scores(n, args.rows) for n in range(args.shards)]
    prints, files = run_fingerprints(spec), list_inputs(spec.input)
    dataset = CuratedDataset.for_writing(spec.output, {})
    shards = zip(files, sha256, scores, strict=True)
    dataset.commit([annotate(output, file, own, of, prints) for file, own, of in shards])
    print(f"{args.shards * args.rows:,} rows made in {time.perf_counter() - begin:.0f} s (not counted)", flush=True)
    before = None
    for threshold in (0.5, 0.51, 0.45):
        pairs = set(DeltaTable(f"{spec.output}/{PAIRS}").file_uris())
        seconds, summary = run(root, f"thresholds={{web: {threshold}, synthetic: {threshold}}}")
        after, stage = set(DeltaTable(f"{spec.output}/{PAIRS}").file_uris()), summary["stages"]["decide"]
        truth = expected(scores, before, threshold)
        assert summary["counts"] == {
            "kept": truth["kept"],
            "dropped": args.shards * args.rows - truth["kept"],
            "errors": 0,
        }
        assert (stage["rows"], stage["images"]) == (args.shards * args.rows, truth["images"])
        assert len(after - pairs) == truth["shards"]
        found[str(threshold)] = {
            "run, s": seconds,
            "of it once the first were decided, s": stage["seconds"] - stage["first_seconds"],
            "pairs files written": len(after - pairs),
            "images read": stage["images"],
            "images copied": stage["copied"],
            "workers' seconds": summary["seconds"],
        }
        print(f"threshold {threshold}:", json.dumps(found[str(threshold)]), flush=True)
        before = threshold
    return found


# --- a night without news ---


def nightly(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    spec = write_spec(root)
    (root / "in").mkdir()
    make_files(root / "in", PAIRS, 1, (f"part-{n:06d}.parquet" for n in range(args.nightly)))
    files = list_inputs(spec.input)
    dataset = CuratedDataset.for_writing(spec.output, {})
    shards = make_shards(root / "out", files, 1, "first", run_fingerprints(spec))
    for start in range(0, len(shards), 500):
        dataset.commit(shards[start : start + 500])
    print(f"{args.nightly:,} shards made", flush=True)
    seconds, _ = run(root)
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **named)

        return call

    with (
        patch("capfilt.inputs._list_path", counted("listings", inputs._list_path)),
        patch("capfilt.inputs.Opened._open", counted("opened", inputs.Opened._open)),
    ):
        summary = curate(spec)
    assert (summary.skipped, summary.shards) == (args.nightly, 0)
    found = {"run, s": seconds, "listings": calls["listings"], "Parquet files opened": calls["opened"]}
    print("a night without news:", json.dumps(found), flush=True)
    assert (calls["listings"], calls["opened"]) == (1, 0), "one listing of the input is all that such a night may read"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=1_000)
    parser.add_argument("--rows", type=int, default=1_000, help="of a shard")
    parser.add_argument("--nightly", type=int, default=100_000, help="shards that are up to date; 0 leaves them out")
    parser.add_argument("--folder", help="where to work; a temporary folder there is removed at the end")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    args = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    results: dict[str, Any] = {}
    for name, measure in (("thresholds", thresholds), ("nightly", nightly)):
        if getattr(args, {"thresholds": "shards"}.get(name, name)):
            root = Path(tempfile.mkdtemp(prefix="recurate-", dir=args.folder))
            try:
                results[name] = measure(root, args)
            finally:
                shutil.rmtree(root)
    if args.json:
        about = {"arguments": {k: v for k, v in vars(args).items() if k != "json"}, "machine": machine()}
        args.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
