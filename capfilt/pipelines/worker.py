"""The worker: reads, decodes, captions, scores, decides and writes a fragment. It imports no ray.

    for fragment in fragments:
        receipts = Worker(job).process(fragment)

is the whole run in a plain loop; Ray Data runs the same class in an actor pool (pipelines/curate.py). Two calls may run
in one worker at a time: one reads and decodes while the other holds the device.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import socket
import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import TypeAdapter

from capfilt.dataset import DIRECTORIES, Counts, DataFile, Provenance
from capfilt.decide import FilterScore, Text, as_stored, best_text, decide, row_outcome
from capfilt.errors import CapfiltError, CheckpointError, ImageError, InputError, SpecError
from capfilt.fingerprints import Fingerprints, run_fingerprints
from capfilt.fragments import Fragment, Row, read_rows
from capfilt.images import decode
from capfilt.models.preprocess import resize
from capfilt.models.upload import Upload
from capfilt.pipelines.attempts import Attempts
from capfilt.receipts import Receipt, store
from capfilt.schema import ANNOTATIONS, PAIRS, QUARANTINE, SHARD, Reason, Source, Status
from capfilt.spec import CaptionerCard, CurateSpec, FilterCard
from capfilt.text import clean
from capfilt.writer import ParquetWriter

DEATHS_BEFORE_SPLIT = 2
"""A fragment whose worker died so often is split."""

PARTS = 16
"""Into so many parts, each again, until a row stands alone: 1,000 rows take three levels."""

LOAD_DEATHS = 3
"""Deaths in a row while loading the models, beyond as many loads as there may be actors, that end the run."""

LOST_ROWS_LIMIT = 8
"""Rows of one fragment isolated one by one; beyond, a part that dies is recorded whole: the file is hostile."""

AHEAD = 3
"""Batches of one call being decoded while another is on the device."""

SCRATCH_BYTES = 12 * 2**20
"""An image of 4 Mpx; larger ones take fresh memory."""

_RECEIPTS = TypeAdapter(list[Receipt])


class Captioner(Protocol):
    """Writes captions. See capfilt.models.captioner.Captioner.

    Attributes:
        image_size: S.
        batch_size: images that it takes at a time; more are no gain.
    """

    image_size: int

    @property
    def batch_size(self) -> int: ...

    def caption(self, images_BCHW: torch.Tensor, sha256: Sequence[str]) -> list[list[str]]:
        """For each image of uint8 [B, 3, S, S], its candidates in order."""
        ...


class Filter(Protocol):
    """Scores texts. See capfilt.models.itm.ItmFilter.

    Attributes:
        image_size, batch_size: as a captioner's.
    """

    image_size: int

    @property
    def batch_size(self) -> int: ...

    def score(
        self, images_BCHW: torch.Tensor, texts: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[tuple[float, float]]]:
        """For each image, for each of its texts, (P(match), cosine similarity)."""
        ...


Models = tuple[Sequence[Captioner], Sequence[Filter]]

LoadModels = Callable[[CurateSpec, str], Models]
"""Makes the models of a spec's cards, in their order, on a device ("cpu", "cuda"); called once in each worker."""


def load_models(spec: CurateSpec, device: str) -> Models:
    """Load the captioners and filters that the spec's cards name.

    Raises:
        CheckpointError: a checkpoint cannot be found, trusted or loaded.
        SpecError: a card or the sampling asks for more than its checkpoint can do; names the card.
    """
    from capfilt.models.captioner import Captioner as BlipCaptioner  # transformers loads where models do
    from capfilt.models.itm import ItmFilter

    captioners, filters = [], []
    for captioner in spec.captioners:
        with _named(captioner):
            captioners.append(BlipCaptioner(captioner, spec.sampling, device))
    for filter_ in spec.filters:
        with _named(filter_):
            filters.append(ItmFilter(filter_, device))
    return captioners, filters


@contextmanager
def _named(card: CaptionerCard | FilterCard) -> Iterator[None]:
    """The network knows neither the card's name nor its place in the spec."""
    try:
        yield
    except SpecError as error:
        raise SpecError(f"{card.role} {card.name}: {error}") from error


class DeviceLostError(CapfiltError):
    """The accelerator gave an error after which nothing in this process can use it; no row is to blame yet."""


