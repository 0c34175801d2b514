"""Those who are told what a run's driver sees: the display, the metrics, the log."""

from __future__ import annotations

import logging
from dataclasses import asdict

from capfilt.dataset import ShardCommit
from capfilt.logs import event
from capfilt.receipts import Receipt
from capfilt.schema import Reason


class Watcher:
    """Told of a run as it goes; does nothing with what it does not care for."""

    def waits(self, what: str) -> None:
        """No fragment can be finished before this is: Ray's start, or that of the models."""

    def expect(self, rows: int) -> None:
        """Rows the run is known or estimated to have."""

    def adopt(self, receipt: Receipt) -> None:
        """A fragment that an earlier run finished was taken over."""

    def update(self, receipt: Receipt) -> None:
        """A fragment is finished."""

    def failed(self, shard: str, message: str, /) -> None:
        """A file cannot be curated."""

    def committed(self, shards: list[ShardCommit], seconds: float, /) -> None:
        """Whole shards are part of the dataset; the commit took so long."""


class Watchers(Watcher):
    """Several, told one after the other."""

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers

    def waits(self, what: str) -> None:
        """See Watcher."""
        for one in self._watchers:
            one.waits(what)

    def expect(self, rows: int) -> None:
        """See Watcher."""
        for one in self._watchers:
            one.expect(rows)

    def adopt(self, receipt: Receipt) -> None:
        """See Watcher."""
        for one in self._watchers:
            one.adopt(receipt)

    def update(self, receipt: Receipt) -> None:
        """See Watcher."""
        for one in self._watchers:
            one.update(receipt)

    def failed(self, shard: str, message: str, /) -> None:
        """See Watcher."""
        for one in self._watchers:
            one.failed(shard, message)

    def committed(self, shards: list[ShardCommit], seconds: float, /) -> None:
        """See Watcher."""
        for one in self._watchers:
            one.committed(shards, seconds)


class EventLog(Watcher):
    """Logs a run's fragments, shards and failures as events. What went wrong in a worker is in them."""

    def __init__(self, run: str) -> None:
        self._run = run

    def waits(self, what: str) -> None:
        """What the run is at before its work."""
        event("waiting", run=self._run, what=what)

    def adopt(self, receipt: Receipt) -> None:
        """One that an earlier run finished."""
        self._fragment("fragment_taken_over", receipt)

    def update(self, receipt: Receipt) -> None:
        """One that a worker finished; and rows of it that killed theirs."""
        self._fragment("fragment_finished", receipt)
        if died := receipt.reasons.get(Reason.WORKER_DIED):
            event("rows_killed_worker", logging.WARNING, run=self._run, shard=receipt.shard, rows=died)

    def _fragment(self, name: str, receipt: Receipt) -> None:
        where = {"run": self._run, "shard": receipt.shard, "start": receipt.start, "stop": receipt.stop}
        event(name, logging.DEBUG, **where, worker=receipt.worker, stages=receipt.seconds, **asdict(receipt.counts))

    def failed(self, shard: str, message: str, /) -> None:
        """A file that is left for another run."""
        event("shard_failed", logging.WARNING, run=self._run, shard=shard, error=message)

    def committed(self, shards: list[ShardCommit], seconds: float, /) -> None:
        """An event for each shard; `seconds` is of the commit they share."""
        for one in shards:
            counts = asdict(one.counts)
            event("shard_committed", run=self._run, shard=one.shard, rows=one.rows, **counts, seconds=round(seconds, 3))
