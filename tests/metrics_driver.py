"""A run on a Ray of its own whose metrics are exported; scrapes them as Prometheus does. Prints JSON.

python metrics_driver.py SPEC.json PORT
"""

from __future__ import annotations

import io
import json
import sys
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path

import ray
import stubs
from rich.console import Console

from capfilt.pipelines.curate import curate
from capfilt.pipelines.session import connected
from capfilt.spec import CurateSpec

SETTLED_SECONDS = 15  # a process reports every 10


def main(path: str, port: int) -> None:
    spec = CurateSpec.model_validate_json(Path(path).read_text())
    ray.cloudpickle.register_pickle_by_value(stubs)
    with connected(spec.ray):
        summary = curate(spec, load=stubs.load_raising, console=Console(file=io.StringIO()))
        text = scrape(port, summary.counts.rows)
    print(json.dumps({"run": summary.run, "counts": asdict(summary.counts), "reasons": summary.reasons, "text": text}))


def scrape(port: int, rows: int) -> str:
    """What the agent says once every process has reported: all rows are there, and nothing has changed for a while."""
    before, since, deadline = "", time.monotonic(), time.monotonic() + 120
    while time.monotonic() < deadline:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        ours = [line for line in text.splitlines() if line.startswith("ray_capfilt_")]
        counted = [float(line.rpartition(" ")[2]) for line in ours if line.startswith("ray_capfilt_rows_total{")]
        now = "\n".join(ours)
        if now != before or sum(counted) != rows:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > SETTLED_SECONDS:
            return now
        time.sleep(1)
    raise TimeoutError(f"the metrics do not settle:\n{before}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
