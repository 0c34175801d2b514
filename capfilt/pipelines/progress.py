"""One progress display: a live line on a terminal, a plain line now and then without one."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import asdict
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from capfilt.dataset import Counts
from capfilt.logs import event
from capfilt.pipelines.waiting import Waiting
from capfilt.pipelines.watching import Watcher
from capfilt.receipts import Receipt
from capfilt.terminal import say

_WINDOW_SECONDS = 60.0

_LEAST_SECONDS, _STEADY_SECONDS = 1.0, 5.0
"""Of work since the first fragment was finished, after which a pace is told, and the time left."""


class Display(Watcher):
    """Shows what is waited for; then rows, images/s over the last minute, kept and error fractions, actors, time left.

    The pace is that since the first fragment was finished: what came before was start-up. Of each worker the first
    fragment is no part of it, for most of its time lies before.

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
        self._history: deque[tuple[float, int]] = deque()  # when, and rows by then; since the first was finished
        self._known: set[str] = set()  # workers that have finished a fragment
        self._workers: deque[str] = deque(maxlen=2 * most_actors)
        self._last_line = self._last_news = time.monotonic()
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._live: Progress | None = None
        self._waiting = Waiting(self._say if not console.is_terminal else lambda _: None)
        if console.is_terminal:
            columns = TextColumn("curate"), BarColumn(bar_width=24), TextColumn("{task.fields[line]}")
            self._live = Progress(*columns, console=console)
            self._task = self._live.add_task("curate", total=None, line="")

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._watch.join()
        if self._live:
            self._live.stop()

    def waits(self, what: str) -> None:
        """Work begins, or begins anew, when this is done."""
        self._history.clear()
        self._known.clear()
        self._waiting.begin(what)
        self._show()

    def expect(self, rows: int) -> None:
        """Rows the run is known or estimated to have."""
        self._total = rows

    def adopt(self, receipt: Receipt) -> None:
        """Count a fragment that an earlier run finished; it tells nothing of this run's speed."""
        self._counts += receipt.counts
        self._shift(receipt.counts.rows)

    def _shift(self, rows: int) -> None:
        """Take rows out of the pace."""
        self._history = deque((then, rows_then + rows) for then, rows_then in self._history)

    def update(self, receipt: Receipt) -> None:
        """Count one finished fragment."""
        now = time.monotonic()
        self._waiting.end()
        self._last_news = now
        self._counts += receipt.counts
        if receipt.worker:
            self._workers.append(receipt.worker)
            if receipt.worker not in self._known:
                self._known.add(receipt.worker)
                self._shift(receipt.counts.rows)
        self._history.append((now, self._counts.rows))
        while len(self._history) > 2 and self._history[1][0] < now - _WINDOW_SECONDS:
            self._history.popleft()
        self._show()
        if not self._live and now - self._last_line >= self._plain_seconds:
            self._last_line = now
            self._say(self.line())
            counts = {"rows": self._counts.rows, "of": max(self._total, self._counts.rows), **asdict(self._counts)}
            event(
                "progress",
                run=self._run,
                **counts,
                images_per_second=round(self._rate(), 2),
                actors=len(set(self._workers)),
            )

    def _show(self) -> None:
        """On a terminal."""
        if self._live:
            total = max(self._total, self._counts.rows) or None
            self._live.update(self._task, total=total, completed=self._counts.rows, line=self.line())

    def _say(self, line: str) -> None:
        say(f"capfilt: {line}", self._console)

    def _follow(self) -> None:
        """Show how time goes by. A cluster may be waiting for machines; a log without lines looks like a hang."""
        told = time.monotonic()
        while not self._ended.wait(min(1.0, self._silent_seconds)):
            now = time.monotonic()
            silent = now - self._last_news
            if self._live:
                self._show()
            elif silent >= self._silent_seconds and now - told >= self._silent_seconds:
                told = now
                self._say(f"no fragment has finished for {silent:,.0f} s; {self.line()}")
                event("silence", logging.WARNING, run=self._run, rows=self._counts.rows, seconds=round(silent))
            elif silent < self._silent_seconds:
                self._waiting.remind()

    def line(self) -> str:
        """The state in one line."""
        waiting = str(self._waiting)
        if not self._counts.rows:
            return waiting or "no rows yet"
        rows = self._counts.rows
        of = f" of {self._total:,}" if self._total > rows else ""
        rate = self._rate()
        parts = (
            f"{rows:,}{of} rows",
            f"{rate:,.1f} images/s" if rate else "",
            f"kept {self._counts.kept / rows:.1%}",
            f"errors {self._counts.errors / rows:.2%}",
            f"actors {len(set(self._workers))}",
            waiting or self._left(),
        )
        return "  ".join(filter(None, parts))

    def _rate(self) -> float:
        """Rows/s; 0 where nothing is known of it."""
        history = tuple(self._history)  # another thread may ask
        if len(history) < 2:
            return 0.0
        (then, rows_then), (now, rows_now) = history[0], history[-1]
        return (rows_now - rows_then) / (now - then) if now - then >= _LEAST_SECONDS else 0.0

    def _left(self) -> str:
        rate, history = self._rate(), tuple(self._history)
        if self._total <= self._counts.rows or not rate or history[-1][0] - history[0][0] < _STEADY_SECONDS:
            return ""
        since = time.monotonic() - history[-1][0]  # the last fragment: part of the next is done
        left = max(0, int((self._total - self._counts.rows) / rate - since))
        minutes, seconds = divmod(left, 60)
        return f"left {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
