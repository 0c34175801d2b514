"""What a captioner writes of test images, and how well a filter tells their texts from others."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from capfilt.evaluate import average_precision, bleu4, calibrate, cider, roc_auc
from capfilt.models.captioner import Captioner
from capfilt.models.itm import ItmFilter
from capfilt.models.squares import Show
from capfilt.testset import LabelledImage
from capfilt.truth import Judge

_DRAWS = 20
"""Tries to give an image a text that is not its own."""


@dataclass(frozen=True, slots=True)
class Captioned:
    """Captions against the images' own texts, and against the truth.

    Attributes:
        bleu4: in [0, 1].
        cider: in [0, 10]; None for a single image, of which it says nothing.
        mean_words: of a caption.
        distinct: different captions.
        judged: captions whose truth is known.
        true: fraction of the judged that are true; None where none is judged.
        exact: fraction that are true and leave nothing out; None where the truth does not say.
    """

    bleu4: float
    cider: float | None
    mean_words: float
    distinct: int
    judged: int
    true: float | None
    exact: float | None


def caption_images(
    captioner: Captioner, show: Show, images: Sequence[LabelledImage], beams: int, judge: Judge | None
) -> Captioned:
    """Caption every image, and compare.

    Raises:
        FloatingPointError: the network gives no finite logits.
    """
    shown = show(0, len(images))
    captions = [caption for pixels_BCSS in shown for caption in captioner.describe(pixels_BCSS, beams)]
    references = [image.texts for image in images]
    both = [(image.sha256, caption) for image, caption in zip(images, captions, strict=True)] if judge else []
    true = [judge.is_true(*pair) for pair in both] if judge else []
    exact = [judge.names_whole(*pair) for pair in both] if judge else []
    return Captioned(
        bleu4=bleu4(captions, references),
        cider=cider(captions, references) if len(captions) > 1 else None,
        mean_words=float(np.mean([len(caption.split()) for caption in captions])),
        distinct=len(set(captions)),
        judged=sum(verdict is not None for verdict in true),
        true=_fraction(true),
        exact=_fraction(exact),
    )


def _fraction(verdicts: Sequence[bool | None]) -> float | None:
    known = [verdict for verdict in verdicts if verdict is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A filter on test pairs, and on shuffled ones, at most as many. None where there is no answer.

    Attributes:
        matched: test pairs.
        shuffled: pairs of an image and another's text.
        left_out: shuffled pairs that are true all the same, or for which there was no other text.
        roc_auc, average_precision: of P(match), over both.
        threshold: of P(match); the rest is at it. See capfilt.evaluate.calibrate.
        precision, recall, false_positive_rate: as of capfilt.evaluate.AtThreshold.
        problem: why there is no threshold.
    """

    matched: int
    shuffled: int
    left_out: int
    roc_auc: float | None = None
    average_precision: float | None = None
    threshold: float | None = None
    precision: float | None = None
    recall: float | None = None
    false_positive_rate: float | None = None
    problem: str | None = None


def calibrate_filter(
    filter_: ItmFilter,
    show: Show,
    images: Sequence[LabelledImage],
    judge: Judge | None,
    seed: int,
    max_false_positive_rate: float | None,
) -> Calibrated:
    """Find the threshold that tells the images' own texts from others'.

    Raises:
        FloatingPointError: a score is not a number.
    """
    matched, shuffled = match_probabilities(filter_, show, images, judge, seed)
    counts = Calibrated(len(matched), len(shuffled), len(matched) - len(shuffled))
    if not shuffled:
        return replace(counts, problem="no image has a text of another that is not true of it too; give more images")
    both = [*matched, *shuffled], [True] * len(matched) + [False] * len(shuffled)
    found = replace(counts, roc_auc=roc_auc(*both), average_precision=average_precision(*both))
    try:
        best = calibrate(matched, shuffled, max_false_positive_rate=max_false_positive_rate)
    except ValueError as error:  # no threshold stays within the limit
        return replace(found, problem=str(error))
    return replace(found, **asdict(best))


def match_probabilities(
    filter_: ItmFilter, show: Show, images: Sequence[LabelledImage], judge: Judge | None, seed: int
) -> tuple[list[float], list[float]]:
    """Of the images' own texts, and of others' (:func:`shuffled_texts`).

    Raises:
        FloatingPointError: a score is not a number.
    """
    wrong = shuffled_texts(images, judge, seed)
    rest = ([*image.cleaned, *others] for image, others in zip(images, wrong, strict=True))
    matched, shuffled, left = list[float](), list[float](), iter(images)
    for pixels_BCSS in show(0, len(images)):
        for scores in filter_.score(pixels_BCSS, [next(rest) for _ in pixels_BCSS]):
            own = len(next(left).cleaned)
            matched += [score.itm for score in scores[:own]]
            shuffled += [score.itm for score in scores[own:]]
    return matched, shuffled


@dataclass(frozen=True, slots=True)
class Agreement:
    """Decisions of a filter whose weights are not float32, against those that they would be in float32.

    Attributes:
        texts: test pairs and shuffled ones.
        threshold: the card's, for web texts.
        flipped: decided otherwise; `fraction` of the texts.
        largest: difference of two match probabilities.
    """

    texts: int
    threshold: float
    flipped: int
    fraction: float
    largest: float


def compare_precision(own: Sequence[float], exact: Sequence[float], threshold: float) -> Agreement:
    """Compare match probabilities of the same texts, text by text; one or more.

    Args:
        own: as the card's dtype has them.
        exact: in float32.
    """
    own_N, exact_N = np.array(own), np.array(exact)
    flipped_N = (own_N >= threshold) != (exact_N >= threshold)
    largest = float(np.abs(own_N - exact_N).max())
    return Agreement(len(own), threshold, int(flipped_N.sum()), float(flipped_N.mean()), largest)


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
