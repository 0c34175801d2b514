"""The worker: reads, decodes, captions or takes the captions on record, scores, decides and writes a fragment.

It imports no ray.

    for fragment in fragments:
        receipts = Worker(job).process(fragment)

is the whole run in a plain loop; Ray Data runs the same class in an actor pool (pipelines/curate.py). Two calls may run
in one worker at a time: one reads and decodes while the other holds the device.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import TypeAdapter

from capfilt.decide import FilterScore, Text, as_stored
from capfilt.errors import CapfiltError, CheckpointError, EndpointError, ImageError, InputError, StoreError
from capfilt.fragments import Fragment, Row, read_rows
from capfilt.images import decode
from capfilt.inputs import renew
from capfilt.models.preprocess import resize
from capfilt.models.upload import Upload
from capfilt.perceptual import perceptual_hash
from capfilt.pipelines.attempts import Attempts
from capfilt.pipelines.earlier import Earlier, read_earlier
from capfilt.pipelines.job import Captioner, Filter, Job, LoadModels, Models, Preparing, load_models
from capfilt.pipelines.output import Item, Output
from capfilt.plan import Stage
from capfilt.receipts import Receipt
from capfilt.rules import Rules
from capfilt.schema import Reason, Source, Status
from capfilt.spec import AnyCard
from capfilt.stores import persist
from capfilt.text import clean

if TYPE_CHECKING:
    from capfilt.models.classifier import Classifier

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

_Before = Mapping[int, Earlier]
"""What is on record of a fragment's rows; empty where they are captioned."""


class DeviceLostError(CapfiltError):
    """The accelerator gave an error after which nothing in this process can use it; no row is to blame yet."""


