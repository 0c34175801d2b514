"""The numbers of an evaluation against published values, slow arithmetic written again, and scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics

from capfilt.evaluate import (
    at_threshold,
    average_precision,
    best_candidates,
    bleu4,
    calibrate,
    cider,
    noise_rate,
    recall_at_k,
    rerank,
    roc_auc,
    words,
)

Array = np.ndarray[Any, Any]

# Retrieval ------------------------------------------------------------------------------------------------------------

FEW_LEVELS = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0])  # many ties


@st.composite
def retrievals(
    draw: st.DrawFn, levels: st.SearchStrategy[float] = FEW_LEVELS, unique: bool = False
) -> tuple[Array, Array]:
    """Scores of images against texts, and the image of each text; every image has one text or more."""
    images, more = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    extra = draw(st.lists(st.integers(0, images - 1), min_size=more, max_size=more))
    image_T = np.array(draw(st.permutations([*range(images), *extra])))
    return draw(arrays(float, (images, images + more), elements=levels, unique=unique)), image_T


def hit(score_C: Array, right: set[int], k: int) -> bool:
    """Sorts as an opponent would: among equal scores the right ones last."""
    order = sorted(range(len(score_C)), key=lambda column: (-score_C[column], column in right))
    return bool(right & set(order[:k]))


@given(retrievals(), st.integers(1, 8))
def test_recall_is_counted_from_sorted_rows(case: tuple[Array, Array], k: int) -> None:
    score_IT, image_T = case
    recall = recall_at_k(score_IT, image_T, ks=(k,))
    forth = [hit(row, set(np.flatnonzero(image_T == image)), k) for image, row in enumerate(score_IT)]
    back = [hit(row, {int(image_T[text])}, k) for text, row in enumerate(score_IT.T)]
    assert recall.image_to_text == {k: np.mean(forth)}
    assert recall.text_to_image == {k: np.mean(back)}


def test_recall_of_a_table_to_check_by_eye() -> None:
    score_IT = [
        [0.9, 0.1, 0.8, 0.0],  # texts 0 and 1 are its own: first
        [0.2, 0.3, 0.1, 0.4],  # text 2 is its own: fourth
        [0.5, 0.6, 0.5, 0.5],  # text 3 is its own: tied with two, behind one, so fourth
    ]
    recall = recall_at_k(score_IT, [0, 0, 1, 2], ks=(1, 2, 3, 4))
    assert recall.image_to_text == {1: 1 / 3, 2: 1 / 3, 3: 1 / 3, 4: 1.0}
    assert recall.text_to_image == {1: 1 / 2, 2: 1 / 2, 3: 1.0, 4: 1.0}


def test_a_model_that_says_nothing_scores_nothing() -> None:
    recall = recall_at_k(np.zeros((20, 20)), np.arange(20), ks=(1, 10, 20))
    assert recall.image_to_text == recall.text_to_image == {1: 0.0, 10: 0.0, 20: 1.0}


def test_each_way_can_have_its_own_scores() -> None:
    recall = recall_at_k(np.eye(3), range(3), ks=(1,), score_TI=-np.eye(3))
    assert (recall.image_to_text, recall.text_to_image) == ({1: 1.0}, {1: 0.0})


NAN_IT = np.where(np.eye(2) == 1, np.nan, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score_IT": NAN_IT}, "^score_IT: the score at row 0, column 0 is NaN"),
        ({"score_IT": np.zeros(4)}, "^score_IT: shape"),
        ({"score_IT": np.zeros((0, 0))}, "^score_IT: shape"),
        ({"score_TI": NAN_IT}, "^score_TI: "),
        ({"score_TI": np.zeros((2, 3))}, "^score_TI: shape"),
        ({"image_of_text_T": [0]}, "^image_of_text_T: "),
        ({"image_of_text_T": [0.0, 1.0]}, "^image_of_text_T: float64"),
        ({"image_of_text_T": [0, 2]}, "^image_of_text_T: its values"),
        ({"image_of_text_T": [0, 0]}, "^image_of_text_T: its values"),
        ({"image_of_text_T": [0, -1]}, "^image_of_text_T: its values"),
        ({"ks": ()}, "^ks: "),
        ({"ks": (1, 0)}, "^ks: "),
    ],
)
def test_bad_retrieval_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recall_at_k(**({"score_IT": np.eye(2), "image_of_text_T": [0, 1]} | arguments))


@given(retrievals(st.integers(-999, 999).map(lambda n: n / 999), unique=True), st.integers(1, 4), st.integers(0, 99))
def test_rerank_is_blips(case: tuple[Array, Array], k_test: int, seed: int) -> None:
    """salesforce/BLIP, train_retrieval.py: -100 everywhere, ITM logit + similarity for the topk, argsort; no ties."""
    score_IT, image_T = case
    itm_IT = np.random.default_rng(seed).normal(0, 5, score_IT.shape)
    blip_IT = np.full(score_IT.shape, -100.0)
    for image, row_T in enumerate(score_IT):
        top = np.argsort(row_T)[::-1][:k_test]
        blip_IT[image, top] = itm_IT[image, top] + row_T[top]
    candidate_IK = best_candidates(score_IT, k_test)
    new_IT = rerank(score_IT, candidate_IK, np.take_along_axis(itm_IT, candidate_IK, 1))
    np.testing.assert_array_equal(new_IT, np.where(blip_IT == -100, -np.inf, blip_IT))
    first_I = np.argsort(blip_IT, axis=1)[:, -1]
    expected = np.mean(image_T[first_I] == np.arange(len(first_I)))
    assert recall_at_k(new_IT, image_T, ks=(1,)).image_to_text == {1: expected}


def test_candidates_are_the_best_and_of_equals_the_first() -> None:
    candidates = best_candidates([[0.1, 0.5, 0.5, 0.9], [0.0, 0.0, 0.0, 0.0]], 3)
    assert candidates.tolist() == [[3, 1, 2], [0, 1, 2]]
    assert best_candidates([[0.2, 0.3]], 256).tolist() == [[1, 0]]
    score_C = np.random.default_rng(0).integers(0, 5, 500)
    expected = sorted(range(500), key=lambda column: (-score_C[column], column))
    assert best_candidates([score_C], 500).tolist() == [expected]


def test_what_was_not_a_candidate_is_not_found() -> None:
    """The right text is second by ITC, so that with one candidate no ITM score can bring it back."""
    score_IT = np.array([[0.5, 0.6], [0.6, 0.5]])
    for k_test, expected in ((1, 0.0), (2, 1.0)):
        candidate_IK = best_candidates(score_IT, k_test)
        itm_IK = np.where(candidate_IK == np.arange(2)[:, None], 9.0, -9.0)
        assert recall_at_k(rerank(score_IT, candidate_IK, itm_IK), [0, 1], ks=(1,)).image_to_text == {1: expected}


@pytest.mark.parametrize(
    ("candidates", "itm", "message"),
    [
        ([[0], [1]], [[0.5, 0.5], [0.5, 0.5]], "^itm_QK: "),
        ([[0]], [[0.5]], "^itm_QK: "),
        ([[0], [2]], [[0.5], [0.5]], "^candidate_QK: "),
        ([[0], [-1]], [[0.5], [0.5]], "^candidate_QK: "),
        ([[0], [1]], [[0.5], [math.nan]], "^itm_QK: the score at row 1, column 0 is NaN"),
    ],
)
def test_bad_candidates_are_named(candidates: list[list[int]], itm: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rerank(np.eye(2), candidates, itm)
    with pytest.raises(ValueError, match=r"^k_test: 0"):
        best_candidates(np.eye(2), 0)


# Captions -------------------------------------------------------------------------------------------------------------

# On the left what the Java PTBTokenizer of pycocoevalcap 1.2 made of it, after the tools' list of dropped punctuation:
# java -cp stanford-corenlp-3.4.1.jar edu.stanford.nlp.process.PTBTokenizer -preserveLines -lowerCase captions.txt
PTB = [
    ("a man riding a wave on top of a surfboard", "A man riding a wave on top of a surfboard."),
    ("it 's a dog 's life is n't it", "It's a dog's life, isn't it?"),
    (
        "the dogs bowls ca n't wo n't do n't can not gon na i 'm we 've they 'll he 'd",
        "The dogs' bowls can't won't don't cannot gonna I'm we've they'll he'd",
    ),
    ("a black-and-white photo with dashes and more", "A black-and-white photo - with dashes -- and more..."),
    ("quoted text and single text", "\"Quoted\" text and 'single' text"),
    ("3:30 p.m. at st. mary 's u.s. mr. smith", "3:30 p.m. at St. Mary's, U.S. Mr. Smith"),
    ("1,000 people 3.5 stars 2/3", "1,000 people, 3.5 stars, 2/3"),
    ("$ 5 50 % off & more / and/or", "$5 50% off & more / and/or"),
    ("a double space tab", "a  double  space\ttab"),
    ("naïve café grüsse 一只猫", "naïve café GRÜSSE 一只猫"),
    ("buy now | free shipping", "buy now | free shipping"),
    ("a t-shirt an x-ray", "A t-shirt; an x-ray"),
    ("backtick double", "`backtick` ``double''"),
    ("it 's a curly quote 's", "it’s a “curly” quote’s"),
    ("a 2-story bus # 5 * star * ~ tilde ^ = + < >", "a 2-story bus #5 *star* ~tilde ^ = + < >"),
    ("the end etc.", "the end etc."),
    ("", " ... "),
]


@pytest.mark.parametrize(("expected", "caption"), PTB)
def test_words_are_the_java_tokenizers(expected: str, caption: str) -> None:
    assert words(caption) == expected.split()


@given(st.text())
def test_any_text_has_words(text: str) -> None:
    assert all(word and not word.isspace() and word == word.strip() for word in words(text))


def independent_bleu4(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Papineni et al. 2002, section 2, on captions that a split at spaces tokenizes."""
    split = [(c.split(), [r.split() for r in texts]) for c, texts in zip(candidates, references, strict=True)]
    log_precision = 0.0
    for n in range(1, 5):
        matched = offered = 0
        for candidate, texts in split:
            grams, *theirs = ([tuple(t[i : i + n]) for i in range(len(t) - n + 1)] for t in [candidate, *texts])
            offered += len(grams)
            matched += sum(min(grams.count(g), max(other.count(g) for other in theirs)) for g in set(grams))
        if not matched:
            return 0.0
        log_precision += math.log(matched / offered) / 4
    c = sum(len(candidate) for candidate, _ in split)
    r = sum(min((abs(len(t) - len(candidate)), len(t)) for t in texts)[1] for candidate, texts in split)
    return math.exp(log_precision + min(0, 1 - r / c))


