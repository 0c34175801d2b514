"""The filter: images and texts -> match probability and similarity.

B  images    N  texts, as many of each of B images    S  side in pixels    T  image tokens    W  vision width
L  text tokens    D  text width    J  width of ITC's vectors
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from capfilt.models.blip import TEXTS_AN_IMAGE, Keys
from capfilt.models.checkpoints import load_to_run
from capfilt.models.fitting import Fitting
from capfilt.models.tokenizer import padded, with_first
from capfilt.spec import FilterCard

_CHARACTERS_A_TOKEN = 100
"""WordPiece gives up on words longer than this (bert-base-uncased, max_input_chars_per_word): one [UNK] each."""

_GROWTH = 1.5
"""Texts of an image whose lengths differ by more are read apart."""


class Score(NamedTuple):
    """What the filter thinks of one text of one image.

    Attributes:
        itm: the ITM head's probability of a match, in [0, 1]; what CapFilt decides by (BLIP section 3.3).
        itc: cosine of the two unimodal embeddings, in [-1, 1]; recorded, not used in the decision. None where the card
            says `itc: false`.
    """

    itm: float
    itc: float | None


class Tokens(NamedTuple):
    """Texts as the network reads them, on its device, to be read many times.

    Attributes:
        ids_NL: int64 [N, L], padded to the longest; the card's first token at position 0.
        mask_NL: 1 where there is text.
        lengths: tokens of each.
    """

    ids_NL: Tensor  # noqa: N815  the shape's suffix
    mask_NL: Tensor  # noqa: N815
    lengths: list[int]


class ItmFilter:
    """BLIP's image-text matching and contrastive heads (BLIP section 3.1; salesforce/BLIP, models/blip_itm.py).

    Position 0 of the image-grounded encoder is the card's `first_token`: [ENC], as the head was trained
    (models/blip_retrieval.py), where transformers and the authors' demo feed [CLS]. The unimodal encoder gets [CLS].

    Scores do not depend on the other images or texts of a call but for rounding, 1e-6 or so in float32.

    Attributes:
        image_size: side in pixels of the images it takes.
    """

    def __init__(self, card: FilterCard, device: str) -> None:
        """Load the checkpoint.

        Args:
            device: as torch names it.

        Raises:
            CheckpointError: as :func:`capfilt.models.checkpoints.load`.
            SpecError: `max_tokens` is more than the network's positions.
        """
        self._blip = load_to_run(card, device)
        self._blip.require_positions(card.max_tokens, "filter.max_tokens")
        self._first = self._blip.enc if card.first_token == "[ENC]" else self._blip.cls
        self._max_tokens, self._itc = card.max_tokens, card.itc
        self._fitting = Fitting(card.batch_size, card.name)
        self.image_size = card.image_size
        self._fitting.measure(self._try, self._blip.device, card.placement.gpus)

    @property
    def batch_size(self) -> int:
        """Images in the network at a time, now."""
        return self._fitting.images

    def _try(self, images: int) -> None:
        """Judge as many texts of so many, as long as they can be, to see what that takes."""
        blank_BCSS = torch.zeros((images, 3, self.image_size, self.image_size), dtype=torch.uint8)
        own_of = _runs([TEXTS_AN_IMAGE] * images)
        tokens = self.tokens(["a " * self._max_tokens] * (images * TEXTS_AN_IMAGE))
        self._score_batch(blank_BCSS, tokens, own_of)

    def score(self, images_BCSS: Tensor, texts: Sequence[Sequence[str]]) -> list[list[Score]]:
        """Judge every text of every image.

        Args:
            images_BCSS: uint8 [B, 3, S, S], resized RGB. Each goes through the vision transformer once, one without
                texts not at all, and all its texts read one copy of it. Any B; `batch_size` images, with at
                most 8 times as many texts, are in the network at a time; half as many, from then on, where the device's
                memory ran out.
            texts: those of each image, cleaned (capfilt.text.clean). Cut to `max_tokens`, [SEP] kept.

        Returns:
            Scores in the shape of `texts`; a text that an image has twice is read once.

        Raises:
            ValueError: shapes do not agree.
            FloatingPointError: a score is not a number.
        """
        if len(images_BCSS) != len(texts):
            raise ValueError(f"{len(images_BCSS)} images, texts of {len(texts)}")
        unique = [list(dict.fromkeys(own)) for own in texts]  # in another place a text's score rounds otherwise
        if not any(unique):
            return [[] for _ in texts]
        tokens, own_of = self.tokens([text for own in unique for text in own]), _runs([len(own) for own in unique])
        # Images with as many texts go together: texts side by side then read their image's keys without a copy.
        judged = sorted(
            (image for image, own in enumerate(unique) if own),
            key=lambda image: (len(unique[image]), max(tokens.lengths[n] for n in own_of[image])),
        )
        with torch.inference_mode():
            found = self._fitting.run(
                len(judged),
                lambda some: self._score_batch(images_BCSS[judged[some]], tokens, [own_of[n] for n in judged[some]]),
            )
        scores = {text: score for image in found for text, score in image}
        known = [
            {text: scores[n] for text, n in zip(own, places, strict=True)}
            for own, places in zip(unique, own_of, strict=True)
        ]
        return [[score[text] for text in own] for own, score in zip(texts, known, strict=True)]

    def embed_images(self, images_BCSS: Tensor) -> Tensor:
        """ITC's vectors of images, by the vision transformer alone: float32 [B, J] of length 1, on the CPU.

        Args:
            images_BCSS: as :meth:`score`'s.

        Raises:
            FloatingPointError: they are not numbers.
        """
        with torch.inference_mode():
            found = self._fitting.run(
                len(images_BCSS),
                lambda some: [*self._blip.model.embed_images(self._blip.see(images_BCSS[some])).cpu()],
            )
        return _finite(torch.stack(found))

    def embed_texts(self, tokens: Tokens) -> Tensor:
        """ITC's vectors of texts, by the unimodal encoder: float32 [N, J] of length 1, on the CPU.

        Args:
            tokens: of :meth:`tokens`; [CLS] takes the first one's place. At most 8 `batch_size` are in the network at a
                time.

        Raises:
            FloatingPointError: they are not numbers.
        """
        network, parts = self._blip.model, []
        with torch.inference_mode():
            for rows in _batched(range(len(tokens.lengths)), self._rows):
                ids_NL, mask_NL = _take(tokens, rows)
                ids_NL = with_first(ids_NL, self._blip.cls)
                parts.append(network.embed_texts(network.text_encoder(ids_NL, mask_NL, first=True)))
            return _finite(torch.cat([part.cpu() for part in parts]))

    def match(self, images_BCSS: Tensor, tokens: Tokens, wanted: Sequence[Sequence[int]]) -> list[Tensor]:
        """The ITM head's logit of a match (class 1, not its probability), for retrieval (salesforce/BLIP, evaluation).

        Args:
            images_BCSS: as :meth:`score`'s. Each is seen once and its keys are shared by its texts, of which
                at most 8 `batch_size` are in the network at a time.
            tokens: of all texts, from :meth:`tokens`.
            wanted: for each image its texts, as positions in `tokens`.

        Returns:
            For each image the logits of its texts, float32 on the CPU.

        Raises:
            ValueError: shapes do not agree.
            FloatingPointError: a logit is not a number.
        """
        if len(images_BCSS) != len(wanted):
            raise ValueError(f"{len(images_BCSS)} images, texts of {len(wanted)}")

        def match(some: slice) -> list[Tensor]:
            seen_BTW = self._blip.see(images_BCSS[some])
            return [
                self._match_one(seen_TW[None], tokens, own) for seen_TW, own in zip(seen_BTW, wanted[some], strict=True)
            ]

        with torch.inference_mode():
            return self._fitting.run(len(wanted), match)

    def _match_one(self, seen_1TW: Tensor, tokens: Tokens, wanted: Sequence[int]) -> Tensor:
        """Logits of one image's texts; texts of equal length go together, so that little is padding."""
        network = self._blip.model
        image = network.text_encoder.look(seen_1TW)
        order = sorted(range(len(wanted)), key=lambda n: tokens.lengths[wanted[n]])
        parts = [
            network.match(network.text_encoder(*_take(tokens, [wanted[n] for n in some]), image, first=True))[
                :, 1
            ].float()
            for some in _batched(order, self._rows)
        ]
        logit_N = torch.empty(len(wanted))
        if parts:
            logit_N[torch.tensor(order)] = torch.cat(parts).cpu()
        return _finite(logit_N)

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """Texts made ready for :meth:`embed_texts` and :meth:`match`.

        Args:
            texts: one or more, cleaned; cut as :meth:`score`'s.
        """
        ids_NL, mask_NL = self._tokens(texts)
        return Tokens(ids_NL, mask_NL, mask_NL.sum(1).tolist())

    def _score_batch(
        self, images_BCSS: Tensor, tokens: Tokens, wanted: Sequence[Sequence[int]]
    ) -> list[list[tuple[int, Score]]]:
        """Judge images in ascending order of their number of texts: for each its texts, as positions in `tokens`."""
        seen_BTW = self._blip.see(images_BCSS)
        judged: list[list[tuple[int, Score]]] = [[] for _ in wanted]
        for some in _groups([len(own) for own in wanted], self._rows):
            image = self._blip.model.text_encoder.look(seen_BTW[some])
            image_BJ = self._blip.model.embed_images(seen_BTW[some]) if self._itc else None
            by_length = [sorted(own, key=lambda text: tokens.lengths[text]) for own in wanted[some]]
            longest = [max(tokens.lengths[text] for text in column) for column in zip(*by_length, strict=True)]
            for columns in _buckets(longest, max(1, self._rows // len(by_length))):
                texts = [own[columns] for own in by_length]
                scores = self._score_texts(image, image_BJ, *_take(tokens, [text for own in texts for text in own]))
                for known, own in zip(judged[some], texts, strict=True):
                    known += zip(own, scores, strict=False)  # takes no more of the scores than there are texts
        return judged

    @property
    def _rows(self) -> int:
        """Texts in the network at a time."""
        return self._fitting.images * TEXTS_AN_IMAGE

    def _score_texts(
        self, image: Sequence[Keys], image_BJ: Tensor | None, ids_NL: Tensor, mask_NL: Tensor
    ) -> Iterator[Score]:
        """Judge N texts, those of an image side by side; by ITC, too, where the images' vectors are given."""
        network = self._blip.model
        itm_N = network.match(network.text_encoder(ids_NL, mask_NL, image, first=True)).float().softmax(-1)[:, 1]
        if image_BJ is None:
            return (Score(itm, None) for itm in _finite(itm_N.cpu()).tolist())
        ids_NL = with_first(ids_NL, self._blip.cls)
        text_NJ = network.embed_texts(network.text_encoder(ids_NL, mask_NL, first=True))
        image_NJ = image_BJ.repeat_interleave(len(text_NJ) // len(image_BJ), 0)
        itc_N = (image_NJ * text_NJ).sum(-1).clamp(-1, 1)  # rounding may leave the range by 1e-7; NaN stays
        return map(Score, *_finite(torch.stack([itm_N, itc_N]).cpu()).tolist())

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids [N, L] with the first token and [SEP], padded to the longest; mask, 1 where there is text."""
        room = self._max_tokens - 2
        rows = [
            [self._first, *self._blip.ids(text[: room * _CHARACTERS_A_TOKEN])[:room], self._blip.sep] for text in texts
        ]
        ids_NL, mask_NL = padded(rows, self._blip.pad)
        return ids_NL.to(self._blip.device), mask_NL.to(self._blip.device)


def _take(tokens: Tokens, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ids and mask of some texts, padded to the longest of them."""
    longest = max(tokens.lengths[row] for row in rows)
    rows_N = torch.tensor(rows, device=tokens.ids_NL.device)
    return tokens.ids_NL[rows_N, :longest], tokens.mask_NL[rows_N, :longest]


def _batched(rows: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    return (rows[start : start + most] for start in range(0, len(rows), most))


def _finite(values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise FloatingPointError("the filter's scores are not numbers")
    return values


def _runs(counts: Sequence[int]) -> list[range]:
    """Consecutive positions, so many for each."""
    stops = list(accumulate(counts, initial=0))
    return [range(*run) for run in pairwise(stops)]


def _buckets(longest: Sequence[int], most: int) -> Iterator[slice]:
    """Cut ascending lengths where they have grown by half, and to at most `most`: little of what is read is padding."""
    start = 0
    for n, length in enumerate(longest):
        if n - start == most or length > _GROWTH * longest[start]:
            yield slice(start, n)
            start = n
    yield slice(start, len(longest))


def _groups(counts: Sequence[int], most: int) -> Iterator[slice]:
    """Cut ascending counts into runs of equal ones that sum to at most `most`, none much shorter; one may be more."""
    start = 0
    while start < len(counts):
        end = bisect_right(counts, counts[start])
        runs = math.ceil((end - start) / max(1, most // counts[start]))
        for length in [(end - start + n) // runs for n in range(runs)]:
            yield slice(start, start + length)
            start += length
