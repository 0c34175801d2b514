"""Scores and thresholds -> kept texts and reasons. Pure functions of numbers; no model, no file.

BLIP section 3.3: the filter judges each text alone and drops it when the ITM head says unmatched. So an image keeps its
web text, a synthetic text, both or neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from capfilt.schema import Reason, Source, Status
from capfilt.spec import Thresholds


@dataclass(frozen=True, slots=True)
class Text:
    """One text of one image, before or after judgement.

    Attributes:
        text: as it came, or None for a null web text.
        clean: what the filter read (capfilt.text.clean); empty where nothing was left.
        candidate: 0 for the web text, 0..k-1 for synthetic ones.
        itm: P(match) in [0, 1]; None where not scored.
        itc: cosine similarity in [-1, 1]; None where not scored.
    """

    source: Source
    candidate: int
    text: str | None
    clean: str
    itm: float | None = None
    itc: float | None = None
    kept: bool = False
    reason: Reason | None = Reason.NOT_SCORED


def decide(texts: Sequence[Text], thresholds: Thresholds) -> list[Text]:
    """Judge every text of one image.

    A text is kept when its ITM probability is at least its source's threshold. Of several synthetic candidates only the
    best is kept (ties: the lowest candidate). A text equal after clean-up to one already kept is a duplicate.

    Args:
        texts: in any order; every text that is not empty after clean-up has its scores.

    Returns:
        The same texts in the same order, each with `kept` and `reason`.

    Raises:
        ValueError: a score is missing or not a number in [0, 1].
    """
    verdicts = list(texts)
    kept: set[str] = set()
    best = False  # a synthetic text has been kept
    for i in sorted(range(len(texts)), key=lambda i: _rank(texts[i])):
        text = texts[i]
        reason: Reason | None = None
        if not text.clean:
            reason = Reason.EMPTY_TEXT
        elif text.itm is None or not 0 <= text.itm <= 1 or math.isnan(text.itm):
            raise ValueError(f"ITM score {text.itm!r} is not a probability")
        elif text.itm < (thresholds.web if text.source is Source.WEB else thresholds.synthetic):
            reason = Reason.BELOW_THRESHOLD
        elif text.clean in kept:
            reason = Reason.DUPLICATE_TEXT
        elif text.source is Source.SYNTHETIC and best:
            reason = Reason.NOT_BEST
        else:
            kept.add(text.clean)
            best = best or text.source is Source.SYNTHETIC
        verdicts[i] = Text(
            text.source, text.candidate, text.text, text.clean, text.itm, text.itc, reason is None, reason
        )
    return verdicts


def _rank(text: Text) -> tuple[bool, float, int]:
    """Web first, then synthetic by falling score, then by candidate."""
    score = -1.0 if text.itm is None or math.isnan(text.itm) else text.itm
    return (text.source is Source.SYNTHETIC, -score, text.candidate)


def row_outcome(texts: Sequence[Text]) -> tuple[Status, Reason | None]:
    """What becomes of the row whose texts were judged: kept, or dropped and why."""
    if any(text.kept for text in texts):
        return Status.KEPT, None
    if all(text.reason is Reason.EMPTY_TEXT for text in texts):
        return Status.DROPPED, Reason.NO_TEXT
    return Status.DROPPED, Reason.NO_MATCH


def best_text(texts: Sequence[Text]) -> Text:
    """The kept text with the highest ITM score; the web text wins a tie.

    Raises:
        ValueError: no text is kept.
    """
    kept = [text for text in texts if text.kept]
    if not kept:
        raise ValueError("no text is kept")
    return min(kept, key=lambda text: (-(text.itm or 0.0), text.source is Source.SYNTHETIC, text.candidate))
