"""What Ray's native code writes to descriptor 2, past Python: off the terminal, and in a file where a run fails."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from capfilt import logs
from capfilt.errors import CheckpointError, ConflictError, ErrorBudgetError, SpecError
from capfilt.last_words import last_words
from capfilt.terminal import err, say


@contextmanager
def native_noise_in_a_file() -> Iterator[Console]:
    """Send descriptor 2 to a file, which is left where a run fails by what may be Ray's doing.

    Yields a console on the real standard error.
    """
    sys.stderr.flush()
    real = os.dup(2)
    noise = tempfile.NamedTemporaryFile("wb", prefix="capfilt-", suffix=".log", delete=False)  # noqa: SIM115
    os.dup2(noise.fileno(), 2)
    done = False
    try:
        with last_words(noise.name, real), os.fdopen(os.dup(real), "w") as stream:
            yield logs.console() if logs.begun() else Console(file=stream, soft_wrap=True)
        done = True
    except (KeyboardInterrupt, ConflictError, ErrorBudgetError, SpecError, CheckpointError):  # Ray had no part in these
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
