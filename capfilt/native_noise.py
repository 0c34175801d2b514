"""What Ray's native code writes to descriptor 2, past Python: off the terminal, and in a file where a run fails."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console

from capfilt import logs
from capfilt.errors import CheckpointError, ConflictError, ErrorBudgetError, RunInterruptedError, SpecError
from capfilt.interrupts import acknowledged
from capfilt.last_words import last_words
from capfilt.terminal import err, say

_NOT_OF_RAY = (RunInterruptedError, ConflictError, ErrorBudgetError, SpecError, CheckpointError)


@contextmanager
def native_noise_in_a_file() -> Iterator[Console]:
    """Send descriptor 2 to a file, which is left where a run fails by what may be Ray's doing.

    Yields a console on the real standard error, which also says that Ctrl-C or SIGTERM was heard.

    Raises:
        RunInterruptedError: Ctrl-C or SIGTERM.
    """
    sys.stderr.flush()
    real = os.dup(2)
    noise = tempfile.NamedTemporaryFile("wb", prefix="capfilt-", suffix=".log", delete=False)  # noqa: SIM115
    os.dup2(noise.fileno(), 2)
    done = False
    try:
        with last_words(noise.name, real) as silence, os.fdopen(os.dup(real), "w") as stream:
            console = logs.console() if logs.begun() else Console(file=stream, soft_wrap=True)
            with acknowledged(console, partial(_leave_nothing, silence, noise.name)):
                yield console
        done = True
    except _NOT_OF_RAY:
        done = True
        raise
    finally:
        sys.stderr.flush()
        os.dup2(real, 2)
        os.close(real)
        noise.close()
        if done or not os.path.getsize(noise.name):
            os.unlink(noise.name)
        else:
            say(f"capfilt: what Ray had to say is in {noise.name}", err)


def _leave_nothing(silence: Callable[[], None], noise: str) -> None:
    """Where the process is ended at once."""
    silence()
    os.unlink(noise)
