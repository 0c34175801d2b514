"""The driver of a curation run: plan, spread fragments over workers, take receipts, commit whole shards.

Ray Data schedules fragments, not rows: the dataset is a list of fragment descriptors, each its own block, and the actor
that holds the models does everything else. Image bytes never cross the object store. Only this driver commits.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import math
import pickle
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from rich.console import Console

from capfilt.dataset import Counts, CuratedDataset, Provenance, ShardCommit, ShardFiles
from capfilt.duplicates import Found
from capfilt.errors import CapfiltError, ConflictError, DatasetError, ErrorBudgetError, InputError
from capfilt.fingerprints import (
    Fingerprints,
    files_seen,
    run_fingerprints,
    with_withdrawn,
    without_copies,
    without_withdrawn,
)
from capfilt.fragments import Footer, Fragment, cut, read_footer
from capfilt.inputs import InputFile
from capfilt.interrupts import interrupt, interruptible, uninterrupted
from capfilt.lease import Lease
from capfilt.logs import event
from capfilt.pace import Pace
from capfilt.pipelines.budget import ErrorBudget
from capfilt.pipelines.job import Failure, Job, LoadModels, load_models
from capfilt.pipelines.leave_report import leave_report
from capfilt.pipelines.metrics import DriverMetrics
from capfilt.pipelines.progress import Display
from capfilt.pipelines.redecide import Redecision, redecide, redecisions
from capfilt.pipelines.session import connected, connecting, lacking, quiet, surroundings
from capfilt.pipelines.settle import look_for_copies, unsettled
from capfilt.pipelines.telemetry import telemetry
from capfilt.pipelines.unbegun import until_begun
from capfilt.pipelines.watching import EventLog, Watcher, Watchers
from capfilt.pipelines.withdraw import withdrawn_from
from capfilt.plan import Plan, Stage, Why, plan_run, why_stale
from capfilt.receipts import Receipt, adopt, discard, gaps, shard_commit, unfinished
from capfilt.records import SUMMARY, outcome_of
from capfilt.retention import due, thin
from capfilt.spec import CurateSpec
from capfilt.terminal import say
from capfilt.throughput import Throughput
from capfilt.weights import inspect, inspect_classifier
from capfilt.withdrawn import compared, has_withdrawn, rows_named, withdrawn_rows

WINDOW = 10_000
"""Fragments handed to Ray at a time: the driver pays about 13 KB for each."""

COMMIT_SECONDS = 10.0
"""Finished shards are committed together, so often; less often where a commit of a large table takes over a second."""

_FOOTER_THREADS = 16

Unit = Fragment | Redecision
"""What a worker is given at a time: redecisions where shards restart at their decisions, else fragments."""

Execute = Callable[[Job, Iterator[Any], LoadModels], Generator[list[Receipt], None, None]]
"""Runs the units of one stage and yields their receipts as they finish, in any order."""


@dataclass
class Summary:
    """What a run did.

    Attributes:
        counts: rows of the shards this run committed; twice those of one that lost withdrawn rows and was then redone.
        reasons: rows by reason, and texts by source and reason, of those shards.
        stages: what was done by the stage at which shards restarted, cheapest first.
        seconds: by stage, over all workers.
        busy, bottleneck, device_seconds: see capfilt.throughput; none where nothing met the models.
        failures: input files that could not be curated, each with what was wrong.
        gone: committed shards that are no longer among the inputs.
        copies: rows of all shards that are dropped as copies, where they were looked for.
        outcome: `done`, `interrupted`, or the error that ended the run.
        report: name of the page that the run left in its folder, if it did; report_error: why it could not.
        alarms: of that page.
        versions: of the tables after the run.
        elapsed: seconds.
    """

    run: str
    output: str
    fingerprints: Fingerprints
    shards: int = 0
    skipped: int = 0
    adopted_rows: int = 0
    counts: Counts = field(default_factory=Counts)
    reasons: Counter[str] = field(default_factory=Counter)
    stages: dict[Stage, Pace] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    busy: float | None = None
    bottleneck: str | None = None
    device_seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    gone: int = 0
    copies: int = 0
    outcome: str = "running"
    report: str | None = None
    report_error: str | None = None
    alarms: list[str] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    elapsed: float = 0.0


def curate(
    spec: CurateSpec,
    *,
    load: LoadModels = load_models,
    execute: Execute | None = None,
    console: Console | None = None,
    report: Callable[[Summary], None] | None = None,
) -> Summary:
    """Run CapFilt over what is not yet curated, and commit it.

    Args:
        load: makes the models in each worker; other models than the cards' come in here.
        execute: how fragments run; on Ray unless given (`in_process` needs no Ray).
        console: where progress is shown; standard error unless given.
        report: called with the summary once, at the end, however the run ends.

    Raises:
        CheckpointError: a checkpoint cannot be used.
        ConflictError: another run holds the output, took it over, or committed to it.
        ErrorBudgetError: more rows are errors than the spec allows; what was good is committed.
        InputError: the inputs cannot be listed.
        KeyboardInterrupt: after committing what is finished.
    """
    begin = time.monotonic()
    run = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}"
    console = console or Console(stderr=True)
    lease = _lease(spec, run, console)
    with ExitStack() as held:
        with until_begun(spec, run):
            lease.look()
            seen, fingerprints = files_seen(spec), run_fingerprints(spec)
            # Planned before anything is made: a mistyped input makes no dataset.
            plan = plan_run(spec, fingerprints)
            if load is load_models:
                for captioner in spec.captioners if plan.at(Stage.CAPTION) else ():
                    inspect(captioner)
                for filter_ in spec.filters if plan.models else ():
                    inspect(filter_)
                if plan.models and spec.keep_out and (classifier := spec.keep_out.classifier):
                    inspect_classifier(classifier)
            left = bool(plan.todo) or unsettled(spec) or unfinished(spec.output, spec.output_options)
            work = left or _versions_go(spec)
            if work:
                held.enter_context(lease)
            if lease.contended:
                plan = plan_run(spec, fingerprints)
            dataset = CuratedDataset.for_writing(spec.output, spec.output_options)
            if lease.unsure:
                dataset.commit([])  # whoever had the lease, and may yet wake, can commit no more
        summary = Summary(run, spec.output, fingerprints, skipped=len(plan.done), gone=len(plan.gone))
        try:
            if work:
                dataset.register(run, _record(spec, fingerprints, plan))
                event("run_started", run=run, output=spec.output, shards=len(plan.todo), up_to_date=len(plan.done))
                job = Job(spec, fingerprints, run, generation=dataset.generation, files_seen=seen)
                display, tell = Display(console, spec.placement.max_actors, run=run), partial(_tell, console)
                with telemetry(run, spec.output, tell) as traced, interruptible(), display:
                    watchers = Watchers(display, DriverMetrics(run, spec.ray.watched, tell), EventLog(run), traced)
                    execute = execute or partial(on_ray, waits=watchers.waits)
                    driver = _Driver(job, dataset, plan, watchers, summary, lease)
                    if plan.todo:
                        driver.run(execute, load)
                    if spec.duplicates is not None and not dataset.settled:
                        driver.settle(execute, load)
                    thin(dataset, spec.retention, run, summary.shards > 0, tell)
                    discard(spec.output, spec.output_options, dataset.closed_runs())
            _compared(dataset, plan, summary)
            summary.outcome = "done"
            return summary
        except BaseException as error:
            summary.outcome = outcome_of(lease.cause(error))
            raise
        finally:
            summary.elapsed = time.monotonic() - begin
            summary.versions = dataset.versions()
            _log_end(summary)
            if report:
                report(summary)
            if work:
                _write_summary(dataset, summary)
                if spec.report:
                    record = partial(_write_summary, dataset, summary)
                    leave_report(dataset, spec, summary, record, partial(_tell, console))


def _lease(spec: CurateSpec, run: str, console: Console) -> Lease:
    return Lease(spec.output, spec.output_options, run, spec.lease_seconds, partial(_tell, console), interrupt)


def _tell(console: Console, line: str) -> None:
    say(f"capfilt: {line}", console)


def _versions_go(spec: CurateSpec) -> bool:
    """Whether there are old versions that the spec lets go, though nothing else be to do."""
    dataset = CuratedDataset.if_any(spec.output, spec.output_options) if spec.retention else None
    return dataset is not None and spec.retention is not None and due(dataset, spec.retention)


def _compared(dataset: CuratedDataset, plan: Plan, summary: Summary) -> None:
    """Put on record that the lists of what is withdrawn need no comparison any more, if all that they hit is done."""
    lists, mine = plan.withdrawals.lists, plan.withdrawals
    left = [file for file, _ in plan.todo if file.path in summary.failures]
    if lists is not None and not any(file.shard in mine.hits or file.shard in mine.returned for file in left):
        compared(dataset, lists)


def _record(spec: CurateSpec, fingerprints: Fingerprints, plan: Plan) -> dict[str, Any]:
    """What a run was asked to do, and with what; kept in _runs/."""
    return {
        "spec": spec.model_dump(mode="json"),
        "fingerprints": asdict(fingerprints),
        "shards": {str(why): count for why, count in plan.reasons.items()},
        **surroundings(),
    }


def _log_end(summary: Summary) -> None:
    level = logging.INFO if summary.outcome == "done" else logging.ERROR
    did = {
        "shards": summary.shards,
        "rows": summary.counts.rows,
        **asdict(summary.counts),
        "up_to_date": summary.skipped,
    }
    cost = {"seconds": round(summary.elapsed, 3), "device_seconds": summary.device_seconds}
    event("run_ended", level, run=summary.run, outcome=summary.outcome, **did, **cost, failed=len(summary.failures))


def _write_summary(dataset: CuratedDataset, summary: Summary) -> None:
    """Keep the summary in _runs/; where the run itself failed, a store that refuses is not the error to hear of."""
    try:
        dataset.write_run_file(summary.run, SUMMARY, _as_json(summary))
    except Exception:
        if summary.outcome == "done":
            raise


def _as_json(summary: Summary) -> dict[str, Any]:
    nested = {"counts": asdict(summary.counts), "fingerprints": asdict(summary.fingerprints)}
    nested["stages"] = {stage: asdict(pace) for stage, pace in summary.stages.items()}
    return {**vars(summary), **nested, "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


class _Driver:
    """Follows shards from plan to commit."""

    def __init__(
        self,
        job: Job,
        dataset: CuratedDataset,
        plan: Plan,
        display: Watcher,
        summary: Summary,
        lease: Lease,
        copies: Found | None = None,
    ) -> None:
        self.copies = copies  # to drop; None while they have yet to be looked for
        self.job, self.dataset, self.plan, self.display, self.summary = job, dataset, plan, display, summary
        self.lease = lease
        self._receipts: dict[str, list[Receipt]] = {}  # of shards not yet complete
        self._ready: list[_Complete] = []
        self._held: list[_Complete] = []  # over the budget by themselves; committed if the run as a whole is not
        self._counted: dict[str, _Complete] = {}  # in the summary, where they may be committed again: see settle
        self._footers: dict[str, tuple[InputFile, Footer]] = {}
        self._before: dict[str, ShardFiles] = {}  # of shards that restart midway: what is committed
        self._withdrawn: dict[str, tuple[int, ...]] = {}  # rows of a shard; none where it is not among them
        self._paths = {file.shard: file.path for file, _ in plan.todo}
        self._retry: list[Unit] | None = []  # failed once; None when a failure is final
        self._closed = dataset.closed_runs()
        self._committed = dataset.committed()
        self._budget = ErrorBudget(job.spec.max_error_fraction, self._committed, plan, self._closed)
        self._throughput = Throughput(summary.seconds)
        self._last_commit = time.monotonic()
        self._commit_took = 0.0

    def run(self, execute: Execute, load: LoadModels) -> None:
        """Curate everything in the plan; on any error, first commit what is finished."""
        for stage in Stage:
            if self.plan.at(stage):
                self._restart_at(replace(self.job, stage=stage), execute, load)
                if stage is Stage.WITHDRAW:  # of what is left of these shards, other stages may be stale
                    self._commit()
                    self.dataset.remove_pages()
                    self._committed = self.dataset.committed()
        self._finish()

    def settle(self, execute: Execute, load: LoadModels) -> None:
        """Look for copies over all that is committed, and decide those shards anew of which other rows are to go.

        Killed in the midst of it, the next run finds the same copies: those that are dropped take part as before.
        """
        self.display.waits("looking for copies")
        found, stale = look_for_copies(self.dataset, self.job, self.plan.files, self.summary.failures)
        self.summary.copies = len(found)
        if stale:
            names = {file.shard for file in stale}
            done = tuple(shard for shard in self.dataset.committed() if shard not in names)
            plan = Plan(tuple((file, Why.COPIES) for file in stale), done, (), files=self.plan.files)
            spec = self.job.spec.model_copy(update={"max_error_fraction": 1.0})  # they were not too many before
            job = replace(self.job, spec=spec)
            driver = _Driver(job, self.dataset, plan, self.display, self.summary, self.lease, found)
            driver._counted = self._counted
            driver.run(execute, load)
        self.lease.check()
        if not {file.path for file in stale} & self.summary.failures.keys():
            self.dataset.commit([], settles=True)

    def _restart_at(self, job: Job, execute: Execute, load: LoadModels) -> None:
        known = self.summary.stages.get(job.stage, Pace())
        begin, self._retry = time.monotonic() - known.seconds, []
        self._round(job, execute, self._units(job), load, begin)
        failed, self._retry = self._retry, None
        if failed:  # most likely the store's passing trouble: once more, when all else is done
            self._round(job, execute, iter(failed), load, begin)

    def _round(self, job: Job, execute: Execute, units: Iterator[Unit], load: LoadModels, begin: float) -> None:
        pace = self.summary.stages.setdefault(job.stage, Pace())
        with closing(execute(job, units, load)) as finished:
            try:
                for receipts in finished:
                    for receipt in receipts:
                        if self._take(receipt):
                            pace.add(receipt, time.monotonic() - begin)
                    self._commit_when_due()
                    self._stop_if_sick()
            except ConflictError:
                raise
            except BaseException:
                self._commit()
                raise

    # --- work ---

    def _units(self, job: Job) -> Iterator[Unit]:
        """The work of the plan at a stage, less what earlier runs finished."""
        spec, files = job.spec, self.plan.at(job.stage)
        self._before, self._withdrawn = {}, {}
        if job.stage is not Stage.CAPTION:
            for file in files if self.copies is None else ():  # the plan was made before the dataset was opened
                if self._stage(job, file) is not job.stage:
                    raise ConflictError(
                        f"{spec.output}: another run committed {file.shard} since this one began; run again"
                    )
            shards = [file.shard for file in files]
            self._before = self.dataset.files(shards)
            self._know_withdrawn(shards, self.plan.withdrawals.hits if job.stage is Stage.WITHDRAW else {})
        wanted = {file.shard: self._provenance(job, file) for file in files}
        adopted = adopt(spec.output, spec.output_options, wanted, self._closed)
        midway = job.stage in (Stage.WITHDRAW, Stage.DECIDE)
        return self._redecisions(job, files, adopted) if midway else self._fragments(job, files, adopted)

    def _stage(self, job: Job, file: InputFile) -> Stage | None:
        """Where a committed shard is to restart, as the dataset is now."""
        state = self._committed.get(file.shard)
        if job.stage is Stage.WITHDRAW:  # whatever else it was made with, for its input may be gone
            same = state is not None and state.provenance.input_id == file.input_id
            return job.stage if same else None
        why = why_stale(file, job.fingerprints, state)
        return None if why is None else why.stage

    def _know_withdrawn(self, shards: Sequence[str], hits: Mapping[str, Sequence[int]]) -> None:
        """Which rows of committed shards were withdrawn, or are to be."""
        recorded = withdrawn_rows(self.dataset, [shard for shard in shards if has_withdrawn(self._committed[shard])])
        for shard in shards:
            if rows := {*hits.get(shard, ()), *recorded.get(shard, ())}:
                self._withdrawn[shard] = tuple(sorted(rows))

    def _provenance(self, job: Job, file: InputFile) -> Provenance:
        """Of a shard as this run is to leave it, by what is known of its withdrawn rows."""
        rows = self._withdrawn.get(file.shard, ())
        if job.stage is Stage.WITHDRAW:
            return withdrawn_from(self._committed[file.shard].provenance, rows, job.run)
        own = job.provenance(file.input_id, rows)
        return replace(own, decide_fingerprint=with_withdrawn(self._decide(job, file.shard), rows))

    def _redecisions(
        self, job: Job, files: Iterable[InputFile], adopted: Mapping[str, list[Receipt]]
    ) -> Iterator[Redecision]:
        """Annotations files to judge again; of the inputs nothing is read here."""
        for file in files:
            try:
                units = {(unit.start, unit.stop): unit for unit in self._redecide(job, file)}
            except DatasetError as error:
                self._fail(file.shard, str(error))
                continue
            self._budget.file_has(self._committed[file.shard].rows)
            self.display.expect(self._budget.all_rows)
            for receipt in self._fitting(job, file, adopted):
                if units.pop((receipt.start, receipt.stop), None):
                    self._adopt(receipt)
            yield from units.values()

    def _redecide(self, job: Job, file: InputFile) -> list[Redecision]:
        shard = file.shard
        was = self._committed[shard].provenance
        units = redecisions(file, self._before[shard], was, self._withdrawn.get(shard, ()))
        if job.stage is Stage.WITHDRAW:
            return units
        decide, copies = self._decide(job, shard), None if self.copies is None else self.copies.of(shard)
        return [unit.of_shard(decide, copies) for unit in units]

    def _decide(self, job: Job, shard: str) -> str:
        """The decide fingerprint that a shard is to have, but for what it says of withdrawn rows. Decided anew, it
        keeps the copies that it has until all are looked for."""
        base = job.fingerprints.decide
        if self.copies is not None:
            return self.copies.fingerprint(shard, base)
        if job.stage is not Stage.DECIDE or job.spec.duplicates is None:
            return base
        was = without_withdrawn(self._committed[shard].provenance.decide_fingerprint)
        return base + was.removeprefix(without_copies(was))

    def _fitting(self, job: Job, file: InputFile, adopted: Mapping[str, list[Receipt]]) -> list[Receipt]:
        """Earlier receipts of a shard that take the same rows for withdrawn."""
        own = self._provenance(job, file)
        return [receipt for receipt in adopted.get(file.shard, []) if receipt.same_work(own)]

    def _fragments(
        self, job: Job, files: Iterable[InputFile], adopted: Mapping[str, list[Receipt]]
    ) -> Iterator[Fragment]:
        """Fragments of files, as footers are read."""
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            for chunk in _chunks(files, 4 * _FOOTER_THREADS):
                footers = dict(zip(chunk, pool.map(self._footer, chunk), strict=True))
                for file, footer in footers.items():
                    if isinstance(footer, InputError):
                        self._fail(file.shard, str(footer))
                    else:
                        self._footers[file.shard] = (file, footer)
                        self._budget.file_has(footer.rows)
                self.display.expect(self._budget.all_rows)
                self._stop_if_sick()
                for file, footer in footers.items():
                    if isinstance(footer, Footer):
                        yield from self._to_do(file, footer, self._fitting(job, file, adopted))

    def _footer(self, file: InputFile) -> Footer | InputError:
        """A file's footer; and, where the spec has lists of them, which of its rows are withdrawn."""
        source, lists = self.job.spec.input, self.plan.withdrawals.lists
        try:
            footer = read_footer(file, source.columns, source.storage_options)
            if lists and (rows := rows_named(lists, file, footer, source.storage_options)):
                self._withdrawn[file.shard] = tuple(sorted({*rows, *self._withdrawn.get(file.shard, ())}))
            return footer
        except InputError as error:
            return error

    def _to_do(self, file: InputFile, footer: Footer, adopted: list[Receipt]) -> Iterator[Fragment]:
        if any(receipt.file_rows != footer.rows for receipt in adopted):
            adopted = []
        for receipt in adopted:
            self._adopt(receipt)
        ranges = gaps(adopted, footer.rows) if footer.rows or adopted else [(0, 0)]
        for start, stop in ranges:
            for a, b in cut(footer.row_groups, self.job.spec.fragment_rows, start, stop):
                yield self._fragment(file.shard, a, b, footer.rows)

    def _fragment(self, shard: str, start: int, stop: int, file_rows: int) -> Fragment:
        """Rows of a file whose footer was read; where their captions stay, with the files that hold these."""
        (file, footer), before = self._footers[shard], self._before.get(shard, ShardFiles())
        spans = {one.path: one.span or (0, file_rows) for one in before.annotations}
        holding = tuple(path for path, (a, b) in spans.items() if a < stop and b > start)
        return replace(footer.fragment(file, start, stop, holding), withdrawn=self._withdrawn.get(shard, ()))

    def _adopt(self, receipt: Receipt) -> None:
        self.summary.adopted_rows += receipt.rows
        self.display.adopt(receipt)
        self._count(receipt)

    # --- receipts ---

    def _take(self, receipt: Receipt) -> bool:
        """Take what a worker hands back; whether its rows are finished."""
        if self._paths[receipt.shard] in self.summary.failures:  # another fragment of it failed: it is given up
            return False
        if receipt.failure is not None:
            if self._retry is None:
                self._fail(receipt.shard, receipt.failure)
            else:
                self._retry.append(self._again(receipt))
            return False
        self._throughput.add(receipt.worker, receipt.seconds, receipt.on_models)
        self.summary.busy, self.summary.bottleneck = self._throughput.busy, self._throughput.bottleneck
        placement = self.job.spec.placement
        self.summary.device_seconds = self._throughput.device_seconds(placement.gpus, placement.cpus)
        self.display.update(receipt)
        self._count(receipt)
        return True

    def _again(self, receipt: Receipt) -> Unit:
        """The work that a receipt says failed."""
        if receipt.shard in self._footers:
            return self._fragment(receipt.shard, receipt.start, receipt.stop, receipt.file_rows)
        file = next(file for file in self.plan.at(receipt.stage) if file.shard == receipt.shard)
        job = replace(self.job, stage=receipt.stage)
        return next(unit for unit in self._redecide(job, file) if unit.start == receipt.start)

    def _count(self, receipt: Receipt) -> None:
        """Add finished work, of this run or adopted, to its shard."""
        if receipt.stage is not Stage.WITHDRAW:  # whose errors were accounted for when they were made
            self._budget.saw(receipt)
        receipts = self._receipts.setdefault(receipt.shard, [])
        receipts.append(receipt)
        if sum(r.rows for r in receipts) == receipt.file_rows:
            complete = _Complete(shard_commit(receipts), sum((Counter(r.reasons) for r in receipts), Counter()))
            del self._receipts[receipt.shard]
            self._footers.pop(receipt.shard, None)  # of a file that may be one of very many
            over = complete.shard.counts.errors > self.job.spec.max_error_fraction * complete.shard.rows
            over = over and receipt.stage is not Stage.WITHDRAW
            (self._held if over else self._ready).append(complete)

    def _fail(self, shard: str, message: str) -> None:
        """A file that cannot be curated; once, however many of its fragments fail."""
        if self._paths[shard] not in self.summary.failures:
            self.summary.failures[self._paths[shard]] = message
            receipts = self._receipts.pop(shard, [])
            self._footers.pop(shard, None)
            self._budget.lost_a_file(receipt for receipt in receipts if receipt.stage is not Stage.WITHDRAW)
            self.display.failed(shard, message)

    # --- the error budget ---

    def _stop_if_sick(self) -> None:
        if self._budget.sure_to_be_over():
            raise self._sick()

    def _sick(self) -> ErrorBudgetError:
        return ErrorBudgetError(
            f"{self._budget} Input files that failed: {len(self.summary.failures)}{_examples(self.summary.failures)}. "
            "Good shards are committed; mend the input or raise max_error_fraction, and run again to resume"
        )

    # --- commits ---

    def _commit_when_due(self) -> None:
        due = time.monotonic() - self._last_commit >= max(COMMIT_SECONDS, 10 * self._commit_took)
        if self._ready and due:
            self._commit()

    def _commit(self) -> None:
        begin = time.monotonic()
        self.lease.check()
        if self._ready:
            with uninterrupted():
                complete, self._ready = self._ready, []
                self.dataset.commit([one.shard for one in complete])
                for one in complete:
                    self._count_in_summary(one)
                self.display.committed([one.shard for one in complete], time.monotonic() - begin)
        self._last_commit = time.monotonic()
        self._commit_took = self._last_commit - begin

    def _count_in_summary(self, one: _Complete) -> None:
        """Once, though this run commits the shard again to drop copies."""
        summary, before = self.summary, self._counted.get(one.shard.shard)
        if before is None:
            summary.shards += 1
        else:
            counts = before.shard.counts
            summary.counts += Counts(-counts.kept, -counts.dropped, -counts.errors)
            summary.reasons -= before.reasons
        summary.counts += one.shard.counts
        summary.reasons.update(one.reasons)
        if self.job.spec.duplicates is not None and self.copies is None:
            self._counted[one.shard.shard] = one

    def _finish(self) -> None:
        self.display.expect(0)  # estimated rows of files that could not be read do not come any more
        self._commit()
        if self._budget.over():
            raise self._sick()
        self._ready, self._held = self._held, []
        self._commit()
        if self._receipts:
            paths = [self._paths[shard] for shard in itertools.islice(self._receipts, 3)]
            raise CapfiltError(
                f"{len(self._receipts)} shards are incomplete though every fragment ended: {paths}. What is "
                "committed stays; this is a bug of capfilt, run again to resume"
            )


