"""Progress of a training run, read from its log as the workers write it, wherever they are."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from capfilt.pipelines.waiting import Waiting
from capfilt.terminal import say

_LOSSES = ("itc", "itm", "lm")


class TrainingDisplay:
    """Shows what is waited for, then steps, losses and samples/s: live on a terminal, else in a line now and then.

    Args:
        console: where to; its `is_terminal` chooses the form.
        output: of the run.
        begun: steps done before; what the log says of them is not shown.
        total: steps of the run.
        plain_seconds: between two plain lines.
    """

    def __init__(self, console: Console, output: Path, begun: int, total: int, plain_seconds: float = 30.0) -> None:
        self._console, self._file, self._total = console, output / "metrics.jsonl", total
        self._seconds = 1.0 if console.is_terminal else plain_seconds
        self._shown, self._read, self._inode = begun, 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="training progress", daemon=True)
        self._live: Progress | None = None
        self._waiting = Waiting(lambda line: None if self._live else say(f"capfilt: {line}", console))
        if console.is_terminal:
            self._live = Progress(
                TextColumn("train"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[line]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._live.add_task("train", total=total, line="")

    def __enter__(self) -> TrainingDisplay:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._show()
        if self._live:
            self._live.stop()

    def waits(self, what: str) -> None:
        """Training begins when this is done."""
        self._waiting.begin(what)

    def _follow(self) -> None:
        shown = time.monotonic()
        while not self._ended.wait(min(1.0, self._seconds)):
            self._waiting.remind()
            if self._live and (waiting := str(self._waiting)):
                self._live.update(self._task, line=waiting)
            if time.monotonic() - shown >= self._seconds:
                shown = time.monotonic()
                self._show()

    def _show(self) -> None:
        lines = self.news()
        for line in lines:
            if "warning" in line:
                say(f"capfilt: {line['warning']}", self._console)
        steps = [line for line in lines if "warning" not in line]
        if not steps:
            return
        self._waiting.end()
        said = describe(steps)
        if self._live:
            self._live.update(self._task, completed=steps[-1]["step"], line=said)
        else:
            step = f"step {steps[-1]['step']:,} of {self._total:,}"
            say(f"capfilt: {step}  {said}", self._console)

    def news(self) -> list[dict[str, Any]]:
        """Whole lines since the last look, of steps not shown yet. Workers that begin anew write another file."""
        try:
            with self._file.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._read, self._inode = 0, inode
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        lines = [line for line in map(json.loads, whole.splitlines()) if line["step"] > self._shown]
        self._shown = max((line["step"] for line in lines), default=self._shown)
        return lines


def describe(steps: list[dict[str, Any]]) -> str:
    """Mean losses and speed of some steps, in one line."""
    parts = []
    for name in (*_LOSSES, "samples_per_s"):
        values = [step[name] for step in steps if step.get(name) is not None]
        if values:
            mean = sum(values) / len(values)
            parts.append(f"{mean:,.0f} samples/s" if name == "samples_per_s" else f"{name} {mean:.3f}")
    return "  ".join(parts)
