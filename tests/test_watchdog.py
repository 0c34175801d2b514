"""A process that hangs in an image ends, whatever holds it; one that works, however slowly others do, does not."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HANG = """
import ctypes, sys, threading, time
from capfilt.pipelines import watchdog
watchdog._TICK, watchdog._GRACE = 0.1, 5
dog = watchdog.Watchdog(0.5)
def work(seconds, sleep=time.sleep):
    with dog.watching("row 7"):
        sleep(seconds)
"""


def run(code: str) -> tuple[int, str, float]:
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANG + code], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr, time.monotonic() - begin


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("work(50)", "capfilt: row 7: its image took more than images.max_seconds; this worker ends"),
        ("threading.Thread(target=work, args=(50,)).start()\nwhile True: work(0.2)", "row 7: its image took more"),
        ("work(50, lambda s: ctypes.PyDLL(None).sleep(s))", "Timeout"),  # and lets no other thread of Python run
    ],
)
def test_it_ends(code: str, said: str) -> None:
    code_, stderr, took = run(code)
    assert code_ == 1
    assert said in stderr
    assert "in work" in stderr  # where it hung
    assert took < 40


def test_many_images_one_after_the_other_are_no_hang() -> None:
    code, stderr, _ = run("for _ in range(20): work(0.1)\ntime.sleep(1.5)\nprint('well', file=sys.stderr)")
    assert (code, stderr) == (0, "well\n")