def independent_cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Vedantam et al. 2015, equations 2-5, dense: one row a caption, one column an n-gram."""

    def counts_of(captions: Sequence[str], n: int, vocabulary: list[tuple[str, ...]]) -> Array:
        grams = [list(zip(*(c.split()[i:] for i in range(n)), strict=False)) for c in captions]
        return np.array([[g.count(v) for v in vocabulary] for g in grams], float).reshape(len(captions), -1)

    scores = np.zeros(len(candidates))
    everything = [*candidates, *(text for texts in references for text in texts)]
    for n in range(1, 5):
        vocabulary = sorted({g for c in everything for g in zip(*(c.split()[i:] for i in range(n)), strict=False)})
        if not vocabulary:
            continue
        present = np.array([counts_of(texts, n, vocabulary).any(axis=0) for texts in references])
        idf = np.log(len(candidates) / np.maximum(1, present.sum(axis=0)))
        for i, (candidate, texts) in enumerate(zip(candidates, references, strict=True)):
            g_c, g_r = counts_of([candidate], n, vocabulary) * idf, counts_of(texts, n, vocabulary) * idf
            norms = np.linalg.norm(g_c, axis=1) * np.linalg.norm(g_r, axis=1)
            cosine = np.divide((np.minimum(g_c, g_r) * g_r).sum(axis=1), norms, out=0 * norms, where=norms > 0)
            lengths = np.array([len(text.split()) for text in texts])
            scores[i] += (np.exp(-((len(candidate.split()) - lengths) ** 2) / 72) * cosine).mean() * 10 / 4
    return float(scores.mean())


WORDS = st.sampled_from(["a", "the", "dog", "cat", "red", "runs", "on", "grass"])
CAPTIONS = st.lists(WORDS, min_size=1, max_size=9).map(" ".join)
CORPORA = st.lists(st.tuples(CAPTIONS, st.lists(CAPTIONS, min_size=1, max_size=4)), min_size=2, max_size=6)


@given(CORPORA)
@example([("a dog runs on grass", ["a dog runs on grass", "the dog"]), ("a", ["the cat runs on red grass"])])
def test_bleu_and_cider_against_their_papers(corpus: list[tuple[str, list[str]]]) -> None:
    candidates, references = zip(*corpus, strict=True)
    assert bleu4(candidates, references) == pytest.approx(independent_bleu4(candidates, references), abs=1e-9)
    assert cider(candidates, references) == pytest.approx(independent_cider_d(candidates, references), abs=1e-9)


def test_published_values_of_nlg_eval() -> None:
    """Maluuba/nlg-eval, examples/ and README: Bleu_4 0.201143, CIDEr 1.242192, by its copy of the COCO tools."""
    candidates = [
        "this is the model generated sentence1 which seems good enough",
        "this is sentence2 which has been generated by your model",
    ]
    references = [
        ["this is one reference sentence for sentence1", "this is one more reference sentence for sentence1"],
        [
            "this is a reference sentence for sentence2 which was generated by your model",
            "this is the second reference sentence for sentence2",
        ],
    ]
    assert bleu4(candidates, references) == pytest.approx(0.201143, abs=1e-6)
    assert cider(candidates, references) == pytest.approx(1.242192, abs=1e-6)


def test_published_values_of_aac_metrics() -> None:
    """aac-metrics 0.6.0, README: cider_d 0.9614."""
    references = [
        ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
        ["rain is falling hard on a surface"],
    ]
    assert cider(["a man is speaking", "rain falls"], references) == pytest.approx(0.9614, abs=5e-5)


def test_published_values_of_nltk() -> None:
    """nltk.translate.bleu_score.corpus_bleu's docstring: 0.5920..., with three references and one."""
    candidates = [
        "It is a guide to action which ensures that the military always obeys the commands of the party",
        "he read the book because he was interested in world history",
    ]
    references = [
        [
            "It is a guide to action that ensures that the military will forever heed Party commands",
            "It is the guiding principle which guarantees the military forces always being under the command "
            "of the Party",
            "It is the practical guide for the army always to heed the directions of the party",
        ],
        ["he was interested in world history because he read the book"],
    ]
    assert f"{bleu4(candidates, references):.6f}".startswith("0.5920")


