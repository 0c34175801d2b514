"""Make a report of one version of a dataset, compared with another where there is one."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from capfilt.dataset import CuratedDataset
from capfilt.errors import DatasetError, InputError
from capfilt.records import RunRecord, earlier
from capfilt.report.drift import Alarm, alarms
from capfilt.report.gallery import choose_rows
from capfilt.report.judged import Judged, find_truth, judge_scores
from capfilt.report.page import Page
from capfilt.report.pictures import Budget, Pictures
from capfilt.report.statistics import Statistics, measure, tallied
from capfilt.report.tally import Tally
from capfilt.spec import Truth
from capfilt.spec.cards import Unit

RUNS = 20
"""So many of the newest runs are shown."""


@dataclass(frozen=True)
class Limits:
    """What a report may cost.

    Attributes:
        rows: of a larger dataset's newest version, whole shards of about so many rows are looked at; None is all.
        image_bytes, image_files: of image columns, and of files, that are read for pictures.
        gallery_bytes: of the gallery in the page.
    """

    rows: int | None = None
    image_bytes: int = 2**30
    image_files: int = 128
    gallery_bytes: int = 7_500_000


AT_END = Limits(rows=200_000, image_bytes=64 * 2**20, image_files=16)
"""Of a report at the end of a run, which is not to wait for long."""


@dataclass(frozen=True)
class Report:
    """A page and what it is about.

    Attributes:
        html: the page, UTF-8, at most capfilt.report.page.MOST bytes.
        version: of the annotations.
        against: the version that it is compared with; None if with none.
        other: the dataset which that version is of; None if it is the same.
        rows: that were looked at.
        alarms: those of the page.
    """

    html: bytes
    version: int
    against: int | None
    other: str | None
    rows: int
    alarms: tuple[Alarm, ...]


def make_report(
    dataset: CuratedDataset,
    options: Mapping[str, Any],
    *,
    version: int | None = None,
    against: int | CuratedDataset | None = None,
    truth: Truth | None = None,
    limits: Limits = Limits(),
) -> Report:
    """Make the page.

    Args:
        options: the storage options that the dataset was opened with.
        version: the newest if not given.
        against: another one to compare with, or another dataset, whose newest it is; the one that the run before left,
            if not given.
        truth: which texts are true. That of a toy web is found beside the input.
        limits: what it may cost.

    Raises:
        DatasetError: there is no such version, or its files are gone.
        InputError: the truth that was given cannot be read, or knows none of the texts.
    """
    number = dataset.versions()["annotations"] if version is None else version
    if isinstance(against, int):
        dataset.annotations(against)  # refused at once where there is none
    records = {record.run: record for record in dataset.runs()}
    shards = None if version is not None else _sample(dataset, limits.rows)
    with tallied(dataset, number, shards) as tally:
        now = measure(tally, number, records)
        known = truth or find_truth(now.rule.spec)
        judged, truth_note = _judged(tally, known, now.rule.unit, must=truth is not None)
        rows = choose_rows(tally, now.rule.thresholds)
    now = replace(now, judged=judged)
    known = known if judged else None
    before: Statistics | None
    if isinstance(against, CuratedDataset):
        before, before_note = _newest(against, limits.rows, known), ""
    else:
        before, before_note = _before(dataset, records, number, against, shards, known)
    budget = Budget(limits.image_bytes, limits.image_files)
    page = Page(
        dataset=dataset.output,
        all_rows=None if shards is None else sum(state.rows for state in dataset.committed().values()),
        now=now,
        before=before,
        other=against.output if isinstance(against, CuratedDataset) else None,
        before_note=before_note,
        truth_note=truth_note,
        rows=rows,
        pictures=Pictures(dataset, number, now.rule.spec, options, budget).find(rows),
        gallery_bytes=limits.gallery_bytes,
        runs=[one for one in records.values() if one.details.get("seconds") and (one.version or 0) <= number][:RUNS],
        made=datetime.now(UTC),
    )
    return Report(
        html=page.html(),
        version=number,
        against=before.version if before else None,
        other=page.other,
        rows=now.outcome.counts.rows,
        alarms=tuple(alarms(now, before)),
    )


def _sample(dataset: CuratedDataset, rows: int | None) -> list[str] | None:
    """Whole shards of about so many rows, whichever their names' checksums say; None where that is all."""
    if rows is None:
        return None
    left, committed = rows, dataset.committed()
    chosen: list[str] = []
    for shard in sorted(committed, key=lambda name: (zlib.crc32(name.encode()), name)):
        if left <= 0:
            return chosen
        chosen.append(shard)
        left -= committed[shard].rows
    return None


# --- the version to compare with ---


def _before(
    dataset: CuratedDataset,
    records: Mapping[str, RunRecord],
    number: int,
    against: int | None,
    shards: Sequence[str] | None,
    truth: Truth | None,
) -> tuple[Statistics | None, str]:
    """Another version of the dataset; or None, and why."""
    asked = against
    if against is None:
        against = earlier(number, [left for record in records.values() if (left := record.version) is not None])
    if against is None:
        return None, "There is none: no run before this one is on record."
    try:
        return _compared(dataset, records, against, shards, truth), ""
    except DatasetError as error:
        if asked is not None:
            raise
        return None, f"Version {against} cannot be read any more: {error}"


def _newest(other: CuratedDataset, rows: int | None, truth: Truth | None) -> Statistics:
    """The newest version of another dataset."""
    records = {record.run: record for record in other.runs()}
    return _compared(other, records, other.versions()["annotations"], _sample(other, rows), truth)


def _compared(
    dataset: CuratedDataset,
    records: Mapping[str, RunRecord],
    number: int,
    shards: Sequence[str] | None,
    truth: Truth | None,
) -> Statistics:
    with tallied(dataset, number, shards) as tally:
        found = measure(tally, number, records)
        return replace(found, judged=_judged(tally, truth, found.rule.unit, must=False)[0])


# --- the truth ---


def _judged(tally: Tally, truth: Truth | None, unit: Unit | None, *, must: bool) -> tuple[dict[str, Judged], str]:
    """The scores against the truth; or nothing, and why, unless they must be."""
    if truth is None:
        return {}, "No truth is known of these images. Give labels with --truth."
    try:
        return judge_scores(tally, truth, unit), ""
    except InputError as error:
        if must:
            raise
        return {}, f"The truth that lies beside the input is of no use: {error}"
