"""How good a model is: retrieval, captioning, and the filter where the truth is known. Pure; no model, no file.

Shapes: I images, T texts, N scores; Q queries, C candidates (images x texts one way, texts x images the other), K best.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sacrebleu.metrics.bleu import BLEU

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Recall:
    """R@k both ways: k -> fraction of queries in [0, 1]. BLIP's TR@k and IR@k, which it prints times 100."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def recall_at_k(
    score_IT: npt.ArrayLike,
    image_of_text_T: npt.ArrayLike,
    ks: Sequence[int] = (1, 5, 10),
    *,
    score_TI: npt.ArrayLike | None = None,
) -> Recall:
    """How often a true match is among the k best (salesforce/BLIP, train_retrieval.py, itm_eval).

    An image hits when any of its texts is in its top k; a text hits when its one image is. A wrong candidate that
    scores the same as the right one counts as ahead of it, so that a model that says nothing scores nothing.

    Args:
        score_IT: higher is better; -inf for "not considered".
        image_of_text_T: for each text the row of its image in ``score_IT``. Every image has a text.
        score_TI: the scores of texts against images where they differ from ``score_IT``'s, as after ``rerank``.

    Raises:
        ValueError: shapes, indices or ``ks`` do not fit, or a score is NaN.
    """
    forth_IT = _matrix("score_IT", score_IT)
    back_TI = forth_IT.T if score_TI is None else _matrix("score_TI", score_TI)
    images, texts = forth_IT.shape
    image_T = np.asarray(image_of_text_T)
    if back_TI.shape != (texts, images):
        raise ValueError(f"score_TI: shape {back_TI.shape} is not score_IT's turned round, {(texts, images)}")
    if image_T.shape != (texts,) or not np.issubdtype(image_T.dtype, np.integer):
        raise ValueError(
            f"image_of_text_T: {image_T.dtype} of shape {image_T.shape} is not one index for {texts} texts"
        )
    if not np.array_equal(np.unique(image_T), np.arange(images)):
        raise ValueError(f"image_of_text_T: its values are not 0 to {images - 1} with a text for every image")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: {ks} are not counts from 1")

    own_T = forth_IT[image_T, np.arange(texts)]
    best_I = np.full(images, -np.inf)
    np.maximum.at(best_I, image_T, own_T)
    own_ahead_I = np.bincount(image_T[own_T >= best_I[image_T]], minlength=images)
    rank_I = (forth_IT >= best_I[:, None]).sum(axis=1) - own_ahead_I
    rank_T = (back_TI >= back_TI[np.arange(texts), image_T][:, None]).sum(axis=1) - 1
    return Recall({k: float((rank_I < k).mean()) for k in ks}, {k: float((rank_T < k).mean()) for k in ks})


def best_candidates(score_QC: npt.ArrayLike, k_test: int) -> npt.NDArray[np.int64]:
    """The columns of each row's ``k_test`` highest scores (all where there are fewer), best first: int64 (Q, K).

    Of equal scores the lower column comes first. BLIP reranks 256 on COCO.

    Raises:
        ValueError: ``k_test`` is below 1, ``score_QC`` is not a matrix, or a score is NaN.
    """
    if k_test < 1:
        raise ValueError(f"k_test: {k_test} is not a number of candidates")
    return np.stack([np.argsort(-row_C, kind="stable")[:k_test] for row_C in _matrix("score_QC", score_QC)])


