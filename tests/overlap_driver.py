"""A driver in a process of its own, without Ray: curates a spec with models that cost nothing, at a given pace.

python overlap_driver.py SPEC.json SECONDS_A_FRAGMENT
"""

from __future__ import annotations

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


def main(spec: str, pause: str) -> None:
    def slowly(job: Job, work: Iterator[object], load: LoadModels) -> Iterator[list[Receipt]]:
        for receipts in in_process(job, work, load):  # type: ignore[arg-type]
            time.sleep(float(pause))
            yield receipts

    logs.begin()
    console = Console(stderr=True, quiet=logs.begun())
    try:
        curate(CurateSpec.model_validate_json(Path(spec).read_text()), load=load_hash, execute=slowly, console=console)
    except CapfiltError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