@dataclass(frozen=True)
class _Complete:
    """A shard whose rows are all accounted for."""

    shard: ShardCommit
    reasons: Counter[str]


def _examples(failures: Mapping[str, str]) -> str:
    return "".join(f"; {message}" for message in itertools.islice(failures.values(), 3))


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


# --- how fragments run ---


def in_process(job: Job, units: Iterator[Any], load: LoadModels) -> Generator[list[Receipt], None, None]:
    """Run units in a plain loop, here."""
    if job.stage in (Stage.WITHDRAW, Stage.DECIDE):
        yield from ([redecide(job, unit)] for unit in units)
        return
    from capfilt.pipelines.worker import Worker  # torch loads where models do

    worker = Worker(job, load)
    for unit in units:
        yield worker.process(unit)


def on_ray(
    job: Job, units: Iterator[Any], load: LoadModels, waits: Callable[[str], None] = lambda _: None
) -> Generator[list[Receipt], None, None]:
    """Run redecisions as Ray tasks, fragments on a Ray Data actor pool.

    Args:
        waits: told what is waited for, until the first is done.

    Raises:
        CapfiltError: Ray cannot give one actor what the cards' placement asks for, or a worker raised.
    """
    without_models = job.stage in (Stage.WITHDRAW, Stage.DECIDE)
    if not without_models:
        # Loads torch. Where it is loaded after Ray, in a job that has a working directory, MKL may end the process with
        # "Cannot load libtorch_cpu.so" (exit code 2 or 139; torch 2.13, Ray 2.60).
        waits("loading PyTorch")
        import capfilt.pipelines.ray_worker  # noqa: F401
    waits(connecting(job.spec.ray))
    with connected(job.spec.ray):
        waits("reading what is to be done")
        if without_models:
            yield from _run_tasks(job, units)
            return
        for window in _chunks(units, WINDOW):
            yield from _run_window(job, window, load, waits)


