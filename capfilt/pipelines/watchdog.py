"""An end for a worker that hangs in an image: its row is then isolated, as one that kills its worker is."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TICK = 1.0
_GRACE = 10
"""Ticks after which a process ends whose threads all wait for one that hangs: this one's, too, may be among them."""


class Watchdog:
    """Ends this process when one image has been decoded for too long.

    It counts its own ticks, which stop while the process does: neither a suspended machine nor a stopped process is a
    hang. A decoder that hangs and lets no other thread run is ended by the interpreter's own timer, which needs none.

    Args:
        seconds: that an image may take.
    """

    def __init__(self, seconds: float) -> None:
        self._ticks = max(1, round(seconds / _TICK))
        self._under_way: dict[object, tuple[str, int]] = {}
        self._armed = False  # the interpreter's timer
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """While an image is decoded, of the row that `what` names."""
        image = object()
        with self._lock:
            self._under_way[image] = what, 0
            if not self._armed:
                self._arm()
        try:
            yield
        finally:
            with self._lock:
                del self._under_way[image]

    def _watch(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(_TICK)
            with self._lock:
                self._under_way = {image: (what, age + 1) for image, (what, age) in self._under_way.items()}
                late = [what for what, age in self._under_way.values() if age > self._ticks]
                if self._under_way:
                    self._arm()
                elif self._armed:
                    faulthandler.cancel_dump_traceback_later()
                    self._armed = False
            if late:
                sys.stderr.write(f"capfilt: {late[0]}: its image took more than images.max_seconds; this worker ends\n")
                faulthandler.dump_traceback()
                os._exit(1)

    def _arm(self) -> None:
        faulthandler.dump_traceback_later((self._ticks + _GRACE) * _TICK, exit=True)
        self._armed = True
