"""How good the filters were: their decisions in a curated dataset, where the truth of the texts is known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from capfilt.dataset import CuratedDataset
from capfilt.errors import InputError
from capfilt.evaluate import AtThreshold, average_precision, calibrate, noise_rate, roc_auc
from capfilt.schema import Reason, Source
from capfilt.spec import Quality
from capfilt.text import clean
from capfilt.truth import Judge, read_truth

Bools = npt.NDArray[np.bool_]

_BY_THRESHOLD = Reason.BELOW_THRESHOLD


@dataclass(frozen=True, slots=True)
class SourceQuality:
    """The texts of one source. Rates are fractions of judged texts; None where there are none of the kind.

    Attributes:
        texts: not empty after clean-up.
        judged: of these, those whose truth is known.
        scored: of the judged, those that the filters read.
        kept: of the scored.
        noise_of_all: untrue, of all judged, also of those on unusable images.
        noise_before: untrue, of the scored.
        noise_after: untrue, of the kept.
        roc_auc: of the mean ITM scores: the chance that a true text outscores an untrue one.
        average_precision: of the mean ITM scores.
        precision: true, of the kept.
        recall: kept, of the true that were kept or dropped by the threshold.
        false_positive_rate: kept, of the untrue that were kept or dropped by the threshold.
        not_decided: scored texts that these three leave out: dropped as another's duplicate, or as not the best.
        calibrated: the threshold that would have told the true from the untrue best (capfilt.evaluate.calibrate), by
            the mean ITM scores of the scored.
        problem: why there is none, if not for want of texts of both kinds.
    """

    texts: int
    judged: int
    scored: int
    kept: int
    noise_of_all: float | None
    noise_before: float | None
    noise_after: float | None
    roc_auc: float | None
    average_precision: float | None
    precision: float | None
    recall: float | None
    false_positive_rate: float | None
    not_decided: int
    calibrated: AtThreshold | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class DatasetQuality:
    """A curated dataset.

    Attributes:
        version: of its annotations.
        sources: by capfilt.schema.Source; those that have texts.
        kept: judged texts kept, of all sources.
        noise_before: untrue, of the judged and scored texts of all sources.
        noise_after: untrue, of `kept`.
    """

    dataset: str
    version: int
    sources: dict[str, SourceQuality]
    kept: int
    noise_before: float | None
    noise_after: float | None


@dataclass(frozen=True, slots=True)
class _Texts:
    """Judged texts; N of them.

    Attributes:
        score_N: mean ITM, NaN where not scored.
        decided_N: kept, or dropped by the threshold.
    """

    score_N: npt.NDArray[np.float64]  # noqa: N815  the shape's suffix
    true_N: Bools  # noqa: N815
    kept_N: Bools  # noqa: N815
    decided_N: Bools  # noqa: N815

    @property
    def scored_N(self) -> Bools:  # noqa: N802
        return ~np.isnan(self.score_N)


def measure_quality(quality: Quality, max_false_positive_rate: float | None = None) -> DatasetQuality:
    """Compare what the filters kept with what is true. Reads two columns of the annotations.

    Args:
        max_false_positive_rate: of the calibrated thresholds; the best F1 if None.

    Raises:
        DatasetError: there is no dataset.
        InputError: the truth cannot be read, or knows none of the dataset's texts.
    """
    judge = read_truth(quality.truth)
    dataset = CuratedDataset.for_reading(quality.dataset, quality.storage_options)
    counts = dict.fromkeys(map(str, Source), 0)
    judged: dict[str, list[tuple[float, bool, bool, bool]]] = {source: [] for source in counts}
    for sha256, text in _texts(dataset):
        counts[text["source"]] += 1
        if (verdict := _verdict(judge, sha256, text)) is not None:
            judged[text["source"]].append(verdict)
    if not any(judged.values()):
        raise InputError(
            f"quality: {dataset.output}: the truth knows none of its {sum(counts.values()):,} texts; give the labels "
            "of these images, or the toy web that was curated"
        )
    texts = {source: _as_arrays(rows) for source, rows in judged.items()}
    scored = np.concatenate([own.true_N[own.scored_N] for own in texts.values()])
    kept = np.concatenate([own.true_N[own.kept_N] for own in texts.values()])
    return DatasetQuality(
        dataset.output,
        dataset.versions()["annotations"],
        {
            source: _of_source(counts[source], own, max_false_positive_rate)
            for source, own in texts.items()
            if counts[source]
        },
        len(kept),
        _number(noise_rate(scored)),
        _number(noise_rate(kept)),
    )


def _texts(dataset: CuratedDataset) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Every text that is not empty, with its image's sha256."""
    for batch in dataset.annotations().to_batches(columns=["image_sha256", "texts"]):
        for row in batch.to_pylist():
            for text in row["texts"]:
                if text["text"] and clean(text["text"]):
                    yield row["image_sha256"], text


def _verdict(judge: Judge, sha256: str | None, text: dict[str, Any]) -> tuple[float, bool, bool, bool] | None:
    """(score, true, kept, decided) of a text; None where its truth is not known."""
    true = None if sha256 is None else judge.is_true(sha256, text["text"])
    if true is None:
        return None
    score = math.nan if text["itm"] is None else text["itm"]
    return score, true, text["kept"], text["kept"] or text["reason"] == _BY_THRESHOLD


def _as_arrays(rows: list[tuple[float, bool, bool, bool]]) -> _Texts:
    score_N, true_N, kept_N, decided_N = (np.array(column) for column in zip(*rows, strict=True)) if rows else ([],) * 4
    return _Texts(
        np.asarray(score_N, dtype=float), *(np.asarray(column, dtype=bool) for column in (true_N, kept_N, decided_N))
    )


def _of_source(texts: int, own: _Texts, max_false_positive_rate: float | None) -> SourceQuality:
    scored_N, kept_N, true_N = own.scored_N, own.kept_N, own.true_N
    both = true_N[scored_N].any() and not true_N[scored_N].all()
    calibrated, problem = None, None
    if both:
        true_scores, untrue_scores = own.score_N[scored_N & true_N], own.score_N[scored_N & ~true_N]
        try:
            calibrated = calibrate(true_scores, untrue_scores, max_false_positive_rate=max_false_positive_rate)
        except ValueError as error:  # no threshold stays within the limit
            problem = str(error)
    return SourceQuality(
        texts=texts,
        judged=len(true_N),
        scored=int(scored_N.sum()),
        kept=int(kept_N.sum()),
        noise_of_all=_number(noise_rate(true_N)),
        noise_before=_number(noise_rate(true_N[scored_N])),
        noise_after=_number(noise_rate(true_N[kept_N])),
        roc_auc=roc_auc(own.score_N[scored_N], true_N[scored_N]) if both else None,
        average_precision=average_precision(own.score_N[scored_N], true_N[scored_N]) if both else None,
        precision=_fraction(true_N[kept_N]),
        recall=_fraction(kept_N[own.decided_N & true_N]),
        false_positive_rate=_fraction(kept_N[own.decided_N & ~true_N]),
        not_decided=int((scored_N & ~own.decided_N).sum()),
        calibrated=calibrated,
        problem=problem,
    )


def _fraction(of_N: Bools) -> float | None:
    return float(of_N.mean()) if of_N.size else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
