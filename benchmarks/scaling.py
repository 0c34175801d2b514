"""How a run scales with its actors, and what a fragment costs the driver: whole runs with a device that sleeps.

    python benchmarks/scaling.py [--actors 1 2 4 8] [--seconds 60] [--repeats 3] [--rate 350] [--json FILE]

Everything but the models is real: `capfilt.pipelines.curate.curate` on a local Ray, with all that reading, hashing,
decoding, deciding, writing and committing are. Captioner and filter sleep for as long as an H200 would compute, and
take no processor time. An H200's 1,400 images/s take three cores to decode, and the rest of the work on a row a
fraction of one: a small machine cannot feed eight. So the images are JPEGs of 16 x 16, and the device is slower,
`--rate` images/s. An image then stands for 1,400 / rate of an H200's, and a fragment, a batch and a row group have
fewer rows by as much: each takes as long as an H200's of 1,000, 64 and 100 rows, and Ray, the ledger of attempts and
the driver have as much to do in a second. What is shown is that these do not limit; not that so few cores feed so many
devices. The cores that a run took are printed: where they come near those there are, lower the rate.

**Scaling.** *images/s* is from the first batch of any actor to the last of any; the actors wait for one another before
the first. What is lost as they run out of fragments one by one is counted. Target: 0.9 x n times the rate of one.

**Driver.** CPU time, user and system, of the driver, of Ray's processes and of the ledger: for each further fragment,
from runs of 500 and 2,500 fragments with models that cost nothing; and for each further second, since Ray Data's loop
turns ten times in it however few fragments end, from one of 500 fragments that lasts `--seconds`. Fragments have 10
rows in ten row groups, shards ten fragments. Then what 1,000 H200s would ask of a driver, a ledger and a GCS of one
core each. These runs have few actors: the scaling runs with the fewest and the most give the cost of a fragment again,
at an H200's pace and with what is done at each turn for each actor.

Each run is a fresh process; the settings take turns, and the numbers are medians over repeats, with the smallest and
the largest. Inputs are hard links to one file, read from the page cache.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from measuring import machine, shown, spread
from pipeline_overhead import Nothing, Tree, make_spec
from rich.console import Console

from capfilt.fragments import Fragment
from capfilt.pipelines.curate import WINDOW, curate, on_ray
from capfilt.pipelines.job import Job, LoadModels
from capfilt.receipts import Receipt
from capfilt.spec import CurateSpec

H200_RATE = 1_400
"""Images/s that one H200 is to caption and filter (base, 384 px, bf16, one caption): half of the ceiling that its ~790
TFLOP/s and 270 GFLOP an image give."""

FRAGMENT_ROWS = CurateSpec.model_fields["fragment_rows"].default
MOST_FRAGMENT_ROWS = next(m.le for m in CurateSpec.model_fields["fragment_rows"].metadata if hasattr(m, "le"))
BATCH = 64
SHARD_FRAGMENTS = 10
GROUPS = 10  # row groups of a fragment
SIDE = 16  # pixels
CPUS = 0.1  # of an actor's placement: for Ray's book-keeping; an actor still has one decoding thread

TARGET = 0.9
MANY = 1_000  # actors
FEW_FRAGMENTS, MORE_FRAGMENTS = 500, 2_500
START_SECONDS = 600.0
CENTRAL = ("driver", "ledger", "GCS")
"""Of which a cluster has one, however many nodes and actors."""

Runs = list[dict[str, Any]]
"""Of one setting, as `measure` returns them."""


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        rate: images/s of a device; 0 for one that costs no time.
        fragments: at least; whole shards are made.
    """

    actors: int
    rate: float
    fragments: int
    fragment_rows: int
    batch: int

    @property
    def shards(self) -> int:
        return math.ceil(self.fragments / SHARD_FRAGMENTS)

    @property
    def rows(self) -> int:
        return self.shards * SHARD_FRAGMENTS * self.fragment_rows


