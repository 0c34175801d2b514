"""How well filters of any kind tell the texts of test images from others, or true texts from untrue ones.

N  texts of a sample
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from capfilt.calibration import Bools, Calibration, Floats, against_truth, vote_against_truth
from capfilt.models.itm import Score
from capfilt.models.squares import Show
from capfilt.spec import AnyFilter, Decision
from capfilt.testset import LabelledImage
from capfilt.truth import Judge, Labels

_DRAWS = 20
"""Tries to give an image a text that is not its own."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A filter on test pairs, and on shuffled ones, at most as many. None where there is no answer.

    Attributes:
        matched: test pairs, but those that are known to be untrue.
        shuffled: pairs of an image and another's text.
        left_out: shuffled pairs that are true all the same, or for which there was no other text.
        unit: of the score: `probability` of a match, or `cosine` similarity.
        roc_auc, average_precision: of the score, over both.
        threshold: of the score; the rest is at it. See capfilt.evaluate.calibrate.
        precision, recall, false_positive_rate: as of capfilt.evaluate.AtThreshold.
        problem: why there is no threshold.
    """

    matched: int
    shuffled: int
    left_out: int
    unit: str
    roc_auc: float | None = None
    average_precision: float | None = None
    threshold: float | None = None
    precision: float | None = None
    recall: float | None = None
    false_positive_rate: float | None = None
    problem: str | None = None


def calibrated(score_N: Floats, sample: Sample, unit: str, max_false_positive_rate: float | None) -> Calibrated:
    """The threshold that tells the images' own texts from others'.

    Args:
        score_N: of a sample of shuffled pairs.
        unit: of the scores, as the filter's card has it.
    """
    found = against_truth(score_N, sample.true_N, max_false_positive_rate=max_false_positive_rate)
    counts = Calibrated(found.true, found.texts - found.true, sample.left_out, unit)
    if found.roc_auc is None:
        return replace(counts, problem="no image has a text of another that is not true of it too; give more images")
    best = asdict(found.best) if found.best else {}
    return replace(
        counts,
        roc_auc=found.roc_auc,
        average_precision=found.average_precision,
        problem=found.problem,
        **best,
    )


@dataclass(frozen=True, slots=True)
class Judged:
    """What filters say of texts whose truth is known, each and together.

    Attributes:
        texts: that all of them scored; `true` of them are true.
        left_out: labels of images that are not among the test images; of shuffled pairs, as Calibrated has it.
        filters: by their cards' names; `in_use` is at the card's threshold for web texts.
        units: of their scores, by the same names.
        decision: of several filters, `mean` or `vote`; None of a single one.
        together: how they judge by it.
        chosen: of the texts, as capfilt.quality.SourceQuality has it.
    """

    texts: int
    true: int
    left_out: int
    filters: dict[str, Calibration]
    units: dict[str, str]
    decision: str | None = None
    together: Calibration | None = None
    chosen: int = 0


def judged(
    scores: Mapping[str, Floats],
    sample: Sample,
    cards: Sequence[AnyFilter],
    decision: Decision,
    max_false_positive_rate: float | None,
) -> Judged:
    """Compare filters with the truth, and what they decide together.

    Args:
        scores: of the sample, by the names of the cards.
    """
    limit, true_N = max_false_positive_rate, sample.true_N
    thresholds = {card.name: card.thresholds.web for card in cards}
    own = {name: against_truth(scores[name], true_N, least, limit) for name, least in thresholds.items()}
    found = Judged(len(true_N), int(true_N.sum()), sample.left_out, own, {card.name: card.unit for card in cards})
    found = replace(found, chosen=sample.chosen)
    if len(cards) == 1:
        return found
    if decision == "vote":
        together = vote_against_truth([scores[name] for name in thresholds], list(thresholds.values()), true_N)
    else:
        mean_N = np.mean([scores[name] for name in thresholds], axis=0)
        together = against_truth(mean_N, true_N, fmean(thresholds.values()), limit)
    return replace(found, decision=decision, together=together)


class Scorer(Protocol):
    """A filter of any kind; see capfilt.models.itm.ItmFilter."""

    def score(self, images: Any, texts: Sequence[Sequence[str]]) -> Sequence[Sequence[Score]]:
        """Judge every text of every image."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """Texts to judge a filter by: N in all.

    Attributes:
        texts: of each test image, cleaned.
        true_N: bool, of all of them in that order.
        left_out: what could not be made or used.
        chosen: labels of texts that someone searched for (capfilt.truth.Labels).
    """

    texts: list[list[str]]
    true_N: Bools  # noqa: N815  the shape's suffix
    left_out: int
    chosen: int = 0


def shuffled_pairs(images: Sequence[LabelledImage], judge: Judge | None, seed: int) -> Sample:
    """The images' own texts, but those known to be untrue, and as many of others (:func:`shuffled_texts`)."""
    own = [
        [text for text, came in zip(image.cleaned, image.texts, strict=True) if not _known_untrue(judge, image, came)]
        for image in images
    ]
    wrong = shuffled_texts(images, judge, seed)
    true = [verdict for mine, others in zip(own, wrong, strict=True) for verdict in _marked(mine, others)]
    left_out = sum(map(len, own)) - sum(map(len, wrong))
    return Sample([[*mine, *others] for mine, others in zip(own, wrong, strict=True)], np.array(true, bool), left_out)


