"""The driver of a curation run: plan, spread fragments over workers, take receipts, commit whole shards.

Ray Data schedules fragments, not rows: the dataset is a list of fragment descriptors, each its own block, and the actor
that holds both models does everything else. Image bytes never cross the object store. Only this driver commits.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import os
import pickle
import platform
import signal
import socket
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from rich.console import Console

from capfilt.dataset import Counts, CuratedDataset, ShardCommit
from capfilt.errors import CapfiltError, ConflictError, ErrorBudgetError, InputError
from capfilt.fingerprints import Fingerprints, run_fingerprints
from capfilt.fragments import Fragment, InputFile, cut, read_footer
from capfilt.pipelines.progress import Display
from capfilt.pipelines.worker import Job, LoadModels, Worker, load_models
from capfilt.plan import Plan, make_plan
from capfilt.receipts import Receipt, adopt, discard, gaps, shard_commit, unfinished
from capfilt.spec import CurateSpec

WINDOW = 10_000
"""Fragments handed to Ray at a time: the driver pays about 13 KB for each."""

COMMIT_SECONDS = 10.0
"""Finished shards are committed together, so often; less often where a commit of a large table takes over a second."""

BUDGET_ROWS = 10_000
"""A run is stopped early only when its errors exceed the budget of so many rows (of all, if it has fewer)."""

_FOOTER_THREADS = 16

Execute = Callable[[Job, Iterator[Fragment], LoadModels], Generator[list[Receipt], None, None]]
"""Runs fragments and yields their receipts as they finish, in any order."""


@dataclass
class Summary:
    """What a run did.

    Attributes:
        counts: rows of the shards this run committed.
        reasons: rows by reason; texts by source and reason.
        seconds: by stage, over all workers.
        failures: input files that could not be curated, each with what was wrong.
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
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    failures: dict[str, str] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    elapsed: float = 0.0


def curate(
    spec: CurateSpec,
    *,
    load: LoadModels = load_models,
    execute: Execute | None = None,
    console: Console | None = None,
) -> Summary:
    """Run CapFilt over what is not yet curated, and commit it.

    Args:
        load: makes the models in each worker; other models than a card's come in here.
        execute: how fragments run; on Ray unless given (`in_process` needs no Ray).
        console: where progress is shown; standard error unless given.

    Raises:
        ConflictError: another driver committed to the output.
        ErrorBudgetError: more rows are errors than the spec allows; what was good is committed.
        InputError: the inputs cannot be listed.
        KeyboardInterrupt: after committing what is finished.
    """
    begin = time.monotonic()
    fingerprints = run_fingerprints(spec)
    dataset = CuratedDataset.for_writing(spec.output, spec.output_options)
    plan = make_plan(spec, fingerprints, dataset.committed())
    run = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    summary = Summary(run, spec.output, fingerprints, skipped=len(plan.done))
    if plan.todo or unfinished(spec.output, spec.output_options):
        dataset.register(run, _record(spec, fingerprints, plan))
        job = Job(spec, fingerprints, run)
        console = console or Console(stderr=True)
        with Display(console, spec.placement.max_actors) as display:
            if plan.todo:
                _Driver(job, dataset, plan, display, summary).run(execute or on_ray, load)
            dataset.vacuum()
            discard(spec.output, spec.output_options)
        summary.elapsed = time.monotonic() - begin
        summary.versions = dataset.versions()
        dataset.write_run_file(run, "summary.json", _as_json(summary))
    return summary


