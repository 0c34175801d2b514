"""Caption clean-up, BLIP's own. What filters read; the text as it came is kept beside it."""

from __future__ import annotations

import re

MAX_WORDS = 50
"""BLIP's limit (data/utils.py, pre_caption)."""

# What a reader cannot see. bert-base-uncased's own clean-up drops these too, so scores do not change; dropping them
# here makes texts that look alike compare alike, and an invisible text empty. Surrogates cannot be encoded at all.
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]+"
)
_PUNCTUATION = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
_SPACE = re.compile(r"\s+")


def clean(text: str, max_words: int = MAX_WORDS) -> str:
    """Lower case, `.!"()*#:;~` and white space to single spaces, cut to `max_words`.

    BLIP's pre_caption (salesforce/BLIP, data/utils.py), but for two things that bert-base-uncased's tokenizer does not
    see or drops itself: code points that nobody can see are removed, and a lone tab or line end counts as white space.

    Args:
        text: anything, lone surrogates and control characters included. Time is linear in its length.
        max_words: words are what white space separates; at least 1.

    Returns:
        A text that encodes as UTF-8, without white space at its ends; empty where nothing is left.
        Cleaning it again changes nothing.
    """
    text = _UNSEEN.sub("", text).lower().translate(_PUNCTUATION)
    words = _SPACE.sub(" ", text).strip(" ").split(" ", max_words)
    return " ".join(words[:max_words])
