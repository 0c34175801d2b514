"""The decision, as tables to check by eye."""

from __future__ import annotations

from dataclasses import replace

import pytest

from capfilt.decide import FilterScore, Text, as_stored, best_text, decide, row_outcome
from capfilt.schema import Reason, Source, Status
from capfilt.spec import Decision, Keep, Thresholds

W, S = Source.WEB, Source.SYNTHETIC
HALF = (Thresholds(),)


def text(source: Source, candidate: int, clean: str, *itm: float, captioner: str = "c") -> Text:
    """A text that filters f0, f1, ... gave these ITM scores; none if there are none."""
    scores = tuple(FilterScore(f"f{n}", as_stored(p), as_stored(2 * p - 1)) for n, p in enumerate(itm))
    return Text(source, candidate, clean, clean, captioner if source is S else None, scores)


def words(verdicts: list[Text]) -> list[str]:
    assert all(verdict.kept == (verdict.reason is None) for verdict in verdicts)
    return [verdict.reason or "kept" for verdict in verdicts]


# each text: (source, candidate, clean, itm) -> kept or reason
TABLE = [
    ("both match", [(W, 0, "a cat", 0.9), (S, 0, "a dog", 0.8)], ["kept", "kept"], "kept"),
    ("at the threshold is kept", [(W, 0, "a cat", 0.5), (S, 0, "a dog", 0.49)], ["kept", "below_threshold"], "kept"),
    ("only the synthetic", [(W, 0, "buy now", 0.1), (S, 0, "a dog", 0.8)], ["below_threshold", "kept"], "kept"),
    ("neither", [(W, 0, "buy", 0.1), (S, 0, "a", 0.2)], ["below_threshold", "below_threshold"], "no_match"),
    ("no web text", [(W, 0, ""), (S, 0, "a dog", 0.8)], ["empty_text", "kept"], "kept"),
    ("nothing to judge", [(W, 0, ""), (S, 0, "")], ["empty_text", "empty_text"], "no_text"),
    ("same text twice", [(W, 0, "a cat", 0.9), (S, 0, "a cat", 0.9)], ["kept", "duplicate_text"], "kept"),
    (
        "best of three, first of equals",
        [(W, 0, "x", 0.0), (S, 0, "a", 0.6), (S, 1, "b", 0.8), (S, 2, "c", 0.8)],
        ["below_threshold", "not_best", "kept", "not_best"],
        "kept",
    ),
    (
        "a candidate equal to the web text gives way to the next best",
        [(W, 0, "a", 0.9), (S, 0, "a", 0.9), (S, 1, "b", 0.7)],
        ["kept", "duplicate_text", "kept"],
        "kept",
    ),
]


@pytest.mark.parametrize(("texts", "expected", "row"), [case[1:] for case in TABLE], ids=[case[0] for case in TABLE])
@pytest.mark.parametrize("decision", ["mean", "vote"])  # of one filter: the same
def test_one_filter(texts: list[tuple[Source, int, str]], expected: list[str], row: str, decision: Decision) -> None:
    verdicts = decide([text(*one) for one in texts], HALF, decision, "best")
    assert words(verdicts) == expected
    status, reason = row_outcome(verdicts)
    assert (reason or status) == row


# each text: (clean, itm of each filter); a threshold of 0.5 -> by mean, by vote
TOGETHER = [
    ("agreed", [("a", 0.9, 0.8, 0.7)], ["kept"], ["kept"]),
    ("one dissents", [("a", 0.6, 0.6, 0.1)], ["below_threshold"], ["kept"]),
    ("one is very sure", [("a", 1.0, 0.4, 0.4)], ["kept"], ["below_threshold"]),
    ("a tied vote is no majority", [("a", 0.9, 0.1)], ["kept"], ["below_threshold"]),
    ("a vote at the threshold counts", [("a", 0.5, 0.5, 0.0)], ["below_threshold"], ["kept"]),
    (
        "the vote admits, the mean ranks",
        [("a", 0.6, 0.6, 0.1), ("b", 0.5, 0.5, 0.5), ("c", 0.4, 0.4, 1.0)],
        ["below_threshold", "not_best", "kept"],
        ["not_best", "kept", "below_threshold"],
    ),
]


@pytest.mark.parametrize(("texts", "mean", "vote"), [case[1:] for case in TOGETHER], ids=[case[0] for case in TOGETHER])
def test_several_filters(texts: list[tuple[str, float]], mean: list[str], vote: list[str]) -> None:
    synthetic = [text(S, k, *one) for k, one in enumerate(texts)]
    assert words(decide(synthetic, HALF, "mean", "best")) == mean
    assert words(decide(synthetic, HALF * len(synthetic[0].scores), "vote", "best")) == vote


