"""Decisions made anew from the scores on record: a new threshold or rule. It imports neither torch nor ray.

The unit is a committed annotations file. Its rows are judged again by capfilt.decide and written to a new one. Where
the same texts are kept as before, the pairs file stays as it is and no image is read; else a new one is written: bytes
of rows that were kept come from the old one, of those newly kept from the input, whose other row groups are not read.
Rows in error, those without an image and those withdrawn are as they were; so is the quarantine. Rows that are dropped
as copies of others stay that, unless the unit says which are.
"""

from __future__ import annotations

import bisect
import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.dataset import DataFile, Provenance, ShardFiles
from capfilt.decide import Text, withheld
from capfilt.duplicates import Copy
from capfilt.errors import DatasetError, InputError, StoreError
from capfilt.fragments import read_footer, read_rows
from capfilt.inputs import InputFile, Opened, renew
from capfilt.pipelines.earlier import read_annotations, table_url, texts_of
from capfilt.pipelines.job import Job
from capfilt.pipelines.output import Output
from capfilt.pipelines.withdraw import withdraw
from capfilt.plan import Stage
from capfilt.receipts import Receipt
from capfilt.rules import Rules
from capfilt.schema import ANNOTATIONS, PAIRS, QUARANTINE, ROW_STRUCT, TEXT_STRUCT, Reason, Status
from capfilt.stores import one_line, persist

_ROWS = 4096
"""Rows judged at a time; bounds memory."""

_ABOUT = ["row", "key", "url", "format", "width", "height", "image_sha256"]


@dataclass(frozen=True, slots=True)
class Redecision:
    """Rows [start, stop) of a committed shard, those of one annotations file, to judge again.

    Attributes:
        file: the input that they are rows of.
        pairs, quarantine: the committed files of the same rows; none where no row is kept, or unusable.
        was: what the shard was made from and with.
        withdrawn: rows of the shard that hold nothing any more, or (at that stage) are to hold nothing.
        decide: the fingerprint that its rows are to have; the job's, and what it says of copies.
        copies: the rows that are to be dropped as copies; None where those are that were.
    """

    file: InputFile
    start: int
    stop: int
    file_rows: int
    annotations: DataFile
    was: Provenance
    pairs: DataFile | None = None
    quarantine: DataFile | None = None
    withdrawn: tuple[int, ...] = ()
    decide: str | None = None
    copies: Mapping[int, Copy] | None = None

    def of_shard(self, decide: str, copies: Mapping[int, Copy] | None) -> Redecision:
        """With what is to be said of its shard's copies."""
        own = copies and {row: copies[row] for row in copies.keys() & set(range(self.start, self.stop))}
        return replace(self, decide=decide, copies=own)

    @property
    def rows(self) -> int:
        """How many they are."""
        return self.stop - self.start

    @property
    def name(self) -> str:
        """Unique within a run."""
        return f"{self.file.shard}/{self.start:09d}-{self.stop:09d}"


def redecisions(
    file: InputFile, files: ShardFiles, was: Provenance, withdrawn: tuple[int, ...] = ()
) -> list[Redecision]:
    """A committed shard, to judge again file by file.

    Raises:
        DatasetError: its pairs are not in files of the same rows as its annotations.
    """
    rows = sum(one.rows for one in files.annotations)
    pairs, quarantine = ({one.span: one for one in of} for of in (files.pairs, files.quarantine))
    work = [
        Redecision(
            file, *one.span, rows, one, was, pairs.pop(one.span, None), quarantine.pop(one.span, None), withdrawn
        )
        for one in files.annotations
        if one.span
    ]
    unlike = any(one.annotations.kept != (one.pairs.rows if one.pairs else 0) for one in work)
    if len(work) < len(files.annotations) or pairs or quarantine or unlike:
        raise DatasetError(
            f"shard {file.shard}: its pairs or quarantine are not in files of the same rows as its annotations: "
            f"another tool rewrote them. {renew(file.path)}"
        )
    return work


def redecide(job: Job, work: Redecision) -> Receipt:
    """Judge the rows of one annotations file again, or only take out those that are withdrawn.

    Returns:
        The stored receipt; one with `failure` where something cannot be read just now.

    Raises:
        StoreError: the output cannot be written.
    """
    do = withdraw if job.stage is Stage.WITHDRAW else _redecide
    return persist(partial(do, job, work), of=StoreError)  # half a file cannot be sent on


