"""Shards fetched in processes of this machine, or as tasks of a Ray cluster: one at a time in each.

A process that dies takes nobody else's work with it, and who it was that died is known: what multiprocessing's pool
(img2dataset's own) waits for in vain, and what a pool of futures blames on all that were at work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Generator
from multiprocessing import connection, get_context, parent_process
from typing import Any

from capfilt.errors import CapfiltError
from capfilt.pipelines.fetch import Fetched, Task, attempt, library
from capfilt.pipelines.job import Failure
from capfilt.spec import IngestSpec

Died = None
"""In place of an outcome: the process that had the task is dead."""

Outcome = Fetched | Failure | None

NextTask = Callable[[], Task | None]
"""The next task; None where there is none just now. Asked again whenever a task has ended."""

Executor = Callable[[IngestSpec, NextTask], Generator[tuple[Task, Outcome], None, None]]

_READY = "ready"

_SHARDS_A_PROCESS = 50
"""After which a new one takes its place: decoders leak."""


def in_processes(spec: IngestSpec, next_task: NextTask) -> Generator[tuple[Task, Outcome], None, None]:
    """Run tasks in `spec.processes` processes, as many as there are cores if not given."""
    slots = [_Slot(spec) for _ in range(spec.processes or len(os.sched_getaffinity(0)))]
    try:
        while True:
            for slot in slots:
                if slot.task is None and (task := next_task()) is not None:
                    slot.give(task)
            busy = [slot for slot in slots if slot.task is not None]
            if not busy:
                return
            ready = connection.wait([waited for slot in busy for waited in slot.waited])
            for slot in busy:
                if any(waited in ready for waited in slot.waited) and (ended := slot.take()) is not None:
                    yield ended
    finally:
        for slot in slots:
            slot.end()


class _Slot:
    """A process, begun when there is something for it to do, and anew where it died."""

    def __init__(self, spec: IngestSpec) -> None:
        self._spec = spec
        self._process: Any = None
        self._pipe: Any = None
        self._given = 0
        self._ready = False
        self.task: Task | None = None

    @property
    def waited(self) -> tuple[Any, int]:
        """What shows that its task has ended, and that it has itself."""
        return self._pipe, self._process.sentinel

    def give(self, task: Task) -> None:
        if self._given == _SHARDS_A_PROCESS:
            self.end()
        if self._process is None:
            self._begin()
        self.task = task
        self._given += 1
        if self._ready:
            self._send()

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # it died idle: its sentinel says so
            self._pipe.send(self.task)

    def take(self) -> tuple[Task, Outcome] | None:
        """What became of its task; None where the process has but begun.

        Raises:
            CapfiltError: it ended before it could begin, which is no row's fault.
        """
        try:
            said = self._pipe.recv() if self._pipe.poll() else Died
        except (EOFError, OSError):
            said = Died
        if said == _READY:
            self._ready = True
            self._send()  # not before: a pipe takes little while nobody reads, and others are to be begun
            return None
        if said is Died and not self._ready:
            self._process.join()
            raise CapfiltError(
                f"a process that was to fetch ended before it began, with exit code {self._process.exitcode}: is there "
                "memory for so many (processes)? Does `python -c 'import img2dataset'` work?"
            )
        task, self.task = self.task, None
        assert task is not None
        if said is Died:
            self.end()
        return task, said

    def _begin(self) -> None:
        context = get_context("spawn")  # img2dataset has threads, which do not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._spec), daemon=True)
        self._process.start()
        theirs.close()
        self._given, self._ready = 0, False

    def end(self) -> None:
        """Kill it: what it was at is left undone."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._pipe.close()
        self._process = self._pipe = self.task = None


def _serve(pipe: Any, spec: IngestSpec) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the driver decides
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    os.dup2(2, 1)  # img2dataset prints
    try:
        library()
    except CapfiltError as error:
        pipe.send(Failure(error))
        return
    pipe.send(_READY)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(spec, task))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def on_ray(spec: IngestSpec, next_task: NextTask) -> Generator[tuple[Task, Outcome], None, None]:
    """Run tasks on the connected Ray, as img2dataset's Ray distributor does, a CPU each; but a window of them at a
    time, and none lost: that one hands Ray all at once, and does not look at how they end."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    remote = ray.remote(num_cpus=1, max_retries=0)(attempt)
    shared = ray.put(spec)
    running: dict[Any, Task] = {}
    try:
        while True:
            most = spec.processes or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
            while len(running) < most and (task := next_task()) is not None:
                running[remote.remote(shared, task)] = task
            if not running:
                return
            ready, _ = ray.wait(list(running), num_returns=1)
            for reference in ready:
                task = running.pop(reference)
                try:
                    outcome: Outcome = ray.get(reference)
                except RayTaskError as error:
                    raise CapfiltError(
                        f"a Ray worker failed on {task.shard.name}: {error}\nWhat was fetched is kept; run again to "
                        "resume"
                    ) from error
                except RayError:  # its process or node died
                    outcome = Died
                yield task, outcome
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