def make_shards(folder: Path, setting: Setting) -> None:
    """Fill `folder` with shards of tiny images in img2dataset's columns, all links to the first."""
    rows, rng = SHARD_FRAGMENTS * setting.fragment_rows, np.random.default_rng(0)
    pixels_BSSC = rng.integers(0, 256, (rows, SIDE, SIDE, 3), np.uint8)
    columns = {
        "key": [f"{i:09d}" for i in range(rows)],
        "url": [f"https://images.example.org/{i % 97}/{i:09d}/photograph-of-something.jpg" for i in range(rows)],
        "caption": [f"photograph {i} of a thing that somebody put on the web, best price" for i in range(rows)],
        "jpg": pa.array([simplejpeg.encode_jpeg(image, quality=75) for image in pixels_BSSC], pa.binary()),
    }
    pq.write_table(pa.table(columns), folder / "00000.parquet", row_group_size=max(1, setting.fragment_rows // GROUPS))
    for n in range(1, setting.shards):
        os.link(folder / "00000.parquet", folder / f"{n:05d}.parquet")


# --- one run, in its own process ---


class Device(Nothing):
    """Captioner and filter in one, each half of the device's work; every image is kept."""

    image_size = SIDE

    def __init__(self, batch_size: int, rate: float) -> None:
        super().__init__(batch_size)
        self._half = 0.5 / rate if rate else 0.0

    def caption(self, images_BCHW: torch.Tensor, sha256: Sequence[str]) -> list[list[str]]:
        """One caption an image."""
        time.sleep(len(sha256) * self._half)
        return super().caption(images_BCHW, sha256)

    def score(self, images_BCHW: torch.Tensor, texts: Sequence[Sequence[str]]) -> list[list[tuple[float, float]]]:
        """The same for each text."""
        time.sleep(len(texts) * self._half)
        return super().score(images_BCHW, texts)


def load_device(spec: CurateSpec, _device: str, rate: float) -> tuple[list[Device], list[Device]]:
    """Make the models, and wait until every actor has."""
    loaded = Path(spec.output).with_name("loaded")
    (loaded / str(os.getpid())).touch()
    give_up = time.monotonic() + START_SECONDS
    while len(list(loaded.iterdir())) < spec.placement.max_actors:
        if time.monotonic() > give_up:
            raise TimeoutError(f"{spec.placement.max_actors} actors did not start in {START_SECONDS:.0f} s")
        time.sleep(0.05)
    sizes = (spec.captioners[0].batch_size, spec.filters[0].batch_size)
    captioner, filter_ = (Device(int(size), rate) for size in sizes)
    return [captioner], [filter_]


def run(folder: Path, setting: Setting) -> dict[str, Any]:
    """The pipeline over folder/in. Returns when the models' work began and ended, and how busy they were."""
    spans: list[tuple[str, float, float]] = []

    def recorded(job: Job, fragments: Iterator[Fragment], load: LoadModels) -> Generator[list[Receipt], None, None]:
        with closing(on_ray(job, fragments, load)) as finished:
            for receipts in finished:
                spans.extend((receipt.worker, *receipt.on_models) for receipt in receipts if receipt.on_models)
                yield receipts

    actor = {"actors": setting.actors, "cpus": CPUS, "batch": setting.batch, "fragment_rows": setting.fragment_rows}
    spec = make_spec(folder, argparse.Namespace(**actor))
    load = partial(load_device, rate=setting.rate)
    summary = curate(spec, load=load, execute=recorded, console=Console(file=io.StringIO()))
    last = {worker: max(end for who, _, end in spans if who == worker) for worker, _, _ in spans}
    if (summary.counts.kept, len(last)) != (setting.rows, setting.actors):
        raise RuntimeError(f"{summary.counts} of {setting.rows} rows by {len(last)} of {setting.actors} actors")
    return {
        "begin": min(begin for _, begin, _ in spans),
        "end": max(last.values()),
        "drain_s": max(last.values()) - min(last.values()),
        "busy": summary.busy,
        "bottleneck": summary.bottleneck,
        "stages_s": {stage: round(spent, 2) for stage, spent in summary.seconds.items()},
        "fragments": len(spans),
        "driver_s": time.process_time(),
    }


# --- measuring it from outside ---


class Processes(Tree):
    """As Tree, with Ray's processes told apart, and what it was at each sample."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self._history: list[tuple[float, dict[str, float]]] = []

    def sample(self) -> None:
        """Look once."""
        super().sample()
        self._history.append((time.monotonic(), self.cpu()))  # the workers' clock, too

    @staticmethod
    def _role(process: psutil.Process) -> str:
        title, name = " ".join(process.cmdline()), process.name()
        programs = {"gcs_server": "GCS", "raylet": "raylet"}
        actors = {"MapWorker": "workers", "Attempts": "ledger"}
        return programs.get(name) or next((role for part, role in actors.items() if part in title), "rest of Ray")

    def cores(self, begin: float, end: float) -> dict[str, float]:
        """CPU seconds in a second, by role, between two times."""
        inside = [sample for sample in self._history if begin <= sample[0] <= end]
        if len(inside) < 2:
            return {}
        (since, before), (until, after) = inside[0], inside[-1]
        return {role: round((spent - before.get(role, 0.0)) / (until - since), 4) for role, spent in after.items()}


def measure(setting: Setting) -> dict[str, Any]:
    """One run in a fresh process and folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("in", "loaded"):
            (folder / part).mkdir()
        make_shards(folder / "in", setting)
        command = [sys.executable, __file__, f"--folder={folder}", f"--run={json.dumps(asdict(setting))}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            processes = Processes(process.pid)
            while process.poll() is None:
                processes.sample()
                time.sleep(0.25)
            assert process.stdout is not None
            said = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{setting} failed with {process.returncode}")
    result = json.loads(said.splitlines()[-1])
    begin, end = result.pop("begin"), result.pop("end")
    return {
        **asdict(setting),
        **result,
        "rows": setting.rows,
        "seconds": round(end - begin, 2),
        "images_per_s": round(setting.rows / (end - begin), 1),
        "cores": processes.cores(begin, end),
        "cpu_s": processes.cpu() | {"driver": round(result["driver_s"], 2)},  # its own clock knows its last moments
        "peak_mib": {role: round(used / 2**20) for role, used in processes.peaks.items()},
    }


def in_turn(settings: Sequence[Setting], repeats: int, show: Callable[[dict[str, Any]], str]) -> list[Runs]:
    """Runs of each setting, forth and back. Returns, for each setting, its runs."""
    runs: list[Runs] = [[] for _ in settings]
    for repeat in range(repeats):
        order = list(zip(settings, runs, strict=True))
        for setting, own in order if repeat % 2 == 0 else reversed(order):
            own.append(measure(setting))
            print(f"  {show(own[-1])}", flush=True)
    return runs


def scaling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs with each number of actors. Returns them, and what each number gives over as many times the fewest."""
    rate, slower = arguments.rate, H200_RATE / arguments.rate
    rows, batch = max(1, round(FRAGMENT_ROWS / slower)), max(1, round(BATCH / slower))
    counts = sorted(set(arguments.actors))
    settings = [Setting(n, rate, math.ceil(n * rate * arguments.seconds / rows), rows, batch) for n in counts]
    cores = os.cpu_count() or 1
    print(
        f"Scaling: devices of {rate:g} images/s, each image standing for {slower:g} of an H200's; fragments of {rows}, "
        f"batches of {batch}: {1000 * rows / rate:.0f} and {1000 * batch / rate:.0f} ms"
    )

    def show(run: dict[str, Any]) -> str:
        return (
            f"{run['actors']:3} actors{run['images_per_s']:9.1f} images/s in {run['seconds']:.0f} s, of which the last "
            f"{run['drain_s']:.1f} not all at work; busy {run['busy']:.1%}, waiting for {run['bottleneck']}; "
            f"{run['cores']['all']:.2f} of {cores} cores: {run['cores']}"
        )

    runs = in_turn(settings, arguments.repeats, show)
    fewest, points = counts[0], []
    for n, own in zip(counts, runs, strict=True):
        pairs = zip(own, runs[0], strict=True)
        linear = spread([fewest * many["images_per_s"] / (n * one["images_per_s"]) for many, one in pairs])
        speed = spread([run["images_per_s"] for run in own])
        points.append({"actors": n, "images_per_s": speed, "of linear": linear})
        print(
            f"  {n:3} actors{speed['median']:9.1f} images/s ({speed['min']:.1f} to {speed['max']:.1f}), "
            f"{speed['median'] / (n * rate):.1%} of the devices'; {shown(linear)} linear: {verdict(linear['median'])}"
        )
    image = statistics.median(1000 * run["cores"]["all"] / run["images_per_s"] for run in runs[-1])
    at = {speed: image * counts[-1] * speed / 1000 for speed in (rate, H200_RATE)}
    print(
        f"  {counts[-1]} actors take {image:.3f} CPU ms an image x {counts[-1]} x {rate:g} images/s = {at[rate]:.2f} "
        f"of {cores} cores; at {H200_RATE:,} images/s they would take {at[H200_RATE]:.2f}"
    )
    result = {"rate": rate, "runs": runs, "points": points, "cpu_ms_per_image": image}
    return result | ({"cpu_ms_per_fragment": further(runs[0], runs[-1])} if len(counts) > 1 else {})


def further(fewest: Runs, most: Runs) -> dict[str, float]:
    """CPU ms that each fragment of further actors costs each process that a cluster has one of."""
    before, after = (statistics.median(run["fragments"] / run["seconds"] for run in runs) for runs in (fewest, most))
    ms = {}
    for role in CENTRAL:
        low, high = (statistics.median(run["cores"][role] for run in runs) for runs in (fewest, most))
        ms[role] = 1000 * (high - low) / (after - before)
        print(
            f"  {role:7}{low:6.3f} CPU s in a second with {fewest[0]['actors']} actors and {before:.1f} fragments,"
            f"{high:6.3f} with {most[0]['actors']} and {after:.1f}: {ms[role]:.2f} CPU ms a further fragment"
        )
    return ms


def verdict(linear: float) -> str:
    return f"{'met' if linear >= TARGET else 'MISSED'} (at least {TARGET})"


def driver(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs of few and of more fragments, and few in a longer time. Returns them, and what they cost by role."""
    actors, (least, most) = arguments.driver_actors, arguments.fragments
    few, more = (Setting(actors, 0, fragments, GROUPS, BATCH) for fragments in (least, most))
    slow = replace(few, rate=few.rows / actors / arguments.seconds)
    print(f"Driver: {least:,} and {most:,} fragments of {GROUPS} rows, {actors} actors")

    def show(run: dict[str, Any]) -> str:
        return f"{run['fragments']:6,} fragments in {run['seconds']:.1f} s; CPU s {run['cpu_s']}, MiB {run['peak_mib']}"

    runs = in_turn([few, more, slow], arguments.repeats, show)
    costs: dict[str, dict[str, dict[str, float]]] = {}
    for role in runs[0][0]["cpu_s"]:
        own = [cost(role, *three) for three in zip(*runs, strict=True)]
        costs[role] = {name: spread([one[name] for one in own]) for name in own[0]}
        each, second = costs[role].values()
        print(
            f"  {role:12}{each['median']:7.2f} CPU ms a fragment ({each['min']:.2f} to {each['max']:.2f}),"
            f"{second['median']:7.1f} a second ({second['min']:.1f} to {second['max']:.1f})"
        )
    return {"runs": runs, "cpu_ms": costs, f"{MANY} actors": arithmetic(costs)}


def cost(role: str, few: dict[str, Any], more: dict[str, Any], slow: dict[str, Any]) -> dict[str, float]:
    """CPU ms of each further fragment and second: three runs' CPU time as a constant and these two."""

    def beyond(run: dict[str, Any]) -> tuple[float, float, int]:
        spent = 1000 * (run["cpu_s"].get(role, 0.0) - few["cpu_s"].get(role, 0.0))
        return spent, run["seconds"] - few["seconds"], run["fragments"] - few["fragments"]

    (spent, seconds, fragments), (idle, longer, _) = beyond(more), beyond(slow)
    second = max(0.0, idle / longer) if longer > 0 else 0.0
    return {"fragment": (spent - second * seconds) / fragments, "second": second}


def arithmetic(costs: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """What `MANY` H200s would ask of the processes that a cluster has one of."""
    images, needed = MANY * H200_RATE, {}
    print(
        f"{MANY:,} actors of {H200_RATE:,} images/s: at {FRAGMENT_ROWS:,} rows a fragment "
        f"{images / FRAGMENT_ROWS:,.0f} fragments/s, for each {1000 * FRAGMENT_ROWS / images:.2f} ms of one core"
    )
    for role in CENTRAL:
        # The difference of two small numbers may be below nothing.
        each, second = (max(0.0, costs[role][name]["median"]) for name in ("fragment", "second"))
        needed[role] = math.ceil(each * images / max(1.0, 1000 - second))
        print(
            f"  {role:8}{(each * images / FRAGMENT_ROWS + second) / 1000:6.2f} cores; one is enough at fragment_rows "
            f">= {each:.2f} ms x {images:,}/s / {1000 - second:.0f} ms = {needed[role]:,}"
        )
    rows = max(needed.values())
    if rows <= FRAGMENT_ROWS:
        print(f"  one driver serves {MANY:,} actors at {FRAGMENT_ROWS:,} rows a fragment")
    else:
        allowed = "within" if rows <= MOST_FRAGMENT_ROWS else "BEYOND"
        print(
            f"  one driver does NOT serve {MANY:,} actors at {FRAGMENT_ROWS:,} rows a fragment, but "
            f"{MANY * FRAGMENT_ROWS / rows:,.0f}; it does at {rows:,} rows, {allowed} the spec's bound of "
            f"{MOST_FRAGMENT_ROWS:,}. That is {rows / H200_RATE:.1f} s of a device, what a crash costs; input files "
            f"must be as large, since no fragment spans two"
        )
    window = WINDOW * max(rows, FRAGMENT_ROWS) / images
    print(f"  a window of {WINDOW:,} such fragments, after which actors start anew, would be over in {window:.0f} s")
    return {"fragment_rows": needed, "window_s": round(window, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of (default 1 2 4 8)")
    parser.add_argument("--seconds", type=float, default=60, help="that the devices are to compute (default 60)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each setting (default 3)")
    parser.add_argument("--rate", type=float, default=350, help="images/s of a device (default 350)")
    parser.add_argument("--only", choices=("scaling", "driver"), help="one of the two")
    parser.add_argument("--driver-actors", type=int, default=2, help="of the runs for the driver (default 2)")
    parser.add_argument("--fragments", type=int, nargs=2, default=[FEW_FRAGMENTS, MORE_FRAGMENTS], help="of theirs")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.seconds < 2:
        parser.error("--seconds: at least 2, to see what the processes take")
    if arguments.run:
        print(json.dumps(run(arguments.folder, Setting(**arguments.run))))
        return
    result: dict[str, Any] = {"machine": machine(), "command": sys.argv[1:]}
    result["machine"]["versions"] |= {name: version(name) for name in ("ray", "pyarrow", "simplejpeg")}
    print(result["machine"])
    for part in (scaling, driver):
        if arguments.only in (None, part.__name__):
            result[part.__name__] = part(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