def rerank(score_QC: npt.ArrayLike, candidate_QK: npt.ArrayLike, itm_QK: npt.ArrayLike) -> Floats:
    """ITC similarity + ITM score for the candidates, -inf for the rest (salesforce/BLIP, evaluation).

    Args:
        score_QC: ITC cosine similarities, images against texts or texts against images.
        candidate_QK: ``best_candidates(score_QC, k_test)``.
        itm_QK: the ITM head's score of each candidate. BLIP adds the match logit itself, not its probability.

    Raises:
        ValueError: shapes do not fit, a column does not exist, or a score is NaN.
    """
    before_QC, score_QK, column_QK = _matrix("score_QC", score_QC), _matrix("itm_QK", itm_QK), np.asarray(candidate_QK)
    queries, candidates = before_QC.shape
    if column_QK.shape != score_QK.shape or column_QK.shape[0] != queries:
        raise ValueError(f"itm_QK: {score_QK.shape} scores for {column_QK.shape} candidates of {queries} queries")
    if column_QK.size and not 0 <= column_QK.min() <= column_QK.max() < candidates:
        raise ValueError(f"candidate_QK: a column is not between 0 and {candidates - 1}")
    after_QC = np.full(before_QC.shape, -np.inf)
    np.put_along_axis(after_QC, column_QK, np.take_along_axis(before_QC, column_QK, 1) + score_QK, 1)
    return after_QC


def _matrix(name: str, values: npt.ArrayLike) -> Floats:
    matrix = np.asarray(values, dtype=float)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{name}: shape {matrix.shape} is not a matrix of scores")
    if np.isnan(matrix).any():
        row, column = np.argwhere(np.isnan(matrix))[0]
        raise ValueError(f"{name}: the score at row {row}, column {column} is NaN")
    return matrix


_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b")
_FUSED = re.compile(r"\b(?:(can)(not)|(gon|wan)(na)|(got)(ta))\b")
_WORD = re.compile(
    r"n't\b|'(?:s|m|d|re|ve|ll)\b"
    r"|(?:[^\W\d_]\.){2,}|(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|inc)\."  # abbreviations keep their full stops
    r"|\d+(?:[.,:/]\d+)+"
    r"|\w+(?:[-'./&]\w+)*"
    r"|\S"
)
_DROPPED = frozenset("'`\".?!,:;-…")


def words(caption: str) -> list[str]:
    """A caption as the COCO tools compare it: lower case, Penn Treebank words, punctuation dropped.

    An approximation of the Java PTBTokenizer behind pycocoevalcap: clitics are split ("is n't", "dog 's"), hyphenated
    words stay whole, ``'`".?!,:;-`` go and other signs are words. It differs on URLs, file names, hashtags and units
    stuck to numbers, and leaves a bracket a bracket where Java writes -lrb-.
    """
    text = caption.lower().replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"')
    text = _FUSED.sub(lambda fused: " ".join(filter(None, fused.groups())), _CLITIC.sub(r" \1", text))
    return [word for word in _WORD.findall(text) if word not in _DROPPED]


