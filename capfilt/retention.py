"""Old versions of the dataset: which of them stay readable when a run has ended, by the spec's `retention`.

A version that counts is what a run left behind that committed something. Others make numbers of their own all the same
(a fence, see capfilt.dataset), of what was there before. What cannot be told from the records stays.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from capfilt.dataset import DIRECTORIES, CuratedDataset
from capfilt.logs import event
from capfilt.records import DONE, SUMMARY, RunRecord
from capfilt.spec import Retention


def thin(
    dataset: CuratedDataset, retention: Retention | None, run: str, committed: bool, say: Callable[[str], None]
) -> int:
    """Delete what no version names and, with a retention, what only versions name that it lets go.

    Args:
        run: the run that is ending, which has no summary on record yet.
        committed: whether it committed anything.
        say: told in a line why no version is let go, where that cannot be decided.

    Returns:
        Number of files deleted.

    Raises:
        ConflictError: another driver committed since this one opened. Nothing was deleted.
        StoreError: the records cannot be read. Nothing was deleted.
    """
    if retention is None:
        return dataset.vacuum()
    try:
        kept = _kept(dataset, retention, run, committed)
    except _UnknownError as unknown:
        say(str(unknown))
        event("retention_waits", logging.WARNING, run=run, output=dataset.output, error=str(unknown))
        return dataset.vacuum()
    return dataset.vacuum(_hours(retention), kept)


def due(dataset: CuratedDataset, retention: Retention) -> bool:
    """Whether there is a file that only versions name that go."""
    try:
        return bool(dataset.replaced(_hours(retention), _kept(dataset, retention)))
    except _UnknownError:  # the next run that has work says so
        return False


def _hours(retention: Retention) -> float:
    return 24 * (retention.days or 0)


class _UnknownError(Exception):
    """A record among those that count does not tell what its run left."""


def _kept(
    dataset: CuratedDataset, retention: Retention, run: str | None = None, committed: bool = False
) -> list[Mapping[str, int]]:
    """The versions by table that the newest runs left which committed anything, but for what is there now, which stays
    anyhow; it counts as one of them where this run committed it.

    A run that committed nothing left what the one before it left; not surely, where that one or it did not end well:
    then its version stays, too, and does not count.

    Raises:
        _UnknownError: naming the record.
    """
    wanted, counted = retention.versions or 0, int(committed)
    kept: list[Mapping[str, int]] = []
    if counted >= wanted:
        return kept
    now = dataset.versions()
    # Those that ended before they began have no versions, and changed nothing.
    records = (
        one for one in dataset.each_run() if one.run != run and (one.ended is None or one.details.get("versions"))
    )
    for record, before in itertools.pairwise(itertools.chain(records, [None])):
        if record is None or counted >= wanted:
            break
        left = _left(dataset, record)
        if not left or (record.shards == 0 and _ended_well(record) and _ended_well(before)):
            continue
        counted += record.shards > 0
        if left != now and left not in kept:
            kept.append(left)
    return kept


def _left(dataset: CuratedDataset, record: RunRecord) -> Mapping[str, int]:
    """The versions that a run left; none where it died."""
    left: Any = record.details.get("versions", {})
    known = isinstance(left, dict) and (not left or left.keys() == DIRECTORIES.keys())
    if record.torn or not known:
        raise _UnknownError(
            f"{dataset.output}/_runs/{record.run}/{SUMMARY}: is no run's record, so no old version is let go. Remove "
            "the file to go on without what it may name"
        )
    return dict(left)


def _ended_well(record: RunRecord | None) -> bool:
    return record is not None and record.outcome == DONE
