"""What comes out of a fragment: its rows' fates, three files under one name, a receipt. It imports no torch."""

from __future__ import annotations

import os
import socket
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from capfilt.dataset import DIRECTORIES, Counts, DataFile, Provenance
from capfilt.decide import Text, best_text
from capfilt.errors import InputError
from capfilt.fragments import Row
from capfilt.pipelines.job import Job, Work
from capfilt.receipts import Receipt, store
from capfilt.schema import ANNOTATIONS, PAIRS, QUARANTINE, SHARD, Reason, Status
from capfilt.withdrawn import note_of
from capfilt.writer import ParquetWriter


@dataclass(slots=True)
class Item:
    """A row on its way through the worker.

    Attributes:
        texts: the web's, then the captioners'.
        prepared: by the model that looked at the whole picture, what it made of it.
        captions: how many of them captioners wrote in this run.
        status: None while it has yet to meet the models.
    """

    row: Row
    sha256: str | None = None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    texts: list[Text] = field(default_factory=list)
    prepared: dict[object, Any] = field(default_factory=dict)
    captions: int = 0
    status: Status | None = None
    reason: Reason | None = None
    detail: str | None = None
    perceptual_hash: bytes | None = None
    unsafe: float | None = None

    @classmethod
    def withdrawn(cls, row: Row) -> Item:
        """What is left of a row that its owner withdrew."""
        return cls(Row(row.row, note=note_of(row.url, row.key)), status=Status.DROPPED, reason=Reason.WITHDRAWN)

    def fail(self, reason: Reason, detail: str) -> None:
        """Record an error."""
        self.status, self.reason, self.detail = Status.ERROR, reason, detail[:500]


