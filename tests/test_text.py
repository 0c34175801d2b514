from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.text import MAX_WORDS, clean


def pre_caption(caption: str, max_words: int = 50) -> str:
    """salesforce/BLIP, data/utils.py, in our words: the reference."""
    caption = re.sub(r"([.!\"()*#:;~])", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption)
    caption = caption.rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Dog, running!", "a dog, running"),
        ('say "hi" (twice) *now* #tag: a; b~c', "say hi twice now tag a b c"),
        ("it's 50% off - www.example.com/a?b=c", "it's 50% off - www example com/a?b=c"),
        ("  two\t\n spaces \r\n", "two spaces"),
        ("a\tb\nc", "a b c"),
        ("", ""),
        (" \n\t ", ""),
        ("!!!...***", ""),
        ("\u200b\ufeff\x00", ""),
        ("nul\x00inside", "nulinside"),
        ("lone \ud800 surrogate \udfff", "lone surrogate"),
        ("bidi \u202eevil\u202c", "bidi evil"),
        ("a\u2003b\u00a0c\u2028d", "a b c d"),
        ("GRÜSSE AUS ÅLAND", "grüsse aus åland"),
        ("一只 猫", "一只 猫"),
        ("emoji \U0001f600 ok", "emoji \U0001f600 ok"),
        ("[SEP] [ENC]", "[sep] [enc]"),
    ],
)
def test_examples(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_cut_to_words() -> None:
    words = [f"w{i}" for i in range(80)]
    assert clean(" ".join(words)) == " ".join(words[:MAX_WORDS])
    assert clean("one two three", max_words=2) == "one two"
    assert clean("one two three", max_words=3) == "one two three"


@given(st.text("abcXYZ 019.!\"()*#:;~,'-?/|$%&@[]<>\u00e9\u4e00"), st.integers(1, 6))
def test_is_blips_own(text: str, max_words: int) -> None:
    assert clean(text, max_words) == pre_caption(text, max_words)


@given(st.text(st.characters(categories=None)), st.integers(1, 6))
def test_any_text(text: str, max_words: int) -> None:
    once = clean(text, max_words)
    assert clean(once, max_words) == once
    assert once == once.strip()
    assert len(once.split()) <= max_words
    once.encode("utf-8")


def test_surrogates_reach_the_property_above() -> None:
    with pytest.raises(UnicodeEncodeError):
        "\ud800".encode()
    assert clean("\ud800") == ""


@pytest.mark.parametrize("piece", ["a", " ", "a ", "!", "\ud800", "\u0130", ". ", "\t\n", "\u200b a"])
def test_a_million_characters(piece: str) -> None:
    start = time.process_time()
    clean(piece * (1_000_000 // len(piece)))
    assert time.process_time() - start < 2  # a quadratic pass would take hours
