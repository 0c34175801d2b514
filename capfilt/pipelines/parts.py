"""The parts of an evaluation: how long each takes, and how far it has come."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from capfilt.terminal import say

SAY_SECONDS = 20.0
"""Between two lines on how far a part has come."""


class Parts:
    """Times what is done, and says so.

    Attributes:
        seconds: by part.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str, what: str) -> Iterator[Callable[[str], None]]:
        """Yields what says how far the part has come, not too often."""
        begin = last = time.perf_counter()

        def told(progress: str) -> None:
            nonlocal last
            if time.perf_counter() - last > SAY_SECONDS:
                last = time.perf_counter()
                say(f"{name}: {progress}", self._console)

        say(f"{name}: {what}", self._console)
        try:
            yield told
        finally:
            self.seconds[name] += time.perf_counter() - begin