class Output:
    """The three files of one attempt at a fragment, under names no one else uses."""

    def __init__(self, job: Job, work: Work, provenance: Provenance | None = None) -> None:
        """`provenance` is the rows' own where they are not made anew."""
        self.job, self.work = job, work
        self.provenance = provenance or job.provenance(work.file.input_id, work.withdrawn)
        self.counts: Counter[Status] = Counter()
        self.reasons: Counter[str] = Counter()
        self.captions = self.images = self.copied = 0  # see Receipt
        name = f"{work.start}-{work.stop}-{job.run}-{uuid.uuid4().hex[:8]}.parquet"
        self._path = f"{SHARD}={work.file.shard}/{name}"
        self._writers: dict[str, ParquetWriter] = {}
        self._staying: dict[str, DataFile] = {}
        self.constant: dict[str, Any] = asdict(self.provenance)
        if provenance is None:
            self.constant["seed"] = job.spec.sampling.seed

    def __enter__(self) -> Output:
        self.writer(ANNOTATIONS)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for writer in self._writers.values():
                writer.abandon()

    def writer(self, table: str) -> ParquetWriter:
        """The file of a table, begun on first use."""
        if table not in self._writers:
            spec = self.job.spec
            url = f"{spec.output}/{DIRECTORIES[table]}/{self._path}"
            self._writers[table] = ParquetWriter(table, url, spec.output_options, self.constant)
        return self._writers[table]

    def stays(self, table: str, file: DataFile) -> None:
        """A committed file that holds what a new one would."""
        self._staying[table] = file

    def count(self, status: Status, reason: str | None, verdicts: Iterable[tuple[str, str | None]]) -> None:
        """Count a row, and its texts by source and reason."""
        self.counts[status] += 1
        self.reasons[reason or Status.KEPT] += 1
        self.reasons.update(f"{source}:{why or Status.KEPT}" for source, why in verdicts)

    def append(self, item: Item) -> None:
        """Add a row whose fate is known."""
        row, image = item.row, item.row.image
        if item.status is None:
            raise RuntimeError(f"{self.work.name}: row {row.row} has no status")
        self.count(item.status, item.reason, [(text.source, text.reason) for text in item.texts])
        self.images += image is not None
        self.captions += item.captions
        identity = {"row": row.row, "key": row.key, "url": row.url}
        picture = {
            "format": item.format,
            "width": item.width,
            "height": item.height,
            "image_sha256": item.sha256,
        }
        outcome = {
            "status": item.status,
            "reason": item.reason,
            "detail": item.detail,
            "note": row.note if image is None else None,
            "texts": [_text_record(text) for text in item.texts],
        }
        self.writer(ANNOTATIONS).append(
            {
                **identity,
                **picture,
                "image_bytes": None if image is None else len(image),
                "source_sha256": row.sha256,
                "perceptual_hash": item.perceptual_hash,
                "unsafe": item.unsafe,
                "duplicate_of": None,  # found once all shards are there
                "generation": self.job.generation,
                **outcome,
            },
            _bytes(item.texts),
        )
        if item.status is Status.KEPT and image is not None:
            self.append_pair({**identity, **picture}, item.texts, image)
        elif item.status is Status.ERROR and image is not None:
            cap = self.job.spec.images.quarantine_bytes
            unusable = {"reason": item.reason, "detail": item.detail, "image_bytes": len(image), "image": image[:cap]}
            self.writer(QUARANTINE).append({**identity, **unusable}, 300 + min(cap, len(image)))

    def append_pair(self, about: Mapping[str, Any], texts: Sequence[Text], image: bytes) -> None:
        """Add the pair of a row that is kept; `about` holds the columns of its identity and its picture."""
        captions = [
            {"text": text.text, "source": text.source, "captioner": text.captioner, "itm": text.itm}
            for text in texts
            if text.kept
        ]
        pair = {**about, "image": image, "text": best_text(texts).text, "captions": captions}
        self.writer(PAIRS).append(pair, _bytes(texts) + len(image))

    def finish(self, seconds: dict[str, float], on_models: tuple[float, float] | None = None) -> Receipt:
        """Close the files and store the receipt: from here on the work is not lost.

        Raises:
            InputError: not every row of the fragment was appended.
        """
        work = self.work
        if sum(self.counts.values()) != work.rows:
            raise InputError(f"{work.file.path}: {sum(self.counts.values())} rows read of {work.rows}")
        kept, dropped, errors = (self.counts[status] for status in (Status.KEPT, Status.DROPPED, Status.ERROR))
        about = {ANNOTATIONS: (errors, kept)}
        files = {
            table: DataFile(self._path, writer.rows, writer.close(), *about.get(table, ()))
            for table, writer in self._writers.items()
        } | self._staying
        receipt = Receipt(
            shard=work.file.shard,
            start=work.start,
            stop=work.stop,
            file_rows=work.file_rows,
            provenance=self.provenance,
            worker=f"{socket.gethostname()}:{os.getpid()}",
            counts=Counts(kept, dropped, errors),
            annotations=(files[ANNOTATIONS],),
            pairs=(files[PAIRS],) if PAIRS in files else (),
            quarantine=(files[QUARANTINE],) if QUARANTINE in files else (),
            reasons=dict(self.reasons),
            stage=self.job.stage,
            captions=self.captions,
            images=self.images,
            copied=self.copied,
            seconds={stage: round(spent, 6) for stage, spent in seconds.items()},
            on_models=on_models,
        )
        store(receipt, self.job.spec.output, self.job.spec.output_options)
        return receipt


def _bytes(texts: Sequence[Text]) -> int:
    """About what a row with these texts takes, without its image."""
    return 200 + sum(len(text.text or "") + 50 + 30 * len(text.scores) for text in texts)


def _text_record(text: Text) -> dict[str, Any]:
    """A text as schema.TEXT_STRUCT holds it."""
    return {
        "source": text.source,
        "captioner": text.captioner,
        "candidate": text.candidate,
        "text": text.text,
        "itm": text.itm,
        "itc": text.itc,
        "scores": [{"filter": score.filter, "itm": score.itm, "itc": score.itc} for score in text.scores],
        "kept": text.kept,
        "reason": text.reason,
    }
