"""The scores against the truth, where someone knows it: calibration, precision and recall at every threshold."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from capfilt.errors import InputError
from capfilt.evaluate import average_precision, roc_auc
from capfilt.report.tally import Tally
from capfilt.report.thresholds import STEPS
from capfilt.spec import CurateSpec, Input, Truth
from capfilt.spec.cards import Unit
from capfilt.truth import Judge, read_truth

BINS = 10

MOST = 200_000
"""Texts that are judged at most, of each source; which, their hash says."""


@dataclass(frozen=True)
class Judged:
    """The judged texts of one source.

    Attributes:
        texts: scored texts whose truth is known; `true` of them are true.
        bins: of BINS equal ranges of the score: (texts, mean score, fraction true); empty where the scores are no
            probabilities.
        calibration_error: mean distance of score and truth over the bins, weighted by their texts (ECE); None without.
        kept: by threshold, 0 to 1 in STEPS: texts that reach it.
        kept_true: of these, the true ones.
        roc_auc, average_precision: None where all texts are true, or none is.
    """

    texts: int
    true: int
    bins: tuple[tuple[int, float, float], ...]
    calibration_error: float | None
    kept: tuple[int, ...]
    kept_true: tuple[int, ...]
    roc_auc: float | None
    average_precision: float | None


def truth_at(path: str) -> Truth:
    """The truth in a place: a rendered toy web's where it is the directory of one, else labels."""
    if os.path.isfile(os.path.join(path, "truth.parquet")):
        return Truth(toyweb=path)
    return Truth(labels=Input(paths=(path,)))


def find_truth(spec: CurateSpec | None) -> Truth | None:
    """The truth that lies beside the input: that of a rendered toy web, if the input is one.

    It lies beside the folder of shards: the input, or what holds the file that it names or the first that it matches.
    """
    if spec is None or len(spec.input.paths) != 1 or "://" in spec.input.paths[0]:
        return None
    path = spec.input.paths[0].rstrip("/")
    if not os.path.exists(path):
        path = next(glob.iglob(path, recursive=True), path)
    folder = os.path.dirname(path) if os.path.isfile(path) else path
    truth = truth_at(os.path.dirname(folder))
    return truth if truth.toyweb else None


def judge_scores(tally: Tally, truth: Truth, unit: Unit | None) -> dict[str, Judged]:
    """By source; those without a judged text are left out.

    Args:
        unit: of the scores.

    Raises:
        InputError: the truth cannot be read, or knows none of the texts.
    """
    judge = read_truth(truth)
    tally.give("known", "image_sha256", list(judge.images))
    found = {}
    for source in ("web", "synthetic"):
        score_N, true_N = _judged(tally, judge, source)
        if len(score_N):
            found[source] = _measured(score_N, true_N, unit)
    if not found:
        raise InputError("the truth knows none of the dataset's texts; give the labels of these images")
    return found


def _judged(tally: Tally, judge: Judge, source: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    scores, verdicts = [], []
    for batch in tally.batches(
        """
        SELECT image_sha256, text, score FROM texts JOIN rows USING (id) SEMI JOIN known USING (image_sha256)
        WHERE source = $source AND score IS NOT NULL AND clean <> '' ORDER BY hash(image_sha256, text) LIMIT $most
        """,
        source=source,
        most=MOST,
    ):
        for sha256, text, score in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            verdict = judge.is_true(sha256, text)
            if verdict is not None:
                scores.append(score)
                verdicts.append(verdict)
    return np.array(scores, float), np.array(verdicts, bool)


def _measured(score_N: npt.NDArray[np.float64], true_N: npt.NDArray[np.bool_], unit: Unit | None) -> Judged:
    bins = _bins(score_N, true_N) if unit == "probability" else ()
    error = sum(n * abs(score - true) for n, score, true in bins) / len(score_N)
    thresholds = np.arange(STEPS + 1) / STEPS
    both = true_N.any() and not true_N.all()
    return Judged(
        len(score_N),
        int(true_N.sum()),
        bins,
        float(error) if bins else None,
        _reaching(score_N, thresholds),
        _reaching(score_N[true_N], thresholds),
        roc_auc(score_N, true_N) if both else None,
        average_precision(score_N, true_N) if both else None,
    )


def _bins(score_N: npt.NDArray[np.float64], true_N: npt.NDArray[np.bool_]) -> tuple[tuple[int, float, float], ...]:
    bin_N = np.minimum(BINS - 1, (score_N * BINS).astype(int))
    bins = []
    for number in range(BINS):
        mine = bin_N == number
        bins.append(
            (int(mine.sum()), float(score_N[mine].mean()), float(true_N[mine].mean())) if mine.any() else (0, 0.0, 0.0)
        )
    return tuple(bins)


def _reaching(score_N: npt.NDArray[np.float64], thresholds: npt.NDArray[np.float64]) -> tuple[int, ...]:
    return tuple((len(score_N) - np.searchsorted(np.sort(score_N), thresholds, "left")).tolist())
