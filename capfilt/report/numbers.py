"""Every single number of a version, and of two compared. Pure functions of statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from capfilt.records import RunRecord
from capfilt.report.captions import DRAWN_TEXTS, DRAWN_WORDS, NGRAMS, Captions
from capfilt.report.outcome import SMALL
from capfilt.report.statistics import Statistics, side_by_side
from capfilt.schema import Reason

Kind = Literal["count", "fraction", "number"]

Named = Iterator[tuple[str, Kind | Literal["share"], float | None]]
"""A share is a fraction that no one misses where both versions have none of it: that of a reason."""


@dataclass(frozen=True)
class Change:
    """A number of both versions; None where one has no such number."""

    name: str
    kind: Kind
    before: float | None
    now: float | None


def compare(before: Statistics, now: Statistics) -> list[Change]:
    """Every number that either version has, in order; see :func:`capfilt.report.statistics.side_by_side`."""
    old, new = ({name: (kind, value) for name, kind, value in _numbers(of)} for of in side_by_side(before, now))
    found = []
    for name in [*new, *(name for name in old if name not in new)]:
        kind = (new.get(name) or old[name])[0]
        was, is_ = (of.get(name, (kind, None))[1] for of in (old, new))
        if kind == "share" and (was or is_):
            found.append(Change(name, "fraction", was, is_))
        elif kind != "share" and (was, is_) != (None, None):
            found.append(Change(name, kind, was, is_))
    return found


def _numbers(of: Statistics) -> Named:
    yield from _of_rows(of)
    yield from _of_images(of)
    for origin, own in of.captions.items():
        yield from _of_texts(of, origin, own)
    yield from _of_truth(of)
    if of.run:
        yield from _of_run(of.run)


def _of_rows(of: Statistics) -> Named:
    counts = of.outcome.counts
    yield "rows", "count", counts.rows
    yield "rows kept", "fraction", _ratio(counts.kept, counts.rows)
    yield "rows dropped", "fraction", _ratio(counts.dropped, counts.rows)
    yield "rows in error", "fraction", _ratio(counts.errors, counts.rows)
    of_reason = {reason: n for _, reason, n in of.outcome.reasons}
    for reason in Reason:
        yield f"rows, {_words(reason)}", "share", _ratio(of_reason.get(reason, 0), counts.rows)
    yield "threshold, web", "number", of.rule.thresholds.web
    yield "threshold, synthetic", "number", of.rule.thresholds.synthetic


def _of_images(of: Statistics) -> Named:
    images = of.images
    yield "median width", "number", images.median_width
    yield "median height", "number", images.median_height
    yield "median bytes of an image", "count", images.median_bytes
    yield f"images with a side below {SMALL}", "fraction", _ratio(images.small, images.images)


def _of_texts(of: Statistics, origin: str, own: Captions) -> Named:
    reasons = {reason: n for name, reason, n in of.outcome.texts if name == origin}
    total = sum(reasons.values())
    yield f"{origin}: texts", "count", total
    yield f"{origin}: texts kept", "fraction", _ratio(reasons.get(None, 0), total)
    for reason in Reason:
        yield f"{origin}: texts, {_words(reason)}", "share", _ratio(reasons.get(reason, 0), total)
    for name, (mean, deviation) in of.scores.means.get(origin, {}).items():
        yield f"{origin}: {name.upper()}, mean", "number", mean
        yield f"{origin}: {name.upper()}, standard deviation", "number", deviation
    yield f"{origin}: words of a text", "number", own.mean_words
    yield f"{origin}: different texts of {DRAWN_TEXTS:,}", "number", own.texts.drawn
    yield f"{origin}: different words of {DRAWN_WORDS:,}", "number", own.words.drawn
    yield f"{origin}: vocabulary", "count", own.words.distinct
    yield f"{origin}: most frequent text", "fraction", own.texts.share
    for n in NGRAMS:
        yield f"{origin}: repeated {n}-grams", "fraction", own.repeated[n]
    yield f"{origin}: texts that loop", "fraction", own.loops / own.texts.total


def _of_truth(of: Statistics) -> Named:
    for source, own in of.judged.items():
        yield f"truth, {source}: judged texts", "count", own.texts
        yield f"truth, {source}: of these true", "fraction", _ratio(own.true, own.texts)
        yield f"truth, {source}: ROC AUC", "number", own.roc_auc
        yield f"truth, {source}: average precision", "number", own.average_precision
        yield f"truth, {source}: calibration error", "number", own.calibration_error


def _of_run(run: RunRecord) -> Named:
    """Of the run that left the version: rows a second, also of each stage's, a worker's."""
    yield "run: rows a second", "number", run.images_per_second
    yield "run: models busy", "fraction", run.details.get("busy")
    for stage, seconds in (run.details.get("seconds") or {}).items():
        if seconds:
            yield f"run: rows a second of a worker, {stage}", "number", run.rows / seconds


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _words(reason: str) -> str:
    return reason.replace("_", " ")