# By pycocoevalcap 1.2 with Java 17: PTBTokenizer().tokenize, then Bleu(4) and Cider().compute_score.
COCO_CANDIDATES = [
    "A man is riding a wave on a surfboard.",
    "a black-and-white dog's bowl, on the grass",
    "Two people don't eat pizza",
]
COCO_REFERENCES = [
    ["A man riding a wave on top of a surfboard.", "A surfer rides a large wave in the ocean."],
    ["The dog's bowl is on the grass!", "A black-and-white bowl lies on green grass.", "a dog bowl"],
    ["Two people aren't eating the pizza.", "Two people sit at a table with pizza"],
]


def test_values_of_the_coco_tools() -> None:
    assert bleu4(COCO_CANDIDATES, COCO_REFERENCES) == pytest.approx(0.2866847569, abs=1e-8)
    assert cider(COCO_CANDIDATES, COCO_REFERENCES) == pytest.approx(2.1982760431407073, abs=1e-12)


def test_the_ends_of_the_scales() -> None:
    references = [["a small red cross on a white background"], ["there is a large green circle on black"]]
    exact = [texts[0].upper() + "!" for texts in references]
    assert bleu4(exact, references) == pytest.approx(1)
    assert cider(exact, references) == pytest.approx(10)
    assert bleu4(["", "."], references) == cider(["", "."], references) == 0
    assert cider(exact[::-1], references) < 1


