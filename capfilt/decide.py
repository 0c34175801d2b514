"""Scores and thresholds -> kept texts and reasons. Pure functions of numbers; no model, no file.

BLIP section 3.3: the filter judges each text alone and drops it when the ITM head says unmatched. So an image keeps its
web text, a synthetic text, both or neither. Several filters judge by the mean of their probabilities, or by a vote.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from capfilt.schema import Reason, Source, Status
from capfilt.spec import Decision, Keep, Thresholds


@dataclass(frozen=True, slots=True)
class FilterScore:
    """What one filter thinks of a text; both numbers as the tables hold them (:func:`as_stored`).

    Attributes:
        filter: name of its card.
        itm: P(match) in [0, 1], or another score in [0, 1] that rises with it, as the card's unit says.
        itc: cosine similarity in [-1, 1]; None where its card wants none.
    """

    filter: str
    itm: float
    itc: float | None


@dataclass(frozen=True, slots=True)
class Text:
    """One text of one image, before or after judgement.

    Attributes:
        text: as it came, or None for a null web text.
        clean: what the filters read (capfilt.text.clean); empty where nothing was left.
        candidate: 0 for the web text, 0..k-1 for those of one captioner.
        captioner: name of the card whose model wrote it; None for the web text.
        scores: of all filters, in the spec's order; empty where not scored.
    """

    source: Source
    candidate: int
    text: str | None
    clean: str
    captioner: str | None = None
    scores: tuple[FilterScore, ...] = ()
    kept: bool = False
    reason: Reason | None = Reason.NOT_SCORED

    @property
    def itm(self) -> float | None:
        """The filters' mean P(match), as stored, in [0, 1]; None where not scored."""
        scores = self.scores
        return scores[0].itm if len(scores) == 1 else _mean([score.itm for score in scores])

    @property
    def itc(self) -> float | None:
        """The mean cosine similarity of the filters that give one, as stored, in [-1, 1]; None where none does."""
        return _mean([score.itc for score in self.scores if score.itc is not None])

    def judged(self, reason: Reason | None) -> Text:
        """The same text, kept or not: `dataclasses.replace` takes three times as long, and there are millions."""
        return Text(
            self.source, self.candidate, self.text, self.clean, self.captioner, self.scores, reason is None, reason
        )


def as_stored(number: float) -> float:
    """Rounded to float32, as the tables hold scores: so a later threshold decides alike."""
    return float(np.float32(number))


def _mean(numbers: Sequence[float]) -> float | None:
    if len(numbers) < 2:
        return numbers[0] if numbers else None
    return as_stored(sum(numbers) / len(numbers))


def decide(
    texts: Sequence[Text],
    thresholds: Sequence[Thresholds],
    decision: Decision,
    keep: Keep,
    barred: Container[int] = (),
) -> list[Text]:
    """Judge every text of one image.

    A text matches by `mean` when its mean ITM probability is at least its source's threshold; by `vote` when more than
    half of the filters say so, each by its own probability and threshold. Texts that match are ranked: the web's, then
    the synthetic ones by falling mean. One equal after clean-up to a text kept before it is a duplicate. Of the
    synthetic ones that are left, `best` keeps the first, `all-above-threshold` each.

    Args:
        texts: the web's, then each captioner's in order: of equal scores the first wins. Every text that is not empty
            after clean-up has its scores.
        thresholds: one for `mean`; for `vote` one for each filter, in the order of the scores.
        barred: numbers of texts that have a word which is to be kept out, whatever their scores.

    Returns:
        The same texts in the same order, each with `kept` and `reason`.

    Raises:
        ValueError: a score is missing or not a number in [0, 1], or there are not as many thresholds as needed.
    """
    for text in texts:
        _check(text)
    verdicts = list(texts)
    kept: set[str] = set()
    best = False  # a synthetic text has been kept
    for i in sorted(range(len(texts)), key=lambda i: _rank(texts[i])):
        text = texts[i]
        reason: Reason | None = None
        if not text.clean:
            reason = Reason.EMPTY_TEXT
        elif i in barred:
            reason = Reason.KEPT_OUT_WORD
        elif not _matches(text, thresholds, decision):
            reason = Reason.BELOW_THRESHOLD
        elif text.clean in kept:
            reason = Reason.DUPLICATE_TEXT
        elif text.source is Source.SYNTHETIC and best and keep == "best":
            reason = Reason.NOT_BEST
        else:
            kept.add(text.clean)
            best = best or text.source is Source.SYNTHETIC
        verdicts[i] = text.judged(reason)
    return verdicts


def _check(text: Text) -> None:
    if text.clean and not text.scores:
        raise ValueError("a text that is not empty has no ITM score")
    for score in text.scores:
        if not 0 <= score.itm <= 1:
            raise ValueError(f"{score.filter}: ITM score {score.itm!r} is not a probability")


def _matches(text: Text, thresholds: Sequence[Thresholds], decision: Decision) -> bool:
    """Whether the filters say that a text matches its image."""
    own = [one.web if text.source is Source.WEB else one.synthetic for one in thresholds]
    if decision == "mean":
        (least,) = own
        mean = text.itm
        return mean is not None and mean >= least
    ayes = sum(score.itm >= least for score, least in zip(text.scores, own, strict=True))
    return 2 * ayes > len(own)


def _rank(text: Text) -> tuple[bool, float]:
    """Web first, then synthetic by falling score; equal ones stay in order."""
    return (text.source is Source.SYNTHETIC, -(text.itm or 0.0))


def row_outcome(texts: Sequence[Text]) -> tuple[Status, Reason | None]:
    """What becomes of the row whose texts were judged: kept, or dropped and why."""
    if any(text.kept for text in texts):
        return Status.KEPT, None
    if all(text.reason is Reason.EMPTY_TEXT for text in texts):
        return Status.DROPPED, Reason.NO_TEXT
    if all(text.reason in (Reason.EMPTY_TEXT, Reason.KEPT_OUT_WORD) for text in texts):
        return Status.DROPPED, Reason.KEPT_OUT_WORD
    return Status.DROPPED, Reason.NO_MATCH


def withheld(texts: Sequence[Text], reason: Reason) -> list[Text]:
    """The texts of a row that is dropped as a whole: none is kept, and those that would be say why."""
    return [text.judged(reason) if text.kept else text for text in texts]


def best_text(texts: Sequence[Text]) -> Text:
    """The kept text with the highest mean ITM score; the web text wins a tie, then the first.

    Raises:
        ValueError: no text is kept.
    """
    kept = [text for text in texts if text.kept]
    if not kept:
        raise ValueError("no text is kept")
    return min(kept, key=lambda text: (-(text.itm or 0.0), text.source is Source.SYNTHETIC))
