"""`kind: ingest` against img2dataset's own command, on the same local web server, in turn.

    python benchmarks/ingest.py --images 5000 --repeats 3

Both resize to 512 pixels, write Parquet, hash and read EXIF, with as many processes and threads, from start to end of
the command. The server is a process of its own and shares the machine with them. Every URL must come back as a row.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from measuring import shown, spread
from PIL import Image

PICTURES = 64
"""Different ones; a URL's is its number's remainder."""

ROWS_PER_SHARD = 1000

ENVIRONMENT = {
    "NO_ALBUMENTATIONS_UPDATE": "1",  # it asks the web at every start, and waits
    "WANDB_MODE": "disabled",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


def picture(seed: int) -> bytes:
    """A JPEG of 800 x 600 that compresses as a photograph does, about 80 KB."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)).resize((800, 600), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse, np.int16) + rng.normal(0, 6, (600, 800, 3)).astype(np.int16)
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def serve(ready: Any) -> None:
    """A web server that costs little: an answer made beforehand for each path."""
    bodies = [picture(seed) for seed in range(PICTURES)]
    head = "HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\nConnection: close\r\n\r\n"
    answers = [head.format(len(body)).encode() + body for body in bodies]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        writer.write(answers[int(request.split(b" ", 2)[1][1:]) % PICTURES])
        await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextmanager
def web() -> Iterator[str]:
    """The server's URL, for as long as it runs."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there,), daemon=True)
    process.start()
    yield f"http://127.0.0.1:{here.recv()}"
    process.kill()
    process.join()


def command(program: str, *arguments: str) -> float:
    """Seconds of a Python program, from start to end."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"failed: {done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return seconds


def theirs(urls: Path, output: Path, processes: int, threads: int) -> float:
    """img2dataset's own command."""
    options = {
        "url_list": urls,
        "input_format": "parquet",
        "caption_col": "caption",
        "output_folder": output,
        "output_format": "parquet",
        "image_size": 512,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "number_sample_per_shard": ROWS_PER_SHARD,
        "processes_count": processes,
        "thread_count": threads,
        "enable_wandb": False,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return command("from img2dataset.main import main; main()", *flags)


def ours(urls: Path, output: Path, processes: int, threads: int) -> float:
    """`capfilt run`."""
    spec = {
        "kind": "ingest",
        "urls": {"paths": str(urls)},
        "output": str(output),
        "shard_rows": ROWS_PER_SHARD,
        "processes": processes,
        "download": {"thread_count": threads, "allow_private": True},
        "resize": {"image_size": 512, "resize_mode": "keep_ratio", "resize_only_if_bigger": True},
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(spec))
    return command("from capfilt.cli import main; main()", "run", str(path))


def account(output: Path) -> Counter[str]:
    """Rows by status."""
    tables = [pq.read_table(path, columns=["status"]) for path in output.glob("*.parquet")]
    return Counter(status for table in tables for status in table["status"].to_pylist())


def main() -> None:
    """Measure, print and, if asked, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="for what is written meanwhile; a temporary one if not given")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ingest-", dir=asked.directory))
    runs: dict[str, list[float]] = {"img2dataset": [], "capfilt": []}
    try:
        with web() as url:
            urls = [f"{url}/{number}" for number in range(asked.images)]
            pq.write_table(
                pa.table({"url": urls, "caption": [f"a picture {url}" for url in urls]}), folder / "l.parquet"
            )
            for repeat in range(asked.repeats):
                sides = [("img2dataset", theirs), ("capfilt", ours)]
                for name, side in sides if repeat % 2 == 0 else reversed(sides):
                    output = folder / name
                    seconds = side(folder / "l.parquet", output, asked.processes, asked.threads)
                    rows = account(output)
                    if rows != {"success": asked.images}:
                        raise SystemExit(f"{name}: {dict(rows)}, not {asked.images} images")
                    runs[name].append(asked.images / seconds)
                    print(f"{name}: {seconds:.1f} s, {asked.images / seconds:.1f} images/s, all {asked.images:,} rows")
                    shutil.rmtree(output)
    finally:
        shutil.rmtree(folder)
    ratio = spread([mine / other for mine, other in zip(runs["capfilt"], runs["img2dataset"], strict=True)])
    print(f"capfilt has {shown(ratio)} img2dataset {version('img2dataset')}'s images/s")
    if asked.json:
        found = {"asked": {key: str(value) for key, value in vars(asked).items()}, "images_per_second": runs}
        asked.json.write_text(json.dumps({**found, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
