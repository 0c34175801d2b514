"""How good the filters were: their decisions in a curated dataset, where the truth of the texts is known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from capfilt.calibration import Bools, Calibration, Floats, against_truth
from capfilt.damage import data_files_blamed
from capfilt.dataset import CuratedDataset
from capfilt.errors import InputError
from capfilt.evaluate import AtThreshold, noise_rate
from capfilt.schema import ANNOTATIONS, Reason, Source
from capfilt.spec import Quality
from capfilt.text import clean
from capfilt.truth import Judge, Labels, read_truth

_BY_THRESHOLD = Reason.BELOW_THRESHOLD


@dataclass(frozen=True, slots=True)
class SourceQuality:
    """The texts of one source. Rates are fractions of judged texts; None where there are none of the kind.

    Attributes:
        texts: not empty after clean-up.
        judged: of these, those whose truth is known.
        chosen: of the judged, those that someone searched for to mark them: no fair sample (capfilt.truth.Labels).
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
            the mean ITM scores of the scored; None where filters voted, each by a threshold of its own.
        problem: why there is none, if not for want of texts of both kinds.
        filters: where there were several, each by its own scores, on the scored texts that have one of its.
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
    chosen: int = 0
    calibrated: AtThreshold | None = None
    problem: str | None = None
    filters: dict[str, Calibration] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DatasetQuality:
    """A curated dataset.

    Attributes:
        version: of its annotations.
        sources: by capfilt.schema.Source; those that have texts.
        kept: judged texts kept, of all sources.
        noise_before: untrue, of the judged and scored texts of all sources.
        noise_after: untrue, of `kept`.
        decision: how several filters decided, by the newest run on record: `mean` or `vote`; None if there is none.
    """

    dataset: str
    version: int
    sources: dict[str, SourceQuality]
    kept: int
    noise_before: float | None
    noise_after: float | None
    decision: str | None = None


class _Verdict(NamedTuple):
    """A judged text: its mean score, NaN where not scored, and each filter's."""

    score: float
    true: bool
    kept: bool
    decided: bool
    own: dict[str, float]
    chosen: bool


@dataclass(frozen=True, slots=True)
class _Texts:
    """Judged texts; N of them.

    Attributes:
        score_N: mean ITM, NaN where not scored.
        decided_N: kept, or dropped by the threshold.
        own_N: each filter's score, by the names of their cards; NaN where it gave none.
    """

    score_N: Floats  # noqa: N815  the shape's suffix
    true_N: Bools  # noqa: N815
    kept_N: Bools  # noqa: N815
    decided_N: Bools  # noqa: N815
    own_N: dict[str, Floats]  # noqa: N815
    chosen_N: Bools  # noqa: N815

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
    judged: dict[str, list[_Verdict]] = {source: [] for source in counts}
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
    decision = _decision(dataset)
    return DatasetQuality(
        dataset.output,
        dataset.versions()["annotations"],
        {
            source: _of_source(counts[source], own, decision, max_false_positive_rate)
            for source, own in texts.items()
            if counts[source]
        },
        len(kept),
        _number(noise_rate(scored)),
        _number(noise_rate(kept)),
        decision,
    )


def _decision(dataset: CuratedDataset) -> str | None:
    """Of the newest run on record that wrote rows of this version."""
    runs = {state.provenance.run for state in dataset.committed().values()}
    newest = max(runs, default=None)  # their names begin with when they began
    found = dataset.record(newest).details.get("spec", {}).get("decision") if newest else None
    return str(found) if found else None


def _texts(dataset: CuratedDataset) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Every text that is not empty, with its image's sha256."""
    with data_files_blamed(dataset.output, ANNOTATIONS, dataset.versions()[ANNOTATIONS]):
        for batch in dataset.annotations().to_batches(columns=["image_sha256", "texts"]):
            for row in batch.to_pylist():
                for text in row["texts"]:
                    if text["text"] and clean(text["text"]):
                        yield row["image_sha256"], text


def _verdict(judge: Judge, sha256: str | None, text: dict[str, Any]) -> _Verdict | None:
    """What is known of a text; None where its truth is not."""
    true = None if sha256 is None else judge.is_true(sha256, text["text"])
    if true is None:
        return None
    score = math.nan if text["itm"] is None else text["itm"]
    own = {one["filter"]: one["itm"] for one in text["scores"] or ()}
    chosen = isinstance(judge, Labels) and (sha256, clean(text["text"])) in judge.chosen
    return _Verdict(score, true, text["kept"], text["kept"] or text["reason"] == _BY_THRESHOLD, own, chosen)


def _as_arrays(rows: list[_Verdict]) -> _Texts:
    names = dict.fromkeys(name for row in rows for name in row.own)
    return _Texts(
        score_N=np.array([row.score for row in rows], float),
        true_N=np.array([row.true for row in rows], bool),
        kept_N=np.array([row.kept for row in rows], bool),
        decided_N=np.array([row.decided for row in rows], bool),
        own_N={name: np.array([row.own.get(name, math.nan) for row in rows], float) for name in names},
        chosen_N=np.array([row.chosen for row in rows], bool),
    )


def _of_source(texts: int, own: _Texts, decision: str | None, max_false_positive_rate: float | None) -> SourceQuality:
    scored_N, kept_N, true_N = own.scored_N, own.kept_N, own.true_N

    def judged(score_N: Floats) -> Calibration:
        some_N = ~np.isnan(score_N)
        return against_truth(score_N[some_N], true_N[some_N], max_false_positive_rate=max_false_positive_rate)

    mean = judged(own.score_N)
    voted = decision == "vote" and len(own.own_N) > 1
    return SourceQuality(
        texts=texts,
        judged=len(true_N),
        scored=int(scored_N.sum()),
        kept=int(kept_N.sum()),
        noise_of_all=_number(noise_rate(true_N)),
        noise_before=_number(noise_rate(true_N[scored_N])),
        noise_after=_number(noise_rate(true_N[kept_N])),
        roc_auc=mean.roc_auc,
        average_precision=mean.average_precision,
        precision=_fraction(true_N[kept_N]),
        recall=_fraction(kept_N[own.decided_N & true_N]),
        false_positive_rate=_fraction(kept_N[own.decided_N & ~true_N]),
        not_decided=int((scored_N & ~own.decided_N).sum()),
        chosen=int(own.chosen_N.sum()),
        calibrated=None if voted else mean.best,
        problem=None if voted or mean.roc_auc is None else mean.problem,
        filters={name: judged(score_N) for name, score_N in own.own_N.items()} if len(own.own_N) > 1 else {},
    )


def _fraction(of_N: Bools) -> float | None:
    return float(of_N.mean()) if of_N.size else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