def _run_tasks(job: Job, units: Iterator[Redecision]) -> Iterator[list[Receipt]]:
    import ray.exceptions

    from capfilt.pipelines.ray_tasks import run_tasks

    try:
        yield from run_tasks(job, units)
    except ray.exceptions.RayError as error:
        raise CapfiltError(f"Ray failed: {error}\nWhat is committed stays; run again to resume") from error


def _check_capacity(spec: CurateSpec) -> None:
    """Refuse what a local Ray can never place; a cluster may yet grow."""
    import ray

    if spec.ray.address != "local":
        return
    placement = spec.placement
    for name, there in lacking(ray.cluster_resources(), gpus=placement.gpus, cpus=placement.cpus).items():
        greedy = [at for at, card in spec.cards.items() if getattr(card.placement, name) > there]
        raise CapfiltError(
            f"an actor needs {getattr(placement, name):g} {name.upper().rstrip('S')} and this machine has {there:g}; "
            f"lower {' and '.join(f'{at}.placement.{name}' for at in greedy)}"
            f"{' (or raise ray.num_cpus)' if name == 'cpus' else ''}, or join a cluster with ray.address"
        )


def _ahead(fragments: int, actors: int) -> int:
    """Fragments an actor holds: two at work and two at hand; of few, no more than its share, or the first takes all."""
    return min(4, max(2, math.ceil(fragments / actors)))