def _redecide(job: Job, work: Redecision) -> Receipt:
    seconds: dict[str, float] = defaultdict(float)
    if work.decide is not None:
        job = replace(job, fingerprints=replace(job.fingerprints, decide=work.decide))
    try:
        begin = time.perf_counter()
        table = read_annotations(job, work.annotations.path)
        seconds["read"] += time.perf_counter() - begin
        with Output(job, work) as out:
            judged, same = [], True
            for start in range(0, table.num_rows, _ROWS):
                begin = time.perf_counter()
                part, unchanged = _judge(job, work, out, table.slice(start, _ROWS))
                seconds["decide"] += time.perf_counter() - begin
                begin = time.perf_counter()
                out.writer(ANNOTATIONS).write(part)
                seconds["write"] += time.perf_counter() - begin
                judged.append(part)
                same = same and unchanged
            begin = time.perf_counter()
            if not same:
                _write_pairs(job, work, out, pa.concat_tables(judged), table["status"])
            elif work.pairs:
                out.stays(PAIRS, work.pairs)
            if work.quarantine:
                out.stays(QUARANTINE, work.quarantine)
            seconds["pairs"] += time.perf_counter() - begin
            return out.finish(seconds)
    except InputError as error:
        return job.failed(work, str(error))


# --- verdicts ---


def _judge(job: Job, work: Redecision, out: Output, table: pa.Table) -> tuple[pa.Table, bool]:
    """The rows with new verdicts, counted; and whether the same texts are kept as before."""
    rules, urls, unsafe = Rules(job.spec), table["url"].to_pylist(), table["unsafe"].to_pylist()
    old = table["texts"].combine_chunks()
    flat = old.flatten()
    was_kept = pc.struct_field(flat, "kept").to_pylist()
    was_because = pc.struct_field(flat, "reason").to_pylist()
    statuses, reasons = table["status"].to_pylist(), table["reason"].to_pylist()
    rows, copies = table["row"].to_pylist(), _copies(job, work, table)
    originals: list[dict[str, str | int] | None] = [None] * len(rows)
    kept: list[bool] = []
    because: list[str | None] = []
    for n, texts in enumerate(texts_of(table["texts"])):
        if statuses[n] == Status.ERROR or reasons[n] in (Reason.NO_IMAGE, Reason.WITHDRAWN):  # met no model
            own = slice(len(kept), len(kept) + len(texts))
            kept += was_kept[own]
            because += was_because[own]
        else:
            try:
                verdicts, statuses[n], reasons[n] = rules.judge(texts, urls[n], unsafe[n])
            except ValueError as error:
                where = f"{table_url(job, ANNOTATIONS, work.annotations.path)}: row {rows[n]}"
                raise InputError(f"{where} cannot be judged: {error}. {renew(work.file.path)}") from error
            if statuses[n] is Status.KEPT and (copy := copies.get(rows[n])):
                statuses[n], reasons[n] = Status.DROPPED, copy.reason
                originals[n] = {"shard": copy.shard, "row": copy.row}
                verdicts = withheld(verdicts, copy.reason)
            kept += [text.kept for text in verdicts]
            because += [text.reason for text in verdicts]
        why = because[len(because) - len(texts) :]
        out.count(Status(statuses[n]), reasons[n], zip([text.source for text in texts], why, strict=True))
    table = table.set_column(table.schema.names.index("texts"), "texts", _with_verdicts(old, kept, because))
    new = {"status": pa.array(statuses, pa.string()), "reason": pa.array(reasons, pa.string())}
    for name, values in {**new, "duplicate_of": pa.array(originals, ROW_STRUCT)}.items():
        table = table.set_column(table.schema.names.index(name), name, values)
    return table, kept == was_kept


def _copies(job: Job, work: Redecision, table: pa.Table) -> Mapping[int, Copy]:
    """The rows to drop as copies, where their texts match: as the unit says, else as they are on record."""
    if work.copies is not None or job.spec.duplicates is None:
        return work.copies or {}
    on_record = table.filter(pc.is_valid(table["duplicate_of"])).select(["row", "reason", "duplicate_of"]).to_pylist()
    return {one["row"]: Copy(Reason(one["reason"]), **one["duplicate_of"]) for one in on_record}