# each text: (source, captioner, candidate, clean, itm) -> under best, under all-above-threshold
KEPT = [
    (
        "several",
        [(W, "", 0, "x", 0.1), (S, "c", 0, "a", 0.6), (S, "c", 1, "b", 0.8), (S, "c", 2, "c", 0.4)],
        ["below_threshold", "not_best", "kept", "below_threshold"],
        ["below_threshold", "kept", "kept", "below_threshold"],
    ),
    (
        "of two captioners' equal texts the first stays",
        [(S, "c", 0, "a", 0.6), (S, "d", 0, "a", 0.6), (S, "d", 1, "b", 0.6)],
        ["kept", "duplicate_text", "not_best"],
        ["kept", "duplicate_text", "kept"],
    ),
    (
        "of equal scores the first captioner's, then the lowest candidate",
        [(S, "c", 0, "a", 0.1), (S, "c", 1, "b", 0.7), (S, "c", 2, "c", 0.7), (S, "d", 0, "d", 0.7)],
        ["below_threshold", "kept", "not_best", "not_best"],
        ["below_threshold", "kept", "kept", "kept"],
    ),
    (
        "the web text stays, its equal goes",
        [(W, "", 0, "a", 0.6), (S, "c", 0, "b", 0.9), (S, "d", 0, "a", 0.6)],
        ["kept", "kept", "duplicate_text"],
        ["kept", "kept", "duplicate_text"],
    ),
]


@pytest.mark.parametrize(("texts", "best", "every"), [case[1:] for case in KEPT], ids=[case[0] for case in KEPT])
def test_what_is_kept(texts: list[tuple[Source, str, int, str, float]], best: list[str], every: list[str]) -> None:
    given = [text(source, k, clean, itm, captioner=captioner) for source, captioner, k, clean, itm in texts]
    assert words(decide(given, HALF, "mean", "best")) == best
    assert words(decide(given, HALF, "mean", "all-above-threshold")) == every


def test_scores_are_means_as_the_tables_hold_them() -> None:
    one, two = text(W, 0, "a", 0.7), text(W, 0, "a", 0.1, 0.2)
    assert (one.itm, one.itc) == (as_stored(0.7), as_stored(0.4))
    assert two.itm == as_stored((as_stored(0.1) + as_stored(0.2)) / 2)
    assert two.itc == as_stored((as_stored(-0.8) + as_stored(-0.6)) / 2)
    assert text(W, 0, "").itm is text(W, 0, "").itc is None
    without = replace(two, scores=(replace(two.scores[0], itc=None), two.scores[1]))
    assert (without.itm, without.itc) == (two.itm, as_stored(-0.6))
    assert replace(two, scores=tuple(replace(score, itc=None) for score in two.scores)).itc is None


def test_thresholds_are_per_source() -> None:
    texts = [text(W, 0, "a", 0.6), text(S, 0, "b", 0.6)]
    for thresholds, expected in (
        (Thresholds(web=0.7, synthetic=0.5), [False, True]),
        (Thresholds(web=0.5, synthetic=0.7), [True, False]),
    ):
        assert [t.kept for t in decide(texts, [thresholds], "mean", "best")] == expected


def test_in_a_vote_each_filter_has_its_own_thresholds() -> None:
    texts = [text(W, 0, "a", 0.6, 0.6, 0.6), text(S, 0, "b", 0.6, 0.6, 0.6)]
    lax, strict = Thresholds(web=0.5, synthetic=0.7), Thresholds(web=0.7, synthetic=0.7)
    assert [t.kept for t in decide(texts, [lax, strict, lax], "vote", "best")] == [True, False]
    assert [t.kept for t in decide(texts, [lax, strict, strict], "vote", "best")] == [False, False]


def test_a_text_dropped_as_web_may_be_kept_as_synthetic() -> None:
    texts = [text(W, 0, "a", 0.6), text(S, 0, "a", 0.6)]
    verdicts = decide(texts, [Thresholds(web=0.9, synthetic=0.5)], "mean", "best")
    assert [t.reason for t in verdicts] == [Reason.BELOW_THRESHOLD, None]


@pytest.mark.parametrize("score", [float("nan"), -0.1, 1.1])
@pytest.mark.parametrize("others", [(), (0.5,)])
def test_a_score_that_is_no_probability_is_refused(score: float, others: tuple[float, ...]) -> None:
    """One that the mean of several would hide, too."""
    with pytest.raises(ValueError, match=rf"f{len(others)}: ITM score \S+ is not a probability"):
        decide([text(W, 0, "a", *others, score)], HALF, "mean", "best")


def test_a_score_that_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="has no ITM score"):
        decide([text(W, 0, "a")], HALF, "mean", "best")


@pytest.mark.parametrize(("decision", "thresholds"), [("mean", 2), ("vote", 1), ("vote", 3)])
def test_thresholds_that_do_not_fit_are_refused(decision: Decision, thresholds: int) -> None:
    with pytest.raises(ValueError, match=r"zip|unpack"):
        decide([text(W, 0, "a", 0.5, 0.5)], HALF * thresholds, decision, "best")


@pytest.mark.parametrize("keep", ["best", "all-above-threshold"])
def test_best_text_is_the_highest_mean_and_web_wins_ties(keep: Keep) -> None:
    def best(*texts: Text) -> Text:
        return best_text(decide(texts, HALF, "mean", keep))

    assert best(text(W, 0, "a", 0.8), text(S, 0, "b", 0.8)).source is W
    assert best(text(W, 0, "a", 0.8), text(S, 0, "b", 0.9)).source is S
    assert best(text(S, 0, "a", 1.0, 0.4), text(S, 1, "b", 0.8, 0.8), text(S, 2, "c", 0.8, 0.8)).candidate == 1
    with pytest.raises(ValueError, match="no text is kept"):
        best(text(W, 0, "a", 0.1))


def test_a_row_without_texts_has_no_text() -> None:
    assert row_outcome([]) == (Status.DROPPED, Reason.NO_TEXT)
