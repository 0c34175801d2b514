"""What is said, and left on record, of a run that ends before it begins: as it looks, plans and opens its output."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from capfilt.dataset import CuratedDataset
from capfilt.errors import LeaseHeldError, StoreError
from capfilt.logs import event
from capfilt.pipelines.session import surroundings
from capfilt.records import RUN, SUMMARY, outcome_of
from capfilt.spec import CurateSpec
from capfilt.stores import one_line


@contextmanager
def until_begun(spec: CurateSpec, run: str) -> Iterator[None]:
    """Have an error of what is inside end the run for the log too and, where the output holds a dataset, on record.

    The record has no versions: such a run changed nothing. Of one that was interrupted, that found the output held, or
    that could not reach it, the log alone tells.
    """
    begin, started = time.monotonic(), _now()
    try:
        yield
    except BaseException as error:
        level = logging.WARNING if isinstance(error, LeaseHeldError) else logging.ERROR
        seconds = time.monotonic() - begin
        ended = {"outcome": outcome_of(error), "shards": 0}
        event("run_ended", level, run=run, output=spec.output, **ended, seconds=round(seconds, 3))
        if isinstance(error, Exception) and not isinstance(error, (LeaseHeldError, StoreError)):
            begun = {"spec": spec.model_dump(mode="json"), **surroundings(), "started": started}
            _leave(spec, run, begun, {"run": run, **ended, "elapsed": seconds, "finished": _now()})
        raise


def _leave(spec: CurateSpec, run: str, begun: dict[str, Any], summary: dict[str, Any]) -> None:
    """Write the record. Where that fails it is not the error to hear of: what ended the run may lie in the output."""
    try:
        if dataset := CuratedDataset.if_any(spec.output, spec.output_options):
            dataset.write_run_file(run, RUN, begun)
            dataset.write_run_file(run, SUMMARY, summary)
    except Exception as trouble:  # noqa: BLE001 - every store raises its own
        event("run_not_on_record", logging.WARNING, run=run, output=spec.output, error=one_line(trouble))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