def _device_is_lost(error: Exception) -> bool:
    """A CUDA error sticks to its process, out of memory excepted; every later call fails, whatever the row."""
    lost = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
    return lost and not isinstance(error, torch.OutOfMemoryError)


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
        watching: is entered while the image of the row that it is given by name is decoded.
    """

    def __init__(
        self,
        job: Job,
        load: LoadModels = load_models,
        attempts: Attempts | None = None,
        on_batch: Callable[[int, float], None] = lambda *_: None,
        watching: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.job, self._on_batch, self._watching = job, on_batch, watching
        self.attempts = attempts or Attempts()
        self._load = load
        self._models: Models | None = None
        self._batch_size = 1  # images that all models take, once they are loaded
        self._preparing: list[tuple[AnyCard, Preparing]] = []  # models that look at whole pictures
        self._upload, self._on_gpu = Upload("cpu"), False
        self._load_lock = threading.Lock()
        self._device_lock = threading.Lock()
        self._turns = _Turns()
        self._threads = max(1, math.floor(job.spec.placement.cpus))
        self._scratch = _Scratch()
        self._rules = Rules(job.spec)
        self._classifier: Classifier | None = None
        self._hashes = job.spec.duplicates is not None and job.spec.duplicates.near_bits is not None
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
                receipts = [persist(partial(self.curate, fragment), of=StoreError)]  # half a file cannot be sent on
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
        with Output(self.job, fragment) as out:
            for row in rows:
                item = Item(row, texts=[_web_text(row)])
                item.fail(Reason.WORKER_DIED, detail)
                out.append(Item.withdrawn(row) if row.row in fragment.withdrawn else item)
            return out.finish({})

    # --- one fragment ---

    def models(self) -> Models:
        """The captioners and the filters, in the order of their cards; loaded on first use."""
        with self._load_lock:
            if self._models is None:
                self._models = self._load_models()
        return self._models

    def _load_models(self) -> Models:
        spec = self.job.models
        cards, placement = self.job.spec.cards, self.job.spec.placement  # the same actors, whatever the stage
        device = "cuda" if placement.gpus > 0 else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise CapfiltError(
                "placement.gpus is above 0 but this worker sees no CUDA device; install a CUDA build of torch, or set "
                + " and ".join(f"{at}.placement.gpus=0" for at, card in cards.items() if card.placement.gpus)
            )
        if self._load is load_models and not self.job.same_checkpoints():
            raise CheckpointError(
                f"{socket.gethostname()}: the checkpoints here are not those the driver has; copy them to every node"
            )
        if self.attempts.load_begins() > placement.max_actors + LOAD_DEATHS:
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
        self._batch_size = min([one.batch_size for one in captioners] + [one.batch_size for one in filters])
        models = zip(spec.cards.values(), (*captioners, *filters), strict=True)
        self._preparing = [(card, model) for card, model in models if isinstance(model, Preparing)]
        if self.job.spec.keep_out and (card := self.job.spec.keep_out.classifier):
            from capfilt.models.classifier import Classifier

            self._classifier = Classifier(card, device)
        self._upload, self._on_gpu = Upload(device), device == "cuda"
        self.attempts.load_ended()
        return captioners, filters

    def curate(self, fragment: Fragment) -> Receipt:
        """Curate one fragment: every row gets its status, in order.

        Returns:
            The stored receipt; one with `failure` where the input cannot be read just now.

        Raises:
            StoreError: the output cannot be written.
        """
        self.models()
        seconds: dict[str, float] = defaultdict(float)
        on_models: list[float] = []
        try:
            before = read_earlier(self.job, fragment) if self.job.stage is Stage.SCORE else {}
            with Output(self.job, fragment) as out:
                for batch, buffers in self._decoded(fragment, before, seconds):
                    rows = [n for n, item in enumerate(batch) if item.status is None]
                    images = {size: self._upload.send(buffer, rows) for size, buffer in buffers.items()}
                    with self._device_lock:
                        self._upload.arrive()
                        on_models.append(time.monotonic())
                        begin = time.perf_counter()
                        self._judge([batch[n] for n in rows], images)
                        spent = time.perf_counter() - begin
                        seconds["model"] += spent
                        on_models.append(time.monotonic())
                        self._on_batch(len(rows), spent)
                    self._free.append(buffers)
                    begin = time.perf_counter()
                    for item in batch:
                        out.append(item)
                    seconds["write"] += time.perf_counter() - begin
                return out.finish(seconds, (on_models[0], on_models[-1]) if on_models else None)
        except InputError as error:
            return self.job.failed(fragment, str(error))
        except Exception as error:
            if _device_is_lost(error):  # noticed while pixels were sent
                raise DeviceLostError(f"the device failed: {error}") from error
            raise

    def _sizes(self, rows: int) -> deque[int]:
        """Of a fragment's batches. On a CPU as even as can be; a GPU's step is recorded for full ones."""
        full, rest = divmod(rows, self._batch_size)
        if self._on_gpu:
            return deque([self._batch_size] * full + [rest] * (rest > 0))
        runs = full + (rest > 0)
        return deque((rows + runs - 1 - n) // runs for n in range(runs))

    def _decoded(
        self, fragment: Fragment, before: _Before, seconds: dict[str, float]
    ) -> Iterator[tuple[list[Item], _Buffers]]:
        """Batches of rows in order, decoded ahead in threads, and buffers that hold the n-th row's pixels at [n]."""
        sizes = self._sizes(fragment.rows)
        waiting: deque[tuple[list[Future[tuple[Item, float]]], _Buffers]] = deque()
        rows = read_rows(fragment, self.job.spec.input.storage_options, min(self._batch_size, 32))
        withdrawn = frozenset(fragment.withdrawn)
        while sizes or waiting:
            begin = time.perf_counter()
            while sizes and len(waiting) < AHEAD:
                buffers, batch = self._buffers(), []
                for n, row in enumerate(itertools.islice(rows, sizes.popleft())):
                    slots = {side: buffer[n] for side, buffer in buffers.items()}
                    if row.row in withdrawn:
                        batch.append(self._pool.submit(_withdraw, row))
                    else:
                        batch.append(self._pool.submit(self._prepare, row, before.get(row.row), slots))
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
                for item, _ in done:
                    _check_image(fragment, item, before)
                yield [item for item, _ in done], buffers

    def _buffers(self) -> _Buffers:
        """Memory for a batch, used again and again: fresh memory costs the kernel as much as copying does."""
        try:
            return self._free.pop()
        except IndexError:
            sizes = {model.image_size for models in self.models() for model in models if model.image_size is not None}
            sizes |= {self._classifier.image_size} if self._classifier else set()
            return {size: self._upload.memory((self._batch_size, size, size, 3)) for size in sizes}

    def _prepare(self, row: Row, earlier: Earlier | None, pixels: _Buffers) -> tuple[Item, float]:
        """Hash, decode and resize one row's image into `pixels`; what is wrong with it becomes its reason.

        A row on record is given its captions; one that was an error and has none stays what it was.
        """
        begin = time.perf_counter()
        item = Item(row, texts=[_web_text(row)])
        if earlier and earlier.status is Status.ERROR and not earlier.captions:
            item.sha256, item.format = earlier.sha256, earlier.format
            item.width, item.height = earlier.width, earlier.height
            item.fail(earlier.reason or Reason.MODEL_ERROR, earlier.detail or "")
        elif not row.readable:
            item.fail(Reason.UNREADABLE_ROW, row.note or "")
        elif row.image is None:
            item.status, item.reason = Status.DROPPED, Reason.NO_IMAGE
        else:
            item.sha256 = hashlib.sha256(row.image).hexdigest()
            item.texts += earlier.captions if earlier else []
            try:
                with self._watching(f"row {row.row}, sha256 {item.sha256}"):
                    picture = decode(row.image, self.job.spec.images, self._scratch.pixels)
                item.format, item.width, item.height = picture.format, picture.width, picture.height
                if self._hashes:
                    item.perceptual_hash = perceptual_hash(picture.rgb)
                for size, slot in pixels.items():
                    resize(picture.rgb, size, slot, self._scratch.resized)
                for card, model in self._preparing:
                    with _noted(card):
                        item.prepared[model] = model.prepare(picture.rgb, item.sha256)
            except ImageError as error:
                item.fail(error.reason, error.detail)
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001  a processor that cannot take this picture: the row's own error
                item.fail(Reason.MODEL_ERROR, _said(error))
        return item, time.perf_counter() - begin

    def _judge(self, items: list[Item], images: _Buffers) -> None:
        """Caption, score and decide. A batch on which a model raises is halved until the row stands alone."""
        if not items:
            return
        try:
            self._caption_and_score(items, images)
        except EndpointError:
            raise  # no row's fault, whichever is alone
        except Exception as error:  # recorded as the row's own error, once it is alone
            if _device_is_lost(error):
                raise DeviceLostError(f"the device failed: {error}") from error
            if len(items) == 1:
                items[0].fail(Reason.MODEL_ERROR, _said(error))
            else:
                half = len(items) // 2
                self._judge(items[:half], {size: batch[:half] for size, batch in images.items()})
                self._judge(items[half:], {size: batch[half:] for size, batch in images.items()})

    def _caption_and_score(self, items: list[Item], images: _Buffers) -> None:
        if self.job.stage is Stage.CAPTION:
            self._caption(items, images)
        texts = [item.texts for item in items]
        # Texts that are the same after clean-up, of whichever captioner, are scored once.
        unique = [list(dict.fromkeys(text.clean for text in row if text.clean)) for row in texts]
        scores = self._scores(unique, items, images)
        scored = [
            [replace(text, scores=own[text.clean]) if text.clean else text for text in row]
            for row, own in zip(texts, scores, strict=True)
        ]
        if self._classifier is not None:
            for item, unsafe in zip(items, self._classifier.score(images[self._classifier.image_size]), strict=True):
                item.unsafe = as_stored(unsafe)
        verdicts = [self._rules.judge(row, item.row.url, item.unsafe) for item, row in zip(items, scored, strict=True)]
        for item, verdict in zip(
            items, verdicts, strict=True
        ):  # once none can raise: a row has all its fate or nothing
            item.texts, item.status, item.reason = verdict

    def _caption(self, items: list[Item], images: _Buffers) -> None:
        """Give each row, after the web's text, those that each captioner writes.

        They stay where a filter then raises, for another filter to judge.
        """
        sha256 = [item.sha256 or "" for item in items]
        texts = [item.texts[:1] for item in items]
        for card, captioner in zip(self.job.spec.captioners, self.models()[0], strict=True):
            with _noted(card):
                captions = captioner.caption(_shown(captioner, items, images), sha256)
            for row, candidates in zip(texts, captions, strict=True):
                row += [Text(Source.SYNTHETIC, k, text, clean(text), card.name) for k, text in enumerate(candidates)]
        for item, row in zip(items, texts, strict=True):
            item.texts, item.captions = row, len(row) - 1

    def _scores(
        self, texts: list[list[str]], items: list[Item], images: _Buffers
    ) -> list[dict[str, tuple[FilterScore, ...]]]:
        """For each image, what all filters think of each of its texts, which differ."""
        scores: list[dict[str, tuple[FilterScore, ...]]] = [dict.fromkeys(row, ()) for row in texts]
        for card, filter_ in zip(self.job.spec.filters, self.models()[1], strict=True):
            with _noted(card):
                judged = filter_.score(_shown(filter_, items, images), texts)
            for of_text, row, own in zip(scores, texts, judged, strict=True):
                for text, (itm, itc) in zip(row, own, strict=True):
                    of_text[text] += (FilterScore(card.name, as_stored(itm), None if itc is None else as_stored(itc)),)
        return scores