def bleu4(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 in [0, 1] without smoothing, by sacrebleu; the brevity penalty takes the closest reference.

    The COCO tools add 1e-15 to every count, so where no 4-gram matches they print up to 0.0002 instead of 0.

    Args:
        candidates: one caption an image, as generated; ``words`` splits it.
        references: its true captions, at least one; their number may vary.

    Raises:
        ValueError: there is no candidate, or an image has no reference.
    """
    _check_captions(candidates, references)
    most = max(map(len, references))
    padded = [[*texts, *[texts[0]] * (most - len(texts))] for texts in references]  # a repeat changes no count
    streams = [[" ".join(words(text)) for text in stream] for stream in zip(*padded, strict=True)]
    scorer = BLEU(tokenize="none", smooth_method="none", force=True)
    return float(scorer.corpus_score([" ".join(words(text)) for text in candidates], streams).score) / 100


_Ngrams = Mapping[tuple[str, ...], float]  # -> count, or count x idf


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D in [0, 10], the number that the COCO tools print as CIDEr: 1.278 is the papers' 127.8.

    Vedantam, Zitnick, Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015, its CIDEr-D with the
    authors' sigma 6 and factor 10; document frequencies are the references' own. Equal to pycocoevalcap 1.2 on equal
    words. Written here because no maintained package has it without Java archives or a second training stack.

    Args:
        candidates: one caption an image, as generated; ``words`` splits it.
        references: its true captions, at least one; their number may vary.

    Raises:
        ValueError: fewer than two images, for which every n-gram weighs nothing, or an image has no reference.
    """
    _check_captions(candidates, references)
    images = len(candidates)
    if images < 2:
        raise ValueError("candidates: CIDEr of one image is always 0; give two or more")
    count_NR = [[_ngrams(text) for text in texts] for texts in references]
    seen_in = Counter(ngram for count_R in count_NR for ngram in {g for counts in count_R for n in counts for g in n})

    def weigh(counts: Sequence[_Ngrams]) -> list[_Ngrams]:
        return [{g: tf * math.log(images / max(1, seen_in[g])) for g, tf in of_n.items()} for of_n in counts]

    total = 0.0
    for candidate, count_R in zip(candidates, count_NR, strict=True):
        counts = _ngrams(candidate)
        own, length = weigh(counts), sum(counts[0].values())
        for other in count_R:
            penalty = math.exp(-((length - sum(other[0].values())) ** 2) / (2 * 6.0**2))
            total += penalty * sum(map(_clipped_cosine, own, weigh(other))) / 4 / len(count_R)
    return 10 * total / images


def _ngrams(caption: str) -> list[_Ngrams]:
    """The counts of its n-grams, for n = 1 to 4."""
    text = words(caption)
    return [Counter(zip(*(text[start:] for start in range(n)), strict=False)) for n in range(1, 5)]


def _clipped_cosine(own: _Ngrams, other: _Ngrams) -> float:
    """Of tf-idf vectors; an n-gram repeated beyond the reference's count earns nothing."""
    norms = math.hypot(*own.values()) * math.hypot(*other.values())
    return sum(min(w, other[g]) * other[g] for g, w in own.items() if g in other) / norms if norms else 0.0


def _check_captions(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not candidates or len(candidates) != len(references):
        raise ValueError(f"references: {len(references)} images for {len(candidates)} candidates; at least one each")
    for image, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"references: image {image} has {texts!r}, not a list of one caption or more")


@dataclass(frozen=True, slots=True)
class AtThreshold:
    """A filter that keeps what scores at least ``threshold`` (capfilt.decide's rule), where the truth is known.

    Attributes:
        precision: fraction of the kept that is true; NaN where nothing is kept.
        recall: fraction of the true that is kept.
        false_positive_rate: fraction of the untrue that is kept.
    """

    threshold: float
    precision: float
    recall: float
    false_positive_rate: float


def at_threshold(score_N: npt.ArrayLike, true_N: npt.ArrayLike, threshold: float) -> AtThreshold:
    """Precision, recall and false positive rate of a threshold.

    Args:
        score_N: any numbers, higher is truer.
        true_N: booleans.

    Raises:
        ValueError: a score or the threshold is NaN, all texts are true or none is, or the lengths differ.
    """
    if math.isnan(threshold):
        raise ValueError("threshold: NaN keeps nothing and drops nothing")
    return _judge(*_by_truth(score_N, true_N), threshold)


def roc_auc(score_N: npt.ArrayLike, true_N: npt.ArrayLike) -> float:
    """The chance that a true text outscores an untrue one, a tie counting half: [0, 1], 0.5 is guessing.

    Raises:
        ValueError: as ``at_threshold``.
    """
    good, bad = _by_truth(score_N, true_N)
    bad = np.sort(bad)
    below = np.searchsorted(bad, good, "left") + np.searchsorted(bad, good, "right")
    return float(below.mean() / 2 / len(bad))


def average_precision(score_N: npt.ArrayLike, true_N: npt.ArrayLike) -> float:
    """Precision averaged over the gains in recall, from the highest score down; equal scores enter together. In (0, 1].

    scikit-learn's definition, without interpolation; guessing scores the fraction of true texts.

    Raises:
        ValueError: as ``at_threshold``.
    """
    good, bad = (np.sort(scores) for scores in _by_truth(score_N, true_N))
    steps, gains = np.unique(good, return_counts=True)
    hits = len(good) - np.searchsorted(good, steps, "left")
    alarms = len(bad) - np.searchsorted(bad, steps, "left")
    return float((gains * hits / (hits + alarms)).sum() / len(good))


def noise_rate(true_N: npt.ArrayLike) -> float:
    """The fraction of these texts that is not true, in [0, 1]; NaN where there are none."""
    true = np.asarray(true_N)
    if true.ndim != 1 or (true.size and true.dtype != bool):
        raise ValueError(f"true_N: {true.dtype} of shape {true.shape} is not a list of booleans")
    return float(1 - true.mean()) if true.size else math.nan


def calibrate(
    matched_N: npt.ArrayLike, shuffled_M: npt.ArrayLike, *, max_false_positive_rate: float | None = None
) -> AtThreshold:
    """A threshold from pairs whose truth is known by construction: human pairs, and the same with captions shuffled.

    Without a limit, the threshold of the best F1; with one, the lowest that keeps at most this fraction of the
    shuffled pairs. It lies half-way between the lowest score it keeps and the highest it drops. F1 and precision
    depend on how many shuffled pairs there are to a matched one; the other two numbers do not.

    Args:
        matched_N: scores of true pairs.
        shuffled_M: scores of untrue pairs. A shuffle may give an image a caption that is true of it too; leave it out.

    Raises:
        ValueError: either is empty or has a NaN, the limit is not in [0, 1], or the highest scores are shuffled pairs'
            so that no threshold stays within the limit.
    """
    limit = max_false_positive_rate
    if limit is not None and not 0 <= limit <= 1:
        raise ValueError(f"max_false_positive_rate: {limit} is not a fraction between 0 and 1")
    good, bad = np.sort(_scores("matched_N", matched_N)), np.sort(_scores("shuffled_M", shuffled_M))
    steps = np.unique(np.concatenate([good, bad]))
    hits, alarms = (len(scores) - np.searchsorted(scores, steps, "left") for scores in (good, bad))
    if limit is None:
        best = int(np.argmax(2 * hits / (hits + alarms + len(good))))
    elif alarms[-1] / len(bad) > limit:
        raise ValueError(
            f"max_false_positive_rate: {alarms[-1]} of {len(bad)} untrue pairs have the highest score of all, "
            f"so no threshold keeps at most {limit} of them; allow more, or train the filter longer"
        )
    else:
        best = int(np.argmax(alarms / len(bad) <= limit))
    return _judge(good, bad, _between(steps[best - 1], steps[best]) if best else float(steps[0]))


def _between(low: float, high: float) -> float:
    middle = float(low / 2 + high / 2)
    return middle if low < middle <= high else float(high)


def _judge(good: Floats, bad: Floats, threshold: float) -> AtThreshold:
    hits, alarms = int((good >= threshold).sum()), int((bad >= threshold).sum())
    precision = hits / (hits + alarms) if hits + alarms else math.nan
    return AtThreshold(float(threshold), precision, hits / len(good), alarms / len(bad))


def _by_truth(score_N: npt.ArrayLike, true_N: npt.ArrayLike) -> tuple[Floats, Floats]:
    """The scores of the true texts and of the untrue ones, neither empty."""
    score, true = _scores("score_N", score_N), np.asarray(true_N)
    if true.shape != score.shape or true.dtype != bool:
        raise ValueError(
            f"true_N: {true.dtype} of shape {true.shape} is not one boolean for each of {len(score)} scores"
        )
    if true.all() or not true.any():
        raise ValueError(f"true_N: {true.sum()} of {len(true)} texts are true; this needs true and untrue ones")
    return score[true], score[~true]


def _scores(name: str, values: npt.ArrayLike) -> Floats:
    scores = np.asarray(values, dtype=float)
    if scores.ndim != 1 or not scores.size:
        raise ValueError(f"{name}: shape {scores.shape} is not a list of one score or more")
    if np.isnan(scores).any():
        raise ValueError(f"{name}: {np.isnan(scores).sum()} of {len(scores)} scores are NaN")
    return scores
