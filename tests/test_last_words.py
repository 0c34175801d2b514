"""What is said of a process that ends without a word of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

BODY = """
import os, signal, sys
from capfilt.last_words import last_words
with last_words(sys.argv[1], 2):
    {}
"""


@pytest.mark.parametrize(
    ("ending", "code", "silent"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, False),
        ("os._exit(1)", 1, False),  # as Ray does
        ("pass", 0, True),
        ("sys.exit(3)", 3, True),
        ("os.killpg(os.getpgid(0), signal.SIGTERM)", -signal.SIGTERM, False),
    ],
)
def test_who_speaks(tmp_path: Path, ending: str, code: int, silent: bool) -> None:
    log = tmp_path / "ray's.log"
    log.write_text("starting\nFailed to connect to GCS within 60 seconds.\n")
    command = [sys.executable, "-c", BODY.format(ending), str(log)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, start_new_session=True, check=False
    )  # returns once everyone who holds standard error has closed it
    assert done.returncode == code
    if silent:
        assert done.stderr == ""
    else:
        first, last, advice = done.stderr.splitlines()
        assert f"Ray's last words, from {log}:" in first
        assert last == "Failed to connect to GCS within 60 seconds."
        assert "the same command then resumes" in advice
