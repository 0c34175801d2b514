"""Memory that a network on a processor works in: kept from one layer to the next."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h's M_ names
_NEVER = -1
_AT_A_TIME = 64 * 2**20


def keep_freed_memory() -> None:
    """Have this process keep what it frees, to use it again; for good.

    glibc gives large blocks back to the system when they are freed and asks for them anew: the system then clears every
    page of every layer's activations. The process stays as large as it once had to be. With another C library nothing
    happens.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _AT_A_TIME)):
            mallopt(option, value)
