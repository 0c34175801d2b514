"""`capfilt run` as a user starts it, watched from outside and killed at chosen moments."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from capfilt.dataset import DIRECTORIES
from capfilt.receipts import RECEIPTS

_MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
from capfilt.cli import main
main()
"""
CAPFILT = [sys.executable, "-c", _MAIN]

STUCK_SECONDS = 180
"""A driver that shows no progress for so long hangs. A start takes 10 to 15 s on an idle machine of two cores."""

WORKER = "ray::MapWorker"
LEDGER = "ray::Attempts"
TASK = "ray::_redecide"

Victim = Literal["driver", "actor", "both", "ledger", "worker"]
Moment = Literal["create", "start", "load", "work", "commit", "vacuum"]


class Seen(NamedTuple):
    """What stands on disk: receipts, versions of each table, runs marked closed."""

    receipts: int
    annotations: int
    pairs: int
    quarantine: int
    closed: int


@dataclass(frozen=True)
class Strike:
    """Whom to kill, and when. A `worker` is an actor, or whoever does a task.

    Attributes:
        moment: `create` is when the output appears, `start` a share of the usual start-up time, `load` when an actor
            has just begun, `work` when so many more fragments are finished, `commit` when the annotations' log gets an
            entry, `vacuum` when runs are marked closed.
        amount: in [0, 1): the share of the start-up time, or how many fragments.
        delay: seconds from the moment to the kill.
        pause: seconds between the actor's death and the driver's, where both are killed.
    """

    victim: Victim
    moment: Moment
    amount: float
    delay: float
    pause: float


def deck(rng: random.Random, counts: dict[tuple[Victim, Moment], int]) -> list[Strike]:
    """Shuffled strikes, so many of each kind."""
    longest = {"create": 0.15, "start": 0.0, "load": 6.0, "work": 0.5, "commit": 0.03, "vacuum": 0.03}
    strikes = [
        Strike(victim, moment, rng.random(), rng.random() * longest[moment], rng.random() * 8)
        for (victim, moment), count in counts.items()
        for _ in range(count)
    ]
    rng.shuffle(strikes)
    return strikes