def _device_is_lost(error: Exception) -> bool:
    """A CUDA error sticks to its process, out of memory excepted; every later call fails, whatever the row."""
    lost = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
    return lost and not isinstance(error, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Job:
    """What every worker of a run is given."""

    spec: CurateSpec
    fingerprints: Fingerprints
    run: str

    def provenance(self, input_id: str) -> Provenance:
        """Of rows this run makes from an input file."""
        fp = self.fingerprints
        return Provenance(
            input_id=input_id,
            caption_fingerprint=fp.caption,
            score_fingerprint=fp.score,
            decide_fingerprint=fp.decide,
            run=self.run,
        )


@dataclass(slots=True)
class _Item:
    """A row on its way through the worker."""

    row: Row
    sha256: str | None = None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    texts: list[Text] = field(default_factory=list)
    status: Status | None = None  # None while it has yet to meet the models
    reason: Reason | None = None
    detail: str | None = None

    def fail(self, reason: Reason, detail: str) -> None:
        self.status, self.reason, self.detail = Status.ERROR, reason, detail[:500]


class _Turns:
    """Shared and exclusive turns: work that killed a worker runs alone in its process, so that blame falls right."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._sharing = 0
        self._alone = False

    @contextmanager
    def turn(self, *, alone: bool) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._alone and not (alone and self._sharing))
            self._alone = alone
            self._sharing += not alone
        try:
            yield
        finally:
            with self._condition:
                self._alone = self._alone and not alone
                self._sharing -= not alone
                self._condition.notify_all()


_Buffers = dict[int, torch.Tensor]
"""Pixels by side S: of a batch uint8 [B, S, S, 3] (`resize`'s layout), of one of its rows uint8 [S, S, 3]."""


class _Scratch(threading.local):
    """Memory a decoding thread decodes and resizes into, image after image."""

    def __init__(self) -> None:
        self.pixels = np.empty(SCRATCH_BYTES, np.uint8)
        self.resized = torch.empty(SCRATCH_BYTES, dtype=torch.uint8)


class Worker:
    """Holds the models and curates fragments.

    Args:
        job: the run.
        load: makes the models; on first use, so that what goes wrong surfaces as that call's error.
        attempts: the ledger of what died; a run's workers share one.
        on_batch: called with images and seconds of each batch that was on the models.
    """

    def __init__(
        self,
        job: Job,
        load: LoadModels = load_models,
        attempts: Attempts | None = None,
        on_batch: Callable[[int, float], None] = lambda *_: None,
    ) -> None:
        self.job, self._on_batch = job, on_batch
        self.attempts = attempts or Attempts()
        self._load = load
        self._models: Models | None = None
        self._batch_size = 1  # images that all models take, once they are loaded
        self._upload = Upload("cpu")
        self._load_lock = threading.Lock()
        self._device_lock = threading.Lock()
        self._turns = _Turns()
        self._threads = max(1, math.floor(job.spec.placement.cpus))
        self._scratch = _Scratch()
        self._free: deque[_Buffers] = deque()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")

    # --- attempts and splitting ---

    def process(self, fragment: Fragment) -> list[Receipt]:
        """Curate a fragment, splitting it where its worker died, and store its receipts.

        Returns:
            Receipts that cover the fragment's rows exactly; one, unless it was split.
        """
        self.models()  # what fails here is no row's fault
        return self._process(fragment, fragment.name, DEATHS_BEFORE_SPLIT)

    def _process(self, fragment: Fragment, whole: str, patience: int) -> list[Receipt]:
        died, result = self.attempts.state(fragment.name)
        if result is not None:
            return _RECEIPTS.validate_json(result)
        if died < patience:
            with self._turns.turn(alone=died > 0 or fragment.name != whole):
                self.attempts.begin(fragment.name)
                receipts = [self.curate(fragment)]
        elif fragment.rows <= 1 or self.attempts.lost(whole) >= LOST_ROWS_LIMIT:
            receipts = [self._bury(fragment)]
            self.attempts.lose(whole, fragment.rows)
        else:
            receipts = [
                receipt
                for part in fragment.split(PARTS)
                for receipt in self._process(part, whole, DEATHS_BEFORE_SPLIT if part.rows == 1 else 1)
            ]
        self.attempts.end(fragment.name, _RECEIPTS.dump_json(receipts), whole)
        return receipts

    def _bury(self, fragment: Fragment) -> Receipt:
        """Record rows that kill their worker, with their texts if reading them is not what kills."""
        name = f"{fragment.name}/bury"
        died, _ = self.attempts.state(name)
        self.attempts.begin(name)
        detail = f"the worker died {DEATHS_BEFORE_SPLIT} times on this row alone"
        if fragment.rows > 1:
            detail = (
                f"the worker died on each of {LOST_ROWS_LIMIT} rows of this fragment, then on these {fragment.rows}"
            )
        bare = (Row(n) for n in range(fragment.start, fragment.stop))
        rows = bare if died else read_rows(fragment, self.job.spec.input.storage_options)
        with _Output(self.job, fragment) as out:
            for row in rows:
                item = _Item(row, texts=[_web_text(row)])
                item.fail(Reason.WORKER_DIED, detail)
                out.append(item)
            return out.finish({})

    # --- one fragment ---

    def models(self) -> Models:
        """The captioners and the filters, in the order of their cards; loaded on first use."""
        with self._load_lock:
            if self._models is None:
                self._models = self._load_models()
        return self._models

    def _load_models(self) -> Models:
        spec = self.job.spec
        device = "cuda" if spec.placement.gpus > 0 else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise CapfiltError(
                "placement.gpus is above 0 but this worker sees no CUDA device; install a CUDA build of torch, or set "
                + " and ".join(f"{at}.placement.gpus=0" for at, card in spec.cards.items() if card.placement.gpus)
            )
        if self._load is load_models and run_fingerprints(spec) != self.job.fingerprints:
            raise CheckpointError(
                f"{socket.gethostname()}: the checkpoints here are not those the driver has; copy them to every node"
            )
        if self.attempts.load_begins() > spec.placement.max_actors + LOAD_DEATHS:
            raise CapfiltError(
                f"workers died {LOAD_DEATHS} times or more while loading the models, most likely for want of memory: "
                "use machines with more, fewer actors on each (placement.cpus, placement.gpus), or smaller models"
            )
        torch.set_num_threads(self._threads)
        captioners, filters = self._load(spec, device)
        if (len(captioners), len(filters)) != (len(spec.captioners), len(spec.filters)):
            raise CapfiltError(
                f"{len(captioners)} captioners and {len(filters)} filters were made for the spec's "
                f"{len(spec.captioners)} and {len(spec.filters)} cards; `load` makes a model for each"
            )
        self._batch_size = min(*(one.batch_size for one in captioners), *(one.batch_size for one in filters))
        self._upload = Upload(device)
        self.attempts.load_ended()
        return captioners, filters

    def curate(self, fragment: Fragment) -> Receipt:
        """Curate one fragment: every row gets its status, in order.

        Returns:
            The stored receipt; one with `failure` where the input cannot be read just now.

        Raises:
            OSError: the output cannot be written.
        """
        self.models()
        seconds: dict[str, float] = defaultdict(float)
        on_models: list[float] = []
        try:
            with _Output(self.job, fragment) as out:
                for batch, buffers in self._decoded(fragment, seconds):
                    rows = [n for n, item in enumerate(batch) if item.status is None]
                    images = {size: self._upload.send(buffer, rows) for size, buffer in buffers.items()}
                    with self._device_lock:
                        self._upload.arrive()
                        on_models.append(time.time())
                        begin = time.perf_counter()
                        self._judge([batch[n] for n in rows], images)
                        spent = time.perf_counter() - begin
                        seconds["model"] += spent
                        on_models.append(time.time())
                        self._on_batch(len(rows), spent)
                    self._free.append(buffers)
                    begin = time.perf_counter()
                    for item in batch:
                        out.append(item)
                    seconds["write"] += time.perf_counter() - begin
                return out.finish(seconds, (on_models[0], on_models[-1]) if on_models else None)
        except InputError as error:
            file = fragment.file
            return Receipt(
                shard=file.shard,
                start=fragment.start,
                stop=fragment.stop,
                file_rows=fragment.file_rows,
                provenance=self.job.provenance(file.input_id),
                failure=str(error),
            )
        except Exception as error:
            if _device_is_lost(error):  # noticed while pixels were sent
                raise DeviceLostError(f"the device failed: {error}") from error
            raise

    def _decoded(self, fragment: Fragment, seconds: dict[str, float]) -> Iterator[tuple[list[_Item], _Buffers]]:
        """Batches of rows in order, decoded ahead in threads, and buffers that hold the n-th row's pixels at [n]."""
        size = self._batch_size
        waiting: deque[tuple[list[Future[tuple[_Item, float]]], _Buffers]] = deque()
        rows = read_rows(fragment, self.job.spec.input.storage_options, min(size, 32))
        more = True
        while more or waiting:
            begin = time.perf_counter()
            while more and len(waiting) < AHEAD:
                buffers, batch = self._buffers(), []
                for n, row in enumerate(itertools.islice(rows, size)):
                    batch.append(self._pool.submit(self._prepare, row, {side: b[n] for side, b in buffers.items()}))
                more = len(batch) == size
                if batch:
                    waiting.append((batch, buffers))
            seconds["read"] += time.perf_counter() - begin
            if waiting:
                begin = time.perf_counter()
                batch, buffers = waiting.popleft()
                wait(batch)  # wakes this thread once; result() alone does for every image
                done = [future.result() for future in batch]
                seconds["wait"] += time.perf_counter() - begin
                seconds["decode"] += sum(spent for _, spent in done)
                yield [item for item, _ in done], buffers

    def _buffers(self) -> _Buffers:
        """Memory for a batch, used again and again: fresh memory costs the kernel as much as copying does."""
        try:
            return self._free.pop()
        except IndexError:
            sizes = {model.image_size for models in self.models() for model in models}
            return {size: self._upload.memory((self._batch_size, size, size, 3)) for size in sizes}

    def _prepare(self, row: Row, pixels: _Buffers) -> tuple[_Item, float]:
        """Hash, decode and resize one row's image into `pixels`; what is wrong with it becomes its reason."""
        begin = time.perf_counter()
        item = _Item(row, texts=[_web_text(row)])
        if not row.readable:
            item.fail(Reason.UNREADABLE_ROW, row.note or "")
        elif row.image is None:
            item.status, item.reason = Status.DROPPED, Reason.NO_IMAGE
        else:
            item.sha256 = hashlib.sha256(row.image).hexdigest()
            try:
                picture = decode(row.image, self.job.spec.images, self._scratch.pixels)
                item.format, item.width, item.height = picture.format, picture.width, picture.height
                for size, slot in pixels.items():
                    resize(picture.rgb, size, slot, self._scratch.resized)
            except ImageError as error:
                item.fail(error.reason, error.detail)
        return item, time.perf_counter() - begin

    def _judge(self, items: list[_Item], images: _Buffers) -> None:
        """Caption, score and decide. A batch on which a model raises is halved until the row stands alone."""
        if not items:
            return
        try:
            self._caption_and_score(items, images)
        except Exception as error:  # recorded as the row's own error, once it is alone
            if _device_is_lost(error):
                raise DeviceLostError(f"the device failed: {error}") from error
            if len(items) == 1:
                items[0].texts = items[0].texts[:1]
                who = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
                items[0].fail(Reason.MODEL_ERROR, f"{who}{type(error).__name__}: {' '.join(str(error).split())}")
            else:
                half = len(items) // 2
                self._judge(items[:half], {size: batch[:half] for size, batch in images.items()})
                self._judge(items[half:], {size: batch[half:] for size, batch in images.items()})

    def _caption_and_score(self, items: list[_Item], images: _Buffers) -> None:
        spec, texts = self.job.spec, self._with_captions(items, images)
        # Texts that are the same after clean-up, of whichever captioner, are scored once.
        scores = self._scores([list(dict.fromkeys(text.clean for text in row if text.clean)) for row in texts], images)
        scored = [
            [replace(text, scores=own[text.clean]) if text.clean else text for text in row]
            for row, own in zip(texts, scores, strict=True)
        ]
        thresholds = spec.effective_thresholds
        verdicts = [decide(row, thresholds, spec.decision, spec.keep) for row in scored]
        for item, row in zip(items, verdicts, strict=True):  # once none can raise: a row has all of its fate or nothing
            item.texts = row
            item.status, item.reason = row_outcome(row)

    def _with_captions(self, items: list[_Item], images: _Buffers) -> list[list[Text]]:
        """The texts of each image: the web's, then those that each captioner writes."""
        sha256 = [item.sha256 or "" for item in items]
        texts = [item.texts[:1] for item in items]
        for card, captioner in zip(self.job.spec.captioners, self.models()[0], strict=True):
            with _noted(card):
                captions = captioner.caption(images[captioner.image_size], sha256)
            for row, candidates in zip(texts, captions, strict=True):
                row += [Text(Source.SYNTHETIC, k, text, clean(text), card.name) for k, text in enumerate(candidates)]
        return texts

    def _scores(self, texts: list[list[str]], images: _Buffers) -> list[dict[str, tuple[FilterScore, ...]]]:
        """For each image, what all filters think of each of its texts, which differ."""
        scores: list[dict[str, tuple[FilterScore, ...]]] = [dict.fromkeys(row, ()) for row in texts]
        for card, filter_ in zip(self.job.spec.filters, self.models()[1], strict=True):
            with _noted(card):
                judged = filter_.score(images[filter_.image_size], texts)
            for of_text, row, own in zip(scores, texts, judged, strict=True):
                for text, (itm, itc) in zip(row, own, strict=True):
                    of_text[text] += (FilterScore(card.name, as_stored(itm), as_stored(itc)),)
        return scores


@contextmanager
def _noted(card: CaptionerCard | FilterCard) -> Iterator[None]:
    """Add to what a model raises which of them it was."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{card.role} {card.name}")
        raise


def _web_text(row: Row) -> Text:
    return Text(Source.WEB, 0, row.text, clean(row.text) if row.text else "")


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


class _Output:
    """The three files of one attempt at a fragment, under names no one else uses."""

    def __init__(self, job: Job, fragment: Fragment) -> None:
        self.job, self.fragment = job, fragment
        self.counts: Counter[Status] = Counter()
        self.reasons: Counter[str] = Counter()
        name = f"{fragment.start}-{fragment.stop}-{job.run}-{uuid.uuid4().hex[:8]}.parquet"
        self._path = f"{SHARD}={fragment.file.shard}/{name}"
        self._writers: dict[str, ParquetWriter] = {}
        self._constant = {
            "seed": job.spec.sampling.seed,
            "caption_fingerprint": job.fingerprints.caption,
            "score_fingerprint": job.fingerprints.score,
            "decide_fingerprint": job.fingerprints.decide,
            "input_id": fragment.file.input_id,
            "run": job.run,
        }

    def __enter__(self) -> _Output:
        self._writer(ANNOTATIONS)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for writer in self._writers.values():
                writer.abandon()

    def _writer(self, table: str) -> ParquetWriter:
        if table not in self._writers:
            spec = self.job.spec
            url = f"{spec.output}/{DIRECTORIES[table]}/{self._path}"
            self._writers[table] = ParquetWriter(table, url, spec.output_options, self._constant)
        return self._writers[table]

    def append(self, item: _Item) -> None:
        """Add a row whose fate is known."""
        row, image = item.row, item.row.image
        if item.status is None:
            raise RuntimeError(f"{self.fragment.name}: row {row.row} has no status")
        self.counts[item.status] += 1
        self.reasons[item.reason or Status.KEPT] += 1
        self.reasons.update(f"{text.source}:{text.reason or Status.KEPT}" for text in item.texts)
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
        size = 200 + sum(len(text.text or "") + 50 + 30 * len(text.scores) for text in item.texts)
        self._writer(ANNOTATIONS).append(
            {
                **identity,
                **picture,
                "image_bytes": None if image is None else len(image),
                "source_sha256": row.sha256,
                **outcome,
            },
            size,
        )
        if item.status is Status.KEPT and image is not None:
            captions = [
                {"text": text.text, "source": text.source, "captioner": text.captioner, "itm": text.itm}
                for text in item.texts
                if text.kept
            ]
            best = best_text(item.texts).text
            pair = {**identity, **picture, "image": image, "text": best, "captions": captions}
            self._writer(PAIRS).append(pair, size + len(image))
        elif item.status is Status.ERROR and image is not None:
            cap = self.job.spec.images.quarantine_bytes
            unusable = {"reason": item.reason, "detail": item.detail, "image_bytes": len(image), "image": image[:cap]}
            self._writer(QUARANTINE).append({**identity, **unusable}, 300 + min(cap, len(image)))

    def finish(self, seconds: dict[str, float], on_models: tuple[float, float] | None = None) -> Receipt:
        """Close the files and store the receipt: from here on the work is not lost.

        Raises:
            InputError: not every row of the fragment was appended.
        """
        fragment = self.fragment
        if sum(self.counts.values()) != fragment.rows:
            raise InputError(f"{fragment.file.path}: {sum(self.counts.values())} rows read of {fragment.rows}")
        errors = {ANNOTATIONS: self.counts[Status.ERROR]}
        files = {
            table: (DataFile(self._path, writer.rows, writer.close(), errors.get(table, 0)),)
            for table, writer in self._writers.items()
        }
        receipt = Receipt(
            shard=fragment.file.shard,
            start=fragment.start,
            stop=fragment.stop,
            file_rows=fragment.file_rows,
            provenance=self.job.provenance(fragment.file.input_id),
            worker=f"{socket.gethostname()}:{os.getpid()}",
            counts=Counts(*(self.counts[status] for status in (Status.KEPT, Status.DROPPED, Status.ERROR))),
            annotations=files[ANNOTATIONS],
            pairs=files.get(PAIRS, ()),
            quarantine=files.get(QUARANTINE, ()),
            reasons=dict(self.reasons),
            seconds={stage: round(spent, 6) for stage, spent in seconds.items()},
            on_models=on_models,
        )
        store(receipt, self.job.spec.output, self.job.spec.output_options)
        return receipt
