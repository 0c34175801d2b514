"""What is said of a process that ends without a word of its own.

Ray's native code ends a driver a minute after the head of its cluster is lost, and the kernel one that takes too much
memory: no line of Python runs then. So another process speaks.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_MESSAGE = (
    "capfilt: this run has ended without a word of its own: it was killed, or Ray ended it because the head of its "
    "cluster, or the Ray of its own node, was lost. Ray's last words, from {log}:"
)
_NEXT = "capfilt: what was finished is kept. Start the cluster again if it is gone; the same command then resumes"
_SCRIPT = """
trap "" INT TERM
read -r ended && exit
{ printf '%s\\n' "$1"; tail -n 1 "$3"; printf '%s\\n' "$2"; } >&2
"""


@contextmanager
def last_words(log: str, stderr: int) -> Iterator[Callable[[], None]]:
    """Say what has happened, and what to do, if this process ends within; unless what is yielded was called before.

    Args:
        log: what Ray says, a file.
        stderr: a descriptor to speak to.
    """
    command = ["/bin/sh", "-c", _SCRIPT, "capfilt", _MESSAGE.format(log=log), _NEXT, log]
    # A session of its own: what is killed with our process group must not silence it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=stderr, start_new_session=True) as other:
        pipe = other.stdin
        assert pipe is not None

        def silence() -> None:
            with suppress(BrokenPipeError):  # it was killed; there is nothing left for it to say
                if not pipe.closed:
                    pipe.write(b"ended\n")
                    pipe.close()

        try:
            yield silence
        finally:
            silence()