def _known_untrue(judge: Judge | None, image: LabelledImage, text: str) -> bool:
    return judge is not None and judge.is_true(image.sha256, text) is False


def _marked(own: Sequence[str], others: Sequence[str]) -> list[bool]:
    return [True] * len(own) + [False] * len(others)


def labelled_texts(images: Sequence[LabelledImage], labels: Labels) -> Sample:
    """Every text that labels know of a test image, whoever wrote it."""
    of: dict[str, dict[str, bool]] = defaultdict(dict)
    for (sha256, text), verdict in labels.true.items():
        if text:
            of[sha256][text] = verdict
    known = [of.get(image.sha256, {}) for image in images]
    true = np.array([verdict for own in known for verdict in own.values()], bool)
    chosen = sum(
        (image.sha256, text) in labels.chosen for image, own in zip(images, known, strict=True) for text in own
    )
    return Sample([list(own) for own in known], true, sum(map(len, of.values())) - len(true), chosen)


def score_samples(filter_: Scorer, show: Show, samples: Sequence[Sample]) -> list[Floats]:
    """The scores of each sample's texts [N], in its order; every image is seen once for all samples.

    Raises:
        FloatingPointError: a score is not a number.
    """
    scores: list[list[float]] = [[] for _ in samples]
    rest = zip(*(sample.texts for sample in samples), strict=True)
    for batch in show(0, len(samples[0].texts)):
        asked = [next(rest) for _ in range(len(batch))]  # of each image its texts in each sample
        answers = filter_.score(batch, [[text for some in own for text in some] for own in asked])
        for own, answer in zip(asked, answers, strict=True):
            numbers = iter(answer)
            for sample_scores, some in zip(scores, own, strict=True):
                sample_scores += [next(numbers).itm for _ in some]
    return [np.array(own, float) for own in scores]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Decisions of a filter whose weights are not float32, against those that they would be in float32.

    Attributes:
        texts: test pairs and shuffled ones.
        threshold: the card's, for web texts.
        flipped: decided otherwise; `fraction` of the texts.
        largest: difference of two scores.
    """

    texts: int
    threshold: float
    flipped: int
    fraction: float
    largest: float


def compare_precision(own: npt.ArrayLike, exact: npt.ArrayLike, threshold: float) -> Agreement:
    """Compare scores of the same texts, text by text; one or more.

    Args:
        own: as the card's dtype has them.
        exact: in float32.
    """
    own_N, exact_N = np.asarray(own), np.asarray(exact)
    flipped_N = (own_N >= threshold) != (exact_N >= threshold)
    largest = float(np.abs(own_N - exact_N).max())
    return Agreement(len(own_N), threshold, int(flipped_N.sum()), float(flipped_N.mean()), largest)


def shuffled_texts(images: Sequence[LabelledImage], judge: Judge | None, seed: int) -> list[list[str]]:
    """For each text of an image another image's, cleaned, that is not one of its own; none where that one is true too.

    Args:
        judge: knows of some texts that they are true; others are taken to be untrue.

    Returns:
        For each image as many texts as it has, or fewer.
    """
    rng = random.Random(seed)
    everyone = [pair for image in images for pair in zip(image.cleaned, image.texts, strict=True)]
    wrong: list[list[str]] = []
    for image in images:
        draws = [_another(everyone, image.cleaned, rng) for _ in image.cleaned]
        known = (draw for draw in draws if draw is not None)
        wrong.append([cleaned for cleaned, text in known if not (judge and judge.is_true(image.sha256, text))])
    return wrong


def _another(everyone: Sequence[tuple[str, str]], own: Sequence[str], rng: random.Random) -> tuple[str, str] | None:
    """A text, cleaned and as it came, that is not one of these."""
    draws = (everyone[rng.randrange(len(everyone))] for _ in range(_DRAWS))
    return next((draw for draw in draws if draw[0] not in own), None)
