"""What an earlier run recorded of rows, read back from the annotations. It imports neither torch nor ray."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.dataset import DIRECTORIES
from capfilt.decide import FilterScore, Text
from capfilt.errors import InputError
from capfilt.fragments import Fragment
from capfilt.inputs import read_parquet
from capfilt.pipelines.job import Job
from capfilt.schema import ANNOTATIONS, Reason, Source, Status
from capfilt.text import clean

_COLUMNS = ["row", "format", "width", "height", "image_sha256", "status", "reason", "detail", "texts"]


@dataclass(frozen=True, slots=True)
class Earlier:
    """A row as it was annotated.

    Attributes:
        captions: what each captioner wrote, in order, not scored; none where the row met no captioner.
    """

    format: str | None
    width: int | None
    height: int | None
    sha256: str | None
    status: Status
    reason: Reason | None
    detail: str | None
    captions: list[Text]


def table_url(job: Job, table: str, path: str) -> str:
    """Where a committed file of a table lies."""
    return f"{job.spec.output}/{DIRECTORIES[table]}/{path}"


def read_annotations(job: Job, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One committed annotations file.

    Raises:
        InputError: it cannot be read.
    """
    url = table_url(job, ANNOTATIONS, path)
    return read_parquet(url, job.spec.output_options, lambda parquet: parquet.read(columns, use_threads=False))


def read_earlier(job: Job, fragment: Fragment) -> dict[int, Earlier]:
    """What is on record of every row of a fragment, by row.

    Raises:
        InputError: a file cannot be read, or does not hold what the spec's captioners write.
    """
    found: dict[int, Earlier] = {}
    expected = len(job.spec.captioners) * job.spec.sampling.candidates
    for path in fragment.annotations:
        table = read_annotations(job, path, _COLUMNS)
        inside = pc.and_(pc.greater_equal(table["row"], fragment.start), pc.less(table["row"], fragment.stop))
        table = table.filter(inside)
        texts = texts_of(table["texts"])
        columns = (table[name].to_pylist() for name in _COLUMNS[:-1])
        for row, form, width, height, sha256, status, reason, detail, own in zip(*columns, texts, strict=True):
            captions = [Text(text.source, text.candidate, text.text, text.clean, text.captioner) for text in own[1:]]
            met_no_model = status == Status.ERROR or reason in (Reason.NO_IMAGE, Reason.WITHDRAWN)
            if len(captions) != expected and (captions or not met_no_model):
                raise InputError(
                    f"{table_url(job, ANNOTATIONS, path)}: row {row} has {len(captions)} captions where the spec's "
                    f"captioners write {expected}; curate into a new output"
                )
            why = None if reason is None else Reason(reason)
            found[row] = Earlier(form, width, height, sha256, Status(status), why, detail, captions)
    if len(found) != fragment.rows:
        raise InputError(f"{fragment.name}: {len(found)} of {fragment.rows} rows are annotated; run again")
    return found


def texts_of(column: pa.ChunkedArray) -> list[list[Text]]:
    """The texts of each row of an annotations' `texts` column, scored as they were, not judged."""
    rows = column.combine_chunks()
    texts = rows.flatten()
    scores = pc.struct_field(texts, "scores")
    columns = (pc.struct_field(scores.flatten(), name).to_pylist() for name in ("filter", "itm", "itc"))
    judged = iter(list(map(FilterScore, *columns)))
    names = ("source", "candidate", "text", "captioner")
    sources, candidates, words, captioners = (pc.struct_field(texts, name).to_pylist() for name in names)
    made = iter(
        [
            Text(
                Source.WEB if source == Source.WEB else Source.SYNTHETIC,
                candidate,
                text,
                clean(text) if text else "",
                captioner,
                tuple(itertools.islice(judged, count)),
            )
            for source, candidate, text, captioner, count in zip(
                sources, candidates, words, captioners, pc.list_value_length(scores).to_pylist(), strict=True
            )
        ]
    )
    return [list(itertools.islice(made, count)) for count in pc.list_value_length(rows).to_pylist()]
