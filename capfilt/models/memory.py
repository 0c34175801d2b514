"""Memory that a network on a processor works in: kept from one layer to the next, in large pages."""

from __future__ import annotations

import ctypes
import logging
import mmap
import platform
from functools import cache
from pathlib import Path

_log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h's M_ names
_NEVER = -1
_AT_A_TIME = 64 * 2**20

_RESERVE = 8 * 2**30
"""Addresses asked for in large pages; memory is taken as it is written to. More than a large model works in."""


@cache
def keep_freed_memory() -> None:
    """Have this process keep what it frees, to use it again, and take it in large pages; for good.

    glibc gives large blocks back to the system when they are freed and asks for them anew: the system then clears every
    page of every layer's activations. The process stays as large as it once had to be. And in pages of 4 KiB a
    processor keeps looking up where they are, in a virtual machine twice: large ones make whole networks faster. With
    another C library nothing happens; where the system has no large pages for those who ask, memory is but kept.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _AT_A_TIME)):
        libc.mallopt(option, value)
    if not _counts_addresses():
        _grow_in_large_pages(libc)


def _counts_addresses() -> bool:
    """Whether the system counts what is asked for as taken: an administrator can have it so."""
    setting = Path("/proc/sys/vm/overcommit_memory")
    return not setting.exists() or setting.read_text().strip() == "2"


def _grow_in_large_pages(libc: ctypes.CDLL) -> None:
    """Let malloc's memory grow by the reserve at once, and ask for large pages in it."""
    libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
    libc.sbrk.argtypes = [ctypes.c_ssize_t]
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.sbrk(0)
    libc.free(libc.malloc(_RESERVE))  # nothing is written, so nothing is taken
    start += -start % mmap.PAGESIZE
    grown = libc.sbrk(0) - start
    if grown < _RESERVE or libc.madvise(start, grown, mmap.MADV_HUGEPAGE):
        _log.info("no large pages for the models' memory here: computing is slower")
