"""Planning and committing at scale: what listing the inputs and the dataset's log cost, without models or Ray.

    python benchmarks/commit_scale.py [--shards 100000] [--batch 500] [--files 1] [--replace 5000] [--json FILE]

Fills a dataset with shards of ten rows, `--files` annotations and pairs files each, every tenth shard with a quarantine
file. The files are hard links to one small Parquet file a table and 10,000 shards (a file system allows 65,000 links),
and the inputs are hard links, too: writing data is not what is measured. Then plans again with nothing to do, as
`capfilt plan` does and as `capfilt run` does before it opens the dataset for writing, replaces some shards, and
vacuums. Prints seconds of wall clock, of processor time in brackets, and the process's peak resident memory. Seconds of
wall clock depend on what else the machine and its disk do; compare processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.dataset import DIRECTORIES, Counts, CuratedDataset, DataFile, Provenance, ShardCommit
from capfilt.fingerprints import Fingerprints
from capfilt.inputs import InputFile, list_inputs
from capfilt.plan import make_plan
from capfilt.schema import ANNOTATIONS, FILE_SCHEMAS, PAIRS, QUARANTINE
from capfilt.spec import CaptionerCard, CurateSpec, FilterCard, Input, LocalCheckpoint

KEPT, DROPPED, ERRORS = 6, 3, 1
ROWS = {ANNOTATIONS: KEPT + DROPPED + ERRORS, PAIRS: KEPT, QUARANTINE: ERRORS}
LINKS = 10_000
FINGERPRINTS = Fingerprints("c" * 16, "s" * 16, "d" * 16)  # made from checkpoints, whose size is not the dataset's


def make_files(root: Path, table: str, rows: int, paths: Iterator[str]) -> int:
    """Link every path, below root, to a small Parquet file of a table. Returns the file's size in bytes."""
    schema = FILE_SCHEMAS[table]
    source, size = root / "source.parquet", 0
    for n, path in enumerate(paths):
        if n % LINKS == 0:
            source.unlink(missing_ok=True)
            pq.write_table(pa.Table.from_pylist([dict.fromkeys(schema.names)] * rows, schema), source)
            size = source.stat().st_size
        target = root / path
        if not target.parent.exists():
            target.parent.mkdir()
        os.link(source, target)
    source.unlink(missing_ok=True)
    return size


def make_spec(root: Path) -> CurateSpec:
    """A spec over `root/in` with output `root/out`; of its models only the names are there."""
    card = {"name": "none", "checkpoint": LocalCheckpoint(path=str(root / "none")), "image_size": 384}
    return CurateSpec(
        kind="curate",
        input=Input(paths=(str(root / "in"),)),
        output=str(root / "out"),
        captioners=(CaptionerCard(role="captioner", **card),),
        filters=(FilterCard(role="filter", **card),),
    )


def make_shards(
    output: Path, inputs: Sequence[InputFile], files: int, run: str, made_with: Fingerprints = FINGERPRINTS
) -> list[ShardCommit]:
    """What workers would have left of some inputs, linked into place: shards ready to commit."""
    names = [file.shard for file in inputs]
    path = "shard={}/{}-{}-" + run + "-0.parquet"
    sizes = {}
    for table, directory in DIRECTORIES.items():
        every, per_shard = (10, 1) if table == QUARANTINE else (1, files)
        paths = (path.format(name, 10 * i, 10 * i + 10) for name in names[::every] for i in range(per_shard))
        sizes[table] = make_files(output / directory, table, ROWS[table], paths)
    prints = made_with.caption, made_with.score, made_with.decide
    shards = []
    counts = {ANNOTATIONS: (ERRORS, KEPT)}
    for n, (name, file) in enumerate(zip(names, inputs, strict=True)):
        of = {
            table: tuple(
                DataFile(path.format(name, 10 * i, 10 * i + 10), rows, sizes[table], *counts.get(table, ()))
                for i in range(files)
            )
            for table, rows in ROWS.items()
        }
        rows = Counts(KEPT * files, DROPPED * files, ERRORS * files)
        quarantine = of[QUARANTINE][:1] if n % 10 == 0 else ()
        provenance = Provenance(file.input_id, *prints, run)
        shards.append(ShardCommit(name, rows.rows, rows, provenance, of[ANNOTATIONS], of[PAIRS], quarantine))
    return shards


