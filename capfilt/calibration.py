"""A filter's scores against the truth: how well they tell true texts from others, and at which threshold best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from capfilt.evaluate import AtThreshold, at_threshold, average_precision, calibrate, roc_auc

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of N texts whose truth is known; the rest is None where all of them are true, or none is.

    Attributes:
        texts: scored; `true` of them are true.
        roc_auc: the chance that a true text outscores an untrue one.
        average_precision: see capfilt.evaluate.average_precision.
        in_use: at the threshold that decides; None where none does. A vote's threshold is NaN.
        best: at the threshold that would tell the true from the untrue best (capfilt.evaluate.calibrate).
        problem: why there is no best.
    """

    texts: int
    true: int
    roc_auc: float | None = None
    average_precision: float | None = None
    in_use: AtThreshold | None = None
    best: AtThreshold | None = None
    problem: str | None = None


def against_truth(
    score_N: Floats, true_N: Bools, threshold: float | None = None, max_false_positive_rate: float | None = None
) -> Calibration:
    """Compare one filter's scores, or the mean of several, with the truth.

    Args:
        threshold: that decides.
        max_false_positive_rate: of the best threshold; the best F1 if None.

    Raises:
        ValueError: a score is NaN.
    """
    found = Calibration(len(true_N), int(true_N.sum()))
    if not true_N.any() or true_N.all():
        return replace(found, problem="it takes texts that are true and texts that are not")
    found = replace(
        found,
        roc_auc=roc_auc(score_N, true_N),
        average_precision=average_precision(score_N, true_N),
        in_use=None if threshold is None else at_threshold(score_N, true_N, threshold),
    )
    try:
        best = calibrate(score_N[true_N], score_N[~true_N], max_false_positive_rate=max_false_positive_rate)
    except ValueError as error:  # no threshold stays within the limit
        return replace(found, problem=str(error))
    return replace(found, best=best)


def vote_against_truth(scores: Sequence[Floats], thresholds: Sequence[float], true_N: Bools) -> Calibration:
    """Compare the verdict of more than half of several filters, each by its own threshold, with the truth."""
    found = Calibration(len(true_N), int(true_N.sum()))
    if not true_N.any() or true_N.all():
        return replace(found, problem="it takes texts that are true and texts that are not")
    ayes_N = sum((own >= least).astype(int) for own, least in zip(scores, thresholds, strict=True))
    kept_N = np.asarray(2 * ayes_N > len(scores), dtype=float)
    return replace(found, in_use=replace(at_threshold(kept_N, true_N, 0.5), threshold=math.nan))