@pytest.mark.parametrize("measure", [bleu4, cider])
def test_bad_captions_are_named(measure: Any) -> None:
    for candidates, references in ([], []), (["a"], []), (["a", "b"], [["a"]]):
        with pytest.raises(ValueError, match=r"^references: "):
            measure(candidates, references)
    with pytest.raises(ValueError, match=r"^references: image 1 has "):
        measure(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match=r"^references: image 0 has 'a dog'"):
        measure(["a", "b"], ["a dog", "b"])
    with pytest.raises(ValueError, match=r"^candidates: "):
        cider(["a"], [["a"]])


# Filter ---------------------------------------------------------------------------------------------------------------


@st.composite
def judged(draw: st.DrawFn) -> tuple[Array, Array]:
    size = draw(st.integers(2, 30))
    scores = arrays(float, size, elements=FEW_LEVELS | st.floats(0, 1))
    true = draw(arrays(bool, size))
    assume(true.any() and not true.all())
    return draw(scores), true


@given(judged(), st.floats(-1, 1) | FEW_LEVELS)
def test_filter_numbers_are_scikit_learns(case: tuple[Array, Array], threshold: float) -> None:
    score_N, true_N = case
    assert roc_auc(score_N, true_N) == pytest.approx(metrics.roc_auc_score(true_N, score_N))
    assert average_precision(score_N, true_N) == pytest.approx(metrics.average_precision_score(true_N, score_N))
    kept = score_N >= threshold
    at = at_threshold(score_N, true_N, threshold)
    assert at.threshold == threshold
    assert at.recall == pytest.approx(metrics.recall_score(true_N, kept))
    assert at.false_positive_rate == pytest.approx(metrics.recall_score(~true_N, kept, pos_label=True))
    if kept.any():
        assert at.precision == pytest.approx(metrics.precision_score(true_N, kept))
        assert noise_rate(true_N[kept]) == pytest.approx(1 - at.precision)
    else:
        assert math.isnan(at.precision)
        assert math.isnan(noise_rate(true_N[kept]))


