"""How far distributions moved between two versions, and what is alarming in one or between the two. Pure.

Where captions come from models that learnt from such captions, variety can be lost round by round (model collapse):
fewer words, fewer captions, loops, or a filter that finds everything alike. Each alarm has its limit here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from capfilt.report.captions import DRAWN_TEXTS, DRAWN_WORDS, Captions
from capfilt.report.statistics import Statistics, side_by_side
from capfilt.report.tally import WEB

FEWEST = 100
"""Texts below which an origin's variety is not judged."""

ONE_CAPTION = 0.2  # of an origin's texts are one and the same
LITTLE_VARIETY = 50  # different captions of 1,000
LOOPS = 0.02  # of an origin's texts loop
ALIKE = 0.04  # standard deviation of an origin's scores, of their threshold; of 0.5 where it is higher
ERRORS = 0.1  # of the rows
LOST_VARIETY = 0.5  # of what there was is left, of captions or words
KEPT_MOVED = 0.2  # of the rows, more or fewer than before
LENGTH_MOVED = 0.5  # of the mean length
SHIFT = 0.25
"""Population stability index from which a distribution is taken to have shifted; below 0.1 it is taken as the same."""


@dataclass(frozen=True)
class Shift:
    """How far a distribution has moved: its population stability index, 0 where it is the same."""

    name: str
    index: float


@dataclass(frozen=True)
class Alarm:
    """What a person should look at; `collapse` where captions have lost their variety."""

    collapse: bool
    title: str
    detail: str


# --- distributions ---


def distributions(of: Statistics) -> dict[str, Mapping[object, float]]:
    """Every distribution of a version, by name: counts by bin or kind."""
    found: dict[str, Mapping[object, float]] = {
        "reasons of rows": {(status, reason): n for status, reason, n in of.outcome.reasons},
        "formats of images": dict(of.images.formats),
        "sizes of images": _coarse(of.images.sides),
        "bytes of images": dict(enumerate(of.images.bytes)),
    }
    for origin, own in of.captions.items():
        found[f"{origin}: reasons of texts"] = {reason: n for name, reason, n in of.outcome.texts if name == origin}
        found[f"{origin}: words of a text"] = dict(enumerate(own.lengths))
    for origin, counts in of.scores.itm.items():
        found[f"{origin}: ITM"] = _tenths(of.scores.thresholds, counts.tolist())
    for origin, counts in of.scores.itc.items():
        if counts.sum():
            found[f"{origin}: ITC"] = dict(enumerate(counts.reshape(20, -1).sum(axis=1).tolist()))
    return found


def shifts(before: Statistics, now: Statistics) -> list[Shift]:
    """Of the distributions that both versions have, the largest first; see :func:`side_by_side`."""
    old, new = map(distributions, side_by_side(before, now))
    found = [Shift(name, stability_index(old[name], new[name])) for name in new if name in old]
    return sorted(found, key=lambda shift: -shift.index)


def stability_index(before: Mapping[object, float], now: Mapping[object, float]) -> float:
    """Population stability index: the symmetric relative entropy of two distributions, at least 0.

    Every kind counts half an observation more than it has, so that one which a version lacks weighs by how much of it
    the other has. 0 where either is empty.
    """
    kinds = [kind for kind in {**before, **now} if before.get(kind) or now.get(kind)]
    old, new = (np.array([of.get(kind, 0) for kind in kinds], float) for of in (before, now))
    if not old.sum() or not new.sum():
        return 0.0
    old, new = ((of + 0.5) / (of.sum() + 0.5 * len(of)) for of in (old, new))
    return float(((new - old) * np.log(new / old)).sum())


def _coarse(sides: Sequence[tuple[int, int, int]]) -> dict[object, float]:
    """By octave of width and height."""
    found: dict[object, float] = {}
    for width, height, n in sides:
        key = width // 4, height // 4
        found[key] = found.get(key, 0) + n
    return found


