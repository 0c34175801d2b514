"""What the pipeline costs around the models: a whole run with models that cost nothing against a bare loop.

    python benchmarks/pipeline_overhead.py [--rows 30000] [--repeats 3] [--actors N] [--cpus 1] [--json FILE]
    python benchmarks/pipeline_overhead.py --memory

Ours: `capfilt.pipelines.curate.curate` on a local Ray, `--actors` workers of `--cpus` cores (default: a worker a core):
it reads, hashes, decodes, decides, writes and commits, and every image is kept, so all bytes are written again. Bare:
one process a core, each over its share of the same shards: pyarrow's batches, the same decode and resize, nothing else.
Target: ours at 0.8 x the images/s of bare, and peak memory that does not grow from 10,000 to 100,000 rows (`--memory`).

Each run is a fresh process; the sides take turns, and the numbers are medians over repeats. *Whole* is from the start
of that process to its end: imports, Ray's start and stop, the last commit. *Steady* is from the first worker's first
image to the last commit (bare: to the last image). *CPU* is user and system time of all the processes of a side, the
steadier number on a machine that does other work. *Memory* is resident and not shared, every quarter of a second.

Photographs: 300 crops of scikit-image's, long side 512 px, quality 92, about 50 KiB, in img2dataset's columns and row
groups of 100, 2,500 rows a shard. Shards are hard links to one file: reading comes from the page cache on both sides.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import skimage.data
import torch
from PIL import Image, ImageEnhance
from rich.console import Console

from capfilt.images import decode
from capfilt.models.preprocess import resize
from capfilt.pipelines.curate import curate, in_process
from capfilt.pipelines.worker import SCRATCH_BYTES
from capfilt.spec import CaptionerCard, CurateSpec, FilterCard, Images, Input, LocalCheckpoint, Placement

SIZE = 384
SHARD_ROWS = 2_500
DISTINCT = 300
TARGET = 0.8
MEMORY_ROWS = (10_000, 100_000)
GROWTH = 1.1  # of peak memory over ten times the rows: noise of allocators, not of the design

_LOADED = "loaded"  # file beside the output whose modification time is when the first worker was ready


# --- input ---


def photographs() -> list[bytes]:
    """JPEGs, each another crop, mirrored and brightened by chance."""
    rng = np.random.default_rng(0)
    left, right, _ = skimage.data.stereo_motorcycle()
    names = ("astronaut", "coffee", "chelsea", "rocket", "retina", "hubble_deep_field")
    photos = [Image.fromarray(array) for array in (left, right, *(getattr(skimage.data, name)() for name in names))]
    jpegs = []
    for photo in islice(cycle(photos), DISTINCT):
        long, ratio = rng.uniform(0.7, 1.0), rng.uniform(0.66, 1.0)
        size = np.array([min(photo.size) * long, min(photo.size) * long * ratio])[:: rng.choice([1, -1])]
        x, y = rng.uniform(0, np.array(photo.size) - size)
        width, height = (int(side) for side in np.rint(size * (512 / size.max())))
        crop = photo.resize((width, height), Image.Resampling.BICUBIC, (x, y, x + size[0], y + size[1]))
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        buffer = io.BytesIO()
        ImageEnhance.Brightness(crop).enhance(rng.uniform(0.8, 1.2)).save(buffer, "JPEG", quality=92)
        jpegs.append(buffer.getvalue())
    return jpegs


def make_shards(folder: Path, rows: int) -> None:
    """Fill `folder` with rows / SHARD_ROWS shards, all links to the first; with one of `rows` where they are fewer."""
    own = min(rows, SHARD_ROWS)
    jpegs = list(islice(cycle(photographs()), own))
    first = folder / "00000.parquet"
    columns = {
        "key": [f"{i:09d}" for i in range(own)],
        "url": [f"https://images.example.org/{i % 97}/{i:09d}/photograph-of-something.jpg" for i in range(own)],
        "caption": [f"photograph {i} of a thing that somebody put on the web, best price" for i in range(own)],
        "status": ["success"] * own,
        "error_message": pa.nulls(own, pa.string()),
        "jpg": pa.array(jpegs, pa.binary()),
    }
    pq.write_table(pa.table(columns), first, row_group_size=100)
    for n in range(1, rows // SHARD_ROWS):
        os.link(first, folder / f"{n:05d}.parquet")


# --- ours ---


class Nothing:
    """Captioner and filter in one, at no cost; every image is kept."""

    image_size = SIZE

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def caption(self, _: torch.Tensor, sha256: Sequence[str]) -> list[list[str]]:
        """One caption an image."""
        return [["a photograph of a thing"] for _ in sha256]

    def score(self, _: torch.Tensor, texts: Sequence[Sequence[str]]) -> list[list[tuple[float, float]]]:
        """The same for each text."""
        return [[(0.9, 0.3)] * len(row) for row in texts]


def load_nothing(spec: CurateSpec, _device: str) -> tuple[list[Nothing], list[Nothing]]:
    """Make the models; leaves a mark of when."""
    Path(spec.output).with_name(_LOADED).touch()
    sizes = (spec.captioners[0].batch_size, spec.filters[0].batch_size)
    captioner, filter_ = (Nothing(int(size)) for size in sizes)
    return [captioner], [filter_]


def make_spec(folder: Path, arguments: argparse.Namespace) -> CurateSpec:
    """A run over folder/in into folder/out."""
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        (checkpoint / name).write_text("{}")
    card = {
        "checkpoint": LocalCheckpoint(path=str(checkpoint)),
        "image_size": SIZE,
        "batch_size": arguments.batch,
        "placement": Placement(cpus=arguments.cpus, min_actors=arguments.actors, max_actors=arguments.actors),
    }
    return CurateSpec(
        kind="curate",
        input=Input(paths=(str(folder / "in"),)),
        output=str(folder / "out"),
        captioners=(CaptionerCard(role="captioner", name="nothing", **card),),
        filters=(FilterCard(role="filter", name="nothing", **card),),
        fragment_rows=arguments.fragment_rows,
    )


def run_ours(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The pipeline over folder/in. Returns rows, the steady part's begin and end, and seconds by stage."""
    spec = make_spec(folder, arguments)
    execute = in_process if arguments.side == "loop" else None
    summary = curate(spec, load=load_nothing, execute=execute, console=Console(file=io.StringIO()))
    if summary.counts.kept != arguments.rows:
        raise RuntimeError(f"{summary.counts} of {arguments.rows} rows")
    loaded = (folder / _LOADED).stat().st_mtime
    return {"begin": loaded, "end": time.time(), "stages": dict(summary.seconds), "curate_s": summary.elapsed}


