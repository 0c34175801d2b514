"""The progress display, on a terminal and off it."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from capfilt.dataset import Counts, Provenance
from capfilt.pipelines import progress, waiting
from capfilt.pipelines.progress import Display
from capfilt.receipts import Receipt


def receipt(rows: int, worker: str = "host:1") -> Receipt:
    counts = Counts(kept=rows - 2, dropped=1, errors=1)
    where = Provenance("id", "c", "s", "d", "run")
    return Receipt(shard="s", start=0, stop=rows, file_rows=rows, provenance=where, counts=counts, worker=worker)


class Clock:
    now = 1_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time as the display reads it."""
    made = Clock()
    for module in (progress, waiting):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_plain_lines_without_a_terminal() -> None:
    out = io.StringIO()
    with Display(Console(file=out), 2, plain_seconds=0) as display:
        display.expect(400)
        display.update(receipt(100))
        time.sleep(0.02)
        display.update(receipt(100, "host:2"))
    lines = out.getvalue().splitlines()
    assert lines == [
        "capfilt: 100 of 400 rows  kept 98.0%  errors 1.00%  actors 1",
        "capfilt: 200 of 400 rows  kept 98.0%  errors 1.00%  actors 2",
    ]


def test_silence_is_broken() -> None:
    out = io.StringIO()
    with Display(Console(file=out), 1, silent_seconds=0.05):
        time.sleep(0.3)
    assert "no fragment has finished for" in out.getvalue()


def test_it_is_said_what_is_waited_for_and_for_how_long(clock: Clock) -> None:
    out = io.StringIO()
    display = Display(Console(file=out), 1, plain_seconds=0)
    display.waits("starting Ray")
    clock.now += 1
    display.waits("reading what is to be done")  # over in a moment: not worth a line
    clock.now += 1
    display.waits("loading the models")
    for _ in range(70):
        clock.now += 1
        display._waiting.remind()
    display.update(receipt(100))
    clock.now += 100
    display._waiting.remind()
    assert out.getvalue().splitlines() == [
        "capfilt: starting Ray",
        "capfilt: loading the models (2 s)",
        "capfilt: loading the models (15 s)",
        "capfilt: loading the models (30 s)",
        "capfilt: loading the models (60 s)",
        "capfilt: 100 rows  kept 98.0%  errors 1.00%  actors 1",
    ]


def test_the_pace_is_that_of_steady_work(clock: Clock) -> None:
    """Two workers at 10 rows/s each, after 60 s of start-up; their first fragments come together."""
    display = Display(Console(file=io.StringIO()), 2)
    display.waits("loading the models")
    clock.now += 60
    display.expect(4_000)
    display.adopt(receipt(1_000))  # by an earlier run
    for worker in ("host:1", "host:2"):
        display.update(receipt(100, worker))
        assert "images/s" not in display.line()
        assert "left" not in display.line()
    clock.now += 4
    display.update(receipt(40, "host:1"))
    assert "left" not in display.line(), "too early to tell"
    clock.now += 6
    display.update(receipt(60, "host:1"))
    display.update(receipt(100, "host:2"))
    assert "1,400 of 4,000 rows  20.0 images/s" in display.line()
    assert display.line().endswith("left 0:02:10")
    clock.now += 7
    assert display.line().endswith("left 0:02:03"), "it goes on while a fragment is at work"
    display.waits("starting Ray")  # another stage, of another pace
    assert display.line().endswith("actors 2  starting Ray")


def test_a_live_line_on_a_terminal() -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=160), 1) as display:
        display.expect(400)
        display.waits("starting Ray")
        time.sleep(1.3)
        display.update(receipt(100))
        time.sleep(0.2)
    assert "starting Ray (1 s)" in out.getvalue()
    assert "100 of 400 rows" in out.getvalue()
