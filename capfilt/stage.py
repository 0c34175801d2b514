"""One stage of a larger run, in a process of its own: `python -m capfilt.stage SPEC`.

It does what `capfilt run SPEC` does, and ends when the process that started it ends, however that ends: standard input
is a pipe that the other holds open.
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the other end is closed
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the spec named on the command line."""
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    from capfilt.cli import main as capfilt

    sys.argv = ["capfilt", "run", sys.argv[1]]
    capfilt()


if __name__ == "__main__":
    main()
