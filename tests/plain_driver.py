"""A driver in a process of its own, without Ray: curates a spec with models that cost nothing, at a given pace.

python plain_driver.py SPEC.json SECONDS_A_FRAGMENT [AFTER COMMAND]

Once AFTER fragments are finished (0: before it begins) it runs a shell command, which may do something to it: it is the
shell's parent.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from stubs import load_hash

from capfilt import logs
from capfilt.errors import CapfiltError
from capfilt.pipelines.curate import curate, in_process
from capfilt.pipelines.worker import Job, LoadModels
from capfilt.receipts import Receipt
from capfilt.spec import CurateSpec


def main(spec: str, pause: str, after: str = "-1", command: str = "") -> None:
    def strike(finished: int) -> None:
        if finished == int(after):
            subprocess.run(["/bin/sh", "-c", command], check=True)

    def slowly(job: Job, work: Iterator[object], load: LoadModels) -> Iterator[list[Receipt]]:
        for finished, receipts in enumerate(in_process(job, work, load), 1):  # type: ignore[arg-type]
            strike(finished)
            time.sleep(float(pause))
            yield receipts

    logs.begin()
    console = Console(stderr=True, quiet=logs.begun())
    strike(0)
    try:
        curate(CurateSpec.model_validate_json(Path(spec).read_text()), load=load_hash, execute=slowly, console=console)
    except CapfiltError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