def _shown(model: Captioner | Filter, items: list[Item], images: _Buffers) -> Any:
    """What a model takes of these rows: squares of its size, or what it made of the whole pictures."""
    return [item.prepared[model] for item in items] if model.image_size is None else images[model.image_size]


def _said(error: Exception) -> str:
    """One line, with the model that it is noted to come from."""
    who = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
    return f"{who}{type(error).__name__}: {' '.join(str(error).split())}"


@contextmanager
def _noted(card: AnyCard) -> Iterator[None]:
    """Add to what a model raises which of them it was."""
    try:
        yield
    except Exception as error:
        note = f"{card.role} {card.name}"
        if note not in getattr(error, "__notes__", ()):  # a model may raise the same error again
            error.add_note(note)
        raise


def _withdraw(row: Row) -> tuple[Item, float]:
    return Item.withdrawn(row), 0.0


def _web_text(row: Row) -> Text:
    return Text(Source.WEB, 0, row.text, clean(row.text) if row.text else "")


def _check_image(fragment: Fragment, item: Item, before: _Before) -> None:
    """Refuse to score captions of another image."""
    number = item.row.row
    if item.sha256 is not None and number in before and before[number].sha256 != item.sha256:
        path = fragment.file.path
        raise InputError(f"{path}: row {number} is not the image that was captioned. {renew(path)}")