class Measured(dict[str, Any]):
    """Results by name, printed as they come."""

    def note(self, name: str, value: Any) -> None:
        self[name] = value
        print(f"{name:<40} {value}", flush=True)

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
        begin, worked = time.perf_counter(), time.process_time()
        yield
        wall, processor = time.perf_counter() - begin, time.process_time() - worked
        self[name] = {"wall": round(wall, 3), "processor": round(processor, 3)}
        print(f"{name + ', s':<40} {wall:.2f} ({processor:.2f})", flush=True)


def commit_all(dataset: CuratedDataset, shards: list[ShardCommit], batch: int, name: str, result: Measured) -> None:
    """Commit in batches, and note the total, each shard's part of it, and the last commit."""
    spent = []
    with result.seconds(name):
        for start in range(0, len(shards), batch):
            begin = time.perf_counter()
            dataset.commit(shards[start : start + batch])
            spent.append(time.perf_counter() - begin)
    for clock, total in result[name].items():
        result.note(f"  {name}: {clock} ms per shard", round(1e3 * total / len(shards), 3))
    result.note(f"  {name}: last commit, s", round(spent[-1], 3))


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    output, result, spec = str(root / "out"), Measured(), make_spec(root)
    dataset = CuratedDataset.for_writing(output, {})
    dataset.register("first", {})
    with result.seconds("making files (not counted)"):
        (root / "in").mkdir()
        make_files(root / "in", PAIRS, 1, (f"part-{n:06d}.parquet" for n in range(args.shards)))
        inputs = list_inputs(spec.input, exclude=spec.output)
        shards = make_shards(Path(output), inputs, args.files, "first")
    commit_all(dataset, shards, args.batch, "committing", result)
    with result.seconds("planning with nothing to do"):
        work = make_plan(spec, FINGERPRINTS, CuratedDataset.committed_in(output, {}))
    assert (len(work.done), work.todo, work.gone) == (args.shards, (), ())
    with result.seconds("  of it: listing the inputs"):
        list_inputs(spec.input, exclude=spec.output)
    with result.seconds("  of it: reading the log"):
        committed = CuratedDataset.committed_in(output, {})
    assert sum(state.rows for state in committed.values()) == sum(shard.rows for shard in shards)
    with result.seconds("opening for writing"):
        dataset = CuratedDataset.for_writing(output, {})
    replaced = make_shards(Path(output), inputs[: args.replace], args.files, "second")
    commit_all(dataset, replaced, args.batch, "replacing", result)
    dataset.register("second", {})
    with result.seconds("vacuum with nothing to delete"):
        assert dataset.vacuum() == 0
    with result.seconds("vacuum of what was replaced"):
        deleted = dataset.vacuum(0)
    result.note("  files deleted", deleted)
    logs = [path for table in DIRECTORIES.values() for path in Path(output, table, "_delta_log").iterdir()]
    result.note("logs, MB", round(sum(path.stat().st_size for path in logs) / 1e6))
    result.note("peak resident memory, MB", round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=500, help="shards of one commit")
    parser.add_argument("--files", type=int, default=1, help="annotations and pairs files of a shard")
    parser.add_argument("--replace", type=int, default=5_000, help="shards replaced afterwards")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="commit_scale-"))
    try:
        result = measure(root, args)
    finally:
        shutil.rmtree(root)
    if args.json:
        about = {"arguments": {k: v for k, v in vars(args).items() if k != "json"}, "machine": platform.platform()}
        args.json.write_text(json.dumps({**about, "cpus": os.cpu_count(), "results": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