# --- bare ---


def bare_loop(paths: list[Path]) -> tuple[float, float]:
    """Read and decode files. Returns the times of begin and end."""
    torch.set_num_threads(1)
    limits, scratch = Images(), np.empty(SCRATCH_BYTES, np.uint8)
    pixels_HWC, between = (torch.empty(count, dtype=torch.uint8) for count in ((SIZE, SIZE, 3), SCRATCH_BYTES))
    begin = time.time()
    for path in paths:
        with pq.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches(32, columns=["jpg", "caption"], use_threads=False):
                batch.column("caption").to_pylist()
                for image in batch.column("jpg").to_pylist():
                    resize(decode(image, limits, scratch).rgb, SIZE, pixels_HWC, between)
    return begin, time.time()


def run_bare(folder: Path) -> dict[str, Any]:
    """The bare loop over folder/in, a process a core. Returns the begin and end of all the loops."""
    cores, paths = os.cpu_count() or 1, sorted((folder / "in").iterdir())
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        times = pool.map(bare_loop, [paths[n::cores] for n in range(cores)], chunksize=1)
    return {"begin": min(begin for begin, _ in times), "end": max(end for _, end in times)}


# --- measuring ---


class Tree:
    """A process and all its descendants, as sampled: CPU seconds and peak private memory, by role."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._cpu: dict[tuple[int, float], tuple[str, float]] = {}
        self.peaks: dict[str, int] = defaultdict(int)

    def sample(self) -> None:
        """Look once."""
        together: dict[str, int] = defaultdict(int)
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                with process.oneshot():
                    role = "driver" if process == self._root else self._role(process)
                    memory, cpu = process.memory_info(), process.cpu_times()
                    self._cpu[process.pid, process.create_time()] = (role, cpu.user + cpu.system)
                    together[role] += memory.rss - memory.shared
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        together["all"] = sum(together.values())
        for role, used in together.items():
            self.peaks[role] = max(self.peaks[role], used)

    @staticmethod
    def _role(process: psutil.Process) -> str:
        title = " ".join(process.cmdline())
        return "workers" if "MapWorker" in title or "spawn_main" in title else "rest of Ray"

    def cpu(self) -> dict[str, float]:
        """CPU seconds by role."""
        total: dict[str, float] = defaultdict(float)
        for role, seconds in self._cpu.values():
            total[role] += seconds
        total["all"] = sum(total.values())
        return {role: round(seconds, 2) for role, seconds in total.items()}


def measure(side: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run of one side in a fresh process."""
    for leftover in ("out", _LOADED):
        path = folder / leftover
        if path.is_dir():
            shutil.rmtree(path)
    passed = [f"--{name}={getattr(arguments, name.replace('-', '_'))}" for name in _PASSED]
    command = [sys.executable, __file__, f"--side={side}", f"--folder={folder}", *passed]
    begin = time.time()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        tree = Tree(process.pid)
        while process.poll() is None:
            tree.sample()
            time.sleep(0.25)
        whole = time.time() - begin
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{side} failed with {process.returncode}")
    result = json.loads(said.splitlines()[-1])
    steady = result["end"] - result["begin"]
    return {
        "rows": arguments.rows,
        "whole_s": round(whole, 2),
        "start_s": round(result["begin"] - begin, 2),
        "whole_images_per_s": round(arguments.rows / whole, 1),
        "steady_images_per_s": round(arguments.rows / steady, 1),
        "cpu_s": tree.cpu(),
        "cpu_ms_per_image": round(1000 * tree.cpu()["all"] / arguments.rows, 3),
        "peak_mib": {role: round(used / 2**20) for role, used in tree.peaks.items()},
        "stages_s": {stage: round(spent, 2) for stage, spent in result.get("stages", {}).items()},
    }


