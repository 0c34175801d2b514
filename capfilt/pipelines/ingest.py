"""The driver of an ingest: cut the lists into shards, have those fetched that are not there, account for every URL."""

from __future__ import annotations

import datetime
import logging
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from rich.console import Console

from capfilt.account import SUCCESS, Account
from capfilt.errors import CapfiltError, DatasetError, ErrorBudgetError
from capfilt.ingest import look_at_lists, unsettled
from capfilt.interrupts import interrupt, interruptible
from capfilt.lease import Lease
from capfilt.lists import ListFile
from capfilt.logs import event
from capfilt.pipelines.budget import SICK_ROWS
from capfilt.pipelines.fetch import Fetched, Task
from capfilt.pipelines.job import Failure
from capfilt.pipelines.processes import Executor, Outcome, in_processes, on_ray
from capfilt.pipelines.session import connected, surroundings
from capfilt.records import outcome_of
from capfilt.shard_store import Store
from capfilt.spec import IngestSpec
from capfilt.terminal import say
from capfilt.url_shards import Shard, ShardName, cut_lists, place

DEATHS = 2
"""Of processes, after which a shard is halved, until the row that kills them stands alone."""

MOST_DEATHS = 200
"""In a row, with no shard fetched between them: these are no row's fault."""

SAY_SECONDS = 10.0


@dataclass
class IngestSummary:
    """What a run did, and what the output holds.

    Attributes:
        lists: files of URLs.
        rows: URLs of the lists, of shards done before and in this run.
        account: of all of these.
        fetched: of those fetched in this run. fetched_shards, bytes: of these.
        kept_shards: that were there.
        stale: shards moved out of the way, for the list has their rows no longer.
        outcome: `done`, `interrupted`, or the error that ended the run.
        elapsed: seconds.
    """

    run: str
    output: str
    lists: int = 0
    rows: int = 0
    account: Account = field(default_factory=Account)
    fetched: Account = field(default_factory=Account)
    fetched_shards: int = 0
    bytes: int = 0
    kept_shards: int = 0
    stale: int = 0
    outcome: str = "running"
    elapsed: float = 0.0

    def record(self) -> dict[str, Any]:
        """As report.json has it."""
        accounts = {
            name: {"rows": one.rows, "statuses": one.statuses, "errors": dict(one.errors.most_common(100))}
            for name, one in (("all", self.account), ("this_run", self.fetched))
        }
        numbers = ("lists", "rows", "fetched_shards", "kept_shards", "stale", "bytes")
        return {
            **{name: getattr(self, name) for name in ("run", "output", "outcome", *numbers)},
            **accounts,
            "seconds": round(self.elapsed, 3),
        }


def ingest(spec: IngestSpec, *, execute: Executor | None = None, console: Console | None = None) -> IngestSummary:
    """Fetch the URLs that are not yet on record.

    Args:
        execute: how shards are fetched: in processes of this machine or on a Ray cluster, as `spec.ray` says, unless
            given.
        console: where progress is shown; standard error unless given.

    Raises:
        ConflictError: another run holds the output.
        ErrorBudgetError: more URLs failed than the spec allows; all are on record.
        InputError: a list cannot be used.
        SpecError: the output was made with other settings.
        KeyboardInterrupt: after which the same command goes on.
    """
    begin = time.monotonic()
    run = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}"
    console = console or Console(stderr=True)
    tell = partial(_tell, console)
    lease = Lease(spec.output, spec.output_options, run, spec.lease_seconds, tell, interrupt)
    lease.look()
    files = list(look_at_lists(spec))  # before anything is made: a mistyped path leaves nothing behind
    store = Store(spec.output, spec.output_options)
    store.check_settings(spec.settings)
    summary = IngestSummary(run, spec.output, len(files))
    clustered = execute is None and spec.ray.address != "local"
    with lease, interruptible():
        store.clear_attempts()
        store.write("settings.json", spec.settings)
        try:
            event("run_started", run=run, output=spec.output, lists=len(files))
            with connected(spec.ray) if clustered else nullcontext():
                driver = _Driver(spec, store, files, summary, tell)
                driver.run(execute or (on_ray if clustered else in_processes))
            summary.outcome = "done"
        except BaseException as error:
            summary.outcome = outcome_of(lease.cause(error))
            raise
        finally:
            summary.elapsed = time.monotonic() - begin
            record = summary.record()
            level = logging.INFO if summary.outcome == "done" else logging.ERROR
            event("run_ended", level, **record)
            store.write("report.json", {**record, "spec": spec.model_dump(mode="json"), **surroundings()})
    return summary


def _tell(console: Console, line: str) -> None:
    say(f"capfilt: {line}", console)