def _with_verdicts(rows: pa.ListArray, kept: Sequence[bool], because: Sequence[str | None]) -> pa.ListArray:
    """A `texts` column with other verdicts."""
    flat = rows.flatten()
    new = {"kept": pa.array(kept, pa.bool_()), "reason": pa.array(because, pa.string())}
    fields = [
        new[own.name] if own.name in new else pc.struct_field(flat, own.name).cast(own.type) for own in TEXT_STRUCT
    ]
    texts = pa.StructArray.from_arrays(fields, fields=list(TEXT_STRUCT))
    offsets = pc.cumulative_sum(pa.concat_arrays([pa.array([0], pa.int32()), pc.list_value_length(rows)]))
    return pa.ListArray.from_arrays(offsets, texts)


# --- pairs ---


def _write_pairs(job: Job, work: Redecision, out: Output, table: pa.Table, was: pa.ChunkedArray) -> None:
    """Write the pairs of the rows that are kept; `was` is their status before."""
    now, before = (pc.equal(status, Status.KEPT) for status in (table["status"], was))
    new = table.filter(pc.and_(now, pc.invert(before)))
    wanted = dict(zip(new["row"].to_pylist(), new["image_sha256"].to_pylist(), strict=True))
    fresh, old = _input_images(job, work, wanted), _pair_images(job, work)
    for start in range(0, table.num_rows, _ROWS):
        part = table.slice(start, _ROWS)
        part = part.filter(pc.equal(part["status"], Status.KEPT))
        for about, texts in zip(part.select(_ABOUT).to_pylist(), _judged(part["texts"]), strict=True):
            row = about["row"]
            image = next(fresh) if row in wanted else _image_of(row, old, job, work)
            out.append_pair(about, texts, image)
    out.images, out.copied = len(wanted), out.counts[Status.KEPT] - len(wanted)


def _judged(column: pa.ChunkedArray) -> Iterator[list[Text]]:
    """The texts of each row with their verdicts."""
    flat = column.combine_chunks().flatten()
    reasons = iter([reason and Reason(reason) for reason in pc.struct_field(flat, "reason").to_pylist()])
    for texts in texts_of(column):
        yield [text.judged(next(reasons)) for text in texts]


def _image_of(row: int, pairs: Iterator[tuple[int, bytes]], job: Job, work: Redecision) -> bytes:
    """The bytes of a row that was kept; `pairs` is read on to it."""
    for number, image in pairs:
        if number == row:
            return image
    where = table_url(job, PAIRS, work.pairs.path) if work.pairs else work.name
    raise InputError(f"{where}: row {row} is kept and is not there. {renew(work.file.path)}")


def _pair_images(job: Job, work: Redecision) -> Iterator[tuple[int, bytes]]:
    """(row, bytes) of the committed pairs, in order."""
    if work.pairs is None:
        return
    opened = Opened(table_url(job, PAIRS, work.pairs.path), job.spec.output_options)
    try:
        with opened as parquet:
            for batch in parquet.iter_batches(64, columns=["row", "image"], use_threads=False):
                yield from zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # every store raises its own kinds
        raise InputError(f"{opened.path}: cannot be read: {one_line(opened.failed or error)}") from error


def _input_images(job: Job, work: Redecision, wanted: dict[int, str]) -> Iterator[bytes]:
    """The input's bytes of the wanted rows, in order; of the row groups that hold them, up to the last one each.

    Args:
        wanted: by row, in order, what the image's sha256 was.

    Raises:
        InputError: the input cannot be read, or holds something else than what was scored.
    """
    source, rows, begin = job.spec.input, list(wanted), 0
    if not rows:
        return
    footer = read_footer(work.file, source.columns, source.storage_options)
    for size in footer.row_groups:
        mine = rows[bisect.bisect_left(rows, begin) : bisect.bisect_left(rows, begin + size)]
        begin += size
        if not mine:
            continue
        part = footer.fragment(work.file, mine[0], mine[-1] + 1)
        for row in read_rows(part, source.storage_options):
            if row.row not in wanted:
                continue
            if row.image is None or hashlib.sha256(row.image).hexdigest() != wanted[row.row]:
                what = "cannot be read" if not row.readable else "is not the image that was scored"
                raise InputError(f"{work.file.path}: row {row.row} {what}{f': {row.note}' if row.note else ''}")
            yield row.image
    if rows[-1] >= begin:
        raise InputError(f"{work.file.path}: ends at row {begin}, and row {rows[-1]} was scored; run again")