@pytest.mark.parametrize(
    ("scores", "true", "auc", "precision"),
    [
        ([0.9, 0.8, 0.2, 0.1], [True, True, False, False], 1.0, 1.0),
        ([0.1, 0.2, 0.8, 0.9], [True, True, False, False], 0.0, (1 / 3 + 2 / 4) / 2),
        ([0.5, 0.5, 0.5, 0.5], [True, True, False, False], 0.5, 0.5),
        ([0.9, 0.8, 0.7, 0.6], [True, False, True, False], 0.75, (1 / 1 + 2 / 3) / 2),
    ],
)
def test_rankings_to_check_by_eye(scores: list[float], true: list[bool], auc: float, precision: float) -> None:
    assert roc_auc(scores, true) == pytest.approx(auc)
    assert average_precision(scores, true) == pytest.approx(precision)


@pytest.mark.parametrize("measure", [roc_auc, average_precision, lambda s, t: at_threshold(s, t, 0.5)])
def test_bad_scores_are_named(measure: Any) -> None:
    with pytest.raises(ValueError, match=r"^true_N: 2 of 2 texts are true"):
        measure([0.1, 0.2], [True, True])
    with pytest.raises(ValueError, match=r"^true_N: 0 of 2 texts are true"):
        measure([0.1, 0.2], [False, False])
    with pytest.raises(ValueError, match=r"^score_N: 1 of 3 scores are NaN"):
        measure([0.1, math.nan, 0.2], [True, False, True])
    with pytest.raises(ValueError, match=r"^score_N: shape"):
        measure([], [])
    for flags in ([True, False, True], [1, 0], [0.1, 0.9]):
        with pytest.raises(ValueError, match=r"^true_N: "):
            measure([0.1, 0.2], flags)


def test_bad_flags_and_thresholds_are_named() -> None:
    with pytest.raises(ValueError, match=r"^threshold: NaN"):
        at_threshold([0.1, 0.2], [True, False], math.nan)
    with pytest.raises(ValueError, match=r"^true_N: int64"):
        noise_rate([1, 0])