_PASSED = ("rows", "actors", "cpus", "batch", "fragment-rows")


def overhead(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn. Returns every run, and the medians of ours / bare."""
    sides = ("ours", "bare", "loop") if arguments.loop else ("ours", "bare")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for repeat in range(arguments.repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            run = measure(side, folder, arguments)
            runs[side].append(run)
            print(
                f"  {side:5}{run['whole_images_per_s']:8.1f} images/s whole{run['steady_images_per_s']:8.1f} steady"
                f"{run['cpu_ms_per_image']:8.3f} CPU ms an image  started in {run['start_s']:.1f} s  "
                f"CPU s {run['cpu_s']}  MiB {run['peak_mib']}  stages {run['stages_s']}",
                flush=True,
            )

    def ratio(field: str) -> float:
        pairs = zip(runs["ours"], runs["bare"], strict=True)
        return round(float(statistics.median(ours[field] / bare[field] for ours, bare in pairs)), 3)

    ratios = {field: ratio(field) for field in ("whole_images_per_s", "steady_images_per_s", "cpu_ms_per_image")}
    print(f"  ours / bare: {ratios}; target {TARGET} x the images/s")
    return {"runs": runs, "ours / bare": ratios}


def memory(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The pipeline at two sizes. Returns peak memory by role at each, and the growth of each role."""
    peaks = {}
    for rows in MEMORY_ROWS:
        arguments.rows = rows
        shutil.rmtree(folder / "in", ignore_errors=True)
        (folder / "in").mkdir()
        make_shards(folder / "in", rows)
        peaks[rows] = measure("ours", folder, arguments)["peak_mib"]
        print(f"  {rows:,} rows: peak MiB {peaks[rows]}", flush=True)
    small, large = (peaks[rows] for rows in MEMORY_ROWS)
    growth = {role: round(large[role] / small[role], 3) for role in large}
    flat = all(growth[role] <= GROWTH for role in ("driver", "workers"))
    print(f"  growth: {growth}: {'flat' if flat else 'NOT FLAT'} (at most {GROWTH} for driver and workers)")
    return {"peak_mib": peaks, "growth": growth, "flat": flat}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return {"cpu": (models or [platform.processor()])[0], "cores": os.cpu_count(), "load": os.getloadavg()}


def main() -> None:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--rows", type=int, default=30_000, help=f"a multiple of {SHARD_ROWS} (default 30,000)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default 3)")
    parser.add_argument("--actors", type=int, default=cores, help="workers of ours (default: as many as cores)")
    parser.add_argument("--cpus", type=float, default=1, help="cores, and so decoding threads, of a worker (default 1)")
    parser.add_argument("--batch", type=int, default=32, help="images a batch (default 32)")
    parser.add_argument("--fragment-rows", type=int, default=1000, help="the spec's (default 1,000)")
    parser.add_argument("--loop", action="store_true", help="a third side: the worker in a plain loop, without Ray")
    parser.add_argument("--memory", action="store_true", help="peak memory at 10,000 and 100,000 rows instead")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        bare = arguments.side == "bare"
        print(json.dumps(run_bare(arguments.folder) if bare else run_ours(arguments.folder, arguments)))
        return
    result: dict[str, Any] = {"machine": machine(), "command": sys.argv[1:]}
    result["versions"] = {name: version(name) for name in ("ray", "torch", "pyarrow", "simplejpeg")}
    print(result["machine"], result["versions"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.memory:
            result["memory"] = memory(folder, arguments)
        else:
            (folder / "in").mkdir()
            make_shards(folder / "in", arguments.rows)
            size = (folder / "in" / "00000.parquet").stat().st_size // SHARD_ROWS / 1024
            print(f"{arguments.rows:,} rows of {size:.0f} KiB")
            result["overhead"] = overhead(folder, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
