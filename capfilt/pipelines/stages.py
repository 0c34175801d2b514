"""Runs a graph of stages, each a spec in a process of its own, a few at a time; what is done is not done again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml
from rich.console import Console

from capfilt.errors import CapfiltError, ErrorBudgetError
from capfilt.pipelines.run_files import read_record, write_json
from capfilt.spec import RunSpec
from capfilt.terminal import say

_LOOK_SECONDS = 0.2
_STOP_SECONDS = 30.0
_TAIL_LINES = 15
_ASIDE_NICENESS = 10  # above our own, which may not be 0
_NICEST = 19


@dataclass(frozen=True)
class Stage:
    """A run within a run.

    Attributes:
        name: a relative path.
        make: its spec; called when all that it needs is done.
        needs: names of other stages.
        aside: no other stage is late for want of it. It takes what others leave of the cores.
    """

    name: str
    make: Callable[[], RunSpec]
    needs: tuple[str, ...] = ()
    aside: bool = False


class StageError(CapfiltError):
    """A stage failed."""


def run_stages(stages: Sequence[Stage], directory: Path, parallel: int, console: Console) -> dict[str, float]:
    """Run what is not done, the first in the list that can run first.

    Args:
        directory: for each stage's spec, log and, once it is done, outcome.
        parallel: stages at a time; half of them may be aside, or one.

    Returns:
        Seconds of each stage, in the attempt that finished it.

    Raises:
        StageError, ErrorBudgetError: a stage failed; the others are stopped, and resume when this is run again.
    """
    seconds: dict[str, float] = {}
    for stage in stages:
        if record := read_record(directory / f"{stage.name}.json"):
            seconds[stage.name] = record["seconds"]
    if seconds:
        _say(console, f"{len(seconds)} of {len(stages)} stages are done")
    threads = max(1, (os.cpu_count() or 1) // parallel)
    running: dict[str, _Running] = {}
    try:
        while len(seconds) < len(stages):
            for stage in to_begin(stages, seconds, [one.stage for one in running.values()], parallel):
                running[stage.name] = _Running(stage, directory, threads)
                _say(console, f"{stage.name}: begins")
            if not running:
                raise StageError(f"stages wait for each other: {[s.name for s in stages if s.name not in seconds]}")
            time.sleep(_LOOK_SECONDS)
            for name, one in list(running.items()):
                if one.ended():
                    del running[name]
                    seconds[name] = one.outcome()
                    _say(console, f"{name}: done in {seconds[name]:,.0f} s")
    finally:
        for one in running.values():
            one.stop()
        for one in running.values():
            one.wait()
    return seconds


def to_begin(stages: Sequence[Stage], done: Container[str], running: Sequence[Stage], parallel: int) -> list[Stage]:
    """The stages to begin now.

    Args:
        stages: the first that can begin does.
        done: names.
        parallel: as :func:`run_stages`'s.
    """
    now = list(running)
    for stage in stages:
        aside = sum(one.aside for one in now)
        if len(now) >= parallel:
            break
        if stage.name in done or stage in now or (stage.aside and aside >= max(1, parallel // 2)):
            continue
        if all(need in done for need in stage.needs):
            now.append(stage)
    return now[len(running) :]


def _say(console: Console, line: str) -> None:
    say(f"capfilt: {line}", console)


class _Running:
    """A stage's process. It ends when ours does: it holds the other end of a pipe."""

    def __init__(self, stage: Stage, directory: Path, threads: int) -> None:
        self.stage, self._outcome = stage, directory / f"{stage.name}.json"
        file = directory / f"{stage.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(stage.make().model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        self.log = directory / f"{stage.name}.log"
        self._begin = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "capfilt.stage", str(file)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={"OMP_NUM_THREADS": str(threads), **os.environ},
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
        if stage.aside:  # what it starts inherits it
            niceness = min(_NICEST, os.getpriority(os.PRIO_PROCESS, 0) + _ASIDE_NICENESS)
            os.setpriority(os.PRIO_PROCESS, self._process.pid, niceness)
        assert self._process.stdin is not None
        self._pipe: IO[bytes] = self._process.stdin

    def ended(self) -> bool:
        return self._process.poll() is not None

    def outcome(self) -> float:
        """Seconds that it took, recorded: the stage is done.

        Raises:
            StageError, ErrorBudgetError: it failed.
        """
        self._pipe.close()
        if code := self._process.returncode:
            tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
            kind = ErrorBudgetError if code == ErrorBudgetError.exit_code else StageError
            raise kind(f"{self.stage.name} failed with exit code {code}; {self.log} ends:\n" + "\n".join(tail))
        seconds = time.monotonic() - self._begin
        write_json(self._outcome, {"seconds": seconds})
        return seconds

    def stop(self) -> None:
        if not self.ended():
            self._process.terminate()

    def wait(self) -> None:
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pipe.close()
