"""Decisions made anew, as Ray tasks: no actor, no model, one CPU each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import ray
import ray.exceptions

from capfilt.pipelines.job import Failure, Job
from capfilt.pipelines.redecide import Redecision, redecide
from capfilt.receipts import Receipt

BATCH_ROWS = 8_000
"""Rows of one task: some tenths of a second, against Ray's milliseconds."""

BATCH_FILES = 80
"""And files, where these are small."""

RETRIES = 3
"""Of a task whose worker or node died, before its files are tried one by one, and before one of these is given up."""

_LEAST_TASKS = 8  # handed to Ray at a time: a cluster grows by what waits

_DEATHS = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)


def run_tasks(job: Job, works: Iterator[Redecision]) -> Iterator[list[Receipt]]:
    """Redecide on the Ray that is connected.

    Raises:
        CapfiltError: a worker raised.
        ray.exceptions.RayError: Ray failed.
    """
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(_redecide)
    shared = ray.put(job)
    batches, alone = _batches(works), deque[list[Redecision]]()
    running: dict[ray.ObjectRef, list[Redecision]] = {}
    try:
        while True:
            most = max(_LEAST_TASKS, 2 * int(ray.cluster_resources().get("CPU", 0)))
            while len(running) < most and (batch := alone.popleft() if alone else next(batches, None)):
                running[task.remote(shared, batch)] = batch
            if not running:
                return
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            batch = running.pop(done)
            try:
                results = ray.get(done)
            except _DEATHS as error:
                if len(batch) == 1:
                    yield [job.failed(batch[0], f"{batch[0].name}: the worker died on it again and again: {error}")]
                alone.extend([work] for work in batch if len(batch) > 1)
                continue
            for result in results:
                if isinstance(result, Failure):
                    raise result.error
            yield results
    finally:
        for left in running:
            ray.cancel(left)


def _batches(works: Iterator[Redecision]) -> Iterator[list[Redecision]]:
    batch: list[Redecision] = []
    for work in works:
        batch.append(work)
        if sum(one.rows for one in batch) >= BATCH_ROWS or len(batch) >= BATCH_FILES:
            yield batch
            batch = []
    if batch:
        yield batch


def _redecide(job: Job, works: list[Redecision]) -> list[Receipt | Failure]:
    """In a worker process."""
    results: list[Receipt | Failure] = []
    for work in works:
        try:
            results.append(redecide(job, work))
        except Exception as error:  # noqa: BLE001 - the driver raises it
            results.append(Failure.of(error, work.name))
            break
    return results