def _tenths(thresholds: Sequence[float], counts: Sequence[int]) -> dict[object, float]:
    """Scores by tenths, of counts of the thresholds that they reach."""
    found: dict[object, float] = {}
    for threshold, n in zip(thresholds, counts[1:], strict=True):
        tenth = min(9, math.floor(threshold * 10 + 1e-9))
        found[tenth] = found.get(tenth, 0) + n
    return found


# --- alarms ---


def alarms(now: Statistics, before: Statistics | None = None) -> list[Alarm]:
    """What is out of bounds in a version, and what was lost since the one before."""
    found = list(_of_rows(now, before))
    for origin, own in now.captions.items():
        if origin != WEB and own.texts.total >= FEWEST:
            found += _of_captions(origin, own, now)
    if before:
        found += _since(before, now)
    return sorted(found, key=lambda alarm: not alarm.collapse)


def _of_rows(now: Statistics, before: Statistics | None) -> Iterator[Alarm]:
    counts = now.outcome.counts
    if counts.rows and not counts.kept:
        yield Alarm(False, "Nothing is kept", "No text of any row reaches its threshold.")
    if counts.rows and counts.errors / counts.rows > ERRORS:
        yield Alarm(False, "Many rows are errors", f"{_percent(counts.errors / counts.rows)} of the rows.")
    if before is None or not before.outcome.counts.rows or not counts.rows:
        return
    was, is_ = before.outcome.counts.kept / before.outcome.counts.rows, counts.kept / counts.rows
    if abs(is_ - was) > KEPT_MOVED:
        more = "More" if is_ > was else "Fewer"
        yield Alarm(False, f"{more} rows are kept", f"{_percent(was)} of the rows before, {_percent(is_)} now.")


def _of_captions(origin: str, own: Captions, now: Statistics) -> Iterator[Alarm]:
    texts = own.texts
    if texts.share > ONE_CAPTION:
        detail = f"{_percent(texts.share)} of its {texts.total:,} texts are {texts.top[0][0]!r}."
        yield Alarm(True, f"{origin} writes one caption again and again", detail)
    elif texts.total >= DRAWN_TEXTS and texts.drawn < LITTLE_VARIETY:
        detail = f"Of {DRAWN_TEXTS:,} of its texts about {texts.drawn:.0f} differ."
        yield Alarm(True, f"{origin} writes few different captions", detail)
    if own.loops / texts.total > LOOPS:
        detail = (
            f"{own.loops:,} of its texts ({_percent(own.loops / texts.total)}) say the same words three times running."
        )
        yield Alarm(True, f"{origin} loops", detail)
    mean, deviation = now.scores.means.get(origin, {}).get("itm", (math.nan, math.nan))
    if deviation < ALIKE * min(0.5, now.rule.thresholds.synthetic):  # scores lie by their thresholds in any unit
        detail = f"Their ITM scores are {mean:.3f} with a standard deviation of {deviation:.3f}."
        yield Alarm(False, f"The filters find all texts of {origin} alike", detail)


def _since(before: Statistics, now: Statistics) -> Iterator[Alarm]:
    """What a captioner that wrote for both has lost or, where the captioners are others, all of them."""
    earlier, later = side_by_side(before, now)
    for origin, own in later.captions.items():
        was = earlier.captions.get(origin)
        if origin != WEB and was and min(own.texts.total, was.texts.total) >= FEWEST:
            yield from _lost(origin, own, was)


def _lost(origin: str, own: Captions, before: Captions) -> Iterator[Alarm]:
    for what, drawn, is_, was in (
        ("captions", DRAWN_TEXTS, own.texts, before.texts),
        ("words", DRAWN_WORDS, own.words, before.words),
    ):
        if min(is_.total, was.total) >= drawn and is_.drawn < LOST_VARIETY * was.drawn:
            detail = f"Of {drawn:,} {what} drawn about {is_.drawn:,.0f} differ; {was.drawn:,.0f} did before."
            yield Alarm(True, f"{origin}: variety of {what} is lost", detail)
    if abs(own.mean_words - before.mean_words) > LENGTH_MOVED * before.mean_words:
        detail = f"{before.mean_words:.1f} words on average before, {own.mean_words:.1f} now."
        yield Alarm(False, f"{origin}: captions of another length", detail)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"
