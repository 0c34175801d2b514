"""Which work died, and how often.

Ray restarts a dead actor and runs its task again, for ever if a row kills it every time. So a worker says what it
begins and what it ends; what began and never ended has died. The worker decides from that when to split (see
Worker.process).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class _Work:
    deaths_and_running: int = 0
    result: bytes | None = None
    lost_rows: int = 0
    parts: set[str] = field(default_factory=set)


class Attempts:
    """The ledger. One per run, in one process (the driver's, or a Ray actor beside it); calls are short."""

    def __init__(self) -> None:
        self._work: dict[str, _Work] = {}
        self._loads = self._loaded = 0

    def load_begins(self) -> int:
        """A worker begins to load the models; how many began since one last succeeded, this one included."""
        self._loads += 1
        return self._loads

    def load_ended(self) -> None:
        """A worker has loaded the models."""
        self._loads = 0
        self._loaded += 1

    def loaded(self) -> int:
        """How often a worker has loaded the models."""
        return self._loaded

    def state(self, name: str) -> tuple[int, bytes | None]:
        """How often `name` was begun without an end, and its result if it has ended."""
        work = self._work.get(name)
        return (work.deaths_and_running, work.result) if work else (0, None)

    def begin(self, name: str) -> None:
        """Work on `name` begins."""
        self._work.setdefault(name, _Work()).deaths_and_running += 1

    def end(self, name: str, result: bytes, whole: str) -> None:
        """Work on `name`, a part of `whole` or `whole` itself, ended with `result`.

        The result is kept where work died before, for the retry that asks again; a smooth end leaves nothing behind.
        """
        if name == whole:
            work = self._work.pop(name, _Work())
            for part in work.parts:
                self._work.pop(part, None)
            if work.deaths_and_running > 1 or work.parts:
                self._work[name] = _Work(work.deaths_and_running, result)
        else:
            self._work.setdefault(whole, _Work()).parts.add(name)
            self._work.setdefault(name, _Work()).result = result

    def lose(self, whole: str, rows: int) -> None:
        """`rows` more rows of `whole` are recorded as killers of their worker."""
        self._work.setdefault(whole, _Work()).lost_rows += rows

    def lost(self, whole: str) -> int:
        """Rows of `whole` recorded so."""
        work = self._work.get(whole)
        return work.lost_rows if work else 0
