"""Whether a run leaks: a million rows through the whole pipeline, with models that cost nothing, watched from outside.

    python benchmarks/soak.py [--rows 1000000] [--actors 2] [--json FILE]

The driver curates on a local Ray, in a process of its own: small pictures, a shard a fragment; of 100 rows one has no
image and one no picture. Every two seconds the memory of the driver and of each worker (resident and not shared), their
threads and their open files are set against the rows that are finished. What grows is the slope of a line through these
(least squares), after the first fifth of the rows. Before and after the run, the driver counts its own.

Delta's writer has a pool of threads (POOL) that come with commits, as many as there are files to write or read at once,
and go after ten idle seconds. They are no leak, and counted apart; what memory they hold is taken out by a second
variable of the line, and the slope without that is given, too (`mb_in_all`).

Targets: memory grows by less than 1 MB per 100,000 rows in the driver and in each worker; threads and open files do not
grow; afterwards the driver has no more threads than after a first, short run but the one that each start of Ray leaves
behind; no file is left over in the output or among the temporary files, Ray's own aside. Open files are counted before
and after (`open_files`): each `ray.init` and `ray.shutdown`, with nothing between them, leave one thread (now and then
two), the log file of the session's driver and up to two sockets.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measuring import machine
from PIL import Image
from rich.console import Console

from capfilt.dataset import DIRECTORIES, CuratedDataset
from capfilt.fragments import Fragment
from capfilt.pipelines.curate import curate, on_ray
from capfilt.pipelines.job import Job, LoadModels
from capfilt.receipts import Receipt
from capfilt.spec import CaptionerCard, CurateSpec, FilterCard, Input, LocalCheckpoint, Placement

SHARD_ROWS = 2_000
SIDE = 32
WARM_UP = 0.2  # of the rows
TARGET = 1.0  # MB per 100,000 rows
SECONDS = 2.0  # between samples
POOL = "tokio-rt-worker"
IDLE_SECONDS = 15.0
"""After which the pool is as small as it gets."""

Sample = tuple[int, float, int, int, int]
"""Of a process: rows finished by all, MB, threads, open files, threads of the pool."""


# --- the run ---


class Nothing:
    """Captioner and filter in one, at no cost; every picture is kept."""

    image_size, batch_size = SIDE, 64

    def caption(self, _: torch.Tensor, sha256: Sequence[str]) -> list[list[str]]:
        """One caption an image."""
        return [["a picture of a thing"] for _ in sha256]

    def score(self, _: torch.Tensor, texts: Sequence[Sequence[str]]) -> list[list[tuple[float, float]]]:
        """The same for each text."""
        return [[(0.9, 0.3)] * len(row) for row in texts]


def load_nothing(_spec: CurateSpec, _device: str) -> tuple[list[Nothing], list[Nothing]]:
    """Make the models."""
    return [Nothing()], [Nothing()]


def make_shards(folder: Path, rows: int) -> None:
    """Fill a folder with shards, all links to the first."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(100):
        out = io.BytesIO()
        blocks = np.kron(rng.integers(0, 255, (4, 4, 3), np.uint8), np.ones((SIDE // 4, SIDE // 4, 1), np.uint8))
        Image.fromarray(blocks).save(out, "JPEG")
        pictures.append(out.getvalue())
    images: list[bytes | None] = list(islice(cycle(pictures), SHARD_ROWS))
    images[::100], images[50::100] = [None] * (SHARD_ROWS // 100), [b"<html>"] * (SHARD_ROWS // 100)
    columns = {
        "key": [f"{i:09d}" for i in range(SHARD_ROWS)],
        "url": [f"https://images.example.org/{i:09d}.jpg" for i in range(SHARD_ROWS)],
        "caption": [f"picture {i} of a thing that somebody put on the web" for i in range(SHARD_ROWS)],
        "jpg": pa.array(images, pa.binary()),
    }
    first = folder / "00000.parquet"
    pq.write_table(pa.table(columns), first, row_group_size=500)
    for n in range(1, rows // SHARD_ROWS):
        os.link(first, folder / f"{n:05d}.parquet")


def make_spec(folder: Path, source: str, output: str, actors: int) -> CurateSpec:
    """A run over folder/source."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        (checkpoint / name).write_text("{}")
    card: dict[str, Any] = {
        "checkpoint": LocalCheckpoint(path=str(checkpoint)),
        "image_size": SIDE,
        "batch_size": Nothing.batch_size,
        "placement": Placement(cpus=1, min_actors=actors, max_actors=actors),
    }
    return CurateSpec(
        kind="curate",
        input=Input(paths=(str(folder / source),)),
        output=str(folder / output),
        captioners=(CaptionerCard(role="captioner", name="nothing", **card),),
        filters=(FilterCard(role="filter", name="nothing", **card),),
        fragment_rows=SHARD_ROWS,
    )


def own() -> dict[str, int]:
    """Threads and open files of this process, and temporary files; Ray's are elsewhere."""
    time.sleep(IDLE_SECONDS)
    process = psutil.Process()
    others, pool = threads(process.pid)
    return {
        "threads": others,
        "threads_of_the_pool": pool,
        "python_threads": threading.active_count(),
        "open_files": process.num_fds(),
        "temporary_files": len(os.listdir(tempfile.gettempdir())),
    }


def threads(pid: int) -> tuple[int, int]:
    """Threads of a process: others', and the pool's."""
    names = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text().strip())
    return len(names) - names.count(POOL), names.count(POOL)


def drive(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A short run, then the one that is watched. Returns what this process held after each."""

    def counted(job: Job, work: Iterator[Fragment], load: LoadModels) -> Generator[list[Receipt], None, None]:
        rows = 0
        with closing(on_ray(job, work, load)) as finished:
            for receipts in finished:
                rows += sum(receipt.rows for receipt in receipts)
                (folder / "rows").write_text(str(rows))
                yield receipts

    quiet = Console(file=io.StringIO())
    curate(make_spec(folder, "short", "short-out", arguments.actors), load=load_nothing, console=quiet)
    before = own()
    (folder / "begun").touch()
    spec = make_spec(folder, "in", "out", arguments.actors)
    summary = curate(spec, load=load_nothing, execute=counted, console=quiet)
    if summary.counts.rows != arguments.rows or summary.failures:
        raise RuntimeError(f"{summary.counts} of {arguments.rows} rows; {summary.failures}")
    return {"before": before, "after": own(), "counts": vars(summary.counts), "seconds": summary.elapsed}


def strays(output: Path) -> list[str]:
    """Files of an output that are neither its tables' nor its records."""
    dataset = CuratedDataset.for_reading(str(output), {})
    named = {
        f"{folder}/{path}"
        for table, folder in DIRECTORIES.items()
        for path in pa.table(dataset._tables[table].get_add_actions())["path"].to_pylist()
    }
    known = re.compile(
        r".*_delta_log/.*|_runs/(lease|closed)/[^/]+|_runs/\d{8}T[^/]+/(run\.json|summary\.json|report\.html)"
    )
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    return sorted(file for file in files if file not in named and not known.fullmatch(file))


# --- watching it ---


def watch(process: subprocess.Popen[str], folder: Path) -> dict[str, list[Sample]]:
    """Sample the driver and its workers until it ends. By process."""
    samples: dict[str, list[Sample]] = defaultdict(list)
    driver = psutil.Process(process.pid)
    while process.poll() is None:
        time.sleep(SECONDS)
        if not (folder / "begun").exists() or not (folder / "rows").exists():
            continue
        rows = int((folder / "rows").read_text() or 0)
        try:
            below = driver.children(recursive=True)
        except psutil.NoSuchProcess:
            break
        for one in [driver, *below]:
            try:
                with one.oneshot():
                    title = " ".join(one.cmdline())
                    if one != driver and "MapWorker" not in title:
                        continue
                    name = "driver" if one == driver else f"worker {one.pid}"
                    memory = one.memory_info()
                    others, pool = threads(one.pid)
                    found = ((memory.rss - memory.shared) / 1e6, others, one.num_fds(), pool)
            except (psutil.Error, FileNotFoundError):
                continue
            samples[name].append((rows, *found))
    return samples


def growth(samples: list[Sample], rows: int) -> dict[str, Any]:
    """Slopes per 100,000 rows once warm, and what was seen."""
    warm = np.array([sample for sample in samples if WARM_UP * rows <= sample[0] < rows], float)
    if len(warm) < 10:
        raise RuntimeError(f"{len(warm)} samples after the warm-up; take more rows")
    x, pool, one = warm[:, 0] / 1e5, warm[:, 4], np.ones(len(warm))

    def slope(y: np.ndarray, *others: np.ndarray) -> float:
        return round(float(np.linalg.lstsq(np.stack([x, one, *others], 1), y, rcond=None)[0][0]), 4)

    slopes = {
        "mb": slope(warm[:, 1], pool),
        "mb_in_all": slope(warm[:, 1]),
        **{name: slope(warm[:, n]) for n, name in ((2, "threads"), (3, "open_files"), (4, "threads_of_the_pool"))},
    }
    ends = [round(float(np.median(part)), 1) for part in (warm[: len(warm) // 5, 1], warm[-len(warm) // 5 :, 1])]
    columns = ((2, "threads"), (3, "open_files"), (4, "threads_of_the_pool"))
    most = {"mb": round(float(warm[:, 1].max()), 1), **{name: int(warm[:, n].max()) for n, name in columns}}
    return {"per_100000_rows": slopes, "first_and_last_fifth_mb": ends, "most": most, "samples": len(warm)}


def soak(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run and judge."""
    make_shards(folder / "short", SHARD_ROWS * arguments.actors)
    make_shards(folder / "in", arguments.rows)
    passed = [f"--rows={arguments.rows}", f"--actors={arguments.actors}", f"--folder={folder}"]
    (folder / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "RAY_TMPDIR": str(folder)}
    command = [sys.executable, __file__, *passed]
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        samples = watch(process, folder)
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"the run failed with {process.returncode}")
    run = json.loads(said.splitlines()[-1])
    processes = {name: growth(of, arguments.rows) for name, of in samples.items()}
    left = strays(folder / "out")
    flat = all(
        one["per_100000_rows"]["mb"] < TARGET
        and abs(one["per_100000_rows"]["threads"]) < 0.5
        and abs(one["per_100000_rows"]["open_files"]) < 0.5
        for one in processes.values()
    )
    more = {name: run["after"][name] - run["before"][name] for name in run["before"]}
    kept = more["threads"] <= 1 and more["python_threads"] <= 0 and more["temporary_files"] <= 0
    return {
        "rows": arguments.rows,
        "seconds": round(time.monotonic() - begin, 1),
        "rows_per_s": round(arguments.rows / run["seconds"], 1),
        "run": run,
        "processes": processes,
        "left_over": left[:10],
        "flat": flat and kept and not left and len(processes) == 1 + arguments.actors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help=f"a multiple of {SHARD_ROWS} (default 1,000,000)")
    parser.add_argument("--actors", type=int, default=os.cpu_count() or 1, help="workers (default: one a core)")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        print(json.dumps(drive(arguments.folder, arguments)))
        return
    with tempfile.TemporaryDirectory() as name:
        result = {"machine": machine(), **soak(Path(name), arguments)}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
