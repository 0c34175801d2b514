"""The decision, as a table to check by eye."""

from __future__ import annotations

import pytest

from capfilt.decide import Text, best_text, decide, row_outcome
from capfilt.schema import Reason, Source, Status
from capfilt.spec import Thresholds

W, S = Source.WEB, Source.SYNTHETIC
HALF = Thresholds()

# each text: (source, candidate, clean, itm) -> kept or reason
TABLE = [
    ("both match", [(W, 0, "a cat", 0.9), (S, 0, "a dog", 0.8)], ["kept", "kept"], "kept"),
    ("at the threshold is kept", [(W, 0, "a cat", 0.5), (S, 0, "a dog", 0.49)], ["kept", "below_threshold"], "kept"),
    ("only the synthetic", [(W, 0, "buy now", 0.1), (S, 0, "a dog", 0.8)], ["below_threshold", "kept"], "kept"),
    ("neither", [(W, 0, "buy", 0.1), (S, 0, "a", 0.2)], ["below_threshold", "below_threshold"], "no_match"),
    ("no web text", [(W, 0, "", None), (S, 0, "a dog", 0.8)], ["empty_text", "kept"], "kept"),
    ("nothing to judge", [(W, 0, "", None), (S, 0, "", None)], ["empty_text", "empty_text"], "no_text"),
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
def test_table(texts: list[tuple[Source, int, str, float | None]], expected: list[str], row: str) -> None:
    verdicts = decide([Text(source, k, clean, clean, itm) for source, k, clean, itm in texts], HALF)
    assert [text.reason or "kept" for text in verdicts] == expected
    assert [text.kept for text in verdicts] == [verdict == "kept" for verdict in expected]
    status, reason = row_outcome(verdicts)
    assert (reason or status) == row


def test_thresholds_are_per_source() -> None:
    texts = [Text(W, 0, "a", "a", 0.6), Text(S, 0, "b", "b", 0.6)]
    assert [t.kept for t in decide(texts, Thresholds(web=0.7, synthetic=0.5))] == [False, True]
    assert [t.kept for t in decide(texts, Thresholds(web=0.5, synthetic=0.7))] == [True, False]


def test_a_text_dropped_as_web_may_be_kept_as_synthetic() -> None:
    texts = [Text(W, 0, "a", "a", 0.6), Text(S, 0, "a", "a", 0.6)]
    verdicts = decide(texts, Thresholds(web=0.9, synthetic=0.5))
    assert [t.reason for t in verdicts] == [Reason.BELOW_THRESHOLD, None]


@pytest.mark.parametrize("score", [None, float("nan"), -0.1, 1.1])
def test_a_score_that_is_no_probability_is_refused(score: float | None) -> None:
    with pytest.raises(ValueError, match="not a probability"):
        decide([Text(W, 0, "a", "a", score)], HALF)


def test_best_text_is_the_highest_score_and_web_wins_ties() -> None:
    verdicts = decide([Text(W, 0, "a", "a", 0.8), Text(S, 0, "b", "b", 0.8)], HALF)
    assert best_text(verdicts).source is W
    verdicts = decide([Text(W, 0, "a", "a", 0.8), Text(S, 0, "b", "b", 0.9)], HALF)
    assert best_text(verdicts).source is S
    with pytest.raises(ValueError, match="no text is kept"):
        best_text(decide([Text(W, 0, "a", "a", 0.1)], HALF))


def test_a_row_without_texts_has_no_text() -> None:
    assert row_outcome([]) == (Status.DROPPED, Reason.NO_TEXT)