class _Driver:
    """One run.

    Attributes (of its own use):
        there: shards that the output has, by their accounts; None of one that is not readable.
        wanted: shards of the lists, as far as these are cut.
        again: tasks whose process died, or their halves.
    """

    def __init__(
        self, spec: IngestSpec, store: Store, files: list[ListFile], summary: IngestSummary, tell: Any
    ) -> None:
        self.spec, self.store, self.summary, self.tell = spec, store, summary, tell
        self.there = store.shards()
        self.wanted: set[ShardName] = set()
        self.again: deque[Task] = deque()
        self._deaths = 0
        self._unsettled = unsettled(self.there, spec.max_error_fraction)
        self._shards: Iterator[Shard] = cut_lists(spec, files, self.there, self.wanted)
        self._begin = self._last_line = time.monotonic()

    def run(self, execute: Executor) -> None:
        """Fetch all that is to be fetched, then see to it that all is there."""
        with closing(execute(self.spec, self._next)) as ended:
            for task, outcome in ended:
                self._end(task, outcome)
        self._prove()
        if self.summary.account.over(self.spec.max_error_fraction):
            raise ErrorBudgetError(self._over(self.summary.account))

    def _next(self) -> Task | None:
        if self.again:
            return self.again.popleft()
        for shard in self._shards:
            self.summary.rows += shard.name.rows
            account = self.there.get(shard.name)
            if account is None or shard.name in self._unsettled:
                return Task(shard)
            self.summary.account += account
            self.summary.kept_shards += 1
        return None

    def _end(self, task: Task, outcome: Outcome) -> None:
        if isinstance(outcome, Failure):
            raise outcome.error
        if outcome is None:
            self._died(task)
            return
        self._deaths = 0
        summary = self.summary
        summary.account += outcome.account
        summary.fetched += outcome.account
        summary.fetched_shards += 1
        summary.bytes += outcome.bytes
        self._say(outcome)
        share = max(0.5, self.spec.max_error_fraction)
        if summary.fetched.rows >= SICK_ROWS and summary.fetched.over(share):
            raise ErrorBudgetError(self._over(summary.fetched))

    def _died(self, task: Task) -> None:
        name, deaths = task.shard.name, task.deaths + 1
        event("process_died", logging.WARNING, run=self.summary.run, shard=str(name), deaths=deaths)
        self._deaths += 1
        if self._deaths == MOST_DEATHS:
            raise CapfiltError(
                f"{MOST_DEATHS} processes died one after the other, and none finished a shard: is there memory for so "
                "many, with so many threads (processes, download.thread_count)?"
            )
        if deaths < DEATHS:
            self.again.append(replace(task, deaths=deaths))
        elif task.fatal:
            raise DatasetError(f"{name}: processes die that only record it; is there memory, and room on the disk?")
        elif name.rows == 1:
            self.again.append(Task(task.shard, fatal=True))
        else:
            self.wanted.remove(name)
            for half in task.shard.halves():
                self.again.append(Task(place(half, self.wanted), deaths - 1))

    def _prove(self) -> None:
        """Make sure that the output accounts for every URL of the lists, by shards that are there and only these."""
        there = self.store.names()
        rows, summary = sum(name.rows for name in self.wanted), self.summary
        if missing := self.wanted - there:
            raise DatasetError(f"{summary.output}: {len(missing):,} shards are gone that were there; run again")
        if not summary.rows == rows == summary.account.rows:
            raise DatasetError(
                f"{summary.output}: {summary.rows:,} URLs in the lists, {rows:,} in the shards, "
                f"{summary.account.rows:,} accounted for; this is a bug of capfilt"
            )
        stale = there - self.wanted
        self.store.retire(stale)
        summary.stale = len(stale)

    def _over(self, account: Account) -> str:
        frequent = account.errors.most_common(5)
        common = ", ".join(f"{message} {count:,}" for message, count in frequent)
        refused = any("is not a public address" in message for message, _ in frequent)
        own = "; if these addresses are your own, set download.allow_private" if refused else ""
        return (
            f"{account.failed:,} of {account.rows:,} URLs have no image, {account.failed / account.rows:.1%}: over "
            f"max_error_fraction = {self.spec.max_error_fraction:.1%}. Most often: {common}. All is on record, and "
            f"counted in {self.summary.output}/_ingest/report.json. If "
            "the network was at fault, run again: shards over it are fetched anew; if the list is, raise it"
            f"{own}"
        )

    def _say(self, last: Fetched) -> None:
        got, now = self.summary.fetched, time.monotonic()
        event(
            "shard_fetched", run=self.summary.run, shard=str(last.name), **last.account.statuses, seconds=last.seconds
        )
        if now - self._last_line >= SAY_SECONDS:
            self._last_line = now
            pace = got.rows / (now - self._begin)
            self.tell(f"{got.rows:,} URLs  {pace:,.1f}/s  {got.statuses[SUCCESS] / got.rows:.1%} with an image")