def names(folder: Path) -> list[str]:
    """Entries of a folder; none if it does not exist."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def count_names(folder: Path, suffix: str = "") -> int:
    """How many of them end so."""
    return sum(name.endswith(suffix) for name in names(folder))


def seen(output: Path) -> Seen:
    """Look at an output."""
    receipts = output / RECEIPTS
    annotations, pairs, quarantine = (
        count_names(output / table / "_delta_log", ".json") for table in DIRECTORIES.values()
    )
    finished = sum(count_names(receipts / shard, ".json") for shard in names(receipts))
    return Seen(finished, annotations, pairs, quarantine, count_names(output / "_runs" / "closed"))


class HangError(AssertionError):
    """A driver that shows no progress any more."""


class Driver:
    """One `capfilt run`, in a session of its own.

    Its working directory is used by nothing else, which is how its Ray's processes are known. As a context, it is
    killed at the end if it still runs; call :meth:`reap` for the processes that it leaves behind.

    Args:
        environment: in place of this process's own; for one that joins a cluster.
    """

    def __init__(
        self,
        spec: Path,
        output: Path,
        home: Path,
        overrides: Sequence[str],
        ray_folder: Path,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.output, self.home = output, home
        home.mkdir(parents=True)
        settings = [f"--set={setting}" for setting in (f"output={output}", *overrides)]
        environment = {**environment, "RAY_TMPDIR": str(ray_folder), "PYTHONFAULTHANDLER": "1", "COLUMNS": "120"}
        self.began = time.monotonic()
        self.first_seen = self._last_seen = seen(output)
        self._last_change = self.began
        with (home / "stdout").open("wb") as out, (home / "stderr").open("wb") as err:
            self.process = subprocess.Popen(
                [*CAPFILT, "run", str(spec), *settings],
                cwd=home,
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # --- watching ---

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.began

    def until(self, happened: Callable[[], bool], poll: float = 0.02) -> bool:
        """Wait for something; False if the driver ends first.

        Raises:
            HangError: nothing moves. The driver's stacks are in the message.
        """
        next_look = time.monotonic() + 0.5
        while not happened():
            if self.process.poll() is not None:
                return False
            if (now := time.monotonic()) >= next_look:
                next_look = now + 0.5
                self._check_alive(now)
            time.sleep(poll)
        return True

    def _check_alive(self, now: float) -> None:
        if (state := seen(self.output)) != self._last_seen:
            self._last_seen, self._last_change = state, now
        if now - self._last_change > STUCK_SECONDS:
            workers = [(p.pid, p.status(), p.cmdline()[0]) for p in self.family()]
            self.process.send_signal(signal.SIGABRT)  # faulthandler prints every thread's stack
            self.process.wait(30)
            raise HangError(f"no progress for {STUCK_SECONDS} s at {state}; processes {workers}\n{self.stderr()}")

    def wait(self) -> int:
        """Wait for the end. Its exit code."""
        self.until(lambda: False)
        return self.process.wait()

    def stderr(self) -> str:
        """What it has printed on standard error."""
        return (self.home / "stderr").read_text(errors="replace")

    def stdout(self) -> str:
        """What it has printed on standard output."""
        return (self.home / "stdout").read_text(errors="replace")

    # --- its processes ---

    def family(self) -> list[psutil.Process]:
        """Its living processes, its own and its Ray's, orphans included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def actors(self, title: str = WORKER) -> list[psutil.Process]:
        """Its living Ray actors of a kind."""
        found = []
        for process in self.family():
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return sorted(found, key=lambda process: process.pid)

    # --- killing ---

    def kill(self) -> None:
        """SIGKILL to the driver alone: its Ray does not hear of it at once."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def await_moment(self, strike: Strike, startup: float) -> bool:
        """Wait for the strike's moment and its delay; False if the driver ends first."""
        start = seen(self.output)
        log = self.output / "annotations" / "_delta_log"
        closed = self.output / "_runs" / "closed"
        entries = count_names(log)
        at = self.began + strike.amount * startup
        fragments = 1 + int(strike.amount * 8)
        happened: dict[Moment, Callable[[], bool]] = {
            "create": self.output.exists,
            "start": lambda: time.monotonic() >= at,
            "load": lambda: bool(self.actors()),
            "work": lambda: seen(self.output).receipts >= start.receipts + fragments,
            "commit": lambda: count_names(log) > entries,
            "vacuum": lambda: count_names(closed) > start.closed,
        }
        instant = strike.moment in ("create", "commit", "vacuum")
        if not self.until(happened[strike.moment], 0.001 if instant else 0.02):
            return False
        end = time.monotonic() + strike.delay
        return self.until(lambda: time.monotonic() >= end, 0.001)

    def strike(self, strike: Strike) -> Victim | None:
        """Kill. Who was killed indeed: an actor may have gone by itself, the driver may end before its turn."""
        hit = False
        if strike.victim != "driver":
            actors = self.actors(LEDGER if strike.victim == "ledger" else WORKER)
            if strike.victim == "worker":
                actors += self.actors(TASK)
            if actors:
                actors[int(strike.amount * 1000) % len(actors)].kill()
                hit = True
        if strike.victim == "both":
            end = time.monotonic() + strike.pause
            self.until(lambda: time.monotonic() >= end)
        if strike.victim in ("driver", "both") and self.process.poll() is None:
            self.kill()
            return "both" if hit else "driver"
        kinds: dict[Victim, Victim] = {"ledger": "ledger", "worker": "worker"}
        return kinds.get(strike.victim, "actor") if hit else None

    def reap(self, patience: float = 60) -> None:
        """Wait for the workers of a dead driver to end by themselves, and end what else its Ray left, by process id.

        Raises:
            AssertionError: a worker lives on.
        """
        end = time.monotonic() + patience
        while (left := self.actors()) and time.monotonic() < end:
            time.sleep(0.1)
        rest = self.family()
        for process in rest:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(rest, 10)
        assert not left, f"{len(left)} workers live {patience} s after their driver's death"
