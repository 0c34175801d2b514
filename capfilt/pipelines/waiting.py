"""What a run waits for before its work begins: nobody is to wonder whether it hangs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_SAID_AFTER = 2.0
_SAID_AGAIN_AFTER = 15.0


@dataclass
class _Wait:
    what: str
    since: float
    due: float


class Waiting:
    """What is waited for, and for how long.

    Args:
        say: takes a line now and then: the first at once, a later one once it has lasted; each again at 15 s, 30 s, a
            minute, and so on.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._now: _Wait | None = None
        self._any = False

    def begin(self, what: str) -> None:
        """Wait for this, and no longer for what was before."""
        now = time.monotonic()
        self._now = _Wait(what, now, now + (_SAID_AFTER if self._any else 0))
        self._any = True
        self.remind()

    def end(self) -> None:
        """Nothing is waited for."""
        self._now = None

    def __str__(self) -> str:
        """Empty where nothing is waited for."""
        if (wait := self._now) is None:
            return ""
        seconds = int(time.monotonic() - wait.since)
        return f"{wait.what} ({seconds:,} s)" if seconds else wait.what

    def remind(self) -> None:
        """Say it if it is due."""
        wait, now = self._now, time.monotonic()
        if wait is not None and now >= wait.due:
            wait.due = max(wait.since + _SAID_AGAIN_AFTER, now + (now - wait.since))
            self._say(str(self))
