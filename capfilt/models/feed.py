"""Pairs -> batches: decode, augment and tokenise in threads, ahead of the step that needs them.

B  pairs in a batch    S  side in pixels    L  text tokens
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from capfilt.errors import ImageError, TrainingError
from capfilt.examples import Pair
from capfilt.images import decode
from capfilt.models.augment import augment
from capfilt.models.med import Batch
from capfilt.models.preprocess import normalise, resize
from capfilt.models.tokenizer import padded
from capfilt.schema import Reason
from capfilt.spec import Augment, Images
from capfilt.text import clean

PRETRAINING_WORDS = 30
"""Words a caption is cut to in pretraining (salesforce/BLIP, data/pretrain_dataset.py)."""

_AHEAD = 3
"""Batches prepared ahead."""


class Place(NamedTuple):
    """Where in the data a rank stands: rows of an epoch that are behind it."""

    epoch: int
    row: int


@dataclass(frozen=True, slots=True)
class Texts:
    """How a text becomes tokens: [CLS] prompt text [SEP], cut to `max_tokens`, [SEP] kept.

    Attributes:
        prompt: ids put before every text.
        words: cut to before tokens.
    """

    tokenizer: Tokenizer
    cls: int
    sep: int
    pad: int
    max_tokens: int
    prompt: tuple[int, ...] = ()
    words: int = PRETRAINING_WORDS

    def ids(self, text: str) -> list[int]:
        """Of one text; it is cleaned up first."""
        own = self.tokenizer.encode(clean(text, self.words), add_special_tokens=False).ids
        return [self.cls, *[*self.prompt, *own][: self.max_tokens - 2], self.sep]


class _Ready(NamedTuple):
    pixels: Tensor
    ids: list[int]
    image_id: int


class Feed:
    """Makes batches of a size.

    Args:
        texts: how texts become tokens.
        image_size: side in pixels.
        limits: of what is decoded; a pair whose image cannot be is passed over.
        random_views: None squashes the whole image to the square, as in inference.
        seed: of views and of the draw among a pair's texts; with the place and the image it determines both.
        device: where batches go.
    """

    def __init__(
        self,
        texts: Texts,
        image_size: int,
        batch_size: int,
        *,
        random_views: Augment | None,
        seed: int,
        limits: Images,
        threads: int,
        device: torch.device,
    ) -> None:
        self._texts, self._size, self._batch_size = texts, image_size, batch_size
        self._views, self._seed, self._limits = random_views, seed, limits
        self._threads, self._device = threads, device
        self.passed_over: Counter[str] = Counter()
        """Rows that could not be used, by reason, up to the last batch."""

    def batches(self, rows: Iterable[tuple[Place, Pair | None]]) -> Iterator[tuple[Batch, Place]]:
        """Full batches, in the order of the rows; a rest that fills none is left.

        Args:
            rows: each with the place after it.

        Returns:
            Each batch with the place after its last row: whoever resumes goes on from there.

        Raises:
            TrainingError: a whole epoch holds no row that can be used.
        """
        waiting: deque[tuple[Place, Future[_Ready | Reason]]] = deque()
        rest, batch = iter(rows), list[_Ready]()
        last: int | None = None  # epoch of the last row that could be used, or of the first row
        with ThreadPoolExecutor(self._threads, thread_name_prefix="feed") as pool:
            while True:
                for place, pair in itertools.islice(rest, _AHEAD * self._batch_size - len(waiting)):
                    waiting.append((place, pool.submit(self._prepare, pair, place)))
                if not waiting:
                    return
                place, future = waiting.popleft()
                ready = future.result()
                if isinstance(ready, _Ready):
                    batch.append(ready)
                    last = place.epoch
                else:
                    self.passed_over[str(ready)] += 1
                    last = place.epoch if last is None else last
                    if place.epoch > last + 1:
                        found = ", ".join(f"{reason} {rows:,}" for reason, rows in self.passed_over.most_common())
                        raise TrainingError(
                            f"data: a whole epoch holds no pair that can be used. Rows: {found}; give others"
                        )
                if len(batch) == self._batch_size:
                    yield self._collated(batch), place
                    batch = []

    def _prepare(self, pair: Pair | None, place: Place) -> _Ready | Reason:
        """A pair's view and text; drawn for each place, as one image may come several times in an epoch."""
        if pair is None:
            return Reason.NO_TEXT
        ids = self._texts.ids(pair.text(self._seed, *place))
        if ids == self._texts.ids(""):  # clean-up has left nothing
            return Reason.NO_TEXT
        try:
            rgb = decode(pair.image, self._limits).rgb
        except ImageError as error:
            return error.reason
        if self._views is None:
            pixels_CSS = resize(rgb, self._size)
        else:
            views = self._views
            pixels_CSS = augment(
                rgb,
                self._size,
                np.random.default_rng((self._seed, *place, pair.image_id)),
                min_scale=views.min_scale,
                flip=views.flip,
                operations=views.operations,
                magnitude=views.magnitude,
            )
        return _Ready(pixels_CSS.permute(1, 2, 0), ids, pair.image_id)

    def _collated(self, batch: list[_Ready]) -> Batch:
        pixels_BCSS = torch.stack([ready.pixels for ready in batch]).permute(0, 3, 1, 2)
        ids_BL, mask_BL = padded([ready.ids for ready in batch], self._texts.pad)
        return Batch(
            normalise(pixels_BCSS.to(self._device), torch.float32),
            ids_BL.to(self._device),
            mask_BL.to(self._device),
            torch.tensor([ready.image_id for ready in batch], device=self._device),
        )