def test_noise_rate() -> None:
    assert noise_rate([True, True, False, True]) == 0.25
    assert noise_rate([True]) == 0
    assert math.isnan(noise_rate([]))


def f1(good: Array, bad: Array, threshold: float) -> float:
    hits = int((good >= threshold).sum())
    return 2 * hits / (hits + int((bad >= threshold).sum()) + len(good))


SCORES = st.lists(FEW_LEVELS | st.floats(0, 1), min_size=1, max_size=12).map(np.array)


@given(SCORES, SCORES)
def test_no_threshold_has_a_better_f1(good: Array, bad: Array) -> None:
    found = calibrate(good, bad)
    tried = [*good, *bad, *((low + high) / 2 for low, high in pairwise(sorted([*good, *bad])))]
    assert f1(good, bad, found.threshold) == pytest.approx(max(f1(good, bad, threshold) for threshold in tried))
    true = np.arange(len(good) + len(bad)) < len(good)
    assert found == at_threshold(np.concatenate([good, bad]), true, found.threshold)


@given(SCORES, SCORES, st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
def test_the_limit_holds_and_no_threshold_within_it_keeps_more(good: Array, bad: Array, limit: float) -> None:
    tried = [t for t in {*good, *bad} if (bad >= t).mean() <= limit]
    if not tried:
        with pytest.raises(ValueError, match=r"^max_false_positive_rate: \d+ of \d+ untrue"):
            calibrate(good, bad, max_false_positive_rate=limit)
        return
    found = calibrate(good, bad, max_false_positive_rate=limit)
    assert found.false_positive_rate == (bad >= found.threshold).mean() <= limit
    assert found.recall == max((good >= t).mean() for t in tried)


@pytest.mark.parametrize(
    ("matched", "shuffled", "limit", "threshold", "precision", "recall"),
    [
        ([0.9, 0.8], [0.1, 0.2], None, 0.5, 1, 1),  # half-way over the gap
        ([0.9, 0.8], [0.1, 0.2], 0.0, 0.5, 1, 1),
        ([0.9, 0.8], [0.1, 0.2], 0.5, 0.15, 2 / 3, 1),
        ([0.9, 0.8], [0.1, 0.2], 1.0, 0.1, 1 / 2, 1),
        ([0.9, 0.3], [0.1, 0.5], 0.0, 0.7, 1, 1 / 2),
        ([0.5], [0.5], None, 0.5, 1 / 2, 1),  # a constant filter: keep all
        ([np.nextafter(1, 2)], [1.0], 0.0, np.nextafter(1, 2), 1, 1),  # no number lies between, and either
        ([1.0], [np.nextafter(1, 0)], 0.0, 1.0, 1, 1),  # may be what half-way rounds to
        ([0.9, 0.8, 0.7], [0.85] + [0.1] * 99, 0.01, 0.4, 3 / 4, 1),
    ],
)
def test_calibration_to_check_by_eye(
    matched: list[float], shuffled: list[float], limit: float | None, threshold: float, precision: float, recall: float
) -> None:
    found = calibrate(matched, shuffled, max_false_positive_rate=limit)
    assert (found.threshold, found.precision, found.recall) == pytest.approx((threshold, precision, recall))


@pytest.mark.parametrize(
    ("matched", "shuffled", "limit", "message"),
    [
        ([], [0.1], None, "^matched_N: shape"),
        ([0.1], [], None, "^shuffled_M: shape"),
        ([0.1, math.nan], [0.1], None, "^matched_N: 1 of 2 scores are NaN"),
        ([0.1], [math.nan], None, "^shuffled_M: 1 of 1 scores are NaN"),
        ([0.1], [0.1], -0.1, "^max_false_positive_rate: -0.1 is not"),
        ([0.1], [0.1], math.nan, "^max_false_positive_rate: nan is not"),
        ([0.1], [0.9, 0.2], 0.4, "^max_false_positive_rate: 1 of 2 untrue pairs"),
    ],
)
def test_bad_calibrations_are_named(
    matched: list[float], shuffled: list[float], limit: float | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(matched, shuffled, max_false_positive_rate=limit)
