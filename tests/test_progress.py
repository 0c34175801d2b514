"""The progress display, on a terminal and off it."""

from __future__ import annotations

import io
import time

from rich.console import Console

from capfilt.dataset import Counts, Provenance
from capfilt.pipelines.progress import Display
from capfilt.receipts import Receipt


def receipt(rows: int, worker: str = "host:1") -> Receipt:
    counts = Counts(kept=rows - 2, dropped=1, errors=1)
    where = Provenance("id", "c", "s", "d", "run")
    return Receipt(shard="s", start=0, stop=rows, file_rows=rows, provenance=where, counts=counts, worker=worker)


def test_plain_lines_without_a_terminal() -> None:
    out = io.StringIO()
    with Display(Console(file=out), 2, plain_seconds=0) as display:
        display.expect(400)
        display.update(receipt(100))
        time.sleep(0.02)
        display.update(receipt(100, "host:2"))
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert "100 of 400 rows" in lines[1]
    assert "200 of 400 rows" in lines[2]
    assert "kept 98.0%  errors 1.00%  actors 2" in lines[2]
    assert "left 0:" in lines[2]
    assert "\x1b" not in out.getvalue()


def test_silence_is_broken() -> None:
    out = io.StringIO()
    with Display(Console(file=out), 1, silent_seconds=0.05):
        time.sleep(0.3)
    assert "no fragment has finished for" in out.getvalue()


def test_a_live_line_on_a_terminal() -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=160), 1) as display:
        display.expect(400)
        display.update(receipt(100))
        time.sleep(0.2)
    assert "100 of 400 rows" in out.getvalue()
