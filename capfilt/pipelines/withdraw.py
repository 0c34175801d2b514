"""Withdrawn rows taken out of what is committed. It imports neither torch nor ray.

The unit is a committed annotations file. Of a withdrawn row its place stays, its status `dropped`, its reason and the
digests of its URL and key. Files of pairs and quarantine that hold none of them stay as they are; others are copied
without. Nothing is judged, and of the input nothing is read: it may be gone.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.dataset import DataFile, Provenance
from capfilt.errors import InputError
from capfilt.fingerprints import with_withdrawn
from capfilt.inputs import Opened
from capfilt.pipelines.earlier import read_annotations, table_url
from capfilt.pipelines.job import Job
from capfilt.pipelines.output import Output
from capfilt.receipts import Receipt
from capfilt.schema import ANNOTATION_FILE_SCHEMA, ANNOTATIONS, PAIRS, QUARANTINE, Reason, Status
from capfilt.stores import one_line
from capfilt.withdrawn import note_of

if TYPE_CHECKING:
    from capfilt.pipelines.redecide import Redecision

_ROWS = 16_384
"""Of annotations, written as one row group."""

_STAYS = {
    "row",
    "seed",
    "generation",
    "caption_fingerprint",
    "score_fingerprint",
    "decide_fingerprint",
    "input_id",
    "run",
}


def withdraw(job: Job, work: Redecision) -> Receipt:
    """Take withdrawn rows out of the files of one annotations file.

    Returns:
        The stored receipt; one with `failure` where something cannot be read just now.

    Raises:
        StoreError: the output cannot be written.
    """
    seconds: dict[str, float] = defaultdict(float)
    try:
        begin = time.perf_counter()
        before = read_annotations(job, work.annotations.path)
        seconds["read"] += time.perf_counter() - begin
        begin = time.perf_counter()
        with Output(job, work, withdrawn_from(work.was, work.withdrawn, job.run)) as out:
            table = _blanked(before, work.withdrawn)
            _count(out, table)
            for start in range(0, table.num_rows, _ROWS):
                out.writer(ANNOTATIONS).write(table.slice(start, _ROWS))
            seconds["write"] += time.perf_counter() - begin
            begin = time.perf_counter()
            lost = _lost(before, table)
            for name, file, status in ((PAIRS, work.pairs, Status.KEPT), (QUARANTINE, work.quarantine, Status.ERROR)):
                if file and lost[status]:
                    copied = _copy(job, work, out, name, file)
                    out.copied += copied if name == PAIRS else 0
                elif file:
                    out.stays(name, file)
            seconds["pairs"] += time.perf_counter() - begin
            return out.finish(seconds)
    except InputError as error:
        return job.failed(work, str(error))


def withdrawn_from(was: Provenance, rows: tuple[int, ...], run: str) -> Provenance:
    """Of a shard once these rows of it are withdrawn: made from and with what it was, whatever the spec says now."""
    return replace(was, decide_fingerprint=with_withdrawn(was.decide_fingerprint, rows), run=run)


def _blanked(table: pa.Table, rows: tuple[int, ...]) -> pa.Table:
    """Annotations without what the withdrawn among them held."""
    named = pc.is_in(table["row"], value_set=pa.array(rows, pa.int64()))
    if not pc.any(named).as_py():
        return table
    texts = ANNOTATION_FILE_SCHEMA.field("texts").type
    left: dict[str, Any] = {
        "status": pa.scalar(Status.DROPPED, pa.string()),
        "reason": pa.scalar(Reason.WITHDRAWN, pa.string()),
        "note": pa.array(_notes(table, named), pa.string()),
        "texts": pa.scalar([], texts),
    }
    for number, field in enumerate(ANNOTATION_FILE_SCHEMA):
        if field.name not in _STAYS:
            column = table[field.name].combine_chunks()
            blank = left.get(field.name, pa.scalar(None, field.type))
            table = table.set_column(number, field.name, pc.if_else(named.combine_chunks(), blank, column))
    return table


def _notes(table: pa.Table, named: pa.ChunkedArray) -> Iterator[str | None]:
    """The notes of withdrawn rows; those of rows withdrawn before stay."""
    columns = (table[name].to_pylist() for name in ("url", "key", "note", "reason"))
    for mine, url, key, note, reason in zip(named.to_pylist(), *columns, strict=True):
        yield note_of(url, key) if mine and reason != Reason.WITHDRAWN else note


def _lost(before: pa.Table, table: pa.Table) -> Counter[str]:
    """How many rows were withdrawn, by the status that they had."""
    changed = pc.not_equal(before["status"], table["status"])
    return Counter(before["status"].filter(changed).to_pylist())


def _count(out: Output, table: pa.Table) -> None:
    texts = table["texts"].combine_chunks()
    flat = texts.flatten()
    names = ("source", "reason")
    verdicts = iter(list(zip(*(pc.struct_field(flat, name).to_pylist() for name in names), strict=True)))
    lengths = pc.list_value_length(texts).to_pylist()
    for status, reason, length in zip(table["status"].to_pylist(), table["reason"].to_pylist(), lengths, strict=True):
        out.count(Status(status), reason, [next(verdicts) for _ in range(length)])


def _copy(job: Job, work: Redecision, out: Output, table: str, file: DataFile) -> int:
    """Copy a file of pairs or quarantine without the withdrawn rows; how many it then has."""
    opened, withdrawn = Opened(table_url(job, table, file.path), job.spec.output_options), frozenset(work.withdrawn)
    copied = 0
    try:
        with opened as parquet:
            for batch in parquet.iter_batches(64, use_threads=False):
                for row in batch.to_pylist():
                    if row["row"] not in withdrawn:
                        out.writer(table).append(row, 500 + len(row["image"]))
                        copied += 1
    except (InputError, MemoryError):
        raise
    except Exception as error:  # every store raises its own kinds
        if opened.failed is None and not isinstance(error, (pa.ArrowException, OSError)):
            raise  # the output's, or a fault of ours
        raise InputError(f"{opened.path}: cannot be read: {one_line(opened.failed or error)}") from error
    return copied
