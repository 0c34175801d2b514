"""One progress display: a live line on a terminal, a plain line now and then without one."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import asdict
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from capfilt.dataset import Counts
from capfilt.logs import event
from capfilt.pipelines.watching import Watcher
from capfilt.receipts import Receipt
from capfilt.terminal import say

_WINDOW_SECONDS = 60.0


class Display(Watcher):
    """Shows rows, images/s over the last minute, kept and error fractions, actors and time left.

    Args:
        console: where to; its `is_terminal` chooses the form.
        most_actors: the pool's bound, to size the window in which a worker counts as alive.
        plain_seconds: between two plain lines.
        silent_seconds: without a finished fragment, after which a plain line says so.
        run: named in the events that go with the plain lines.
    """

    def __init__(
        self,
        console: Console,
        most_actors: int,
        plain_seconds: float = 10.0,
        silent_seconds: float = 120.0,
        run: str = "",
    ) -> None:
        self._run = run
        self._plain_seconds, self._silent_seconds = plain_seconds, silent_seconds
        self._console = console
        self._counts = Counts()
        self._total = 0
        self._begin = time.monotonic()
        self._history: deque[tuple[float, int]] = deque([(self._begin, 0)])
        self._workers: deque[str] = deque(maxlen=2 * most_actors)
        self._last_line = self._begin
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._say_when_silent, name="silence", daemon=True)
        self._live: Progress | None = None
        if console.is_terminal:
            self._live = Progress(
                TextColumn("curate"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[line]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._live.add_task("curate", total=None, line="starting Ray")

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        else:
            self._say("starting Ray")
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._live:
            self._live.stop()
        else:
            self._watch.join()

    def expect(self, rows: int) -> None:
        """Rows the run is known or estimated to have."""
        self._total = rows

    def adopt(self, receipt: Receipt) -> None:
        """Count a fragment that an earlier run finished; it tells nothing of this run's speed."""
        self._counts += receipt.counts
        self._history = deque((then, rows + receipt.counts.rows) for then, rows in self._history)

    def update(self, receipt: Receipt) -> None:
        """Count one finished fragment."""
        now = time.monotonic()
        self._counts += receipt.counts
        if receipt.worker:
            self._workers.append(receipt.worker)
        self._history.append((now, self._counts.rows))
        while len(self._history) > 2 and self._history[1][0] < now - _WINDOW_SECONDS:
            self._history.popleft()
        if self._live:
            total = max(self._total, self._counts.rows)
            self._live.update(self._task, total=total, completed=self._counts.rows, line=self.line())
        elif now - self._last_line >= self._plain_seconds:
            self._last_line = now
            self._say(f"{self.line()}{self._left()}")
            counts = {"rows": self._counts.rows, "of": max(self._total, self._counts.rows), **asdict(self._counts)}
            event(
                "progress",
                run=self._run,
                **counts,
                images_per_second=round(self._rate(), 2),
                actors=len(set(self._workers)),
            )

    def _say(self, line: str) -> None:
        say(f"capfilt: {line}", self._console)

    def _say_when_silent(self) -> None:
        """A cluster may be waiting for machines; a log without lines looks like a hang."""
        while not self._ended.wait(self._silent_seconds):
            silent = time.monotonic() - self._history[-1][0]
            if silent >= self._silent_seconds:
                self._say(f"no fragment has finished for {silent:,.0f} s; {self.line()}")
                event("silence", logging.WARNING, run=self._run, rows=self._counts.rows, seconds=round(silent))

    def line(self) -> str:
        """The state in one line."""
        rows = max(1, self._counts.rows)
        of = f" of {self._total:,}" if self._total > self._counts.rows else ""
        return (
            f"{self._counts.rows:,}{of} rows  {self._rate():,.1f} images/s  kept {self._counts.kept / rows:.1%}  "
            f"errors {self._counts.errors / rows:.2%}  actors {len(set(self._workers))}"
        )

    def _rate(self) -> float:
        (then, rows_then), (now, rows_now) = self._history[0], self._history[-1]
        return (rows_now - rows_then) / max(now - then, 1e-3)

    def _left(self) -> str:
        if self._total <= self._counts.rows or not self._rate():
            return ""
        minutes, seconds = divmod(int((self._total - self._counts.rows) / self._rate()), 60)
        return f"  left {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