def _run_window(
    job: Job, window: list[Fragment], load: LoadModels, waits: Callable[[str], None]
) -> Iterator[list[Receipt]]:
    import ray
    import ray.data

    from capfilt.pipelines.ray_worker import Loading, RayWorker, start_attempts

    _check_capacity(job.spec)
    placement = job.spec.placement
    context = quiet(ray.data.DataContext.get_current().copy())
    attempts = start_attempts()
    loading = Loading(attempts, waits)
    try:
        items = [{"fragment": pickle.dumps(fragment)} for fragment in window]
        with ray.data.DataContext.current(context):  # a dataset keeps the context it was made in
            results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                RayWorker,
                fn_constructor_args=(job, load, attempts),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    min_size=placement.min_actors,
                    max_size=placement.max_actors,
                    max_tasks_in_flight_per_actor=_ahead(len(window), placement.max_actors),
                    max_concurrent_calls_per_actor=2,
                    enable_true_multi_threading=True,
                ),
                num_cpus=placement.cpus,
                num_gpus=placement.gpus,
            )
        # Not iter_rows: it leaves threads behind, and one that meets Ray after its shutdown silently ends the process.
        for bundle in results.iter_internal_ref_bundles():
            for entry in bundle.blocks:
                loading.end()
                (pickled,) = ray.get(entry.ref).column("result").to_pylist()  # a block is a fragment's
                result = pickle.loads(pickled)
                if isinstance(result, Failure):
                    raise result.error
                yield result
    except ray.exceptions.RayError as error:
        raise CapfiltError(f"Ray failed: {error}\nWhat is committed stays; run again to resume") from error
    finally:
        loading.end()
        ray.kill(attempts)
