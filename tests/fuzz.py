"""Feeds mutated files to the readers, in processes that may die of them; says which did, which hung and what it cost.

    python tests/fuzz.py images 0 1000 log

is what `sweep` starts: it handles numbers 0 to 999 and writes a line on each.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

CPU_SECONDS = 10
"""What one file may take, or its process dies of SIGPROF."""
SECONDS = 120
"""What it may take by the clock, for a wait that uses no CPU; SIGALRM."""

Handle = Callable[[int], str]
"""What became of a mutated file, by its number; begins with FAULT where that should not be."""
FAULT = "fault: "


@dataclass
class Found:
    """What a sweep came to.

    Attributes:
        outcomes: how often each was met.
        faults: what should not have been, by number.
        slowest: (seconds of CPU, number) of the longest.
        megabytes: the most that a process grew by.
        noise: what was written to standard error.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, -1)
    megabytes: float = 0.0
    noise: str = ""

    def __str__(self) -> str:
        done = sum(self.outcomes.values())
        seconds, number = self.slowest
        return (
            f"{done:,} files, {len(self.faults)} faults; the slowest ({number}) took {seconds:.2f} s; "
            f"a process grew by {self.megabytes:.0f} MB; {dict(self.outcomes.most_common())}; faults: {self.faults}"
        )


def sweep(kind: str, numbers: range, processes: int = 2) -> Found:
    """Handle mutated files, each process every `processes`-th of them."""
    found = Found()
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda first: _share(kind, numbers[first::processes], found), range(processes)))
    return found


def _share(kind: str, numbers: range, found: Found) -> None:
    """One process after another: each goes on behind the number that the last one died of."""
    while numbers:
        with tempfile.TemporaryDirectory() as directory:
            log = Path(directory) / "log"
            given = [kind, *map(str, (numbers.start, numbers.stop, numbers.step)), str(log)]
            variables = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run([sys.executable, __file__, *given], env=variables, capture_output=True, text=True)
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        for number, outcome, seconds, megabytes in lines:
            found.outcomes[outcome] += 1
            if outcome.startswith(FAULT):
                found.faults[number] = outcome
            found.slowest = max(found.slowest, (seconds, number))
            found.megabytes = max(found.megabytes, megabytes)
        found.noise += done.stderr
        if done.returncode > 0 or (done.returncode == 0 and len(lines) < len(numbers)):
            raise RuntimeError(f"the fuzzer itself failed: {done.stderr}")
        if done.returncode < 0:
            found.faults[numbers[len(lines)]] = signal.Signals(-done.returncode).name
            numbers = numbers[len(lines) + 1 :]
        else:
            return


# --- in the process ---


def images() -> Handle:
    """Decode and resize, as capfilt.pipelines.worker does."""
    import numpy as np
    import torch
    from mutations import mutated_image

    from capfilt.errors import ImageError
    from capfilt.images import decode
    from capfilt.models.preprocess import resize
    from capfilt.spec import Images

    torch.set_num_threads(1)
    limits, size = Images(), 32
    pixels, resized = np.empty(12 * 2**20, np.uint8), torch.empty(12 * 2**20, dtype=torch.uint8)
    slot = torch.empty((size, size, 3), dtype=torch.uint8)

    def handle(number: int) -> str:
        try:
            picture = decode(mutated_image(number), limits, pixels)
            resize(picture.rgb, size, slot, resized)
        except ImageError as error:
            return str(error.reason)
        return picture.format

    return handle


def parquets() -> Handle:
    """Read the footer and, in fragments, all rows, as driver and worker do."""
    from mutations import mutated_parquet

    from capfilt.errors import InputError
    from capfilt.fragments import Fragment, cut, read_footer, read_rows
    from capfilt.inputs import list_inputs
    from capfilt.spec import Columns, Input

    path = Path(tempfile.mkdtemp()) / "0.parquet"

    def handle(number: int) -> str:
        path.write_bytes(mutated_parquet(number))
        try:
            (file,) = list_inputs(Input(paths=(str(path),)))
            footer = read_footer(file, Columns(), {}, pauses=())
            rows = unread = 0
            for start, stop in cut(footer.row_groups, 1000):
                for row in read_rows(Fragment(file, footer.layout, start, stop, footer.rows), {}, pauses=()):
                    rows, unread = rows + 1, unread + (not row.readable)
        except InputError:
            return "InputError"
        if rows != footer.rows:
            return f"{FAULT}{rows} rows of {footer.rows}"
        return "some rows unreadable" if unread else "rows"

    return handle


def peak() -> float:
    """The most memory that this process has had, in MB; getrusage's counts what its parent had when it was born."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main(kind: str, start: str, stop: str, step: str, log: str) -> None:
    handle = {"images": images, "parquets": parquets}[kind]()
    before = peak()
    with open(log, "w", buffering=1) as out:
        for number in range(int(start), int(stop), int(step)):
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            begin = time.process_time()
            try:
                outcome = handle(number)
            except Exception as error:  # noqa: BLE001  (that is what is looked for)
                outcome = f"{FAULT}{type(error).__name__}: {str(error)[:200]}"
            out.write(json.dumps([number, outcome, time.process_time() - begin, peak() - before]) + "\n")
    os._exit(0)  # what hostile bytes have left behind is no one's business any more


if __name__ == "__main__":
    main(*sys.argv[1:])