def _record(spec: CurateSpec, fingerprints: Fingerprints, plan: Plan) -> dict[str, Any]:
    """What a run was asked to do, and with what; kept in _runs/."""
    packages = ("capfilt", "torch", "transformers", "ray", "pyarrow", "deltalake")
    return {
        "spec": spec.model_dump(mode="json"),
        "fingerprints": asdict(fingerprints),
        "shards": {str(why): count for why, count in plan.reasons.items()},
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def _as_json(summary: Summary) -> dict[str, Any]:
    nested = {"counts": asdict(summary.counts), "fingerprints": asdict(summary.fingerprints)}
    return {**vars(summary), **nested, "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM, which is how clusters say stop, ends a run as Ctrl-C does."""

    def stop(signum: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(signum).name)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever owns the signals handles them
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Driver:
    """Follows shards from plan to commit."""

    def __init__(self, job: Job, dataset: CuratedDataset, plan: Plan, display: Display, summary: Summary) -> None:
        self.job, self.dataset, self.plan, self.display, self.summary = job, dataset, plan, display, summary
        self._receipts: dict[str, list[Receipt]] = {}  # of shards not yet complete
        self._ready: list[ShardCommit] = []
        self._held: list[ShardCommit] = []  # over the budget by themselves; committed if the run as a whole is not
        self._paths = {file.shard: file.path for file, _ in plan.todo}
        self._failed_rows: dict[str, int | None] = {}  # by path; None where the file does not say
        self._seen = Counts()
        self._file_rows: dict[str, int] = {}
        self._last_commit = time.monotonic()
        self._commit_took = 0.0

    def run(self, execute: Execute, load: LoadModels) -> None:
        """Curate everything in the plan; on any error, first commit what is finished."""
        try:
            with closing(execute(self.job, self._fragments(), load)) as finished:
                for receipts in finished:
                    for receipt in receipts:
                        self._take(receipt)
                    self._commit_when_due()
                    self._stop_if_sick()
            self._finish()
        except ConflictError:
            raise
        except BaseException:
            self._commit()
            raise

    # --- work ---

    def _fragments(self) -> Iterator[Fragment]:
        """Fragments of the plan, less what earlier runs finished, as footers are read."""
        spec = self.job.spec
        wanted = {file.shard: self.job.provenance(file.input_id) for file, _ in self.plan.todo}
        adopted = adopt(spec.output, spec.output_options, wanted, self.dataset.closed_runs())
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            for chunk in _chunks((file for file, _ in self.plan.todo), 4 * _FOOTER_THREADS):
                for file, work in zip(chunk, pool.map(self._cut, chunk), strict=True):
                    if isinstance(work, InputError):
                        self._fail(file.path, str(work), None)
                        continue
                    rows, fragments = work
                    self._file_rows[file.shard] = rows
                    self._expect()
                    yield from self._to_do(fragments, adopted.get(file.shard, []), rows)

    def _cut(self, file: InputFile) -> tuple[int, Callable[[int, int], list[Fragment]]] | InputError:
        spec = self.job.spec
        try:
            footer = read_footer(file, spec.input.columns, spec.input.storage_options)
        except InputError as error:
            return error

        def fragments(start: int, stop: int) -> list[Fragment]:
            ranges = cut(footer.row_groups, spec.fragment_rows, start, stop)
            return [Fragment(file, footer.layout, a, b, footer.rows) for a, b in ranges]

        return footer.rows, fragments

    def _to_do(
        self, fragments: Callable[[int, int], list[Fragment]], adopted: list[Receipt], rows: int
    ) -> Iterator[Fragment]:
        if any(receipt.file_rows != rows for receipt in adopted):
            adopted = []
        for receipt in adopted:
            self.summary.adopted_rows += receipt.rows
            self._take(receipt)
        if rows == 0 and not adopted:
            yield from fragments(0, 0)
        for start, stop in gaps(adopted, rows):
            yield from fragments(start, stop)

    def _expect(self) -> None:
        known = sum(self._file_rows.values())
        unknown = len(self.plan.todo) - len(self._file_rows) - len(self._failed_rows)
        self.display.expect(known + unknown * (known // max(1, len(self._file_rows))))

    # --- receipts ---

    def _take(self, receipt: Receipt) -> None:
        if receipt.failure is not None:
            self._fail(self._paths[receipt.shard], receipt.failure, receipt.file_rows)
            return
        self._seen += receipt.counts
        self.summary.reasons.update(receipt.reasons)
        for stage, spent in receipt.seconds.items():
            self.summary.seconds[stage] += spent
        self.display.update(receipt)
        receipts = self._receipts.setdefault(receipt.shard, [])
        receipts.append(receipt)
        if sum(r.rows for r in receipts) == receipt.file_rows:
            shard = shard_commit(self._receipts.pop(receipt.shard))
            over = shard.counts.errors > self.job.spec.max_error_fraction * shard.rows
            (self._held if over else self._ready).append(shard)

    def _fail(self, path: str, message: str, rows: int | None) -> None:
        self.summary.failures[path] = message
        self._failed_rows[path] = rows

    # --- the error budget ---

    def _errors(self) -> tuple[int, int]:
        """(error rows, rows) seen; an unreadable file counts as many rows as others have on average, at least one."""
        mean = sum(self._file_rows.values()) // max(1, len(self._file_rows))
        lost = sum(max(1, mean) if rows is None else rows for rows in self._failed_rows.values())
        return self._seen.errors + lost, self._seen.rows + lost

    def _stop_if_sick(self) -> None:
        errors, rows = self._errors()
        basis = max(rows, min(BUDGET_ROWS, sum(self._file_rows.values())))
        if errors > self.job.spec.max_error_fraction * basis:
            raise self._sick(errors, rows)

    def _sick(self, errors: int, rows: int) -> ErrorBudgetError:
        common = [f"{reason} {count:,}" for reason, count in self.summary.reasons.most_common() if ":" not in reason]
        return ErrorBudgetError(
            f"{errors:,} of {rows:,} rows are errors, {errors / max(1, rows):.1%}: over max_error_fraction = "
            f"{self.job.spec.max_error_fraction:.1%}. Rows: {', '.join(common)}. "
            f"Input files that failed: {len(self.summary.failures)}{_examples(self.summary.failures)}. "
            "Good shards are committed; mend the input or raise max_error_fraction, and run again to resume"
        )

    # --- commits ---

    def _commit_when_due(self) -> None:
        due = time.monotonic() - self._last_commit >= max(COMMIT_SECONDS, 10 * self._commit_took)
        if self._ready and due:
            self._commit()

    def _commit(self) -> None:
        begin = time.monotonic()
        shards, self._ready = self._ready, []
        if shards:
            self.dataset.commit(shards)
            self.summary.shards += len(shards)
            self.summary.counts = sum((shard.counts for shard in shards), self.summary.counts)
        self._last_commit = time.monotonic()
        self._commit_took = self._last_commit - begin

    def _finish(self) -> None:
        self._commit()
        errors, rows = self._errors()
        if errors > self.job.spec.max_error_fraction * rows:
            raise self._sick(errors, rows)
        self._ready, self._held = self._held, []
        self._commit()
        incomplete = [self._paths[shard] for shard in self._receipts if self._paths[shard] not in self._failed_rows]
        if incomplete:
            raise CapfiltError(f"{len(incomplete)} shards are incomplete though every fragment ended: {incomplete[:3]}")


def _examples(failures: Mapping[str, str]) -> str:
    return "".join(f"; {message}" for message in itertools.islice(failures.values(), 3))


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


# --- how fragments run ---


def in_process(job: Job, fragments: Iterator[Fragment], load: LoadModels) -> Generator[list[Receipt], None, None]:
    """Run fragments in a plain loop, here."""
    worker = Worker(job, load)
    for fragment in fragments:
        yield worker.process(fragment)


def on_ray(job: Job, fragments: Iterator[Fragment], load: LoadModels) -> Generator[list[Receipt], None, None]:
    """Run fragments on a Ray Data actor pool.

    Raises:
        CapfiltError: Ray cannot give one actor what the cards' placement asks for, or a worker raised.
    """
    with _ray(job.spec), _interruptible():  # in this order: ray.init takes SIGTERM for itself
        for window in _chunks(fragments, WINDOW):
            yield from _run_window(job, window, load)


@contextmanager
def _ray(spec: CurateSpec) -> Iterator[None]:
    """A connection to Ray: the one that is there, or one of the spec's that ends with the run."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = spec.ray.address == "local"
    try:
        ray.init(
            address=spec.ray.address,
            log_to_driver=False,
            logging_level="ERROR",
            **({"num_cpus": spec.ray.num_cpus, "include_dashboard": False} if local else {}),
        )
        yield
    finally:
        ray.shutdown()


def _check_capacity(spec: CurateSpec) -> None:
    """Refuse what a local Ray can never place; a cluster may yet grow."""
    import ray

    if spec.ray.address != "local":
        return
    have = ray.cluster_resources()
    for name, need in (("GPU", spec.placement.gpus), ("CPU", spec.placement.cpus)):
        if need > have.get(name, 0):
            raise CapfiltError(
                f"an actor needs {need:g} {name} and this machine has {have.get(name, 0):g}; lower captioner.placement."
                f"{name.lower()}s and filter.placement.{name.lower()}s (or ray.num_cpus), or join a cluster with "
                "ray.address"
            )


def _run_window(job: Job, window: list[Fragment], load: LoadModels) -> Iterator[list[Receipt]]:
    import ray
    import ray.data

    from capfilt.pipelines.ray_worker import Failure, RayWorker, start_attempts

    _check_capacity(job.spec)
    placement = job.spec.placement
    context = _context(ray.data.DataContext.get_current().copy())
    attempts = start_attempts()
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
                    max_tasks_in_flight_per_actor=4,
                    max_concurrent_calls_per_actor=2,
                    enable_true_multi_threading=True,
                ),
                num_cpus=placement.cpus,
                num_gpus=placement.gpus,
            )
        for row in results.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, Failure):
                failed = CapfiltError(f"a worker failed on {result.message}")
                failed.add_note(result.trace)
                raise failed
            yield result
    except ray.exceptions.RayError as error:
        raise CapfiltError(f"Ray failed: {error}") from error
    finally:
        ray.kill(attempts)


def _context(context: Any) -> Any:
    """Ray Data's settings for a run, set on a copy; it still logs everything to its own file."""
    context.enable_progress_bars = False  # one progress display, and it is ours
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a fragment may take hours on a CPU, and a cluster may fill up late
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":  # the console's
            handler.setLevel(logging.ERROR)
    return context
